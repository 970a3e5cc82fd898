//! The resources people declare, group `weir.dev/v1alpha1`: the same types for Kubernetes and for a folder of manifests,
//! so that both share their validation. What is said here on a field is what `kubectl explain` says.

#![allow(unreachable_pub)] // what KubeSchema derives holds a copy of each type
#![allow(clippy::duplicated_attributes)] // printer columns are alike

pub mod cluster;
pub mod duration;
pub mod manifest;
pub mod quantity;
mod wording;
mod yaml;

pub use cluster::{StreamCluster, StreamClusterSpec, StreamClusterStatus};
pub use yaml::crd_files;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use weir_proto::limits::{self, Limit, OutOfBounds};
use weir_proto::{names, v1};

/// Durations as users write them, zero included: `90s`, `12h`, `7d`.
pub const DURATION_PATTERN: &str = "^([0-9]+(ms|s|m|h|d|w))+$";
/// The same, longer than nothing.
pub const DURATION_SET_PATTERN: &str =
    "^([0-9]+(ms|s|m|h|d|w))*[0-9]*[1-9][0-9]*(ms|s|m|h|d|w)([0-9]+(ms|s|m|h|d|w))*$";
/// Times in UTC: `2026-01-31T08:00:00Z`.
pub const TIME_PATTERN: &str = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]+)?Z$";
/// Sizes as people write them: `512Mi`, `10Gi`.
pub const SIZE_PATTERN: &str = "^[0-9]+(Ki|Mi|Gi|Ti|k|M|G|T)?$";
/// Characters of a duration, time or size.
const WRITTEN_MAX: usize = 64;
/// Replicas where neither the topic nor its cluster says how many.
pub const REPLICAS_DEFAULT: u32 = 3;

/// When a publish is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Durability {
    /// Once a majority of the replicas has it synced to disk.
    #[default]
    QuorumSync,
    /// Once a majority of the replicas has it in memory: faster, and lost where a majority loses power at once.
    QuorumMemory,
}

/// What becomes of the data when the resource is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It stays; a resource of the same name takes it over again.
    #[default]
    Retain,
    /// It is deleted too.
    Delete,
}

/// How long records are kept. Records that a subscription has not acknowledged are kept in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retention {
    /// Records older than this may go, such as `7d` or `12h`; `1s` to `36500d`. Absent: no limit by time.
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = DURATION_SET_PATTERN))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// A partition larger than this loses its oldest records, such as `10Gi`; `1024Ti` at most. Absent: no limit by size.
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = SIZE_PATTERN))]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('0')) > 0 && quantity(self).compareTo(quantity('1024Ti')) <= 0").message("retention.bytes is 1 to 1024Ti; leave it out for no limit"))]
    pub bytes: Option<String>,
}

/// Which StreamCluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterRef {
    /// Its name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Its namespace, which it must allow in `allowedNamespaces`. Absent: the resource's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// A stream of records in partitions, each replicated on several brokers.
///
/// Publish to it as `namespace/name`, or by its name alone in the namespace `default`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "Topic",
    namespaced,
    shortname = "wt",
    category = "weir",
    status = "TopicStatus",
    doc = "A stream of records in partitions, each replicated on several brokers. Services publish to it over gRPC; Subscriptions read it.",
    printcolumn(name = "Partitions", type_ = "integer", json_path = ".spec.partitions"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.clusterRef) == has(oldSelf.clusterRef) && (!has(self.clusterRef) || self.clusterRef == oldSelf.clusterRef)").message("clusterRef cannot change: make a new topic and move its readers"))]
