//! Weir on a real Kubernetes. `make e2e` runs these, in order, one at a time.

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use weir_crds::{StreamCluster, Subscription, Topic};
use weir_e2e::{Kubernetes, NAMESPACE, faults, invalid};

const LONG: Duration = Duration::from_secs(180);

/// Verifies for so many seconds while `during` happens.
async fn under_load(
    kubernetes: &Kubernetes,
    what: &str,
    seconds: u64,
    during: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<serde_json::Value> {
    let begun = Instant::now();
    let seconds_text = seconds.to_string();
    let arguments =
        ["bench", "verify", "--topic", "weir/load", "--seconds", &seconds_text, "--rate", "600", "-o", "json"];
    static LOADS: AtomicU32 = AtomicU32::new(0);
    let job = format!("verify-{}", LOADS.fetch_add(1, Ordering::Relaxed));
    kubernetes.start(&job, &arguments).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    during().await.with_context(|| what.to_owned())?;
    let found = kubernetes.verified(what, &job, Duration::from_secs(seconds) + LONG).await;
    println!("{what}: {:.0} s", begun.elapsed().as_secs_f64());
    found
}

#[tokio::test]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_cluster_from_installation_to_removal() -> anyhow::Result<()> {
    let k = Kubernetes::connect().await?;
    install(&k).await?;
    chart_is_valid(&k).await?;
    declare(&k).await?;
    invalid_resources_are_refused(&k).await?;
    publish_and_consume(&k).await?;
    by_pattern_key_and_time(&k).await?;
    kill_and_delete(&k).await?;
    drift(&k).await?;
    scale(&k).await?;
    roll(&k).await?;
    if let Some(home) = k.home.clone() {
        grow(&k).await?; // elsewhere volumes may not be able to
        lose_volume(&k).await?;
        drain_two(&k).await?;
        stop_api(&k, &home).await?;
        lose_node(&k, &home).await?;
    }
    if std::env::var_os("WEIR_E2E_SCALE").is_some() {
        thousand_topics(&k).await?;
    }
    other_namespace(&k).await?;
    reinstall(&k).await?;
    remove(&k).await
}

async fn install(k: &Kubernetes) -> anyhow::Result<()> {
    k.namespace(NAMESPACE).await?;
    let begun = Instant::now();
    k.install(&[])?;
    k.settled(3, LONG).await?;
    println!("installed, three brokers serve: {:.1} s", begun.elapsed().as_secs_f64());
    k.helm(&["test", "weir", "-n", NAMESPACE])?;
    let chart = weir_e2e::chart();
    let second = k.helm(&["install", "second", &chart.to_string_lossy(), "-n", "elsewhere", "--create-namespace"]);
    let said = second.expect_err("one operator looks after all namespaces").to_string();
    assert!(said.contains("Weir is installed in namespace \"weir\" already"), "{said}");
    let cluster = k.cluster().await?;
    let members = cluster.status.unwrap_or_default().members;
    if k.home.is_some() {
        let mut zones: Vec<_> = members.iter().map(|m| m.zone.clone()).collect();
        zones.sort();
        assert_eq!(zones, ["zone-0", "zone-1", "zone-2"], "one broker a zone, and it knows which");
    }
    Ok(())
}

/// Everything the chart may render, but for what other operators define, is taken by the API server without an unknown field.
async fn chart_is_valid(k: &Kubernetes) -> anyhow::Result<()> {
    use kube::api::{DynamicObject, Patch, PatchParams};
    let rendered = std::fs::read_to_string(weir_e2e::chart().join("golden/all.yaml"))?;
    let discovery = kube::Discovery::new(k.client.clone()).run().await?;
    let mut asked = 0;
    for document in rendered.split("\n---") {
        if !document.contains("\nkind: ") {
            continue; // nothing but comments
        }
        let object: DynamicObject = serde_yaml_ng::from_str(document)?;
        let kind = kube::core::GroupVersionKind::try_from(object.types.as_ref().context("a kind")?)?;
        let Some((resource, capabilities)) = discovery.resolve_gvk(&kind) else {
            anyhow::ensure!(kind.group == "monitoring.coreos.com", "the API server knows no {kind:?}");
            continue;
        };
        let api: Api<DynamicObject> = match capabilities.scope {
            kube::discovery::Scope::Cluster => Api::all_with(k.client.clone(), &resource),
            kube::discovery::Scope::Namespaced => Api::namespaced_with(k.client.clone(), NAMESPACE, &resource),
        };
        let strictly = PatchParams { dry_run: true, ..PatchParams::apply("weir-e2e").force() }.validation_strict();
        let name = object.name_any();
        let asked_for = api.patch(&name, &strictly, &Patch::Apply(&object)).await;
        asked_for.with_context(|| format!("{} {name}", kind.kind))?;
        asked += 1;
    }
    anyhow::ensure!(asked > 10, "only {asked} objects were rendered");
    println!("{asked} rendered objects are valid");
    Ok(())
}

