//! The reconcilers against an API server of this test's own, in memory: it counts requests, and ends the operator after any write.
//! The brokers are scripted too.

use http::{Method, Request, Response, StatusCode};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::client::Body;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector;
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, OnceLock};
use tonic::Status;
use weir_crds::{StreamCluster, Topic};
use weir_operator::brokers::Brokers;
use weir_operator::context::{Context, Settings};
use weir_operator::{cluster, topic};
use weir_proto::v1;

/// Objects by path, and what was asked.
#[derive(Default)]
struct Server {
    objects: BTreeMap<String, Value>,
    version: u64,
    writes: usize,
    /// (method, path) of all requests but those about events
    requests: Vec<(Method, String)>,
    /// after so many writes nothing is answered any more
    ends_after: Option<usize>,
}

type Shared = Arc<Mutex<Server>>;

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

fn answer(status: StatusCode, body: &Value) -> Response<Body> {
    Response::builder().status(status).body(Body::from(body.to_string().into_bytes())).unwrap()
}

fn refused(status: StatusCode, reason: &str) -> Response<Body> {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason, "reason": reason,
        "code": status.as_u16()});
    answer(status, &body)
}

impl Server {
    fn handle(&mut self, method: &Method, path: &str, body: &[u8]) -> Response<Body> {
        if path.contains("/events") {
            return answer(
                StatusCode::CREATED,
                &json!({"metadata": {"name": "e"}, "reportingController": "", "eventTime": null}),
            );
        }
        self.requests.push((method.clone(), path.to_owned()));
        let write = *method != Method::GET;
        if write && self.ends_after.is_some_and(|n| self.writes >= n) {
            return refused(StatusCode::INTERNAL_SERVER_ERROR, "the operator ended here");
        }
        self.writes += usize::from(write);
        let (object, subresource) = match path.strip_suffix("/status") {
            Some(object) => (object, true),
            None => (path, false),
        };
        match *method {
            Method::GET => match self.objects.get(object) {
                Some(found) => answer(StatusCode::OK, found),
                // a collection's path has an even number of parts behind its namespace
                None if object.rsplit('/').next().is_some_and(|last| last.ends_with('s') && !last.contains('-')) => {
                    let items: Vec<&Value> = self
                        .objects
                        .iter()
                        .filter(|(p, _)| p.starts_with(&format!("{object}/")))
                        .map(|(_, o)| o)
                        .collect();
                    answer(StatusCode::OK, &json!({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items}))
                }
                None => refused(StatusCode::NOT_FOUND, "NotFound"),
            },
            Method::PATCH => {
                self.version += 1;
                let patch: Value = serde_json::from_slice(body).unwrap();
                let fresh = !self.objects.contains_key(object);
                let uid = format!("uid-{}", self.version);
                let found = self.objects.entry(object.to_owned()).or_insert_with(|| json!({"metadata": {"uid": uid}}));
                if let Value::Array(operations) = &patch {
                    // the finalizer's JSON patch
                    for operation in operations.iter().filter(|o| o["op"] != "test") {
                        let add = operation["op"] == "add";
                        found["metadata"]["finalizers"] = if add { json!([topic::FINALIZER]) } else { json!([]) };
                    }
                } else if subresource {
                    found["status"] = patch["status"].clone();
                } else {
                    merge(found, &patch);
                }
                found["metadata"]["resourceVersion"] = json!(self.version.to_string());
                answer(if fresh { StatusCode::CREATED } else { StatusCode::OK }, found)
            }
            Method::DELETE => {
                let Some(found) = self.objects.get(object).cloned() else {
                    return refused(StatusCode::NOT_FOUND, "NotFound");
                };
                let options: Value = serde_json::from_slice(body).unwrap_or_default();
                let wanted = &options["preconditions"];
                assert!(
                    wanted["uid"].is_string() && wanted["resourceVersion"].is_string(),
                    "{object} is deleted blindly"
                );
                if wanted["uid"] != found["metadata"]["uid"]
                    || wanted["resourceVersion"] != found["metadata"]["resourceVersion"]
                {
                    return refused(StatusCode::CONFLICT, "Conflict");
                }
                self.objects.remove(object);
                answer(StatusCode::OK, &found)
            }
            _ => refused(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
        }
    }
}

fn client(server: &Shared) -> Client {
    let server = server.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = server.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap();
            Ok::<_, Infallible>(server.lock().unwrap().handle(&parts.method, parts.uri.path(), &body))
        }
    });
    Client::new(service, "shop")
}

