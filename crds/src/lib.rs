//! The resources people declare, group `weir.dev/v1alpha1`: the same types for Kubernetes and for a folder of manifests,
//! so that both share their validation.

pub mod manifest;
pub mod quantity;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

/// How long records are kept. Records that a subscription has not acknowledged are kept in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retention {
    /// Records older than this may go, such as `7d` or `12h`. Absent: no limit by time.
    pub time: Option<String>,
    /// A partition larger than this loses its oldest records, such as `10Gi`. Absent: no limit by size.
    pub bytes: Option<String>,
}

/// A stream of records in partitions, each replicated on several brokers.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "weir.dev", version = "v1alpha1", kind = "Topic", namespaced, shortname = "wt", category = "weir")]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TopicSpec {
    /// Number of partitions. May grow, never shrink; a key's records keep their order within one number of partitions.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 10_000))]
    pub partitions: u32,
    /// Copies of each partition, on different brokers. With three, one broker may fail and nothing stops.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 7))]
    pub replicas: u32,
    /// How long records are kept. Absent: for ever.
    #[serde(default)]
    pub retention: Retention,
    /// When a publish is acknowledged.
    #[serde(default)]
    pub durability: Durability,
    /// Largest record batch taken, such as `1Mi` (the default).
    pub max_message_bytes: Option<String>,
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

/// How messages are shared among a subscription's consumers. More modes will come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// One consumer at a time, in order.
    #[default]
    Exclusive,
}

/// A reader of a topic whose position Weir keeps: what it has not acknowledged comes again.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "Subscription",
    namespaced,
    shortname = "wsub",
    category = "weir"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SubscriptionSpec {
    /// The topic's name, in the same namespace, or `namespace/name`.
    pub topic: String,
    /// How messages are shared among consumers.
    #[serde(default)]
    pub mode: Mode,
    /// Where it starts when it is made.
    #[serde(default)]
    pub start: StartPosition,
    /// How long a consumer may hold a message unacknowledged, such as `30s` (the default).
    pub ack_deadline: Option<String>,
}

fn one() -> u32 {
    1
}

fn three() -> u32 {
    3
}

/// A topic that was checked: plain numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedTopic {
    /// `namespace/name`.
    pub name: String,
    /// Partitions.
    pub partitions: u32,
    /// Replicas.
    pub replicas: u32,
    /// ms, 0 for no limit.
    pub retention_ms: u64,
    /// Bytes for each partition, 0 for no limit.
    pub retention_bytes: u64,
    /// Bytes, 0 for the default.
    pub message_bytes_max: u32,
    /// Acks wait for memory only.
    pub quorum_memory: bool,
}

/// A subscription that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedSubscription {
    /// `namespace/name`.
    pub name: String,
    /// The topic's `namespace/name`.
    pub topic: String,
    /// Starts with the oldest record.
    pub from_earliest: bool,
    /// ms, 0 for the default.
    pub ack_deadline_ms: u64,
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

fn invalid(field: &'static str, message: impl Into<String>) -> Invalid {
    Invalid { field, message: message.into() }
}

fn full_name(meta: &kube::core::ObjectMeta) -> Result<String, Invalid> {
    let name = meta.name.as_deref().filter(|n| !n.is_empty()).ok_or_else(|| invalid("metadata.name", "is missing"))?;
    Ok(format!("{}/{name}", meta.namespace.as_deref().unwrap_or("default")))
}

impl Topic {
    /// Checks every field.
    pub fn validate(&self) -> Result<ValidatedTopic, Invalid> {
        let spec = &self.spec;
        if !(1..=10_000).contains(&spec.partitions) {
            return Err(invalid("spec.partitions", format!("must be 1 to 10000, not {}", spec.partitions)));
        }
        if !(1..=7).contains(&spec.replicas) {
            return Err(invalid("spec.replicas", format!("must be 1 to 7, not {}", spec.replicas)));
        }
        let bytes = |field, text: &Option<String>| {
            text.as_deref().map_or(Ok(0), |t| quantity::bytes(t).map_err(|e| invalid(field, e)))
        };
        let largest = bytes("spec.maxMessageBytes", &spec.max_message_bytes)?;
        if largest > 32 << 20 {
            return Err(invalid("spec.maxMessageBytes", "must be 32Mi at most"));
        }
        Ok(ValidatedTopic {
            name: full_name(&self.metadata)?,
            partitions: spec.partitions,
            replicas: spec.replicas,
            retention_ms: millis("spec.retention.time", &spec.retention.time)?,
            retention_bytes: bytes("spec.retention.bytes", &spec.retention.bytes)?,
            message_bytes_max: largest as u32,
            quorum_memory: spec.durability == Durability::QuorumMemory,
        })
    }
}

impl Subscription {
    /// Checks every field.
    pub fn validate(&self) -> Result<ValidatedSubscription, Invalid> {
        let name = full_name(&self.metadata)?;
        if self.spec.topic.is_empty() {
            return Err(invalid("spec.topic", "is empty"));
        }
        let namespace = name.split('/').next().unwrap_or("default");
        let topic = if self.spec.topic.contains('/') {
            self.spec.topic.clone()
        } else {
            format!("{namespace}/{}", self.spec.topic)
        };
        Ok(ValidatedSubscription {
            topic,
            from_earliest: self.spec.start == StartPosition::Earliest,
            ack_deadline_ms: millis("spec.ackDeadline", &self.spec.ack_deadline)?,
            name,
        })
    }
}

fn millis(field: &'static str, text: &Option<String>) -> Result<u64, Invalid> {
    let Some(text) = text else { return Ok(0) };
    let parsed = humantime::parse_duration(text);
    let duration = parsed.map_err(|e| invalid(field, format!("'{text}' is not a duration such as 30s or 7d: {e}")))?;
    Ok(duration.as_millis() as u64)
}
