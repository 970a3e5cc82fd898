//! Prometheus metrics, and the HTTP server for them and for health.

use crate::guard::Brief;
use crate::service::Context;
use crate::shared::Shared;
use axum::Router;
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, HeaderValue};
use axum::response::Response;
use axum::routing::get;
use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use weir_core::ids::GroupId;
use weir_core::incarnation::Standing;
use weir_core::meta::names;
use weir_core::meta::state::{Broker, MetaState, Phase};
use weir_core::node::{Alarm, Damage, Node};
use weir_proto::v1;

/// Records and bytes of a response, as they are counted.
pub fn delivered(response: &v1::PullResponse) -> (u64, u64) {
    let messages = response.messages.iter().filter_map(|m| m.message.as_ref());
    let length = |b: &Option<bytes::Bytes>| b.as_ref().map_or(0, |b| b.len());
    let bytes: usize = messages.map(|m| length(&m.key) + length(&m.value)).sum();
    let records = response.messages.len() as u64 + (response.until_offset - response.from_offset);
    let batches: usize = response.batches.iter().map(|b| b.batch.len()).sum();
    (records, (bytes + batches) as u64)
}

/// All metrics of a broker.
pub struct Metrics {
    series: Series,
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
    /// What is logged seldom, though it may come with every message.
    pub seldom: crate::logging::Seldom,
    /// Messages that failed too often, by topic and what became of them.
    pub dead_letters: IntCounterVec,
    /// Batches whose records cannot be decoded, by outcome.
    pub undecodable: IntCounterVec,
    /// Messages delivered without their subscription's filter, which could cost too much, by subscription.
    pub unfiltered: IntCounterVec,
    /// Scheduled messages that are due and that their topic refuses.
    pub scheduled_refused: IntCounter,
    /// Pushes by subscription and outcome.
    pub pushed: IntCounterVec,
    damage: IntCounterVec,
    /// Replicas that have committed what their leader lacks.
    committed_log_lost: IntCounter,
    /// Volumes that were found to be rolled back.
    rolled_back: IntGauge,
    clock_offset: GaugeVec,
    slow_disk: IntGauge,
    clock_wrong: IntGauge,
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
}

/// The registry, and all series that have labels: those about objects that do not exist any more are removed with the next scrape.
#[derive(Default)]
struct Series {
    registry: Registry,
    labelled: Mutex<Vec<Box<dyn Labelled>>>,
}

/// Series of one metric, told apart by labels.
trait Labelled: Send + Sync {
    /// Removes all series that have a label, given as name and value, that is not kept.
    fn keep(&self, keeps: &dyn Fn(&str, &str) -> bool);
}

impl<T: MetricVecBuilder> Labelled for MetricVec<T> {
    fn keep(&self, keeps: &dyn Fn(&str, &str) -> bool) {
        for metric in self.collect().iter().flat_map(|family| family.get_metric()) {
            let labels: HashMap<&str, &str> = metric.get_label().iter().map(|l| (l.name(), l.value())).collect();
            if !labels.iter().all(|(name, value)| keeps(name, value)) {
                let _ = self.remove(&labels); // somebody else removed it
            }
        }
    }
}

impl Series {
    fn add<C: Collector + Clone + 'static>(&self, metric: C) -> C {
        self.registry.register(Box::new(metric.clone())).expect("registered once");
        metric
    }

    fn add_labelled<C: Collector + Labelled + Clone + 'static>(&self, metric: C) -> C {
        self.labelled.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(metric.clone()));
        self.add(metric)
    }

    /// Removes what is about topics and subscriptions that do not exist, or that brokers keep for themselves.
    fn keep_existing(&self, meta: &MetaState) {
        let keeps = |label: &str, name: &str| match label {
            "topic" => meta.topics.contains_key(name) && !names::is_internal(name),
            "subscription" => meta.subscriptions.contains_key(name) && !names::is_internal(name),
            _ => true,
        };
        self.labelled.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|metric| metric.keep(&keeps));
    }
}

