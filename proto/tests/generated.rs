//! The committed code is what the .proto gives. `make generate` writes it.

use std::path::PathBuf;

#[test]
fn the_generated_code_is_current() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("run by cargo"));
    let out = tempfile::tempdir().unwrap();
    let set = protox::compile(["weir/v1/weir.proto"], [root.join("proto")]).expect("the .proto compiles");
    let descriptor = prost::Message::encode_to_vec(&set);
    tonic_prost_build::configure().bytes(".").out_dir(out.path()).compile_fds(set).expect("code is generated");
    let code = std::fs::read(out.path().join("weir.v1.rs")).unwrap();
    for (name, fresh) in [("weir.v1.rs", code), ("descriptor.bin", descriptor)] {
        let path = root.join("src/gen").join(name);
        if std::env::var_os("WEIR_BLESS").is_some() {
            std::fs::write(&path, fresh).unwrap();
        } else {
            assert!(
                std::fs::read(&path).unwrap_or_default() == fresh,
                "{} is stale: run `make generate`",
                path.display()
            );
        }
    }
}