async fn declare(k: &Kubernetes) -> anyhow::Result<()> {
    let load =
        "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: load}\nspec: {partitions: 6, replicas: 3}\n";
    k.apply(load).await?;
    k.apply(include_str!("../../examples/orders.yaml")).await?;
    let took = k.topic_ready("load").await?;
    k.topic_ready("orders").await?;
    println!("a topic is ready after {:.1} s", took.as_secs_f64());
    Ok(())
}

async fn invalid_resources_are_refused(k: &Kubernetes) -> anyhow::Result<()> {
    let before = k.cluster().await?.spec;
    for (yaml, message) in invalid::cases() {
        let refused = k.apply(&yaml).await.expect_err(&yaml).to_string();
        assert!(refused.contains(message), "{yaml}: {refused:?} does not say {message:?}");
    }
    assert_eq!(k.cluster().await?.spec, before, "what is refused changes nothing");
    // what the API server cannot know, a condition says
    k.apply(&invalid::topic("many", "replicas: 5")).await?;
    let reason = async |name: &str| {
        let topic = k.api::<Topic>().get(name).await.ok()?;
        let conditions = topic.status?.conditions;
        conditions.into_iter().find(|c| c.type_ == "Ready").map(|c| c.reason)
    };
    let is = async |name: &str, wanted: &str| (reason(name).await.as_deref() == Some(wanted)).then_some(());
    k.until("TooFewBrokers", LONG, async || is("many", "TooFewBrokers").await).await?;
    k.api::<Topic>().delete("many", &DeleteParams::default()).await?;
    k.apply(&invalid::topic("lonely", "clusterRef: {name: nowhere}")).await?;
    k.until("ClusterNotFound", LONG, async || is("lonely", "ClusterNotFound").await).await?;
    k.api::<Topic>().delete("lonely", &DeleteParams::default()).await?;
    k.until("both are gone", LONG, async || {
        let gone = async |name| k.api::<Topic>().get_opt(name).await.is_ok_and(|t| t.is_none());
        (gone("many").await && gone("lonely").await).then_some(())
    })
    .await?;
    println!("invalid resources: all refused");
    Ok(())
}

async fn publish_and_consume(k: &Kubernetes) -> anyhow::Result<()> {
    let produce = ["bench", "produce", "--topic", "weir/orders", "--records", "10000", "--size", "100", "-o", "json"];
    k.start("publisher", &produce).await?;
    let (published, log) = k.finish("publisher", LONG).await?;
    assert!(published, "{log}");
    let consume = ["consume", "--topic", "weir/orders", "--from", "earliest", "--max", "10000", "-o", "raw"];
    k.start("consumer", &consume).await?;
    let (consumed, log) = k.finish("consumer", LONG).await?;
    assert!(consumed && log.lines().count() == 10_000, "{} lines", log.lines().count());
    let subscriptions = k.api::<Subscription>();
    k.until("the subscription is ready", LONG, async || {
        let conditions = subscriptions.get("mail").await.ok()?.status?.conditions;
        conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True").then_some(())
    })
    .await?;
    subscribed(k, "subscriber").await?;
    println!(
        "a Job published 10000 records over the Service's name, another read them, a third half of them as a subscription"
    );
    Ok(())
}

