//! Connections that say nothing, get no further or are too many are closed, and the others are served.

mod node;
mod process;

use process::{Broker, PATIENCE};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use weir_broker::Running;
use weir_broker::config::Config;
use weir_broker::guard::Deadlines;
use weir_proto::v1;

async fn connect(to: SocketAddr, from: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, from)), 0)).unwrap();
    socket.connect(to).await.unwrap()
}

/// Whether the other end has closed it by now.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0; 64])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

/// Waits until no more than so many of these are open.
async fn still_open(streams: &mut [TcpStream], most: usize) {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut open = 0;
        for stream in &mut *streams {
            open += usize::from(!is_closed(stream).await);
        }
        if open <= most {
            return;
        }
        assert!(Instant::now() < end, "{open} are open, not {most}");
    }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn too_many_connections_of_an_address_are_closed_and_others_served() {
    let data = tempfile::tempdir().unwrap();
    // none is closed because it is silent
    let deadlines = Deadlines { beginning: 10 * PATIENCE, ..Deadlines::default() };
    let config = Config { deadlines, ..node::config(data.path(), &["--connections-max=40"]) };
    let running = weir_broker::start(config).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(connect(running.client, 2).await);
    }
    still_open(&mut silent, 10).await; // a quarter of 40 from one address at most
    // another address is served
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", running.client)).unwrap();
    let mut client = v1::metadata_client::MetadataClient::connect(channel).await.unwrap();
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn silent_connections_are_closed_and_others_served() {
    let data = tempfile::tempdir().unwrap();
    let running = weir_broker::start(node::config(data.path(), &["--connections-max=40"])).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(connect(running.client, 2).await);
    }
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", running.client)).unwrap();
    let mut client = v1::metadata_client::MetadataClient::connect(channel).await.unwrap();
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    still_open(&mut silent, 0).await;
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    running.stop().await;
}

/// Connections to a port that say nothing more than the beginning of a request.
async fn idle(to: SocketAddr, count: usize, word: &[u8]) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for at in 0..count {
        let mut stream = connect(to, 10 + (at % 100) as u8).await;
        let _ = stream.write_all(word).await;
        open.push(stream);
    }
    open
}

async fn get(from: SocketAddr, path: &str) -> String {
    let mut stream = connect(from, 1).await;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).await;
    text
}

/// More connections than there are files: a broker in a process of its own that may open 1,024, its own soft limit lower still.
#[tokio::test]
async fn no_number_of_idle_connections_takes_a_brokers_files_or_its_time() {
    let data = tempfile::tempdir().unwrap();
    let mut program = std::process::Command::new("sh");
    program.args(["-c", "ulimit -Sn 600; ulimit -Hn 1024; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_weir-broker")]);
    let mut broker = Broker::start(program, data.path()).await;
    let Broker { client, peer, admin, metrics, .. } = broker;
    // in pieces, from more addresses than one, to each port
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut open = Vec::new();
    for (to, word) in [(client, &preface[..]), (peer, preface), (admin, preface), (metrics, b"GET /metrics HT")] {
        open.extend(idle(to, 400, word).await);
    }
    let id = broker.id();
    let files = || {
        let count = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
        assert!(count < 900, "the connections are not bounded: {count} files are open");
        count
    };
    until("the soft limit is raised", async || files() >= 300).await;
    assert!(broker.runs(), "it lives");
    // what stays silent on the metrics port has a deadline, after which others are served
    until("it is ready", async || files() > 0 && broker.is_ready().await).await;
    let counted = async || get(metrics, "/metrics").await.contains("weir_rejected_total{reason=\"CONNECTIONS\"}");
    until("refusals are counted", counted).await;
    drop(open);
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{client}")).unwrap();
    let is_served = async || match v1::metadata_client::MetadataClient::connect(channel.clone()).await {
        Ok(mut client) => client.get(v1::GetMetadataRequest::default()).await.is_ok(),
        Err(_) => false,
    };
    until("clients are served again", is_served).await;
}

