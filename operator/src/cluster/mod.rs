//! StreamCluster: dereference → plan → apply → ask the brokers → status. What is decided is decided in [`plan`].

pub mod build;
pub mod names;
pub mod plan;

use crate::apply;
use crate::brokers::BrokerError;
use crate::conditions::{Said, merge};
use crate::context::Context;
use build::Children;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::{Api, Resource as _, ResourceExt as _};
use names::Names;
use plan::{Call, Plan, PodSeen, Seen};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use weir_crds::{StreamCluster, quantity};
use weir_proto::v1;

/// Looked at again after this long, when nothing is under way.
const IDLE: Duration = Duration::from_secs(15);
/// Looked at again after this long, while something is.
const BUSY: Duration = Duration::from_secs(1);

/// A look takes no longer.
pub const LOOK_MAX: Duration = Duration::from_secs(20);

/// Why a look at a cluster failed. It is looked at again.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The API server.
    #[error("{doing}: {source}")]
    Kube { doing: &'static str, source: kube::Error },
    /// Something does not answer.
    #[error("a look took longer than {LOOK_MAX:?}")]
    TooLong,
    /// The brokers.
    #[error("{doing}: {source}")]
    Brokers { doing: &'static str, source: BrokerError },
}

fn kube(doing: &'static str) -> impl Fn(kube::Error) -> ClusterError {
    move |source| ClusterError::Kube { doing, source }
}

/// One look at a cluster, that ends within a bound: a request an API server swallowed must not be waited for for ever.
pub async fn reconcile(cluster: Arc<StreamCluster>, context: Arc<Context>) -> Result<Action, ClusterError> {
    let look = bring_about(cluster, context);
    tokio::time::timeout(LOOK_MAX, look).await.unwrap_or(Err(ClusterError::TooLong))
}

async fn bring_about(cluster: Arc<StreamCluster>, context: Arc<Context>) -> Result<Action, ClusterError> {
    let names = Names::new(&cluster.namespace().unwrap_or_default(), &cluster.name_any());
    if cluster.metadata.deletion_timestamp.is_some() {
        // what it owns goes with it; volumes as the deletion policy says
        context.brokers.forget_cluster(&names.admin_address(&context.settings.domain));
        return Ok(Action::await_change());
    }
    if cluster.spec.paused {
        return paused(&cluster, &context).await;
    }
    let seen = look(&context, &cluster, &names).await?;
    let plan = plan::plan(&cluster, &names, &seen, Timestamp::now());
    let children = build::children(&cluster, &names, &plan.wanted, &context.settings);
    let settings_changed = match apply_children(&context, &children).await {
        Ok(changed) => changed,
        Err(error) => {
            let said = Said::new("Progressing", false, "ApplyFailed", error.to_string());
            let conditions = plan.conditions.into_iter().map(|c| if c.kind == said.kind { said.clone() } else { c });
            let conditions = conditions.collect();
            report(&context, &cluster, Plan { conditions, ..plan }).await?;
            return Err(error);
        }
    };
    grow_volumes(&context, &cluster, &names).await?;
    ask_brokers(&context, &cluster, &names, &plan).await?;
    if settings_changed {
        change_log_level(&context, &cluster, &seen).await;
    }
    if let Some(pod) = &plan.replace {
        replace(&context, &cluster, pod).await?;
    }
    let busy = !plan.calls.is_empty() || plan.conditions.iter().any(|c| c.kind == "Progressing" && c.holds);
    let unwell = plan.conditions.iter().any(|c| c.kind == "Ready" && !c.holds);
    report(&context, &cluster, plan).await?;
    Ok(Action::requeue(if busy || unwell { BUSY } else { IDLE }))
}

async fn paused(cluster: &StreamCluster, context: &Context) -> Result<Action, ClusterError> {
    let before = cluster.status.clone().unwrap_or_default();
    let mut status = before.clone();
    let mut said: Vec<Said> = Vec::new();
    for kind in ["Ready", "Degraded"] {
        if let Some(c) = before.conditions.iter().find(|c| c.type_ == kind) {
            said.push(Said::new(kind, c.status == "True", "Paused", c.message.clone()));
        }
    }
    said.push(Said::new("Progressing", false, "Paused", "spec.paused is true: nothing is changed until it is false"));
    status.conditions = merge(&before.conditions, said, cluster.metadata.generation, Timestamp::now());
    apply::status(&context.client, cluster, cluster.status.as_ref(), &status)
        .await
        .map_err(kube("writing the status"))?;
    Ok(Action::await_change())
}

/// Dereferences what the plan needs.
async fn look(context: &Context, cluster: &StreamCluster, names: &Names) -> Result<Seen, ClusterError> {
    let client = &context.client;
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), &names.namespace);
    let set = sets.get_opt(&names.stateful_set()).await.map_err(kube("reading the StatefulSet"))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &names.namespace);
    let list = pods.list(&ListParams::default().labels(&names.selector_text())).await.map_err(kube("listing pods"))?;
    let revision = set.as_ref().and_then(|s| s.status.as_ref()?.update_revision.clone());
    let observed = set.as_ref().is_some_and(|s| {
        s.status.as_ref().and_then(|x| x.observed_generation).is_some_and(|g| Some(g) == s.metadata.generation)
    });
    let label = cluster.spec.placement.zone_label.as_deref().unwrap_or(build::ZONE_LABEL);
    let mut seen_pods = Vec::new();
    for pod in &list.items {
        let zone = match pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) {
            Some(node) => zone(context, cluster, &pod.name_any(), node, label).await?,
            None => None,
        };
        seen_pods.push(pod_seen(pod, revision.as_deref(), zone));
    }
    let ordinal = |p: &PodSeen| names.ordinal(&p.name);
    seen_pods.retain(|p| ordinal(p).is_some());
    seen_pods.sort_by_key(|p| ordinal(p));
    let address = names.admin_address(&context.settings.domain);
    // decisions about pods are made on what is true now
    context.brokers.forget(&address);
    let answer = if set.is_some() {
        context.brokers.snapshot(&address).await.map_err(|e| e.to_string())
    } else {
        Err("the brokers are being made".to_owned())
    };
    let spec = set.as_ref().and_then(|s| s.spec.as_ref());
    let template = spec.and_then(|s| s.volume_claim_templates.as_ref()?.first()?.spec.as_ref());
    let storage = template.and_then(|t| t.resources.as_ref()?.requests.as_ref()?.get("storage").map(|q| q.0.clone()));
    Ok(Seen {
        pods_wanted: spec.and_then(|s| s.replicas),
        template_observed: observed,
        template_storage: storage,
        pods: seen_pods,
        unreachable: answer.as_ref().err().cloned().unwrap_or_default(),
        snapshot: answer.ok(),
    })
}