/// One subscription reads a topic, and one that comes later, of a pattern; what its routing keys choose, and what is published later.
async fn by_pattern_key_and_time(k: &Kubernetes) -> anyhow::Result<()> {
    let topic = |name: &str| {
        format!(
            "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {name}}}\nspec: {{partitions: 2, replicas: 3}}\n"
        )
    };
    k.apply(&topic("events.eu")).await?;
    let paid = "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {name: paid}\nspec: {topic: 'events.*', routingKeys: ['*.paid'], mode: shared, start: earliest}\n";
    k.apply(paid).await?;
    k.topic_ready("events.eu").await?;
    let publish = async |job: &str, topic: &str, key: &str, more: &[&str]| {
        let header = format!("weir-routing-key={key}");
        let begin = ["publish", topic, "--file", "/etc/hostname", "--header", &header];
        k.start(job, &[&begin[..], more].concat()).await?;
        let (published, log) = k.finish(job, LONG).await?;
        anyhow::ensure!(published, "{log}");
        Ok(())
    };
    publish("publish-later", "weir/events.eu", "eu.paid", &["--delay", "3s"]).await?;
    publish("publish-open", "weir/events.eu", "eu.open", &[]).await?;
    k.apply(&topic("events.us")).await?;
    k.topic_ready("events.us").await?;
    publish("publish-us", "weir/events.us", "us.paid", &[]).await?;
    k.start("subscriber-paid", &["consume", "--subscription", "weir/paid", "--max", "2", "-o", "json"]).await?;
    let (consumed, log) = k.finish("subscriber-paid", LONG).await?;
    let read = |key: &str| log.lines().filter(|l| l.contains(&format!("\"{key}\""))).count();
    assert!(consumed && (read("eu.paid"), read("us.paid"), read("eu.open")) == (1, 1, 0), "{log}");
    k.api::<Subscription>().delete("paid", &DeleteParams::default()).await?;
    for topic in ["events.eu", "events.us"] {
        k.api::<Topic>().delete(topic, &DeleteParams::default()).await?;
    }
    println!("a subscription by pattern and routing key read two topics, and what was published later");
    Ok(())
}

/// Reads and acknowledges 5000 of what the subscription `mail` has before it.
async fn subscribed(k: &Kubernetes, job: &str) -> anyhow::Result<()> {
    let consume = ["consume", "--subscription", "weir/mail", "--max", "5000", "-o", "raw"];
    k.start(job, &consume).await?;
    let (consumed, log) = k.finish(job, LONG).await?;
    assert!(consumed && log.lines().count() == 5_000, "{} lines", log.lines().count());
    Ok(())
}

/// The subscription `mail` has been read to its end. Delivery is at least once: where leadership moved while it was read, what was on its
/// way then came twice, and as much is left; never more than consumers had credit for.
async fn nothing_is_left(k: &Kubernetes) -> anyhow::Result<()> {
    const CREDIT: i64 = 6 * 1_000;
    // the brokers are asked: the resource's status is up to five minutes old
    let asked = std::sync::atomic::AtomicU32::new(0);
    let backlog = async || -> Option<i64> {
        let job = format!("backlog-{}-{}", std::process::id(), asked.fetch_add(1, Ordering::Relaxed));
        k.start(&job, &["subscription", "describe", "weir/mail", "-o", "json"]).await.ok()?;
        let (described, log) = k.finish(&job, LONG).await.ok()?;
        let line = log.lines().find(|l| described && l.starts_with('{'))?;
        serde_json::from_str::<serde_json::Value>(line).ok()?["backlog"].as_i64()
    };
    let zero = async || (backlog().await == Some(0)).then_some(());
    if k.until("nothing is left for the subscription", Duration::from_secs(75), zero).await.is_ok() {
        return Ok(());
    }
    let left = backlog().await.context("a backlog")?;
    anyhow::ensure!((1..=CREDIT).contains(&left), "{left} messages are left");
    println!("{left} messages came twice while leadership moved");
    k.start("subscriber-rest", &["consume", "--subscription", "weir/mail", "--max", &left.to_string(), "-o", "raw"])
        .await?;
    let (consumed, log) = k.finish("subscriber-rest", LONG).await?;
    assert!(consumed, "{log}");
    k.until("nothing is left for the subscription", LONG, zero).await.map(drop)
}

