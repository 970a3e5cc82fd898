//! Prometheus metrics, and the HTTP server for them and for health.

use crate::service::Context;
use crate::shared::Shared;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::net::TcpListener;
use weir_core::ids::GroupId;
use weir_proto::v1;

/// All metrics of a broker.
pub struct Metrics {
    registry: Registry,
    records_in: IntCounterVec,
    bytes_in: IntCounterVec,
    records_out: IntCounterVec,
    bytes_out: IntCounterVec,
    /// From a batch's arrival to its commit.
    pub publish_seconds: Histogram,
    /// Writing and syncing one round.
    pub sync_seconds: Histogram,
    /// Requests refused, by reason.
    pub rejected: IntCounterVec,
    /// Messages that failed too often, by topic and what became of them.
    pub dead_letters: IntCounterVec,
    /// Pushes by subscription and outcome.
    pub pushed: IntCounterVec,
    /// Replicas found damaged.
    pub damage: IntCounter,
    /// Streams open now.
    pub open_streams: IntGauge,
    /// Connections open now.
    pub connections: IntGauge,
    partitions: PartitionGauges,
    disk_free_bytes: IntGauge,
    /// Bytes of the write-ahead log's torn tail that were left out at start.
    pub torn_bytes: IntGauge,
    /// Replicas here that sleep.
    pub asleep: IntGauge,
    /// 1 while the disk is full.
    pub disk_full: IntGauge,
    disk_size_bytes: IntGauge,
    data: PathBuf,
    /// topics that have counters: those of deleted ones go with the next scrape
    counted: Mutex<BTreeSet<String>>,
}

/// Of the partitions this broker leads, set anew at each scrape.
struct PartitionGauges {
    led: IntGauge,
    leaderless: IntGauge,
    under_replicated: IntGauge,
    term: IntGaugeVec,
    replicas: IntGaugeVec,
    in_sync: IntGaugeVec,
    high_watermark: IntGaugeVec,
    log_bytes: IntGaugeVec,
    lag_bytes: IntGaugeVec,
    backlog: IntGaugeVec,
    backlog_bytes: IntGaugeVec,
    oldest_seconds: IntGaugeVec,
}

impl PartitionGauges {
    fn new(r: &Registry) -> Self {
        let partition = ["topic", "partition"];
        let subscription = ["subscription", "topic", "partition"];
        Self {
            led: gauge(r, "weir_partitions_led", "Partitions this broker leads"),
            leaderless: gauge(
                r,
                "weir_partitions_leaderless",
                "Partitions with a replica here and no known leader, or one here that gets nothing committed",
            ),
            under_replicated: gauge(
                r,
                "weir_partitions_under_replicated",
                "Partitions led here with fewer replicas in sync than wanted",
            ),
            term: gauges(r, "weir_raft_term", "Raft term, told by the leader", &partition),
            replicas: gauges(r, "weir_partition_replicas", "Replicas wanted", &partition),
            in_sync: gauges(
                r,
                "weir_partition_in_sync_replicas",
                "Replicas that have nearly all of the log",
                &partition,
            ),
            high_watermark: gauges(
                r,
                "weir_partition_high_watermark",
                "One past the last committed offset",
                &partition,
            ),
            log_bytes: gauges(r, "weir_partition_log_bytes", "Bytes of log kept on each replica", &partition),
            lag_bytes: gauges(
                r,
                "weir_replication_lag_bytes",
                "Bytes a replica lacks, estimated",
                &["topic", "partition", "broker"],
            ),
            backlog: gauges(r, "weir_subscription_backlog_messages", "Messages not acknowledged", &subscription),
            backlog_bytes: gauges(
                r,
                "weir_subscription_backlog_bytes",
                "Bytes of log they take, by the partition's average",
                &subscription,
            ),
            oldest_seconds: gauges(
                r,
                "weir_subscription_oldest_unacked_seconds",
                "Age of the oldest message not acknowledged",
                &subscription,
            ),
        }
    }

