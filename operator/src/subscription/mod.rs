//! Subscription: locate its cluster → validate → apply to the brokers → status.

use crate::apply;
use crate::brokers::{BrokerError, Snapshot};
use crate::cluster::LOOK_MAX;
use crate::cluster::plan::people_bytes;
use crate::conditions::{Said, alike, figures_are_due, holds, merge, merge_known, own};
use crate::context::Context;
use crate::locate::{
    Blocked, FORCE_DELETE, Located, OUTDATED, check_current, locate, locate_to_delete, waits_to_be_deleted,
};
use crate::topic::{TopicError, blocked, has_finalizer, told};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::finalizer::{self, Event, finalizer};
use kube::{Api, Resource as _, ResourceExt as _};
use std::sync::Arc;
use std::time::Duration;
use weir_crds::{DeletionPolicy, Subscription, SubscriptionStatus, ValidatedSubscription};
use weir_proto::v1;

/// Keeps the resource until the brokers have been told.
pub const FINALIZER: &str = "weir.dev/subscription";
/// Between two looks, when all is well: how old the backlog in the status may be.
const IDLE: Duration = Duration::from_secs(30);
/// Between two looks, while something is missing.
const BUSY: Duration = Duration::from_secs(2);

/// One look at a subscription, within a bound.
pub async fn reconcile(subscription: Arc<Subscription>, context: Arc<Context>) -> Result<Action, TopicError> {
    tokio::time::timeout(LOOK_MAX, look(subscription, context)).await.unwrap_or(Err(TopicError::TooLong))
}

async fn look(subscription: Arc<Subscription>, context: Arc<Context>) -> Result<Action, TopicError> {
    context.knows_clusters().await;
    let namespace = subscription.namespace().unwrap_or_default();
    let api: Api<Subscription> = Api::namespaced(context.client.clone(), &namespace);
    let keeps = subscription.spec.deletion_policy == DeletionPolicy::Retain;
    if keeps && subscription.metadata.deletion_timestamp.is_none() && !has_finalizer(&*subscription, FINALIZER) {
        // nothing has to be done when it goes, so nothing holds it
        return bring_about(&subscription, &context).await;
    }
    let done = finalizer(&api, FINALIZER, subscription, |event| async {
        match event {
            Event::Apply(subscription) => bring_about(&subscription, &context).await,
            Event::Cleanup(subscription) => clean_up(&subscription, &context).await,
        }
    });
    done.await.map_err(|error| match error {
        finalizer::Error::ApplyFailed(e) | finalizer::Error::CleanupFailed(e) => e,
        other => TopicError::Finalizer(other.to_string()),
    })
}

async fn bring_about(subscription: &Subscription, context: &Context) -> Result<Action, TopicError> {
    let namespace = subscription.namespace().unwrap_or_default();
    let outcome = match locate(context, &namespace, subscription.spec.cluster_ref.as_ref()) {
        Ok(located) => apply_to(subscription, context, &located).await,
        Err(blocked) => Err(blocked),
    };
    let before = own_status(subscription);
    let (status, said) = match &outcome {
        Ok((wanted, snapshot)) => status(wanted, snapshot),
        Err(Blocked { reason: OUTDATED, .. }) => return Ok(Action::requeue(BUSY)),
        Err(Blocked { reason, message }) => (before.clone(), vec![Said::new("Ready", false, reason, message.clone())]),
    };
    if let Err(blocked) = &outcome
        && !before.conditions.iter().any(|c| c.reason == blocked.reason)
    {
        context.event(&subscription.object_ref(&()), true, blocked.reason, "Apply", blocked.message.clone()).await;
    }
    let settled = said.iter().all(|s| s.kind != "Ready" || s.holds);
    if let Some(missing) = said.iter().find(|s| s.kind == DEAD_LETTERS && !holds(&before.conditions, DEAD_LETTERS)) {
        context.event(&subscription.object_ref(&()), true, DEAD_LETTERS, "Observe", missing.message.clone()).await;
    }
    let now = Timestamp::now();
    let merge = if outcome.is_ok() { merge } else { merge_known };
    let conditions = merge(&before.conditions, said, subscription.metadata.generation, now);
    let observed_generation = subscription.metadata.generation;
    let status = quiet(&before, SubscriptionStatus { conditions, observed_generation, ..status }, now);
    apply::status(&context.client, subscription, subscription.status.as_ref().map(|_| &before), &status).await?;
    Ok(Action::requeue(if settled { IDLE } else { BUSY }))
}

