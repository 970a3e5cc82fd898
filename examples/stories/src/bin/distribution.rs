//! New consumers start without any change at the publisher: from now, from the beginning, or from a time.

use weir_client::consumer::From;
use weir_client::subscriber::{Subscriber, seek};
use weir_client::{Client, proto};
use weir_stories::{client, next, nothing_more, publish, record, text};

async fn subscribe(client: &Client, name: &str, from_earliest: bool) -> anyhow::Result<()> {
    // in Kubernetes: kubectl apply of a Subscription
    let spec = proto::SubscriptionSpec { topic: "prices".into(), from_earliest, ..Default::default() };
    let request = proto::ApplySubscriptionRequest { name: name.into(), spec: Some(spec), ..Default::default() };
    client.admin().await?.apply_subscription(request).await?;
    Ok(())
}

async fn all(client: &Client, name: &str, count: usize) -> anyhow::Result<Vec<String>> {
    let mut subscriber = Subscriber::open(client, name, Default::default()).await?;
    let mut out = Vec::new();
    while out.len() < count {
        let delivered = next(&mut subscriber).await?;
        out.push(text(&delivered));
        delivered.ack();
    }
    anyhow::ensure!(nothing_more(&mut subscriber).await, "{name} got more than {count}");
    Ok(out)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = client()?;
    let price = |at: u32| record("coffee", format!("price {at}"));
    publish(&client, "prices", (0..10).map(price).collect()).await?;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let noon = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis() as u64;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    publish(&client, "prices", (10..20).map(price).collect()).await?;
    println!("20 prices were published, to nobody in particular");

    subscribe(&client, "archive", true).await?;
    subscribe(&client, "ticker", false).await?;
    subscribe(&client, "report", true).await?;
    // the ticker stands at the end before more is published
    drop(Subscriber::open(&client, "ticker", Default::default()).await?);
    seek(&client, "report", From::Time(noon)).await?;
    println!("three consumers came: from the beginning, from now, and from noon");

    publish(&client, "prices", (20..25).map(price).collect()).await?;
    let names = |range: std::ops::Range<u32>| range.map(|at| format!("price {at}")).collect::<Vec<_>>();
    anyhow::ensure!(all(&client, "archive", 25).await? == names(0..25), "the archive misses something");
    anyhow::ensure!(all(&client, "ticker", 5).await? == names(20..25), "the ticker shows something else");
    anyhow::ensure!(all(&client, "report", 15).await? == names(10..25), "the report covers something else");
    println!(
        "the archive has all 25, the ticker the 5 newest, the report the 15 since noon; the publisher was not touched"
    );
    Ok(())
}
