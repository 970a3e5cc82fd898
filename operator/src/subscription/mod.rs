//! Subscription: locate its cluster → validate → apply to the brokers → status.

use crate::apply;
use crate::brokers::{BrokerError, Snapshot};
use crate::cluster::LOOK_MAX;
use crate::cluster::plan::people_bytes;
use crate::conditions::{Said, merge};
use crate::context::Context;
use crate::locate::{
    Blocked, FORCE_DELETE, Located, OUTDATED, check_current, locate, locate_to_delete, waits_to_be_deleted,
};
use crate::topic::{TopicError, blocked, has_finalizer, told};
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
    let before = subscription.status.clone().unwrap_or_default();
    let (status, said) = match &outcome {
        Ok((wanted, snapshot)) => status(wanted, snapshot),
        Err(Blocked { reason: OUTDATED, .. }) => return Ok(Action::requeue(BUSY)),
        Err(Blocked { reason, message }) => (before.clone(), Said::new("Ready", false, reason, message.clone())),
    };
    if let Err(blocked) = &outcome
        && !before.conditions.iter().any(|c| c.reason == blocked.reason)
    {
        context.event(&subscription.object_ref(&()), true, blocked.reason, "Apply", blocked.message.clone()).await;
    }
    let settled = said.holds;
    let conditions = merge(&before.conditions, vec![said], subscription.metadata.generation, Timestamp::now());
    let observed_generation = subscription.metadata.generation;
    let status = SubscriptionStatus { conditions, observed_generation, ..status };
    apply::status(&context.client, subscription, subscription.status.as_ref(), &status).await?;
    Ok(Action::requeue(if settled { IDLE } else { BUSY }))
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
        let spec = v1::SubscriptionSpec {
            topic: wanted.topic.clone(),
            from_earliest: wanted.from_earliest,
            start_ms: wanted.start_ms,
            ack_deadline_ms: wanted.ack_deadline_ms,
            mode: wanted.mode as i32,
            backoff_min_ms: wanted.backoff_min_ms,
            backoff_max_ms: wanted.backoff_max_ms,
            in_flight_max: wanted.in_flight_max,
            deliveries_max: wanted.deliveries_max,
            dead_letter_topic: wanted.dead_letter_topic.clone(),
            filter: wanted.filter.clone(),
            messages_per_second: wanted.messages_per_second,
            bytes_per_second: wanted.bytes_per_second,
            burst_messages: wanted.burst_messages,
            in_flight_member_max: wanted.in_flight_member_max,
            priorities: wanted.priorities,
            routing_keys: wanted.routing_keys.clone(),
            push: wanted.push.clone().map(|(endpoint, concurrency, timeout_ms)| v1::Push {
                endpoint,
                concurrency,
                timeout_ms,
            }),
        };
        let request =
            v1::ApplySubscriptionRequest { name: wanted.name.clone(), spec: Some(spec), owner_uid: uid, generation };
        let call = |mut admin: v1::admin_client::AdminClient<_>| async move { admin.apply_subscription(request).await };
        context.brokers.call(&located.address, call).await.map_err(blocked)?;
        snapshot = context.brokers.snapshot(&located.address).await.map_err(blocked)?;
    }
    Ok((wanted, snapshot))
}

fn status(wanted: &ValidatedSubscription, snapshot: &Snapshot) -> (SubscriptionStatus, Said) {
    let applied = snapshot.metadata.subscriptions.iter().find(|s| s.name == wanted.name);
    let topics = applied.map(|s| s.topics.as_slice()).unwrap_or_default();
    let read = snapshot.metadata.topics.iter().filter(|t| topics.contains(&t.name));
    let groups: Vec<u64> = read.flat_map(|t| t.partitions.iter().map(|p| p.group)).collect();
    let by_pattern = weir_proto::is_pattern(&wanted.topic);
    let statuses = groups.iter().filter_map(|g| snapshot.statuses.get(g));
    let mine: Vec<&v1::SubscriptionStatus> =
        statuses.filter_map(|s| s.subscriptions.iter().find(|x| x.subscription == wanted.name)).collect();
    let now_ms = Timestamp::now().as_millisecond();
    let oldest = mine.iter().filter(|s| s.oldest_ms > 0).map(|s| now_ms - s.oldest_ms as i64).max();
    let status = SubscriptionStatus {
        backlog: Some(mine.iter().map(|s| s.backlog as i64).sum()),
        backlog_size: Some(people_bytes(mine.iter().map(|s| s.backlog_bytes).sum())),
        // to ten seconds, or a status would change with every look
        oldest_unacked_seconds: Some(oldest.unwrap_or(0).max(0) / 10_000 * 10),
        ..Default::default()
    };
    let said = if groups.is_empty() && by_pattern && applied.is_some() {
        Said::new("Ready", true, "Serving", format!("reads all topics of {}; there is none yet", wanted.topic))
    } else if mine.len() == groups.len() && !groups.is_empty() {
        let many = if by_pattern { format!(", {} topics now", topics.len()) } else { String::new() };
        Said::new("Ready", true, "Serving", format!("reads {}{many}", wanted.topic))
    } else {
        let text = format!("{} of {} partitions have its position", mine.len(), groups.len());
        Said::new("Ready", false, "Creating", text)
    };
    (status, said)
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
    let before = subscription.status.clone().unwrap_or_default();
    let conditions = merge(&before.conditions, said, subscription.metadata.generation, Timestamp::now());
    let status = SubscriptionStatus { conditions, ..before };
    apply::status(&context.client, subscription, subscription.status.as_ref(), &status).await?;
    Err(BrokerError::Unreachable { address: subscription.namespace().unwrap_or_default(), cause: message }.into())
}
