//! The controllers, run while this replica holds the lease, and the operator's own metrics and health.

use crate::cluster::build::watch_label;
use crate::cluster::names::CLUSTER_LABEL;
use crate::context::Context;
use crate::health::{Counted, Health, by_ready};
use crate::waiting::Begun;
use crate::{cluster, subscription, topic};
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use futures::StreamExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Resource, ResourceExt as _};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use weir_crds::{StreamCluster, Subscription, Topic};

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

/// The reconciliations of one kind, measured.
struct Measured<K: Resource<DynamicType = ()> + 'static> {
    kind: &'static str,
    health: Arc<Health>,
    store: Store<K>,
    begun: Begun,
}

impl<K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static> Measured<K> {
    fn new(kind: &'static str, health: &Arc<Health>, store: Store<K>) -> Arc<Self> {
        Arc::new(Self { kind, health: health.clone(), store, begun: Begun::default() })
    }

    async fn run<T, E, R: Future<Output = Result<T, E>>>(
        self: Arc<Self>,
        reconcile: fn(Arc<K>, Arc<Context>) -> R,
        object: Arc<K>,
        context: Arc<Context>,
    ) -> Result<T, E> {
        self.begun.begin(&*object, &self.store);
        let (running, begun) = (self.health.running.with_label_values(&[self.kind]), Instant::now());
        running.inc();
        let result = reconcile(object, context).await;
        running.dec();
        let outcome = if result.is_ok() { "done" } else { "failed" };
        let seconds = self.health.reconcile_seconds.with_label_values(&[self.kind, outcome]);
        seconds.observe(begun.elapsed().as_secs_f64());
        result
    }

    /// Counts the resources by whether they are ready, and those that wait.
    fn counted(self: &Arc<Self>, conditions: fn(&K) -> &[Condition]) -> (&'static str, Counted) {
        let measured = self.clone();
        let count = move || {
            let Self { store, begun, .. } = &*measured;
            by_ready(store.state().iter().map(|object| conditions(object)), begun.waiting(store))
        };
        (self.kind, Box::new(count))
    }
}

/// Logs what a controller fails at, until it ends.
async fn drive<K, E>(kind: &'static str, results: impl futures::Stream<Item = Result<(ObjectRef<K>, Action), E>>)
where
    K: Resource<DynamicType = ()>,
    E: std::fmt::Display,
{
    let mut results = std::pin::pin!(results);
    while let Some(result) = results.next().await {
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
pub async fn controllers(context: Arc<Context>, health: Arc<Health>) {
    let client = context.client.clone();
    let any = watcher::Config::default();
    let ours = watcher::Config::default().labels(&watch_label());
    let clusters = Controller::new(Api::<StreamCluster>::all(client.clone()), any.clone());
    let cluster_store = clusters.store();
    let measured_clusters = Measured::new("StreamCluster", &health, cluster_store.clone());
    let _ = context.clusters.set(cluster_store.clone());
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
        .run(
            {
                let measured = measured_clusters.clone();
                move |object, context| measured.clone().run(cluster::reconcile, object, context)
            },
            policy,
            context.clone(),
        );
    let topics = Controller::new(Api::<Topic>::all(client.clone()), any.clone());
    let topic_store = topics.store();
    let measured_topics = Measured::new("Topic", &health, topic_store.clone());
    let store = topic_store.clone();
    let topics = topics
        .with_config(Config::default().concurrency(LOOKS_MAX))
        .watches(Api::<StreamCluster>::all(client.clone()), any.clone(), move |c| {
            concerned(&store, &c, |t: &Topic| t.spec.cluster_ref.as_ref())
        })
        .run(
            {
                let measured = measured_topics.clone();
                move |object, context| measured.clone().run(topic::reconcile, object, context)
            },
            policy,
            context.clone(),
        );
    let subscriptions = Controller::new(Api::<Subscription>::all(client.clone()), any.clone());
    let subscription_store = subscriptions.store();
    let measured_subscriptions = Measured::new("Subscription", &health, subscription_store.clone());
    let store = subscription_store.clone();
    let subscriptions = subscriptions
        .with_config(Config::default().concurrency(LOOKS_MAX))
        .watches(Api::<StreamCluster>::all(client), any, move |c| {
            concerned(&store, &c, |s: &Subscription| s.spec.cluster_ref.as_ref())
        })
        .run(
            {
                let measured = measured_subscriptions.clone();
                move |object, context| measured.clone().run(subscription::reconcile, object, context)
            },
            policy,
            context,
        );
    let _leading = health.lead(vec![
        measured_clusters.counted(|x| x.status.as_ref().map_or(&[], |s| &s.conditions)),
        measured_topics.counted(|x| x.status.as_ref().map_or(&[], |s| &s.conditions)),
        measured_subscriptions.counted(|x| x.status.as_ref().map_or(&[], |s| &s.conditions)),
    ]);
    let seen_all = async {
        let all =
            (cluster_store.wait_until_ready(), topic_store.wait_until_ready(), subscription_store.wait_until_ready());
        if let (Ok(()), Ok(()), Ok(())) = tokio::join!(all.0, all.1, all.2) {
            health.has_seen_all();
        }
    };
    tokio::join!(
        seen_all,
        drive("StreamCluster", clusters),
        drive("Topic", topics),
        drive("Subscription", subscriptions)
    );
}

/// A connection to the operator's own port is closed after this time, answered or not.
pub const REQUEST_WITHIN: Duration = Duration::from_secs(15);
/// Connections to it that are served at one time; others wait.
const CONNECTIONS_MAX: usize = 64;
/// Accepting pauses for this long after an error, such as too many open files.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves `/metrics`, `/livez` and `/readyz`, one request a connection, which has `within` for it.
pub async fn health(listener: TcpListener, health: Arc<Health>, within: Duration) {
    let for_ready = health.clone();
    let ready = async move || match for_ready.why_not_ready(Instant::now()) {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
    };
    let routes = Router::new()
        .route("/metrics", get(async move || health.metrics()))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready));
    let mut http = Builder::new(TokioExecutor::new()).http1_only();
    http.http1().keep_alive(false);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let (http, routes) = (http.clone(), routes.clone());
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(async move {
                let served = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
                let _ = tokio::time::timeout(within, served).await; // what it asks for is asked again
                drop(place);
            })),
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections to the metrics port");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    async fn ask(at: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text).await;
        text
    }

    #[tokio::test]
    async fn requests_that_do_not_end_are_closed_and_others_served() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let server = tokio::spawn(super::health(listener, Arc::default(), Duration::from_millis(500)));
        let trickle = async |_| {
            let (mut read, mut write) = TcpStream::connect(at).await.unwrap().into_split();
            let writing = async {
                while write.write_all(b"G").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                std::future::pending::<()>().await;
            };
            let reading = async { while let Ok(1..) = read.read(&mut [0; 64]).await {} };
            tokio::select! { () = writing => {}, () = reading => {} }
        };
        let all = futures::future::join_all((0..CONNECTIONS_MAX + 5).map(trickle));
        assert!(tokio::time::timeout(Duration::from_secs(60), all).await.is_ok(), "a request that trickles is kept");
        assert!(ask(at, "/livez").await.ends_with("alive\n"));
        assert!(ask(at, "/readyz").await.contains(" 503 "));
        server.abort();
    }
}
