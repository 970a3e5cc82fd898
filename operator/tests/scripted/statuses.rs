//! How often statuses are written, and what others write into them.

use crate::api::Server;
use crate::brokers::Scripted;
use crate::world::{CLUSTER, cluster_object};
use crate::{SUBSCRIPTION, TOPIC, context, knows_cluster, look_at, look_at_cluster, subscription_object, topic_object};
use http::Method;
use serde_json::{Value, json};
use std::sync::Arc;
use weir_operator::brokers::Brokers;
use weir_operator::context::Context;

/// Under which the operator keeps what the brokers said last.
const ADDRESS: &str = "default-admin.shop.svc.cluster.local:7422";

fn writes(server: &Server) -> usize {
    server.take_requests().iter().filter(|(method, path)| *method == Method::PATCH && path.ends_with("/status")).count()
}

async fn look_at_both(server: &Server, context: &Arc<Context>) {
    for path in [TOPIC, SUBSCRIPTION] {
        look_at(server.get(path).unwrap(), context).await.unwrap();
    }
}

/// A topic and a subscription of which nothing is left to write.
async fn settled() -> (Server, Scripted, Arc<Context>) {
    let server = Server::with(&[(TOPIC, topic_object("Retain")), (SUBSCRIPTION, subscription_object())]);
    let (scripted, brokers) = Scripted::lonely(&server).await;
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    for _ in 0..4 {
        look_at_both(&server, &context).await;
    }
    server.take_requests();
    (server, scripted, context)
}

fn measured_earlier(server: &Server) {
    server.change(|objects| {
        for path in [TOPIC, SUBSCRIPTION] {
            objects.get_mut(path).unwrap()["status"]["measuredAt"] = json!("2026-01-01T00:00:00Z");
        }
    });
}

#[tokio::test]
async fn figures_that_change_with_the_traffic_are_written_every_five_minutes_or_with_a_condition() {
    let (server, scripted, context) = settled().await;
    let status = |path: &str| server.get(path).unwrap()["status"].clone();
    for traffic in 1..20 {
        scripted.state().traffic = traffic * 1_000_000;
        context.brokers.forget(ADDRESS);
        look_at_both(&server, &context).await;
    }
    assert_eq!(writes(&server), 0, "{} {}", status(TOPIC), status(SUBSCRIPTION));
    measured_earlier(&server);
    look_at_both(&server, &context).await;
    assert_eq!(writes(&server), 2, "the figures were old");
    assert_eq!((&status(TOPIC)["size"], &status(SUBSCRIPTION)["backlog"]), (&json!("18Mi"), &json!(19_000_000)));
    look_at_both(&server, &context).await;
    assert_eq!(writes(&server), 0);
    // a condition changes: the figures go with it
    scripted.state().traffic = 1 << 30;
    scripted.state().alive.clear();
    scripted.state().alive.insert("another".into());
    context.brokers.forget(ADDRESS);
    look_at_both(&server, &context).await;
    assert_eq!(status(TOPIC)["size"], json!("1.0Gi"));
}

#[tokio::test]
async fn conditions_of_others_are_no_reason_to_write_and_are_not_taken_over() {
    let (server, _scripted, context) = settled().await;
    let foreign = json!({"type": "Audited", "status": "True", "reason": "Weekly", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    server.change(|objects| {
        for path in [TOPIC, SUBSCRIPTION] {
            let conditions = &mut objects.get_mut(path).unwrap()["status"]["conditions"];
            conditions.as_array_mut().unwrap().push(foreign.clone());
        }
    });
    look_at_both(&server, &context).await;
    assert_eq!(writes(&server), 0);
    let kinds = |path: &str| {
        let list: Vec<Value> = server.get(path).unwrap()["status"]["conditions"].as_array().unwrap().clone();
        list.iter().map(|c| c["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert!(kinds(TOPIC).contains(&"Audited".to_owned()) && kinds(SUBSCRIPTION).contains(&"Audited".to_owned()));
}

#[tokio::test]
async fn conditions_that_brokers_gave_stay_while_they_are_not_asked_or_do_not_answer() {
    let server = Server::with(&[(CLUSTER, cluster_object()), (TOPIC, topic_object("Retain"))]);
    let said = |kind: &str, reason: &str| {
        json!({"type": kind, "status": "True", "reason": reason, "message": "as brokers said", "lastTransitionTime":
            "2026-01-01T00:00:00Z", "observedGeneration": 1})
    };
    let all = json!([
        said("Ready", "Serving"),
        said("Degraded", "UnderReplicated"),
        said("VolumesRolledBack", "OlderThanKnown")
    ]);
    server.change(|objects| objects.get_mut(CLUSTER).unwrap()["status"] = json!({"conditions": all}));
    server.change_spec(CLUSTER, "paused", json!(true));
    look_at_cluster(&server).await;
    let conditions = |path: &str| {
        let list = server.get(path).unwrap()["status"]["conditions"].as_array().unwrap().clone();
        let brief =
            |c: &Value| ["type", "status", "reason"].map(|field| c[field].as_str().unwrap().to_owned()).join(" ");
        list.iter().map(brief).collect::<Vec<_>>()
    };
    let paused = ["Ready True Paused", "Degraded True Paused", "Progressing False Paused"];
    assert_eq!(conditions(CLUSTER), [&paused[..], &["VolumesRolledBack True OlderThanKnown"]].concat());
    // a topic whose cluster does not answer
    let known = json!([said("Ready", "Serving"), said("Degraded", "UnderReplicated")]);
    server.change(|objects| objects.get_mut(TOPIC).unwrap()["status"] = json!({"conditions": known}));
    let context = context(&server, Brokers::at("127.0.0.1:1"));
    knows_cluster(&context, true);
    look_at(server.get(TOPIC).unwrap(), &context).await.unwrap();
    assert_eq!(conditions(TOPIC), ["Ready False ClusterUnreachable", "Degraded True UnderReplicated"]);
}

#[tokio::test]
async fn a_subscription_says_that_its_dead_letter_topic_is_missing_until_it_is_there() {
    let mut object = subscription_object();
    object["spec"]["deadLetter"] = json!({"maxDeliveries": 3, "topic": "dead"});
    let server = Server::with(&[(TOPIC, topic_object("Retain")), (SUBSCRIPTION, object)]);
    let (scripted, brokers) = Scripted::lonely(&server).await;
    let context = context(&server, brokers);
    knows_cluster(&context, true);
    for _ in 0..3 {
        look_at_both(&server, &context).await;
    }
    let missing = || {
        let status = server.get(SUBSCRIPTION).unwrap()["status"].clone();
        let conditions = status["conditions"].as_array().unwrap().clone();
        conditions.into_iter().find(|c| c["type"] == "DeadLetterTopicMissing")
    };
    let said = missing().unwrap();
    assert_eq!((&said["status"], &said["reason"]), (&json!("True"), &json!("TopicNotFound")));
    assert!(said["message"].as_str().unwrap().contains("shop/dead"), "{said}");
    let dead = weir_proto::v1::Topic { name: "shop/dead".into(), ..Default::default() };
    scripted.state().topics.insert("shop/dead".into(), dead);
    context.brokers.forget(ADDRESS);
    look_at_both(&server, &context).await;
    assert_eq!(missing(), None);
}