    fn set(&self, context: &Context, statuses: &[v1::PartitionStatus]) {
        for vec in [&self.term, &self.replicas, &self.in_sync, &self.high_watermark, &self.log_bytes, &self.lag_bytes] {
            vec.reset();
        }
        self.backlog.reset();
        self.backlog_bytes.reset();
        self.oldest_seconds.reset();
        let meta = context.shared.meta();
        let now_ms = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_millis() as u64);
        let mut under_replicated = 0;
        for status in statuses.iter().filter(|s| !s.topic.is_empty()) {
            let partition = status.partition.to_string();
            let labels = [status.topic.as_str(), &partition];
            let wanted = meta.assignment(GroupId(status.group)).map_or(0, |a| a.replicas.len()) as i64;
            let in_sync = status.replicas.iter().filter(|r| r.in_sync && r.voter).count() as i64;
            under_replicated += i64::from(in_sync < wanted);
            self.term.with_label_values(&labels).set(status.term as i64);
            self.replicas.with_label_values(&labels).set(wanted);
            self.in_sync.with_label_values(&labels).set(in_sync);
            self.high_watermark.with_label_values(&labels).set(status.high_watermark as i64);
            self.log_bytes.with_label_values(&labels).set(status.log_bytes as i64);
            for replica in status.replicas.iter().filter(|r| r.broker != context.shared.broker.0) {
                let labels = [status.topic.as_str(), &partition, &replica.broker.to_string()];
                self.lag_bytes.with_label_values(&labels).set(replica.bytes_behind as i64);
            }
            // a snapshot is behind for as long as it is kept: no reason to worry anybody
            for s in status.subscriptions.iter().filter(|s| !s.subscription.contains('@')) {
                let labels = [s.subscription.as_str(), status.topic.as_str(), &partition];
                let age_ms = if s.oldest_ms == 0 { 0 } else { now_ms.saturating_sub(s.oldest_ms) };
                self.backlog.with_label_values(&labels).set(s.backlog as i64);
                self.backlog_bytes.with_label_values(&labels).set(s.backlog_bytes as i64);
                self.oldest_seconds.with_label_values(&labels).set((age_ms / 1_000) as i64);
            }
        }
        let mine = meta.groups.iter().filter(|(_, a)| a.replica_on(context.shared.broker).is_some());
        let shared = &context.shared;
        // a leader that gets nothing committed, not even its first entry, is as good as none
        let is_led = |g| shared.leader(g).is_some_and(|b| b != shared.broker || shared.serves(g));
        let leaderless = mine.filter(|(g, _)| !is_led(GroupId(**g))).count();
        self.led.set(statuses.iter().filter(|s| !s.topic.is_empty()).count() as i64);
        self.leaderless.set(leaderless as i64);
        self.under_replicated.set(under_replicated);
    }
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

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let metric = IntCounterVec::new(Opts::new(name, help), labels).expect("a right name");
    registry.register(Box::new(metric.clone())).expect("registered once");
    metric
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let metric = IntGaugeVec::new(Opts::new(name, help), labels).expect("a right name");
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
    /// With a registry of their own; `data` is the folder whose disk is watched.
    pub fn new(data: PathBuf) -> Self {
        let r = Registry::new();
        let process = prometheus::process_collector::ProcessCollector::for_self();
        r.register(Box::new(process)).expect("registered once");
        let info = gauges(&r, "weir_build_info", "The program's version", &["version"]);
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self {
            records_in: counters(&r, "weir_records_in_total", "Records committed", &["topic"]),
            bytes_in: counters(&r, "weir_bytes_in_total", "Bytes of record batches committed", &["topic"]),
            records_out: counters(&r, "weir_records_out_total", "Records given to readers", &["topic"]),
            bytes_out: counters(&r, "weir_bytes_out_total", "Bytes of record batches given to readers", &["topic"]),
            publish_seconds: latency(&r, "weir_publish_seconds", "From a batch's arrival to its commit"),
            sync_seconds: latency(&r, "weir_sync_seconds", "Writing and syncing one round of the log"),
            rejected: counters(&r, "weir_rejected_total", "Requests refused", &["reason"]),
            dead_letters: counters(
                &r,
                "weir_dead_letters_total",
                "Messages that failed too often: moved, dropped, or failed to be moved",
                &["topic", "outcome"],
            ),
            pushed: counters(
                &r,
                "weir_push_requests_total",
                "Messages pushed, by what the endpoint said: taken, refused, later",
                &["subscription", "outcome"],
            ),
            damage: counter(&r, "weir_damaged_replicas_total", "Replicas found damaged and taken out"),
            open_streams: gauge(&r, "weir_open_streams", "Streams open"),
            connections: gauge(&r, "weir_connections", "Connections open, over all gRPC listeners"),
            partitions: PartitionGauges::new(&r),
            torn_bytes: gauge(&r, "weir_torn_tail_bytes", "Torn tail of the write-ahead log, left out at start"),
            asleep: gauge(&r, "weir_replicas_asleep", "Replicas here whose partition is idle and sends no heartbeats"),
            disk_full: gauge(&r, "weir_disk_full", "1 while the disk is full: no more messages are taken on"),
            disk_free_bytes: gauge(&r, "weir_disk_free_bytes", "Free on the disk of the data"),
            disk_size_bytes: gauge(&r, "weir_disk_size_bytes", "Size of the disk of the data"),
            data,
            counted: Mutex::default(),
            registry: r,
        }
    }

    /// Counts a batch that was committed, `since` its arrival.
    pub fn published(&self, topic: &str, records: u32, bytes: usize, since: std::time::Instant) {
        self.publish_seconds.observe(since.elapsed().as_secs_f64());
        self.records_in.with_label_values(&[topic]).inc_by(u64::from(records));
        self.bytes_in.with_label_values(&[topic]).inc_by(bytes as u64);
    }

    /// Counts what a subscription's member was given.
    pub fn delivered(&self, topic: &str, response: &v1::PullResponse) {
        let messages = response.messages.iter().filter_map(|m| m.message.as_ref());
        let bytes: usize = messages.map(|m| m.key.len() + m.value.len()).sum();
        let records = response.messages.len() as u64 + (response.until_offset - response.from_offset);
        let batches: usize = response.batches.iter().map(|b| b.batch.len()).sum();
        self.records_out.with_label_values(&[topic]).inc_by(records);
        self.bytes_out.with_label_values(&[topic]).inc_by((bytes + batches) as u64);
    }

    /// Counts batches given to a reader.
    pub fn fetched(&self, topic: &str, batches: &[v1::Batch]) {
        self.records_out.with_label_values(&[topic]).inc_by(batches.iter().map(|b| u64::from(b.count)).sum());
        self.bytes_out.with_label_values(&[topic]).inc_by(batches.iter().map(|b| b.batch.len() as u64).sum());
    }

    async fn render(&self, context: &Context) -> String {
        self.partitions.set(context, &context.describe(&[]).await);
        self.forget_deleted(context);
        self.asleep.set(context.node.ask(|node| node.asleep()).await.unwrap_or(0) as i64);
        if let Some((free, whole)) = crate::room::of(&self.data) {
            self.disk_free_bytes.set(free as i64);
            self.disk_size_bytes.set(whole as i64);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    fn forget_deleted(&self, context: &Context) {
        let topics: BTreeSet<String> = context.shared.meta().topics.keys().cloned().collect();
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in counted.difference(&topics) {
            for vec in [&self.records_in, &self.bytes_in, &self.records_out, &self.bytes_out] {
                let _ = vec.remove_label_values(&[gone]);
            }
        }
        *counted = topics;
    }
}

/// Serves `/metrics`, `/livez` and `/readyz` (ready: the broker has joined, its groups have leaders, and what it tries gets done).
/// Alive, and not ready, from before the broker has an identity.
pub async fn serve(listener: TcpListener, running: Arc<OnceLock<Context>>) {
    let text = |status, body: String| (status, [("content-type", "text/plain; version=0.0.4")], body);
    let (for_metrics, for_ready) = (running.clone(), running);
    let metrics = async move || match for_metrics.get() {
        Some(context) => text(StatusCode::OK, context.metrics.render(context).await),
        None => text(StatusCode::OK, String::new()),
    };
    let ready = async move || match for_ready.get() {
        None => text(StatusCode::SERVICE_UNAVAILABLE, "not ready: waiting to form or join a cluster\n".to_owned()),
        Some(c) => match why_not_ready(&c.shared) {
            None => text(StatusCode::OK, "ready\n".to_owned()),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
    };
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .fallback(async || (StatusCode::NOT_FOUND, "try /metrics, /livez, /readyz\n"));
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the metrics server ended");
    }
}

/// Nothing has come of what a broker tries for this long, ms: it commits nothing.
const STALLED_MS_MAX: u64 = 5_000;

/// Why the broker cannot serve; ready means that it commits, not that the process is there.
pub fn why_not_ready(shared: &Shared) -> Option<String> {
    let stalled = shared.stalled_ms.load(std::sync::atomic::Ordering::Relaxed);
    if stalled >= STALLED_MS_MAX {
        return Some(format!("nothing was committed or synced for {} s, and something is to be", stalled / 1_000));
    }
    (!is_led(shared)).then(|| "a partition held here has no leader".to_owned())
}

/// Whether every group held here has a leader.
fn is_led(shared: &Shared) -> bool {
    let meta = shared.meta();
    let mine = meta.groups.iter().filter(|(_, a)| a.replica_on(shared.broker).is_some());
    meta.broker(shared.broker).is_some()
        && shared.controller().is_some()
        && mine.clone().all(|(id, _)| shared.leader(GroupId(*id)).is_some())
}
