//! Dead letters: messages, and batches that cannot be decoded, in the topic that a subscription names for them. A message is moved whole:
//! value, key, all headers in order and its time, compressed as it was. Headers that begin with `weir-dead-` say where it comes from.

use crate::outbox::{self, Limit, Origin, Published, Reason};
use crate::service::Context;
use crate::status::Failure;
use bytes::Bytes;
use tonic::Code;
use weir_core::cursor::Failed;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::state::Subscription;
use weir_core::tail::LogBatch;
use weir_proto::records::{self, Compression, Record};

/// What the headers of a dead letter begin with.
pub const PREFIX: &str = "weir-dead-";
/// Header of a dead letter whose value is a whole batch, as it was stored: the number of its records.
pub const BATCH: &str = "weir-dead-batch-records";

/// Header of a message that only the subscription of this full name wants: a dead letter that was given back. It has no meaning where whole
/// batches are delivered.
pub const ONLY_FOR: &str = "weir-only-for";

/// Where dead letters come from: a subscription in one partition.
#[derive(Clone, Debug)]
pub struct Source {
    /// The subscription.
    pub subscription: SubscriptionId,
    /// Its full name.
    pub subscription_name: String,
    /// The topic that takes its dead letters; empty where none does.
    pub dead_letter_topic: String,
    /// The topic it reads.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// Its group.
    pub group: GroupId,
    /// How often the subscription was moved there: what dies again after a seek is another dead letter.
    pub seeks: u64,
}

/// A dead letter, and how it is compressed.
pub struct DeadLetter {
    record: Record,
    compression: Compression,
}

impl DeadLetter {
    /// The record that is published.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Bytes of its batch before compression, at most.
    pub fn bytes(&self) -> usize {
        records::batch_bytes_max(std::slice::from_ref(&self.record))
    }
}

fn describe(record: &mut Record, source: &Source, offset: u64, reason: String) {
    // those of an earlier move are replaced
    record.headers.retain(|(name, _)| !name.starts_with(PREFIX));
    let fields: [(&str, Bytes); 5] = [
        ("reason", reason.into()),
        ("subscription", source.subscription_name.clone().into()),
        ("topic", source.topic.clone().into()),
        ("partition", source.partition.to_string().into()),
        ("offset", offset.to_string().into()),
    ];
    for (name, value) in fields {
        record.headers.push((format!("{PREFIX}{name}"), Some(value)));
    }
}

/// The dead letter of a message that was delivered too often.
pub fn of_message(source: &Source, mut record: Record, failed: Failed, compression: Compression) -> DeadLetter {
    let Failed { offset, deliveries } = failed;
    describe(&mut record, source, offset, format!("{deliveries} deliveries failed"));
    record.set_header(&format!("{PREFIX}deliveries"), deliveries.to_string());
    DeadLetter { record, compression }
}

/// The dead letter of a batch that cannot be decoded: its value is the batch, byte for byte.
pub fn of_batch(source: &Source, batch: &LogBatch) -> DeadLetter {
    let timestamp_ms = i64::try_from(batch.append_time_ms).unwrap_or(i64::MAX);
    let mut record = Record { value: Some(batch.data.clone()), timestamp_ms, ..Default::default() };
    describe(&mut record, source, batch.base_offset, "the records cannot be decoded".to_owned());
    record.set_header(BATCH, batch.count.to_string());
    DeadLetter { record, compression: Compression::None }
}

/// Publishes a dead letter again to the topic that it came from, for the subscription that failed at it, without what this module added.
/// `origin` is its place among dead letters. `None` where that was done before.
///
/// Anybody may publish a message with these headers: the subscription that they name must have this topic for its dead letters, and read
/// the topic that they name. So nothing is written where clients cannot publish, and nothing past the limits of another topic.
pub async fn give_back(context: &Context, origin: Origin) -> Result<Option<Published>, Failure> {
    let refused = |reason, text: &str| Failure::new(Code::FailedPrecondition, reason, text);
    let partition = context.led_partition(origin.group).await?;
    let batches = partition.read(origin.offset, 1).await?;
    let batch = batches.into_iter().next().filter(|batch| batch.base_offset <= origin.offset);
    let batch = batch.ok_or_else(|| refused("NOT_A_DEAD_LETTER", "retention has removed the dead letter"))?;
    let _budget = context.budget.publish(batch.data.len() + records::unfolding_bytes_max(&batch.data)).await;
    let compression = Compression::of_batch(&batch.data).unwrap_or_default();
    let at = (origin.offset - batch.base_offset) as usize;
    let data = batch.data.clone();
    let decode = move || records::decode(&data).ok().and_then(|records| records.into_iter().nth(at));
    let record = context.unpacker.of_size(records::unfolding_bytes_max(&batch.data), decode).await;
    let mut record = record.ok_or_else(|| refused("NOT_A_DEAD_LETTER", "the dead letter cannot be decoded"))?;
    if record.header(BATCH).is_some() {
        let text = "the dead letter holds a batch whose records cannot be decoded: it would be one again";
        return Err(refused("UNDECODABLE", text));
    }
    let field = |name: &str| Some(String::from_utf8_lossy(record.header(&format!("{PREFIX}{name}"))?).into_owned());
    let (Some(topic), Some(subscription)) = (field("topic"), field("subscription")) else {
        let text = "the message has no headers that say where it came from: it is no dead letter";
        return Err(refused("NOT_A_DEAD_LETTER", text));
    };
    let meta = context.shared.meta();
    let is_its = |s: &Subscription| {
        let takes = meta.topic_of(origin.group).is_some_and(|here| here.name == s.spec.dead_letter_topic);
        takes && meta.topics.get(&topic).is_some_and(|t| s.spec.reads(t))
    };
    if !meta.subscriptions.get(&subscription).is_some_and(is_its) {
        let text =
            "its headers name a subscription that has no dead letters here, or does not read the topic that they name";
        return Err(refused("NOT_A_DEAD_LETTER", text));
    }
    record.headers.retain(|(name, _)| !name.starts_with(PREFIX));
    record.set_header(ONLY_FOR, subscription);
    outbox::publish(context, &topic, vec![record], compression, origin, Limit::Carried).await
}

/// Publishes a dead letter, once, however often it is repeated. The dead-letter topic takes whatever the topic of its origin took.
pub async fn publish(context: &Context, source: &Source, letter: DeadLetter, offset: u64) -> Result<(), Failure> {
    let Source { subscription, group, seeks, .. } = *source;
    let origin = Origin { subscription, group, offset, seeks, reason: Reason::Dead };
    let DeadLetter { record, compression } = letter;
    outbox::publish(context, &source.dead_letter_topic, vec![record], compression, origin, Limit::Carried)
        .await
        .map(drop)
}
