//! The reconcilers against an API server and brokers in memory: how often they ask, what is left where an operator ended after any
//! change, and what they do with a view of things that is behind.

mod api;
mod brokers;
mod disruption;
mod statuses;
mod world;

use api::Server;
use brokers::Scripted;
use http::Method;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::Api;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use std::sync::{Arc, OnceLock};
use weir_crds::StreamCluster;
use weir_operator::brokers::Brokers;
use weir_operator::context::{Context, Settings};
use weir_operator::{cluster, subscription, topic};
use world::{CLUSTER, World, cluster_object, condition};

const TOPIC: &str = "/apis/weir.dev/v1alpha1/namespaces/shop/topics/orders";
const SUBSCRIPTION: &str = "/apis/weir.dev/v1alpha1/namespaces/shop/subscriptions/mail";

fn context(server: &Server, brokers: Brokers) -> Arc<Context> {
    let client = server.client();
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
            namespace: "weir".into(),
            arbitrary_user: false,
        },
    })
}

/// A look at the cluster while no broker answers.
async fn look_at_cluster(server: &Server) -> bool {
    let object: StreamCluster = serde_json::from_value(server.get(CLUSTER).unwrap()).unwrap();
    cluster::reconcile(Arc::new(object), context(server, Brokers::at("127.0.0.1:1"))).await.is_ok()
}

#[tokio::test]
async fn a_look_at_what_is_right_changes_nothing_and_asks_a_constant_number_of_things() {
    let server = Server::with(&[(CLUSTER, cluster_object())]);
    for _ in 0..3 {
        look_at_cluster(&server).await;
    }
    let before = server.objects();
    server.take_requests();
    look_at_cluster(&server).await;
    assert_eq!(server.objects(), before);
    let requests = server.take_requests();
    assert!(requests.len() <= 14, "{requests:?}");
    assert!(requests.iter().all(|(_, path)| !path.ends_with("/status")), "an unchanged status is not written");
}

#[tokio::test]
async fn a_paused_cluster_is_left_alone() {
    let server = Server::with(&[(CLUSTER, cluster_object())]);
    server.change_spec(CLUSTER, "paused", json!(true));
    server.change_spec(CLUSTER, "brokers", json!(5));
    assert!(look_at_cluster(&server).await);
    assert_eq!(server.take_requests(), [(Method::PATCH, format!("{CLUSTER}/status"))]);
    // whoever waits for a generation to be seen does not wait for ever
    let object = server.get(CLUSTER).unwrap();
    assert_eq!(object["status"]["observedGeneration"], object["metadata"]["generation"]);
    assert!(look_at_cluster(&server).await);
    assert_eq!(server.take_requests(), [], "it is written once");
}

#[tokio::test]
async fn a_network_policy_that_is_not_wanted_any_more_goes_and_another_owners_stays() {
    const POLICY: &str = "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies/default-broker";
    let server = Server::with(&[(CLUSTER, cluster_object())]);
    look_at_cluster(&server).await;
    assert!(server.get(POLICY).is_some());
    server.change_spec(CLUSTER, "networkPolicy", json!({"enabled": false}));
    look_at_cluster(&server).await;
    assert!(server.get(POLICY).is_none());
    let own =
        json!({"metadata": {"name": "default-broker", "namespace": "shop", "uid": "mine", "resourceVersion": "7"}});
    server.change(|objects| objects.insert(POLICY.to_owned(), own.clone()));
    look_at_cluster(&server).await;
    assert_eq!(server.get(POLICY), Some(own), "it was written by somebody else");
}

#[tokio::test]
async fn a_stateful_set_has_as_many_pods_as_brokers_are_wanted_before_anything_was_formed() {
    let server = Server::with(&[(CLUSTER, cluster_object())]);
    look_at_cluster(&server).await;
    let sets: Api<StatefulSet> = Api::namespaced(server.client(), "shop");
    let set = sets.get("default-broker").await.unwrap();
    assert_eq!(set.spec.unwrap().replicas, Some(3));
}

