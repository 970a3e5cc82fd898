//! One file for each gRPC service, and what they share.

pub mod admin;
pub mod log;
pub mod metadata;
pub mod peer;
pub mod publisher;
pub mod requester;
pub mod subscriber;

use crate::formation::Formation;
use crate::metrics::Metrics;
use crate::node_loop::{Event, NodeHandle};
use crate::peers;
use crate::shared::{Partition, Shared};
use crate::status::Failure;
use prost::Message as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::Code;
use weir_core::ids::GroupId;
use weir_core::meta::command::{Answer, Command};
use weir_core::node::{Refusal, Reply};
use weir_proto::v1;

/// Bytes of publishes under way on one broker.
pub const IN_FLIGHT_BYTES_MAX: usize = 128 << 20;
/// How long readers wait for a new leader's first entry to be committed.
const SERVES_WITHIN: Duration = Duration::from_secs(1);
/// Largest batch where a topic sets no limit of its own, bytes.
pub const BATCH_BYTES_DEFAULT: u32 = 1 << 20;

/// What every service needs.
#[derive(Clone)]
pub struct Context {
    /// Published state.
    pub shared: Arc<Shared>,
    /// The node's thread.
    pub node: NodeHandle,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// This broker's identity.
    pub formation: Arc<Formation>,
    /// Brokers that the metadata does not name yet.
    pub vouched: Arc<crate::vouched::Vouched>,
    /// Budget of publishes under way, KiB.
    pub budget: Arc<Semaphore>,
    /// Deliveries under way.
    pub hubs: crate::hub::Hubs,
    /// Inboxes of askers.
    pub inboxes: requester::Inboxes,
    /// Tasks that publish what has become due.
    pub schedulers: crate::scheduler::Schedulers,
    /// Declared rates.
    pub throttles: crate::throttle::Throttles,
    /// Connections for what a broker publishes by itself.
    pub channels: crate::outbox::Channels,
    /// Moves with each call for messages that names no partition.
    pub turn: Arc<std::sync::atomic::AtomicUsize>,
}

/// `name` with its namespace, checked: 1 to 253 characters of a-z, 0-9, `-` and `.` on each side of the slash.
pub fn full_name(name: &str) -> Result<String, Failure> {
    let (namespace, short) = name.split_once('/').unwrap_or(("default", name));
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let right = |part: &str| {
        (1..=253).contains(&part.len())
            && part.chars().all(|c| letter(c) || c == '-' || c == '.')
            && part.starts_with(letter)
            && part.ends_with(letter)
            && !part.contains("..")
    };
    if right(namespace) && right(short) {
        return Ok(format!("{namespace}/{short}"));
    }
    let shown: String = name.chars().take(60).flat_map(char::escape_default).collect();
    let rule = "names are a-z, 0-9, '-' and '.', begin and end with a letter or digit, at most 253 characters";
    Err(Failure::invalid("NAME", format!("'{shown}' is not a name: {rule}")))
}

/// A partition that was asked for.
pub struct Found {
    /// Its group.
    pub group: GroupId,
    /// Largest batch it takes, bytes.
    pub batch_bytes_max: u32,
    /// The topic's full name.
    pub topic: String,
}

impl Context {
    /// The group of a topic's partition.
    pub fn find(&self, topic: &str, partition: u32) -> Result<Found, Failure> {
        let name = full_name(topic)?;
        let meta = self.shared.meta();
        let Some(found) = meta.topics.get(&name) else {
            return Err(self.missing("NO_TOPIC", format!("topic {name} does not exist")));
        };
        let Some(group) = found.groups.get(partition as usize) else {
            let text = format!("topic {name} has {} partitions, there is no partition {partition}", found.groups.len());
            return Err(Failure::new(Code::NotFound, "NO_PARTITION", text));
        };
        let limit = found.spec.message_bytes_max;
        let batch_bytes_max = if limit == 0 { BATCH_BYTES_DEFAULT } else { limit };
        Ok(Found { group: GroupId(*group), batch_bytes_max, topic: name })
    }

    /// What is asked for is not known here; a broker that is not ready may just not have heard of it yet, and does not say that there is
    /// none.
    pub fn missing(&self, reason: &'static str, text: String) -> Failure {
        match crate::metrics::why_not_ready(&self.shared) {
            Some(why) => Failure::new(Code::Unavailable, "NOT_READY", format!("the broker cannot tell yet: {why}")),
            None => Failure::new(Code::NotFound, reason, text),
        }
    }

