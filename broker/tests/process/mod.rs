//! A broker in a process of its own.

#![allow(dead_code)] // each test program uses a part

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A start takes a moment, on a busy machine a longer one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The broker, until it is dropped.
pub(crate) struct Broker {
    process: Child,
    pub(crate) client: SocketAddr,
    pub(crate) admin: SocketAddr,
    metrics: SocketAddr,
}

impl Broker {
    /// Starts the program with its data in a folder, and waits until it is ready.
    pub(crate) async fn start(mut program: Command, data: &Path) -> Self {
        let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (client, peer, admin, metrics) = (port(), port(), port(), port());
        program.arg("--data").arg(data).env("WEIR_LOG", "error");
        for (name, at) in [("client", client), ("peer", peer), ("admin", admin), ("metrics", metrics)] {
            program.arg(format!("--{name}-listen={at}"));
        }
        let mut broker = Self { process: program.spawn().unwrap(), client, admin, metrics };
        let end = Instant::now() + PATIENCE;
        while !broker.is_ready().await {
            assert!(broker.process.try_wait().unwrap().is_none(), "it ended");
            assert!(Instant::now() < end, "not ready");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        broker
    }

    async fn is_ready(&self) -> bool {
        let Ok(mut stream) = tokio::net::TcpStream::connect(self.metrics).await else { return false };
        let mut text = String::new();
        let _ = stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let _ = stream.read_to_string(&mut text).await;
        text.ends_with("\r\nready\n")
    }

    /// Stops it as planned.
    pub(crate) fn stop(mut self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
