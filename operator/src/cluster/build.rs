//! The objects a StreamCluster owns, built from its spec and from what the plan decided. Pure; they cannot fail.

use super::names::{ADMIN_PORT, CLIENT_PORT, CLUSTER_LABEL, METRICS_PORT, Names, PEER_PORT};
use super::plan::Wanted;
use crate::context::Settings;
use k8s_openapi::api::apps::v1::{
    StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMap, ConfigMapKeySelector, Container, ContainerPort, EnvVar, EnvVarSource,
    HTTPGetAction, ObjectFieldSelector, PersistentVolumeClaim, PersistentVolumeClaimSpec, PodAffinityTerm,
    PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    SecurityContext, Service, ServiceAccount, ServicePort, ServiceSpec, TopologySpreadConstraint, VolumeMount,
    VolumeResourceRequirements, WeightedPodAffinityTerm,
};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Resource as _;
use std::collections::BTreeMap;
use weir_crds::{DeletionPolicy, StreamCluster};

/// Node label of zones where the spec names no other.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// User and group brokers run as.
const USER: i64 = 65_532;

/// Everything a cluster owns, in the order it is applied.
pub struct Children {
    /// Brokers' identity; it may do nothing.
    pub account: ServiceAccount,
    /// What brokers read at start, and what may change without a roll.
    pub config: ConfigMap,
    /// Names of brokers, clients' entrance, administrators' entrance.
    pub services: [Service; 3],
    /// One broker down at a time.
    pub budget: PodDisruptionBudget,
    /// Who may speak to which port.
    pub policy: NetworkPolicy,
    /// The brokers.
    pub brokers: StatefulSet,
}

/// Builds them.
pub fn children(cluster: &StreamCluster, names: &Names, wanted: &Wanted, settings: &Settings) -> Children {
    let meta = |name: String| ObjectMeta {
        name: Some(name),
        namespace: Some(names.namespace.clone()),
        labels: Some(names.labels()),
        owner_references: cluster.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..Default::default()
    };
    Children {
        account: ServiceAccount {
            metadata: meta(names.config()),
            automount_service_account_token: Some(false),
            ..Default::default()
        },
        config: ConfigMap {
            metadata: meta(names.config()),
            data: Some(config(cluster, names, wanted, settings)),
            ..Default::default()
        },
        services: [
            service(meta(names.headless()), names, &PORTS, true),
            service(meta(names.client()), names, &PORTS[..1], false),
            service(meta(names.admin()), names, &PORTS[2..3], false),
        ],
        budget: PodDisruptionBudget {
            metadata: meta(names.config()),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                selector: Some(names.label_selector()),
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        },
        policy: NetworkPolicy { metadata: meta(names.config()), spec: Some(network(names)) },
        brokers: StatefulSet {
            metadata: meta(names.stateful_set()),
            spec: Some(stateful_set(cluster, names, wanted, settings)),
            ..Default::default()
        },
    }
}

const PORTS: [(&str, i32); 4] =
    [("grpc", CLIENT_PORT), ("grpc-peer", PEER_PORT), ("grpc-admin", ADMIN_PORT), ("metrics", METRICS_PORT)];

fn config(cluster: &StreamCluster, names: &Names, wanted: &Wanted, settings: &Settings) -> BTreeMap<String, String> {
    let peer = |ordinal| {
        let broker = names.broker(ordinal);
        format!("{broker}={}:{PEER_PORT}", names.broker_host(&broker, &settings.domain))
    };
    let peers: Vec<String> = (0..wanted.peers).map(peer).collect();
    BTreeMap::from([
        ("peers".to_owned(), peers.join(",")),
        ("clusterId".to_owned(), wanted.cluster_id.clone()),
        ("log".to_owned(), cluster.spec.log_level.clone()),
    ])
}

