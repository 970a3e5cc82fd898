//! Metadata of thousands of topics and subscriptions: it is more than clients of gRPC take in one answer, and comes in pages.

use prost::Message as _;
use std::cell::RefCell;
use std::path::Path;
use std::process::Command as Process;
use std::time::{Duration, Instant};
use tonic::transport::Channel;
use weir_broker::Running;
use weir_broker::config::Config;
use weir_broker::formation::Identity;
use weir_core::meta::command::{ApplySubscription, ApplyTopic, Command, Kind, Placement};
use weir_core::meta::state::{Broker, MetaState, SubscriptionSpec, TopicSpec};
use weir_proto::v1::metadata_client::MetadataClient;
use weir_proto::{pages, v1};

const TOPICS: usize = 3_000;
const SUBSCRIPTIONS: usize = 2_000;
/// Of the topic that they read.
const PARTITIONS: usize = 8;
const PAGE_BYTES_MAX: usize = 3 << 20;
/// What clients of gRPC take where nobody says otherwise.
const USUAL_BYTES_MAX: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(120);

fn name(at: usize) -> String {
    format!("shop/n{at:0>250}")
}

/// Metadata as a cluster could begin with it: topics, one of them with more partitions than the others, and its subscriptions.
fn metadata() -> MetaState {
    let me = Broker { id: 1, name: "weir-0".into(), ..Default::default() };
    let mut state = MetaState::form("pages", &[me]);
    let mut apply = |kind: Kind| {
        state.apply(&Command { kind: Some(kind) }).expect("it is applied");
    };
    for at in 0..TOPICS {
        let partitions = if at == 0 { PARTITIONS as u32 } else { 1 };
        let spec = TopicSpec { partitions, replicas: 1, ..Default::default() };
        let placements = (0..partitions).map(|_| Placement { brokers: vec![1] }).collect();
        let owner_uid = "u".repeat(128);
        apply(Kind::ApplyTopic(ApplyTopic { name: name(at), spec, owner_uid, generation: 1, placements }));
    }
    for at in 0..SUBSCRIPTIONS {
        let filter = format!("key != '{}'", "x".repeat(1_900));
        let spec = SubscriptionSpec { topic: name(0), filter, ..Default::default() };
        apply(Kind::ApplySubscription(ApplySubscription { name: name(at), spec, ..Default::default() }));
    }
    state
}

/// A broker of a cluster that begins with this metadata.
async fn broker(data: &Path, state: &MetaState) -> Running {
    let store = weir_store::rocks::RocksStore::open(&data.join("db")).unwrap();
    let state = state.encode_to_vec().into();
    let identity = Identity { cluster_id: "pages".into(), broker_id: 1, active: true, state };
    store.put_meta("identity", &identity.encode_to_vec()).unwrap();
    drop(store);
    let mut arguments = vec!["weir-broker".to_owned(), format!("--data={}", data.display())];
    arguments.extend(["client", "peer", "admin", "metrics"].map(|listener| format!("--{listener}-listen=127.0.0.1:0")));
    let running = weir_broker::start(<Config as clap::Parser>::parse_from(arguments)).await.unwrap();
    running.ready().await;
    running
}

/// All pages, whose sizes are bounded, by a client that takes what is usual.
async fn get(client: &MetadataClient<Channel>) -> v1::GetMetadataResponse {
    let sizes = RefCell::new(Vec::new());
    let page = async |request| {
        let page = client.clone().get(request).await?.into_inner();
        sizes.borrow_mut().push(page.encoded_len());
        Ok(page)
    };
    let whole = pages::metadata(Default::default(), page).await.unwrap();
    assert!(sizes.borrow().iter().all(|size| *size <= PAGE_BYTES_MAX), "{sizes:?}");
    whole
}

async fn describe(client: &MetadataClient<Channel>) -> v1::DescribeResponse {
    let sizes = RefCell::new(Vec::new());
    let page = async |request| {
        let page = client.clone().describe(request).await?.into_inner();
        sizes.borrow_mut().push(page.encoded_len());
        Ok(page)
    };
    let whole = pages::describe(Default::default(), page).await.unwrap();
    assert!(sizes.borrow().iter().all(|size| *size <= PAGE_BYTES_MAX), "{sizes:?}");
    whole
}

fn names<'a>(all: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    let mut names: Vec<&str> = all.map(String::as_str).collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_topics_and_subscriptions_reach_clients_with_usual_limits() {
    let data = tempfile::tempdir().unwrap();
    let state = metadata();
    let running = broker(data.path(), &state).await;
    let address = running.client.to_string();
    let client = MetadataClient::connect(format!("http://{address}")).await.unwrap();
    let got = get(&client).await;
    assert_eq!(names(got.topics.iter().map(|t| &t.name)), names(state.topics.keys()));
    assert_eq!(names(got.subscriptions.iter().map(|s| &s.name)), names(state.subscriptions.keys()));
    assert!(got.encoded_len() > USUAL_BYTES_MAX, "one page would not do: {}", got.encoded_len());
    // each partition once, and each position once
    let begun = Instant::now();
    let described = loop {
        let described = describe(&client).await;
        let positions: usize = described.partitions.iter().map(|p| p.subscriptions.len()).sum();
        if described.partitions.len() == TOPICS + PARTITIONS && positions == PARTITIONS * SUBSCRIPTIONS {
            break described;
        }
        assert!(begun.elapsed() < PATIENCE, "{} partitions, {positions} positions", described.partitions.len());
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert!(described.encoded_len() > USUAL_BYTES_MAX, "one page would not do: {}", described.encoded_len());
    for partition in described.partitions.iter().filter(|p| p.topic == name(0)) {
        assert_eq!(
            names(partition.subscriptions.iter().map(|s| &s.subscription)),
            names(state.subscriptions.keys()),
            "{}",
            partition.partition
        );
    }
    let groups: std::collections::BTreeSet<u64> = described.partitions.iter().map(|p| p.group).collect();
    assert_eq!(groups.len(), described.partitions.len());
    // the client, and the command line with it
    let weir = weir_client::Client::new(&address).unwrap();
    let cluster = weir.connect(PATIENCE).await.unwrap();
    assert_eq!((cluster.metadata.topics.len(), cluster.metadata.subscriptions.len()), (TOPICS, SUBSCRIPTIONS));
    // the metadata group is none of a topic's
    for (topics, count) in
        [(vec![], described.partitions.len()), ((0..TOPICS).map(name).collect(), TOPICS + PARTITIONS - 1)]
    {
        let begun = Instant::now();
        loop {
            // a broker that has not told its address yet, or does not answer in time, is left out
            let seen = weir.describe(&topics).await.map(|statuses| statuses.len());
            if matches!(seen, Ok(seen) if seen == count) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{seen:?} of {count}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    for (kind, count) in [("topic", TOPICS), ("subscription", SUBSCRIPTIONS)] {
        let list =
            Process::new(env!("CARGO_BIN_EXE_weir")).args(["--server", &address, kind, "list"]).output().unwrap();
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        assert_eq!(list.lines().filter(|line| line.contains("shop/n")).count(), count, "{kind}");
    }
    for wrong in ["x", "subscription"] {
        let request = v1::GetMetadataRequest { page_token: wrong.into(), ..Default::default() };
        assert_eq!(client.clone().get(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
        let request = v1::DescribeRequest { page_token: wrong.into(), ..Default::default() };
        assert_eq!(client.clone().describe(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
    running.stop().await;
}
