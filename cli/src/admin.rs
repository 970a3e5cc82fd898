//! `weir topic`, `weir subscription`, `weir cluster`.

use crate::{Output, args};
use clap::Subcommand;
use serde_json::json;
use std::path::{Path, PathBuf};
use weir_broker::outln;
use weir_client::schedule::Scheduled;
use weir_client::{Client, Error, full_name};
use weir_crds::{ValidatedSubscription, ValidatedTopic, manifest};
use weir_proto::v1;

/// Manifests to apply.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  weir topic apply -f examples/orders.yaml
  weir topic apply -f examples
  cat examples/orders.yaml | weir topic apply -f -
What is wrong with one file or resource leaves the others alone, and the exit code is then 1.")]
pub(crate) struct Apply {
    /// Manifest files, folders of them, or - for standard input.
    #[arg(short, long, required = true)]
    file: Vec<PathBuf>,
}

/// What a list holds.
#[derive(clap::Args)]
pub(crate) struct Listed {
    /// Those too that brokers keep for themselves: what is scheduled, snapshots, and the positions of both and of redrives.
    #[arg(long)]
    all: bool,
}

/// A topic that there is.
#[derive(clap::Args)]
pub(crate) struct TopicName {
    /// The topic.
    #[arg(value_parser = args::name)]
    name: String,
}

/// A subscription that there is.
#[derive(clap::Args)]
pub(crate) struct SubscriptionName {
    /// The subscription.
    #[arg(value_parser = args::name)]
    name: String,
}

#[derive(Subcommand)]
pub(crate) enum Topic {
    /// All topics.
    List(Listed),
    /// One topic with its partitions.
    Describe(TopicName),
    /// Makes or changes the topics and subscriptions of manifest files.
    Apply(Apply),
    /// Deletes a topic with its records, its subscriptions and their snapshots. A topic made again under the name begins with none.
    Delete(TopicName),
    /// Takes a message back that `weir publish --delay` has scheduled.
    #[command(after_help = "Example: weir topic unschedule reminders 0 17 --topic-id 42")]
    Unschedule {
        /// The topic it was published to.
        #[arg(value_parser = args::name)]
        name: String,
        /// Partition and offset, as `weir publish --delay` printed them.
        #[arg(value_parser = args::partition, allow_hyphen_values = true)]
        partition: u32,
        /// See above.
        #[arg(value_parser = args::whole, allow_hyphen_values = true)]
        offset: u64,
        /// The topic's id, as `weir publish --delay -o json` printed it: nothing is taken back of a topic that was re-created since.
        /// Default: whatever is there now.
        #[arg(long, value_parser = args::count, allow_hyphen_values = true)]
        topic_id: Option<u64>,
    },
}

#[derive(Subcommand)]
pub(crate) enum Subscription {
    /// All subscriptions.
    List(Listed),
    /// One subscription with its position and backlog in each partition.
    Describe(SubscriptionName),
    /// Makes or changes the topics and subscriptions of manifest files.
    Apply(Apply),
    /// Deletes a subscription with its position and its snapshots.
    Delete(SubscriptionName),
    /// Moves a subscription's position in all partitions: what lies behind it comes again, what lies before it does not come.
    #[command(group(clap::ArgGroup::new("place").required(true).args(["to", "to_snapshot"])))]
    #[command(after_help = "Examples:
  weir subscription seek mail --to earliest
  weir subscription seek mail --to-snapshot before-upgrade
TO is earliest, latest, an offset, or a time such as 2026-01-31T08:00:00Z, or one as ms since the epoch (from 1000000000000 on).")]
    Seek {
        #[command(flatten)]
        of: SubscriptionName,
        /// The place.
        #[arg(long, value_parser = args::from, allow_hyphen_values = true)]
        to: Option<weir_client::consumer::From>,
        /// The position, with its acks, that this snapshot kept.
        #[arg(long, value_parser = args::part)]
        to_snapshot: Option<String>,
    },
    /// Keeps a subscription's position and acks as they are now, under a name, to seek to later. It holds the records behind it.
    #[command(after_help = "Example: weir subscription snapshot mail before-upgrade")]
    Snapshot {
        #[command(flatten)]
        of: SubscriptionName,
        /// The snapshot.
        #[arg(value_parser = args::part)]
        snapshot: String,
        /// Delete it instead.
        #[arg(long)]
        delete: bool,
    },
    /// The snapshots of a subscription, and how much they hold.
    Snapshots(SubscriptionName),
    /// Puts dead letters back into the topic they came from, for this subscription only.
    #[command(after_help = "Example: weir subscription redrive recommendation --max 10")]
    Redrive {
        #[command(flatten)]
        of: SubscriptionName,
        /// Put back this many at most.
        #[arg(long, default_value_t = u64::MAX, hide_default_value = true, value_parser = args::count, allow_hyphen_values = true)]
        max: u64,
    },
}