pub struct TopicSpec {
    /// Number of partitions, 1 to 10000. May grow, never shrink; a key's records keep their order within one number of partitions.
    #[serde(default = "one")]
    #[schemars(range(min = limits::PARTITIONS.min, max = limits::PARTITIONS.max))]
    #[x_kube(validation = Rule::new("self >= oldSelf").message("partitions can grow, never shrink: records would lose their place"))]
    pub partitions: u32,
    /// Copies of each partition, on different brokers: 1, 3, 5 or 7. With three, one broker may fail and nothing stops.
    /// Absent: what the cluster says in `topicDefaults`, else 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::REPLICAS.min, max = limits::REPLICAS.max))]
    #[x_kube(validation = Rule::new("self % 2 == 1").message("use 1, 3, 5 or 7 replicas: an even number survives no more failures than one less"))]
    pub replicas: Option<u32>,
    /// How long records are kept. Absent: what the cluster says in `topicDefaults`, else for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// When a publish is acknowledged: `quorumSync` (the default), once a majority of the replicas has it synced to disk;
    /// `quorumMemory`, once a majority has it in memory: faster, and lost where a majority loses power at once.
    #[serde(default)]
    pub durability: Durability,
    /// Largest record batch taken, such as `1Mi` (the default); `64` to `32Mi`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = SIZE_PATTERN))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('32Mi')) <= 0 && quantity(self).compareTo(quantity('64')) >= 0").message("maxMessageBytes is 64 to 32Mi"))]
    pub max_message_bytes: Option<String>,
    /// The StreamCluster that holds it. Absent: the one called `default` in the topic's namespace. Cannot change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_ref: Option<ClusterRef>,
    /// What becomes of the records when the Topic is deleted: with `Retain` (the default) they stay, and a Topic of the same name
    /// takes them over; with `Delete` they go, and with them the positions of its Subscriptions: on a Topic made again under the
    /// name they begin as new ones.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// How a topic stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopicStatus {
    /// The generation of the spec that was applied.
    pub observed_generation: Option<i64>,
    /// `Ready`: it takes records. `Degraded`: some partition lacks a leader or a replica.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Copies of each partition, as applied.
    pub replicas: Option<u32>,
    /// Partitions that have no leader now.
    pub leaderless: Option<u32>,
    /// Partitions with fewer replicas in sync than wanted.
    pub under_replicated: Option<u32>,
    /// Bytes of log kept in all partitions, on each replica, for people. Measured at `measuredAt`: metrics are newer.
    pub size: Option<String>,
    /// When `size` was measured: every five minutes, and whenever something else in the status changes.
    pub measured_at: Option<Time>,
    /// The first hundred partitions.
    #[serde(default)]
    pub partitions: Vec<TopicPartitionStatus>,
}

/// How a partition stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopicPartitionStatus {
    /// Its number.
    pub partition: u32,
    /// Name of the broker that leads it.
    pub leader: Option<String>,
    /// Names of the brokers whose replicas have nearly all of it.
    pub in_sync: Vec<String>,
}

/// Where a new subscription starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum StartPosition {
    /// With records published after it was made.
    #[default]
    Latest,
    /// With the oldest record kept.
    Earliest,
}

/// How messages are shared among a subscription's consumers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// One consumer at a time, in order; others are refused.
    #[default]
    Exclusive,
    /// One consumer is active, in order; the next takes over when it goes.
    Failover,
    /// Each message goes to one consumer, in no order.
    Shared,
    /// A key's messages go to one consumer at a time, in order.
    KeyShared,
}

/// When a message comes again that was not acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Redelivery {
    /// Wait before the first redelivery, such as `1s`; it doubles with each; `1d` at most. Absent: none.
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = DURATION_PATTERN))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_backoff: Option<String>,
    /// Longest wait, such as `5m`, not below `minBackoff`; `1d` at most. Absent: `1m`, or `minBackoff` where that is longer.
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = DURATION_SET_PATTERN))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_backoff: Option<String>,
}

/// A reader of a topic whose position Weir keeps: what it has not acknowledged comes again.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "Subscription",
    namespaced,
    shortname = "wsub",
    category = "weir",
    status = "SubscriptionStatus",
    doc = "A reader of a topic whose position Weir keeps: what it has not acknowledged comes again. New ones need no change at the publisher.",
    printcolumn(name = "Topic", type_ = "string", json_path = ".spec.topic"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Backlog", type_ = "integer", json_path = ".status.backlog"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.clusterRef) == has(oldSelf.clusterRef) && (!has(self.clusterRef) || self.clusterRef == oldSelf.clusterRef)").message("clusterRef cannot change: make a new subscription"))]
