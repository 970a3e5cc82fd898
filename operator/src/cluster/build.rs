//! The objects a StreamCluster owns, built from its spec and from what the plan decided. Pure; they cannot fail.

use super::names::{ADMIN_PORT, CLIENT_PORT, CLUSTER_LABEL, METRICS_PORT, Names, PEER_PORT};
use super::plan::Wanted;
use crate::context::Settings;
use k8s_openapi::api::apps::v1::{
    StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMap, ConfigMapKeySelector, Container, ContainerPort, EnvVar, EnvVarSource,
    HTTPGetAction, LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements,
    SeccompProfile, SecurityContext, Service, ServiceAccount, ServicePort, ServiceSpec, TopologySpreadConstraint,
    VolumeMount, VolumeResourceRequirements, WeightedPodAffinityTerm,
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
/// User and group brokers run as, where the platform does not choose them.
const USER: i64 = 65_532;

/// Everything a cluster owns, in the order it is applied.
pub struct Children {
    /// Brokers' identity; it may do nothing.
    pub account: ServiceAccount,
    /// What brokers read at start, and what may change without a roll.
    pub config: ConfigMap,
    /// Names of brokers, clients' entrance, administrators' entrance.
    pub services: [Service; 3],
    /// One broker down at a time, and none while a replica is missing.
    pub budget: PodDisruptionBudget,
    /// Who may speak to which port, unless the spec wants no policy.
    pub policy: Option<NetworkPolicy>,
    /// The brokers.
    pub brokers: StatefulSet,
}

impl Children {
    /// Returns true if the budget lets a pod be evicted.
    pub fn allows_disruption(&self) -> bool {
        let most = self.budget.spec.as_ref().and_then(|s| s.max_unavailable.clone());
        most != Some(IntOrString::Int(0))
    }
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
    let unhealthy = if wanted.disruption.unready_may_go { "AlwaysAllow" } else { "IfHealthyBudget" };
    Children {
        account: ServiceAccount {
            metadata: meta(names.config()),
            automount_service_account_token: Some(false),
            image_pull_secrets: pull_secrets(cluster),
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
                max_unavailable: Some(IntOrString::Int(wanted.disruption.pods_max)),
                selector: Some(names.label_selector()),
                unhealthy_pod_eviction_policy: Some(unhealthy.to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        },
        policy: cluster
            .spec
            .network_policy
            .enabled
            .then(|| NetworkPolicy { metadata: meta(names.config()), spec: Some(network(cluster, names, settings)) }),
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

fn pull_secrets(cluster: &StreamCluster) -> Option<Vec<LocalObjectReference>> {
    let secrets = &cluster.spec.image_pull_secrets;
    (!secrets.is_empty()).then(|| secrets.clone())
}

fn network(cluster: &StreamCluster, names: &Names, settings: &Settings) -> NetworkPolicySpec {
    let port = |port: i32| NetworkPolicyPort { port: Some(IntOrString::Int(port)), ..Default::default() };
    let anywhere = |p: i32| NetworkPolicyIngressRule { ports: Some(vec![port(p)]), from: None };
    let brokers = NetworkPolicyPeer { pod_selector: Some(names.label_selector()), ..Default::default() };
    let operator = NetworkPolicyPeer {
        // by its name, which Kubernetes puts on it: a label of pods alone is anybody's to set
        namespace_selector: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([(
                "kubernetes.io/metadata.name".to_owned(),
                settings.namespace.clone(),
            )])),
            ..Default::default()
        }),
        pod_selector: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([("app.kubernetes.io/name".to_owned(), "weir-operator".to_owned())])),
            ..Default::default()
        }),
        ..Default::default()
    };
    let from = &cluster.spec.network_policy.from;
    let clients = NetworkPolicyIngressRule {
        ports: Some(vec![port(CLIENT_PORT)]),
        from: (!from.is_empty()).then(|| {
            // who administers the cluster asks the brokers as a client too, and they each other
            from.iter().cloned().chain([brokers.clone(), operator.clone()]).collect()
        }),
    };
    NetworkPolicySpec {
        pod_selector: Some(names.label_selector()),
        policy_types: Some(vec!["Ingress".to_owned()]),
        ingress: Some(vec![
            clients,
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
    let user = (!settings.arbitrary_user).then_some(USER);
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
        image_pull_secrets: pull_secrets(cluster),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: user,
            run_as_group: user,
            fs_group: user,
            fs_group_change_policy: user.map(|_| "OnRootMismatch".to_owned()),
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
    use crate::cluster::plan::Disruption;
    use weir_crds::StreamClusterSpec;

    fn built(spec: StreamClusterSpec) -> Children {
        built_on(spec, false)
    }

    fn built_on(spec: StreamClusterSpec, arbitrary_user: bool) -> Children {
        let mut cluster = StreamCluster::new("default", spec);
        cluster.metadata.namespace = Some("shop".to_owned());
        cluster.metadata.uid = Some("uid-1".to_owned());
        let settings = Settings {
            image: "weir:0.1.0".to_owned(),
            image_pull_policy: "IfNotPresent".to_owned(),
            domain: "cluster.local".to_owned(),
            namespace: "weir".to_owned(),
            arbitrary_user,
        };
        let pods = cluster.spec.brokers;
        let template_storage = cluster.spec.storage.size.clone();
        let disruption = Disruption { pods_max: 1, unready_may_go: pods == 1 };
        let wanted = Wanted { pods, peers: pods, cluster_id: "c1".to_owned(), template_storage, disruption };
        children(&cluster, &Names::new("shop", "default"), &wanted, &settings)
    }

    fn recorded(c: &Children) -> String {
        let yaml = |value: serde_json::Value| serde_yaml_ng::to_string(&value).unwrap();
        let mut documents = vec![yaml(serde_json::to_value(&c.account).unwrap())];
        documents.push(yaml(serde_json::to_value(&c.config).unwrap()));
        documents.extend(c.services.iter().map(|s| yaml(serde_json::to_value(s).unwrap())));
        documents.push(yaml(serde_json::to_value(&c.budget).unwrap()));
        documents.extend(c.policy.iter().map(|p| yaml(serde_json::to_value(p).unwrap())));
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
imagePullSecrets: [{name: registry}]
storage: {size: 1Ti, className: fast}
resources: {requests: {cpu: '2', memory: 4Gi}, limits: {memory: 4Gi}}
placement:
  nodeSelector: {disk: ssd}
  tolerations: [{key: streams, operator: Exists, effect: NoSchedule}]
  zoneLabel: rack
allowedNamespaces: [shop, bank]
networkPolicy: {from: [{namespaceSelector: {matchLabels: {team: shop}}}]}
topicDefaults: {replicas: 5, retention: {time: 7d}}
deletionPolicy: Delete
logLevel: warn,weir=debug
",
        );
        insta::assert_snapshot!(recorded(&built(everything)));
    }

    #[test]
    fn where_the_platform_chooses_users_pods_ask_for_none_and_stay_unprivileged() {
        let pod = |arbitrary| {
            let set = built_on(spec("{brokers: 3}"), arbitrary).brokers;
            set.spec.and_then(|s| s.template.spec).unwrap()
        };
        let user = |pod: &PodSpec| pod.security_context.as_ref().map(|c| (c.run_as_user, c.run_as_group, c.fs_group));
        assert_eq!(user(&pod(false)), Some((Some(USER), Some(USER), Some(USER))));
        let chosen = pod(true);
        assert_eq!(user(&chosen), Some((None, None, None)));
        let context = chosen.security_context.as_ref().unwrap();
        assert_eq!((context.run_as_non_root, context.fs_group_change_policy.as_ref()), (Some(true), None));
        let container = chosen.containers[0].security_context.as_ref().unwrap();
        assert_eq!((container.allow_privilege_escalation, container.run_as_user), (Some(false), None));
        // the rest of OpenShift's class restricted-v2
        assert_eq!((container.privileged, container.se_linux_options.as_ref()), (None, None));
        let capabilities = container.capabilities.as_ref().unwrap();
        assert_eq!((capabilities.drop.as_deref(), &capabilities.add), (Some(&["ALL".to_owned()][..]), &None));
        assert_eq!(context.seccomp_profile.as_ref().map(|p| p.type_.as_str()), Some("RuntimeDefault"));
        assert_eq!((chosen.host_network, chosen.host_pid, chosen.host_ipc), (None, None, None));
        assert_eq!(chosen.volumes, None, "its only volume is a claim");
        let ports = chosen.containers[0].ports.iter().flatten();
        assert!(ports.clone().count() == 4 && ports.clone().all(|p| p.host_port.is_none()));
    }

    #[test]
    fn a_private_registry_is_reached_by_pods_and_by_their_account() {
        let children = built(spec("{imagePullSecrets: [{name: registry}]}"));
        let pod = children.brokers.spec.and_then(|s| s.template.spec).unwrap();
        let named = |list: Option<Vec<LocalObjectReference>>| list.map(|l| l[0].name.clone());
        assert_eq!(named(pod.image_pull_secrets).as_deref(), Some("registry"));
        assert_eq!(named(children.account.image_pull_secrets).as_deref(), Some("registry"));
    }

    #[test]
    fn the_administrators_port_is_open_to_the_operator_of_its_own_namespace_only() {
        let rule = |children: &Children, wanted: i32| {
            let rules = children.policy.clone().unwrap().spec.unwrap().ingress.unwrap();
            let of = |r: &NetworkPolicyIngressRule| {
                r.ports.iter().flatten().any(|p| p.port == Some(IntOrString::Int(wanted)))
            };
            rules.into_iter().find(of).unwrap().from
        };
        let open = built(spec("{brokers: 3}"));
        for from in rule(&open, ADMIN_PORT).unwrap() {
            let name = |s: &LabelSelector| s.match_labels.as_ref()?.get("kubernetes.io/metadata.name").cloned();
            let namespace = from.namespace_selector.as_ref();
            // without a namespace selector only the policy's own namespace is meant
            assert!(namespace.is_none_or(|s| name(s).as_deref() == Some("weir")), "{from:?}");
        }
        assert_eq!(rule(&open, CLIENT_PORT), None, "anybody");
        let from = "{networkPolicy: {from: [{podSelector: {matchLabels: {app: shop}}}]}}";
        assert_eq!(rule(&built(spec(from)), CLIENT_PORT).unwrap().len(), 3, "those, brokers, and the operator");
        assert!(built(spec("{networkPolicy: {enabled: false}}")).policy.is_none());
    }

    #[test]
    fn every_child_object_of_one_broker_is_as_recorded() {
        insta::assert_snapshot!(recorded(&built(spec("{brokers: 1}"))));
    }
}
