//! The resource definitions as files: for `kubectl apply`, and for the chart.

use crate::{StreamCluster, Subscription, Topic};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::Value;

const FORMATS: [&str; 4] = ["uint", "uint8", "uint32", "uint64"];

/// Path from the project's root, and content, of every generated file.
pub fn crd_files() -> Vec<(String, String)> {
    let definitions: [CustomResourceDefinition; 3] = [StreamCluster::crd(), Topic::crd(), Subscription::crd()];
    let mut out = Vec::new();
    for crd in definitions {
        let name = crd.metadata.name.clone().expect("a derived definition has a name");
        let mut value = serde_json::to_value(crd).expect("a definition is JSON");
        tidy(&mut value);
        let yaml = serde_yaml_ng::to_string(&value).expect("a definition is YAML");
        let head = "# Generated from crds/src by `make generate`; do not edit.\n";
        out.push((format!("crds/{name}.yaml"), format!("{head}{yaml}")));
        // Helm installs these before everything else, and leaves them where they are after
        out.push((format!("charts/weir/crds/{name}.yaml"), format!("{head}{yaml}")));
    }
    out
}

/// Drops what Kubernetes does not know: formats of unsigned numbers, of which it would warn, and empty statuses.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("format").and_then(Value::as_str).is_some_and(|f| FORMATS.contains(&f)) {
                map.remove("format");
            }
            if map.contains_key("spec") && map.get("status").is_some_and(Value::is_null) {
                map.remove("status");
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(list) => list.iter_mut().for_each(tidy),
        _ => {}
    }
}