/// A pod's zone: as the cluster knows it, or from its node.
async fn zone(
    context: &Context,
    cluster: &StreamCluster,
    pod: &str,
    node: &str,
    label: &str,
) -> Result<Option<String>, ClusterError> {
    let mut members = cluster.status.iter().flat_map(|s| &s.members);
    // a broker's volume binds it to its zone, so what was told once stays right
    if let Some(known) = members.find(|m| m.name == pod && m.phase == "active" && !m.zone.is_empty()) {
        return Ok(Some(known.zone.clone()));
    }
    let nodes: Api<Node> = Api::all(context.client.clone());
    let node = nodes.get_metadata_opt(node).await.map_err(kube("reading a node"))?;
    Ok(node.and_then(|n| n.labels().get(label).cloned()))
}

fn pod_seen(pod: &Pod, revision: Option<&str>, zone: Option<String>) -> PodSeen {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready = conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
    let changed = conditions.and_then(|c| c.iter().find(|c| c.type_ == "Ready")?.last_transition_time.clone());
    let unready_since = (!ready).then(|| changed.or_else(|| pod.creation_timestamp())).flatten().map(|t| t.0);
    PodSeen {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        resource_version: pod.resource_version().unwrap_or_default(),
        ready,
        current: revision.is_none() || pod.labels().get("controller-revision-hash").map(String::as_str) == revision,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        zone,
        unready_since,
    }
}

