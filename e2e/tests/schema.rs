//! The resource definitions as an API server takes them: what is refused, what people see. An API server and etcd, nothing else.

use anyhow::Context as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use weir_crds::{StreamCluster, Topic};
use weir_e2e::alone::ApiServer;
use weir_e2e::{apply, invalid};

#[tokio::test]
#[ignore = "needs kube-apiserver and etcd: make e2e"]
async fn definitions_refuse_what_cannot_be_right_and_show_what_people_want_to_know() -> anyhow::Result<()> {
    let programs = PathBuf::from(std::env::var_os("WEIR_E2E_BIN").context("WEIR_E2E_BIN is set by make e2e")?);
    let home = std::env::temp_dir().join(format!("weir-schema-{}", std::process::id()));
    let begun = std::time::Instant::now();
    let server = ApiServer::start(&programs, home).await?;
    println!("an API server alone is up after {:.1} s", begun.elapsed().as_secs_f64());
    let client = &server.client;
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for (path, yaml) in weir_crds::crd_files().into_iter().filter(|(path, _)| path.starts_with("crds/")) {
        let definition: CustomResourceDefinition = serde_yaml_ng::from_str(&yaml)?;
        definitions.create(&PostParams::default(), &definition).await.context(path)?;
        await_condition(definitions.clone(), &definition.name_any(), conditions::is_crd_established()).await?;
    }
    let namespace = "default";
    let cluster = "apiVersion: weir.dev/v1alpha1\nkind: StreamCluster\nmetadata: {name: default}\nspec: {brokers: 3}\n";
    // a definition is served a moment after it is established
    let mut served = Err(None);
    for _ in 0..50 {
        served = apply(client, namespace, cluster).await.map_err(Some);
        if served.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    served.map_err(|e| anyhow::anyhow!("{e:?}"))?;
    apply(client, namespace, invalid::VALID).await?;
    apply(client, namespace, include_str!("../../examples/orders.yaml")).await?;
    for (yaml, message) in invalid::cases() {
        let refused = apply(client, namespace, &yaml).await.expect_err(&yaml).to_string();
        assert!(refused.contains(message), "{yaml}: {refused:?} does not say {message:?}");
    }
    println!("{} invalid resources refused", invalid::cases().len());
    scaled(&server).await?;
    columns(&server).await?;
    told_by_kubectl(&server).await
}

/// `kubectl scale` changes the spec, within what the rules allow.
async fn scaled(server: &ApiServer) -> anyhow::Result<()> {
    let clusters: Api<StreamCluster> = Api::namespaced(server.client.clone(), "default");
    let to = |brokers: i32| Patch::Merge(json!({"spec": {"replicas": brokers}}));
    clusters.patch_scale("default", &PatchParams::default(), &to(5)).await?;
    assert_eq!(clusters.get("default").await?.spec.brokers, 5);
    let refused = clusters.patch_scale("default", &PatchParams::default(), &to(0)).await;
    assert!(refused.is_err(), "no broker at all");
    // a status is written apart from the spec
    let topics: Api<Topic> = Api::namespaced(server.client.clone(), "default");
    let before = topics.get("load").await?.metadata.generation;
    let status = Patch::Merge(json!({"status": {"size": "1Ki"}, "spec": {"partitions": 9}}));
    let after = topics.patch_status("load", &PatchParams::default(), &status).await?;
    assert_eq!((after.metadata.generation, after.spec.partitions), (before, 6));
    Ok(())
}

/// What `kubectl get` shows.
async fn columns(server: &ApiServer) -> anyhow::Result<()> {
    for (plural, wanted) in [
        ("streamclusters", ["Brokers", "Ready"]),
        ("topics", ["Partitions", "Ready"]),
        ("subscriptions", ["Topic", "Backlog"]),
    ] {
        let request = http::Request::get(format!("/apis/weir.dev/v1alpha1/{plural}"))
            .header("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
            .body(Vec::new())?;
        let table: Value = server.client.request(request).await?;
        let names: Vec<&str> =
            table["columnDefinitions"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
        assert!(wanted.iter().all(|w| names.contains(w)), "{plural}: {names:?}");
        assert!(!table["rows"].as_array().context("rows")?.is_empty());
    }
    Ok(())
}

/// The words people type, where there is a `kubectl`.
async fn told_by_kubectl(server: &ApiServer) -> anyhow::Result<()> {
    let kubectl = |arguments: &[&str]| {
        let said = Command::new("kubectl").arg("--kubeconfig").arg(&server.kubeconfig).args(arguments).output();
        said.map(|s| String::from_utf8_lossy(&s.stdout).into_owned() + &String::from_utf8_lossy(&s.stderr))
    };
    let Ok(all) = kubectl(&["get", "weir"]) else {
        println!("no kubectl here: what it prints was not looked at");
        return Ok(());
    };
    for name in ["streamcluster.weir.dev/default", "topic.weir.dev/load", "subscription.weir.dev/mail"] {
        assert!(all.contains(name), "kubectl get weir: {all}");
    }
    println!("$ kubectl get weir\n{all}");
    let mut explained = String::new();
    for _ in 0..50 {
        explained = kubectl(&["explain", "topic.spec"])?;
        if !explained.starts_with("error") {
            break; // documentation follows the definition after a while
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(explained.contains("Number of partitions") && explained.contains("deletionPolicy"), "{explained}");
    println!("$ kubectl explain topic.spec\n{explained}");
    Ok(())
}
