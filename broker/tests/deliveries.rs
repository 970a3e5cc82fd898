//! What a subscription's members are handed, over plain gRPC with a client's usual settings: which deliveries count as failed, how large
//! answers are, and that slow readers hold up nobody.

mod node;

use bytes::Bytes;
use futures::StreamExt as _;
use node::{broker, connect};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use v1::subscriber_client::SubscriberClient;
use v1::{SubscriptionMode, admin_client::AdminClient, log_client::LogClient, publisher_client::PublisherClient};
use weir_broker::Running;
use weir_proto::v1;

/// What takes moments takes no longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// What clients of gRPC take with their usual settings, and a broker's answers have less than.
const USUAL_BYTES_MAX: usize = 4 << 20;

/// A topic `t` of one partition, and subscriptions of it from its beginning.
async fn declare(running: &Running, topic: v1::TopicSpec, subscriptions: &[(&str, v1::SubscriptionSpec)]) {
    let mut admin = AdminClient::new(connect(running.admin).await);
    let spec = v1::TopicSpec { partitions: 1, replicas: 1, ..topic };
    let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
    admin.apply_topic(request).await.unwrap();
    for (name, spec) in subscriptions {
        let spec = v1::SubscriptionSpec { topic: "t".into(), from_earliest: true, ..spec.clone() };
        let request = v1::ApplySubscriptionRequest { name: (*name).into(), spec: Some(spec), ..Default::default() };
        admin.apply_subscription(request).await.unwrap();
    }
    let mut metadata = v1::metadata_client::MetadataClient::new(connect(running.client).await);
    let begun = Instant::now();
    loop {
        let described = metadata.describe(v1::DescribeRequest::default()).await.unwrap().into_inner();
        if described.partitions.iter().any(|p| p.topic == "default/t") {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the partition has no leader");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn message(value: impl Into<Bytes>, header_bytes: usize) -> v1::Message {
    let header = v1::Header { name: "h".into(), value: Some(vec![b'h'; header_bytes].into()) };
    let headers = (header_bytes > 0).then_some(header).into_iter().collect();
    v1::Message { value: Some(value.into()), headers, ..Default::default() }
}

async fn publish(running: &Running, messages: Vec<v1::Message>) {
    let mut publisher = PublisherClient::new(connect(running.client).await);
    let request = v1::PublishRequest { topic: "t".into(), partition: Some(0), messages, ..Default::default() };
    publisher.publish(request).await.unwrap();
}

/// Ends a stream's requests when it is dropped.
type Requests = tokio::sync::mpsc::Sender<v1::PullRequest>;

async fn open(channel: Channel, credit: u32) -> (Requests, Streaming<v1::PullResponse>) {
    let (requests, receiver) = tokio::sync::mpsc::channel(16);
    let open = v1::PullOpen { subscription: "s".into(), member: "m".into(), messages: true, ..Default::default() };
    let first = v1::PullRequest { open: Some(open), credit_messages: credit, ..Default::default() };
    requests.send(first).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let responses = SubscriberClient::new(channel).streaming_pull(stream).await.unwrap().into_inner();
    (requests, responses)
}

/// Offsets and deliveries of the next messages, until there are so many.
async fn take(responses: &mut Streaming<v1::PullResponse>, count: usize) -> Vec<(u64, u32)> {
    let mut out = Vec::new();
    while out.len() < count {
        let next = tokio::time::timeout(PATIENCE, responses.message()).await.expect("messages come");
        out.extend(next.unwrap().expect("the stream goes on").messages.iter().map(|m| (m.offset, m.delivery)));
    }
    out
}

/// Passes connections on until it is dropped, which cuts all of them.
struct Wire {
    at: SocketAddr,
    tasks: tokio::task::JoinSet<()>,
}

async fn wire(to: SocketAddr) -> Wire {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut each = tokio::task::JoinSet::new();
        while let Ok((mut from, _)) = listener.accept().await {
            let mut to = TcpStream::connect(to).await.unwrap();
            each.spawn(async move { drop(tokio::io::copy_bidirectional(&mut from, &mut to).await) });
        }
    });
    Wire { at, tasks }
}

