//! `weir subscription redrive`: dead letters go back to the topic they came from, for the subscription that failed at them.

use crate::admin::read_by;
use anyhow::Context as _;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};
use weir_client::producer::{Options, Producer};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Record, full_name, proto};

/// What a dead letter's headers begin with.
const DEAD: &str = "weir-dead-";
/// Header of a message that is meant for one subscription of its topic only.
const ONLY_FOR: &str = "weir-only-for";

fn header(record: &Record, name: &str) -> String {
    let found = record.headers.iter().find(|(n, _)| n.strip_prefix(DEAD) == Some(name));
    found.map_or(String::new(), |(_, value)| String::from_utf8_lossy(value).into_owned())
}

/// Puts back what was not put back before, `max` at most; says how many. What was put back is remembered by a subscription
/// of the dead-letter topic, `NAME.redrive`.
pub(crate) async fn redrive(client: &Client, name: &str, max: u64) -> anyhow::Result<u64> {
    let full = full_name(name);
    let cluster = client.cluster();
    let spec = cluster
        .subscription(&full)
        .and_then(|s| s.spec.clone())
        .with_context(|| format!("subscription {name} does not exist"))?;
    anyhow::ensure!(!spec.dead_letter_topic.is_empty(), "subscription {name} has no dead-letter topic");
    let own = format!("{full}.redrive");
    let own_spec =
        proto::SubscriptionSpec { topic: spec.dead_letter_topic.clone(), from_earliest: true, ..Default::default() };
    let request = proto::ApplySubscriptionRequest { name: own.clone(), spec: Some(own_spec), ..Default::default() };
    client.admin().await?.apply_subscription(request).await.map_err(weir_client::Error::from)?;
    client.refresh().await?;
    let mut waiting = backlog(client, &own).await?;
    let mut subscriber = Subscriber::open(client, &own, Default::default()).await?;
    let mut origins: HashMap<String, Producer> = HashMap::new(); // a pattern reads several topics
    let mut count = 0;
    while waiting > 0 && count < max {
        let Some(next) = subscriber.next().await else { break };
        let delivered = next?;
        waiting -= 1;
        if header(&delivered.message.record, "subscription") == full {
            let mut record = delivered.message.record.clone();
            record.headers.retain(|(n, _)| !n.starts_with(DEAD) && n != ONLY_FOR);
            record.headers.push((ONLY_FOR.to_owned(), full.clone().into()));
            let topic = header(&delivered.message.record, "topic");
            let origin = match origins.entry(topic) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let producer = Producer::open(client, new.key(), Options::default()).await?;
                    new.insert(producer)
                }
            };
            origin.send(record).await?.await?; // one by one: acked only when it is back
            count += 1;
        }
        delivered.ack();
    }
    subscriber.close().await;
    Ok(count)
}

/// Messages before a subscription that may just have been made.
pub(crate) async fn backlog(client: &Client, subscription: &str) -> anyhow::Result<u64> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = client.cluster().subscription(subscription) {
            let statuses = read_by(client, found).await?;
            let mine = statuses.iter().flat_map(|p| p.subscriptions.iter().find(|s| s.subscription == subscription));
            let mine: Vec<u64> = mine.map(|s| s.backlog).collect();
            // of a pattern that no topic has yet, nothing is told
            if mine.len() == statuses.len() && statuses.is_empty() == found.topics.is_empty() {
                return Ok(mine.iter().sum());
            }
        }
        anyhow::ensure!(Instant::now() < end, "the brokers do not tell how much there is");
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.refresh().await?;
    }
}
