//! The ways to reach a broker: its socket on the same machine, a broker of the same process, TLS.

mod cluster;

use cluster::{PATIENCE, WEIR, make_topic, spec, subscribe};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use weir_broker::config::Config;
use weir_client::producer::{Options, Producer};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Error, Record};
use weir_proto::v1;

/// Publishes ten records and takes them from a subscription.
async fn goes_through(client: &Client) {
    let producer = Producer::open(client, "t", Options::default()).await.unwrap();
    for at in 0..10u8 {
        let record = Record { value: Some(vec![at].into()), ..Default::default() };
        producer.send(record).await.unwrap().await.unwrap();
    }
    let mut subscriber = Subscriber::open(client, "s", Default::default()).await.unwrap();
    for at in 0..10u8 {
        let delivered = subscriber.next().await.unwrap().unwrap();
        assert_eq!(delivered.message.record.value.as_deref(), Some(&[at][..]));
        delivered.ack();
    }
    subscriber.close().await;
}

/// Connections to a port of loopback, as the kernel lists them.
fn connections(to: SocketAddr) -> usize {
    let wanted = format!("0100007F:{:04X} 01", to.port());
    let list = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    list.lines().filter(|line| line.split_whitespace().skip(2).take(2).collect::<Vec<_>>().join(" ") == wanted).count()
}

fn config(data: &Path) -> Config {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    Config {
        name: "here".into(),
        data: data.to_owned(),
        client_listen: any,
        client_socket: None,
        inproc: true,
        deadlines: Default::default(),
        peer_listen: any,
        admin_listen: any,
        metrics_listen: any,
        advertise_host: None,
        peers: Vec::new(),
        cluster_id: String::new(),
        connections_max: 100,
        accept_loss: None,
        rack: String::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_the_same_process_is_reached_without_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let running = weir_broker::start(config(&folder.path().join("one"))).await.unwrap();
    running.ready().await;
    let client = Client::new("inproc:here").unwrap();
    client.connect(PATIENCE).await.unwrap();
    make_topic(&client, "t", 2, 1).await;
    subscribe(&client, "s", spec("t", v1::SubscriptionMode::Shared)).await.unwrap();
    goes_through(&client).await;
    assert_eq!(connections(running.client), 0, "it went over TCP");
    let twin = weir_broker::start(config(&folder.path().join("two"))).await;
    assert!(twin.err().unwrap().to_string().contains("another broker of this process is called here"));
    running.stop().await;
    let gone = Client::new("inproc:here").unwrap().connect(Duration::from_millis(200)).await;
    assert!(matches!(gone, Err(Error::Deadline { .. })), "{gone:?}");
}

/// A `weir serve` that is killed at the end of a test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(folder: &Path, name: &str, socket: &Path) -> Served {
    let mut command = Command::new(WEIR);
    command.args(["serve", "-o", "json", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--data"]);
    let child = command.arg(folder.join(name)).arg("--socket").arg(socket);
    Served(child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

fn said(mut served: Served) -> String {
    let begun = Instant::now();
    while served.0.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < PATIENCE, "it runs on");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::io::read_to_string(served.0.stderr.take().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_on_the_same_machine_is_reached_by_its_socket_also_after_it_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("weir.sock");
    let server = format!("unix:{}", socket.display());
    for round in 0..2 {
        let served = serve(folder.path(), "one", &socket);
        let client = Client::new(&server).unwrap();
        let cluster = client.connect(PATIENCE).await.unwrap();
        if round == 0 {
            make_topic(&client, "t", 2, 1).await;
            subscribe(&client, "s", spec("t", v1::SubscriptionMode::Shared)).await.unwrap();
        }
        goes_through(&client).await;
        let told = cluster.metadata.brokers[0].client_address.parse().unwrap();
        assert_eq!(connections(told), 0, "it went over TCP");
        let listed = Command::new(WEIR).args(["--server", &server, "topic", "list"]).output().unwrap();
        assert!(String::from_utf8_lossy(&listed.stdout).contains("default/t"), "{listed:?}");
        let twin = said(serve(folder.path(), "two", &socket));
        assert!(twin.contains("cannot listen on") && twin.contains("weir.sock"), "{twin}");
        drop(served); // killed: the socket's file stays
        assert!(socket.exists());
    }
}

/// Knows one topic; the rest of a cluster is not needed to see that TLS was spoken.
struct Knows;

#[tonic::async_trait]
impl v1::metadata_server::Metadata for Knows {
    async fn get(
        &self,
        _: tonic::Request<v1::GetMetadataRequest>,
    ) -> Result<tonic::Response<v1::GetMetadataResponse>, tonic::Status> {
        let topic =
            v1::Topic { name: "default/behind-tls".into(), spec: Some(Default::default()), ..Default::default() };
        let brokers = vec![v1::Broker { id: 1, name: "b".into(), ..Default::default() }];
        Ok(tonic::Response::new(v1::GetMetadataResponse { topics: vec![topic], brokers, ..Default::default() }))
    }

    async fn describe(
        &self,
        _: tonic::Request<v1::DescribeRequest>,
    ) -> Result<tonic::Response<v1::DescribeResponse>, tonic::Status> {
        Ok(tonic::Response::new(v1::DescribeResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn https_speaks_tls_and_trusts_what_the_system_trusts() {
    use tonic::transport::{Identity, Server, ServerTlsConfig};
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let authorities = folder.path().join("authorities.pem");
    std::fs::write(&authorities, made.cert.pem()).unwrap();
    let identity = Identity::from_pem(made.cert.pem(), made.signing_key.serialize_pem());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let serving = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .unwrap()
        .add_service(v1::metadata_server::MetadataServer::new(Knows))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
    tokio::spawn(serving);
    let list = |trusted: &Path| {
        let mut command = Command::new(WEIR);
        command.args(["--server", &server, "topic", "list"]).env("SSL_CERT_FILE", trusted);
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let trusted = list(&authorities).await.unwrap();
    assert!(String::from_utf8_lossy(&trusted.stdout).contains("behind-tls"), "{trusted:?}");
    let others = list(&folder.path().join("none.pem")).await.unwrap();
    assert!(!others.status.success(), "an unknown authority was trusted: {others:?}");
}
