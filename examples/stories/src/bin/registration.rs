//! A sign-up is stored; mail, guide notice and recommendation happen later, each by its own consumer, each retried by itself, one
//! failing without holding up the others.

use std::collections::{BTreeMap, BTreeSet};
use weir_client::consumer::{From, read_partition};
use weir_client::subscriber::Subscriber;
use weir_stories::{client, next, nothing_more, publish, record, text};

const USERS: usize = 50;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = client()?;
    let signup = |at: usize| {
        let mut signup = record(&format!("user-{at}"), format!("user-{at}"));
        signup.set_header("mail", if at.is_multiple_of(5) { "no" } else { "yes" });
        signup
    };
    let begun = std::time::Instant::now();
    publish(&client, "signups", (0..USERS).map(signup).collect()).await?;
    println!("{USERS} sign-ups are stored; their users were answered after {:.0?}", begun.elapsed());

    let mut mail = Subscriber::open(&client, "welcome-mail", Default::default()).await?;
    let mut mailed = BTreeSet::new();
    while mailed.len() < USERS * 4 / 5 {
        let delivered = next(&mut mail).await?;
        mailed.insert(text(&delivered));
        delivered.ack();
    }
    anyhow::ensure!(nothing_more(&mut mail).await, "somebody who wanted no mail got one");
    println!("welcome mails: {} sent, and none to those who wanted none (a filter)", mailed.len());

    let mut guide = Subscriber::open(&client, "guide-notice", Default::default()).await?;
    let (mut noticed, mut failed) = (BTreeSet::new(), 0);
    while noticed.len() < USERS {
        let delivered = next(&mut guide).await?;
        if delivered.message.delivery == 1 {
            failed += 1; // the notice service hiccups with each user once
            delivered.nack(None);
            continue;
        }
        noticed.insert(text(&delivered));
        delivered.ack();
    }
    println!("guide notices: {failed} failed at first, all {} went out", noticed.len());

    let mut recommendation = Subscriber::open(&client, "recommendation", Default::default()).await?;
    let mut tries: BTreeMap<String, u32> = BTreeMap::new();
    let mut recommended = BTreeSet::new();
    while recommended.len() < USERS - 1 || tries.get("user-13").is_none_or(|t| *t < 3) {
        let delivered = next(&mut recommendation).await?;
        let user = text(&delivered);
        *tries.entry(user.clone()).or_default() += 1;
        if user == "user-13" {
            delivered.nack(None); // nothing can be recommended to this one
        } else {
            recommended.insert(user);
            delivered.ack();
        }
    }
    anyhow::ensure!(nothing_more(&mut recommendation).await, "user-13 is still tried");
    println!(
        "recommendations: {} made; user-13 failed {} times and held up nobody",
        recommended.len(),
        tries["user-13"]
    );

    let (sender, mut receiver) = tokio::sync::mpsc::channel(4);
    tokio::spawn(read_partition(client.clone(), "signups-dead".to_owned(), 0, From::Earliest, true, sender));
    let mut dead = Vec::new();
    while let Some(messages) = receiver.recv().await {
        dead.extend(messages?);
    }
    anyhow::ensure!(dead.len() == 1, "{} dead letters, not one", dead.len());
    for (name, value) in dead[0].record.headers.iter().filter(|(name, _)| name.starts_with("weir-dead-")) {
        println!("  {name}: {}", String::from_utf8_lossy(value.as_deref().unwrap_or_default()));
    }
    println!("its sign-up waits in signups-dead for somebody to look at");
    Ok(())
}