/// What a client of HTTP/2 begins with: the preface and an empty SETTINGS frame.
const BEGINNING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Kinds of frames and flags.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame that announces `length` bytes and has these.
fn frame(length: usize, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (length as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// The headers of a call of `Metadata.Get`, by HPACK without its tables.
fn call(stream: u32) -> Vec<u8> {
    let mut headers = vec![0x83, 0x86]; // POST, http
    for (index, value) in
        [(&[0x04][..], "/weir.v1.Metadata/Get"), (&[0x01], "weir"), (&[0x0f, 0x10], "application/grpc")]
    {
        headers.extend(index);
        headers.push(value.len() as u8);
        headers.extend(value.as_bytes());
    }
    frame(headers.len(), HEADERS, END_HEADERS, stream, &headers)
}

/// A broker whose deadlines are short.
async fn hasty(data: &std::path::Path) -> Running {
    let ms = Duration::from_millis;
    let deadlines =
        Deadlines { beginning: ms(2_000), ping_after: ms(500), answer_within: ms(6_000), metrics: ms(6_000) };
    let running = weir_broker::start(Config { deadlines, ..node::config(data, &[]) }).await.unwrap();
    running.ready().await;
    running
}

/// Sends `first` and then pieces of `rest`, over and over, so far apart; reads everything and answers nothing. Ends when it is closed.
async fn trickle(to: SocketAddr, first: Vec<u8>, rest: Vec<Vec<u8>>, apart: Duration) {
    let (mut read, mut write) = connect(to, 1).await.into_split();
    let writing = async {
        let mut sent = write.write_all(&first).await;
        for piece in rest.iter().cycle() {
            tokio::time::sleep(apart).await;
            if sent.is_err() {
                break;
            }
            sent = write.write_all(piece).await;
        }
        std::future::pending::<()>().await;
    };
    let reading = async { while let Ok(1..) = read.read(&mut [0; 4096]).await {} };
    tokio::select! { () = writing => {}, () = reading => {} }
}

const PREFACE: &str = "the preface";

#[tokio::test(flavor = "multi_thread")]
async fn connections_whose_bytes_trickle_are_closed_wherever_they_are_and_others_served() {
    let data = tempfile::tempdir().unwrap();
    let running = hasty(data.path()).await;
    let single = |bytes: &[u8]| bytes.iter().map(|byte| vec![*byte]).collect::<Vec<_>>();
    let begun = |more: &[Vec<u8>]| [BEGINNING.to_vec(), more.concat()].concat();
    let silent = vec![Vec::new()];
    let mut cases = vec![
        ("the first frame, whose header is cut", running.client, BEGINNING[..30].to_vec(), silent.clone()),
        ("nothing more than the beginning", running.client, begun(&[]), silent),
        ("a frame of headers", running.client, begun(&[frame(16_000, HEADERS, END_HEADERS, 1, &[])]), single(&[0; 16])),
        (
            "headers in frames of a byte each",
            running.client,
            begun(&[frame(1, HEADERS, 0, 1, &[0x83])]),
            vec![frame(1, CONTINUATION, 0, 1, &[0x86])],
        ),
        ("a request", running.client, begun(&[call(1), frame(9_000, DATA, 0, 1, &[0])]), single(&[0; 16])),
        ("a request for metrics", running.metrics, b"GET /metrics HTTP/1.1\r\nx: ".to_vec(), single(b"y")),
        (
            "the body of such a request",
            running.metrics,
            b"POST / HTTP/1.1\r\ncontent-length: 999\r\n\r\n".to_vec(),
            single(b"y"),
        ),
    ];
    for to in [running.client, running.peer, running.admin] {
        cases.push((PREFACE, to, BEGINNING[..1].to_vec(), single(&BEGINNING[1..])));
    }
    let closed = cases.into_iter().map(async |(what, to, first, rest)| {
        // at this pace a preface takes longer than is waited for
        let apart = if what == PREFACE { Duration::from_secs(6) } else { Duration::from_millis(100) };
        let closed = tokio::time::timeout(PATIENCE, trickle(to, first, rest, apart)).await;
        assert!(closed.is_ok(), "{what} at {to} keeps a connection open");
    });
    futures::future::join_all(closed).await;
    // one that answers pings is kept, however long it asks nothing
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", running.client)).unwrap();
    let mut client = v1::metadata_client::MetadataClient::connect(channel).await.unwrap();
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    // with the one that asks
    until("the others are gone", async || open_connections(running.metrics).await == 2).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(open_connections(running.metrics).await, 2, "its connection is kept");
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    running.stop().await;
}

async fn open_connections(metrics: SocketAddr) -> usize {
    loop {
        let text = get(metrics, "/metrics").await; // empty where it took too long
        if let Some(line) = text.lines().find_map(|line| line.strip_prefix("weir_connections ")) {
            return line.parse().unwrap();
        }
    }
}

/// HTTP/2 cannot end such a connection: what says that it ends cannot be written either.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_client_neither_reads_nor_writes_is_closed() {
    let data = tempfile::tempdir().unwrap();
    let running = hasty(data.path()).await;
    let spec = v1::TopicSpec { partitions: 500, replicas: 1, ..Default::default() };
    let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
    let admin = tonic::transport::Endpoint::from_shared(format!("http://{}", running.admin)).unwrap();
    let mut admin = v1::admin_client::AdminClient::connect(admin).await.unwrap();
    admin.apply_topic(request).await.unwrap();
    drop(admin);
    let mut before = usize::MAX;
    while before > 1 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        before = open_connections(running.metrics).await; // the one that asks is counted
    }
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(running.client).await.unwrap();
    // windows as large as they can be, so that only the socket holds answers up
    let mut all = BEGINNING[..24].to_vec();
    all.extend(frame(6, 4, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]));
    all.extend(frame(4, WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()));
    for at in 0..1_000 {
        all.extend(call(2 * at + 1));
        all.extend(frame(5, DATA, END_STREAM, 2 * at + 1, &[0; 5]));
    }
    stream.write_all(&all).await.unwrap();
    let mut seen = false;
    let mut end = Instant::now() + PATIENCE;
    loop {
        let open = open_connections(running.metrics).await;
        if open > 1 && !seen {
            seen = true;
            end = Instant::now() + PATIENCE;
        }
        if seen && open == 1 {
            break;
        }
        assert!(Instant::now() < end, "{open} connections are open; it was seen: {seen}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // what was sent to it meanwhile was more than the system keeps
    let mut bytes = 0;
    while let Ok(Ok(more @ 1..)) = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut [0; 65_536])).await {
        bytes += more;
    }
    assert!(bytes < 12_000_000, "it was cut off, not answered to the end: {bytes}");
    running.stop().await;
}
