//! StreamCluster: the brokers.

use crate::{DeletionPolicy, Retention, SIZE_PATTERN};
use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration};
use k8s_openapi::api::networking::v1::NetworkPolicyPeer;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use weir_proto::limits;

/// A cluster of brokers.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "StreamCluster",
    namespaced,
    shortname = "wsc",
    category = "weir",
    status = "StreamClusterStatus",
    doc = "A cluster of brokers that hold topics. Scale it with kubectl scale: replicas move onto new brokers, and a broker is drained before it goes.",
    scale(
        spec_replicas_path = ".spec.brokers",
        status_replicas_path = ".status.brokers",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Brokers", type_ = "integer", json_path = ".spec.brokers"),
    printcolumn(name = "Available", type_ = "integer", json_path = ".status.readyBrokers"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Moves", type_ = "integer", json_path = ".status.moves.running"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.topicDefaults) || !has(self.topicDefaults.replicas) || self.topicDefaults.replicas <= self.brokers").message("topicDefaults.replicas cannot be more than brokers"))]
pub struct StreamClusterSpec {
    /// Number of brokers, each a pod with a volume of its own. Three survive the loss of one.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 99))]
    pub brokers: i32,
    /// The brokers' image. Absent: the one the operator was installed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// When the image is pulled: `Always`, `IfNotPresent` or `Never`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    /// Secrets of the cluster's namespace with which the image is pulled from a private registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Each broker's volume.
    #[serde(default)]
    pub storage: Storage,
    /// Processor and memory of each broker. Absent: requests of 250m and 512Mi, and a memory limit of 2Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// On which nodes brokers run, and how they spread.
    #[serde(default)]
    pub placement: Placement,
    /// Namespaces, besides its own, whose Topics and Subscriptions may use this cluster; `*` for all.
    #[serde(default)]
    pub allowed_namespaces: Vec<String>,
    /// Which pods may reach the brokers' ports.
    #[serde(default)]
    pub network_policy: NetworkPolicy,
    /// What Topics get that do not say it themselves.
    #[serde(default)]
    pub topic_defaults: TopicDefaults,
    /// What becomes of the volumes when the StreamCluster is deleted. With `Retain` a StreamCluster of the same name takes them over.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// Leave everything as it is until this is false again. Brokers go on serving.
    #[serde(default)]
    pub paused: bool,
    /// What brokers log, such as `info` or `info,weir_core=debug`.
    #[serde(default = "info")]
    #[schemars(length(min = 1, max = 200))]
    pub log_level: String,
}

/// A broker's volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.className) == has(oldSelf.className) && (!has(self.className) || self.className == oldSelf.className)").message("className cannot change: volumes cannot move between classes"))]
pub struct Storage {
    /// Its size, `1Gi` at least: what the file system takes for itself comes off it, and a broker does not start on less than 512 MiB.
    /// May grow where the storage class allows it, never shrink.
    #[schemars(regex(pattern = SIZE_PATTERN))]
    #[serde(default = "ten_gi")]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity(oldSelf)) >= 0").message("storage can grow, never shrink"))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('1Gi')) >= 0").message("storage is 1Gi at least"))]
    pub size: String,
    /// Its storage class. Absent: the cluster's default class. Cannot change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_name: Option<String>,
}

impl Default for Storage {
    fn default() -> Self {
        Self { size: ten_gi(), class_name: None }
    }
}

/// Where brokers run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Placement {
    /// Labels a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints brokers put up with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Node label of the failure domain that replicas are spread over. Absent: `topology.kubernetes.io/zone`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone_label: Option<String>,
}

/// Which pods may reach the brokers' ports, where the network plugin carries out NetworkPolicies. The port of brokers among each other
/// is open to them alone, and the administrators' port to them and to the operator in its namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkPolicy {
    /// Make a NetworkPolicy. Where this is false, write one of your own: whoever reaches the administrators' port may delete topics.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Who may reach the clients' port, as in a NetworkPolicy's `from`. Absent or empty: anybody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<NetworkPolicyPeer>,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self { enabled: true, from: Vec::new() }
    }
}

/// Defaults for Topics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TopicDefaults {
    /// Copies of each partition: 1, 3, 5 or 7.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = limits::REPLICAS.min, max = limits::REPLICAS.max))]
    #[x_kube(validation = Rule::new("self % 2 == 1").message("use 1, 3, 5 or 7 replicas: an even number survives no more failures than one less"))]
    pub replicas: Option<u32>,
    /// How long records are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

/// How a cluster stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamClusterStatus {
    /// The generation of the spec that was seen last; also where `spec.paused` holds back what it asks for.
    pub observed_generation: Option<i64>,
    /// `Ready`: it serves. `Progressing`: brokers are added, drained or rolled. `Degraded`: a partition lacks a leader or a replica.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Id of the cluster, given when it formed.
    pub cluster_id: Option<String>,
    /// Where services publish and subscribe, `host:port`.
    pub address: Option<String>,
    /// Broker pods there are.
    pub brokers: Option<i32>,
    /// Of them, those that are ready.
    pub ready_brokers: Option<i32>,
    /// Selects the broker pods.
    pub selector: Option<String>,
    /// Partitions in all.
    pub partitions: Option<i32>,
    /// Partitions that have no leader now.
    pub leaderless: Option<i32>,
    /// Partitions with fewer replicas in sync than wanted.
    pub under_replicated: Option<i32>,
    /// Replicas on their way between brokers.
    pub moves: Option<Moves>,
    /// The brokers, as the cluster itself knows them.
    #[serde(default)]
    pub members: Vec<Member>,
}

/// Replicas on their way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Moves {
    /// Replicas still on brokers that are drained.
    pub planned: i32,
    /// Partitions whose membership is changing now.
    pub running: i32,
    /// What the new replicas lack, estimated, for people.
    pub bytes_left: String,
}

/// A broker as the cluster knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its id, never used again.
    pub id: i64,
    /// Its name, which is its pod's.
    pub name: String,
    /// `active`, `draining`, `lost` or `expected`.
    pub phase: String,
    /// Its failure domain.
    #[serde(default)]
    pub zone: String,
    /// Partitions it leads.
    pub leads: i32,
    /// Replicas it holds.
    pub replicas: i32,
}

fn yes() -> bool {
    true
}

fn three() -> i32 {
    3
}

fn ten_gi() -> String {
    "10Gi".to_owned()
}

fn info() -> String {
    "info".to_owned()
}