async fn kill_and_delete(k: &Kubernetes) -> anyhow::Result<()> {
    under_load(k, "a broker killed, another's pod deleted", 30, async || {
        let pods = k.brokers().await?;
        if k.home.is_some() {
            faults::kill_in_pod(&pods[0].uid().unwrap_or_default(), "weir-broker")?;
            tokio::time::sleep(Duration::from_secs(8)).await;
        }
        k.api::<Pod>().delete(&pods[1].name_any(), &DeleteParams::default()).await?;
        Ok(())
    })
    .await?;
    k.settled(3, LONG).await.map(drop)
}

async fn drift(k: &Kubernetes) -> anyhow::Result<()> {
    let services = k.api::<k8s_openapi::api::core::v1::Service>();
    let budgets = k.api::<k8s_openapi::api::policy::v1::PodDisruptionBudget>();
    services.delete("default-admin", &DeleteParams::default()).await?;
    budgets.delete("default-broker", &DeleteParams::default()).await?;
    let back = async || {
        let both = services.get("default-admin").await.is_ok() && budgets.get("default-broker").await.is_ok();
        both.then_some(())
    };
    let took = k.until("what was deleted is back", Duration::from_secs(30), back).await?;
    println!("drift put right after {:.1} s", took.as_secs_f64());
    Ok(())
}

async fn scale(k: &Kubernetes) -> anyhow::Result<()> {
    under_load(k, "3 → 5 → 3 brokers, the operator killed throughout", 90, async || {
        let begun = Instant::now();
        let _killed = k.kill_operators(Duration::from_secs(3));
        k.scale(5).await?;
        k.until("replicas stand on the new brokers", LONG, async || {
            let members = k.cluster().await.ok()?.status?.members;
            (members.len() == 5 && members.iter().all(|m| m.replicas > 0)).then_some(())
        })
        .await?;
        k.settled(5, LONG).await?;
        let up = begun.elapsed();
        k.install(&[])?; // what kubectl scaled, an upgrade of the release leaves alone
        assert_eq!(k.cluster().await?.spec.brokers, 5);
        k.scale(3).await?;
        k.settled(3, LONG).await?;
        println!("scaled up in {:.0} s, down in {:.0} s", up.as_secs_f64(), (begun.elapsed() - up).as_secs_f64());
        Ok(())
    })
    .await?;
    let claims = k.api::<PersistentVolumeClaim>();
    k.until("the drained brokers' claims are gone", LONG, async || {
        (claims.list(&ListParams::default()).await.ok()?.items.len() == 3).then_some(())
    })
    .await?;
    Ok(())
}

async fn roll(k: &Kubernetes) -> anyhow::Result<()> {
    under_load(k, "rolling change, the operator killed meanwhile", 60, async || {
        let _killed = k.kill_operators(Duration::from_secs(5));
        let before: Vec<_> = k.brokers().await?.iter().filter_map(|p| p.uid()).collect();
        // a new image, where there is one to roll to
        let change = match std::env::var("WEIR_IMAGE_NEXT") {
            Ok(image) => json!({"image": image}),
            Err(_) => json!({"resources": {"requests": {"cpu": "101m"}, "limits": {"memory": "1Gi"}}}),
        };
        k.change_cluster(change).await?;
        let took = k
            .until("every broker was replaced", LONG, async || {
                let pods = k.brokers().await.ok()?;
                pods.iter().all(|p| p.uid().is_some_and(|u| !before.contains(&u))).then_some(())
            })
            .await?;
        k.settled(3, LONG).await?;
        println!("three brokers rolled in {:.0} s", took.as_secs_f64());
        Ok(())
    })
    .await?;
    Ok(())
}