/// Applies the child objects; true where what running brokers can be told has changed.
async fn apply_children(context: &Context, children: &Children) -> Result<bool, ClusterError> {
    let client = &context.client;
    let Children { account, config, services, budget, policy, brokers } = children;
    apply::apply(client, account).await.map_err(kube("applying the ServiceAccount"))?;
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), &config.namespace().unwrap_or_default());
    let before = configs.get_opt(&config.name_any()).await.map_err(kube("reading the ConfigMap"))?;
    let log = |c: &ConfigMap| c.data.as_ref().and_then(|d| d.get("log").cloned());
    let changed = before.as_ref().is_some_and(|b| log(b) != log(config));
    apply::apply(client, config).await.map_err(kube("applying the ConfigMap"))?;
    for service in services {
        apply::apply(client, service).await.map_err(kube("applying a Service"))?;
    }
    apply::apply(client, budget).await.map_err(kube("applying the PodDisruptionBudget"))?;
    apply::apply(client, policy).await.map_err(kube("applying the NetworkPolicy"))?;
    apply::apply(client, brokers).await.map_err(kube("applying the StatefulSet"))?;
    Ok(changed)
}

/// Claims are asked to grow to what the spec says; whether they can is the storage class's to say.
async fn grow_volumes(context: &Context, cluster: &StreamCluster, names: &Names) -> Result<(), ClusterError> {
    let Ok(wanted) = quantity::bytes(&cluster.spec.storage.size) else { return Ok(()) };
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), &names.namespace);
    let selector = ListParams::default().labels(&names.selector_text());
    for claim in claims.list(&selector).await.map_err(kube("listing volume claims"))? {
        let requests = claim.spec.as_ref().and_then(|s| s.resources.as_ref()?.requests.as_ref());
        let has = requests.and_then(|r| quantity::bytes(&r.get("storage")?.0).ok());
        let bound = claim.status.as_ref().is_some_and(|s| s.phase.as_deref() == Some("Bound"));
        if !bound || has.is_none_or(|has| has >= wanted) {
            continue;
        }
        let size = &cluster.spec.storage.size;
        let patch = serde_json::json!({"spec": {"resources": {"requests": {"storage": size}}}});
        let name = claim.name_any();
        let (reason, note) = match claims.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => ("VolumeGrows", format!("{name} grows to {size}")),
            Err(kube::Error::Api(refused)) if refused.code == 403 || refused.code == 422 => {
                ("VolumeCannotGrow", format!("{name}: {}", refused.message))
            }
            Err(error) => return Err(kube("growing a volume claim")(error)),
        };
        context.event(&cluster.object_ref(&()), reason == "VolumeCannotGrow", reason, "Grow", note).await;
    }
    Ok(())
}

