//! Connections that say nothing, or are too many, are closed, and the others are served.

use clap::Parser as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use weir_broker::config::Config;
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

#[tokio::test]
async fn silent_and_too_many_connections_are_closed_and_others_served() {
    let data = tempfile::tempdir().unwrap();
    let mut arguments = vec!["weir-broker".to_owned(), format!("--data={}", data.path().display())];
    for listener in ["client", "peer", "admin", "metrics"] {
        arguments.push(format!("--{listener}-listen=127.0.0.1:0"));
    }
    arguments.push("--connections-max=40".to_owned());
    let running = weir_broker::start(Config::parse_from(arguments)).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(connect(running.client, 2).await);
    }
    let mut open = 0;
    for stream in &mut silent {
        open += usize::from(!is_closed(stream).await);
    }
    assert!(open <= 10, "a quarter of 40 from one address at most, not {open}");
    // another address is served
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", running.client)).unwrap();
    let mut client = v1::metadata_client::MetadataClient::connect(channel).await.unwrap();
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    // and those that said nothing go
    tokio::time::sleep(Duration::from_secs(6)).await;
    for stream in &mut silent {
        assert!(is_closed(stream).await);
    }
    assert!(client.get(v1::GetMetadataRequest::default()).await.is_ok());
    running.stop().await;
}
