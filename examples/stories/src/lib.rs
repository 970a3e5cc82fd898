//! What the stories share: the client, a few lines to publish, and a way to wait that ends.

use anyhow::Context as _;
use std::time::Duration;
use weir_client::producer::{Options, Position, Producer};
use weir_client::subscriber::{Delivered, Subscriber};
use weir_client::{Client, Record};

/// A client of the brokers of `WEIR_SERVER` (127.0.0.1:7420 where it says none).
pub fn client() -> anyhow::Result<Client> {
    let server = std::env::var("WEIR_SERVER").unwrap_or_else(|_| "127.0.0.1:7420".to_owned());
    Ok(Client::new(&server)?)
}

/// A record with a key.
pub fn record(key: &str, value: impl Into<String>) -> Record {
    Record { key: Some(key.to_owned().into()), value: Some(value.into().into()), ..Default::default() }
}

/// Publishes and waits until a majority has it on disk.
pub async fn publish(client: &Client, topic: &str, records: Vec<Record>) -> anyhow::Result<Vec<Position>> {
    let producer = Producer::open(client, topic, Options::default()).await?;
    let mut under_way = Vec::new();
    for record in records {
        under_way.push(producer.send(record).await?);
    }
    let mut out = Vec::new();
    for acknowledged in under_way {
        out.push(acknowledged.await?);
    }
    Ok(out)
}

/// The next message; an error where none comes.
pub async fn next(subscriber: &mut Subscriber) -> anyhow::Result<Delivered> {
    let next = tokio::time::timeout(Duration::from_secs(20), subscriber.next()).await;
    Ok(next.context("no message came in time")?.context("the subscription ended")??)
}

/// Whether nothing more comes within a moment.
pub async fn nothing_more(subscriber: &mut Subscriber) -> bool {
    tokio::time::timeout(Duration::from_millis(300), subscriber.next()).await.is_err()
}

/// A message's text.
pub fn text(delivered: &Delivered) -> String {
    String::from_utf8_lossy(delivered.message.record.value.as_deref().unwrap_or_default()).into_owned()
}
