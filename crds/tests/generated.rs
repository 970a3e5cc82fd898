//! The committed definitions are what the types give. `make generate` writes them.

use std::path::Path;

#[test]
fn the_resource_definitions_are_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (path, yaml) in weir_crds::crd_files() {
        let file = root.join(&path);
        if std::env::var_os("WEIR_BLESS").is_some() {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, yaml).unwrap();
        } else {
            assert!(std::fs::read_to_string(&file).unwrap_or_default() == yaml, "{path} is stale: run `make generate`");
        }
    }
}
