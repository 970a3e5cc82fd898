//! `weir topic`, `weir subscription`, `weir cluster`.

use crate::Output;
use clap::Subcommand;
use std::path::PathBuf;
use weir_client::Client;
use weir_client::schedule::Scheduled;
use weir_crds::{ValidatedSubscription, ValidatedTopic, manifest};
use weir_proto::v1;

#[derive(Subcommand)]
pub(crate) enum Topic {
    /// All topics.
    List,
    /// One topic with its partitions.
    Describe { name: String },
    /// Makes or changes the topics and subscriptions of manifest files.
    #[command(after_help = "Example: weir topic apply -f examples/orders.yaml")]
    Apply {
        /// Manifest files.
        #[arg(short, required = true)]
        file: Vec<PathBuf>,
    },
    /// Deletes a topic with its data.
    Delete { name: String },
    /// Takes a message back that `weir publish --delay` has scheduled.
    Unschedule { name: String, partition: u32, offset: u64 },
}

#[derive(Subcommand)]
pub(crate) enum Subscription {
    /// All subscriptions.
    List,
    /// One subscription with its position and backlog in each partition.
    Describe { name: String },
    /// Makes or changes the topics and subscriptions of manifest files.
    Apply {
        /// Manifest files.
        #[arg(short, required = true)]
        file: Vec<PathBuf>,
    },
    /// Deletes a subscription with its position and its snapshots.
    Delete { name: String },
    /// Moves a subscription's position in all partitions: what lies behind it comes again, what lies before it does not come.
    #[command(after_help = "Examples:
  weir subscription seek mail --to earliest
  weir subscription seek mail --to-snapshot before-upgrade
TO is earliest, latest, an offset, or a time such as 2026-01-31T08:00:00Z, or one as ms since the epoch (from 1000000000000 on).")]
    Seek {
        name: String,
        /// The place.
        #[arg(long, value_parser = crate::data::parse_from, required_unless_present = "to_snapshot")]
        to: Option<weir_client::consumer::From>,
        /// The position, with its acks, that this snapshot kept.
        #[arg(long, conflicts_with = "to")]
        to_snapshot: Option<String>,
    },
    /// Keeps a subscription's position and acks as they are now, under a name, to seek to later. It holds the records behind it.
    #[command(after_help = "Example: weir subscription snapshot mail before-upgrade")]
    Snapshot {
        name: String,
        snapshot: String,
        /// Delete it instead.
        #[arg(long)]
        delete: bool,
    },
    /// The snapshots of a subscription, and how much they hold.
    Snapshots { name: String },
    /// Puts dead letters back into the topic they came from, for this subscription only.
    #[command(after_help = "Example: weir subscription redrive recommendation --max 10")]
    Redrive {
        name: String,
        /// Put back so many at most.
        #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
        max: u64,
    },
}

#[derive(Subcommand)]
pub(crate) enum Cluster {
    /// Brokers and how partitions stand on them.
    Status,
    /// Names a broker that may join.
    Add { name: String },
    /// Moves everything off a broker, then removes it.
    Drain {
        id: u64,
        /// Take it back: the broker stays.
        #[arg(long)]
        cancel: bool,
    },
}

/// Applies a checked topic.
pub(crate) async fn apply_topic(client: &Client, topic: &ValidatedTopic) -> anyhow::Result<()> {
    let spec = v1::TopicSpec {
        partitions: topic.partitions,
        replicas: topic.replicas,
        retention_ms: topic.retention_ms,
        retention_bytes: topic.retention_bytes,
        message_bytes_max: topic.message_bytes_max,
        quorum_memory: topic.quorum_memory,
    };
    let request = v1::ApplyTopicRequest { name: topic.name.clone(), spec: Some(spec), ..Default::default() };
    client.admin().await?.apply_topic(request).await.map_err(weir_client::Error::from)?;
    Ok(())
}

/// Applies a checked subscription.
pub(crate) async fn apply_subscription(client: &Client, subscription: &ValidatedSubscription) -> anyhow::Result<()> {
    let spec = v1::SubscriptionSpec {
        topic: subscription.topic.clone(),
        from_earliest: subscription.from_earliest,
        start_ms: subscription.start_ms,
        ack_deadline_ms: subscription.ack_deadline_ms,
        mode: subscription.mode as i32,
        backoff_min_ms: subscription.backoff_min_ms,
        backoff_max_ms: subscription.backoff_max_ms,
        in_flight_max: subscription.in_flight_max,
        deliveries_max: subscription.deliveries_max,
        dead_letter_topic: subscription.dead_letter_topic.clone(),
        filter: subscription.filter.clone(),
        messages_per_second: subscription.messages_per_second,
        bytes_per_second: subscription.bytes_per_second,
        burst_messages: subscription.burst_messages,
        in_flight_member_max: subscription.in_flight_member_max,
        priorities: subscription.priorities,
        routing_keys: subscription.routing_keys.clone(),
        push: subscription.push.clone().map(|(endpoint, concurrency, timeout_ms)| v1::Push {
            endpoint,
            concurrency,
            timeout_ms,
        }),
    };
    let request =
        v1::ApplySubscriptionRequest { name: subscription.name.clone(), spec: Some(spec), ..Default::default() };
    client.admin().await?.apply_subscription(request).await.map_err(weir_client::Error::from)?;
    Ok(())
}