#[derive(Subcommand)]
pub(crate) enum Cluster {
    /// Brokers and how partitions stand on them.
    Status,
    /// Names a broker that may join. One that is being drained is kept with `weir cluster drain ID --cancel` instead.
    Add {
        /// Its name, as `weir-broker --name` has it.
        #[arg(value_parser = args::part)]
        name: String,
    },
    /// Moves everything off a broker, then removes it. Refused if the other active brokers are fewer than the replicas that a topic wants.
    #[command(after_help = "Examples:
  weir cluster drain 3
  weir cluster drain 3 --cancel")]
    Drain {
        /// Its id, as `weir cluster status` prints it.
        #[arg(value_parser = args::count, allow_hyphen_values = true)]
        id: u64,
        /// End the drain: the broker stays, and takes replicas again.
        #[arg(long)]
        cancel: bool,
    },
}

/// Applies a checked topic, and returns the version of the metadata that contains it.
pub(crate) async fn apply_topic(client: &Client, topic: &ValidatedTopic) -> anyhow::Result<u64> {
    let request = v1::ApplyTopicRequest { name: topic.name.clone(), spec: Some(topic.spec), ..Default::default() };
    let applied = client.admin().await?.apply_topic(request).await.map_err(Error::from)?;
    Ok(applied.into_inner().version)
}

/// Applies a checked subscription.
pub(crate) async fn apply_subscription(client: &Client, subscription: &ValidatedSubscription) -> anyhow::Result<()> {
    let (name, spec) = (subscription.name.clone(), Some(subscription.spec.clone()));
    let request = v1::ApplySubscriptionRequest { name, spec, ..Default::default() };
    client.admin().await?.apply_subscription(request).await.map_err(Error::from)?;
    Ok(())
}

/// A change reaches the brokers that follow the metadata within this time.
const KNOWN_WITHIN: std::time::Duration = std::time::Duration::from_secs(10);

/// What manifests declare, and what is wrong with them.
fn read(files: &[PathBuf]) -> (manifest::Declared, Vec<String>) {
    let (mut declared, mut errors, mut wrong) = Default::default();
    for file in files {
        if file == Path::new("-") {
            manifest::read_from(Path::new("standard input"), std::io::stdin(), &mut declared, &mut errors);
        } else if !file.is_dir() {
            manifest::read_file(file, &mut declared, &mut errors);
        } else if let Err(error) = manifest::read_folder(file, &mut declared, &mut errors) {
            Vec::push(&mut wrong, format!("{}: {error}", file.display()));
        }
    }
    wrong.extend(errors.iter().map(ToString::to_string));
    (declared, wrong)
}

/// Replicas of a topic that does not say how many: as usual, or the odd number that the brokers there are allow.
fn replicas_on(brokers: usize) -> u32 {
    let most = u32::try_from(brokers).unwrap_or(u32::MAX).clamp(1, weir_crds::REPLICAS_DEFAULT);
    if most.is_multiple_of(2) { most - 1 } else { most }
}

