//! Faults of the network over real processes, each broker in a network namespace of its own.

mod cluster;

use cluster::net::{Net, inside};
use cluster::writer::{Writer, check};
use cluster::{PATIENCE, until};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use weir_client::{Client, proto as v1};

/// What a broker says of the one partition of `t`, if it leads it: its id and term.
async fn claim(client: &Client, at: usize) -> Option<(u64, u64)> {
    let channel = client.channel(&Net::client_address(at)).unwrap();
    let mut metadata = v1::metadata_client::MetadataClient::new(channel);
    let asked = metadata.describe(v1::DescribeRequest { topics: vec!["t".into()], ..Default::default() });
    let answer = tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()?.into_inner();
    let led = answer.partitions.iter().find(|p| p.topic.ends_with('t'))?;
    Some((answer.broker, led.term))
}

/// The leader: where it is, and its term.
async fn leader(client: &Client, among: &[usize]) -> (usize, u64) {
    let end = Instant::now() + PATIENCE;
    loop {
        for at in among {
            if let Some((_, term)) = claim(client, *at).await {
                return (*at, term);
            }
        }
        assert!(Instant::now() < end, "nobody leads");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Three or five brokers and a writer to one partition.
async fn begin(count: usize, replicas: u32) -> (Net, Client, Writer) {
    let net = Net::start(count);
    let client = Client::new(&net.servers()).unwrap();
    let spec = v1::TopicSpec { partitions: 1, replicas, ..Default::default() };
    cluster::make_topic_of(&client, "t", spec).await;
    let writer = Writer::start_on(&client, "t").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    (net, client, writer)
}

/// All is whole again: acknowledged records go on, and what was acknowledged is there.
async fn end(net: Net, client: Client, writer: Writer, replicas: usize) {
    net.heal();
    let before = writer.acknowledged();
    until("publishing goes on", async || {
        let now = writer.acknowledged();
        if now > before + 1_000 { Ok(()) } else { Err(now) }
    })
    .await;
    let (seen, unknown) = writer.finish().await;
    println!("{} acknowledged, {unknown} unknown", seen.acknowledged());
    cluster::in_sync(&client, "t", replicas).await;
    check(&client, "t", 1, &seen).await;
}

async fn acks_go_on(writer: &Writer) -> Duration {
    let begun = Instant::now();
    let before = writer.acknowledged();
    while writer.acknowledged() <= before + 240 {
        assert!(begun.elapsed() < PATIENCE, "no acks within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_04_a_leader_cut_from_its_followers_acknowledges_nothing_and_steps_down() {
    if !inside("fault_04_a_leader_cut_from_its_followers_acknowledges_nothing_and_steps_down") {
        return;
    }
    let (net, client, writer) = begin(3, 3).await;
    let (old, _) = leader(&client, &[0, 1, 2]).await;
    let others: Vec<usize> = (0..3).filter(|at| *at != old).collect();
    let mut publisher = v1::publisher_client::PublisherClient::new(client.channel(&Net::client_address(old)).unwrap());
    others.iter().for_each(|other| net.cut(old, *other));
    let cut = Instant::now();
    let messages = vec![v1::Message { value: Some("900-0".into()), ..Default::default() }];
    let mut request = tonic::Request::new(v1::PublishRequest {
        topic: "t".into(),
        partition: Some(0),
        messages,
        ..Default::default()
    });
    request.set_timeout(Duration::from_secs(5));
    publisher.publish(request).await.expect_err("clients reach it, its followers do not");
    until("it steps down", async || claim(&client, old).await.map_or(Ok(()), Err)).await;
    println!("the old leader stepped down {:?} after the cut", cut.elapsed());
    let (new, _) = leader(&client, &others).await;
    acks_go_on(&writer).await;
    println!("weir-{new} leads; acks went on {:?} after the cut", cut.elapsed());
    end(net, client, writer, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_05_a_one_way_cut_leaves_one_leader_and_terms_that_do_not_run_away() {
    if !inside("fault_05_a_one_way_cut_leaves_one_leader_and_terms_that_do_not_run_away") {
        return;
    }
    let (net, client, writer) = begin(3, 3).await;
    let (_, first) = leader(&client, &[0, 1, 2]).await;
    let mut terms = vec![first];
    for to_followers in [true, false] {
        let (old, _) = leader(&client, &[0, 1, 2]).await;
        for other in (0..3).filter(|at| *at != old) {
            if to_followers { net.cut_one_way(old, other) } else { net.cut_one_way(other, old) }
        }
        let cut = Instant::now();
        acks_go_on(&writer).await;
        println!("a one-way cut, from the leader: {to_followers}; acks went on {:?} after it", cut.elapsed());
        tokio::time::sleep(Duration::from_secs(8)).await;
        let others: Vec<usize> = (0..3).filter(|at| *at != old).collect();
        terms.push(leader(&client, &others).await.1);
        net.heal();
        acks_go_on(&writer).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    terms.push(leader(&client, &[0, 1, 2]).await.1);
    println!("terms: {terms:?}");
    assert!(terms[terms.len() - 1] - first < 12, "terms run away: {terms:?}");
    end(net, client, writer, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_06_a_bridge_over_five_brokers_has_one_leader_a_term_and_one_side_commits() {
    if !inside("fault_06_a_bridge_over_five_brokers_has_one_leader_a_term_and_one_side_commits") {
        return;
    }
    let (net, client, writer) = begin(5, 5).await;
    // 0 and 1 on one side, 3 and 4 on the other, 2 hears all
    [(0, 3), (0, 4), (1, 3), (1, 4)].into_iter().for_each(|(one, other)| net.cut(one, other));
    let cut = Instant::now();
    acks_go_on(&writer).await;
    println!("a bridge; acks went on {:?} after it", cut.elapsed());
    let mut leaders: BTreeMap<u64, u64> = BTreeMap::new();
    let before = writer.acknowledged();
    while cut.elapsed() < Duration::from_secs(15) || writer.acknowledged() <= before + 1_000 {
        assert!(cut.elapsed() < PATIENCE, "a side that has a majority commits");
        for at in 0..5 {
            let Some((broker, term)) = claim(&client, at).await else { continue };
            assert_eq!(*leaders.entry(term).or_insert(broker), broker, "two lead in term {term}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("leaders by term: {leaders:?}");
    assert!(leaders.len() < 8, "leadership does not settle: {leaders:?}");
    end(net, client, writer, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lossy_and_a_slow_network_cost_time_and_nothing_else() {
    if !inside("a_lossy_and_a_slow_network_cost_time_and_nothing_else") {
        return;
    }
    let (net, client, writer) = begin(3, 3).await;
    net.lose(0.05);
    let lossy = acks_go_on(&writer).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let with_loss = writer.take_gap();
    net.heal();
    // 12 keys of 20 records of 1 KiB under way to two followers: more than it takes in 100 ms
    net.slow(20, 100);
    let slow = acks_go_on(&writer).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    println!(
        "first acks after {lossy:?} with loss (longest gap {with_loss:?}), {slow:?} over slow links (longest gap {:?})",
        writer.take_gap()
    );
    end(net, client, writer, 3).await;
}