    /// The failure that tells who leads a group.
    pub fn not_leader(&self, group: GroupId) -> Failure {
        let meta = self.shared.meta();
        let leader = self.shared.leader(group).filter(|b| *b != self.shared.broker);
        Failure::not_leader(leader.and_then(|b| meta.broker(b)).map_or(String::new(), |b| b.client_address.clone()))
    }

    /// A partition led here, for reading: a new leader is waited for until it knows all that was committed before it.
    pub async fn led_partition(&self, group: GroupId) -> Result<Partition, Failure> {
        if !self.shared.leads(group) {
            return Err(self.not_leader(group));
        }
        let mut partition = self.shared.partition(group).ok_or_else(|| self.not_leader(group))?;
        let decided = partition.progress.wait_for(|p| p.serving.is_some() || !self.shared.leads(group));
        let serves = matches!(tokio::time::timeout(SERVES_WITHIN, decided).await, Ok(Ok(p)) if p.serving.is_some());
        if serves { Ok(partition) } else { Err(self.not_leader(group)) }
    }

    /// Why a request was refused, with the leader where that is why.
    pub fn failure(&self, group: GroupId, refusal: Refusal) -> Failure {
        let failure = match refusal {
            Refusal::NotLeader | Refusal::UnknownGroup => self.not_leader(group),
            other => other.into(),
        };
        self.rejected(failure)
    }

    /// Counts a refusal.
    pub fn rejected(&self, failure: Failure) -> Failure {
        self.metrics.rejected.with_label_values(&[failure.reason]).inc();
        failure
    }

    /// Proposes a metadata command here, where this broker leads the metadata group.
    pub async fn propose_here(&self, command: Command) -> Result<Answer, Failure> {
        let reply = self.node.call(|to| Event::Command { command: Box::new(command), to }).await;
        match reply.ok_or_else(Failure::stopping)? {
            Reply::Meta(result) => result.map_err(Failure::from),
            Reply::Refused(refusal) => Err(refusal.into()),
            other => Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}"))),
        }
    }

    /// Proposes a metadata command, here or at the metadata leader.
    pub async fn propose(&self, command: impl Into<Command>) -> Result<u64, tonic::Status> {
        let command = command.into();
        let controller = self.shared.controller();
        if controller == Some(self.shared.broker) {
            return Ok(number(self.propose_here(command).await?));
        }
        let meta = self.shared.meta();
        let address = controller.and_then(|b| meta.broker(b)).map(|b| b.peer_address.clone());
        let address = address
            .ok_or_else(|| Failure::new(Code::Unavailable, "NO_CONTROLLER", "no metadata leader now; try again"))?;
        let unreachable = |e: tonic::transport::Error| {
            Failure::new(
                Code::Unavailable,
                "NO_CONTROLLER",
                format!("the metadata leader at {address} is not reached: {e}"),
            )
        };
        let mut peer = peers::connect(&address).await.map_err(unreachable)?;
        let answer = peer.propose(v1::ProposeRequest { command: command.encode_to_vec().into() }).await?.into_inner();
        // what was answered there may not be applied here yet; a caller that asks here next should see it
        let mut seen = self.shared.meta.subscribe();
        let applied = seen.wait_for(|m| m.version >= answer.version);
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), applied).await;
        Ok(answer.number)
    }

    /// Proposes what `decide` makes of the metadata; decides again where it changed meanwhile.
    pub async fn decide<F>(&self, decide: F) -> Result<u64, tonic::Status>
    where
        F: Fn(&weir_core::meta::state::MetaState) -> Result<Command, Failure>,
    {
        let mut tries = 0;
        loop {
            let command = decide(&self.shared.meta())?;
            match self.propose(command).await {
                Err(status) if status.code() == Code::Aborted && tries < 5 => {
                    tries += 1;
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                other => return other,
            }
        }
    }
}

/// The number in an answer.
pub fn number(answer: Answer) -> u64 {
    match answer {
        Answer::Done => 0,
        Answer::Broker(id) | Answer::Producers(id) => id,
    }
}

#[cfg(test)]
mod tests {
    use super::full_name;

    #[test]
    fn names_get_their_namespace_and_bad_ones_are_refused() {
        assert_eq!(full_name("orders").unwrap(), "default/orders");
        assert_eq!(full_name("shop/orders.v1").unwrap(), "shop/orders.v1");
        let long = "x".repeat(300);
        for bad in ["", "../x", "a/../b", "a\0b", "A", "a/b/c", "-a", "a-", "a..b", &long, "/", "a/"] {
            assert!(full_name(bad).is_err(), "{bad:?}");
        }
    }
}
