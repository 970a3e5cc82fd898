//! What happens around an operator: StatefulSet controller, kubelet and brokers, a step at a time, and the life of one cluster.

use crate::api::{Objects, Server};
use crate::brokers::Scripted;
use crate::context;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use weir_crds::StreamCluster;
use weir_operator::cluster;
use weir_operator::context::Context;
use weir_proto::v1;

pub(crate) const CLUSTER: &str = "/apis/weir.dev/v1alpha1/namespaces/shop/streamclusters/default";
const SET: &str = "/apis/apps/v1/namespaces/shop/statefulsets/default-broker";
const BUDGET: &str = "/apis/policy/v1/namespaces/shop/poddisruptionbudgets/default-broker";
const PODS: &str = "/api/v1/namespaces/shop/pods/default-broker-";
/// Turns until a pod that was made is ready, and until its broker has all it should have. Brokers are ready only then; the operator
/// alone must hold a second drain back too.
const READY_AFTER: usize = 2;
pub(crate) const IN_SYNC_AFTER: usize = 5;
/// Looks a step of a cluster's life takes at most.
const TURNS_MAX: usize = 150;

pub(crate) fn cluster_object() -> Value {
    json!({"apiVersion": "weir.dev/v1alpha1", "kind": "StreamCluster",
        "metadata": {"name": "default", "namespace": "shop", "uid": "c-uid", "generation": 1, "resourceVersion": "1"},
        "spec": {"brokers": 3}})
}

pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) brokers: Scripted,
    context: Arc<Context>,
    /// turns until a pod that was made is ready
    pub(crate) ready_after: usize,
    /// turns a pod has run
    ages: Mutex<BTreeMap<String, usize>>,
}

fn pod(set: &Value, ordinal: usize, version: String) -> Value {
    let name = format!("default-broker-{ordinal}");
    let mut labels = set["spec"]["selector"]["matchLabels"].clone();
    labels["controller-revision-hash"] = set["status"]["updateRevision"].clone();
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": format!("pod-{version}"), "resourceVersion": version,
            "labels": labels, "creationTimestamp": k8s_openapi::jiff::Timestamp::now().to_string()},
        "spec": {"containers": set["spec"]["template"]["spec"]["containers"].clone()}})
}

fn set_ready(pod: &mut Value, ready: bool, version: String) {
    let status = if ready { "True" } else { "False" };
    pod["status"] = json!({"conditions": [{"type": "Ready", "status": status,
        "lastTransitionTime": k8s_openapi::jiff::Timestamp::now().to_string()}]});
    pod["metadata"]["resourceVersion"] = json!(version);
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"][0]["status"] == "True"
}

pub(crate) fn condition<'a>(cluster: &'a Value, kind: &str) -> &'a Value {
    let conditions = cluster["status"]["conditions"].as_array();
    conditions.and_then(|c| c.iter().find(|c| c["type"] == kind)).unwrap_or(&Value::Null)
}

impl World {
    pub(crate) async fn new() -> Self {
        let server = Server::with(&[(CLUSTER, cluster_object())]);
        let (brokers, at) = Scripted::serve(&server).await;
        let context = context(&server, at);
        Self { server, brokers, context, ready_after: READY_AFTER, ages: Mutex::default() }
    }

