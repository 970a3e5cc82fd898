//! StreamCluster: dereference → plan → apply → ask the brokers → status. What is decided is decided in [`plan`].

pub mod build;
pub mod names;
pub mod plan;

use crate::apply;
use crate::brokers::BrokerError;
use crate::conditions::{Said, merge, merge_known, own};
use crate::context::Context;
use build::Children;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::{Api, Resource as _, ResourceExt as _};
use names::Names;
use plan::{Call, Plan, PodSeen, Seen};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use weir_crds::{StreamCluster, StreamClusterStatus, quantity};
use weir_proto::v1;

/// Looked at again after this long, when nothing is under way.
const IDLE: Duration = Duration::from_secs(10);
/// Looked at again after this long, while something is.
const BUSY: Duration = Duration::from_secs(1);

/// Reason of `Progressing` where the brokers refuse a drain, since a topic needs the broker.
const DRAIN_REFUSED: &str = "DrainRefused";
/// The brokers' reason for that.
const TOO_FEW_BROKERS: &str = "TOO_FEW_BROKERS";

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
    let mut plan = plan::plan(&cluster, &names, &seen, Timestamp::now());
    let children = build::children(&cluster, &names, &plan.wanted, &context.settings);
    let settings_changed = match apply_children(&context, &cluster, &children).await {
        Ok(changed) => changed,
        Err(error) => {
            plan.say(Said::new("Progressing", false, "ApplyFailed", error.to_string()));
            report(&context, &cluster, plan).await?;
            return Err(error);
        }
    };
    grow_volumes(&context, &cluster, &names).await?;
    let asked = ask_brokers(&context, &cluster, &names, &plan).await?;
    // after a call that was carried out the next look knows what is under way
    if let Some(refusal) = asked.refusal.filter(|_| asked.made == 0) {
        plan.stop(DRAIN_REFUSED, &refusal);
    }
    if settings_changed {
        change_log_level(&context, &cluster, &seen).await;
    }
    if let Some(pod) = &plan.replace {
        replace(&context, &cluster, pod).await?;
    }
    // an operator that ends on the way leaves the budget that forbids: what allows is written last
    let mut has_changed = false;
    if children.allows_disruption() {
        has_changed = !is_so_still(&context, &cluster, &names, &plan).await?;
        if !has_changed {
            apply::apply(&context.client, &children.budget).await.map_err(kube("applying the PodDisruptionBudget"))?;
        }
    }
    let progresses = plan.conditions.iter().any(|c| c.kind == "Progressing" && c.holds);
    let busy = has_changed || asked.made > 0 || progresses;
    let unwell = plan.conditions.iter().any(|c| c.kind == "Ready" && !c.holds);
    report(&context, &cluster, plan).await?;
    Ok(Action::requeue(if busy || unwell { BUSY } else { IDLE }))
}

/// Whether a second look, right before the budget is raised, says that it may be: the first may be as old as a look lasts. A budget
/// that allows as much already is not looked at twice.
async fn is_so_still(
    context: &Context,
    cluster: &StreamCluster,
    names: &Names,
    plan: &Plan,
) -> Result<bool, ClusterError> {
    let budgets: Api<PodDisruptionBudget> = Api::namespaced(context.client.clone(), &names.namespace);
    let budget = budgets.get_opt(&names.config()).await.map_err(kube("reading the PodDisruptionBudget"))?;
    let allows = |spec: &PodDisruptionBudgetSpec| spec.max_unavailable != Some(IntOrString::Int(0));
    if budget.and_then(|b| b.spec).as_ref().is_some_and(allows) {
        return Ok(true);
    }
    let again = plan::plan(cluster, names, &look(context, cluster, names).await?, Timestamp::now());
    Ok(again.wanted.disruption == plan.wanted.disruption)
}

async fn paused(cluster: &StreamCluster, context: &Context) -> Result<Action, ClusterError> {
    let before = own_status(cluster);
    let mut status = StreamClusterStatus { observed_generation: cluster.metadata.generation, ..before.clone() };
    let mut said: Vec<Said> = Vec::new();
    for kind in ["Ready", "Degraded"] {
        if let Some(c) = before.conditions.iter().find(|c| c.type_ == kind) {
            said.push(Said::new(kind, c.status == "True", "Paused", c.message.clone()));
        }
    }
    said.push(Said::new("Progressing", false, "Paused", "spec.paused is true: nothing is changed until it is false"));
    status.conditions = merge_known(&before.conditions, said, cluster.metadata.generation, Timestamp::now());
    apply::status(&context.client, cluster, cluster.status.as_ref().map(|_| &before), &status)
        .await
        .map_err(kube("writing the status"))?;
    Ok(Action::await_change())
}

