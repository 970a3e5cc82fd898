//! Topic: locate its cluster → validate → apply to the brokers → status.

use crate::apply;
use crate::brokers::{BrokerError, Snapshot};
use crate::cluster::LOOK_MAX;
use crate::cluster::plan::people_bytes;
use crate::conditions::{Said, alike, figures_are_due, merge, merge_known, own};
use crate::context::Context;
use crate::locate::{
    Blocked, FORCE_DELETE, Located, OUTDATED, check_current, locate, locate_to_delete, waits_to_be_deleted,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::finalizer::{self, Event, finalizer};
use kube::{Api, Resource as _, ResourceExt as _};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use weir_crds::{
    DeletionPolicy, StreamCluster, Topic, TopicPartitionStatus, TopicStatus, ValidatedTopic, cluster::TopicDefaults,
};
use weir_proto::v1;

/// Keeps the resource until the brokers have been told.
pub const FINALIZER: &str = "weir.dev/topic";
/// Partitions listed in a status.
const LISTED_MAX: usize = 100;
/// Between two looks, when all is well.
const IDLE: Duration = Duration::from_secs(30);
/// Between two looks, while something is missing.
const BUSY: Duration = Duration::from_secs(2);

/// Why a look at a topic failed.
#[derive(Debug, Error)]
pub enum TopicError {
    /// The API server.
    #[error("{0}")]
    Kube(#[from] kube::Error),
    /// The brokers, while the resource is deleted.
    #[error("{0}")]
    Brokers(#[from] BrokerError),
    /// Something does not answer.
    #[error("a look took longer than {LOOK_MAX:?}")]
    TooLong,
    /// The finalizer's patch.
    #[error("{0}")]
    Finalizer(String),
}

/// One look at a topic, within a bound.
pub async fn reconcile(topic: Arc<Topic>, context: Arc<Context>) -> Result<Action, TopicError> {
    tokio::time::timeout(LOOK_MAX, look(topic, context)).await.unwrap_or(Err(TopicError::TooLong))
}

async fn look(topic: Arc<Topic>, context: Arc<Context>) -> Result<Action, TopicError> {
    context.knows_clusters().await;
    let api: Api<Topic> = Api::namespaced(context.client.clone(), &topic.namespace().unwrap_or_default());
    let keeps = topic.spec.deletion_policy == DeletionPolicy::Retain;
    if keeps && topic.metadata.deletion_timestamp.is_none() && !has_finalizer(&*topic, FINALIZER) {
        // nothing has to be done when it goes, so nothing holds it
        return bring_about(&topic, &context).await;
    }
    let done = finalizer(&api, FINALIZER, topic, |event| async {
        match event {
            Event::Apply(topic) => bring_about(&topic, &context).await,
            Event::Cleanup(topic) => clean_up(&topic, &context).await,
        }
    });
    done.await.map_err(|error| match error {
        finalizer::Error::ApplyFailed(e) | finalizer::Error::CleanupFailed(e) => e,
        other => TopicError::Finalizer(other.to_string()),
    })
}

/// Whether a resource waits for us when it is deleted.
pub fn has_finalizer<K: kube::Resource>(object: &K, name: &str) -> bool {
    object.meta().finalizers.iter().flatten().any(|f| f == name)
}

async fn bring_about(topic: &Topic, context: &Context) -> Result<Action, TopicError> {
    let namespace = topic.namespace().unwrap_or_default();
    let outcome = match locate(context, &namespace, topic.spec.cluster_ref.as_ref()) {
        Ok(located) => apply_to(topic, context, &located).await,
        Err(blocked) => Err(blocked),
    };
    let before = own_status(topic);
    let (status, said) = match &outcome {
        Ok((wanted, snapshot)) => status(topic, wanted, snapshot),
        Err(Blocked { reason: OUTDATED, .. }) => return Ok(Action::requeue(BUSY)),
        Err(Blocked { reason, message }) => {
            let status = TopicStatus { observed_generation: topic.metadata.generation, ..before.clone() };
            (status, vec![Said::new("Ready", false, reason, message.clone())])
        }
    };
    let settled = said.iter().all(|s| s.holds == (s.kind == "Ready"));
    if let Err(blocked) = &outcome
        && !before.conditions.iter().any(|c| c.reason == blocked.reason)
    {
        context.event(&topic.object_ref(&()), true, blocked.reason, "Apply", blocked.message.clone()).await;
    }
    let now = Timestamp::now();
    let merge = if outcome.is_ok() { merge } else { merge_known };
    let conditions = merge(&before.conditions, said, topic.metadata.generation, now);
    let status = quiet(&before, TopicStatus { conditions, ..status }, now);
    apply::status(&context.client, topic, topic.status.as_ref().map(|_| &before), &status).await?;
    Ok(Action::requeue(if settled { IDLE } else { BUSY }))
}

/// What this operator wrote into a topic's status.
fn own_status(topic: &Topic) -> TopicStatus {
    let status = topic.status.clone().unwrap_or_default();
    TopicStatus { conditions: own(&status.conditions), ..status }
}

/// A status whose figures are those of before where only they have changed, and lately.
fn quiet(before: &TopicStatus, after: TopicStatus, now: Timestamp) -> TopicStatus {
    let (size, measured_at) = (before.size.clone(), before.measured_at.clone());
    let kept = TopicStatus { size, measured_at, conditions: before.conditions.clone(), ..after.clone() };
    let same = kept == *before && alike(&before.conditions, &after.conditions);
    if same && (after.size == before.size || !figures_are_due(before.measured_at.as_ref(), now)) {
        return TopicStatus { conditions: after.conditions, ..kept };
    }
    let measured_at = after.measured_at.clone().or_else(|| after.size.is_some().then_some(Time(now)));
    TopicStatus { measured_at, ..after }
}

/// What a topic should be, its cluster's defaults filled in.
pub fn validate(topic: &Topic, cluster: &StreamCluster) -> Result<ValidatedTopic, Blocked> {
    let TopicDefaults { replicas, retention } = &cluster.spec.topic_defaults;
    let mut whole = topic.clone();
    whole.spec.replicas = whole.spec.replicas.or(*replicas);
    whole.spec.retention = whole.spec.retention.or_else(|| retention.clone());
    whole.validate().map_err(|e| Blocked { reason: "Invalid", message: e.to_string() })
}

async fn apply_to(
    topic: &Topic,
    context: &Context,
    located: &Located,
) -> Result<(ValidatedTopic, Arc<Snapshot>), Blocked> {
    let wanted = validate(topic, &located.cluster)?;
    let uid = topic.uid().unwrap_or_default();
    let spec = wanted.spec;
    let mut snapshot = context.brokers.snapshot(&located.address).await.map_err(blocked)?;
    let there = snapshot.metadata.topics.iter().find(|t| t.name == wanted.name);
    let same = there.is_some_and(|t| t.spec == Some(spec) && t.owner_uid == uid);
    if !same {
        check_current(context, topic).await?;
    }
    if let Some(before) = there.filter(|t| !t.owner_uid.is_empty() && t.owner_uid != uid) {
        // of this name there is one resource at a time: the one before was deleted, and what it kept is this one's now
        let (name, owner_uid) = (wanted.name.clone(), before.owner_uid.clone());
        let request = v1::DeleteRequest { name, owner_uid, release: true };
        let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.delete_topic(request).await };
        context.brokers.call(&located.address, call).await.map_err(blocked)?;
    }
    if !same {
        let generation = topic.metadata.generation.unwrap_or(0) as u64;
        let request = v1::ApplyTopicRequest { name: wanted.name.clone(), spec: Some(spec), owner_uid: uid, generation };
        let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.apply_topic(request).await };
        context.brokers.call(&located.address, call).await.map_err(blocked)?;
        snapshot = context.brokers.snapshot(&located.address).await.map_err(blocked)?;
    }
    Ok((wanted, snapshot))
}

/// A failure as a condition says it.
pub fn blocked(error: BrokerError) -> Blocked {
    let reason = match &error {
        BrokerError::Unreachable { .. } | BrokerError::RolledBack { .. } => "ClusterUnreachable",
        BrokerError::Refused { reason, .. } if reason == "CONFLICT" => "Conflict",
        BrokerError::Refused { reason, .. } if reason == "TOO_FEW_BROKERS" => "TooFewBrokers",
        BrokerError::Refused { reason, .. } if reason == "NOT_FOUND" => "TopicNotFound",
        BrokerError::Refused { .. } => "Refused",
    };
    Blocked { reason, message: error.to_string() }
}

fn status(topic: &Topic, wanted: &ValidatedTopic, snapshot: &Snapshot) -> (TopicStatus, Vec<Said>) {
    let found = snapshot.metadata.topics.iter().find(|t| t.name == wanted.name);
    let partitions = found.map_or(&[][..], |t| &t.partitions);
    let leaderless = snapshot.leaderless(partitions);
    let behind = snapshot.under_replicated(partitions);
    let name = |id: u64| snapshot.name(id).map(str::to_owned);
    let listed = partitions.iter().take(LISTED_MAX).map(|p| TopicPartitionStatus {
        partition: p.partition,
        leader: name(p.leader),
        in_sync: snapshot.in_sync(p).into_iter().filter_map(name).collect(),
    });
    let sizes = partitions.iter().filter_map(|p| snapshot.statuses.get(&p.group)).map(|s| s.log_bytes);
    let status = TopicStatus {
        observed_generation: topic.metadata.generation,
        conditions: Vec::new(),
        replicas: Some(wanted.spec.replicas),
        leaderless: Some(leaderless as u32),
        under_replicated: Some(behind as u32),
        size: Some(people_bytes(sizes.sum())),
        measured_at: None,
        partitions: listed.collect(),
    };
    let ready = if partitions.len() < wanted.spec.partitions as usize {
        Said::new("Ready", false, "Creating", "the brokers are making its partitions")
    } else if leaderless > 0 {
        Said::new("Ready", false, "Leaderless", format!("{leaderless} partitions have no leader now"))
    } else {
        Said::new("Ready", true, "Serving", format!("publish to {}", wanted.name))
    };
    let degraded = if behind > 0 {
        Said::new("Degraded", true, "UnderReplicated", format!("{behind} partitions lack a replica"))
    } else {
        Said::new("Degraded", false, "Whole", "")
    };
    (status, vec![ready, degraded])
}

async fn clean_up(topic: &Topic, context: &Context) -> Result<Action, TopicError> {
    let namespace = topic.namespace().unwrap_or_default();
    if topic.annotations().contains_key(FORCE_DELETE) {
        return Ok(Action::await_change());
    }
    let address = match locate_to_delete(context, &namespace, topic.spec.cluster_ref.as_ref()) {
        Ok(Some(address)) => address,
        Ok(None) => return Ok(Action::await_change()), // nothing is left that could be told
        Err(waiting) => return wait(topic, context, waiting).await,
    };
    let release = topic.spec.deletion_policy == DeletionPolicy::Retain;
    let request = v1::DeleteRequest {
        name: format!("{namespace}/{}", topic.name_any()),
        owner_uid: topic.uid().unwrap_or_default(),
        release,
    };
    let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.delete_topic(request).await };
    match told(context.brokers.call(&address, call).await) {
        Ok(action) => Ok(action),
        Err(why) => wait(topic, context, Blocked { reason: "DeletionWaits", message: why.to_string() }).await,
    }
}

/// Says why the topic is not deleted yet; it is looked at again.
async fn wait(topic: &Topic, context: &Context, why: Blocked) -> Result<Action, TopicError> {
    let message = waits_to_be_deleted(&why.message);
    let said = vec![Said::new("Ready", false, why.reason, message.clone())];
    let before = own_status(topic);
    let conditions = merge_known(&before.conditions, said, topic.metadata.generation, Timestamp::now());
    let status = TopicStatus { conditions, ..before.clone() };
    apply::status(&context.client, topic, topic.status.as_ref().map(|_| &before), &status).await?;
    Err(BrokerError::Unreachable { address: topic.namespace().unwrap_or_default(), cause: message }.into())
}

/// Whether the brokers know of a deletion, so that the resource may go.
pub fn told<T>(answer: Result<T, BrokerError>) -> Result<Action, TopicError> {
    match answer {
        Ok(_) => Ok(Action::await_change()),
        // gone already, or another's
        Err(BrokerError::Refused { reason, .. }) if reason == "NOT_FOUND" || reason == "CONFLICT" => {
            Ok(Action::await_change())
        }
        Err(error) => Err(error.into()),
    }
}
