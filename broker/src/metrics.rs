//! Prometheus metrics, and the HTTP server for them and for health.

use crate::shared::Shared;
use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// All metrics of a broker.
pub struct Metrics {
    registry: Registry,
    /// Record batches' records taken.
    pub records_in: IntCounter,
    /// Their bytes.
    pub bytes_in: IntCounter,
    /// Records given to readers.
    pub records_out: IntCounter,
    /// Their bytes.
    pub bytes_out: IntCounter,
    /// From a batch's arrival to its commit.
    pub publish_seconds: Histogram,
    /// Writing and syncing one round.
    pub sync_seconds: Histogram,
    /// Requests refused, by reason.
    pub rejected: IntCounterVec,
    /// Replicas found damaged.
    pub damage: IntCounter,
    /// Streams open now.
    pub open_streams: IntGauge,
    groups_led: IntGauge,
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let metric = IntCounter::new(name, help).expect("a right name");
    registry.register(Box::new(metric.clone())).expect("registered once");
    metric
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let metric = IntGauge::new(name, help).expect("a right name");
    registry.register(Box::new(metric.clone())).expect("registered once");
    metric
}

fn latency(registry: &Registry, name: &str, help: &str) -> Histogram {
    let buckets = prometheus::exponential_buckets(0.000_1, 2.0, 18).expect("right buckets");
    let metric = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)).expect("a right name");
    registry.register(Box::new(metric.clone())).expect("registered once");
    metric
}

impl Metrics {
    /// With a registry of their own.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let r = Registry::new();
        let rejected = IntCounterVec::new(Opts::new("weir_rejected_total", "Requests refused"), &["reason"]);
        let rejected = rejected.expect("a right name");
        r.register(Box::new(rejected.clone())).expect("registered once");
        Self {
            records_in: counter(&r, "weir_records_in_total", "Records committed"),
            bytes_in: counter(&r, "weir_bytes_in_total", "Bytes of record batches committed"),
            records_out: counter(&r, "weir_records_out_total", "Records given to readers"),
            bytes_out: counter(&r, "weir_bytes_out_total", "Bytes of record batches given to readers"),
            publish_seconds: latency(&r, "weir_publish_seconds", "From a batch's arrival to its commit"),
            sync_seconds: latency(&r, "weir_sync_seconds", "Writing and syncing one round of the log"),
            rejected,
            damage: counter(&r, "weir_damaged_replicas_total", "Replicas found damaged and taken out"),
            open_streams: gauge(&r, "weir_open_streams", "Streams open"),
            groups_led: gauge(&r, "weir_partitions_led", "Partitions this broker leads"),
            registry: r,
        }
    }

    /// Counts a batch that was committed, `since` its arrival.
    pub fn published(&self, records: u32, bytes: usize, since: std::time::Instant) {
        self.publish_seconds.observe(since.elapsed().as_secs_f64());
        self.records_in.inc_by(u64::from(records));
        self.bytes_in.inc_by(bytes as u64);
    }

    fn render(&self, shared: &Shared) -> Vec<u8> {
        let meta = shared.meta();
        let led = meta.groups.keys().filter(|g| **g != 0 && shared.leads(weir_core::ids::GroupId(**g))).count();
        self.groups_led.set(led as i64);
        let mut out = Vec::new();
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        out
    }
}

/// Serves `/metrics`, `/livez` and `/readyz` (ready: the broker has joined, knows the metadata, and its groups have leaders).
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>, shared: Arc<Shared>) {
    while let Ok((mut socket, _)) = listener.accept().await {
        let (metrics, shared) = (metrics.clone(), shared.clone());
        tokio::spawn(async move {
            let mut request = [0; 1024];
            let read = tokio::time::timeout(std::time::Duration::from_secs(5), socket.read(&mut request)).await;
            let Ok(Ok(n)) = read else { return };
            let path = std::str::from_utf8(&request[..n]).ok().and_then(|r| r.split(' ').nth(1)).unwrap_or("/");
            let (status, body) = match path {
                "/metrics" => ("200 OK", metrics.render(&shared)),
                "/livez" => ("200 OK", b"alive\n".to_vec()),
                "/readyz" if is_ready(&shared) => ("200 OK", b"ready\n".to_vec()),
                "/readyz" => ("503 Service Unavailable", b"not ready: a partition held here has no leader\n".to_vec()),
                _ => ("404 Not Found", b"try /metrics, /livez, /readyz\n".to_vec()),
            };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let _ = socket.write_all(head.as_bytes()).await;
            let _ = socket.write_all(&body).await;
        });
    }
}

/// Whether the broker can serve: every group it holds has a leader.
pub fn is_ready(shared: &Shared) -> bool {
    let meta = shared.meta();
    let mine = meta.groups.iter().filter(|(_, a)| a.replica_on(shared.broker).is_some());
    meta.broker(shared.broker).is_some()
        && shared.controller().is_some()
        && mine.clone().all(|(id, _)| shared.leader(weir_core::ids::GroupId(*id)).is_some())
}
