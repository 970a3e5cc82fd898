//! What every reconciler needs.

use crate::brokers::Brokers;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::reflector::Store;
use std::sync::{Arc, OnceLock};
use weir_crds::StreamCluster;

/// Field manager of everything the operator writes.
pub const MANAGER: &str = "weir-operator";

/// What the operator was told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The brokers' image where a StreamCluster names none.
    pub image: String,
    /// Its pull policy.
    pub image_pull_policy: String,
    /// The cluster's DNS domain, such as `cluster.local`.
    pub domain: String,
    /// The operator's own namespace.
    pub namespace: String,
    /// Users and groups of pods are chosen by the platform, as on OpenShift, and none is asked for.
    pub arbitrary_user: bool,
}

/// See the module.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// The brokers of all clusters.
    pub brokers: Brokers,
    /// StreamClusters as watched; filled once their controller runs.
    pub clusters: OnceLock<Store<StreamCluster>>,
    /// Events.
    pub recorder: Recorder,
    /// Settings.
    pub settings: Settings,
}

impl Context {
    /// Waits until all StreamClusters have been seen: before that, none is missing.
    pub async fn knows_clusters(&self) {
        if let Some(store) = self.clusters.get() {
            let _ = store.wait_until_ready().await;
        }
    }

    /// A StreamCluster as last seen.
    pub fn cluster(&self, namespace: &str, name: &str) -> Option<Arc<StreamCluster>> {
        let key = kube::runtime::reflector::ObjectRef::new(name).within(namespace);
        self.clusters.get()?.get(&key)
    }

    /// Tells people. An event that cannot be written is only logged.
    pub async fn event(&self, about: &ObjectReference, warning: bool, reason: &str, action: &str, note: String) {
        let type_ = if warning { EventType::Warning } else { EventType::Normal };
        let event = Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, about).await {
            tracing::debug!(%error, "writing an event");
        }
    }
}
