//! The controllers, run while this replica holds the lease, and the operator's own metrics and health.

use crate::cluster::build::watch_label;
use crate::cluster::names::CLUSTER_LABEL;
use crate::context::Context;
use crate::{cluster, subscription, topic};
use axum::Router;
use axum::routing::get;
use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Resource, ResourceExt as _};
use prometheus::{IntCounterVec, Opts, Registry, TextEncoder};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::net::TcpListener;
use weir_crds::{StreamCluster, Subscription, Topic};

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let registry = Registry::new();
    let process = prometheus::process_collector::ProcessCollector::for_self();
    registry.register(Box::new(process)).expect("registered once");
    registry
});
static LOOKS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let options = Opts::new("weir_operator_reconciles_total", "Looks at resources");
    let counter = IntCounterVec::new(options, &["kind", "outcome"]).expect("a right name");
    REGISTRY.register(Box::new(counter.clone())).expect("registered once");
    counter
});

/// Looks at resources of one kind under way at one time: what bounds the memory when thousands change at once.
const LOOKS_MAX: u16 = 16;
/// A failed look is repeated soon.
const AGAIN: Duration = Duration::from_secs(2);

fn policy<K: Resource<DynamicType = ()>, E: Debug + std::fmt::Display>(
    object: Arc<K>,
    error: &E,
    _: Arc<Context>,
) -> Action {
    tracing::info!(kind = %K::kind(&()), name = object.name_any(), %error, "looking again soon");
    Action::requeue(AGAIN)
}

/// Counts and logs what a controller does, until it ends.
async fn drive<K, E>(kind: &'static str, results: impl futures::Stream<Item = Result<(ObjectRef<K>, Action), E>>)
where
    K: Resource<DynamicType = ()>,
    E: std::fmt::Display,
{
    let mut results = std::pin::pin!(results);
    while let Some(result) = results.next().await {
        let outcome = if result.is_ok() { "done" } else { "failed" };
        LOOKS.with_label_values(&[kind, outcome]).inc();
        if let Err(error) = result {
            tracing::debug!(kind, %error, "a look failed");
        }
    }
}

/// All resources in a store that one StreamCluster's change may concern.
fn concerned<K>(
    store: &Store<K>,
    cluster: &StreamCluster,
    of: impl Fn(&K) -> Option<&weir_crds::ClusterRef>,
) -> Vec<ObjectRef<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let (home, name) = (cluster.namespace(), cluster.name_any());
    let mut out = Vec::new();
    for object in store.state() {
        let wanted = of(&object);
        let wants = wanted.map_or("default", |r| r.name.as_str()) == name
            && wanted.and_then(|r| r.namespace.clone()).or(object.namespace()) == home;
        if wants {
            out.push(ObjectRef::from_obj(&*object));
        }
    }
    out
}

/// Runs the three controllers; ends when they do.
pub async fn controllers(context: Arc<Context>) {
    let client = context.client.clone();
    let any = watcher::Config::default();
    let ours = watcher::Config::default().labels(&watch_label());
    let clusters = Controller::new(Api::<StreamCluster>::all(client.clone()), any.clone());
    let _ = context.clusters.set(clusters.store());
    let by_label = |pod: Pod| {
        let name = pod.labels().get(CLUSTER_LABEL)?.clone();
        Some(ObjectRef::new(&name).within(&pod.namespace()?))
    };
    let clusters = clusters
        .with_config(Config::default().debounce(Duration::from_millis(200)).concurrency(LOOKS_MAX))
        .owns(Api::<StatefulSet>::all(client.clone()), ours.clone())
        .owns(Api::<Service>::all(client.clone()), ours.clone())
        .owns(Api::<ConfigMap>::all(client.clone()), ours.clone())
        .owns(Api::<ServiceAccount>::all(client.clone()), ours.clone())
        .owns(Api::<PodDisruptionBudget>::all(client.clone()), ours.clone())
        .owns(Api::<NetworkPolicy>::all(client.clone()), ours.clone())
        .watches(Api::<Pod>::all(client.clone()), ours, by_label)
        .run(cluster::reconcile, policy, context.clone());
    let topics = Controller::new(Api::<Topic>::all(client.clone()), any.clone());
    let store = topics.store();
    let topics = topics
        .with_config(Config::default().concurrency(LOOKS_MAX))
        .watches(Api::<StreamCluster>::all(client.clone()), any.clone(), move |c| {
            concerned(&store, &c, |t: &Topic| t.spec.cluster_ref.as_ref())
        })
        .run(topic::reconcile, policy, context.clone());
    let subscriptions = Controller::new(Api::<Subscription>::all(client.clone()), any.clone());
    let store = subscriptions.store();
    let subscriptions = subscriptions
        .with_config(Config::default().concurrency(LOOKS_MAX))
        .watches(Api::<StreamCluster>::all(client), any, move |c| {
            concerned(&store, &c, |s: &Subscription| s.spec.cluster_ref.as_ref())
        })
        .run(subscription::reconcile, policy, context);
    tokio::join!(drive("StreamCluster", clusters), drive("Topic", topics), drive("Subscription", subscriptions));
}

/// Serves `/metrics`, `/livez` and `/readyz`.
pub async fn health(listener: TcpListener) {
    let metrics = async || TextEncoder::new().encode_to_string(&REGISTRY.gather()).unwrap_or_default();
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(async || "ready\n"));
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the metrics server ended");
    }
}