/// Of the partitions this broker leads, set anew at each scrape.
struct PartitionGauges {
    brokers: IntGauge,
    led: IntGauge,
    leaderless: IntGauge,
    under_replicated: IntGauge,
    slowed: IntGaugeVec,
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
    fn new(r: &Series) -> Self {
        let partition = ["topic", "partition"];
        let subscription = ["subscription", "topic", "partition"];
        Self {
            brokers: gauge(r, "weir_cluster_brokers", "Brokers of the cluster that have joined and were not lost"),
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
            slowed: gauges(
                r,
                "weir_partition_slowed_percent",
                "Percent by which publishers are slowed, so that a replica that is far behind catches up",
                &partition,
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
        for vec in [
            &self.slowed,
            &self.term,
            &self.replicas,
            &self.in_sync,
            &self.high_watermark,
            &self.log_bytes,
            &self.lag_bytes,
        ] {
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
            self.slowed.with_label_values(&labels).set(status.slowed_percent as i64);
            self.term.with_label_values(&labels).set(status.term as i64);
            self.replicas.with_label_values(&labels).set(wanted);
            self.in_sync.with_label_values(&labels).set(in_sync);
            self.high_watermark.with_label_values(&labels).set(status.high_watermark as i64);
            self.log_bytes.with_label_values(&labels).set(status.log_bytes as i64);
            for replica in status.replicas.iter().filter(|r| r.broker != context.shared.broker.0) {
                let labels = [status.topic.as_str(), &partition, &replica.broker.to_string()];
                self.lag_bytes.with_label_values(&labels).set(replica.bytes_behind as i64);
            }
            for s in &status.subscriptions {
                let labels = [s.subscription.as_str(), status.topic.as_str(), &partition];
                let age_ms = s.oldest_ms.map_or(0, |oldest| now_ms.saturating_sub(oldest));
                self.backlog.with_label_values(&labels).set(s.backlog as i64);
                self.backlog_bytes.with_label_values(&labels).set(s.backlog_bytes as i64);
                self.oldest_seconds.with_label_values(&labels).set((age_ms / 1_000) as i64);
            }
        }
        let joined = |b: &&Broker| matches!(b.phase(), Phase::Active | Phase::Draining);
        self.brokers.set(meta.brokers.values().filter(joined).count() as i64);
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

fn counter(series: &Series, name: &str, help: &str) -> IntCounter {
    series.add(IntCounter::new(name, help).expect("a right name"))
}

fn gauge(series: &Series, name: &str, help: &str) -> IntGauge {
    series.add(IntGauge::new(name, help).expect("a right name"))
}

fn counters(series: &Series, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    series.add_labelled(IntCounterVec::new(Opts::new(name, help), labels).expect("a right name"))
}

fn gauges(series: &Series, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    series.add_labelled(IntGaugeVec::new(Opts::new(name, help), labels).expect("a right name"))
}

fn seconds(series: &Series, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    series.add_labelled(GaugeVec::new(Opts::new(name, help), labels).expect("a right name"))
}

fn latency(series: &Series, name: &str, help: &str) -> Histogram {
    let buckets = prometheus::exponential_buckets(0.000_1, 2.0, 18).expect("right buckets");
    series.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)).expect("a right name"))
}

impl Metrics {
    /// With a registry of their own; `data` is the folder whose disk is watched.
    pub fn new(data: PathBuf) -> Self {
        let r = Series::default();
        let process = prometheus::process_collector::ProcessCollector::for_self();
        r.registry.register(Box::new(process)).expect("registered once");
        let damage = counters(
            &r,
            "weir_damaged_replicas_total",
            "Damaged data and failed reads, by consequence for the replica, or for the whole store",
            &["consequence"],
        );
        // an increase is seen only of a series that is there
        for consequence in ["quarantined", "not_opened", "kept_in_service", "read_failed", "store_rebuilt"] {
            damage.with_label_values(&[consequence]);
        }
        let info = gauges(&r, "weir_build_info", "The program's version", &["version"]);
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let undecodable = counters(
            &r,
            "weir_undecodable_batches_total",
            "Batches whose records cannot be decoded, as subscriptions and schedules find them: skipped, or found and \
             then moved to the dead-letter topic, or failed to be moved",
            &["outcome"],
        );
        // from the beginning, so that the first one is an increase
        for outcome in ["skipped", "found", "moved", "failed"] {
            undecodable.with_label_values(&[outcome]);
        }
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
            undecodable,
            unfiltered: counters(
                &r,
                "weir_unfiltered_messages_total",
                "Messages delivered without evaluating their subscription's filter, since that could cost too much",
                &["subscription"],
            ),
            scheduled_refused: counter(
                &r,
                "weir_scheduled_refused_total",
                "Scheduled messages that are due and that their topic refuses: kept, unpublished",
            ),
            pushed: counters(
                &r,
                "weir_push_requests_total",
                "Messages pushed, by what the endpoint said: taken, refused, later",
                &["subscription", "outcome"],
            ),
            damage,
            committed_log_lost: counter(
                &r,
                "weir_committed_log_lost_total",
                "Replicas found to have committed records that the leader of their partition lacks",
            ),
            rolled_back: gauge(
                &r,
                "weir_rolled_back_volumes",
                "Brokers whose volume is older than their data once was, as this broker knows",
            ),
            clock_offset: seconds(
                &r,
                "weir_clock_offset_seconds",
                "How far the clock of another broker is ahead of this one's",
                &["broker"],
            ),
            slow_disk: gauge(
                &r,
                "weir_disk_slow",
                "1 while syncs here are ten times slower than on other brokers: leadership is given away",
            ),
            clock_wrong: gauge(
                &r,
                "weir_clock_wrong",
                "1 while the clock here is too far from the median of all: this broker does not lead",
            ),
            open_streams: gauge(&r, "weir_open_streams", "Streams open"),
            connections: gauge(&r, "weir_connections", "Connections open, over all listeners"),
            partitions: PartitionGauges::new(&r),
            torn_bytes: gauge(&r, "weir_torn_tail_bytes", "Torn tail of the write-ahead log, left out at start"),
            asleep: gauge(&r, "weir_replicas_asleep", "Replicas here whose partition is idle and sends no heartbeats"),
            disk_full: gauge(&r, "weir_disk_full", "1 while the disk is full: no more messages are taken on"),
            disk_free_bytes: gauge(&r, "weir_disk_free_bytes", "Free on the disk of the data"),
            disk_size_bytes: gauge(&r, "weir_disk_size_bytes", "Size of the disk of the data"),
            seldom: Default::default(),
            data,
            series: r,
        }
    }

