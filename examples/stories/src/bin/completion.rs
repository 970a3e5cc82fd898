//! A asks B for long work and is told by a message when it is done: no polling, no callback address.

use std::time::Duration;
use weir_client::requester::{Requester, is_request, reply};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Error};
use weir_stories::{client, next, publish, record, text};

/// B: works on what it is asked, answers who waits, and tells everybody else by a message.
async fn worker(client: Client) -> anyhow::Result<()> {
    let mut work = Subscriber::open(&client, "worker", Default::default()).await?;
    loop {
        let job = work.next().await.ok_or_else(|| anyhow::anyhow!("ended"))??;
        let name = text(&job);
        tokio::time::sleep(Duration::from_millis(if name.contains("slow") { 800 } else { 50 })).await;
        let result = record(&name, format!("{name} is done"));
        if is_request(&job.message.record) {
            match reply(&client, &job.message.record, result).await {
                // whoever asked has given up: the work is done all the same
                Err(Error::Refused { .. }) | Ok(()) => {}
                Err(error) => return Err(error.into()),
            }
        } else {
            publish(&client, "work-done", vec![result]).await?;
        }
        job.ack();
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = client()?;
    let b = tokio::spawn(worker(client.clone()));

    let requester = Requester::open(&client);
    let answer = requester.request("work", record("a", "a picture"), Duration::from_secs(10)).await?;
    let answer = String::from_utf8_lossy(answer.value.as_deref().unwrap_or_default()).into_owned();
    println!("A asked and waited: {answer}");
    anyhow::ensure!(answer == "a picture is done");

    let late = requester.request("work", record("a", "a slow thing"), Duration::from_millis(200)).await;
    anyhow::ensure!(matches!(late, Err(Error::Deadline { .. })), "{late:?}");
    println!("A did not want to wait so long: it went on, and the late answer bothers nobody");

    publish(&client, "work", vec![record("a", "a film")]).await?;
    drop(requester);
    println!("A asked for a film and was restarted");
    let mut done = Subscriber::open(&client, "asker", Default::default()).await?;
    let told = next(&mut done).await?;
    println!("A is back, and told: {}", text(&told));
    anyhow::ensure!(text(&told) == "a film is done");
    told.ack();
    tokio::time::sleep(Duration::from_millis(200)).await;
    anyhow::ensure!(!b.is_finished(), "the worker ended");
    b.abort();
    Ok(())
}
