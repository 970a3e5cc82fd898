//! Who may import whom (see ARCHITECTURE.md), read from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let manifest = std::env::var("CARGO_MANIFEST_DIR").expect("run by cargo") + "/../Cargo.toml";
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked", "--offline", "--manifest-path", &manifest])
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata");
    let name = |v: &serde_json::Value| v["name"].as_str().unwrap().to_owned();
    let normal = |p: &serde_json::Value| {
        p["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null()).map(name).collect()
    };
    metadata["packages"].as_array().unwrap().iter().map(|p| (name(p), normal(p))).collect()
}

#[test]
fn crates_import_only_what_they_may() {
    let all = dependencies();
    let never = |of: &str, banned: &[&str]| {
        let found: Vec<_> = all[of]
            .iter()
            .filter(|d| banned.iter().any(|b| d == b || (b.ends_with('*') && d.starts_with(b.trim_end_matches('*')))))
            .collect();
        assert!(found.is_empty(), "{of} imports {found:?}");
    };
    never("weir-core", &["weir-*", "tokio*", "tonic*", "kube", "rocksdb", "rand"]);
    never("weir-proto", &["weir-*"]);
    never("weir-checker", &["weir-*"]);
    // bounds, names and the wire form of specs are stated once, in weir-proto
    never("weir-crds", &["weir-core", "weir-store", "weir-broker", "weir-client", "weir-operator"]);
    never("weir-store", &["weir-proto", "weir-client", "weir-broker", "tokio*", "tonic*"]);
    never("weir-broker", &["kube", "k8s-openapi", "weir-crds", "weir-client"]);
    never("weir-sim", &["rocksdb", "tokio*", "weir-broker"]);
    never("weir-operator", &["weir-broker", "weir-store", "weir-client", "rocksdb"]);
    never("weir-e2e", &["weir-broker", "weir-store", "weir-core", "weir-operator"]);
    never("weir-client", &["weir-core", "weir-store", "weir-broker", "rocksdb"]);
}