#[x_kube(validation = Rule::new("!has(self.priorities) || !self.priorities || self.mode == 'shared'").message("priorities need mode shared: in the others order is kept"))]
pub struct SubscriptionSpec {
    /// The topic's name, in the same namespace, or `namespace/name`; or a pattern of one namespace's topics: of the words between dots
    /// `*` stands for one and `#` for any number, as in `orders.*`. Topics that come later are read from their beginning. Cannot change.
    #[schemars(length(min = 1, max = 507))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("a subscription's topic cannot change: make a new subscription"))]
    pub topic: String,
    /// How messages are shared among consumers: `exclusive` (the default), one consumer, in order, others are refused; `failover`, one
    /// is active, in order, the next takes over; `shared`, each message to one consumer, in no order; `keyShared`, a key's messages
    /// to one consumer at a time, in order.
    #[serde(default)]
    pub mode: Mode,
    /// Where it starts when it is made: `latest` (the default), with messages published from then on; `earliest`, with the oldest kept.
    #[serde(default)]
    pub start: StartPosition,
    /// It starts with the first message appended at or after this time, such as `2026-01-31T08:00:00Z`, whatever `start` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = TIME_PATTERN))]
    pub start_time: Option<String>,
    /// How long a consumer may hold a message unacknowledged, such as `30s` (the default); `1ms` to `1d`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = DURATION_SET_PATTERN))]
    pub ack_deadline: Option<String>,
    /// When a message comes again that was refused or not acknowledged in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redelivery: Option<Redelivery>,
    /// Messages that consumers may hold unacknowledged at one time, in each partition. Absent: 100000.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::IN_FLIGHT.min, max = limits::IN_FLIGHT.max))]
    pub max_in_flight: Option<u32>,
    /// The same for one consumer. Absent: any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::IN_FLIGHT_MEMBER.min, max = limits::IN_FLIGHT_MEMBER.max))]
    pub max_in_flight_per_consumer: Option<u32>,
    /// Messages go out by their priority, the digit in their header `weir-priority`, 9 first; every eighth is the oldest, so that
    /// none waits for ever. Only with mode `shared`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub priorities: bool,
    /// Only messages whose header `weir-routing-key` matches one of these patterns are delivered: words between dots, `*` for one word,
    /// `#` for any number. Absent: all messages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::ROUTING_KEYS.max))]
    pub routing_keys: Vec<String>,
    /// For a service without a client: messages are POSTed to it as CloudEvents, and an answer of 2xx acknowledges. Absent: consumers
    /// come for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub push: Option<Push>,
    /// Only messages that meet this CEL expression are delivered; the others are passed over. It sees `key` (a string), `headers` (a
    /// map of strings), `timestamp` and `size` (bytes of the value), and is false where a header it asks for is missing:
    /// `headers.kind == "signup" && size < 10000`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = limits::FILTER.min, max = limits::FILTER.max))]
    pub filter: Option<String>,
    /// How fast messages are delivered, over all partitions: what a peak brings beyond that waits. Absent: as fast as they are taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// What becomes of a message whose delivery fails again and again. Absent: it is tried for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<DeadLetter>,
    /// The StreamCluster that holds the topic. Absent: the one called `default` in the subscription's namespace. Cannot change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_ref: Option<ClusterRef>,
    /// What becomes of the position when the Subscription is deleted: with `Delete` (the default) it goes; with `Retain` it stays,
    /// and goes on holding the topic's records, until a Subscription of the same name takes it over.
    #[serde(default = "delete")]
    pub deletion_policy: DeletionPolicy,
}

/// Where and how messages are pushed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Push {
    /// URL that messages are POSTed to, such as `http://mail.shop.svc/events`.
    #[schemars(length(max = limits::ENDPOINT.max), regex(pattern = "^https?://[^/ ]+"))]
    pub endpoint: String,
    /// Requests under way at one time from each partition, 1 (the default) to 100; in the modes `exclusive` and `failover` always 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::PUSH_CONCURRENCY.min, max = limits::PUSH_CONCURRENCY.max))]
    pub concurrency: Option<u32>,
    /// How long an answer may take, such as `10s` (the default); `1ms` to `10m`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = DURATION_SET_PATTERN))]
    pub timeout: Option<String>,
}

/// How fast messages are delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rate {
    /// Messages each second.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::MESSAGE_RATE.min, max = limits::MESSAGE_RATE.max))]
    pub messages_per_second: Option<u64>,
    /// Bytes of keys and values each second, such as `10Mi`; `1Ti` at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = WRITTEN_MAX), regex(pattern = SIZE_PATTERN))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('0')) > 0 && quantity(self).compareTo(quantity('1Ti')) <= 0").message("rate.bytesPerSecond is 1 to 1Ti; leave it out for any number"))]
    pub bytes_per_second: Option<String>,
    /// Messages that may go out at once after a pause. Absent: a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::BURST.min, max = limits::BURST.max))]
    pub burst: Option<u64>,
}