fn all_first(count: u64) -> Vec<(u64, u32)> {
    (0..count).map(|offset| (offset, 1)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_lost_connection_counts_what_was_handed_out_and_a_member_that_leaves_counts_nothing() {
    const COUNT: u64 = 40;
    let modes = [
        SubscriptionMode::Exclusive,
        SubscriptionMode::Failover,
        SubscriptionMode::Shared,
        SubscriptionMode::KeyShared,
    ];
    for mode in modes {
        let data = tempfile::tempdir().unwrap();
        let running = broker(data.path()).await;
        let spec = v1::SubscriptionSpec { mode: mode.into(), deliveries_max: Some(3), ..Default::default() };
        declare(&running, v1::TopicSpec::default(), &[("s", spec)]).await;
        publish(&running, (0..COUNT).map(|at| message(at.to_string(), 0)).collect()).await;
        // it ends its requests, as a client that closes does; it cancels the call, as one that is stopped does
        for cancel in [false, true, false] {
            let (requests, mut responses) = open(connect(running.client).await, COUNT as u32).await;
            assert_eq!(take(&mut responses, COUNT as usize).await, all_first(COUNT), "{mode:?}");
            if cancel {
                drop(responses);
            }
            drop(requests);
        }
        // what it saw and released is not counted, and returns to its place
        let (requests, mut responses) = open(connect(running.client).await, COUNT as u32).await;
        assert_eq!(take(&mut responses, COUNT as usize).await, all_first(COUNT), "{mode:?}");
        let released = v1::Nacked { start: 5, end: COUNT, delay_ms: Some(60_000), uncounted: true };
        let request = v1::PullRequest { nacks: vec![released], credit_messages: COUNT as u32, ..Default::default() };
        requests.send(request).await.unwrap();
        assert_eq!(take(&mut responses, COUNT as usize - 5).await, all_first(COUNT)[5..], "{mode:?}");
        drop((requests, responses));
        // a connection that is cut
        let wire = wire(running.client).await;
        let (_requests, mut responses) = open(connect(wire.at).await, COUNT as u32).await;
        assert_eq!(take(&mut responses, COUNT as usize).await, all_first(COUNT), "{mode:?}");
        drop(wire.tasks);
        // the broker sees it: an exclusive member that comes back before that has left by itself
        let begun = Instant::now();
        while http_get(running.metrics, "/metrics").await.lines().all(|line| line != "weir_open_streams 0") {
            assert!(begun.elapsed() < PATIENCE, "{mode:?}: the connection is not lost");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (_requests, mut responses) = open(connect(running.client).await, COUNT as u32).await;
        let again = take(&mut responses, COUNT as usize).await;
        let counted = again.iter().filter(|(_, delivery)| *delivery == 2).count() as u64;
        // without keys all messages are in one lane but in the mode shared
        assert_eq!(counted, if mode == SubscriptionMode::Shared { COUNT } else { 1 }, "{mode:?}: {again:?}");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_still_in_the_brokers_queue_was_handed_to_nobody_also_where_the_connection_is_lost() {
    const COUNT: u64 = 30;
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    let spec = v1::SubscriptionSpec {
        mode: SubscriptionMode::Shared.into(),
        deliveries_max: Some(1),
        ack_deadline_ms: Some(2_000),
        ..Default::default()
    };
    declare(&running, v1::TopicSpec::default(), &[("s", spec)]).await;
    for at in 0..COUNT {
        publish(&running, vec![message(vec![at as u8; 900_000], 0)]).await;
    }
    // it reads nothing, and its windows take a part of one message
    let narrow = |at: SocketAddr| async move {
        let endpoint = Endpoint::from_shared(format!("http://{at}")).unwrap();
        endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535).connect().await.unwrap()
    };
    let wire = wire(running.client).await;
    let (_requests, responses) = open(narrow(wire.at).await, COUNT as u32).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(wire.tasks);
    drop(responses);
    // the same, for longer than a message may be held: the member is given up
    let (_requests, _responses) = open(narrow(running.client).await, COUNT as u32).await;
    let (mut seen, begun) = (Vec::new(), Instant::now());
    while seen.len() < COUNT as usize {
        assert!(begun.elapsed() < PATIENCE, "{seen:?}");
        let pull = v1::PullMessagesRequest {
            subscription: "s".into(),
            partition: Some(0),
            wait_ms: 1_000,
            ..Default::default()
        };
        let mut subscriber = SubscriberClient::new(connect(running.client).await);
        for message in subscriber.pull(pull).await.unwrap().into_inner().messages {
            seen.push((message.offset, message.delivery));
            let offsets = vec![v1::OffsetRange { start: message.offset, end: message.offset + 1 }];
            let acknowledge = v1::AcknowledgeRequest { subscription: "s".into(), offsets, ..Default::default() };
            subscriber.acknowledge(acknowledge).await.unwrap();
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, all_first(COUNT), "a message that is delivered once is gone");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_what_clients_take_with_usual_settings_whatever_is_in_the_headers() {
    const COUNT: u64 = 1_000;
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    let shared = |mode: SubscriptionMode| v1::SubscriptionSpec {
        mode: mode.into(),
        deliveries_max: Some(3),
        ..Default::default()
    };
    let subscriptions = [("s", shared(SubscriptionMode::Shared)), ("x", v1::SubscriptionSpec::default())];
    declare(&running, v1::TopicSpec::default(), &subscriptions).await;
    for _ in 0..COUNT / 50 {
        publish(&running, (0..50).map(|_| message("1", 20_000)).collect()).await;
    }
    let channel = connect(running.client).await;
    // (a client's usual limit is 4 MiB: tonic's too)
    let mut subscriber = SubscriberClient::new(channel.clone());
    let mut seen = Vec::new();
    while seen.len() < COUNT as usize {
        let pull = v1::PullMessagesRequest {
            subscription: "s".into(),
            messages_max: Some(1_000),
            wait_ms: 30_000,
            ..Default::default()
        };
        let messages = subscriber.pull(pull).await.unwrap().into_inner().messages;
        assert!(!messages.is_empty(), "{} of {COUNT}", seen.len());
        seen.extend(messages.iter().map(|m| (m.offset, m.delivery)));
    }
    assert_eq!(seen, all_first(COUNT));
    for (messages, subscription) in [(true, "s"), (false, "x"), (true, "x")] {
        if subscription == "s" {
            let nacked = v1::Nacked { start: 0, end: COUNT, delay_ms: None, uncounted: true };
            let nack = v1::NackRequest { subscription: "s".into(), offsets: vec![nacked], ..Default::default() };
            subscriber.nack(nack).await.unwrap();
        }
        let open =
            v1::PullOpen { subscription: subscription.into(), member: "m".into(), messages, ..Default::default() };
        let first = v1::PullRequest { open: Some(open), credit_messages: 2_000, ..Default::default() };
        let requests = futures::stream::iter([first]).chain(futures::stream::pending());
        let mut responses = subscriber.streaming_pull(requests).await.unwrap().into_inner();
        let mut count = 0;
        while count < COUNT {
            let response = tokio::time::timeout(PATIENCE, responses.message()).await.unwrap().unwrap().unwrap();
            assert!(prost::Message::encoded_len(&response) < USUAL_BYTES_MAX);
            count += response.messages.len() as u64 + response.until_offset - response.from_offset;
        }
    }
    let mut log = LogClient::new(channel);
    let fetch = v1::FetchRequest { topic: "t".into(), bytes_max: Some(u32::MAX), ..Default::default() };
    let fetched = log.fetch(fetch.clone()).await.unwrap().into_inner();
    let bytes = prost::Message::encoded_len(&fetched);
    assert!((2 << 20..=3 << 20).contains(&bytes), "{bytes}");
    let mut stream = log.fetch_stream(fetch).await.unwrap().into_inner();
    let mut next = 0;
    while next < COUNT {
        for batch in stream.message().await.unwrap().unwrap().batches {
            assert_eq!(batch.base_offset, next);
            next += u64::from(batch.count);
        }
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_larger_than_an_answer_is_an_answer_alone() {
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    let shared = v1::SubscriptionSpec { mode: SubscriptionMode::Shared.into(), ..Default::default() };
    let topic = v1::TopicSpec { message_bytes_max: Some(8 << 20), ..Default::default() };
    declare(&running, topic, &[("s", shared)]).await;
    let mut publisher = PublisherClient::new(connect(running.client).await);
    for size in [10, 5 << 20, 10, 10] {
        let messages = vec![message(vec![1; size], 0)];
        let request = v1::PublishRequest { topic: "t".into(), partition: Some(0), messages, ..Default::default() };
        publisher.publish(request).await.unwrap();
    }
    let mut subscriber = SubscriberClient::new(connect(running.client).await).max_decoding_message_size(8 << 20);
    let mut counts = Vec::new();
    while counts.iter().sum::<usize>() < 4 {
        let pull = v1::PullMessagesRequest { subscription: "s".into(), wait_ms: 30_000, ..Default::default() };
        counts.push(subscriber.pull(pull).await.unwrap().into_inner().messages.len());
    }
    assert_eq!(counts, [1, 1, 2]);
    running.stop().await;
}

/// What is logged by this process.
fn logs() -> std::sync::Arc<std::sync::Mutex<Vec<u8>>> {
    #[derive(Clone, Default)]
    struct Kept(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let kept = Kept::default();
    let writer = kept.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    kept.0
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_without_a_topic_are_counted_one_by_one_and_logged_once_a_minute() {
    const COUNT: u64 = 20;
    let logs = logs();
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    let spec = v1::SubscriptionSpec {
        mode: SubscriptionMode::Shared.into(),
        deliveries_max: Some(1),
        dead_letter_topic: "nowhere".into(),
        ..Default::default()
    };
    declare(&running, v1::TopicSpec::default(), &[("s", spec)]).await;
    publish(&running, (0..COUNT).map(|at| message(at.to_string(), 0)).collect()).await;
    let (requests, mut responses) = open(connect(running.client).await, COUNT as u32).await;
    assert_eq!(take(&mut responses, COUNT as usize).await, all_first(COUNT));
    let failed = v1::Nacked { start: 0, end: COUNT, ..Default::default() };
    requests.send(v1::PullRequest { nacks: vec![failed], ..Default::default() }).await.unwrap();
    let begun = Instant::now();
    loop {
        let text = http_get(running.metrics, "/metrics").await;
        let line = text.lines().find(|l| l.starts_with("weir_dead_letters_total") && l.contains("failed"));
        if line.is_some_and(|l| l.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >= 2 * COUNT) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "each is tried again: {line:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let text = String::from_utf8(logs.lock().unwrap().clone()).unwrap();
    let said: Vec<&str> = text.lines().filter(|l| l.contains("a dead letter could not be moved")).collect();
    // once a minute: as often as the tries took minutes
    assert!(said.len() as u64 <= 1 + begun.elapsed().as_secs() / 60, "{said:#?}");
    assert!(said[0].contains("default/s") && said[0].contains("default/nowhere"), "{said:#?}");
}

/// Gives a message of `s` back as if it were a dead letter, and says why it may not.
async fn refused_give_back(running: &Running, offset: u64) -> String {
    let mut subscriber = SubscriberClient::new(connect(running.client).await);
    let request = v1::AcknowledgeWithPublishRequest {
        subscription: "s".into(),
        topic: "t".into(),
        offset,
        give_back: true,
        ..Default::default()
    };
    let status = subscriber.acknowledge_with_publish(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status:?}");
    status.message().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_the_headers_of_a_dead_letter_is_published_nowhere_unless_it_is_one() {
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    let shared = v1::SubscriptionSpec { mode: SubscriptionMode::Shared.into(), ..Default::default() };
    // `other` does have its dead letters in a topic, but not in this one
    let other = v1::SubscriptionSpec { dead_letter_topic: "dead".into(), ..shared.clone() };
    declare(&running, v1::TopicSpec::default(), &[("s", shared), ("other", other)]).await;
    // the topic of what is scheduled is internal
    let mut later = message("later", 0);
    let mut publisher = PublisherClient::new(connect(running.client).await);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    later.deliver_at_ms = Some(now.as_millis() as u64 + 86_400_000);
    let request = v1::PublishRequest { topic: "t".into(), messages: vec![later], ..Default::default() };
    publisher.publish(request).await.unwrap();
    let mut metadata = v1::metadata_client::MetadataClient::new(connect(running.client).await);
    let known = metadata.get(v1::GetMetadataRequest::default()).await.unwrap().into_inner();
    let internal = known.topics.iter().find(|t| t.name.starts_with("weir-system/")).expect("it is listed").name.clone();
    let forged = |topic: &str, subscription: &str| {
        let header = |name: &str, value: &str| v1::Header { name: name.into(), value: Some(value.to_owned().into()) };
        let headers = vec![header("weir-dead-topic", topic), header("weir-dead-subscription", subscription)];
        v1::Message { value: Some("forged".into()), headers, ..Default::default() }
    };
    let named =
        [(&*internal, "nobody"), (&*internal, "default/s"), ("default/t", "default/s"), ("default/t", "default/other")];
    publish(&running, named.iter().map(|(topic, subscription)| forged(topic, subscription)).collect()).await;
    let (_requests, mut responses) = open(connect(running.client).await, named.len() as u32).await;
    let taken = take(&mut responses, named.len()).await;
    for (offset, _) in taken {
        let why = refused_give_back(&running, offset).await;
        assert!(why.contains("no dead letters here"), "{why}");
    }
}

async fn http_get(from: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = TcpStream::connect(from).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}
