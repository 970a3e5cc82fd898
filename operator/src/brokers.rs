//! The brokers as the operator knows them: only through their Admin and Metadata services.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt as _;
use weir_proto::v1;
use weir_proto::v1::admin_client::AdminClient;
use weir_proto::v1::metadata_client::MetadataClient;

/// One call takes no longer than this.
const CALL_MAX: Duration = Duration::from_secs(5);
/// A snapshot older than this is taken anew.
const SNAPSHOT_AGE_MAX: Duration = Duration::from_secs(2);

/// Why brokers did not do as asked.
#[derive(Debug, Error, Clone)]
pub enum BrokerError {
    /// None was reached; trying again helps.
    #[error("no broker at {address} answers: {cause}")]
    Unreachable { address: String, cause: String },
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

fn refused(address: &str, status: tonic::Status) -> BrokerError {
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
        R: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
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

    async fn take_snapshot(&self, address: &str) -> Result<Snapshot, BrokerError> {
        let limit = weir_proto::MESSAGE_BYTES_MAX;
        let mut client = MetadataClient::new(self.channel(address)?).max_decoding_message_size(limit);
        let metadata = client.get(v1::GetMetadataRequest::default()).await.map_err(|s| refused(address, s))?;
        let mut metadata = metadata.into_inner();
        if metadata.brokers.is_empty() {
            return Err(unreachable(address, "the broker is still joining"));
        }
        // a broker that is behind, or drained, knows less: only the metadata's leader decides what goes
        if metadata.answered_by != metadata.controller {
            let leader = metadata.brokers.iter().find(|b| b.id == metadata.controller).map(|b| b.admin_address.clone());
            let leader = leader.filter(|a| !a.is_empty());
            let leader = leader.ok_or_else(|| unreachable(address, "the metadata has no leader now"))?;
            let mut client = MetadataClient::new(self.channel(&leader)?).max_decoding_message_size(limit);
            let asked = client.get(v1::GetMetadataRequest::default()).await;
            metadata = asked.map_err(|s| refused(&leader, s))?.into_inner();
            if metadata.answered_by != metadata.controller {
                return Err(unreachable(&leader, "the metadata's leader is changing"));
            }
        }
        let addresses = metadata.brokers.iter().map(|b| &b.admin_address).filter(|a| !a.is_empty());
        let ask = addresses.map(async |a| {
            let mut client = MetadataClient::new(self.channel(a).ok()?).max_decoding_message_size(limit);
            let answer = tokio::time::timeout(Duration::from_secs(2), client.describe(v1::DescribeRequest::default()));
            Some(answer.await.ok()?.ok()?.into_inner().partitions)
        });
        let mut statuses: HashMap<u64, v1::PartitionStatus> = HashMap::new();
        for status in futures::future::join_all(ask).await.into_iter().flatten().flatten() {
            let known = statuses.entry(status.group).or_default();
            if status.term >= known.term {
                *known = status;
            }
        }
        Ok(Snapshot { metadata, statuses })
    }
}