fn service(metadata: ObjectMeta, names: &Names, ports: &[(&str, i32)], headless: bool) -> Service {
    let port = |(name, port): &(&str, i32)| ServicePort {
        name: Some((*name).to_owned()),
        port: *port,
        target_port: Some(IntOrString::String((*name).to_owned())),
        app_protocol: name.starts_with("grpc").then(|| "kubernetes.io/h2c".to_owned()),
        ..Default::default()
    };
    Service {
        metadata,
        spec: Some(ServiceSpec {
            selector: Some(names.selector()),
            ports: Some(ports.iter().map(port).collect()),
            cluster_ip: headless.then(|| "None".to_owned()),
            // brokers find each other before they are ready: being ready takes all of them
            publish_not_ready_addresses: headless.then_some(true),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn network(names: &Names) -> NetworkPolicySpec {
    let port = |port: i32| NetworkPolicyPort { port: Some(IntOrString::Int(port)), ..Default::default() };
    let anywhere = |p: i32| NetworkPolicyIngressRule { ports: Some(vec![port(p)]), from: None };
    let brokers = NetworkPolicyPeer { pod_selector: Some(names.label_selector()), ..Default::default() };
    let operator = NetworkPolicyPeer {
        namespace_selector: Some(LabelSelector::default()),
        pod_selector: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([("app.kubernetes.io/name".to_owned(), "weir-operator".to_owned())])),
            ..Default::default()
        }),
        ..Default::default()
    };
    NetworkPolicySpec {
        pod_selector: Some(names.label_selector()),
        policy_types: Some(vec!["Ingress".to_owned()]),
        ingress: Some(vec![
            anywhere(CLIENT_PORT),
            anywhere(METRICS_PORT),
            NetworkPolicyIngressRule { ports: Some(vec![port(PEER_PORT)]), from: Some(vec![brokers.clone()]) },
            NetworkPolicyIngressRule { ports: Some(vec![port(ADMIN_PORT)]), from: Some(vec![brokers, operator]) },
        ]),
        ..Default::default()
    }
}

fn stateful_set(cluster: &StreamCluster, names: &Names, wanted: &Wanted, settings: &Settings) -> StatefulSetSpec {
    let when_deleted = match cluster.spec.deletion_policy {
        DeletionPolicy::Retain => "Retain",
        DeletionPolicy::Delete => "Delete",
    };
    StatefulSetSpec {
        service_name: Some(names.headless()),
        replicas: Some(wanted.pods),
        selector: names.label_selector(),
        // a cluster forms when all its brokers answer, so all start at once
        pod_management_policy: Some("Parallel".to_owned()),
        // pods are replaced by the operator, which knows when the next may go
        update_strategy: Some(StatefulSetUpdateStrategy { type_: Some("OnDelete".to_owned()), ..Default::default() }),
        // a broker is gone for good once it was drained: its volume holds nothing, and its identity must not come back
        persistent_volume_claim_retention_policy: Some(StatefulSetPersistentVolumeClaimRetentionPolicy {
            when_deleted: Some(when_deleted.to_owned()),
            when_scaled: Some("Delete".to_owned()),
        }),
        revision_history_limit: Some(3),
        template: PodTemplateSpec {
            metadata: Some(ObjectMeta { labels: Some(names.labels()), ..Default::default() }),
            spec: Some(pod(cluster, names, settings)),
        },
        volume_claim_templates: Some(vec![claim(cluster, wanted)]),
        ..Default::default()
    }
}

fn claim(cluster: &StreamCluster, wanted: &Wanted) -> PersistentVolumeClaim {
    PersistentVolumeClaim {
        metadata: ObjectMeta { name: Some("data".to_owned()), ..Default::default() },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: cluster.spec.storage.class_name.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some(quantities([("storage", wanted.template_storage.as_str())])),
                ..Default::default()
            }),
            volume_mode: Some("Filesystem".to_owned()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn quantities<const N: usize>(list: [(&str, &str); N]) -> BTreeMap<String, Quantity> {
    list.into_iter().map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned()))).collect()
}

fn default_resources() -> ResourceRequirements {
    ResourceRequirements {
        requests: Some(quantities([("cpu", "250m"), ("memory", "512Mi")])),
        limits: Some(quantities([("memory", "2Gi")])),
        ..Default::default()
    }
}

fn pod(cluster: &StreamCluster, names: &Names, settings: &Settings) -> PodSpec {
    let spec = &cluster.spec;
    let zone = spec.placement.zone_label.as_deref().unwrap_or(ZONE_LABEL);
    let spread = |key: &str| TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(names.label_selector()),
        ..Default::default()
    };
    let apart = WeightedPodAffinityTerm {
        weight: 100,
        pod_affinity_term: PodAffinityTerm {
            label_selector: Some(names.label_selector()),
            topology_key: "kubernetes.io/hostname".to_owned(),
            ..Default::default()
        },
    };
    PodSpec {
        service_account_name: Some(names.config()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        // leadership moves first; what is under way is finished
        termination_grace_period_seconds: Some(60),
        node_selector: (!spec.placement.node_selector.is_empty()).then(|| spec.placement.node_selector.clone()),
        tolerations: (!spec.placement.tolerations.is_empty()).then(|| spec.placement.tolerations.clone()),
        topology_spread_constraints: Some(vec![spread(zone), spread("kubernetes.io/hostname")]),
        affinity: Some(Affinity {
            pod_anti_affinity: Some(PodAntiAffinity {
                preferred_during_scheduling_ignored_during_execution: Some(vec![apart]),
                ..Default::default()
            }),
            ..Default::default()
        }),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..Default::default() }),
            ..Default::default()
        }),
        containers: vec![container(cluster, names, settings)],
        ..Default::default()
    }
}