fn context(server: &Shared, brokers: Brokers) -> Arc<Context> {
    let client = client(server);
    let reporter = Reporter { controller: "test".into(), instance: None };
    Arc::new(Context {
        client: client.clone(),
        brokers,
        clusters: OnceLock::new(),
        recorder: Recorder::new(client, reporter),
        settings: Settings {
            image: "weir:test".into(),
            image_pull_policy: "IfNotPresent".into(),
            domain: "cluster.local".into(),
        },
    })
}

const CLUSTER: &str = "/apis/weir.dev/v1alpha1/namespaces/shop/streamclusters/default";
const TOPIC: &str = "/apis/weir.dev/v1alpha1/namespaces/shop/topics/orders";

fn with(objects: &[(&str, Value)]) -> Shared {
    let objects = objects.iter().map(|(path, o)| ((*path).to_owned(), o.clone())).collect();
    Arc::new(Mutex::new(Server { objects, ..Default::default() }))
}

fn cluster_object() -> Value {
    json!({"apiVersion": "weir.dev/v1alpha1", "kind": "StreamCluster",
        "metadata": {"name": "default", "namespace": "shop", "uid": "c-uid", "generation": 1, "resourceVersion": "1"},
        "spec": {"brokers": 3}})
}

async fn look_at_cluster(server: &Shared) -> bool {
    let context = context(server, Brokers::at("127.0.0.1:1")); // nobody there
    let object: StreamCluster = serde_json::from_value(server.lock().unwrap().objects[CLUSTER].clone()).unwrap();
    cluster::reconcile(Arc::new(object), context).await.is_ok()
}

/// What was made, without what counts up.
fn made(server: &Shared) -> BTreeMap<String, Value> {
    let mut objects = server.lock().unwrap().objects.clone();
    for object in objects.values_mut() {
        object["metadata"]["resourceVersion"] = Value::Null;
        object["metadata"]["uid"] = Value::Null;
        for condition in object["status"]["conditions"].as_array_mut().into_iter().flatten() {
            condition["lastTransitionTime"] = Value::Null;
        }
    }
    objects
}

#[tokio::test]
async fn an_operator_that_ends_after_any_write_converges_when_it_comes_back() {
    let whole = with(&[(CLUSTER, cluster_object())]);
    for _ in 0..3 {
        assert!(look_at_cluster(&whole).await);
    }
    let wanted = made(&whole);
    assert!(wanted.len() >= 9, "{:?}", wanted.keys());
    let writes = whole.lock().unwrap().writes;
    for ends_after in 0..writes.min(12) {
        let server = with(&[(CLUSTER, cluster_object())]);
        server.lock().unwrap().ends_after = Some(ends_after);
        look_at_cluster(&server).await;
        server.lock().unwrap().ends_after = None;
        for _ in 0..3 {
            assert!(look_at_cluster(&server).await);
        }
        assert_eq!(made(&server), wanted, "after write {ends_after}");
        let deletes = server.lock().unwrap().requests.iter().filter(|(m, _)| *m == Method::DELETE).count();
        assert_eq!(deletes, 0);
    }
}

#[tokio::test]
async fn a_look_at_what_is_right_changes_nothing_and_asks_a_constant_number_of_things() {
    let server = with(&[(CLUSTER, cluster_object())]);
    for _ in 0..3 {
        look_at_cluster(&server).await;
    }
    let before = made(&server);
    server.lock().unwrap().requests.clear();
    look_at_cluster(&server).await;
    assert_eq!(made(&server), before);
    let requests = std::mem::take(&mut server.lock().unwrap().requests);
    assert!(requests.len() <= 14, "{requests:?}");
    assert!(requests.iter().all(|(_, path)| !path.ends_with("/status")), "an unchanged status is not written");
}

#[tokio::test]
async fn a_paused_cluster_is_left_alone() {
    let mut object = cluster_object();
    object["spec"]["paused"] = json!(true);
    let server = with(&[(CLUSTER, object)]);
    assert!(look_at_cluster(&server).await);
    let requests = server.lock().unwrap().requests.clone();
    assert_eq!(requests, [(Method::PATCH, format!("{CLUSTER}/status"))]);
}

/// Brokers that hold topics, and count the calls.
#[derive(Clone, Default)]
struct Scripted(Arc<Mutex<(Vec<v1::ApplyTopicRequest>, Vec<v1::DeleteRequest>)>>);