async fn apply_files(client: &Client, files: &[PathBuf], output: Output) -> anyhow::Result<()> {
    let (declared, mut wrong) = read(files);
    let manifest::Declared { topics, subscriptions, origins } = declared;
    if wrong.is_empty() && topics.is_empty() && subscriptions.is_empty() {
        anyhow::bail!("there is no Topic and no Subscription in what -f names");
    }
    let (mut applied, mut version) = (Vec::new(), 0);
    let mut took = |kind: &str, name: &str, done: anyhow::Result<()>| match done {
        Ok(()) => {
            applied.push(json!({"kind": kind, "name": name}));
            if output == Output::Json { Ok(()) } else { outln!("{kind} {name} applied") }
        }
        Err(error) => {
            let what = format!("{kind} {name}");
            let at = origins.get(&what).map_or(String::new(), |(file, line)| format!("{}:{line}: ", file.display()));
            wrong.push(format!("{at}{what}: {error:#}"));
            Ok(())
        }
    };
    let brokers = client.cluster().metadata.brokers.iter().filter(|b| b.phase == "active").count();
    for mut topic in topics {
        if !topic.says_replicas && brokers < topic.spec.replicas as usize {
            topic.spec.replicas = replicas_on(brokers);
            let v1::TopicSpec { replicas, .. } = topic.spec;
            output.note(format_args!("topic {} gets {replicas} replicas: {brokers} brokers are active", topic.name));
        }
        let done = apply_topic(client, &topic).await.map(|applied| version = version.max(applied));
        took("topic", &topic.name, done)?;
    }
    for subscription in &subscriptions {
        took("subscription", &subscription.name, apply_subscription(client, subscription).await)?;
    }
    if output == Output::Json {
        outln!("{}", json!({"applied": applied, "wrong": wrong}))?;
    }
    let known = client.refresh_to(version, KNOWN_WITHIN).await.unwrap_or_else(|_| client.cluster());
    for ValidatedSubscription { name, spec } in &subscriptions {
        let dead = &spec.dead_letter_topic;
        if !dead.is_empty() && known.topic(dead).is_none() {
            output.note(format_args!("subscription {name}: dead-letter topic {dead} does not exist: {DEAD_MISSING}"));
        }
    }
    match wrong.as_slice() {
        [] => Ok(()),
        [one] => anyhow::bail!("{one}"),
        many => anyhow::bail!("{} things are wrong:\n{}", many.len(), many.join("\n")),
    }
}