async fn apply_files(client: &Client, files: &[PathBuf]) -> anyhow::Result<()> {
    let (mut declared, mut errors) = Default::default();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|e| anyhow::anyhow!("{}: {e}", file.display()))?;
        manifest::read_text(file, &text, &mut declared, &mut errors);
    }
    if !errors.is_empty() {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow::bail!("nothing was applied:\n{}", lines.join("\n"));
    }
    for topic in &declared.topics {
        apply_topic(client, topic).await?;
        println!("topic {} applied", topic.name);
    }
    for subscription in &declared.subscriptions {
        apply_subscription(client, subscription).await?;
        println!("subscription {} applied", subscription.name);
    }
    Ok(())
}

fn topic_json(topic: &v1::Topic, statuses: &[v1::PartitionStatus]) -> serde_json::Value {
    let spec = topic.spec.unwrap_or_default();
    let partitions = topic.partitions.iter();
    let partition = |p: &v1::Partition| {
        let mut json = serde_json::json!({"partition": p.partition, "leader": p.leader, "replicas": p.replicas,
            "settled": p.settled});
        if let Some(s) = statuses.iter().find(|s| s.group == p.group) {
            json["inSync"] = in_sync(s).into();
            json["term"] = s.term.into();
            json["startOffset"] = s.start_offset.into();
            json["highWatermark"] = s.high_watermark.into();
            json["logBytes"] = s.log_bytes.into();
        }
        json
    };
    serde_json::json!({"name": topic.name, "partitions": spec.partitions, "replicas": spec.replicas,
        "retentionMs": spec.retention_ms, "retentionBytes": spec.retention_bytes,
        "durability": if spec.quorum_memory { "quorumMemory" } else { "quorumSync" },
        "assignment": partitions.map(partition).collect::<Vec<_>>()})
}

fn in_sync(status: &v1::PartitionStatus) -> Vec<u64> {
    status.replicas.iter().filter(|r| r.in_sync && r.voter).map(|r| r.broker).collect()
}

pub(crate) async fn topic(client: &Client, command: Topic, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    match command {
        Topic::List => {
            if output == Output::Json {
                println!(
                    "{}",
                    serde_json::Value::Array(cluster.metadata.topics.iter().map(|t| topic_json(t, &[])).collect())
                );
                return Ok(());
            }
            println!("{:<40} {:>10} {:>8}", "NAME", "PARTITIONS", "REPLICAS");
            for topic in &cluster.metadata.topics {
                let spec = topic.spec.unwrap_or_default();
                println!("{:<40} {:>10} {:>8}", topic.name, spec.partitions, spec.replicas);
            }
        }
        Topic::Describe { name } => {
            let topic = cluster.topic(&name).ok_or_else(|| anyhow::anyhow!("topic {name} does not exist"))?;
            let statuses = client.describe(std::slice::from_ref(&topic.name)).await?;
            if output == Output::Json {
                println!("{}", topic_json(topic, &statuses));
                return Ok(());
            }
            println!("{}", topic.name);
            println!(
                "{:>9} {:>7} {:<12} {:<12} {:>12} {:>12} {:>11} SETTLED",
                "PARTITION", "LEADER", "REPLICAS", "IN SYNC", "START", "END", "SIZE"
            );
            for p in &topic.partitions {
                let list = |ids: &[u64]| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
                let status = statuses.iter().find(|s| s.group == p.group);
                let offset = |get: fn(&v1::PartitionStatus) -> u64| status.map_or("-".into(), |s| get(s).to_string());
                println!(
                    "{:>9} {:>7} {:<12} {:<12} {:>12} {:>12} {:>11} {}",
                    p.partition,
                    p.leader,
                    list(&p.replicas),
                    status.map_or("-".into(), |s| list(&in_sync(s))),
                    offset(|s| s.start_offset),
                    offset(|s| s.high_watermark),
                    status.map_or("-".into(), |s| indicatif::HumanBytes(s.log_bytes).to_string()),
                    p.settled
                );
            }
        }
        Topic::Apply { file } => apply_files(client, &file).await?,
        Topic::Unschedule { name, partition, offset } => {
            weir_client::schedule::cancel(client, &Scheduled { topic: name, partition, offset }).await?;
            println!("taken back");
        }
        Topic::Delete { name } => {
            let request = v1::DeleteRequest { name: name.clone(), ..Default::default() };
            client.admin().await?.delete_topic(request).await.map_err(weir_client::Error::from)?;
            println!("topic {name} deleted");
        }
    }
    Ok(())
}