    /// Counts and logs damage with its consequence.
    pub fn damaged(&self, damage: &Damage) {
        let error = damage.error();
        let consequence = match damage {
            Damage::Quarantined(_) => {
                tracing::error!(%error, "damaged replica: it takes no part any more, and the partition's other replicas rebuild it");
                "quarantined"
            }
            Damage::NotOpened(_) => {
                tracing::error!(
                    %error,
                    "a replica cannot be read: it takes no part, and is opened again at the next start; nothing of it is removed"
                );
                "not_opened"
            }
            Damage::KeptInService(_) => {
                if let Some(left_out) = self.seldom.now("damage", &error.to_string()) {
                    let text = "damaged data in a replica that cannot be spared: it serves what can be read";
                    tracing::error!(%error, left_out, "{text}");
                }
                "kept_in_service"
            }
            Damage::ReadFailed(_) => {
                if let Some(left_out) = self.seldom.now("read failed", &error.to_string()) {
                    tracing::warn!(%error, left_out, "a read failed and is retried");
                }
                "read_failed"
            }
        };
        self.damage.with_label_values(&[consequence]).inc();
    }

    /// Counts and logs damage of the store as a whole, which is in service still.
    pub fn store_damaged(&self, what: &str) {
        tracing::error!(
            what,
            "this broker's store is damaged, and other brokers cannot replace it now: it serves what can be read and compacts nothing"
        );
        self.damage.with_label_values(&["kept_in_service"]).inc();
    }

    /// Counts that the whole store was set aside, to be rebuilt from other brokers.
    pub fn store_rebuilt(&self) {
        self.damage.with_label_values(&["store_rebuilt"]).inc();
    }