async fn grow(k: &Kubernetes) -> anyhow::Result<()> {
    k.change_cluster(json!({"storage": {"size": "2Gi"}})).await?;
    let claims = k.api::<PersistentVolumeClaim>();
    k.until("every claim has grown", LONG, async || {
        let list = claims.list(&ListParams::default()).await.ok()?;
        let size = |c: &PersistentVolumeClaim| {
            c.status.as_ref().and_then(|s| Some(s.capacity.as_ref()?.get("storage")?.0.clone()))
        };
        list.iter().all(|c| size(c).as_deref() == Some("2Gi")).then_some(())
    })
    .await?;
    println!("volumes have grown");
    Ok(())
}

async fn lose_volume(k: &Kubernetes) -> anyhow::Result<()> {
    under_load(k, "a volume deleted", 40, async || {
        let id = async || {
            let members = k.cluster().await.ok()?.status?.members;
            members.iter().filter(|m| m.name == "default-broker-1" && m.phase == "active").map(|m| m.id).max()
        };
        let (before, begun) = (id().await, Instant::now());
        let claims = k.api::<PersistentVolumeClaim>();
        claims.delete("data-default-broker-1", &DeleteParams::default()).await?;
        k.api::<Pod>().delete("default-broker-1", &DeleteParams::default()).await?;
        // an empty disk is a new broker, under the old name
        k.until("a new broker", LONG, async || (id().await? > before?).then_some(())).await?;
        k.settled(3, LONG).await?;
        println!("rebuilt in {:.0} s", begun.elapsed().as_secs_f64());
        Ok(())
    })
    .await?;
    k.settled(3, LONG).await.map(drop)
}

/// Two nodes are drained in a row, and the first one's disk is lost. The second eviction waits until every replica is in sync again.
async fn drain_two(k: &Kubernetes) -> anyhow::Result<()> {
    use k8s_openapi::api::policy::v1::PodDisruptionBudget;
    use kube::api::EvictParams;
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(k.client.clone());
    let (budgets, pods) = (k.api::<PodDisruptionBudget>(), k.api::<Pod>());
    // a client of its own, which hands refusals on: the usual one asks again by itself until it is allowed
    let mut config = kube::Config::infer().await?;
    config.default_retry = false;
    let once: Api<Pod> = Api::namespaced(kube::Client::try_from(config)?, NAMESPACE);
    let id = async || {
        let members = k.cluster().await.ok()?.status?.members;
        members.iter().filter(|m| m.name == "default-broker-1" && m.phase == "active").map(|m| m.id).max()
    };
    // all that an eviction depends on, in one line
    let state = async || -> String {
        let budget = budgets.get("default-broker").await.ok();
        let spec = budget.as_ref().and_then(|b| b.spec.clone()).unwrap_or_default();
        let at = budget.as_ref().and_then(|b| b.metadata.generation);
        let status = budget.and_then(|b| b.status).unwrap_or_default();
        let all = pods.list(&ListParams::default().labels("app.kubernetes.io/name=weir-broker")).await;
        let pod = |p: &Pod| {
            let conditions = p.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
            let ready = conditions.iter().find(|c| c.type_ == "Ready").map(|c| c.status.clone());
            let phase = p.status.as_ref().and_then(|s| s.phase.clone());
            format!("{} {phase:?} ready={ready:?} going={}", p.name_any(), p.metadata.deletion_timestamp.is_some())
        };
        let pods: Vec<String> = all.map(|l| l.items.iter().map(pod).collect()).unwrap_or_default();
        let cluster = k.cluster().await.ok().and_then(|c| c.status).unwrap_or_default();
        let members: Vec<String> = cluster.members.iter().map(|m| format!("{}={} {}", m.name, m.id, m.phase)).collect();
        format!(
            "budget max={:?} policy={:?} generation={at:?}/{:?} allowed={} healthy={}/{} disrupted={:?}; {pods:?}; {members:?} \
             leaderless={:?} under={:?}",
            spec.max_unavailable,
            spec.unhealthy_pod_eviction_policy,
            status.observed_generation,
            status.disruptions_allowed,
            status.current_healthy,
            status.desired_healthy,
            status.disrupted_pods.unwrap_or_default().keys().collect::<Vec<_>>(),
            cluster.leaderless,
            cluster.under_replicated,
        )
    };
    let allowed = async || (budgets.get("default-broker").await.ok()?.status?.disruptions_allowed == 1).then_some(());
    k.until("the budget allows a drain", LONG, allowed).await?;
    let before = id().await;
    under_load(k, "two nodes drained, the first one's disk lost", 60, async || {
        let node = pods.get("default-broker-1").await?.spec.and_then(|s| s.node_name).context("a node")?;
        nodes.cordon(&node).await?;
        let begun = Instant::now();
        once.evict("default-broker-1", &EvictParams::default()).await.context("the first drain")?;
        // its volume stays behind with the node
        k.api::<PersistentVolumeClaim>().delete("data-default-broker-1", &DeleteParams::default()).await?;
        let mut refused = 0;
        let last = loop {
            let last = state().await; // for whoever reads why it failed
            match once.evict("default-broker-2", &EvictParams::default()).await {
                Ok(_) => break last,
                Err(kube::Error::Api(e)) if e.code == 429 => refused += 1,
                Err(error) => return Err(error.into()),
            }
            anyhow::ensure!(begun.elapsed() < LONG, "the second drain was refused {refused} times and never allowed");
            tokio::time::sleep(Duration::from_millis(250)).await;
        };
        println!("the second drain was allowed after {:.2} s and {refused} refusals", begun.elapsed().as_secs_f64());
        let status = k.cluster().await?.status.unwrap_or_default();
        let rebuilt = status.members.iter().any(|m| m.name == "default-broker-1" && Some(m.id) > before);
        anyhow::ensure!(refused > 0 && rebuilt, "the second drain was allowed early: {last}, {status:?}");
        nodes.uncordon(&node).await?;
        k.settled(3, LONG).await.map(drop)
    })
    .await
    .map(drop)
}