    /// The other controllers do their part. Checks that the operator let no pod go that is needed.
    pub(crate) fn turn(&self) {
        let mut state = self.brokers.state();
        let next = || self.server.next_version();
        if let Some(mut set) = self.server.get(SET) {
            let wanted = set["spec"]["replicas"].as_u64().unwrap() as usize;
            // the newest revision is named by what it is made of
            let template = set["spec"]["template"].to_string();
            let revision = template.bytes().fold(7_u64, |sum, b| sum.wrapping_mul(31).wrapping_add(u64::from(b)));
            set["status"] = json!({"replicas": wanted, "observedGeneration": set["metadata"]["generation"],
                "updateRevision": format!("r{revision:x}")});
            for ordinal in 0..wanted.max(8) {
                let path = format!("{PODS}{ordinal}");
                let name = format!("default-broker-{ordinal}");
                let is = self.server.get(&path);
                if ordinal >= wanted {
                    if is.is_some() {
                        let holds = state.brokers.iter().any(|b| b.name == name);
                        assert!(!holds, "{name} goes, and the brokers still count on it");
                        self.server.change(|o| o.remove(&path));
                    }
                    state.alive.remove(&name);
                    continue;
                }
                let mut ages = self.ages.lock().unwrap();
                let age = ages.entry(name.clone()).or_default();
                *age += 1;
                match is {
                    None => {
                        // it went, and comes again
                        *age = 0;
                        state.alive.remove(&name);
                        let mut fresh = pod(&set, ordinal, next());
                        set_ready(&mut fresh, false, next());
                        self.server.change(|o| o.insert(path, fresh));
                    }
                    Some(mut there) if !is_ready(&there) && *age >= self.ready_after => {
                        set_ready(&mut there, true, next());
                        self.server.change(|o| o.insert(path, there));
                    }
                    Some(_) => {}
                }
                if *age >= IN_SYNC_AFTER {
                    state.alive.insert(name);
                }
            }
            self.server.change(|o| o.insert(SET.to_owned(), set));
        }
        if state.brokers.is_empty() && state.alive.len() == 3 {
            self.form(&mut state);
        }
        let crate::brokers::State { alive, brokers, .. } = &mut *state;
        for broker in brokers.iter_mut().filter(|b| b.phase == "expected" && alive.contains(&b.name)) {
            broker.phase = "active".into();
        }
        let free: Vec<u64> = state.brokers.iter().filter(|b| b.phase == "draining").map(|b| b.id).collect();
        let gone: Vec<u64> = free.into_iter().filter(|id| !state.holds(*id)).collect();
        state.brokers.retain(|b| !gone.contains(&b.id));
        state.place();
        assert!(state.in_sync_min() >= 2, "two of a partition's three replicas are away");
    }

    /// A drain asks once for a pod to be evicted, as the API server answers by the PodDisruptionBudget; true where it goes. Its disk is
    /// lost with its node.
    pub(crate) fn evict(&self, ordinal: usize) -> bool {
        let pods = (0..8).filter_map(|o| self.server.get(&format!("{PODS}{o}")));
        let healthy = pods.filter(is_ready).count() as i64;
        let (Some(set), Some(budget)) = (self.server.get(SET), self.server.get(BUDGET)) else { return false };
        let number = |object: &Value, field: &str| object["spec"][field].as_i64().unwrap();
        let wanted = number(&set, "replicas") - number(&budget, "maxUnavailable");
        let path = format!("{PODS}{ordinal}");
        let Some(pod) = self.server.get(&path) else { return false };
        let goes = match budget["spec"]["unhealthyPodEvictionPolicy"].as_str().unwrap() {
            "AlwaysAllow" if !is_ready(&pod) => true,
            _ if !is_ready(&pod) => healthy >= wanted && wanted > 0,
            _ => healthy > wanted,
        };
        if goes {
            self.server.change(|o| o.remove(&path));
            self.brokers.state().alive.remove(&format!("default-broker-{ordinal}"));
        }
        goes
    }

    /// Pods that may be away, as the PodDisruptionBudget says.
    pub(crate) fn budget(&self) -> i64 {
        self.server.get(BUDGET).unwrap()["spec"]["maxUnavailable"].as_i64().unwrap()
    }

    /// Every pod is ready, and its broker has everything.
    pub(crate) fn is_whole(&self) -> bool {
        let ready = (0..3).all(|o| self.server.get(&format!("{PODS}{o}")).is_some_and(|p| is_ready(&p)));
        ready && self.brokers.state().in_sync_min() == 3
    }

    /// A pod's probe fails for a turn, though its broker serves; said at once, or when the operator reads `reads` next.
    pub(crate) fn probe_fails(&self, ordinal: usize, reads: Option<&str>) {
        let (path, version) = (format!("{PODS}{ordinal}"), self.server.next_version());
        let fail = move |objects: &mut Objects| set_ready(objects.get_mut(&path).unwrap(), false, version);
        match reads {
            Some(reads) => self.server.when_read(reads, fail),
            None => self.server.change(fail),
        }
    }