async fn ask_brokers(
    context: &Context,
    cluster: &StreamCluster,
    names: &Names,
    plan: &Plan,
) -> Result<(), ClusterError> {
    let address = names.admin_address(&context.settings.domain);
    let about = cluster.object_ref(&());
    let brokers = |doing: &'static str| move |source| ClusterError::Brokers { doing, source };
    for call in &plan.calls {
        match call.clone() {
            Call::Add(name) => {
                let request = v1::AddBrokerRequest { name: name.clone() };
                let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.add_broker(request).await };
                context.brokers.call(&address, call).await.map_err(brokers("adding a broker"))?;
                context.event(&about, false, "BrokerAdded", "Scale", format!("{name} may join")).await;
            }
            Call::Drain { id, name } => {
                let request = v1::DrainBrokerRequest { id, cancel: false };
                let call =
                    |mut admin: v1::admin_client::AdminClient<_>| async move { admin.drain_broker(request).await };
                context.brokers.call(&address, call).await.map_err(brokers("draining a broker"))?;
                context
                    .event(&about, false, "BrokerDraining", "Scale", format!("{name} hands over its replicas"))
                    .await;
            }
            Call::Keep { id, name } => {
                let request = v1::DrainBrokerRequest { id, cancel: true };
                let call =
                    |mut admin: v1::admin_client::AdminClient<_>| async move { admin.drain_broker(request).await };
                context.brokers.call(&address, call).await.map_err(brokers("keeping a broker"))?;
                context.event(&about, false, "BrokerKept", "Scale", format!("{name} stays")).await;
            }
            Call::SetRack { id, rack } => {
                let request = v1::SetBrokerRackRequest { id, rack };
                let call =
                    |mut admin: v1::admin_client::AdminClient<_>| async move { admin.set_broker_rack(request).await };
                context.brokers.call(&address, call).await.map_err(brokers("telling a broker's zone"))?;
            }
        }
    }
    Ok(())
}

/// Running brokers log as the spec now says; one that does not answer reads it when it starts.
async fn change_log_level(context: &Context, cluster: &StreamCluster, seen: &Seen) {
    for broker in seen.snapshot.iter().flat_map(|s| &s.metadata.brokers) {
        let request = v1::SetLogLevelRequest { filter: cluster.spec.log_level.clone() };
        let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.set_log_level(request).await };
        if let Err(error) = context.brokers.call(&broker.admin_address, call).await {
            tracing::info!(broker = broker.name, %error, "changing the log level");
        }
    }
}

/// Ends a pod so that its successor is made from the newest template: this pod, as it was seen, and no other.
async fn replace(context: &Context, cluster: &StreamCluster, pod: &PodSeen) -> Result<(), ClusterError> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), &cluster.namespace().unwrap_or_default());
    let exactly = Preconditions { uid: Some(pod.uid.clone()), resource_version: Some(pod.resource_version.clone()) };
    let parameters = DeleteParams { preconditions: Some(exactly), ..Default::default() };
    match pods.delete(&pod.name, &parameters).await {
        Ok(_) => {
            let note = format!("{} is replaced", pod.name);
            context.event(&cluster.object_ref(&()), false, "BrokerReplaced", "Roll", note).await;
            Ok(())
        }
        // it changed or went meanwhile: the next look decides again
        Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => Ok(()),
        Err(error) => Err(kube("deleting a pod")(error)),
    }
}

async fn report(context: &Context, cluster: &StreamCluster, plan: Plan) -> Result<(), ClusterError> {
    let before = cluster.status.clone().unwrap_or_default();
    let Plan { mut status, conditions, .. } = plan;
    for said in &conditions {
        let old = before.conditions.iter().find(|c| c.type_ == said.kind);
        let is = if said.holds { "True" } else { "False" };
        if old.is_some_and(|c| c.status != is) && said.kind != "Progressing" {
            let warning = said.holds == (said.kind == "Degraded");
            let note = if said.message.is_empty() { said.reason.to_owned() } else { said.message.clone() };
            context.event(&cluster.object_ref(&()), warning, said.reason, "Observe", note).await;
        }
    }
    if status.cluster_id.is_some() && before.cluster_id.is_none() {
        let note = format!("the brokers formed cluster {}", status.cluster_id.as_deref().unwrap_or_default());
        context.event(&cluster.object_ref(&()), false, "Formed", "Form", note).await;
    }
    if status.members.is_empty() {
        status.members = before.members.clone(); // nobody answered: what was known last
    }
    status.conditions = merge(&before.conditions, conditions, cluster.metadata.generation, Timestamp::now());
    let client = &context.client;
    apply::status(client, cluster, cluster.status.as_ref(), &status).await.map_err(kube("writing the status"))
}