/// What this operator wrote into a subscription's status.
fn own_status(subscription: &Subscription) -> SubscriptionStatus {
    let status = subscription.status.clone().unwrap_or_default();
    SubscriptionStatus { conditions: own(&status.conditions), ..status }
}

/// A status whose figures are those of before where only they have changed, and lately.
fn quiet(before: &SubscriptionStatus, after: SubscriptionStatus, now: Timestamp) -> SubscriptionStatus {
    let figures = |s: &SubscriptionStatus| (s.backlog, s.backlog_size.clone(), s.oldest_unacked_seconds);
    let kept = SubscriptionStatus {
        backlog: before.backlog,
        backlog_size: before.backlog_size.clone(),
        oldest_unacked_seconds: before.oldest_unacked_seconds,
        measured_at: before.measured_at.clone(),
        conditions: before.conditions.clone(),
        observed_generation: after.observed_generation,
    };
    let same = kept == *before && alike(&before.conditions, &after.conditions);
    if same && (figures(&after) == figures(before) || !figures_are_due(before.measured_at.as_ref(), now)) {
        return SubscriptionStatus { conditions: after.conditions, ..kept };
    }
    let measured_at = after.measured_at.clone().or_else(|| after.backlog.is_some().then_some(Time(now)));
    SubscriptionStatus { measured_at, ..after }
}

async fn apply_to(
    subscription: &Subscription,
    context: &Context,
    located: &Located,
) -> Result<(ValidatedSubscription, Arc<Snapshot>), Blocked> {
    let invalid = |e: weir_crds::Invalid| Blocked { reason: "Invalid", message: e.to_string() };
    let wanted = subscription.validate().map_err(invalid)?;
    let uid = subscription.uid().unwrap_or_default();
    let generation = subscription.metadata.generation.unwrap_or(0) as u64;
    let mut snapshot = context.brokers.snapshot(&located.address).await.map_err(blocked)?;
    let there = snapshot.metadata.subscriptions.iter().find(|s| s.name == wanted.name);
    let same = there.is_some_and(|s| s.owner_uid == uid && s.generation == generation);
    if !same {
        check_current(context, subscription).await?;
    }
    if let Some(before) = there.filter(|s| !s.owner_uid.is_empty() && s.owner_uid != uid) {
        // the resource before it was deleted, and what it kept is this one's now
        let (name, owner_uid) = (wanted.name.clone(), before.owner_uid.clone());
        let request = v1::DeleteRequest { name, owner_uid, release: true };
        let call =
            |mut admin: v1::admin_client::AdminClient<_>| async move { admin.delete_subscription(request).await };
        context.brokers.call(&located.address, call).await.map_err(blocked)?;
    }
    if !same {
        let (name, spec) = (wanted.name.clone(), Some(wanted.spec.clone()));
        let request = v1::ApplySubscriptionRequest { name, spec, owner_uid: uid, generation };
        let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.apply_subscription(request).await };
        context.brokers.call(&located.address, call).await.map_err(blocked)?;
        snapshot = context.brokers.snapshot(&located.address).await.map_err(blocked)?;
    }
    Ok((wanted, snapshot))
}

/// The condition of a subscription whose dead-letter topic does not exist.
const DEAD_LETTERS: &str = "DeadLetterTopicMissing";

fn dead_letters(wanted: &ValidatedSubscription, snapshot: &Snapshot) -> Option<Said> {
    let topic = &wanted.spec.dead_letter_topic;
    let missing = !topic.is_empty() && !snapshot.metadata.topics.iter().any(|t| t.name == *topic);
    missing.then(|| {
        let text = format!(
            "topic {topic} does not exist: messages that fail too often stay, and are tried again, until it does"
        );
        Said::new(DEAD_LETTERS, true, "TopicNotFound", text)
    })
}

