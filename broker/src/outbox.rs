//! What a broker publishes by itself: dead letters, and what came of a message that is acked with it. Each has a producer id of its
//! own, made of where it came from, so that one published again after a failover is known to be there already.

use crate::node_loop::Event;
use crate::peers;
use crate::service::{Context, Found};
use crate::status::Failure;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;
use weir_core::batch::BatchHeader;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::node::{Reply, mix};
use weir_core::producer::OWN_PRODUCERS;
use weir_proto::records::{self, Compression, Record, Stamp};
use weir_proto::v1;
use weir_proto::v1::publish_ack::Outcome;

/// Connections kept.
const CHANNELS_MAX: usize = 64;
/// A move that takes longer is tried again.
pub const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Connections to other brokers, one to each.
#[derive(Clone, Default)]
pub struct Channels(Arc<Mutex<HashMap<String, Channel>>>);

impl Channels {
    fn to(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
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

/// Publishes a dead letter. One that is too large for its topic goes without its value, which a header then says.
pub async fn bury(context: &Context, topic: &str, mut record: Record, origin: Origin) -> Result<(), Failure> {
    match publish(context, topic, std::slice::from_ref(&record), origin).await {
        Err(failure) if failure.reason == "TOO_LARGE" => {
            let bytes = record.value.take().map_or(0, |v| v.len());
            record.headers.push(("weir-dead-value-bytes".to_owned(), bytes.to_string().into()));
            publish(context, topic, &[record], origin).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// Publishes records to a topic, to the partition of the first one's key; once, however often it is repeated while the partition
/// remembers it and the topic does not grow. `None` where others were published for the same origin before: those stand.
pub async fn publish(
    context: &Context,
    topic: &str,
    records: &[Record],
    origin: Origin,
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
    let batch = records::encode(records, Compression::None, Some(stamp)).map_err(|e| Failure::invalid("RECORDS", e))?;
    match send(context, topic, partition, batch).await {
        Ok(base_offset) => Ok(Some(Published { partition, base_offset })),
        // a producer of this origin's own has another number of records there
        Err(failure) if failure.reason == "SEQUENCE" => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Publishes a batch to a partition, wherever its leader is; gives its offset. Not repeated here.
pub async fn send(context: &Context, topic: &str, partition: u32, batch: Bytes) -> Result<u64, Failure> {
    let late = || Failure::new(Code::DeadlineExceeded, "NO_ANSWER", "the partition's leader does not answer");
    let sent = try_send(context, topic, partition, batch);
    tokio::time::timeout(ANSWER_MAX, sent).await.unwrap_or_else(|_| Err(late()))
}

async fn try_send(context: &Context, topic: &str, partition: u32, batch: Bytes) -> Result<u64, Failure> {
    let Found { group, batch_bytes_max, .. } = context.find(topic, partition)?;
    if batch.len() > batch_bytes_max as usize {
        let text = format!("the batch has {} bytes, topic {topic} takes at most {batch_bytes_max}", batch.len());
        return Err(Failure::invalid("TOO_LARGE", text));
    }
    if context.shared.leads(group) {
        let header = BatchHeader::validate(&batch)?;
        let reply = context.node.call(|to| Event::Publish { group, data: batch, header, to }).await;
        return match reply.ok_or_else(Failure::stopping)? {
            Reply::Published { base_offset, .. } => Ok(base_offset),
            Reply::Refused(refusal) => Err(context.failure(group, refusal)),
            other => Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}"))),
        };
    }
    let address = context.not_leader(group).leader;
    let unreachable = |what: String| Failure::new(Code::Unavailable, "NOT_LEADER", what);
    let channel = context.channels.to(&address).map_err(|e| unreachable(e.to_string()))?;
    let mut client =
        v1::publisher_client::PublisherClient::new(channel).max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
    let batch = v1::PublishBatch { id: 1, topic: topic.to_owned(), partition, batch };
    let answer = client.publish_stream(futures::stream::iter([batch])).await;
    let mut acks = answer.map_err(|s| unreachable(s.message().to_owned()))?.into_inner();
    match acks.message().await.ok().flatten().and_then(|ack| ack.outcome) {
        Some(Outcome::BaseOffset(offset)) => Ok(offset),
        Some(Outcome::Error(error)) => {
            let code = Code::from_i32(error.code);
            let known = ["SEQUENCE", "TOO_LARGE", "NO_TOPIC", "NO_PARTITION"].into_iter().find(|r| *r == error.reason);
            Err(Failure::new(code, known.unwrap_or("NOT_LEADER"), error.message))
        }
        None => Err(unreachable(format!("{address} ended the stream"))),
    }
}
