//! A broker in a process of its own.

#![allow(dead_code)] // each test program uses a part

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A start takes a moment, on a busy machine a longer one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The broker, until it is dropped.
pub(crate) struct Broker {
    process: Child,
    pub(crate) client: SocketAddr,
    pub(crate) peer: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) metrics: SocketAddr,
}

/// Where a broker can listen. The port is given to no other test of this program, and lies below those that the system gives to
/// connections: nobody takes it before the broker does.
fn free() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 500) as u16 * 20;
    let next = || 20_000 + first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
    let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
    std::iter::repeat_with(next).map(address).find(|at| std::net::TcpListener::bind(at).is_ok()).unwrap()
}

impl Broker {
    /// Starts the program with its data in a folder, and waits until it is ready.
    pub(crate) async fn start(mut program: Command, data: &Path) -> Self {
        let (client, peer, admin, metrics) = (free(), free(), free(), free());
        program.arg("--data").arg(data).env("WEIR_LOG", "error");
        for (name, at) in [("client", client), ("peer", peer), ("admin", admin), ("metrics", metrics)] {
            program.arg(format!("--{name}-listen={at}"));
        }
        let mut broker = Self { process: program.spawn().unwrap(), client, peer, admin, metrics };
        let end = Instant::now() + PATIENCE;
        while !broker.is_ready().await {
            assert!(broker.runs(), "it ended");
            assert!(Instant::now() < end, "not ready");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        broker
    }

    pub(crate) fn runs(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) async fn is_ready(&self) -> bool {
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
