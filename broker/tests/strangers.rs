//! What strangers send: forged peers, frames that are too large, bytes that are no messages. Each is refused, nothing changes, and
//! the broker serves on.

use bytes::{Buf, BufMut, Bytes};
use clap::Parser as _;
use std::time::Duration;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use weir_broker::Running;
use weir_broker::config::Config;
use weir_proto::v1;

async fn broker(data: &std::path::Path) -> Running {
    let mut arguments = vec!["weir-broker".to_owned(), format!("--data={}", data.display())];
    for listener in ["client", "peer", "admin", "metrics"] {
        arguments.push(format!("--{listener}-listen=127.0.0.1:0"));
    }
    let running = weir_broker::start(Config::parse_from(arguments)).await.unwrap();
    running.ready().await;
    running
}

async fn connect(to: std::net::SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{to}")).unwrap().connect().await.unwrap()
}

async fn make_topic(running: &Running) {
    let spec = v1::TopicSpec { partitions: 1, replicas: 1, ..Default::default() };
    let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
    let mut admin = v1::admin_client::AdminClient::new(connect(running.admin).await);
    admin.apply_topic(request).await.unwrap();
}

/// The partition's status once it has a leader.
async fn status(metadata: &mut v1::metadata_client::MetadataClient<Channel>) -> v1::PartitionStatus {
    for _ in 0..200 {
        let described = metadata.describe(v1::DescribeRequest::default()).await.unwrap().into_inner();
        if let Some(status) = described.partitions.into_iter().find(|p| p.topic == "default/t") {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the partition has no leader");
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
        hello: Some(v1::PeerHello { cluster_id: cluster_id.to_owned(), broker_id, to_broker_id }),
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
    let message = v1::Message { value: "x".into(), ..Default::default() };
    let request = v1::PublishRequest { topic: "t".into(), partition: Some(0), messages: vec![message], producer: None };
    let mut publisher = v1::publisher_client::PublisherClient::new(channel);
    assert_eq!(publisher.publish(request).await.unwrap().into_inner().base_offset, after.high_watermark);
    running.stop().await;
}

/// A counter of refusals.
async fn refused(running: &Running, reason: &str) -> u64 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(running.metrics).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find(|l| l.starts_with(&format!("weir_rejected_total{{reason=\"{reason}\"}}")));
    line.map_or(0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
}

fn publish(value: impl Into<Bytes>) -> v1::PublishRequest {
    let message = v1::Message { value: value.into(), ..Default::default() };
    v1::PublishRequest { topic: "t".into(), partition: Some(0), messages: vec![message], producer: None }
}

async fn subscribe(running: &Running, ack_deadline_ms: u64) {
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
    subscribe(&running, 1_000).await;
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
    let (mut seen, begun) = (std::collections::BTreeSet::new(), std::time::Instant::now());
    while seen.len() < 60 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} of 60", seen.len());
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
    let spec = v1::TopicSpec { partitions: 1, replicas: 1, retention_bytes: 1 << 20, ..Default::default() };
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
    let begun = std::time::Instant::now();
    let start = loop {
        let start = status(&mut metadata).await.start_offset;
        if start > 0 {
            break start;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "retention took nothing");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let mut log = v1::log_client::LogClient::new(channel.clone());
    let fetch = v1::FetchRequest { topic: "t".into(), offset: 0, ..Default::default() };
    let status = log.fetch(fetch).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains(&format!("{start} to 50")), "{}", status.message());
    // 257 MiB in some kilobytes: stored as it is, and unfolded by nobody
    subscribe(&running, 0).await;
    let record = weir_proto::records::Record { value: Some(vec![0; 257 << 20].into()), ..Default::default() };
    let bomb = weir_proto::records::encode(&[record], weir_proto::records::Compression::Zstd, None).unwrap();
    assert!(bomb.len() < 1 << 20);
    let batch = v1::PublishBatch { id: 1, topic: "t".into(), partition: 0, batch: bomb };
    let mut acks = publisher.publish_stream(futures::stream::iter([batch])).await.unwrap().into_inner();
    assert!(acks.message().await.unwrap().unwrap().outcome.is_some());
    publisher.publish(publish("after it")).await.unwrap();
    let mut subscriber = v1::subscriber_client::SubscriberClient::new(channel).max_decoding_message_size(64 << 20);
    let begun = std::time::Instant::now();
    loop {
        assert!(begun.elapsed() < Duration::from_secs(30), "what follows the bomb never comes");
        let pull = v1::PullMessagesRequest {
            subscription: "s".into(),
            partition: Some(0),
            wait_ms: 500,
            ..Default::default()
        };
        let messages = subscriber.pull(pull).await.unwrap().into_inner().messages;
        if messages.iter().any(|m| m.message.as_ref().is_some_and(|m| m.value == "after it")) {
            break;
        }
    }
    assert_eq!(refused(&running, "UNREADABLE").await, 1);
    running.stop().await;
}