pub(crate) async fn subscription(client: &Client, command: Subscription, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    match command {
        Subscription::List => {
            let ordinary = cluster.metadata.subscriptions.iter().filter(|s| s.snapshot_of == 0);
            let list: Vec<&v1::Subscription> = ordinary.collect();
            if output == Output::Json {
                let one = |s: &&v1::Subscription| serde_json::json!({"name": s.name, "topic": s.spec.as_ref().map(|x| x.topic.clone())});
                println!("{}", serde_json::Value::Array(list.iter().map(one).collect()));
                return Ok(());
            }
            println!("{:<40} TOPIC", "NAME");
            for s in &list {
                println!("{:<40} {}", s.name, s.spec.as_ref().map_or("", |x| &x.topic));
            }
        }
        Subscription::Describe { name } => describe_subscription(client, &name, output).await?,
        Subscription::Apply { file } => apply_files(client, &file).await?,
        Subscription::Delete { name } => {
            let request = v1::DeleteRequest { name: name.clone(), ..Default::default() };
            client.admin().await?.delete_subscription(request).await.map_err(weir_client::Error::from)?;
            println!("subscription {name} deleted");
        }
        Subscription::Seek { name, to, to_snapshot } => {
            match (to, to_snapshot) {
                (_, Some(snapshot)) => weir_client::subscriber::seek_to_snapshot(client, &name, &snapshot).await?,
                (Some(to), None) => weir_client::subscriber::seek(client, &name, to).await?,
                (None, None) => unreachable!("clap requires one"),
            }
            println!("{name} moved");
        }
        Subscription::Snapshot { name, snapshot, delete } => {
            let request = v1::SnapshotRequest { subscription: name.clone(), name: snapshot.clone() };
            let mut admin = client.admin().await?;
            if delete {
                admin.delete_snapshot(request).await.map_err(weir_client::Error::from)?;
                println!("snapshot {snapshot} of {name} deleted");
                return Ok(());
            }
            admin.take_snapshot(request).await.map_err(weir_client::Error::from)?;
            // taken where every partition has its part
            let full = format!("{}@{snapshot}", weir_client::full_name(&name));
            client.refresh().await?;
            crate::redrive::backlog(client, &full).await?;
            println!("snapshot {snapshot} of {name} taken");
        }
        Subscription::Snapshots { name } => list_snapshots(client, &name, output).await?,
        Subscription::Redrive { name, max } => {
            let count = crate::redrive::redrive(client, &name, max).await?;
            println!("{count} dead letters of {name} were put back");
        }
    }
    Ok(())
}

/// How the partitions stand that a subscription reads.
pub(crate) async fn read_by(
    client: &Client,
    subscription: &v1::Subscription,
) -> Result<Vec<v1::PartitionStatus>, weir_client::Error> {
    // asked for no topics, brokers tell of all
    if subscription.topics.is_empty() { Ok(Vec::new()) } else { client.describe(&subscription.topics).await }
}

async fn list_snapshots(client: &Client, name: &str, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    let full = weir_client::full_name(name);
    let found = cluster.subscription(&full);
    let found = found.ok_or_else(|| anyhow::anyhow!("subscription {name} does not exist"))?;
    let statuses = read_by(client, found).await?;
    let mut rows = Vec::new();
    for snapshot in cluster.metadata.subscriptions.iter().filter(|s| s.snapshot_of == found.id) {
        let short = snapshot.name.rsplit('@').next().unwrap_or_default().to_owned();
        let mine = statuses.iter().flat_map(|p| p.subscriptions.iter().filter(|s| s.subscription == snapshot.name));
        let (messages, bytes) = mine.fold((0, 0), |(m, b), s| (m + s.backlog, b + s.backlog_bytes));
        rows.push((short, messages, bytes));
    }
    if output == Output::Json {
        let row = |(name, messages, bytes): &(String, u64, u64)| serde_json::json!({"name": name, "holds": messages, "holdsBytes": bytes});
        println!("{}", serde_json::Value::Array(rows.iter().map(row).collect()));
        return Ok(());
    }
    println!("{:<40} {:>12} {:>12}", "NAME", "HOLDS", "ABOUT");
    for (name, messages, bytes) in rows {
        println!("{name:<40} {messages:>12} {:>12}", indicatif::HumanBytes(bytes).to_string());
    }
    Ok(())
}