fn status(wanted: &ValidatedSubscription, snapshot: &Snapshot) -> (SubscriptionStatus, Vec<Said>) {
    let applied = snapshot.metadata.subscriptions.iter().find(|s| s.name == wanted.name);
    let topics = applied.map(|s| s.topics.as_slice()).unwrap_or_default();
    let read = snapshot.metadata.topics.iter().filter(|t| topics.contains(&t.name));
    let groups: Vec<u64> = read.flat_map(|t| t.partitions.iter().map(|p| p.group)).collect();
    let by_pattern = weir_proto::is_pattern(&wanted.spec.topic);
    let statuses = groups.iter().filter_map(|g| snapshot.statuses.get(g));
    let mine: Vec<&v1::SubscriptionStatus> =
        statuses.filter_map(|s| s.subscriptions.iter().find(|x| x.subscription == wanted.name)).collect();
    let now_ms = Timestamp::now().as_millisecond();
    let oldest = mine.iter().filter_map(|s| Some(now_ms.saturating_sub(s.oldest_ms? as i64))).max();
    let status = SubscriptionStatus {
        backlog: Some(mine.iter().map(|s| s.backlog as i64).sum()),
        backlog_size: Some(people_bytes(mine.iter().map(|s| s.backlog_bytes).sum())),
        // to ten seconds, or a status would change with every look
        oldest_unacked_seconds: Some(oldest.unwrap_or(0).max(0) / 10_000 * 10),
        ..Default::default()
    };
    let ready = if groups.is_empty() && by_pattern && applied.is_some() {
        Said::new("Ready", true, "Serving", format!("reads all topics of {}; there is none yet", wanted.spec.topic))
    } else if mine.len() == groups.len() && !groups.is_empty() {
        let many = if by_pattern { format!(", {} topics now", topics.len()) } else { String::new() };
        Said::new("Ready", true, "Serving", format!("reads {}{many}", wanted.spec.topic))
    } else {
        let text = format!("{} of {} partitions have its position", mine.len(), groups.len());
        Said::new("Ready", false, "Creating", text)
    };
    (status, std::iter::once(ready).chain(dead_letters(wanted, snapshot)).collect())
}

async fn clean_up(subscription: &Subscription, context: &Context) -> Result<Action, TopicError> {
    let namespace = subscription.namespace().unwrap_or_default();
    if subscription.annotations().contains_key(FORCE_DELETE) {
        return Ok(Action::await_change());
    }
    let address = match locate_to_delete(context, &namespace, subscription.spec.cluster_ref.as_ref()) {
        Ok(Some(address)) => address,
        Ok(None) => return Ok(Action::await_change()), // nothing is left that could be told
        Err(waiting) => return wait(subscription, context, waiting).await,
    };
    let request = v1::DeleteRequest {
        name: format!("{namespace}/{}", subscription.name_any()),
        owner_uid: subscription.uid().unwrap_or_default(),
        release: subscription.spec.deletion_policy == DeletionPolicy::Retain,
    };
    let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.delete_subscription(request).await };
    match told(context.brokers.call(&address, call).await) {
        Ok(action) => Ok(action),
        Err(why) => wait(subscription, context, Blocked { reason: "DeletionWaits", message: why.to_string() }).await,
    }
}

/// Says why the subscription is not deleted yet; it is looked at again.
async fn wait(subscription: &Subscription, context: &Context, why: Blocked) -> Result<Action, TopicError> {
    let message = waits_to_be_deleted(&why.message);
    let said = vec![Said::new("Ready", false, why.reason, message.clone())];
    let before = own_status(subscription);
    let conditions = merge_known(&before.conditions, said, subscription.metadata.generation, Timestamp::now());
    let status = SubscriptionStatus { conditions, ..before.clone() };
    apply::status(&context.client, subscription, subscription.status.as_ref().map(|_| &before), &status).await?;
    Err(BrokerError::Unreachable { address: subscription.namespace().unwrap_or_default(), cause: message }.into())
}
