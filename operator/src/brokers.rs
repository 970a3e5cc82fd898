//! The brokers as the operator knows them: only through their Admin and Metadata services.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use weir_proto::v1::admin_client::AdminClient;
use weir_proto::v1::metadata_client::MetadataClient;
use weir_proto::{pages, v1};

/// One call takes no longer than this.
const CALL_MAX: Duration = Duration::from_secs(5);
/// A page of what a broker says of its partitions takes no longer than this.
const DESCRIBE_MAX: Duration = Duration::from_secs(2);
/// A snapshot older than this is taken anew.
const SNAPSHOT_AGE_MAX: Duration = Duration::from_secs(2);

/// Why brokers did not do as asked.
#[derive(Debug, Error, Clone)]
pub enum BrokerError {
    /// None was reached; trying again helps.
    #[error("no broker at {address} answers: {cause}")]
    Unreachable { address: String, cause: String },
    /// Too many volumes are older than the data once was: the cluster has stopped.
    #[error("the volumes of {} were rolled back, and the metadata has no leader", brokers.join(", "))]
    RolledBack { brokers: Vec<String> },
    /// They refuse; only another spec helps.
    #[error("{message}")]
    Refused { code: Code, reason: String, message: String },
}

/// What a cluster said of itself.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Brokers, topics, subscriptions, assignments.
    pub metadata: v1::GetMetadataResponse,
    /// How partitions stand, told by their leaders.
    pub statuses: HashMap<u64, v1::PartitionStatus>,
    /// Brokers that answered themselves, by id.
    pub answered: BTreeSet<u64>,
}

impl Snapshot {
    /// Partitions that have no leader.
    pub fn leaderless<'a>(&self, partitions: impl IntoIterator<Item = &'a v1::Partition>) -> usize {
        partitions.into_iter().filter(|p| p.leader == 0).count()
    }

    /// Partitions of which fewer replicas are in sync than wanted, or that change their replicas.
    pub fn under_replicated<'a>(&self, partitions: impl IntoIterator<Item = &'a v1::Partition>) -> usize {
        partitions.into_iter().filter(|p| !p.settled || self.in_sync(p).len() < p.replicas.len()).count()
    }

    /// Brokers whose replica of a partition votes and has nearly all of it.
    pub fn in_sync(&self, partition: &v1::Partition) -> Vec<u64> {
        let status = self.statuses.get(&partition.group);
        let replicas = status.into_iter().flat_map(|s| &s.replicas);
        replicas.filter(|r| r.in_sync && (r.voter || partition.group == 0)).map(|r| r.broker).collect()
    }

    /// Whether a broker of this name runs, and still lacks some of what it is to hold.
    pub fn catches_up(&self, name: &str) -> bool {
        let named = |id: &u64| self.name(*id) == Some(name);
        let lacks = |p: &v1::Partition| {
            // without a leader nobody knows
            let (is_led, in_sync) = (self.statuses.contains_key(&p.group), self.in_sync(p));
            is_led && p.replicas.iter().any(|id| named(id) && !in_sync.contains(id))
        };
        self.answered.iter().any(named) && self.partitions().chain(&self.metadata.metadata_group).any(lacks)
    }

    /// A broker's name.
    pub fn name(&self, id: u64) -> Option<&str> {
        self.metadata.brokers.iter().find(|b| b.id == id).map(|b| b.name.as_str())
    }

    /// All partitions of topics.
    pub fn partitions(&self) -> impl Iterator<Item = &v1::Partition> {
        self.metadata.topics.iter().flat_map(|t| &t.partitions)
    }
}

type Kept = Option<(Instant, Arc<Snapshot>)>;

/// Calls to the brokers of all clusters, by the address of their Admin service.
#[derive(Clone, Default)]
pub struct Brokers {
    /// where all clusters are reached, whatever their address
    always: Option<String>,
    channels: Arc<Mutex<HashMap<String, Channel>>>,
    // one lock a cluster: a thousand topics that ask at once wait for one answer
    snapshots: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<Kept>>>>>,
}

fn unreachable(address: &str, cause: impl ToString) -> BrokerError {
    BrokerError::Unreachable { address: address.to_owned(), cause: cause.to_string() }
}

fn refused(address: &str, status: Status) -> BrokerError {
    let transient = [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::DeadlineExceeded, Code::Aborted];
    if transient.contains(&status.code()) {
        return unreachable(address, status.message());
    }
    let reason = status.get_details_error_info().map_or(String::new(), |i| i.reason);
    if reason == "NOT_LEADER" || reason == "OVERLOADED" || status.code() == Code::Internal {
        return unreachable(address, status.message());
    }
    BrokerError::Refused { code: status.code(), reason, message: status.message().to_owned() }
}