async fn stop_api(k: &Kubernetes, home: &std::path::Path) -> anyhow::Result<()> {
    under_load(k, "API server stopped for a minute, a broker killed meanwhile", 75, async || {
        let pods = k.brokers().await?;
        faults::command(home, "stop-api").await?;
        tokio::time::sleep(Duration::from_secs(20)).await;
        faults::kill_in_pod(&pods[2].uid().unwrap_or_default(), "weir-broker")?;
        tokio::time::sleep(Duration::from_secs(40)).await;
        faults::command(home, "start-api").await
    })
    .await?;
    k.settled(3, LONG).await.map(drop)
}

async fn lose_node(k: &Kubernetes, home: &std::path::Path) -> anyhow::Result<()> {
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(k.client.clone());
    under_load(k, "a node lost", 60, async || {
        faults::command(home, "stop-node-2").await?;
        k.until("Kubernetes gives the node up", LONG, async || {
            let conditions = nodes.get("node-2").await.ok()?.status?.conditions?;
            conditions.iter().any(|c| c.type_ == "Ready" && c.status == "Unknown").then_some(())
        })
        .await?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        faults::command(home, "start-node-2").await
    })
    .await?;
    k.settled(3, LONG).await.map(drop)
}

async fn thousand_topics(k: &Kubernetes) -> anyhow::Result<()> {
    use futures::StreamExt as _;
    const COUNT: usize = 1_000;
    let begun = Instant::now();
    let name = |at: usize| format!("many-{at}");
    let topics = k.api::<Topic>();
    let make = async |at: usize| {
        let topic: Topic = serde_json::from_value(json!({"apiVersion": "weir.dev/v1alpha1", "kind": "Topic",
            "metadata": {"name": name(at)}, "spec": {"partitions": 1, "replicas": 1, "deletionPolicy": "Delete"}}))?;
        topics.create(&Default::default(), &topic).await?;
        anyhow::Ok(())
    };
    let made: Vec<_> = futures::stream::iter(0..COUNT).map(make).buffer_unordered(16).collect().await;
    made.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
    let ready = async || {
        let list = topics.list(&ListParams::default()).await.ok()?;
        let is =
            |t: &&Topic| t.status.iter().flat_map(|s| &s.conditions).any(|c| c.type_ == "Ready" && c.status == "True");
        (list.iter().filter(is).count() >= COUNT).then_some(())
    };
    k.until("a thousand topics ready", LONG * 2, ready).await?;
    let took = begun.elapsed();
    tokio::time::sleep(Duration::from_secs(20)).await; // idle
    println!("{COUNT} topics ready after {:.0} s; operators hold {} MiB", took.as_secs_f64(), k.operators_mib().await?);
    let delete = async |at: usize| topics.delete(&name(at), &DeleteParams::default()).await.map(drop);
    let deleted: Vec<_> = futures::stream::iter(0..COUNT).map(delete).buffer_unordered(16).collect().await;
    deleted.into_iter().collect::<Result<Vec<()>, _>>()?;
    let gone = async || (topics.list(&ListParams::default()).await.ok()?.items.len() < 10).then_some(());
    let took = k.until("they are gone", LONG * 2, gone).await?;
    println!("and deleted after {:.0} s", took.as_secs_f64());
    Ok(())
}