fn container(cluster: &StreamCluster, names: &Names, settings: &Settings) -> Container {
    let spec = &cluster.spec;
    let from_config = |name: &str, key: &str| EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            config_map_key_ref: Some(ConfigMapKeySelector {
                name: names.config(),
                key: key.to_owned(),
                optional: Some(false),
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let pod_name = EnvVar {
        name: "WEIR_NAME".to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: "metadata.name".to_owned(), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let port = |(name, port): (&str, i32)| ContainerPort {
        name: Some(name.to_owned()),
        container_port: port,
        ..Default::default()
    };
    let probe = |path: &str, period_seconds: i32, failure_threshold: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("metrics".to_owned()),
            ..Default::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(5),
        failure_threshold: Some(failure_threshold),
        ..Default::default()
    };
    let args = [
        "--data=/data".to_owned(),
        format!("--client-listen=0.0.0.0:{CLIENT_PORT}"),
        format!("--peer-listen=0.0.0.0:{PEER_PORT}"),
        format!("--admin-listen=0.0.0.0:{ADMIN_PORT}"),
        format!("--metrics-listen=0.0.0.0:{METRICS_PORT}"),
        format!("--advertise-host={}", names.broker_host("$(WEIR_NAME)", &settings.domain)),
    ];
    Container {
        name: "broker".to_owned(),
        image: Some(spec.image.clone().unwrap_or_else(|| settings.image.clone())),
        image_pull_policy: Some(spec.image_pull_policy.clone().unwrap_or_else(|| settings.image_pull_policy.clone())),
        command: Some(vec!["/usr/local/bin/weir-broker".to_owned()]),
        args: Some(args.into()),
        env: Some(vec![
            pod_name,
            from_config("WEIR_PEERS", "peers"),
            from_config("WEIR_CLUSTER_ID", "clusterId"),
            from_config("WEIR_LOG", "log"),
        ]),
        ports: Some(PORTS.into_iter().map(port).collect()),
        // opening a large log takes a while; before that the process answers nothing
        startup_probe: Some(probe("/livez", 2, 150)),
        liveness_probe: Some(probe("/livez", 10, 6)),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        resources: Some(spec.resources.clone().unwrap_or_else(default_resources)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Default::default() }),
            ..Default::default()
        }),
        volume_mounts: Some(vec![VolumeMount {
            name: "data".to_owned(),
            mount_path: "/data".to_owned(),
            ..Default::default()
        }]),
        ..Default::default()
    }
}

/// The label every watched child has.
pub fn watch_label() -> String {
    CLUSTER_LABEL.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_crds::StreamClusterSpec;

    fn built(spec: StreamClusterSpec) -> Children {
        let mut cluster = StreamCluster::new("default", spec);
        cluster.metadata.namespace = Some("shop".to_owned());
        cluster.metadata.uid = Some("uid-1".to_owned());
        let settings = Settings {
            image: "weir:0.1.0".to_owned(),
            image_pull_policy: "IfNotPresent".to_owned(),
            domain: "cluster.local".to_owned(),
        };
        let pods = cluster.spec.brokers;
        let template_storage = cluster.spec.storage.size.clone();
        let wanted = Wanted { pods, peers: pods, cluster_id: "c1".to_owned(), template_storage };
        children(&cluster, &Names::new("shop", "default"), &wanted, &settings)
    }

    fn recorded(c: &Children) -> String {
        let yaml = |value: serde_json::Value| serde_yaml_ng::to_string(&value).unwrap();
        let mut documents = vec![yaml(serde_json::to_value(&c.account).unwrap())];
        documents.push(yaml(serde_json::to_value(&c.config).unwrap()));
        documents.extend(c.services.iter().map(|s| yaml(serde_json::to_value(s).unwrap())));
        documents.push(yaml(serde_json::to_value(&c.budget).unwrap()));
        documents.push(yaml(serde_json::to_value(&c.policy).unwrap()));
        documents.push(yaml(serde_json::to_value(&c.brokers).unwrap()));
        documents.join("---\n")
    }

    fn spec(text: &str) -> StreamClusterSpec {
        serde_yaml_ng::from_str(text).unwrap()
    }

    #[test]
    fn every_child_object_is_as_recorded() {
        insta::assert_snapshot!(recorded(&built(spec("{brokers: 3, storage: {size: 10Gi}}"))));
    }

    #[test]
    fn every_child_object_is_as_recorded_where_everything_is_said() {
        let everything = spec(
            "brokers: 5
image: registry.example/weir:2
imagePullPolicy: Always
storage: {size: 1Ti, className: fast}
resources: {requests: {cpu: '2', memory: 4Gi}, limits: {memory: 4Gi}}
placement:
  nodeSelector: {disk: ssd}
  tolerations: [{key: streams, operator: Exists, effect: NoSchedule}]
  zoneLabel: rack
allowedNamespaces: [shop, bank]
topicDefaults: {replicas: 5, retention: {time: 7d}}
deletionPolicy: Delete
logLevel: warn,weir=debug
",
        );
        insta::assert_snapshot!(recorded(&built(everything)));
    }

    #[test]
    fn every_child_object_of_one_broker_is_as_recorded() {
        insta::assert_snapshot!(recorded(&built(spec("{brokers: 1}"))));
    }
}
