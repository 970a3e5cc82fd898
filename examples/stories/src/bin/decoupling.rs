//! A consumer that is down misses nothing, and goes on where it was.

use weir_client::subscriber::Subscriber;
use weir_stories::{client, next, nothing_more, publish, record, text};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = client()?;
    let order = |at: u32| record(&format!("customer-{}", at % 7), format!("order {at}"));
    publish(&client, "orders", (0..60).map(order).collect()).await?;
    println!("60 orders were published; the mailer has never run");

    let mut mailed = Vec::new();
    let mut mailer = Subscriber::open(&client, "mailer", Default::default()).await?;
    for _ in 0..40 {
        let delivered = next(&mut mailer).await?;
        mailed.push(text(&delivered));
        delivered.ack();
    }
    mailer.close().await; // one that is killed would get what it had acked in the last moment again
    println!("the mailer came, sent {} mails, and went down", mailed.len());

    publish(&client, "orders", (60..100).map(order).collect()).await?;
    println!("40 more orders were published meanwhile; the shop noticed nothing");

    let mut mailer = Subscriber::open(&client, "mailer", Default::default()).await?;
    while mailed.len() < 100 {
        let delivered = next(&mut mailer).await?;
        mailed.push(text(&delivered));
        delivered.ack();
    }
    anyhow::ensure!(nothing_more(&mut mailer).await, "a mail too many");
    mailed.sort();
    mailed.dedup();
    anyhow::ensure!(mailed.len() == 100, "{} different orders were mailed, not 100", mailed.len());
    println!("the mailer came back, and every order has been mailed once");
    Ok(())
}
