//! One file for each gRPC service, and what they share.

pub mod admin;
pub mod bounds;
pub mod log;
pub mod metadata;
mod pages;
pub mod peer;
pub mod publisher;
pub mod requester;
pub mod subscriber;

use crate::budget::{self, Answers, Budget};
use crate::formation::Formation;
use crate::metrics::Metrics;
use crate::node_loop::{Event, NodeHandle};
use crate::peers;
use crate::shared::{Partition, Shared};
use crate::status::Failure;
use prost::Message as _;
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;
use weir_core::ids::GroupId;
use weir_core::meta::command::{Answer, Command};
use weir_core::meta::names;
use weir_core::node::{Refusal, Reply};
use weir_proto::v1;

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
    /// Budget of messages on their way.
    pub budget: Budget,
    /// Budget of decompressed records.
    pub unpacker: crate::unpack::Unpacker,
    /// What requests take that came over no connection.
    pub local: Arc<budget::Connection>,
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

/// As [`any_name`], of an object of a client's own: internal names are refused.
pub fn full_name(name: &str) -> Result<String, Failure> {
    let name = any_name(name)?;
    check_not_internal(&name)?;
    Ok(name)
}

/// Refuses an internal name; such a name always has its namespace.
fn check_not_internal(name: &str) -> Result<(), Failure> {
    if !names::is_internal(name) {
        return Ok(());
    }
    let rule = "may only be listed and read by offset: brokers keep what is in it for themselves";
    Err(Failure::invalid("INTERNAL", format!("{name}: namespace {} {rule}", names::INTERNAL_NAMESPACE)))
}

/// `name` with its namespace, checked.
pub fn any_name(name: &str) -> Result<String, Failure> {
    weir_proto::names::full_name(name).map_err(|e| Failure::invalid("NAME", e))
}

/// A partition that was asked for.
pub struct Found {
    /// Its group.
    pub group: GroupId,
    /// Largest batch it takes, bytes.
    pub batch_bytes_max: u32,
    /// The topic's full name.
    pub topic: String,
    /// The topic's id.
    pub topic_id: u64,
}

impl Found {
    /// This, if its topic has the id that a request was made for; 0 stands for any.
    pub fn of_topic(self, wanted: u64) -> Result<Self, Failure> {
        let rule = "offsets and sequences of the earlier topic mean nothing in it, start anew";
        check_id(("topic", &self.topic), self.topic_id, wanted, ("TOPIC_RECREATED", rule))?;
        Ok(self)
    }
}

/// Refuses a request about what had another id under its name. `wanted` is the id that the request carries; 0 stands for any. A refusal has
/// `reason`, and says what follows for who asks: `rule`.
fn check_id(
    (kind, name): (&str, &str),
    id: u64,
    wanted: u64,
    (reason, rule): (&'static str, &str),
) -> Result<(), Failure> {
    if wanted == 0 || wanted == id {
        return Ok(());
    }
    let text = format!("{kind} {name} was deleted and re-created: it has id {id}, not {wanted}; {rule}");
    Err(Failure::new(Code::FailedPrecondition, reason, text))
}

impl Context {
    /// Room for the answers to a request.
    pub fn answers<T>(&self, request: &tonic::Request<T>) -> Answers {
        let connection = request.extensions().get::<Arc<budget::Connection>>();
        self.budget.answers(connection.unwrap_or(&self.local).clone())
    }

    /// The group of a topic's partition.
    pub fn find(&self, topic: &str, partition: u32) -> Result<Found, Failure> {
        let name = any_name(topic)?;
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
        Ok(Found { group: GroupId(*group), batch_bytes_max, topic: name, topic_id: found.id })
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

    /// What this broker begins a call to a peer with.
    pub(crate) fn hello_to(&self, to: weir_core::ids::BrokerId) -> v1::PeerHello {
        let cluster_id = self.formation.identity().cluster_id;
        v1::PeerHello { cluster_id, broker_id: self.shared.broker.0, to_broker_id: to.0, incarnation: 0 }
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
        let hello = controller.map(|to| self.hello_to(to));
        let request = v1::ProposeRequest { command: command.encode_to_vec().into(), hello };
        let answer = peer.propose(request).await?.into_inner();
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
    use super::{any_name, full_name};

    #[test]
    fn internal_names_are_known_by_their_namespace_alone() {
        for internal in ["weir-system/scheduled-7", "weir-system/mine"] {
            assert_eq!(full_name(internal).unwrap_err().reason, "INTERNAL");
            assert_eq!(any_name(internal).unwrap(), internal);
        }
        let longest = "x".repeat(253);
        for own in ["jobs.scheduled", "mail.redrive", "weir-system", "shop/weir-system", &longest] {
            assert!(full_name(own).is_ok(), "{own}");
        }
    }
}
