//! Before the operator is uninstalled: nobody would be left to carry out finalizers, so they are taken off. What is declared stays,
//! and so does what the brokers hold; installed again, the operator goes on from there.

use anyhow::ensure;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::fmt::Debug;
use std::time::Duration;
use weir_crds::{Subscription, Topic};

/// Seconds to wait for the operator's pods to go.
const WAIT_SECONDS: u32 = 90;

/// Ends the operator's pods, then takes its finalizers off everything.
pub async fn retire(client: Client, namespace: &str, deployment: &str) -> anyhow::Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let none = Patch::Merge(json!({"spec": {"replicas": 0}}));
    deployments.patch(deployment, &PatchParams::default(), &none).await?;
    let mut left = i32::MAX;
    for _ in 0..WAIT_SECONDS {
        let status = deployments.get(deployment).await?.status.unwrap_or_default();
        left = status.replicas.unwrap_or(0);
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    ensure!(left == 0, "{left} pods of {deployment} are still there; they would put the finalizers on again");
    let topics = take_off::<Topic>(&client, crate::topic::FINALIZER).await?;
    let subscriptions = take_off::<Subscription>(&client, crate::subscription::FINALIZER).await?;
    tracing::info!(topics, subscriptions, "finalizers taken off");
    Ok(())
}

async fn take_off<K>(client: &Client, finalizer: &str) -> anyhow::Result<usize>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let mut count = 0;
    for object in Api::<K>::all(client.clone()).list(&ListParams::default()).await? {
        if !object.finalizers().iter().any(|f| f == finalizer) {
            continue;
        }
        let rest: Vec<&String> = object.finalizers().iter().filter(|f| *f != finalizer).collect();
        let version = object.resource_version();
        let patch = json!({"metadata": {"finalizers": rest, "resourceVersion": version}});
        let api: Api<K> = Api::namespaced(client.clone(), &object.namespace().unwrap_or_default());
        api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        count += 1;
    }
    Ok(count)
}