/// What becomes of a message whose delivery fails again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeadLetter {
    /// Deliveries that may fail (refused, not acknowledged in time, or the consumer went away).
    #[schemars(range(min = limits::DELIVERIES.min, max = limits::DELIVERIES.max))]
    pub max_deliveries: u32,
    /// The topic that takes it then, in the same namespace, or `namespace/name`, with its origin and the reason in headers. Absent: it
    /// is dropped. `weir subscription redrive` puts what lies there back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 507))]
    pub topic: Option<String>,
}

/// How a subscription stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SubscriptionStatus {
    /// The generation of the spec that was applied.
    pub observed_generation: Option<i64>,
    /// `Ready`: consumers can read it.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Messages not acknowledged, over all partitions. Measured at `measuredAt`, as the next two: metrics are newer.
    pub backlog: Option<i64>,
    /// About how much of the log they take, such as `1.5Mi`.
    pub backlog_size: Option<String>,
    /// Age of the oldest of them, seconds.
    pub oldest_unacked_seconds: Option<i64>,
    /// When these figures were measured: every five minutes, and whenever something else in the status changes.
    pub measured_at: Option<Time>,
}

fn one() -> u32 {
    1
}

fn delete() -> DeletionPolicy {
    DeletionPolicy::Delete
}

/// A topic that was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidatedTopic {
    /// `namespace/name`.
    pub name: String,
    /// As brokers take it.
    pub spec: v1::TopicSpec,
    /// Whether the resource says how many replicas it wants; otherwise the spec has [`REPLICAS_DEFAULT`].
    pub says_replicas: bool,
}

/// A subscription that was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidatedSubscription {
    /// `namespace/name`.
    pub name: String,
    /// As brokers take it.
    pub spec: v1::SubscriptionSpec,
}

/// A field that cannot be what it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// Its path, such as `spec.partitions`.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub message: String,
}

impl From<OutOfBounds> for Invalid {
    fn from(refused: OutOfBounds) -> Self {
        invalid(refused.limit.path, refused.message)
    }
}

fn invalid(field: &'static str, message: impl Into<String>) -> Invalid {
    Invalid { field, message: message.into() }
}

fn full_name(meta: &kube::core::ObjectMeta) -> Result<String, Invalid> {
    let name = meta.name.as_deref().ok_or_else(|| invalid("metadata.name", "is missing"))?;
    let namespace = meta.namespace.as_deref().unwrap_or(names::NAMESPACE_DEFAULT);
    for (field, part) in [("metadata.name", name), ("metadata.namespace", namespace)] {
        if !names::is_part(part) {
            return Err(invalid(field, names::refusal(part)));
        }
    }
    Ok(format!("{namespace}/{name}"))
}

/// A duration within its bounds, in ms. The refusal repeats what the user wrote.
fn millis(limit: Limit, text: &Option<String>) -> Result<Option<u64>, Invalid> {
    written(limit, text, duration::millis)
}

/// A size within its bounds, in bytes.
fn bytes(limit: Limit, text: &Option<String>) -> Result<Option<u64>, Invalid> {
    written(limit, text, quantity::bytes)
}

fn written(
    limit: Limit,
    text: &Option<String>,
    read: impl Fn(&str) -> Result<u64, String>,
) -> Result<Option<u64>, Invalid> {
    let Some(text) = text else { return Ok(None) };
    let value = read(text).map_err(|e| invalid(limit.path, e))?;
    match limit.check(value) {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(invalid(limit.path, format!("must be {}, not {text}", limit.bounds()))),
    }
}

fn time_ms(limit: Limit, text: &Option<String>) -> Result<Option<u64>, Invalid> {
    let Some(text) = text else { return Ok(None) };
    let since_epoch = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).ok();
    let read = humantime::parse_rfc3339(text).ok().and_then(since_epoch);
    match read.and_then(|d| u64::try_from(d.as_millis()).ok()) {
        Some(ms) => Ok(Some(limit.check(ms)?)),
        None => {
            let rule = "is not a time in UTC from 1970 to 9999, such as 2026-01-31T08:00:00Z";
            Err(invalid(limit.path, format!("'{text}' {rule}")))
        }
    }
}