/// Made, scaled up, then down with another image: the same comes out wherever the operator ended, and on the way no pod goes that is
/// still needed ([`World::turn`] looks).
#[tokio::test]
async fn an_operator_that_ends_after_any_change_of_a_clusters_life_converges_when_it_comes_back() {
    let whole = World::new().await;
    whole.live(&mut |_| 0).await;
    let (wanted, changes) = (whole.outcome(), whole.server.changes());
    assert!(wanted.0.len() >= 9 + 3, "{:?}", wanted.0.keys());
    assert!(changes > 30, "a life has only {changes} changes");
    for at in 1..=changes {
        let world = World::new().await;
        world.server.end_at(at);
        world.live(&mut |_| 0).await;
        let is = world.outcome();
        assert_eq!(is.1, wanted.1, "the brokers after an end at change {at}");
        for (path, object) in &wanted.0 {
            assert_eq!(is.0.get(path), Some(object), "{path} after an end at change {at}");
        }
        assert_eq!(is.0.len(), wanted.0.len(), "after an end at change {at}");
    }
    println!("{changes} changes of a cluster's life, the operator ended after each");
}

#[tokio::test]
async fn a_scale_down_that_topics_do_not_allow_goes_as_far_as_it_may_and_says_why_it_waits() {
    let world = World::new().await;
    world.until_settled(3, &mut |_| 0).await;
    world.server.change_spec(CLUSTER, "brokers", json!(5));
    world.until_settled(5, &mut |_| 0).await;
    let idle = world.look(0).await.unwrap();
    let highest = world.brokers.state().brokers.last().unwrap().id;
    world.brokers.state().topics.get_mut("shop/orders").unwrap().partitions[0].replicas[2] = highest;
    world.server.change_spec(CLUSTER, "brokers", json!(1));
    let mut refused_while_draining = false;
    for _ in 0..60 {
        world.turn();
        let _ = world.look(0).await;
        let cluster = world.server.get(CLUSTER).unwrap();
        let progressing = condition(&cluster, "Progressing");
        let says_why = progressing["message"].as_str().unwrap().contains("3 replicas");
        refused_while_draining |= progressing["reason"] == "Draining" && progressing["status"] == "True" && says_why;
    }
    assert!(refused_while_draining, "two are drained, and the third is known to be refused");
    let (_, names) = world.outcome();
    assert_eq!(names, ["default-broker-0", "default-broker-1", "default-broker-2"], "the topic has three replicas");
    let cluster = world.server.get(CLUSTER).unwrap();
    let progressing = condition(&cluster, "Progressing");
    assert_eq!((&progressing["status"], &progressing["reason"]), (&json!("False"), &json!("DrainRefused")));
    let message = progressing["message"].as_str().unwrap();
    let remedy = "spec.brokers of the StreamCluster is 1, and at least 3 are needed: ";
    assert!(message.starts_with(remedy) && message.contains("3 replicas"), "{message}");
    assert_eq!(world.server.notes("DrainRefused"), [message], "one event");
    assert_eq!(condition(&cluster, "Ready")["status"], "True");
    assert_eq!(cluster["status"]["observedGeneration"], cluster["metadata"]["generation"]);
    assert_eq!(world.look(0).await, Ok(idle), "nothing is under way");
    world.server.change_spec(CLUSTER, "brokers", json!(3));
    world.until_settled(3, &mut |_| 0).await;
}

/// Only the refusal of a drain that could not end is a state to wait in.
#[tokio::test]
async fn a_drain_that_is_refused_for_another_reason_fails_the_look() {
    let world = World::new().await;
    world.until_settled(3, &mut |_| 0).await;
    world.server.change_spec(CLUSTER, "brokers", json!(2));
    world.brokers.state().refuses_drains = Some("PHASE");
    for _ in 0..3 {
        world.turn();
        let error = world.look(0).await.unwrap_err();
        assert!(error.contains("draining a broker") && error.contains("no drain"), "{error}");
    }
    let cluster = world.server.get(CLUSTER).unwrap();
    assert_eq!(condition(&cluster, "Progressing")["reason"], "Settled", "nothing is known of it");
    assert_eq!(world.server.notes("DrainRefused").len(), 0);
    world.brokers.state().refuses_drains = Some("TOO_FEW_BROKERS");
    world.look(0).await.unwrap();
    let cluster = world.server.get(CLUSTER).unwrap();
    assert_eq!(condition(&cluster, "Progressing")["reason"], "DrainRefused");
}

