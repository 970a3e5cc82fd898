//! A broker alone, in the test's own process, at ports that are free.

#![allow(dead_code)] // each test program uses a part

use clap::Parser as _;
use std::net::SocketAddr;
use std::path::Path;
use tonic::transport::{Channel, Endpoint};
use weir_broker::Running;
use weir_broker::config::Config;

/// Its configuration, with more arguments.
pub(crate) fn config(data: &Path, more: &[&str]) -> Config {
    let mut arguments = vec!["weir-broker".to_owned(), format!("--data={}", data.display())];
    arguments.extend(["client", "peer", "admin", "metrics"].map(|l| format!("--{l}-listen=127.0.0.1:0")));
    arguments.extend(more.iter().map(|&argument| argument.to_owned()));
    Config::parse_from(arguments)
}

/// One that is ready.
pub(crate) async fn broker(data: &Path) -> Running {
    let running = weir_broker::start(config(data, &[])).await.unwrap();
    running.ready().await;
    running
}

pub(crate) async fn connect(to: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{to}")).unwrap().connect().await.unwrap()
}
