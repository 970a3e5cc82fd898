//! Three times what a service can take becomes a backlog that is worked off at the declared rate: 1000 a second.

use std::time::{Duration, Instant};
use weir_client::subscriber::{Options, Subscriber};
use weir_stories::{client, next, publish, record};

const PEAK: usize = 3_000;
const STEP_MS: u128 = 250;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = client()?;
    // a little traffic before the peak, so that the service is at work when it comes
    let mut service = Subscriber::open(&client, "served", Options { credit: 5_000, ..Default::default() }).await?;
    let begun = Instant::now();
    let publishing = {
        let client = client.clone();
        tokio::spawn(async move {
            let mut arrived = Vec::new();
            for burst in [100, 100, 2_700, 100] {
                publish(&client, "requests", (0..burst).map(|at| record(&at.to_string(), "please")).collect()).await?;
                arrived.push((begun.elapsed(), burst));
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            anyhow::Ok(arrived)
        })
    };
    let mut served = Vec::new();
    while served.len() < PEAK {
        next(&mut service).await?.ack();
        served.push(begun.elapsed());
    }
    let arrived = publishing.await??;

    let steps = (served.last().expect("served").as_millis() / STEP_MS + 1) as usize;
    let step_of = |at: &Duration| (at.as_millis() / STEP_MS) as usize;
    let (mut came, mut went) = (vec![0; steps + 1], vec![0; steps + 1]);
    arrived.iter().for_each(|(at, count)| came[step_of(at).min(steps)] += count);
    served.iter().for_each(|at| went[step_of(at)] += 1);
    println!("{:>8} {:>9} {:>10} {:>8}", "time", "arrivals", "deliveries", "backlog");
    let mut backlog = 0i64;
    for step in 0..steps {
        backlog += came[step] - went[step];
        let bar = "█".repeat((backlog.max(0) / 75) as usize);
        println!("{:>6} ms {:>9} {:>10} {:>8} {bar}", step as u128 * STEP_MS, came[step], went[step], backlog.max(0));
    }
    // over any second no more than the rate, and the burst of a tenth of a second
    for (at, from) in served.iter().enumerate() {
        let within = served[at..].iter().take_while(|t| **t < *from + Duration::from_secs(1)).count();
        anyhow::ensure!(within <= 1_150, "{within} deliveries within a second from {from:?}");
    }
    let took = *served.last().expect("served") - served[0];
    println!("{PEAK} requests arrived within a second, and were served in {:.1} s", took.as_secs_f64());
    anyhow::ensure!(took > Duration::from_millis(2_500), "faster than was declared");
    anyhow::ensure!(took < Duration::from_secs(8), "slower than was declared");
    Ok(())
}