impl Topic {
    /// Checks every field.
    pub fn validate(&self) -> Result<ValidatedTopic, Invalid> {
        let replicas = self.spec.replicas.unwrap_or(REPLICAS_DEFAULT);
        if replicas.is_multiple_of(2) || replicas > 7 {
            return Err(invalid(limits::REPLICAS.path, format!("must be 1, 3, 5 or 7, not {replicas}")));
        }
        let retention = self.spec.retention.clone().unwrap_or_default();
        let largest = bytes(limits::BATCH_BYTES, &self.spec.max_message_bytes)?;
        let spec = v1::TopicSpec {
            partitions: self.spec.partitions,
            replicas,
            retention_ms: millis(limits::RETENTION, &retention.time)?,
            retention_bytes: bytes(limits::RETENTION_BYTES, &retention.bytes)?,
            message_bytes_max: largest.map(|bytes| bytes as u32), // its bounds fit
            quorum_memory: self.spec.durability == Durability::QuorumMemory,
        };
        limits::check_topic(&spec)?;
        Ok(ValidatedTopic { name: full_name(&self.metadata)?, spec, says_replicas: self.spec.replicas.is_some() })
    }
}

impl Subscription {
    /// Checks every field.
    pub fn validate(&self) -> Result<ValidatedSubscription, Invalid> {
        let name = full_name(&self.metadata)?;
        let spec = &self.spec;
        if spec.topic.is_empty() {
            return Err(invalid("spec.topic", "is empty"));
        }
        let namespace = name.split('/').next().unwrap_or(names::NAMESPACE_DEFAULT);
        let in_namespace = |t: &String| if t.contains('/') { t.clone() } else { format!("{namespace}/{t}") };
        let topic = in_namespace(&spec.topic);
        let dead_letter = spec.dead_letter.as_ref();
        let dead_letter_topic = dead_letter.and_then(|d| d.topic.as_ref()).map(in_namespace).unwrap_or_default();
        if dead_letter_topic == topic {
            return Err(invalid("spec.deadLetter.topic", "a topic cannot take its own dead letters"));
        }
        if spec.filter.as_ref().is_some_and(String::is_empty) {
            return Err(limits::FILTER.refuse(format!("must have {} characters", limits::FILTER.bounds())).into());
        }
        if spec.priorities && spec.mode != Mode::Shared {
            return Err(invalid("spec.priorities", "needs mode shared: in the others order is kept"));
        }
        let push = |push: &Push| {
            if !push.endpoint.starts_with("http://") && !push.endpoint.starts_with("https://") {
                return Err(invalid(limits::ENDPOINT.path, "begins with http:// or https://"));
            }
            let timeout_ms = millis(limits::PUSH_TIMEOUT, &push.timeout)?;
            Ok(v1::Push { endpoint: push.endpoint.clone(), concurrency: push.concurrency, timeout_ms })
        };
        let rate = spec.rate.clone().unwrap_or_default();
        let redelivery = spec.redelivery.clone().unwrap_or_default();
        let wire = v1::SubscriptionSpec {
            topic,
            from_earliest: spec.start == StartPosition::Earliest,
            start_ms: time_ms(limits::START, &spec.start_time)?,
            ack_deadline_ms: millis(limits::ACK_DEADLINE, &spec.ack_deadline)?,
            mode: spec.mode as i32,
            backoff_min_ms: millis(limits::BACKOFF_MIN, &redelivery.min_backoff)?.unwrap_or(0),
            backoff_max_ms: millis(limits::BACKOFF_MAX, &redelivery.max_backoff)?,
            in_flight_max: spec.max_in_flight,
            deliveries_max: dead_letter.map(|d| d.max_deliveries),
            dead_letter_topic,
            filter: spec.filter.clone().unwrap_or_default(),
            messages_per_second: rate.messages_per_second,
            bytes_per_second: bytes(limits::BYTE_RATE, &rate.bytes_per_second)?,
            burst_messages: rate.burst,
            in_flight_member_max: spec.max_in_flight_per_consumer,
            priorities: spec.priorities,
            routing_keys: spec.routing_keys.clone(),
            push: spec.push.as_ref().map(push).transpose()?,
        };
        limits::check_subscription(&wire)?;
        Ok(ValidatedSubscription { name, spec: wire })
    }
}