/// Reads that are up to five looks behind may delay what is wanted, and never harm.
#[tokio::test]
async fn a_view_that_is_behind_takes_no_pod_that_is_needed() {
    let whole = World::new().await;
    whole.live(&mut |_| 0).await;
    let wanted = whole.outcome();
    for seed in 0..30_u64 {
        let world = World::new().await;
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut behind = |turn: usize| {
            if turn > 60 {
                return 0; // at last it is current
            }
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 6) as usize
        };
        world.live(&mut behind).await;
        let is = world.outcome();
        assert_eq!(is.1, wanted.1, "the brokers, seed {seed}");
        assert_eq!(is.0.keys().collect::<Vec<_>>(), wanted.0.keys().collect::<Vec<_>>(), "seed {seed}");
    }
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

fn subscription_object() -> Value {
    json!({"apiVersion": "weir.dev/v1alpha1", "kind": "Subscription",
        "metadata": {"name": "mail", "namespace": "shop", "uid": "s-uid", "generation": 1, "resourceVersion": "1"},
        "spec": {"topic": "orders"}})
}

pub(crate) async fn look_at(object: Value, context: &Arc<Context>) -> Result<(), String> {
    let done = match object["kind"].as_str() {
        Some("Topic") => topic::reconcile(Arc::new(serde_json::from_value(object).unwrap()), context.clone()).await,
        _ => subscription::reconcile(Arc::new(serde_json::from_value(object).unwrap()), context.clone()).await,
    };
    done.map(drop).map_err(|e| e.to_string())
}

async fn look_at_topic(server: &Server, context: &Arc<Context>) -> Result<(), String> {
    look_at(server.get(TOPIC).unwrap(), context).await
}