async fn other_namespace(k: &Kubernetes) -> anyhow::Result<()> {
    k.namespace("shop").await?;
    let topics: Api<Topic> = Api::namespaced(k.client.clone(), "shop");
    let subscriptions: Api<Subscription> = Api::namespaced(k.client.clone(), "shop");
    let declare = async || {
        let topic: Topic = serde_yaml_ng::from_str(
            "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: carts}\nspec: {clusterRef: {name: default, namespace: weir}, deletionPolicy: Delete}\n",
        )?;
        topics.create(&Default::default(), &topic).await?;
        let subscription: Subscription = serde_yaml_ng::from_str(
            "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {name: ads}\nspec: {topic: carts, clusterRef: {name: default, namespace: weir}}\n",
        )?;
        subscriptions.create(&Default::default(), &subscription).await?;
        anyhow::Ok(())
    };
    let read = async || {
        let status = subscriptions.get("ads").await.ok()?.status?;
        status.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True").then_some(())
    };
    declare().await?;
    let reason = async || {
        let topic = topics.get("carts").await.ok()?;
        topic.status?.conditions.into_iter().find(|c| c.type_ == "Ready").map(|c| c.reason)
    };
    k.until("served in another namespace", LONG, async || (reason().await? == "Serving").then_some(())).await?;
    k.until("read in another namespace", LONG, read).await?;
    let took = k.delete_namespace("shop", LONG).await?;
    println!("a namespace with a served Topic and Subscription deleted in {:.0} s", took.as_secs_f64());
    k.namespace("shop").await?;
    declare().await?;
    k.until("served again", LONG, async || (reason().await? == "Serving").then_some(())).await?;
    k.change_cluster(json!({"allowedNamespaces": []})).await?;
    k.until("not allowed any more", LONG, async || (reason().await? == "NamespaceNotAllowed").then_some(())).await?;
    k.delete_namespace("shop", LONG).await?;
    println!("a topic in another namespace: served, then refused, then gone");
    Ok(())
}

async fn reinstall(k: &Kubernetes) -> anyhow::Result<()> {
    k.helm(&["uninstall", "weir", "-n", NAMESPACE])?;
    k.until("the brokers are gone", LONG, async || k.brokers().await.is_ok_and(|p| p.is_empty()).then_some(())).await?;
    k.install(&[])?;
    k.settled(3, LONG).await?;
    let consume = ["consume", "--topic", "weir/orders", "--from", "earliest", "--max", "10000", "-o", "raw"];
    k.start("again", &consume).await?;
    let (consumed, log) = k.finish("again", LONG).await?;
    assert!(consumed && log.lines().count() == 10_000, "{} lines", log.lines().count());
    subscribed(k, "subscriber-again").await?;
    nothing_is_left(k).await?;
    println!("uninstalled and installed again: the data is there, and the subscription went on where it was");
    Ok(())
}

async fn remove(k: &Kubernetes) -> anyhow::Result<()> {
    assert!(k.api::<StreamCluster>().get("default").await.is_ok());
    k.helm(&["uninstall", "weir", "-n", NAMESPACE])?;
    let took = k.delete_namespace(NAMESPACE, LONG).await?;
    println!("namespace deleted in {:.0} s", took.as_secs_f64());
    Ok(())
}
