//! Volumes for the cluster that `make e2e` brings up: a folder on the node a pod was scheduled to, made when a claim asks,
//! grown when it grows, removed with it.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

const PROVISIONER: &str = "e2e.weir.dev/folder";

/// The default storage class.
pub async fn make_class(client: &Client) -> Result<(), kube::Error> {
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
        "metadata": {"name": "folder", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": PROVISIONER, "volumeBindingMode": "WaitForFirstConsumer", "allowVolumeExpansion": true,
    });
    let api: Api<StorageClass> = Api::all(client.clone());
    api.patch("folder", &PatchParams::apply("weir-e2e").force(), &Patch::Apply(class)).await?;
    Ok(())
}

/// Looks after claims for as long as the test runs.
pub async fn look_after(client: Client, home: PathBuf) {
    loop {
        // the API server is stopped by a test; then there is nothing to look after
        let _ = look(&client, &home).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

async fn look(client: &Client, home: &std::path::Path) -> Result<(), kube::Error> {
    let claims: Api<PersistentVolumeClaim> = Api::all(client.clone());
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    for claim in claims.list(&ListParams::default()).await? {
        let phase = claim.status.as_ref().and_then(|s| s.phase.as_deref());
        let node = claim.annotations().get("volume.kubernetes.io/selected-node");
        match (phase, node) {
            (Some("Pending"), Some(node)) => provide(&volumes, &claim, node, home).await?,
            (Some("Bound"), _) => grow(client, &volumes, &claim).await?,
            _ => {}
        }
    }
    for volume in volumes.list(&ListParams::default()).await? {
        if volume.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Released") {
            volumes.delete(&volume.name_any(), &DeleteParams::default()).await?;
            if let Some(folder) = volume.spec.and_then(|s| s.host_path).map(|h| h.path) {
                let _ = std::fs::remove_dir_all(folder);
            }
        }
    }
    Ok(())
}

async fn provide(
    volumes: &Api<PersistentVolume>,
    claim: &PersistentVolumeClaim,
    node: &str,
    home: &std::path::Path,
) -> Result<(), kube::Error> {
    let name = format!("pvc-{}", claim.uid().unwrap_or_default());
    let folder = home.join(node).join("volumes").join(&name);
    std::fs::create_dir_all(&folder).expect("the cluster's folder is writable");
    // a folder of the host takes no fsGroup
    std::os::unix::fs::chown(&folder, Some(65_532), Some(65_532)).expect("run as root");
    let spec = claim.spec.clone().unwrap_or_default();
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "capacity": spec.resources.and_then(|r| r.requests), "accessModes": spec.access_modes,
            "storageClassName": spec.storage_class_name, "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": folder},
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": claim.name_any(),
                "namespace": claim.namespace(), "uid": claim.uid()},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}]}},
        },
    });
    volumes.patch(&name, &PatchParams::apply("weir-e2e").force(), &Patch::Apply(volume)).await?;
    Ok(())
}

async fn grow(
    client: &Client,
    volumes: &Api<PersistentVolume>,
    claim: &PersistentVolumeClaim,
) -> Result<(), kube::Error> {
    let wanted = claim.spec.as_ref().and_then(|s| s.resources.as_ref()?.requests.as_ref()?.get("storage").cloned());
    let has = claim.status.as_ref().and_then(|s| s.capacity.as_ref()?.get("storage").cloned());
    let (Some(wanted), Some(volume)) = (wanted, claim.spec.as_ref().and_then(|s| s.volume_name.clone())) else {
        return Ok(());
    };
    if Some(&wanted) == has.as_ref() {
        return Ok(());
    }
    let capacity = json!({"spec": {"capacity": {"storage": wanted}}});
    volumes.patch(&volume, &PatchParams::default(), &Patch::Merge(capacity)).await?;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &claim.namespace().unwrap_or_default());
    let status = json!({"status": {"capacity": {"storage": wanted}}});
    claims.patch_status(&claim.name_any(), &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}