fn topic_json(topic: &v1::Topic, statuses: &[v1::PartitionStatus]) -> serde_json::Value {
    let spec = topic.spec.unwrap_or_default();
    let partitions = topic.partitions.iter();
    let partition = |p: &v1::Partition| {
        let mut json = json!({"partition": p.partition, "leader": p.leader, "replicas": p.replicas,
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
    json!({"name": topic.name, "partitions": spec.partitions, "replicas": spec.replicas,
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
        Topic::List(Listed { all }) => {
            let listed: Vec<&v1::Topic> = cluster.metadata.topics.iter().filter(|t| all || !t.internal).collect();
            if output == Output::Json {
                outln!("{}", serde_json::Value::Array(listed.iter().map(|t| topic_json(t, &[])).collect()))?;
                return Ok(());
            }
            outln!("{:<40} {:>10} {:>8}", "NAME", "PARTITIONS", "REPLICAS")?;
            for topic in listed {
                let spec = topic.spec.unwrap_or_default();
                outln!("{:<40} {:>10} {:>8}", topic.name, spec.partitions, spec.replicas)?;
            }
        }
        Topic::Describe(TopicName { name }) => {
            let topic = cluster.topic(&name).ok_or_else(|| Error::no_topic(&name))?;
            let statuses = client.describe(std::slice::from_ref(&topic.name)).await?;
            if output == Output::Json {
                outln!("{}", topic_json(topic, &statuses))?;
                return Ok(());
            }
            outln!("{}", topic.name)?;
            outln!(
                "{:>9} {:>7} {:<12} {:<12} {:>12} {:>12} {:>11} SETTLED",
                "PARTITION",
                "LEADER",
                "REPLICAS",
                "IN SYNC",
                "START",
                "END",
                "SIZE"
            )?;
            for p in &topic.partitions {
                let list = |ids: &[u64]| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
                let status = statuses.iter().find(|s| s.group == p.group);
                let offset = |get: fn(&v1::PartitionStatus) -> u64| status.map_or("-".into(), |s| get(s).to_string());
                outln!(
                    "{:>9} {:>7} {:<12} {:<12} {:>12} {:>12} {:>11} {}",
                    p.partition,
                    p.leader,
                    list(&p.replicas),
                    status.map_or("-".into(), |s| list(&in_sync(s))),
                    offset(|s| s.start_offset),
                    offset(|s| s.high_watermark),
                    status.map_or("-".into(), |s| indicatif::HumanBytes(s.log_bytes).to_string()),
                    p.settled
                )?;
            }
        }
        Topic::Apply(apply) => apply_files(client, &apply.file, output).await?,
        Topic::Unschedule { name, partition, offset, topic_id } => {
            let topic_id = topic_id.unwrap_or(0);
            let topic = full_name(&name);
            weir_client::schedule::cancel(client, &Scheduled { topic: name, partition, offset, topic_id }).await?;
            let json = json!({"topic": topic, "partition": partition, "offset": offset, "takenBack": true});
            output.done("taken back", json)?;
        }
        Topic::Delete(TopicName { name }) => {
            let request = v1::DeleteRequest { name: name.clone(), ..Default::default() };
            client.admin().await?.delete_topic(request).await.map_err(Error::from)?;
            output.done(format_args!("topic {name} deleted"), json!({"name": full_name(&name), "deleted": true}))?;
        }
    }
    Ok(())
}

pub(crate) async fn subscription(client: &Client, command: Subscription, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    match command {
        Subscription::List(Listed { all }) => {
            let listed = cluster.metadata.subscriptions.iter().filter(|s| all || !s.internal);
            let list: Vec<&v1::Subscription> = listed.collect();
            if output == Output::Json {
                let one =
                    |s: &&v1::Subscription| json!({"name": s.name, "topic": s.spec.as_ref().map(|x| x.topic.clone())});
                outln!("{}", serde_json::Value::Array(list.iter().map(one).collect()))?;
                return Ok(());
            }
            outln!("{:<40} TOPIC", "NAME")?;
            for s in &list {
                outln!("{:<40} {}", s.name, s.spec.as_ref().map_or("", |x| &x.topic))?;
            }
        }
        Subscription::Describe(SubscriptionName { name }) => describe_subscription(client, &name, output).await?,
        Subscription::Apply(apply) => apply_files(client, &apply.file, output).await?,
        Subscription::Delete(SubscriptionName { name }) => {
            let request = v1::DeleteRequest { name: name.clone(), ..Default::default() };
            client.admin().await?.delete_subscription(request).await.map_err(Error::from)?;
            let json = json!({"name": full_name(&name), "deleted": true});
            output.done(format_args!("subscription {name} deleted"), json)?;
        }
        Subscription::Seek { of: SubscriptionName { name }, to, to_snapshot } => {
            match (to, to_snapshot) {
                (_, Some(snapshot)) => weir_client::subscriber::seek_to_snapshot(client, &name, &snapshot).await?,
                (Some(to), None) => weir_client::subscriber::seek(client, &name, to).await?,
                (None, None) => unreachable!("clap requires one"),
            }
            output.done(format_args!("{name} moved"), json!({"name": full_name(&name), "moved": true}))?;
        }
        Subscription::Snapshot { of: SubscriptionName { name }, snapshot, delete } => {
            let request = v1::SnapshotRequest { subscription: name.clone(), name: snapshot.clone() };
            let mut admin = client.admin().await?;
            if delete {
                admin.delete_snapshot(request).await.map_err(Error::from)?;
                let json = json!({"subscription": full_name(&name), "snapshot": snapshot, "deleted": true});
                return Ok(output.done(format_args!("snapshot {snapshot} of {name} deleted"), json)?);
            }
            let version = admin.take_snapshot(request).await.map_err(Error::from)?.into_inner().version;
            // taken where every partition has its part
            let cluster = client.refresh_to(version, KNOWN_WITHIN).await?;
            let of = cluster.subscription(&name).map_or(0, |s| s.id);
            let taken = cluster.metadata.subscriptions.iter().find(|s| s.snapshot_of == of && s.snapshot == snapshot);
            let taken = taken.ok_or_else(|| anyhow::anyhow!("snapshot {snapshot} was deleted meanwhile"))?;
            crate::redrive::backlog(client, &taken.name).await?;
            let json = json!({"subscription": full_name(&name), "snapshot": snapshot, "taken": true});
            output.done(format_args!("snapshot {snapshot} of {name} taken"), json)?;
        }
        Subscription::Snapshots(SubscriptionName { name }) => list_snapshots(client, &name, output).await?,
        Subscription::Redrive { of: SubscriptionName { name }, max } => {
            let done = crate::redrive::redrive(client, &name, max).await?;
            let json = json!({"name": full_name(&name), "putBack": done.count, "left": done.left});
            output.done(format_args!("{} dead letters of {name} were put back", done.count), json)?;
            if output != Output::Json {
                done.left.iter().for_each(|left| output.note(format_args!("left where it is: {left}")));
            }
            anyhow::ensure!(done.left.is_empty(), "{} dead letters of {name} could not be put back", done.left.len());
        }
    }
    Ok(())
}

/// How the partitions stand that a subscription reads.
pub(crate) async fn read_by(
    client: &Client,
    subscription: &v1::Subscription,
) -> Result<Vec<v1::PartitionStatus>, Error> {
    // asked for no topics, brokers tell of all
    if subscription.topics.is_empty() { Ok(Vec::new()) } else { client.describe(&subscription.topics).await }
}

async fn list_snapshots(client: &Client, name: &str, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    let full = full_name(name);
    let found = cluster.subscription(&full);
    let found = found.ok_or_else(|| Error::no_subscription(name))?;
    let statuses = read_by(client, found).await?;
    let mut rows = Vec::new();
    for snapshot in cluster.metadata.subscriptions.iter().filter(|s| s.snapshot_of == found.id) {
        let mine = statuses.iter().flat_map(|p| p.subscriptions.iter().filter(|s| s.subscription == snapshot.name));
        let (messages, bytes) =
            mine.fold((0u64, 0u64), |(m, b), s| (m.saturating_add(s.backlog), b.saturating_add(s.backlog_bytes)));
        rows.push((snapshot.snapshot.clone(), messages, bytes));
    }
    if output == Output::Json {
        let row = |(name, messages, bytes): &(String, u64, u64)| json!({"name": name, "holds": messages, "holdsBytes": bytes});
        outln!("{}", serde_json::Value::Array(rows.iter().map(row).collect()))?;
        return Ok(());
    }
    outln!("{:<40} {:>12} {:>12}", "NAME", "HOLDS", "ABOUT")?;
    for (name, messages, bytes) in rows {
        outln!("{name:<40} {messages:>12} {:>12}", indicatif::HumanBytes(bytes).to_string())?;
    }
    Ok(())
}

/// What becomes of dead letters that have no topic to go to.
const DEAD_MISSING: &str = "messages that fail too often stay in their topic until it does";

async fn describe_subscription(client: &Client, name: &str, output: Output) -> anyhow::Result<()> {
    let cluster = client.cluster();
    let full = full_name(name);
    let found = cluster.subscription(&full);
    let found = found.ok_or_else(|| Error::no_subscription(name))?;
    let topic = found.spec.as_ref().map_or("", |s| s.topic.as_str()).to_owned();
    let statuses = read_by(client, found).await?;
    let many = weir_proto::is_pattern(&topic);
    let now_ms = crate::data::now_ms();
    let mine = |p: &v1::PartitionStatus| p.subscriptions.iter().find(|s| s.subscription == full).cloned();
    let age = |s: &v1::SubscriptionStatus| s.oldest_ms.map_or(0, |oldest| now_ms.saturating_sub(oldest as i64).max(0));
    let rows: Vec<_> = statuses.iter().filter_map(|p| Some((p, mine(p)?))).collect();
    let backlog: u64 = rows.iter().map(|(_, s)| s.backlog).sum();
    let bytes: u64 = rows.iter().map(|(_, s)| s.backlog_bytes).sum();
    let dead = found.spec.as_ref().map_or("", |s| s.dead_letter_topic.as_str());
    let dead_missing = !dead.is_empty() && cluster.topic(dead).is_none();
    if output == Output::Json {
        let row = |(p, s): &(&v1::PartitionStatus, v1::SubscriptionStatus)| {
            json!({"topic": p.topic, "partition": p.partition, "position": s.position,
                "end": p.high_watermark, "backlog": s.backlog,
                "backlogBytes": s.backlog_bytes, "ackedAbove": s.acked_above, "oldestUnackedMs": age(s)})
        };
        let partitions: Vec<_> = rows.iter().map(row).collect();
        outln!(
            "{}",
            json!({"name": full, "topic": topic, "backlog": backlog, "backlogBytes": bytes, "partitions": partitions,
                "deadLetterTopic": (!dead.is_empty()).then_some(dead), "deadLetterTopicExists": (!dead.is_empty()).then_some(!dead_missing)})
        )?;
        return Ok(());
    }
    outln!("{full} reads {topic}, {backlog} messages behind, about {}", indicatif::HumanBytes(bytes))?;
    if dead_missing {
        outln!("dead-letter topic {dead} does not exist: {DEAD_MISSING}")?;
    }
    outln!("{:>9} {:>12} {:>12} {:>10} {:>11} OLDEST", "PARTITION", "POSITION", "END", "BACKLOG", "ACKED ABOVE")?;
    for (p, s) in &rows {
        let (partition, end) = (p.partition, p.high_watermark);
        let topic = if many { p.topic.as_str() } else { "" };
        let oldest = indicatif::HumanDuration(std::time::Duration::from_millis(age(s) as u64));
        let oldest = s.oldest_ms.map_or("-".to_owned(), |_| oldest.to_string());
        outln!(
            "{partition:>9} {:>12} {end:>12} {:>10} {:>11} {oldest:<14} {topic}",
            s.position,
            s.backlog,
            s.acked_above
        )?;
    }
    Ok(())
}

/// The phase of a broker after a change; `None` for one that is out of the cluster.
async fn phase_of(client: &Client, id: u64) -> Result<Option<String>, Error> {
    let cluster = client.refresh().await?;
    Ok(cluster.metadata.brokers.iter().find(|b| b.id == id).map(|b| b.phase.clone()))
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
            let rolled_back = weir_proto::rolled_back(m);
            if output == Output::Json {
                let broker = |b: &v1::Broker| json!({"id": b.id, "name": b.name, "phase": b.phase, "client": b.client_address, "admin": b.admin_address, "leads": leads(b.id), "replicas": holds(b.id)});
                let brokers: Vec<_> = m.brokers.iter().map(broker).collect();
                outln!(
                    "{}",
                    json!({"clusterId": m.cluster_id, "version": m.version, "controller": m.controller, "brokers": brokers, "leaderless": leaderless, "moving": moving, "rolledBack": rolled_back})
                )?;
                return Ok(());
            }
            outln!(
                "cluster {}, metadata leader {}, {leaderless} partitions without leader, {moving} moving",
                m.cluster_id,
                m.controller
            )?;
            if !rolled_back.is_empty() {
                outln!("volumes rolled back to older copies: {}", rolled_back.join(", "))?;
            }
            outln!("{:>4} {:<20} {:<9} {:>6} {:>8} CLIENTS", "ID", "NAME", "PHASE", "LEADS", "REPLICAS")?;
            for b in &m.brokers {
                outln!(
                    "{:>4} {:<20} {:<9} {:>6} {:>8} {}",
                    b.id,
                    b.name,
                    b.phase,
                    leads(b.id),
                    holds(b.id),
                    b.client_address
                )?;
            }
        }
        Cluster::Add { name } => {
            let answer = client.admin().await?.add_broker(v1::AddBrokerRequest { name: name.clone() }).await;
            let id = answer.map_err(Error::from)?.into_inner().id;
            let json = |phase| json!({"id": id, "name": name, "phase": phase});
            match phase_of(client, id).await?.as_deref() {
                Some("draining") => {
                    anyhow::bail!("broker {name} is being drained; `weir cluster drain {id} --cancel` keeps it")
                }
                Some("active") => output.done(format_args!("broker {name} has joined"), json("active"))?,
                _ => output.done(format_args!("broker {name} may join"), json("expected"))?,
            }
        }
        Cluster::Drain { id, cancel } => {
            client.admin().await?.drain_broker(v1::DrainBrokerRequest { id, cancel }).await.map_err(Error::from)?;
            let (text, phase) = match phase_of(client, id).await? {
                _ if cancel => ("stays", "active"),
                Some(_) => ("is being drained; watch `weir cluster status`", "draining"),
                None => ("is removed", "removed"),
            };
            output.done(format_args!("broker {id} {text}"), json!({"id": id, "phase": phase}))?;
        }
    }
    Ok(())
}