async fn describe_subscription(client: &Client, name: &str, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    let full = weir_client::full_name(name);
    let found = cluster.subscription(&full);
    let found = found.ok_or_else(|| anyhow::anyhow!("subscription {name} does not exist"))?;
    let topic = found.spec.as_ref().map_or("", |s| s.topic.as_str()).to_owned();
    let statuses = read_by(client, found).await?;
    let many = weir_proto::is_pattern(&topic);
    let now_ms = crate::data::now_ms();
    let mine = |p: &v1::PartitionStatus| p.subscriptions.iter().find(|s| s.subscription == full).cloned();
    let age = |s: &v1::SubscriptionStatus| if s.oldest_ms == 0 { 0 } else { now_ms.saturating_sub(s.oldest_ms as i64) };
    let rows: Vec<_> = statuses.iter().filter_map(|p| Some((p, mine(p)?))).collect();
    let backlog: u64 = rows.iter().map(|(_, s)| s.backlog).sum();
    let bytes: u64 = rows.iter().map(|(_, s)| s.backlog_bytes).sum();
    if output == Output::Json {
        let row = |(p, s): &(&v1::PartitionStatus, v1::SubscriptionStatus)| {
            serde_json::json!({"topic": p.topic, "partition": p.partition, "position": s.position,
                "end": p.high_watermark, "backlog": s.backlog,
                "backlogBytes": s.backlog_bytes, "ackedAbove": s.acked_above, "oldestUnackedMs": age(s)})
        };
        let partitions: Vec<_> = rows.iter().map(row).collect();
        println!(
            "{}",
            serde_json::json!({"name": full, "topic": topic, "backlog": backlog, "backlogBytes": bytes, "partitions": partitions})
        );
        return Ok(());
    }
    println!("{full} reads {topic}, {backlog} messages behind, about {}", indicatif::HumanBytes(bytes));
    println!("{:>9} {:>12} {:>12} {:>10} {:>11} OLDEST", "PARTITION", "POSITION", "END", "BACKLOG", "ACKED ABOVE");
    for (p, s) in &rows {
        let (partition, end) = (p.partition, p.high_watermark);
        let topic = if many { p.topic.as_str() } else { "" };
        let oldest = indicatif::HumanDuration(std::time::Duration::from_millis(age(s) as u64));
        let oldest = if s.oldest_ms == 0 { "-".to_owned() } else { oldest.to_string() };
        println!(
            "{partition:>9} {:>12} {end:>12} {:>10} {:>11} {oldest:<14} {topic}",
            s.position, s.backlog, s.acked_above
        );
    }
    Ok(())
}

pub(crate) async fn cluster(client: &Client, command: Cluster, output: Output) -> anyhow::Result<()> {
    let m = &client.cluster().metadata;
    match command {
        Cluster::Status => {
            let partitions = || m.topics.iter().flat_map(|t| &t.partitions);
            let leads = |id: u64| partitions().filter(|p| p.leader == id).count();
            let holds = |id: u64| partitions().filter(|p| p.replicas.contains(&id)).count();
            let leaderless = leads(0);
            let moving = partitions().filter(|p| !p.settled).count();
            if output == Output::Json {
                let broker = |b: &v1::Broker| serde_json::json!({"id": b.id, "name": b.name, "phase": b.phase, "client": b.client_address, "admin": b.admin_address, "leads": leads(b.id), "replicas": holds(b.id)});
                let brokers: Vec<_> = m.brokers.iter().map(broker).collect();
                println!(
                    "{}",
                    serde_json::json!({"clusterId": m.cluster_id, "version": m.version, "controller": m.controller, "brokers": brokers, "leaderless": leaderless, "moving": moving})
                );
                return Ok(());
            }
            println!(
                "cluster {}, metadata leader {}, {leaderless} partitions without leader, {moving} moving",
                m.cluster_id, m.controller
            );
            println!("{:>4} {:<20} {:<9} {:>6} {:>8} CLIENTS", "ID", "NAME", "PHASE", "LEADS", "REPLICAS");
            for b in &m.brokers {
                println!(
                    "{:>4} {:<20} {:<9} {:>6} {:>8} {}",
                    b.id,
                    b.name,
                    b.phase,
                    leads(b.id),
                    holds(b.id),
                    b.client_address
                );
            }
        }
        Cluster::Add { name } => {
            let answer = client.admin().await?.add_broker(v1::AddBrokerRequest { name: name.clone() }).await;
            answer.map_err(weir_client::Error::from)?;
            println!("broker {name} may join");
        }
        Cluster::Drain { id, cancel } => {
            client
                .admin()
                .await?
                .drain_broker(v1::DrainBrokerRequest { id, cancel })
                .await
                .map_err(weir_client::Error::from)?;
            match cancel {
                true => println!("broker {id} stays"),
                false => println!("broker {id} is being drained; watch `weir cluster status`"),
            }
        }
    }
    Ok(())
}