impl Brokers {
    /// Brokers that are reached at one address, whatever their cluster: by tests.
    pub fn at(address: &str) -> Self {
        Self { always: Some(address.to_owned()), ..Self::default() }
    }

    fn channel(&self, address: &str) -> Result<Channel, BrokerError> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let to = self.always.as_deref().unwrap_or(address);
        let endpoint = Endpoint::from_shared(format!("http://{to}")).map_err(|e| unreachable(address, e))?;
        let channel = endpoint
            .connect_timeout(Duration::from_secs(2))
            .timeout(CALL_MAX)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// An Admin client.
    pub fn admin(&self, address: &str) -> Result<AdminClient<Channel>, BrokerError> {
        Ok(AdminClient::new(self.channel(address)?))
    }

    /// Makes an Admin call.
    pub async fn call<T, F, R>(&self, address: &str, call: F) -> Result<T, BrokerError>
    where
        F: FnOnce(AdminClient<Channel>) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let answer = call(self.admin(address)?).await.map_err(|status| refused(address, status))?;
        self.forget(address);
        Ok(answer.into_inner())
    }

    /// What was seen before a change is of no use after it.
    pub fn forget(&self, address: &str) {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).remove(address);
    }

    /// Drops connections nobody needs any more.
    pub fn forget_cluster(&self, address: &str) {
        self.forget(address);
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).remove(address);
    }

    /// How a cluster stands, at most two seconds old.
    pub async fn snapshot(&self, address: &str) -> Result<Arc<Snapshot>, BrokerError> {
        let slot = {
            let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
            snapshots.entry(address.to_owned()).or_default().clone()
        };
        let mut kept = slot.lock().await;
        if let Some((at, snapshot)) = &*kept
            && at.elapsed() < SNAPSHOT_AGE_MAX
        {
            return Ok(snapshot.clone());
        }
        let snapshot = Arc::new(self.take_snapshot(address).await?);
        *kept = Some((Instant::now(), snapshot.clone()));
        Ok(snapshot)
    }

    async fn metadata(&self, address: &str) -> Result<v1::GetMetadataResponse, BrokerError> {
        let client = MetadataClient::new(self.channel(address)?);
        let page = |request| {
            let mut client = client.clone();
            async move { Ok(client.get(request).await?.into_inner()) }
        };
        pages::metadata(Default::default(), page).await.map_err(|status| refused(address, status))
    }

    async fn take_snapshot(&self, address: &str) -> Result<Snapshot, BrokerError> {
        let mut metadata = self.metadata(address).await?;
        if metadata.brokers.is_empty() {
            return Err(unreachable(address, "the broker is still joining"));
        }
        // a broker that is behind, or drained, knows less: only the metadata's leader decides what goes
        if metadata.answered_by != metadata.controller {
            let leader = metadata.brokers.iter().find(|b| b.id == metadata.controller).map(|b| b.admin_address.clone());
            let leader = leader.filter(|a| !a.is_empty());
            let rolled_back = weir_proto::rolled_back(&metadata);
            if leader.is_none() && !rolled_back.is_empty() {
                return Err(BrokerError::RolledBack { brokers: rolled_back });
            }
            let leader = leader.ok_or_else(|| unreachable(address, "the metadata has no leader now"))?;
            metadata = self.metadata(&leader).await?;
            if metadata.answered_by != metadata.controller {
                return Err(unreachable(&leader, "the metadata's leader is changing"));
            }
        }
        let addresses = metadata.brokers.iter().map(|b| &b.admin_address).filter(|a| !a.is_empty());
        let ask = addresses.map(async |a| {
            let client = MetadataClient::new(self.channel(a).ok()?);
            let page = |request| {
                let mut client = client.clone();
                async move {
                    let answer = tokio::time::timeout(DESCRIBE_MAX, client.describe(request)).await;
                    let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
                    Ok(answer?.into_inner())
                }
            };
            pages::describe(Default::default(), page).await.ok()
        });
        let mut statuses: HashMap<u64, v1::PartitionStatus> = HashMap::new();
        let mut answered = BTreeSet::new();
        for v1::DescribeResponse { broker, partitions, .. } in
            futures::future::join_all(ask).await.into_iter().flatten()
        {
            answered.insert(broker);
            for status in partitions {
                let known = statuses.entry(status.group).or_default();
                if status.term >= known.term {
                    *known = status;
                }
            }
        }
        Ok(Snapshot { metadata, statuses, answered })
    }
}
