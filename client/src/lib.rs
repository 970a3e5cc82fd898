//! The Rust client of Weir. A [`Client`] knows the cluster and follows leaders; a [`producer::Producer`] publishes, idempotent and in
//! order for each key; a [`subscriber::Subscriber`] reads a subscription; [`consumer`] reads partitions by themselves.

pub mod consumer;
pub mod producer;
pub mod requester;
pub mod schedule;
pub mod subscriber;
pub mod transport;

use futures::StreamExt as _;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tonic_types::StatusExt as _;
use transport::{Scheme, Transport};
pub use weir_proto::records::{Compression, Record};
/// The wire contract, for what this client has no method of its own for.
pub use weir_proto::v1 as proto;
use weir_proto::{pages, v1};

/// The next broker is asked for metadata when the one before has not answered by then.
const ASK_NEXT_AFTER: Duration = Duration::from_millis(20);
/// A broker that has not answered by then is taken for gone.
const ANSWER_WITHIN: Duration = Duration::from_millis(700);
/// The same for a page of what it says of partitions, for which it reads.
const DESCRIBE_WITHIN: Duration = Duration::from_secs(1);
/// Topics of one request: even the longest names take less than the 4 MiB that a broker takes.
const TOPICS_OF_REQUEST_MAX: usize = 5_000;

/// Why an operation failed.
#[derive(Debug, Error, Clone)]
pub enum Error {
    /// The cluster refused; it will again.
    #[error("{message}")]
    Refused { code: tonic::Code, reason: String, message: String },
    /// No broker that can serve was reached within the deadline. A publish may or may not have happened.
    #[error("no answer within {after:?}: {last}")]
    Deadline { after: Duration, last: String },
    /// An address that is none.
    #[error(
        "'{0}' is not an address: use host:port, https://host:port, unix:PATH, or inproc:NAME of a broker of this process"
    )]
    Address(String),
    /// The producer or consumer has ended.
    #[error("closed")]
    Closed,
}

impl Error {
    /// The cluster has no topic of this name.
    pub fn no_topic(name: &str) -> Self {
        Self::missing("NO_TOPIC", format!("topic {name} does not exist"))
    }

    /// The cluster has no subscription of this name.
    pub fn no_subscription(name: &str) -> Self {
        Self::missing("NO_SUBSCRIPTION", format!("subscription {name} does not exist"))
    }

    fn missing(reason: &str, message: String) -> Self {
        Self::Refused { code: tonic::Code::NotFound, reason: reason.to_owned(), message }
    }

    /// Whether a broker said that it cannot do it just now.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Refused { code: tonic::Code::Unavailable, .. })
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        let reason = status.get_details_error_info().map_or(String::new(), |i| i.reason);
        Self::Refused { code: status.code(), reason, message: status.message().to_owned() }
    }
}

/// Whether trying again (elsewhere, later) may help.
pub fn is_transient(status: &tonic::Status) -> bool {
    use tonic::Code::*;
    let reason = status.get_details_error_info().map_or(String::new(), |i| i.reason);
    if reason == "REPLACED" {
        return false; // another has this member's name: taking it back would go on for ever
    }
    matches!(status.code(), Unavailable | Unknown | Cancelled | Aborted | ResourceExhausted | DeadlineExceeded)
        || reason == "NOT_LEADER"
}

/// `namespace/name`; a name without a namespace is in `default`.
pub fn full_name(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("default/{name}") }
}

/// The cluster as last seen.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// What a broker answered.
    pub metadata: v1::GetMetadataResponse,
}

impl Cluster {
    /// A subscription, by name or `namespace/name`.
    pub fn subscription(&self, name: &str) -> Option<&v1::Subscription> {
        let full = full_name(name);
        self.metadata.subscriptions.iter().find(|s| s.name == full)
    }

    /// A topic by name, with or without its namespace.
    pub fn topic(&self, name: &str) -> Option<&v1::Topic> {
        let full = full_name(name);
        self.metadata.topics.iter().find(|t| t.name == full)
    }

    /// Address of the leader of a partition, where known.
    pub fn leader(&self, topic: &str, partition: u32) -> Option<String> {
        self.address(self.topic(topic)?.partitions.get(partition as usize)?.leader)
    }

    /// Where a broker serves clients; `None` also for one that has not told it yet.
    pub fn address(&self, broker: u64) -> Option<String> {
        let found = self.metadata.brokers.iter().find(|b| b.id == broker);
        found.map(|b| b.client_address.clone()).filter(|a| !a.is_empty())
    }