    fn form(&self, state: &mut crate::brokers::State) {
        let names: Vec<String> = state.alive.iter().cloned().collect();
        let replicas: Vec<u64> = names.iter().map(|name| state.expect(name)).collect();
        let mut topic = v1::Topic { name: "shop/orders".into(), ..Default::default() };
        for at in 0..4_usize {
            let mut replicas = replicas.clone();
            replicas.rotate_left(at % 3);
            let (group, leader) = (at as u64 + 1, replicas[0]);
            topic.partitions.push(v1::Partition { group, leader, replicas, settled: true, partition: at as u32 });
        }
        state.topics.insert(topic.name.clone(), topic);
    }

    /// Returns when the operator looks again, or why it failed.
    pub(crate) async fn look(&self, behind: usize) -> Result<Action, String> {
        self.server.read_behind(behind);
        let mut looked = Ok(Action::await_change());
        if let Some(object) = self.server.seen(CLUSTER) {
            let object: StreamCluster = serde_json::from_value(object).unwrap();
            looked = cluster::reconcile(Arc::new(object), self.context.clone()).await.map_err(|e| e.to_string());
        }
        self.server.read_behind(0);
        self.server.begin_again();
        self.server.keep_view();
        looked
    }

    fn settled(&self, brokers: usize) -> bool {
        let cluster = self.server.get(CLUSTER).unwrap();
        let holds = |kind: &str| condition(&cluster, kind)["status"] == "True";
        let status = &cluster["status"];
        let generation = &cluster["metadata"]["generation"];
        holds("Ready")
            && condition(&cluster, "Progressing")["status"] == "False"
            && condition(&cluster, "Degraded")["status"] == "False"
            && status["observedGeneration"] == *generation
            && status["readyBrokers"] == brokers
            && status["members"].as_array().is_some_and(|m| m.len() == brokers)
    }

    pub(crate) async fn until_settled(&self, brokers: usize, behind: &mut impl FnMut(usize) -> usize) {
        for turn in 0..TURNS_MAX {
            self.turn();
            let views = behind(turn);
            let _ = self.look(views).await;
            // what a view of before says is of before
            if views == 0 && self.settled(brokers) {
                return;
            }
        }
        let cluster = self.server.get(CLUSTER).unwrap();
        panic!("{brokers} brokers did not settle: {:#}", cluster["status"]);
    }

    /// Three brokers, five, and three again while each is replaced; `behind` says how far behind what each look reads is.
    pub(crate) async fn live(&self, behind: &mut impl FnMut(usize) -> usize) {
        self.until_settled(3, behind).await;
        self.server.change_spec(CLUSTER, "brokers", json!(5));
        self.until_settled(5, behind).await;
        self.server.change_spec(CLUSTER, "brokers", json!(3));
        self.server.change_spec(CLUSTER, "image", json!("weir:next"));
        self.until_settled(3, behind).await;
        self.turn();
        let _ = self.look(0).await;
        for ordinal in 0..3 {
            let pod = self.server.get(&format!("{PODS}{ordinal}")).unwrap();
            assert_eq!(pod["spec"]["containers"][0]["image"], "weir:next", "broker {ordinal}");
        }
    }

    /// What is there, without what counts up; and the names of the brokers.
    pub(crate) fn outcome(&self) -> (Objects, Vec<String>) {
        let mut objects = self.server.objects();
        for object in objects.values_mut() {
            for field in ["resourceVersion", "uid", "generation", "creationTimestamp"] {
                object["metadata"][field] = Value::Null;
            }
            let status = object["status"].as_object_mut();
            status.into_iter().for_each(|s| drop((s.remove("observedGeneration"), s.remove("members"))));
            for condition in object["status"]["conditions"].as_array_mut().into_iter().flatten() {
                condition["lastTransitionTime"] = Value::Null;
                condition["observedGeneration"] = Value::Null;
            }
        }
        let mut names: Vec<String> = self.brokers.state().brokers.iter().map(|b| b.name.clone()).collect();
        names.sort();
        (objects, names)
    }
}