fn delete(server: &Server, path: &str) {
    server.change(|objects| {
        objects.get_mut(path).unwrap()["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    });
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
    let server = Server::with(&[(TOPIC, topic_object("Retain"))]);
    let (scripted, brokers) = Scripted::lonely(&server).await;
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    for _ in 0..3 {
        look_at_topic(&server, &context).await.unwrap();
    }
    assert_eq!(scripted.state().applied.len(), 1, "what is as wanted is not applied again");
    let once = [(Method::GET, TOPIC.to_owned()), (Method::PATCH, format!("{TOPIC}/status"))];
    assert_eq!(server.take_requests(), once);
    let ready = server.get(TOPIC).unwrap()["status"]["conditions"][0].clone();
    assert_eq!((&ready["type"], &ready["status"]), (&json!("Ready"), &json!("True")));
    server.change_spec(TOPIC, "partitions", json!(2));
    look_at_topic(&server, &context).await.unwrap();
    assert_eq!(scripted.state().applied.len(), 2);
    assert_eq!(server.take_requests(), once, "the same for a change, however many topics there are");
}

#[tokio::test]
async fn what_is_deleted_with_its_data_tells_the_brokers_first_wherever_the_operator_ends() {
    let (topic, mail) = ((TOPIC, topic_object("Delete")), (SUBSCRIPTION, subscription_object()));
    let mut end_at = None;
    loop {
        let server = Server::with(&[topic.clone(), mail.clone()]);
        let (scripted, brokers) = Scripted::lonely(&server).await;
        let context = context(&server, brokers);
        knows_cluster(&context, true);
        end_at.inspect(|at| server.end_at(*at));
        for turn in 0..12 {
            for path in [TOPIC, SUBSCRIPTION] {
                if let Some(object) = server.get(path) {
                    let _ = look_at(object, &context).await;
                    server.begin_again();
                }
            }
            let state = scripted.state();
            if server.get(TOPIC).is_none() {
                assert!(state.topics.is_empty(), "the brokers keep what no resource speaks for: end {end_at:?}");
            }
            if server.get(SUBSCRIPTION).is_none() {
                assert!(state.subscriptions.is_empty(), "end {end_at:?}");
            }
            drop(state);
            if turn == 5 {
                let state = scripted.state();
                assert_eq!((state.topics.len(), state.subscriptions.len()), (1, 1), "end {end_at:?}");
                delete(&server, TOPIC);
                delete(&server, SUBSCRIPTION);
            }
        }
        assert!(server.get(TOPIC).is_none() && server.get(SUBSCRIPTION).is_none(), "both are gone: end {end_at:?}");
        let state = scripted.state();
        let first = &state.deleted[0];
        assert_eq!((first.name.as_str(), first.owner_uid.as_str(), first.release), ("shop/orders", "t-uid", false));
        let next = end_at.unwrap_or(0) + 1;
        if next > server.changes() {
            assert!(next > 9, "only {next} changes were tried");
            break;
        }
        end_at = Some(next);
    }
}

#[tokio::test]
async fn a_view_of_before_a_deletion_brings_nothing_back() {
    let server = Server::with(&[(TOPIC, topic_object("Delete")), (SUBSCRIPTION, subscription_object())]);
    let (scripted, brokers) = Scripted::lonely(&server).await;
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    let paths = [TOPIC, SUBSCRIPTION];
    for path in paths.iter().cycle().take(6) {
        look_at(server.get(path).unwrap(), &context).await.unwrap();
    }
    let before: Vec<Value> = paths.iter().map(|p| server.get(p).unwrap()).collect();
    for path in paths {
        delete(&server, path);
        look_at(server.get(path).unwrap(), &context).await.unwrap();
        assert!(server.get(path).is_none());
    }
    // the watch is behind, and the operator has just started: it looks at what is not there any more
    for object in before {
        let _ = look_at(object, &context).await;
    }
    let state = scripted.state();
    assert_eq!((state.topics.len(), state.subscriptions.len()), (0, 0), "nobody would delete them again");
}

#[tokio::test]
async fn a_view_of_before_a_change_takes_nothing_back() {
    let server = Server::with(&[(TOPIC, topic_object("Retain"))]);
    let (scripted, brokers) = Scripted::lonely(&server).await;
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    look_at_topic(&server, &context).await.unwrap();
    let before = server.get(TOPIC).unwrap();
    server.change_spec(TOPIC, "partitions", json!(4));
    look_at_topic(&server, &context).await.unwrap();
    look_at(before, &context).await.unwrap();
    let partitions: Vec<_> = scripted.state().applied.iter().filter_map(|a| Some(a.spec?.partitions)).collect();
    assert_eq!(partitions, [1, 4]);
}

#[tokio::test]
async fn a_topic_whose_cluster_is_gone_is_let_go() {
    let mut object = topic_object("Delete");
    object["metadata"]["finalizers"] = json!([topic::FINALIZER]);
    let server = Server::with(&[(TOPIC, object)]);
    delete(&server, TOPIC);
    let (scripted, brokers) = Scripted::lonely(&server).await;
    let context = context(&server, brokers);
    knows_cluster(&context, false);
    look_at_topic(&server, &context).await.unwrap();
    assert!(server.get(TOPIC).is_none());
    assert_eq!(scripted.state().deleted.len(), 0);
}

#[tokio::test]
async fn a_topic_is_kept_while_its_cluster_does_not_answer_and_says_so() {
    let mut object = topic_object("Delete");
    object["metadata"]["finalizers"] = json!([topic::FINALIZER]);
    let server = Server::with(&[(TOPIC, object)]);
    delete(&server, TOPIC);
    let context = context(&server, Brokers::at("127.0.0.1:1"));
    knows_cluster(&context, true);
    assert!(look_at_topic(&server, &context).await.is_err());
    let said = server.get(TOPIC).unwrap();
    assert_eq!(said["metadata"]["finalizers"], json!([topic::FINALIZER]));
    let condition = &said["status"]["conditions"][0];
    assert_eq!((&condition["type"], &condition["reason"]), (&json!("Ready"), &json!("DeletionWaits")));
    assert!(condition["message"].as_str().unwrap().contains("weir.dev/force-delete"), "{condition}");
    // the documented way out
    let force = json!({"weir.dev/force-delete": ""});
    server.change(|objects| objects.get_mut(TOPIC).unwrap()["metadata"]["annotations"] = force);
    look_at_topic(&server, &context).await.unwrap();
    assert!(server.get(TOPIC).is_none());
}