#[tonic::async_trait]
impl v1::metadata_server::Metadata for Scripted {
    async fn get(
        &self,
        _: tonic::Request<v1::GetMetadataRequest>,
    ) -> Result<tonic::Response<v1::GetMetadataResponse>, Status> {
        let applied = self.0.lock().unwrap().0.last().cloned();
        let topic = applied.map(|a| v1::Topic {
            name: a.name,
            spec: a.spec,
            owner_uid: a.owner_uid,
            partitions: vec![v1::Partition { group: 7, leader: 1, replicas: vec![1], settled: true, partition: 0 }],
            ..Default::default()
        });
        let broker =
            v1::Broker { id: 1, name: "default-broker-0".into(), phase: "active".into(), ..Default::default() };
        Ok(tonic::Response::new(v1::GetMetadataResponse {
            cluster_id: "c".into(),
            brokers: vec![broker],
            topics: topic.into_iter().collect(),
            ..Default::default()
        }))
    }
    async fn describe(
        &self,
        _: tonic::Request<v1::DescribeRequest>,
    ) -> Result<tonic::Response<v1::DescribeResponse>, Status> {
        Ok(tonic::Response::new(v1::DescribeResponse::default()))
    }
}

type Applied = Result<tonic::Response<v1::ApplyResponse>, Status>;

fn done() -> Applied {
    Ok(tonic::Response::new(v1::ApplyResponse::default()))
}

#[tonic::async_trait]
impl v1::admin_server::Admin for Scripted {
    async fn apply_topic(&self, request: tonic::Request<v1::ApplyTopicRequest>) -> Applied {
        self.0.lock().unwrap().0.push(request.into_inner());
        done()
    }
    async fn delete_topic(&self, request: tonic::Request<v1::DeleteRequest>) -> Applied {
        self.0.lock().unwrap().1.push(request.into_inner());
        done()
    }
    async fn apply_subscription(&self, _: tonic::Request<v1::ApplySubscriptionRequest>) -> Applied {
        done()
    }
    async fn delete_subscription(&self, _: tonic::Request<v1::DeleteRequest>) -> Applied {
        done()
    }
    async fn add_broker(
        &self,
        _: tonic::Request<v1::AddBrokerRequest>,
    ) -> Result<tonic::Response<v1::AddBrokerResponse>, Status> {
        Ok(tonic::Response::new(v1::AddBrokerResponse::default()))
    }
    async fn drain_broker(&self, _: tonic::Request<v1::DrainBrokerRequest>) -> Applied {
        done()
    }
    async fn set_broker_rack(&self, _: tonic::Request<v1::SetBrokerRackRequest>) -> Applied {
        done()
    }
    async fn set_log_level(&self, _: tonic::Request<v1::SetLogLevelRequest>) -> Applied {
        done()
    }
}

async fn scripted_brokers() -> (Scripted, Brokers) {
    let scripted = Scripted::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder()
        .add_service(v1::metadata_server::MetadataServer::new(scripted.clone()))
        .add_service(v1::admin_server::AdminServer::new(scripted.clone()));
    tokio::spawn(server.serve_with_incoming(incoming));
    (scripted, Brokers::at(&address.to_string()))
}

fn ready_cluster() -> StreamCluster {
    let mut object = cluster_object();
    object["status"] = json!({"conditions": [{"type": "Ready", "status": "True", "reason": "Serving", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}], "members": []});
    serde_json::from_value(object).unwrap()
}

fn topic_object(policy: &str) -> Value {
    json!({"apiVersion": "weir.dev/v1alpha1", "kind": "Topic",
        "metadata": {"name": "orders", "namespace": "shop", "uid": "t-uid", "generation": 1, "resourceVersion": "1"},
        "spec": {"partitions": 1, "replicas": 1, "deletionPolicy": policy}})
}

async fn look_at_topic(server: &Shared, context: &Arc<Context>) -> Result<(), String> {
    let object: Topic = serde_json::from_value(server.lock().unwrap().objects[TOPIC].clone()).unwrap();
    topic::reconcile(Arc::new(object), context.clone()).await.map(drop).map_err(|e| e.to_string())
}

fn knows_cluster(context: &Context, known: bool) {
    let mut writer = reflector::store::Writer::<StreamCluster>::default();
    let _ = context.clusters.set(writer.as_reader());
    writer.apply_watcher_event(&Event::Init);
    if known {
        writer.apply_watcher_event(&Event::InitApply(ready_cluster()));
    }
    writer.apply_watcher_event(&Event::InitDone);
}

