//! The committed definitions are what the types give. `make generate` writes them.

use std::path::Path;

#[test]
fn the_resource_definitions_are_current() {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").expect("run by cargo");
    let root = Path::new(&here).parent().unwrap();
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

/// What `kubectl explain` shows: a field without a word says nothing.
#[test]
fn every_field_of_every_resource_is_described() {
    fn walk(schema: &serde_json::Value, path: &str, silent: &mut Vec<String>) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            if field["description"].as_str().is_none_or(|d| d.len() < 9) {
                silent.push(path.clone());
            }
            // what Kubernetes defines, it describes
            if !path.ends_with(".resources") {
                walk(field, &path, silent);
                walk(&field["items"], &path, silent);
            }
        }
    }
    let mut silent = Vec::new();
    for (path, yaml) in weir_crds::crd_files() {
        let definition: serde_json::Value = serde_yaml_ng::from_str(&yaml).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        for part in ["spec", "status"] {
            let described = &schema["properties"][part];
            assert!(described["properties"].is_object(), "{path}: no {part}");
            walk(described, &format!("{path}: {part}"), &mut silent);
        }
    }
    assert!(silent.is_empty(), "{silent:#?}");
}