    /// Counts a batch that was committed, `since` its arrival.
    pub fn published(&self, topic: &str, records: u32, bytes: usize, since: std::time::Instant) {
        self.publish_seconds.observe(since.elapsed().as_secs_f64());
        self.records_in.with_label_values(&[topic]).inc_by(u64::from(records));
        self.bytes_in.with_label_values(&[topic]).inc_by(bytes as u64);
    }

    /// Counts what a subscription's member was given.
    pub fn delivered(&self, topic: &str, records: u64, bytes: u64) {
        self.records_out.with_label_values(&[topic]).inc_by(records);
        self.bytes_out.with_label_values(&[topic]).inc_by(bytes);
    }

    /// Counts batches given to a reader.
    pub fn fetched(&self, topic: &str, batches: &[v1::Batch]) {
        self.records_out.with_label_values(&[topic]).inc_by(batches.iter().map(|b| u64::from(b.count)).sum());
        self.bytes_out.with_label_values(&[topic]).inc_by(batches.iter().map(|b| b.batch.len() as u64).sum());
    }

    /// Counts what operators must hear of.
    pub fn alarm(&self, alarm: &Alarm) {
        match alarm {
            Alarm::CommittedLogLost { .. } => self.committed_log_lost.inc(),
            Alarm::RolledBack { .. } => {} // a gauge, as long as it lasts
        }
    }

    async fn set_clocks(&self, context: &Context) {
        let ask = |node: &mut Node| (node.clock_offsets(), node.is_slow(), node.is_skewed());
        let (offsets, slow, wrong) = context.node.ask(ask).await.unwrap_or_default();
        self.clock_offset.reset();
        for (broker, offset_ms) in offsets {
            self.clock_offset.with_label_values(&[&broker.to_string()]).set(offset_ms as f64 / 1_000.0);
        }
        self.slow_disk.set(slow.into());
        self.clock_wrong.set(wrong.into());
        self.rolled_back.set(context.shared.rolled_back().len() as i64);
    }

    async fn render(&self, context: &Context) -> String {
        self.set_clocks(context).await;
        self.partitions.set(context, &context.describe_all().await);
        self.series.keep_existing(&context.shared.meta());
        self.asleep.set(context.node.ask(|node| node.asleep()).await.unwrap_or(0) as i64);
        if let Some((free, whole)) = weir_store::room::of(&self.data) {
            self.disk_free_bytes.set(free as i64);
            self.disk_size_bytes.set(whole as i64);
        }
        TextEncoder::new().encode_to_string(&self.series.registry.gather()).unwrap_or_default()
    }
}

