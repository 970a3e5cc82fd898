//! Messages that are due later, over real processes: each once, none before its time, whatever becomes of the leaders.

mod cluster;

use cluster::power::Power;
use cluster::{Cluster, PATIENCE, delete_topic, make_topic, read_all, until_is};
use futures::StreamExt as _;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use weir_client::consumer::Message;
use weir_client::schedule::{cancel, schedule};
use weir_client::{Client, Error, Record, proto as v1};

fn ms(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

fn numbered(number: u64) -> Record {
    Record {
        key: Some(format!("k{}", number % 13).into()),
        value: Some(number.to_string().into()),
        ..Default::default()
    }
}

fn number(message: &Message) -> u64 {
    std::str::from_utf8(message.record.value.as_ref().unwrap()).unwrap().parse().unwrap()
}

/// How late the messages came, ms, sorted; none may come early.
fn lateness(messages: &[Message], due: &BTreeMap<u64, u64>) -> Vec<u64> {
    let mut late: Vec<u64> = Vec::new();
    for message in messages {
        let due = due[&number(message)];
        // the log's clock is the wall clock at the broker's start, moved on by the monotonic one: they differ by a little
        let early = due.saturating_sub(message.append_time_ms);
        assert!(early < 20, "{} came {early} ms early", number(message));
        late.push(message.append_time_ms.saturating_sub(due));
    }
    late.sort_unstable();
    late
}

#[tokio::test(flavor = "multi_thread")]
async fn scheduled_messages_come_once_when_they_are_due_and_not_once_cancelled_while_leaders_are_killed() {
    const COUNT: u64 = 3_000;
    const HOUR: Duration = Duration::from_secs(3_600);
    let power = Power::new();
    let (cluster, client, _) = power.start();
    make_topic(&client, "t", 2, 3).await;
    let begun = SystemTime::now();
    // every sixth is due much later, and cancelled before
    let is_cancelled = |number: &u64| number.is_multiple_of(6);
    let (mut due, mut handles) = (BTreeMap::new(), BTreeMap::new());
    for call in 0..10 {
        let numbers = call * COUNT / 10..(call + 1) * COUNT / 10;
        // from long ago to twelve seconds ahead, in no order
        let at = |number: u64| match Duration::from_millis(number * 7_919 % 13_000) {
            soon if is_cancelled(&number) => begun + HOUR + soon,
            soon => begun + soon - Duration::from_secs(1),
        };
        let list = numbers.clone().map(|number| (numbered(number), at(number))).collect();
        let scheduled = schedule(&client, "t", list).await.unwrap();
        due.extend(numbers.clone().map(|number| (number, ms(at(number)))));
        handles.extend(numbers.zip(scheduled));
        if call == 6 {
            cluster.kill("weir-2");
        }
    }
    // those that come once these would have come, of every key
    let last = COUNT..COUNT + 13;
    schedule(&client, "t", last.clone().map(|number| (numbered(number), begun + 2 * HOUR)).collect()).await.unwrap();
    let cancelled: Vec<u64> = due.keys().copied().filter(is_cancelled).collect();
    let cancelling = futures::stream::iter(&cancelled).for_each_concurrent(32, async |number| {
        match cancel(&client, &handles[number]).await {
            Ok(()) => {}
            // its leader went before it could answer
            Err(Error::Refused { reason, .. }) if reason == "NOT_SCHEDULED" => {}
            Err(error) => panic!("{error}"),
        }
    });
    cancelling.await;
    let Err(Error::Refused { reason, .. }) = cancel(&client, &handles[&cancelled[0]]).await else { panic!("twice") };
    assert_eq!(reason, "NOT_SCHEDULED");
    for name in ["weir-0", "weir-1", "weir-2"] {
        cluster.kill(name);
        tokio::time::sleep(Duration::from_millis(3_500)).await;
    }
    due.retain(|number, _| !is_cancelled(number));
    let end = Instant::now() + PATIENCE;
    let messages = loop {
        let messages = read_all(&client, "t", 2).await;
        if messages.len() >= due.len() {
            break messages;
        }
        assert!(Instant::now() < end, "{} of {}", messages.len(), due.len());
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(read_all(&client, "t", 2).await.len(), due.len(), "each once");
    let mut seen: Vec<u64> = messages.iter().map(number).collect();
    seen.sort_unstable();
    assert_eq!(seen, due.keys().copied().collect::<Vec<_>>());
    let late = lateness(&messages, &due);
    println!(
        "{} scheduled messages, each once over 4 killed brokers; late: median {} ms, worst {} ms",
        seen.len(),
        late[late.len() / 2],
        late[late.len() - 1]
    );
    let Err(Error::Refused { reason, .. }) = cancel(&client, &handles[&seen[0]]).await else { panic!("too late") };
    assert_eq!(reason, "NOT_SCHEDULED");
    power.jump(3 * HOUR.as_secs() as i64);
    let all = due.len() + last.count();
    until_is("all come but those that were cancelled", all, async || read_all(&client, "t", 2).await.len()).await;
    let seen = read_all(&client, "t", 2).await;
    assert_eq!(seen.iter().map(number).filter(|n| *n < COUNT && is_cancelled(n)).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_repeated_is_stored_once() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let channel = client.channel(&cluster.servers).unwrap();
    let mut publisher = v1::publisher_client::PublisherClient::new(channel);
    let id = publisher.allocate_producer_ids(v1::AllocateProducerIdsRequest { count: 1 }).await.unwrap();
    let id = id.into_inner().first_id;
    let request = |sequence, deliver_at_ms| v1::PublishRequest {
        topic: "t".into(),
        partition: Some(0),
        messages: vec![v1::Message { value: Some("v".into()), deliver_at_ms, ..Default::default() }],
        producer: Some(v1::ProducerStamp { id, sequence }),
        ..Default::default()
    };
    for sequence in [0, 1] {
        let first = publisher.publish(request(sequence, None)).await.unwrap().into_inner();
        let again = publisher.publish(request(sequence, None)).await.unwrap().into_inner();
        assert_eq!((first.base_offset, &again), (sequence as u64, &first));
    }
    // what is scheduled counts for itself
    let at = ms(SystemTime::now() + Duration::from_secs(1));
    let first = publisher.publish(request(0, Some(at))).await.unwrap().into_inner();
    assert_eq!(publisher.publish(request(0, Some(at))).await.unwrap().into_inner(), first);
    let refused = |request| {
        let mut publisher = publisher.clone();
        async move { publisher.publish(request).await.unwrap_err().code() }
    };
    let gap = refused(request(7, None)).await;
    let nowhere = refused(v1::PublishRequest { partition: None, ..request(2, None) }).await;
    let nobody = refused(v1::PublishRequest { producer: Some(v1::ProducerStamp::default()), ..request(2, None) }).await;
    let own = v1::ProducerStamp { id: 1 << 62, sequence: 0 };
    let own = refused(v1::PublishRequest { producer: Some(own), ..request(2, None) }).await;
    use tonic::Code::{InvalidArgument, PermissionDenied};
    assert_eq!([nowhere, nobody, own], [InvalidArgument, InvalidArgument, PermissionDenied]);
    assert_ne!(gap, tonic::Code::Ok);
    until_is("two at once, and the one that was due", 3, async || read_all(&client, "t", 1).await.len()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(read_all(&client, "t", 1).await.len(), 3, "each once");
}

/// `SCHEDULED=1000000` for the figure in the README.
#[tokio::test(flavor = "multi_thread")]
async fn very_many_due_in_the_same_minute_are_delivered_with_bounded_memory() {
    let count: u64 = std::env::var("SCHEDULED").ok().and_then(|v| v.parse().ok()).unwrap_or(30_000);
    let minute = Duration::from_millis(if count > 100_000 { 60_000 } else { 5_000 });
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let span = minute.as_millis() as u64;
    let at = |first: SystemTime, number: u64| first + Duration::from_millis(number.wrapping_mul(2_654_435_761) % span);
    // time to schedule them all; where it was not enough they are scheduled anew, for later
    let mut lead = Duration::from_micros(40 * count) + Duration::from_secs(2);
    let first = loop {
        let first = SystemTime::now() + lead;
        for from in (0..count).step_by(5_000) {
            let list = (from..(from + 5_000).min(count)).map(|number| (numbered(number), at(first, number))).collect();
            schedule(&client, "t", list).await.unwrap();
        }
        if SystemTime::now() < first {
            break first;
        }
        lead *= 4;
        delete_topic(&client, "t").await;
        make_topic(&client, "t", 1, 1).await;
    };
    let end = Instant::now() + minute + first.duration_since(SystemTime::now()).unwrap_or_default() + PATIENCE;
    let metric = |text: &str, name: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
    };
    let mut memory = 0;
    loop {
        let text = cluster.metrics(0).await;
        memory = memory.max(metric(&text, "process_resident_memory_bytes"));
        if metric(&text, "weir_partition_high_watermark{partition=\"0\",topic=\"default/t\"}") >= count {
            break;
        }
        assert!(Instant::now() < end, "not all came");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let messages = read_all(&client, "t", 1).await;
    let due: BTreeMap<u64, u64> = (0..count).map(|number| (number, ms(at(first, number)))).collect();
    assert_eq!(messages.len() as u64, count);
    let late = lateness(&messages, &due);
    println!(
        "{count} due within {minute:?}: late by {} ms (median), {} ms (p99), {} ms (worst); the broker held {} MiB at most",
        late[late.len() / 2],
        late[late.len() * 99 / 100],
        late[late.len() - 1],
        memory >> 20
    );
    assert!(memory < 1 << 30, "memory is bounded");
}
