//! What a broker publishes by itself: dead letters, and what came of a message that is acked with it. Each has a producer id of its
//! own, made of where it came from, so that one published again after a failover is known to be there already.

use crate::node_loop::Event;
use crate::peers;
use crate::service::{Context, Found};
use crate::status::Failure;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;
use weir_core::batch::BatchHeader;
use weir_core::ids::{BrokerId, GroupId, SubscriptionId};
use weir_core::node::{Reply, mix};
use weir_core::producer::OWN_PRODUCERS;
use weir_proto::records::{self, Compression, Record, Stamp};
use weir_proto::v1;

/// Connections kept.
const CHANNELS_MAX: usize = 64;
/// Largest batch that carries messages from one topic to another, bytes: what the largest topic takes, and headers that are added.
const CARRIED_BYTES_MAX: usize = weir_proto::limits::BATCH_BYTES.max as usize + (2 << 20);
/// A move that takes longer is tried again.
pub const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Connections to other brokers, one to each.
#[derive(Clone, Default)]
pub struct Channels(Arc<Mutex<HashMap<String, Channel>>>);

impl Channels {
    /// A connection to a broker's peer port, made when it is first used.
    pub(crate) fn to(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = all.get(address) {
            return Ok(channel.clone());
        }
        if all.len() >= CHANNELS_MAX {
            all.clear(); // brokers come and go; those in use are opened again
        }
        let channel = peers::endpoint(address)?.connect_lazy();
        all.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

/// Where a message that is moved comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Moved for this subscription,
    pub subscription: SubscriptionId,
    /// out of this group,
    pub group: GroupId,
    /// from this offset,
    pub offset: u64,
    /// after so many seeks: what dies again after a seek back is another dead letter.
    pub seeks: u64,
    /// Why.
    pub reason: Reason,
}

/// Why a message is published because of another one: the same message may die, and have had a result.
#[derive(Clone, Copy, Debug)]
pub enum Reason {
    /// A dead letter.
    Dead = 0,
    /// A result, with which it is acked.
    Result = 1,
}

/// Where something was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// The partition.
    pub partition: u32,
    /// Offset of the first record, now or when it was published first.
    pub base_offset: u64,
}

impl Origin {
    fn producer_id(&self) -> i64 {
        let place = mix(self.group.0 ^ mix(self.offset ^ mix(self.seeks)));
        own_producer(self.subscription.0 ^ place ^ ((self.reason as u64) << 63)) as i64
    }
}

/// A producer id of a broker's own.
pub fn own_producer(seed: u64) -> u64 {
    OWN_PRODUCERS | (mix(seed) >> 2)
}

/// Publishes records to a topic, to the partition of the first one's key; once, however often it is repeated while the partition
/// remembers it and the topic does not grow. `None` where others were published for the same origin before: those stand.
pub async fn publish(
    context: &Context,
    topic: &str,
    records: Vec<Record>,
    compression: Compression,
    origin: Origin,
    limit: Limit,
) -> Result<Option<Published>, Failure> {
    let partitions = context.shared.meta().topics.get(topic).map_or(0, |t| t.groups.len() as u32);
    if partitions == 0 {
        return Err(Failure::new(Code::NotFound, "NO_TOPIC", format!("topic {topic} does not exist")));
    }
    let partition = match records.first().and_then(|r| r.key.as_ref()) {
        Some(key) => records::partition_of(key, partitions),
        None => (mix(origin.offset) % u64::from(partitions)) as u32,
    };
    let stamp = Stamp { id: origin.producer_id(), epoch: 0, sequence: 0 };
    let bytes = records::batch_bytes_max(&records);
    let encode = move || records::encode(&records, compression, Some(stamp));
    let batch = context.unpacker.of_size(bytes, encode).await;
    let batch = batch.map_err(|e| Failure::invalid("RECORDS", e))?;
    match send(context, topic, partition, batch, limit).await {
        Ok(base_offset) => Ok(Some(Published { partition, base_offset })),
        // a producer of this origin's own has another number of records there
        Err(failure) if failure.reason == "SEQUENCE" => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// How large a batch that a broker publishes by itself may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// As large as the topic takes from clients.
    Topic,
    /// It carries messages that were accepted before, by a topic that may take larger ones or when this one did: as large as any topic
    /// may take, with the headers that brokers add.
    Carried,
}

/// Appends a batch to a partition led here; returns its offset.
pub(crate) async fn append(
    context: &Context,
    topic: &str,
    partition: u32,
    batch: Bytes,
    limit: Limit,
) -> Result<u64, Failure> {
    let started = Instant::now();
    let Found { group, batch_bytes_max, topic, .. } = context.find(topic, partition)?;
    let bytes = batch.len();
    let most = match limit {
        Limit::Topic => batch_bytes_max as usize,
        Limit::Carried => CARRIED_BYTES_MAX,
    };
    if bytes > most {
        let text = format!("the batch has {bytes} bytes, topic {topic} takes at most {most}");
        return Err(Failure::invalid("TOO_LARGE", text));
    }
    let header = BatchHeader::validate(&batch)?;
    if !context.shared.leads(group) {
        return Err(context.not_leader(group));
    }
    let reply = context.node.call(|to| Event::Publish { group, data: batch, header, to }).await;
    match reply.ok_or_else(Failure::stopping)? {
        Reply::Published { base_offset, .. } => {
            context.metrics.published(&topic, header.count, bytes, started);
            Ok(base_offset)
        }
        Reply::Refused(refusal) => Err(context.failure(group, refusal)),
        other => Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}"))),
    }
}

/// Publishes a batch to a partition, at its leader; returns its offset. Not repeated here.
pub async fn send(context: &Context, topic: &str, partition: u32, batch: Bytes, limit: Limit) -> Result<u64, Failure> {
    let late = || Failure::new(Code::DeadlineExceeded, "NO_ANSWER", "the partition's leader does not answer");
    let sent = try_send(context, topic, partition, batch, limit);
    tokio::time::timeout(ANSWER_MAX, sent).await.unwrap_or_else(|_| Err(late()))
}

async fn try_send(context: &Context, topic: &str, partition: u32, batch: Bytes, limit: Limit) -> Result<u64, Failure> {
    let group = context.find(topic, partition)?.group;
    if context.shared.leads(group) {
        return append(context, topic, partition, batch, limit).await;
    }
    let meta = context.shared.meta();
    let leader = context.shared.leader(group).and_then(|leader| meta.broker(leader));
    let leader = leader.ok_or_else(|| context.not_leader(group))?;
    let unreachable = |what: String| Failure::new(Code::Unavailable, "NOT_LEADER", what);
    let channel = context.channels.to(&leader.peer_address).map_err(|e| unreachable(e.to_string()))?;
    let request = v1::ForwardRequest {
        hello: Some(context.hello_to(BrokerId(leader.id))),
        topic: topic.to_owned(),
        partition,
        batch,
        carried: limit == Limit::Carried,
    };
    match peers::client(channel).forward(request).await {
        Ok(answer) => Ok(answer.into_inner().base_offset),
        Err(status) => {
            const KNOWN: [&str; 5] = ["SEQUENCE", "TOO_LARGE", "NO_TOPIC", "NO_PARTITION", "BATCH"];
            let reason = status.get_details_error_info().map_or(String::new(), |info| info.reason);
            match KNOWN.into_iter().find(|known| *known == reason) {
                Some(known) => Err(Failure::new(status.code(), known, status.message())),
                None => Err(unreachable(status.message().to_owned())),
            }
        }
    }
}