#[tokio::test]
async fn a_topic_is_applied_once_and_its_change_costs_a_constant_number_of_requests() {
    let (scripted, brokers) = scripted_brokers().await;
    let server = with(&[(TOPIC, topic_object("Retain"))]);
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    for _ in 0..3 {
        look_at_topic(&server, &context).await.unwrap();
    }
    assert_eq!(scripted.0.lock().unwrap().0.len(), 1, "what is as wanted is not applied again");
    let requests = server.lock().unwrap().requests.clone();
    assert_eq!(requests, [(Method::PATCH, format!("{TOPIC}/status"))]);
    let ready = server.lock().unwrap().objects[TOPIC]["status"]["conditions"][0].clone();
    assert_eq!((&ready["type"], &ready["status"]), (&json!("Ready"), &json!("True")));
    server.lock().unwrap().objects.get_mut(TOPIC).unwrap()["spec"]["partitions"] = json!(2);
    look_at_topic(&server, &context).await.unwrap();
    assert_eq!(scripted.0.lock().unwrap().0.len(), 2);
    assert!(server.lock().unwrap().requests.len() <= 2, "one request for the change, no more");
}

#[tokio::test]
async fn a_topic_that_is_deleted_with_its_data_tells_the_brokers_first() {
    let (scripted, brokers) = scripted_brokers().await;
    let server = with(&[(TOPIC, topic_object("Delete"))]);
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    look_at_topic(&server, &context).await.unwrap();
    look_at_topic(&server, &context).await.unwrap();
    assert_eq!(server.lock().unwrap().objects[TOPIC]["metadata"]["finalizers"], json!([topic::FINALIZER]));
    server.lock().unwrap().objects.get_mut(TOPIC).unwrap()["metadata"]["deletionTimestamp"] =
        json!("2026-01-01T00:00:00Z");
    look_at_topic(&server, &context).await.unwrap();
    let deleted = scripted.0.lock().unwrap().1.clone();
    assert_eq!((deleted.len(), deleted[0].name.as_str(), deleted[0].release), (1, "shop/orders", false));
    assert_eq!(server.lock().unwrap().objects[TOPIC]["metadata"]["finalizers"], json!([]));
}

#[tokio::test]
async fn a_topic_whose_cluster_is_gone_is_let_go() {
    let (scripted, brokers) = scripted_brokers().await;
    let mut object = topic_object("Delete");
    object["metadata"]["finalizers"] = json!([topic::FINALIZER]);
    object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let server = with(&[(TOPIC, object)]);
    let context = context(&server, brokers);
    knows_cluster(&context, false);
    look_at_topic(&server, &context).await.unwrap();
    assert_eq!(server.lock().unwrap().objects[TOPIC]["metadata"]["finalizers"], json!([]));
    assert_eq!(scripted.0.lock().unwrap().1.len(), 0);
}

#[tokio::test]
async fn a_topic_is_kept_while_its_cluster_does_not_answer_and_says_so() {
    let mut object = topic_object("Delete");
    object["metadata"]["finalizers"] = json!([topic::FINALIZER]);
    object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let server = with(&[(TOPIC, object)]);
    let context = context(&server, Brokers::at("127.0.0.1:1"));
    knows_cluster(&context, true);
    assert!(look_at_topic(&server, &context).await.is_err());
    let said = server.lock().unwrap().objects[TOPIC].clone();
    assert_eq!(said["metadata"]["finalizers"], json!([topic::FINALIZER]));
    let condition = &said["status"]["conditions"][0];
    assert_eq!((&condition["type"], &condition["reason"]), (&json!("Ready"), &json!("DeletionWaits")));
    assert!(condition["message"].as_str().unwrap().contains("weir.dev/force-delete"), "{condition}");
    // the documented way out
    server.lock().unwrap().objects.get_mut(TOPIC).unwrap()["metadata"]["annotations"] =
        json!({"weir.dev/force-delete": ""});
    look_at_topic(&server, &context).await.unwrap();
    assert_eq!(server.lock().unwrap().objects[TOPIC]["metadata"]["finalizers"], json!([]));
}

#[tokio::test]
async fn a_stateful_set_has_as_many_pods_as_brokers_are_wanted_before_anything_was_formed() {
    let server = with(&[(CLUSTER, cluster_object())]);
    look_at_cluster(&server).await;
    let sets: Api<StatefulSet> = Api::namespaced(client(&server), "shop");
    let set = sets.get("default-broker").await.unwrap();
    assert_eq!(set.spec.unwrap().replicas, Some(3));
}
