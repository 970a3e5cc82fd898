//! `weir subscription redrive`: dead letters go back to the topic they came from, for the subscription that failed at them.

use crate::admin::read_by;
use std::collections::HashSet;
use std::time::{Duration, Instant};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Error, full_name, proto};

/// Header of a dead letter with the subscription that failed at it.
const FAILED: &str = "weir-dead-subscription";
/// Where no dead letter comes for this long, what is left is counted again: batches that cannot be decoded are passed over.
const QUIET: Duration = Duration::from_secs(1);

/// What a redrive did.
#[derive(Debug, Default)]
pub(crate) struct Redriven {
    /// Dead letters that were put back.
    pub(crate) count: u64,
    /// Those that could not be, and why.
    pub(crate) left: Vec<String>,
}

/// Puts back what was not put back before, `max` at most. The brokers move each dead letter whole, as it is stored. What was put back is
/// remembered by an internal position in the dead-letter topic.
pub(crate) async fn redrive(client: &Client, name: &str, max: u64) -> anyhow::Result<Redriven> {
    let full = full_name(name);
    let cluster = client.cluster();
    let spec = cluster.subscription(&full).and_then(|s| s.spec.clone()).ok_or_else(|| Error::no_subscription(name))?;
    anyhow::ensure!(!spec.dead_letter_topic.is_empty(), "subscription {name} has no dead-letter topic");
    let request = proto::OpenRedriveRequest { subscription: full.clone() };
    let opened = client.admin().await?.open_redrive(request).await.map_err(weir_client::Error::from)?;
    let own = opened.into_inner().position;
    client.refresh().await?;
    let mut waiting = backlog(client, &own).await?;
    if waiting == 0 || max == 0 {
        return Ok(Redriven::default());
    }
    let mut subscriber = Subscriber::open(client, &own, Default::default()).await?;
    let mut done = Redriven::default();
    let mut back = HashSet::new();
    while done.count < max {
        // some may have come twice: only the brokers know that nothing is left
        if waiting == 0 {
            waiting = backlog(client, &own).await?.saturating_sub(done.left.len() as u64);
            if waiting == 0 {
                break;
            }
        }
        let Ok(next) = tokio::time::timeout(QUIET, subscriber.next()).await else {
            waiting = 0;
            continue;
        };
        let Some(next) = next else { break };
        let delivered = next?;
        waiting = waiting.saturating_sub(1);
        let failed = delivered.message.record.header(FAILED);
        if failed.is_none_or(|failed| failed != full.as_bytes()) {
            delivered.ack();
            continue;
        }
        let (partition, offset) = (delivered.message.partition, delivered.message.offset);
        // one by one: acknowledged only when it is back
        match delivered.give_back().await {
            Ok(_) => done.count += u64::from(back.insert((partition, offset))),
            // its partition has another leader, and delivers it again
            Err(Error::Refused { reason, .. }) if reason == "NOT_DELIVERED" => waiting += 1,
            Err(error) => {
                done.left.push(format!("partition {partition} offset {offset} of {}: {error}", spec.dead_letter_topic));
            }
        }
    }
    subscriber.close().await;
    Ok(done)
}

/// Sums the backlog of a subscription. Returns `None` unless the leaders of all `partitions` reported it: one that is slow to answer is
/// missing from `statuses`.
fn backlog_of(statuses: &[proto::PartitionStatus], subscription: &str, partitions: usize) -> Option<u64> {
    let mine = statuses.iter().flat_map(|p| p.subscriptions.iter().find(|s| s.subscription == subscription));
    let mine: Vec<u64> = mine.map(|s| s.backlog).collect();
    (mine.len() == partitions).then(|| mine.iter().sum())
}

/// Messages before a subscription that may just have been made.
pub(crate) async fn backlog(client: &Client, subscription: &str) -> anyhow::Result<u64> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let cluster = client.cluster();
        if let Some(found) = cluster.subscription(subscription) {
            let statuses = read_by(client, found).await?;
            let partitions: usize =
                found.topics.iter().map(|topic| cluster.topic(topic).map_or(0, |t| t.partitions.len())).sum();
            if let Some(messages) = backlog_of(&statuses, subscription, partitions) {
                return Ok(messages);
            }
        }
        anyhow::ensure!(Instant::now() < end, "not all leaders reported the backlog of {subscription}; retry later");
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.refresh().await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_that_a_leader_does_not_report_is_not_counted_as_empty() {
        let position =
            |name: &str| proto::SubscriptionStatus { subscription: name.into(), backlog: 5, ..Default::default() };
        let status = |subscriptions| proto::PartitionStatus { subscriptions, ..Default::default() };
        let both = [status(vec![position("own"), position("other")]), status(vec![position("own")])];
        assert_eq!(backlog_of(&both, "own", 2), Some(10));
        assert_eq!(backlog_of(&both[..1], "own", 2), None, "a broker was left out");
        assert_eq!(backlog_of(&both, "other", 2), None, "a partition does not know it yet");
        assert_eq!(backlog_of(&[], "own", 0), Some(0), "no topic has the pattern yet");
    }
}
