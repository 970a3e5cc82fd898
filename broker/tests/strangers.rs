//! What strangers send: forged peers, frames that are too large, bytes that are no messages. Each is refused, nothing changes, and
//! the broker serves on.

mod node;

use bytes::{Buf, BufMut, Bytes};
use node::{broker, connect};
use std::time::{Duration, Instant};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use weir_broker::Running;
use weir_proto::v1;

/// What takes moments takes no longer.
const PATIENCE: Duration = Duration::from_secs(120);

async fn make_topic(running: &Running) {
    let spec = v1::TopicSpec { partitions: 1, replicas: 1, ..Default::default() };
    let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
    let mut admin = v1::admin_client::AdminClient::new(connect(running.admin).await);
    admin.apply_topic(request).await.unwrap();
}

/// The partition's status once it has a leader.
async fn status(metadata: &mut v1::metadata_client::MetadataClient<Channel>) -> v1::PartitionStatus {
    let begun = Instant::now();
    loop {
        let described = metadata.describe(v1::DescribeRequest::default()).await.unwrap().into_inner();
        if let Some(status) = described.partitions.into_iter().find(|p| p.topic == "default/t") {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "the partition has no leader");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn forged_peer_messages_change_nothing() {
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    make_topic(&running).await;
    let mut metadata = v1::metadata_client::MetadataClient::new(connect(running.client).await);
    let cluster = metadata.get(v1::GetMetadataRequest::default()).await.unwrap().into_inner();
    let before = status(&mut metadata).await;
    let replica = before.group + 1; // ids are given one after the other
    let hello = |cluster_id: &str, broker_id, to_broker_id| v1::PeerFrame {
        hello: Some(v1::PeerHello { cluster_id: cluster_id.to_owned(), broker_id, to_broker_id, incarnation: 0 }),
        ..Default::default()
    };
    // a vote in a giant term, an append of a later one, and "the leader has told you to stand"
    let forged = |kind: u32, term: u64| v1::RaftMessage {
        group: before.group,
        kind,
        to: replica,
        from: replica + 1,
        term,
        ..Default::default()
    };
    let messages = v1::PeerFrame {
        raft: vec![
            forged(5, u64::MAX),
            forged(3, before.term + 1),
            forged(14, before.term),
            forged(8, before.term + 9),
        ],
        ..Default::default()
    };
    let cases = [
        (hello("another", 7, 1), "NOT_A_PEER"),
        (hello(&cluster.cluster_id, 0, 1), "NOT_A_PEER"),
        (hello(&cluster.cluster_id, 1, 1), "NOT_A_PEER"),
        (hello(&cluster.cluster_id, 7, 2), "OTHER_BROKER"),
        (hello(&cluster.cluster_id, 1 << 40, 1), "NOT_A_MEMBER"),
        (v1::PeerFrame::default(), "HELLO"),
    ];
    let mut peer = v1::peer_client::PeerClient::new(connect(running.peer).await);
    for (hello, reason) in cases {
        let frames = futures::stream::iter([hello, messages.clone()]);
        let refused = peer.exchange(frames).await.unwrap_err();
        use tonic_types::StatusExt as _;
        assert_eq!(refused.get_details_error_info().unwrap().reason, reason, "{}", refused.message());
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let after = status(&mut metadata).await;
    assert_eq!(after.term, before.term);
    running.stop().await;
}

#[tokio::test]
async fn forged_calls_to_the_peer_port_change_nothing() {
    use tonic_types::StatusExt as _;
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    make_topic(&running).await;
    let mut metadata = v1::metadata_client::MetadataClient::new(connect(running.client).await);
    let get = v1::GetMetadataRequest::default();
    let before = metadata.get(get.clone()).await.unwrap().into_inner();
    let log = status(&mut metadata).await;
    let cluster = before.cluster_id.as_str();
    let hello = |cluster_id: &str, broker_id, to_broker_id| {
        Some(v1::PeerHello { cluster_id: cluster_id.to_owned(), broker_id, to_broker_id, incarnation: 0 })
    };
    let cases = [
        (None, "HELLO"),
        (hello("another", 7, 1), "NOT_A_PEER"),
        (hello(cluster, 0, 1), "NOT_A_PEER"),
        (hello(cluster, 1, 1), "NOT_A_PEER"),
        (hello(cluster, 7, 2), "OTHER_BROKER"),
        (hello(cluster, 1 << 40, 1), "NOT_A_MEMBER"),
    ];
    let mut peer = v1::peer_client::PeerClient::new(connect(running.peer).await);
    let record = weir_proto::records::Record { value: Some("forged".into()), ..Default::default() };
    let batch = weir_proto::records::encode(&[record], weir_proto::records::Compression::None, None).unwrap();
    let reason = |status: Status| status.get_details_error_info().map_or(status.to_string(), |info| info.reason);
    let mut requester = v1::requester_client::RequesterClient::new(connect(running.client).await);
    let mut answers = requester.inbox(v1::InboxRequest {}).await.unwrap().into_inner();
    let inbox = answers.message().await.unwrap().unwrap().address;
    let answer = Some(v1::Message { value: Some("forged".into()), ..Default::default() });
    for (hello, wanted) in cases {
        // `AllocateProducers(1)`, as the core encodes it
        let command = Bytes::from_static(&[80, 1]);
        let propose = v1::ProposeRequest { command, hello: hello.clone() };
        assert_eq!(reason(peer.propose(propose).await.unwrap_err()), wanted);
        let (topic, partition, batch) = ("t".to_owned(), 0, batch.clone());
        let forward = v1::ForwardRequest { hello: hello.clone(), topic, partition, batch, carried: true };
        assert_eq!(reason(peer.forward(forward).await.unwrap_err()), wanted);
        let reply = v1::PassReplyRequest { hello: hello.clone(), address: inbox.clone(), message: answer.clone() };
        assert_eq!(reason(peer.pass_reply(reply).await.unwrap_err()), wanted);
        if hello.is_some() {
            let cluster_id = cluster.to_owned();
            let join = v1::JoinRequest { passed_on: hello, cluster_id, ..Default::default() };
            assert_eq!(reason(peer.join(join).await.unwrap_err()), wanted);
        }
    }
    // plans to form a cluster, of another one and of this one, which is formed
    let refusal = |status: Status| {
        let code = status.code();
        (code, reason(status))
    };
    let plan = |cluster_id: &str| v1::FormRequest { cluster_id: cluster_id.to_owned(), ..Default::default() };
    let long = "c".repeat(3 << 20);
    for foreign in ["another", "", &long] {
        let wanted = (Code::PermissionDenied, "NOT_A_PEER".to_owned());
        assert_eq!(refusal(peer.prepare(plan(foreign)).await.unwrap_err()), wanted);
        assert_eq!(refusal(peer.activate(plan(foreign)).await.unwrap_err()), wanted);
    }
    let formed = (Code::FailedPrecondition, "FORMED".to_owned());
    assert_eq!(refusal(peer.prepare(plan(cluster)).await.unwrap_err()), formed);
    peer.activate(plan(cluster)).await.expect("it is active, as it is asked to be");
    // nobody of that name answers there; at this broker's own address one does, but it is a member
    for (name, cluster_id, peer_address) in [
        ("weir-0", "another", running.peer.to_string()),
        ("weir-0", cluster, "127.0.0.1:1".to_owned()),
        ("weir-0", cluster, running.peer.to_string()),
        ("somebody", cluster, running.peer.to_string()),
    ] {
        let (name, cluster_id) = (name.to_owned(), cluster_id.to_owned());
        let join = v1::JoinRequest { name, cluster_id, peer_address, ..Default::default() };
        assert_eq!(reason(peer.join(join).await.unwrap_err()), "NOT_A_PEER");
    }
    // what comes into the inbox is what a client answers
    let genuine = Some(v1::Message { value: Some("genuine".into()), ..Default::default() });
    requester.reply(v1::ReplyRequest { address: inbox, message: genuine.clone() }).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().message, genuine);
    let after = metadata.get(get).await.unwrap().into_inner();
    assert_eq!((after.version, after.brokers), (before.version, before.brokers));
    assert_eq!(status(&mut metadata).await.high_watermark, log.high_watermark);
    running.stop().await;
}

/// Whoever reaches the peer port can say that it is a member: it may do no more than an administrator could.
#[tokio::test]
async fn forged_commands_of_a_member_are_refused() {
    use prost::Message as _;
    use tonic_types::StatusExt as _;
    use weir_core::meta::command::{Command, Kind, Reassign, SetIncarnation, SetPhase, Settled};
    use weir_core::meta::state::Broker;
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    make_topic(&running).await;
    let mut admin = v1::admin_client::AdminClient::new(connect(running.admin).await);
    let member = admin.add_broker(v1::AddBrokerRequest { name: "b-9".into() }).await.unwrap().into_inner().id;
    let mut metadata = v1::metadata_client::MetadataClient::new(connect(running.client).await);
    let before = metadata.get(v1::GetMetadataRequest::default()).await.unwrap().into_inner();
    let group = status(&mut metadata).await.group;
    let mut peer = v1::peer_client::PeerClient::new(connect(running.peer).await);
    let me = &before.brokers[0];
    for (kind, wanted) in [
        (Kind::Register(Broker { name: me.name.clone(), ..Default::default() }), "COMMAND"),
        (Kind::SetIncarnation(SetIncarnation { broker: me.id, incarnation: u64::MAX }), "COMMAND"),
        (Kind::Reassign(Reassign { group, brokers: vec![member], ..Default::default() }), "COMMAND"),
        (Kind::Settled(Settled { group, epoch: 0 }), "COMMAND"),
        (Kind::AllocateProducers(u32::MAX), "COUNT"),
        (Kind::Expect(Broker::default()), "NAME"),
        (Kind::SetPhase(SetPhase { broker: me.id, phase: 2, removed: false }), "INVALID"),
        (Kind::SetPhase(SetPhase { broker: me.id, phase: 0, removed: true }), "INVALID"),
    ] {
        let (cluster_id, to_broker_id) = (before.cluster_id.clone(), me.id);
        let hello = Some(v1::PeerHello { cluster_id, broker_id: member, to_broker_id, incarnation: 0 });
        let command = Command::from(kind.clone()).encode_to_vec().into();
        let refused = peer.propose(v1::ProposeRequest { command, hello }).await.unwrap_err();
        assert_eq!(refused.get_details_error_info().unwrap().reason, wanted, "{kind:?} {}", refused.message());
    }
    // a stream has one hello
    let hello =
        v1::PeerHello { cluster_id: before.cluster_id.clone(), broker_id: member, to_broker_id: me.id, incarnation: 0 };
    let frame = v1::PeerFrame { hello: Some(hello), ..Default::default() };
    let refused = peer.exchange(futures::stream::iter([frame.clone(), frame])).await.unwrap_err();
    assert_eq!(refused.get_details_error_info().unwrap().reason, "HELLO", "{}", refused.message());
    let after = metadata.get(v1::GetMetadataRequest::default()).await.unwrap().into_inner();
    assert_eq!((after.brokers, after.topics), (before.brokers, before.topics));
    running.stop().await;
}

/// Sends bytes as they are.
#[derive(Clone, Default)]
struct Raw;

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

async fn send_raw(channel: &Channel, path: &'static str, bytes: impl Into<Bytes>) -> Code {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(path);
    match client.unary(Request::new(bytes.into()), path, Raw).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn garbage_and_frames_that_are_too_large_are_refused_and_the_connection_lives() {
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    make_topic(&running).await;
    let channel = connect(running.client).await;
    let mut metadata = v1::metadata_client::MetadataClient::new(channel.clone());
    let before = status(&mut metadata).await;
    const PUBLISH: &str = "/weir.v1.Publisher/Publish";
    let cases: [(&str, Vec<u8>); 5] = [
        ("cut short", vec![0x0a, 0xff]),
        ("a wire type there is not", vec![0x0f; 40]),
        ("groups within groups", vec![0x7b; 200_000]),
        ("a length beyond all", vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        ("text that is none", vec![0x0a, 0x02, 0xff, 0xfe]),
    ];
    for (what, bytes) in cases {
        let code = send_raw(&channel, PUBLISH, bytes).await;
        assert!(matches!(code, Code::Internal | Code::InvalidArgument), "{what}: {code:?}");
    }
    let code = send_raw(&channel, PUBLISH, vec![0; weir_proto::MESSAGE_BYTES_MAX + 1]).await;
    assert!(matches!(code, Code::OutOfRange | Code::ResourceExhausted), "{code:?}");
    assert_eq!(send_raw(&channel, "/weir.v1.Publisher/Nothing", Vec::new()).await, Code::Unimplemented);
    // the same connection goes on, and nothing was stored
    let after = status(&mut metadata).await;
    assert_eq!(after.high_watermark, before.high_watermark);
    let message = v1::Message { value: Some("x".into()), ..Default::default() };
    let request =
        v1::PublishRequest { topic: "t".into(), partition: Some(0), messages: vec![message], ..Default::default() };
    let mut publisher = v1::publisher_client::PublisherClient::new(channel);
    assert_eq!(publisher.publish(request).await.unwrap().into_inner().base_offset, after.high_watermark);
    running.stop().await;
}

/// A counter of refusals.
async fn refused(running: &Running, reason: &str) -> u64 {
    count(running, &format!("weir_rejected_total{{reason=\"{reason}\"}}")).await
}

/// A metric.
async fn count(running: &Running, name: &str) -> u64 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(running.metrics).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    line.map_or(0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
}

fn publish(value: impl Into<Bytes>) -> v1::PublishRequest {
    let message = v1::Message { value: Some(value.into()), ..Default::default() };
    v1::PublishRequest { topic: "t".into(), partition: Some(0), messages: vec![message], ..Default::default() }
}

async fn subscribe(running: &Running, ack_deadline_ms: Option<u64>) {
    let spec = v1::SubscriptionSpec {
        topic: "t".into(),
        from_earliest: true,
        mode: v1::SubscriptionMode::Shared.into(),
        ack_deadline_ms,
        ..Default::default()
    };
    let request = v1::ApplySubscriptionRequest { name: "s".into(), spec: Some(spec), ..Default::default() };
    let mut admin = v1::admin_client::AdminClient::new(connect(running.admin).await);
    admin.apply_subscription(request).await.unwrap();
}

#[tokio::test]
async fn a_member_that_never_reads_is_dropped_and_another_gets_everything() {
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    make_topic(&running).await;
    subscribe(&running, Some(1_000)).await;
    let channel = connect(running.client).await;
    let mut publisher = v1::publisher_client::PublisherClient::new(channel.clone());
    for _ in 0..60 {
        publisher.publish(publish(vec![7; 200_000])).await.unwrap();
    }
    let open = v1::PullOpen {
        subscription: "s".into(),
        partition: 0,
        member: "sleeper".into(),
        messages: true,
        ..Default::default()
    };
    let first = v1::PullRequest { open: Some(open), credit_messages: 10_000, ..Default::default() };
    let requests = futures::StreamExt::chain(futures::stream::iter([first]), futures::stream::pending());
    let mut sleeper = v1::subscriber_client::SubscriberClient::new(connect(running.client).await);
    let _unread = sleeper.streaming_pull(requests).await.unwrap();
    let mut other = v1::subscriber_client::SubscriberClient::new(channel).max_decoding_message_size(64 << 20);
    let (mut seen, begun) = (std::collections::BTreeSet::new(), Instant::now());
    while seen.len() < 60 {
        assert!(begun.elapsed() < PATIENCE, "{} of 60", seen.len());
        let pull = v1::PullMessagesRequest {
            subscription: "s".into(),
            partition: Some(0),
            member: "worker".into(),
            wait_ms: 500,
            ..Default::default()
        };
        for message in other.pull(pull).await.unwrap().into_inner().messages {
            let offsets = vec![v1::OffsetRange { start: message.offset, end: message.offset + 1 }];
            let acknowledge =
                v1::AcknowledgeRequest { subscription: "s".into(), partition: 0, offsets, ..Default::default() };
            if other.acknowledge(acknowledge).await.unwrap().into_inner().acknowledged == 1 {
                seen.insert(message.offset);
            }
        }
    }
    assert_eq!(refused(&running, "READS_NOTHING").await, 1);
    running.stop().await;
}

#[tokio::test]
async fn an_offset_that_retention_took_is_refused_with_both_bounds_and_a_bomb_with_its_batch() {
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    let spec = v1::TopicSpec { partitions: 1, replicas: 1, retention_bytes: Some(1 << 20), ..Default::default() };
    let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
    let mut admin = v1::admin_client::AdminClient::new(connect(running.admin).await);
    admin.apply_topic(request).await.unwrap();
    let channel = connect(running.client).await;
    let mut metadata = v1::metadata_client::MetadataClient::new(channel.clone());
    status(&mut metadata).await;
    let mut publisher = v1::publisher_client::PublisherClient::new(channel.clone());
    for _ in 0..50 {
        publisher.publish(publish(vec![7; 900_000])).await.unwrap();
    }
    let begun = Instant::now();
    let start = loop {
        let start = status(&mut metadata).await.start_offset;
        if start > 0 {
            break start;
        }
        assert!(begun.elapsed() < PATIENCE, "retention took nothing");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let mut log = v1::log_client::LogClient::new(channel.clone());
    let fetch = v1::FetchRequest { topic: "t".into(), offset: 0, ..Default::default() };
    let status = log.fetch(fetch).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains(&format!("{start} to 50")), "{}", status.message());
    // 33 MiB in some kilobytes cannot be delivered, and are refused
    subscribe(&running, None).await;
    use weir_proto::records::Compression;
    let record = weir_proto::records::Record { value: Some(vec![0; 33 << 20].into()), ..Default::default() };
    let bomb = |compression| weir_proto::records::encode(std::slice::from_ref(&record), compression, None).unwrap();
    let mut bombs: Vec<Bytes> = [Compression::Gzip, Compression::Lz4, Compression::Zstd].map(bomb).into();
    // one that says it holds 1 KiB is stored, as every batch that cannot be decoded, and unfolded by nobody
    let mut lie = bombs[0].to_vec();
    let end = lie.len();
    lie[end - 4..].copy_from_slice(&1024u32.to_le_bytes());
    weir_proto::records::seal(&mut lie);
    bombs.push(lie.into());
    assert!(bombs.iter().all(|bomb| bomb.len() < 1 << 20));
    let batch = |(id, batch)| v1::PublishBatch { id, topic: "t".into(), partition: 0, batch, ..Default::default() };
    let batches: Vec<_> = (1..).zip(bombs).map(batch).collect();
    let mut acks = publisher.publish_stream(futures::stream::iter(batches)).await.unwrap().into_inner();
    let mut outcomes = std::collections::BTreeMap::new();
    for _ in 0..4 {
        let ack = acks.message().await.unwrap().unwrap();
        let reason = match ack.outcome.unwrap() {
            v1::publish_ack::Outcome::Error(error) => error.reason,
            v1::publish_ack::Outcome::BaseOffset(_) => "stored".to_owned(),
        };
        outcomes.insert(ack.id, reason);
    }
    assert_eq!(outcomes.into_values().collect::<Vec<_>>(), ["TOO_LARGE", "TOO_LARGE", "TOO_LARGE", "stored"]);
    publisher.publish(publish("after it")).await.unwrap();
    let mut subscriber = v1::subscriber_client::SubscriberClient::new(channel).max_decoding_message_size(64 << 20);
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "what follows the bomb never comes");
        let pull = v1::PullMessagesRequest {
            subscription: "s".into(),
            partition: Some(0),
            wait_ms: 500,
            ..Default::default()
        };
        let messages = subscriber.pull(pull).await.unwrap().into_inner().messages;
        if messages.iter().any(|m| m.message.as_ref().is_some_and(|m| m.value.as_deref() == Some(b"after it"))) {
            break;
        }
    }
    assert_eq!(count(&running, "weir_undecodable_batches_total{outcome=\"skipped\"}").await, 1);
    running.stop().await;
}

#[tokio::test]
async fn a_second_open_and_texts_and_tokens_that_are_too_long_are_refused() {
    use tonic_types::StatusExt as _;
    let data = tempfile::tempdir().unwrap();
    let running = broker(data.path()).await;
    make_topic(&running).await;
    subscribe(&running, None).await;
    let channel = connect(running.client).await;
    let mut metadata = v1::metadata_client::MetadataClient::new(channel.clone());
    status(&mut metadata).await;
    let refusal = |status: Status| {
        assert!(status.message().len() <= 1_027, "{} bytes", status.message().len());
        (status.code(), status.get_details_error_info().map_or(status.to_string(), |info| info.reason))
    };
    let invalid = |reason: &str| (Code::InvalidArgument, reason.to_owned());
    let long = "x".repeat(3 << 20);
    for token in [format!("topic {long}"), format!("subscription {long}"), long.clone(), " ".repeat(3 << 20)] {
        let get = v1::GetMetadataRequest { page_token: token.clone(), ..Default::default() };
        assert_eq!(refusal(metadata.get(get).await.unwrap_err()), invalid("PAGE_TOKEN"));
        let describe = v1::DescribeRequest { page_token: token, ..Default::default() };
        assert_eq!(refusal(metadata.describe(describe).await.unwrap_err()), invalid("PAGE_TOKEN"));
    }
    let topics = vec!["t".to_owned(); 100_001];
    let get = v1::GetMetadataRequest { topics: topics.clone(), ..Default::default() };
    assert_eq!(refusal(metadata.get(get).await.unwrap_err()), invalid("TOPICS"));
    let describe = v1::DescribeRequest { topics, ..Default::default() };
    assert_eq!(refusal(metadata.describe(describe).await.unwrap_err()), invalid("TOPICS"));

    let mut subscriber = v1::subscriber_client::SubscriberClient::new(channel.clone());
    let open = |member: &str| v1::PullRequest {
        open: Some(v1::PullOpen { subscription: "s".into(), member: member.to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let streamed = async |requests: Vec<v1::PullRequest>| {
        let requests = futures::StreamExt::chain(futures::stream::iter(requests), futures::stream::pending());
        let mut subscriber = v1::subscriber_client::SubscriberClient::new(connect(running.client).await);
        let status = match subscriber.streaming_pull(requests).await {
            Ok(mut stream) => loop {
                let next = stream.get_mut().message();
                let next = tokio::time::timeout(Duration::from_secs(30), next).await;
                match next.expect("the stream ends") {
                    Ok(answer) => assert!(answer.is_some(), "a stream that ends without a reason"),
                    Err(status) => break status,
                }
            },
            Err(status) => status,
        };
        refusal(status)
    };
    let unreadable = |count: usize, end| {
        let unreadable = vec![v1::OffsetRange { start: 0, end }; count];
        v1::PullRequest { unreadable, ..Default::default() }
    };
    assert_eq!(streamed(vec![open("m"), open("m")]).await, invalid("OPEN"));
    assert_eq!(streamed(vec![open("m"), open("another")]).await, invalid("OPEN"));
    assert_eq!(streamed(vec![open("m"), unreadable(100_001, 1)]).await, invalid("RANGES"));
    assert_eq!(streamed(vec![open("m"), unreadable(1, 0)]).await, invalid("OFFSETS"));
    assert_eq!(streamed(vec![open(&long)]).await, invalid("MEMBER"));
    let pull = v1::PullMessagesRequest { subscription: "s".into(), member: long.clone(), ..Default::default() };
    assert_eq!(refusal(subscriber.pull(pull).await.unwrap_err()), invalid("MEMBER"));
    let to = Some(v1::seek_request::To::Snapshot(long.clone()));
    let seek = v1::SeekRequest { subscription: "s".into(), to, ..Default::default() };
    assert_eq!(refusal(subscriber.seek(seek).await.unwrap_err()), invalid("NAME"));

    let mut requester = v1::requester_client::RequesterClient::new(channel.clone());
    let message = Some(v1::Message::default());
    let reply = v1::ReplyRequest { address: format!("1/{long}"), message };
    assert_eq!(refusal(requester.reply(reply).await.unwrap_err()), invalid("ADDRESS"));
    let mut admin = v1::admin_client::AdminClient::new(connect(running.admin).await);
    let delete = v1::DeleteRequest { name: "t".into(), owner_uid: long.clone(), ..Default::default() };
    assert_eq!(refusal(admin.delete_topic(delete.clone()).await.unwrap_err()), invalid("OWNER_UID"));
    assert_eq!(refusal(admin.delete_subscription(delete).await.unwrap_err()), invalid("OWNER_UID"));

    // on a stream of batches the refusal is an answer; its text is as short
    let topic = format!("weir-system/{long}");
    let batch = v1::PublishBatch { id: 7, topic, ..Default::default() };
    let mut publisher = v1::publisher_client::PublisherClient::new(channel);
    let mut acks = publisher.publish_stream(futures::stream::iter([batch])).await.unwrap().into_inner();
    let ack = acks.message().await.unwrap().unwrap();
    let Some(v1::publish_ack::Outcome::Error(error)) = ack.outcome else { panic!("{ack:?}") };
    assert_eq!((error.code, error.reason.as_str()), (Code::InvalidArgument as i32, "INTERNAL"));
    assert!(error.message.len() <= 1_027, "{} bytes", error.message.len());
    running.stop().await;
}