    /// Where the broker serves that told this.
    pub(crate) fn answered_by(&self) -> Option<String> {
        self.address(self.metadata.answered_by)
    }
}

struct Inner {
    seeds: Vec<String>,
    /// of what a broker says of the others' addresses
    scheme: Scheme,
    channels: Mutex<HashMap<String, Transport>>,
    /// addresses of brokers that a seed reaches more directly, with that seed
    local: Mutex<HashMap<String, String>>,
    cluster: Mutex<Arc<Cluster>>,
    /// when the cluster was asked about last for several at once
    asked: tokio::sync::Mutex<Option<Instant>>,
}

/// A connection to a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// A client that begins at these addresses, separated by commas: `host:port`, with `http://` or `https://` before it or not;
    /// `unix:PATH` of a broker's socket; `inproc:NAME` of a broker of this process. Connects when first used. With `https://` all
    /// brokers are reached by TLS.
    pub fn new(servers: &str) -> Result<Self, Error> {
        let seeds: Vec<String> = servers.split(',').map(|s| s.trim().to_owned()).collect();
        let mut first = None;
        for seed in &seeds {
            let (scheme, address) = Scheme::split(seed);
            let uri = address.parse::<tonic::transport::Uri>();
            let reachable = scheme.is_local() || address.contains(':') && uri.is_ok();
            if address.is_empty() || !reachable {
                return Err(Error::Address(seed.clone()));
            }
            first = first.or((!scheme.is_local()).then_some(scheme));
        }
        Ok(Self(Arc::new(Inner {
            seeds,
            scheme: first.unwrap_or_default(),
            channels: Mutex::default(),
            local: Mutex::default(),
            cluster: Mutex::default(),
            asked: Default::default(),
        })))
    }

    /// A lazily connected way to an address, one of the seeds or of what a broker told, shared by all that use it.
    pub fn channel(&self, address: &str) -> Result<Transport, Error> {
        let local = self.0.local.lock().unwrap_or_else(PoisonError::into_inner).get(address).cloned();
        // a broker of this process that has ended may run elsewhere
        let there = |seed: &&str| match Scheme::split(seed) {
            (Scheme::Inproc, name) => weir_proto::inproc::find(name).is_some(),
            _ => true,
        };
        let address = local.as_deref().filter(there).unwrap_or(address);
        let mut channels = self.0.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = match Scheme::split(address) {
            // what brokers tell has no prefix
            (Scheme::Http, bare) if bare == address => transport::open(self.0.scheme, address)?,
            (Scheme::Inproc, address) => return transport::open(Scheme::Inproc, address), // it may end, and another begin
            (scheme, address) => transport::open(scheme, address)?,
        };
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// A seed that reaches one broker reaches it better than the address that the broker tells everybody.
    fn prefer(&self, seed: &str, cluster: &Cluster) {
        let Some(told) = cluster.answered_by().filter(|_| Scheme::split(seed).0.is_local()) else { return };
        let mut local = self.0.local.lock().unwrap_or_else(PoisonError::into_inner);
        local.retain(|_, by| by != seed);
        local.insert(told, seed.to_owned());
    }

    /// A seed that does not answer may reach no broker any more, which others reach by what it tells everybody.
    fn give_up(&self, seed: &str) {
        self.0.local.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, by| by != seed);
    }

    /// The cluster as last seen.
    pub fn cluster(&self) -> Arc<Cluster> {
        self.0.cluster.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the brokers, one a little after the other, and takes the first good answer: one that is gone delays nobody.
    pub async fn refresh(&self) -> Result<Arc<Cluster>, Error> {
        let known = self.cluster();
        let brokers = known.metadata.brokers.iter().map(|b| b.client_address.clone()).filter(|a| !a.is_empty());
        let mut addresses: Vec<String> = brokers.chain(self.0.seeds.iter().cloned()).collect();
        // not always the same broker first
        let turn = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.subsec_micros() as usize);
        let count = addresses.len().max(1);
        addresses.rotate_left(turn % count);
        let mut asked = futures::stream::FuturesUnordered::new();
        for (at, address) in addresses.into_iter().enumerate() {
            // one that is not there (yet) is none of the others' concern
            let Ok(channel) = self.channel(&address) else { continue };
            let client = v1::metadata_client::MetadataClient::new(channel);
            asked.push(async move {
                tokio::time::sleep(ASK_NEXT_AFTER * at as u32).await;
                let page = |request| {
                    let mut client = client.clone();
                    async move { page_of(client.get(request), ANSWER_WITHIN).await }
                };
                (address, pages::metadata(Default::default(), page).await)
            });
        }
        let mut last = "no broker is there".to_owned();
        while let Some((address, answer)) = asked.next().await {
            match answer {
                // a broker that has just joined, or was away, knows less than we do
                Ok(answer) if answer.brokers.is_empty() => last = format!("{address}: it is still joining"),
                Ok(answer) if is_older(&answer, &known.metadata) => last = format!("{address}: it is behind"),
                Ok(metadata) => {
                    let cluster = Arc::new(Cluster { metadata });
                    self.prefer(&address, &cluster);
                    *self.0.cluster.lock().unwrap_or_else(PoisonError::into_inner) = cluster.clone();
                    return Ok(cluster);
                }
                Err(status) => {
                    self.give_up(&address);
                    last = format!("{address}: {}", status.message());
                }
            }
        }
        Err(Error::Deadline { after: ANSWER_WITHIN, last })
    }

    /// The cluster, asked about no longer than `age` ago, or as last seen where no broker answers: many streams that end at one time
    /// ask once.
    pub(crate) async fn refresh_once(&self, age: Duration) -> Arc<Cluster> {
        let (client, since) = (self.clone(), Instant::now() - age);
        // in a task of its own: who waits no longer leaves the answer to the others
        let asking = tokio::spawn(async move {
            let mut asked = client.0.asked.lock().await;
            if asked.is_none_or(|at| at < since) {
                let begun = Instant::now();
                let _ = client.refresh().await;
                *asked = Some(begun);
            }
        });
        let _ = asking.await;
        self.cluster()
    }

    /// Waits until a broker answers.
    pub async fn connect(&self, within: Duration) -> Result<Arc<Cluster>, Error> {
        let end = tokio::time::Instant::now() + within;
        loop {
            match self.refresh().await {
                Ok(cluster) => return Ok(cluster),
                Err(error) if tokio::time::Instant::now() >= end => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Refreshes until a broker answers with metadata of this `version` or a later one, and returns it. An administrative call returns the
    /// version that contains its change; other brokers than the metadata leader receive it a moment later.
    ///
    /// # Errors
    /// [`Error::Deadline`] if all answers were older, or the last error if no broker answered in time.
    pub async fn refresh_to(&self, version: u64, within: Duration) -> Result<Arc<Cluster>, Error> {
        let end = tokio::time::Instant::now() + within;
        loop {
            let cluster = self.connect(end.saturating_duration_since(tokio::time::Instant::now())).await?;
            if cluster.metadata.version >= version {
                return Ok(cluster);
            }
            if tokio::time::Instant::now() >= end {
                let last =
                    format!("brokers have version {} of the metadata, not {version} yet", cluster.metadata.version);
                return Err(Error::Deadline { after: within, last });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How the partitions stand (all, where `topics` is empty), gathered from their leaders. A broker that does not
    /// answer a call within a second is left out, and its partitions with it.
    pub async fn describe(&self, topics: &[String]) -> Result<Vec<v1::PartitionStatus>, Error> {
        let cluster = self.connect(Duration::from_secs(5)).await?;
        let mut asked = Vec::new();
        for broker in cluster.metadata.brokers.iter().filter(|b| !b.client_address.is_empty()) {
            let client = v1::metadata_client::MetadataClient::new(self.channel(&broker.client_address)?);
            asked.push(async move {
                let page = |request| {
                    let mut client = client.clone();
                    async move { page_of(client.describe(request), DESCRIBE_WITHIN).await }
                };
                let mut partitions = Vec::new();
                for topics in requested(topics) {
                    let request = v1::DescribeRequest { topics: topics.to_vec(), ..Default::default() };
                    partitions.extend(pages::describe(request, page).await.ok()?.partitions);
                }
                Some(partitions)
            });
        }
        let answers = futures::future::join_all(asked).await.into_iter().flatten();
        let mut out: Vec<_> = answers.flatten().collect();
        // while leadership moves two may claim one: the later term is right
        out.sort_by(|a, b| (&a.topic, a.partition, b.term).cmp(&(&b.topic, b.partition, a.term)));
        out.dedup_by_key(|p| p.group);
        Ok(out)
    }

    /// Administrative calls, at any broker. With the address of its admin listener.
    pub async fn admin(&self) -> Result<v1::admin_client::AdminClient<Transport>, Error> {
        let within = Duration::from_secs(10);
        let end = tokio::time::Instant::now() + within;
        loop {
            let cluster = self.connect(within).await?;
            let by = cluster.metadata.answered_by;
            let brokers = cluster.metadata.brokers.iter().filter(|b| !b.admin_address.is_empty());
            // the one that answered lives
            if let Some(broker) = brokers.max_by_key(|b| b.id == by) {
                return Ok(v1::admin_client::AdminClient::new(self.channel(&broker.admin_address)?));
            }
            if tokio::time::Instant::now() >= end {
                let last = "no broker has told its admin address yet".to_owned();
                return Err(Error::Deadline { after: within, last });
            }
            tokio::time::sleep(Duration::from_millis(100)).await; // a cluster that has just formed
        }
    }

    /// Makes a call at any broker, at others where one does not answer; tried for ten seconds.
    pub async fn anywhere<T, F, R>(&self, call: F) -> Result<T, Error>
    where
        F: Fn(String) -> R,
        R: Future<Output = Result<T, tonic::Status>>,
    {
        let within = Duration::from_secs(10);
        let end = tokio::time::Instant::now() + within;
        let mut waits = waits();
        loop {
            let cluster = self.connect(within).await?;
            let failed = match cluster.answered_by() {
                Some(address) => match call(address).await {
                    Ok(answer) => return Ok(answer),
                    Err(status) if !is_transient(&status) => return Err(status.into()),
                    Err(status) => status.message().to_owned(),
                },
                None => "no broker has told its address yet".to_owned(),
            };
            if tokio::time::Instant::now() >= end {
                return Err(Error::Deadline { after: within, last: failed });
            }
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
        }
    }

    /// Runs a call again, with jittered waits, until it succeeds, is refused for good, or `within` has passed.
    /// `call` gets the partition's leader as now known.
    pub async fn at_leader<T, F, R>(&self, topic: &str, partition: u32, within: Duration, call: F) -> Result<T, Error>
    where
        F: Fn(String) -> R,
        R: Future<Output = Result<T, tonic::Status>>,
    {
        let end = tokio::time::Instant::now() + within;
        let mut waits = waits();
        loop {
            let failed = match self.cluster().leader(topic, partition) {
                Some(address) => match call(address).await {
                    Ok(answer) => return Ok(answer),
                    Err(status) if !is_transient(&status) => return Err(status.into()),
                    Err(status) => status.message().to_owned(),
                },
                None => "the partition has no leader".to_owned(),
            };
            if tokio::time::Instant::now() >= end {
                return Err(Error::Deadline { after: within, last: failed });
            }
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
            let cluster = self.refresh().await;
            if let Ok(cluster) = cluster
                && cluster.topic(topic).is_none_or(|t| t.partitions.len() <= partition as usize)
            {
                let message = format!("topic {topic} has no partition {partition}");
                return Err(Error::missing("NO_TOPIC", message));
            }
        }
    }
}

/// A list of topics in parts that fit into requests; an empty one, which stands for all topics, is one part.
fn requested(topics: &[String]) -> impl Iterator<Item = &[String]> {
    let all = topics.is_empty().then_some(topics);
    all.into_iter().chain(topics.chunks(TOPICS_OF_REQUEST_MAX))
}

/// One page, or `DEADLINE_EXCEEDED` where it does not come in time.
async fn page_of<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    within: Duration,
) -> Result<T, tonic::Status> {
    let late = |_| Err(tonic::Status::deadline_exceeded("no answer"));
    tokio::time::timeout(within, call).await.unwrap_or_else(late).map(tonic::Response::into_inner)
}

fn is_older(answer: &v1::GetMetadataResponse, known: &v1::GetMetadataResponse) -> bool {
    answer.cluster_id == known.cluster_id && answer.version < known.version
}

/// Waits between tries: from 10 ms, doubling to 200 ms, with jitter.
pub(crate) fn waits() -> impl Iterator<Item = Duration> {
    use backon::BackoffBuilder as _;
    backon::ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(10))
        .with_max_delay(Duration::from_millis(200))
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_topics_fits_into_requests_and_an_empty_one_is_a_request_for_all() {
        let names = |count: usize| vec![format!("{}/{}", "n".repeat(253), "t".repeat(253)); count];
        let parts = |count: usize| requested(&names(count)).map(<[String]>::len).collect::<Vec<_>>();
        assert_eq!((parts(0), parts(1), parts(12_001)), (vec![0], vec![1], vec![5_000, 5_000, 2_001]));
        let bytes: usize = names(TOPICS_OF_REQUEST_MAX).iter().map(|name| name.len() + 3).sum();
        assert!(bytes < 4 << 20, "more than a broker takes: {bytes}");
    }
}