/// Serves `/metrics`, `/livez` and `/readyz` (ready: the broker has joined, its groups have leaders, what it tries gets done, and since
/// it started it has had all that was committed).
/// Alive, and not ready, from before the broker has an identity.
pub async fn serve(listener: Brief, running: Arc<OnceLock<Context>>) -> std::io::Result<()> {
    let text = |status, body: String| (status, [("content-type", "text/plain; version=0.0.4")], body);
    let (for_metrics, for_ready) = (running.clone(), running);
    let metrics = async move || match for_metrics.get() {
        Some(context) => text(StatusCode::OK, context.metrics.render(context).await),
        None => text(StatusCode::OK, String::new()),
    };
    let ready = async move || match for_ready.get() {
        None => text(StatusCode::SERVICE_UNAVAILABLE, "not ready: waiting to form or join a cluster\n".to_owned()),
        Some(c) => match why_not_ready(&c.shared).or_else(|| crate::catch_up::what_is_lacking(&c.shared)) {
            None => text(StatusCode::OK, "ready\n".to_owned()),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
    };
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .fallback(async || (StatusCode::NOT_FOUND, "try /metrics, /livez, /readyz\n"));
    // one request a connection: none is kept open between two scrapes
    let close = axum::middleware::map_response(async |mut response: Response| {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        response
    });
    axum::serve(listener, routes.layer(close)).await
}

/// Nothing has come of what a broker tries for this long, ms: it commits nothing.
const STALLED_MS_MAX: u64 = 5_000;

/// Why the broker cannot serve; ready means that it commits, not that the process is there.
pub fn why_not_ready(shared: &Shared) -> Option<String> {
    match shared.standing() {
        Standing::TakingPart => {}
        Standing::Asking => {
            return Some("waiting for a majority of the brokers to confirm that this volume is the newest".to_owned());
        }
        Standing::Recording => return Some("recording the start of this broker".to_owned()),
        Standing::RolledBack { known_by, .. } => {
            return Some(format!("this volume was rolled back: broker {known_by} knows newer data of this broker"));
        }
    }
    let stalled = shared.stalled_ms.load(std::sync::atomic::Ordering::Relaxed);
    if stalled >= STALLED_MS_MAX {
        return Some(format!("nothing was committed or synced for {} s, and something is to be", stalled / 1_000));
    }
    (!is_led(shared)).then(|| "a partition held here has no leader".to_owned())
}

/// Whether every group held here has a leader, but for those that are damaged and have no other replica.
fn is_led(shared: &Shared) -> bool {
    let meta = shared.meta();
    let mine = meta.groups.iter().filter(|(_, a)| a.replica_on(shared.broker).is_some());
    meta.broker(shared.broker).is_some()
        && shared.controller().is_some()
        && mine
            .clone()
            .all(|(id, _)| shared.leader(GroupId(*id)).is_some() || shared.not_opened.contains(&GroupId(*id)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_core::meta::state::{Subscription, Topic};

    fn names_with(metrics: &Metrics, part: &str) -> Vec<String> {
        let text = TextEncoder::new().encode_to_string(&metrics.series.registry.gather()).unwrap();
        text.lines().filter(|l| !l.starts_with('#') && l.contains(part)).map(str::to_owned).collect()
    }

    #[test]
    fn series_of_what_was_deleted_or_is_internal_are_removed_and_the_others_stay() {
        let metrics = Metrics::new(PathBuf::from("/"));
        let mut meta = MetaState::default();
        let internal = names::scheduled(7);
        for name in ["default/kept", "default/gone", &internal] {
            metrics.published(name, 1, 1, std::time::Instant::now());
            metrics.fetched(name, &[v1::Batch::default()]);
            for outcome in ["moved", "dropped"] {
                metrics.dead_letters.with_label_values(&[name, outcome]).inc();
            }
            metrics.pushed.with_label_values(&[name, "taken"]).inc();
            metrics.unfiltered.with_label_values(&[name]).inc();
            let g = &metrics.partitions;
            for vec in [&g.term, &g.replicas, &g.in_sync, &g.high_watermark, &g.log_bytes] {
                vec.with_label_values(&[name, "0"]).set(1);
            }
            g.lag_bytes.with_label_values(&[name, "0", "1"]).set(1);
            for vec in [&g.backlog, &g.backlog_bytes, &g.oldest_seconds] {
                vec.with_label_values(&[name, "default/kept", "0"]).set(1);
            }
        }
        metrics.rejected.with_label_values(&["NO_TOPIC"]).inc();
        for name in ["default/kept", &internal] {
            meta.topics.insert(name.to_owned(), Topic::default());
            meta.subscriptions.insert(name.to_owned(), Subscription::default());
        }
        let kept = names_with(&metrics, "\"default/kept\"").len();
        assert_eq!(
            names_with(&metrics, "\"default/gone\"").len(),
            17,
            "every metric with a label of this kind is here"
        );
        metrics.series.keep_existing(&meta);
        assert_eq!(names_with(&metrics, "\"default/gone\""), [""; 0]);
        assert_eq!(names_with(&metrics, names::INTERNAL_NAMESPACE), [""; 0]);
        // of a subscription that was deleted, those about its kept topic go too
        assert_eq!(names_with(&metrics, "\"default/kept\"").len(), kept - 6);
        assert_eq!(names_with(&metrics, "reason=\"NO_TOPIC\"").len(), 1);
        // published to again under its name, it counts from the beginning
        metrics.published("default/gone", 3, 1, std::time::Instant::now());
        assert_eq!(names_with(&metrics, "weir_records_in_total{topic=\"default/gone\"} 3").len(), 1);
    }
}