/// What this operator wrote into a cluster's status.
fn own_status(cluster: &StreamCluster) -> StreamClusterStatus {
    let status = cluster.status.clone().unwrap_or_default();
    StreamClusterStatus { conditions: own(&status.conditions), ..status }
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
    let (snapshot, rolled_back, unreachable) = match &set {
        None => (None, Vec::new(), "the brokers are being made".to_owned()),
        Some(_) => match context.brokers.snapshot(&address).await {
            Ok(snapshot) => (Some(snapshot.clone()), weir_proto::rolled_back(&snapshot.metadata), String::new()),
            Err(error) => {
                let text = error.to_string();
                let brokers = if let BrokerError::RolledBack { brokers } = error { brokers } else { Vec::new() };
                (None, brokers, text)
            }
        },
    };
    let spec = set.as_ref().and_then(|s| s.spec.as_ref());
    let template = spec.and_then(|s| s.volume_claim_templates.as_ref()?.first()?.spec.as_ref());
    let storage = template.and_then(|t| t.resources.as_ref()?.requests.as_ref()?.get("storage").map(|q| q.0.clone()));
    Ok(Seen {
        pods_wanted: spec.and_then(|s| s.replicas),
        template_observed: observed,
        template_storage: storage,
        pods: seen_pods,
        snapshot,
        rolled_back,
        unreachable,
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
async fn apply_children(context: &Context, cluster: &StreamCluster, children: &Children) -> Result<bool, ClusterError> {
    let client = &context.client;
    let Children { account, config, services, budget, policy, brokers } = children;
    if !children.allows_disruption() {
        apply::apply(client, budget).await.map_err(kube("applying the PodDisruptionBudget"))?;
    }
    apply::apply(client, account).await.map_err(kube("applying the ServiceAccount"))?;
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), &config.namespace().unwrap_or_default());
    let before = configs.get_opt(&config.name_any()).await.map_err(kube("reading the ConfigMap"))?;
    let log = |c: &ConfigMap| c.data.as_ref().and_then(|d| d.get("log").cloned());
    let changed = before.as_ref().is_some_and(|b| log(b) != log(config));
    apply::apply(client, config).await.map_err(kube("applying the ConfigMap"))?;
    for service in services {
        apply::apply(client, service).await.map_err(kube("applying a Service"))?;
    }
    match policy {
        Some(policy) => drop(apply::apply(client, policy).await.map_err(kube("applying the NetworkPolicy"))?),
        None => remove_policy(context, cluster, account).await?,
    }
    apply::apply(client, brokers).await.map_err(kube("applying the StatefulSet"))?;
    Ok(changed)
}

/// Removes the NetworkPolicy of a cluster that wants none, if there is one and it is this cluster's.
async fn remove_policy(
    context: &Context,
    cluster: &StreamCluster,
    named_alike: &ServiceAccount,
) -> Result<(), ClusterError> {
    let policies: Api<NetworkPolicy> =
        Api::namespaced(context.client.clone(), &named_alike.namespace().unwrap_or_default());
    let name = named_alike.name_any();
    let found = policies.get_metadata_opt(&name).await.map_err(kube("reading the NetworkPolicy"))?;
    let is_own = |m: &kube::core::ObjectMeta| {
        m.owner_references.iter().flatten().any(|owner| Some(&owner.uid) == cluster.metadata.uid.as_ref())
    };
    let Some(found) = found.filter(|f| is_own(&f.metadata)) else { return Ok(()) };
    let exactly = Preconditions { uid: found.uid(), resource_version: found.resource_version() };
    let parameters = DeleteParams { preconditions: Some(exactly), ..Default::default() };
    match policies.delete(&name, &parameters).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => Ok(()), // the next look decides again
        Err(error) => Err(kube("deleting the NetworkPolicy")(error)),
    }
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

/// Answers to a plan's calls.
#[derive(Default)]
struct Asked {
    /// Calls that were carried out.
    made: usize,
    /// Why a drain was refused: the pods stay until another spec, or fewer replicas of a topic, allow it.
    refusal: Option<String>,
}

/// Makes the plan's calls. Any failure but the refusal of a drain that could not end is an error.
async fn ask_brokers(
    context: &Context,
    cluster: &StreamCluster,
    names: &Names,
    plan: &Plan,
) -> Result<Asked, ClusterError> {
    let address = names.admin_address(&context.settings.domain);
    let about = cluster.object_ref(&());
    let brokers = |doing: &'static str| move |source| ClusterError::Brokers { doing, source };
    let mut asked = Asked::default();
    for call in &plan.calls {
        match call.clone() {
            Call::Add(name) => {
                let request = v1::AddBrokerRequest { name: name.clone() };
                let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.add_broker(request).await };
                context.brokers.call(&address, call).await.map_err(brokers("adding a broker"))?;
                context.event(&about, false, "BrokerAdded", "Scale", format!("{name} may join")).await;
            }
            Call::Drain { .. } if asked.refusal.is_some() => continue, // those above it go first
            Call::Drain { id, name } => {
                let request = v1::DrainBrokerRequest { id, cancel: false };
                let call =
                    |mut admin: v1::admin_client::AdminClient<_>| async move { admin.drain_broker(request).await };
                match context.brokers.call(&address, call).await {
                    Ok(_) => {
                        let note = format!("{name} hands over its replicas");
                        context.event(&about, false, "BrokerDraining", "Scale", note).await;
                    }
                    Err(BrokerError::Refused { reason, message, .. }) if reason == TOO_FEW_BROKERS => {
                        asked.refusal = Some(plan::drain_refused(cluster.spec.brokers, names, &name, &message));
                        continue;
                    }
                    Err(error) => return Err(brokers("draining a broker")(error)),
                }
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
        asked.made += 1;
    }
    Ok(asked)
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
    let before = own_status(cluster);
    let Plan { mut status, conditions, rebuilt, .. } = plan;
    for note in rebuilt {
        context.event(&cluster.object_ref(&()), true, "BrokerRebuilt", "Rebuild", note).await;
    }
    for said in &conditions {
        let old = before.conditions.iter().find(|c| c.type_ == said.kind);
        let is = if said.holds { "True" } else { "False" };
        if said.reason == DRAIN_REFUSED && old.is_none_or(|c| c.reason != DRAIN_REFUSED || c.message != said.message) {
            context.event(&cluster.object_ref(&()), true, DRAIN_REFUSED, "Scale", said.message.clone()).await;
        }
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
    let known = cluster.status.as_ref().map(|_| &before);
    apply::status(client, cluster, known, &status).await.map_err(kube("writing the status"))
}
