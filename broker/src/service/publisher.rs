//! Publishing: one call with plain messages, and a stream of batches with many in flight.

use super::{Context, Found, bounds, check_not_internal, full_name};
use crate::node_loop::{Event, ReplyTo};
use crate::status::Failure;
use bytes::Bytes;
use futures::Stream;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Code, Request, Response, Status, Streaming};
use weir_core::batch::BatchHeader;
use weir_core::ids::GroupId;
use weir_core::meta::command::Kind;
use weir_core::node::Reply;
use weir_core::producer::OWN_PRODUCERS;
use weir_proto::records::{self, Compression, Record, Stamp, Unfolded};
use weir_proto::v1;
use weir_proto::v1::publisher_server::Publisher;

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_millis() as u64)
}

/// A plain message as a record; one without a time happened now.
pub(crate) fn record(m: v1::Message) -> Record {
    let timestamp_ms = m.timestamp_ms.unwrap_or_else(|| now_ms() as i64);
    Record { timestamp_ms, ..m.into() }
}

/// Refuses a batch whose records could not be delivered because they are too large once they are decompressed. How large they are is read
/// off their compressed form, and nothing is decompressed; only where that gives no bound, and a batch is unusual, is it
/// counted, on a thread of its own. A form that lies is no concern here: such a batch cannot be decoded, and subscriptions pass over it.
async fn check_unfolded(context: &Context, checked: &Checked) -> Result<(), Failure> {
    let unfolded = if checked.header.codec == 0 { None } else { records::unfolded(&checked.data) };
    let is_too_much = match unfolded.filter(|u| u.bytes_max() > records::UNFOLDED_BYTES_MAX) {
        None => false,
        Some(Unfolded::Exactly(_)) => true,
        Some(Unfolded::AtMost(_)) => {
            let data = checked.data.clone();
            context.unpacker.at_length(move || records::unfolds_to_too_much(&data)).await
        }
    };
    if !is_too_much {
        return Ok(());
    }
    let most = records::UNFOLDED_BYTES_MAX;
    Err(Failure::invalid(
        "TOO_LARGE",
        format!("the batch's records have more than {most} bytes once they are decompressed"),
    ))
}

type AckStream = Pin<Box<dyn Stream<Item = Result<v1::PublishAck, Status>> + Send>>;

struct Checked {
    topic: String,
    topic_id: u64,
    group: GroupId,
    data: Bytes,
    header: BatchHeader,
}

fn check(context: &Context, topic: &str, partition: u32, topic_id: u64, data: Bytes) -> Result<Checked, Failure> {
    check_not_internal(topic)?;
    let found = context.find(topic, partition)?.of_topic(topic_id)?;
    let Found { group, batch_bytes_max: limit, topic, topic_id } = found;
    if data.len() > limit as usize {
        let text = format!("the batch has {} bytes, topic {topic} takes at most {limit}", data.len());
        return Err(Failure::invalid("TOO_LARGE", text));
    }
    let header = BatchHeader::validate(&data)?;
    if let Some(stamp) = header.producer {
        refuse_own_producers(stamp.id)?;
    }
    if !context.shared.leads(group) {
        return Err(context.not_leader(group));
    }
    Ok(Checked { topic, topic_id, group, data, header })
}

/// Bytes of one stream's batches whose answers were not taken yet; a client that reads no answers is heard no further.
const UNREAD_BYTES_MAX: usize = 64 << 20;

async fn unread(of: &Arc<Semaphore>, bytes: usize) -> OwnedSemaphorePermit {
    let kib = bytes.min(UNREAD_BYTES_MAX).div_ceil(1024).max(1);
    of.clone().acquire_many_owned(kib as u32).await.expect("never closed")
}

#[tonic::async_trait]
impl Publisher for Context {
    async fn publish(&self, request: Request<v1::PublishRequest>) -> Result<Response<v1::PublishResponse>, Status> {
        let request = request.into_inner();
        if request.messages.is_empty() {
            return Err(self.rejected(Failure::invalid("EMPTY", "a publish holds at least one message")).into());
        }
        let partition = match request.partition {
            Some(partition) => partition,
            None => choose_partition(self, &request).map_err(|f| self.rejected(f))?,
        };
        let stamp = stamp(&request).map_err(|f| self.rejected(f))?;
        let times: Vec<u64> = request.messages.iter().filter_map(|m| m.deliver_at_ms).collect();
        if !times.is_empty() {
            let now_ms = now_ms();
            times.iter().try_for_each(|at| bounds::deliver_at(*at, now_ms).map(drop)).map_err(|f| self.rejected(f))?;
            if times.len() < request.messages.len() {
                let text = "of one call's messages either all have a time to be delivered at, or none has";
                return Err(self.rejected(Failure::invalid("DELIVER_AT", text)).into());
            }
            let name = full_name(&request.topic).map_err(|f| self.rejected(f))?;
            let found = self.find(&name, partition).and_then(|f| f.of_topic(request.topic_id));
            let Found { topic, topic_id, .. } = found.map_err(|f| self.rejected(f))?;
            let list = request.messages.into_iter().map(record).zip(times).collect();
            let base_offset = self.schedule(&topic, topic_id, partition, list, stamp).await?;
            return Ok(Response::new(v1::PublishResponse { partition, base_offset, scheduled: true, topic_id }));
        }
        let list: Vec<Record> = request.messages.into_iter().map(record).collect();
        let batch = records::encode(&list, Compression::None, stamp).map_err(|e| Failure::invalid("RECORDS", e))?;
        let bytes = batch.len();
        let checked = check(self, &request.topic, partition, request.topic_id, batch).map_err(|f| self.rejected(f))?;
        let _permit = self.budget.publish(bytes).await;
        let started = Instant::now();
        let Checked { topic, topic_id, group, data, header } = checked;
        self.shared.keep_pace(group, bytes).await;
        let reply = self.node.call(|to| Event::Publish { group, data, header, to }).await;
        match reply.ok_or_else(Failure::stopping)? {
            Reply::Published { base_offset, .. } => {
                self.metrics.published(&topic, header.count, bytes, started);
                Ok(Response::new(v1::PublishResponse { partition, base_offset, scheduled: false, topic_id }))
            }
            Reply::Refused(refusal) => Err(self.failure(group, refusal).into()),
            other => Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}")).into()),
        }
    }

    type PublishStreamStream = AckStream;

    async fn publish_stream(
        &self,
        request: Request<Streaming<v1::PublishBatch>>,
    ) -> Result<Response<AckStream>, Status> {
        let (replies, acks) = mpsc::unbounded_channel();
        let (refused, refusals) = mpsc::unbounded_channel();
        let under_way = UnderWay::default();
        tokio::spawn(take_batches(self.clone(), request.into_inner(), replies, refused, under_way.clone()));
        let context = self.clone();
        self.metrics.open_streams.inc();
        let answers = answer(context, acks, refusals, under_way);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn cancel_scheduled(
        &self,
        request: Request<v1::CancelScheduledRequest>,
    ) -> Result<Response<v1::CancelScheduledResponse>, Status> {
        let v1::CancelScheduledRequest { topic, partition, offset, topic_id } = request.into_inner();
        let topic = full_name(&topic).map_err(|f| self.rejected(f))?;
        self.cancel_scheduled(&topic, topic_id, partition, offset).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::CancelScheduledResponse {}))
    }

    async fn allocate_producer_ids(
        &self,
        request: Request<v1::AllocateProducerIdsRequest>,
    ) -> Result<Response<v1::AllocateProducerIdsResponse>, Status> {
        let count = bounds::producer_ids(request.into_inner().count).map_err(|f| self.rejected(f))?;
        let first_id = self.propose(Kind::AllocateProducers(count)).await?;
        Ok(Response::new(v1::AllocateProducerIdsResponse { first_id }))
    }
}

/// A batch under way.
struct Pending {
    topic: String,
    group: GroupId,
    records: u32,
    bytes: usize,
    since: Instant,
}

type UnderWay = std::sync::Arc<std::sync::Mutex<HashMap<u64, Pending>>>;

/// Reads batches off a stream and hands them to the node, in the order they came; waits where too much is under way.
async fn take_batches(
    context: Context,
    mut batches: Streaming<v1::PublishBatch>,
    replies: mpsc::UnboundedSender<(u64, Reply, OwnedSemaphorePermit)>,
    refused: mpsc::UnboundedSender<(u64, Failure, OwnedSemaphorePermit)>,
    under_way: UnderWay,
) {
    let of_stream = Arc::new(Semaphore::new(UNREAD_BYTES_MAX / 1024));
    while let Ok(Some(batch)) = batches.message().await {
        let unread = tokio::select! {
            unread = unread(&of_stream, batch.batch.len()) => unread,
            () = replies.closed() => break,
        };
        let budget = context.budget.publish(batch.batch.len()).await;
        let checked = match check(&context, &batch.topic, batch.partition, batch.topic_id, batch.batch) {
            Ok(checked) => check_unfolded(&context, &checked).await.map(|()| checked),
            refused => refused,
        };
        match checked {
            Ok(Checked { topic, group, data, header, .. }) => {
                context.shared.keep_pace(group, data.len()).await;
                let entry = Pending { topic, group, records: header.count, bytes: data.len(), since: Instant::now() };
                under_way.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(batch.id, entry);
                let to = ReplyTo::Stream { to: replies.clone(), id: batch.id, budget, unread };
                context.node.send(Event::Publish { group, data, header, to });
            }
            Err(failure) => {
                let _ = refused.send((batch.id, context.rejected(failure), unread));
            }
        }
    }
    context.metrics.open_streams.dec();
}

fn answer(
    context: Context,
    mut acks: mpsc::UnboundedReceiver<(u64, Reply, OwnedSemaphorePermit)>,
    mut refusals: mpsc::UnboundedReceiver<(u64, Failure, OwnedSemaphorePermit)>,
    under_way: UnderWay,
) -> impl Stream<Item = Result<v1::PublishAck, Status>> {
    use v1::publish_ack::Outcome;
    futures::stream::poll_fn(move |cx| {
        use std::task::Poll;
        if let Poll::Ready(Some((id, failure, _unread))) = refusals.poll_recv(cx) {
            return Poll::Ready(Some(Ok(v1::PublishAck { id, outcome: Some(Outcome::Error(failure.into())) })));
        }
        let Poll::Ready(next) = acks.poll_recv(cx) else { return Poll::Pending };
        let Some((id, reply, _unread)) = next else { return Poll::Ready(None) };
        let entry = under_way.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&id);
        let outcome = match (reply, entry) {
            (Reply::Published { base_offset, .. }, Some(p)) => {
                context.metrics.published(&p.topic, p.records, p.bytes, p.since);
                Outcome::BaseOffset(base_offset)
            }
            (Reply::Refused(refusal), Some(p)) => Outcome::Error(context.failure(p.group, refusal).into()),
            (other, _) => {
                Outcome::Error(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}")).into())
            }
        };
        Poll::Ready(Some(Ok(v1::PublishAck { id, outcome: Some(outcome) })))
    })
}

/// Producer ids of brokers' own are taken from brokers only, which publish by `Peer.Forward`: with one of them a client could make a
/// dead letter or a result appear to be stored already.
fn refuse_own_producers(id: u64) -> Result<(), Failure> {
    if id < OWN_PRODUCERS {
        return Ok(());
    }
    let text = format!("producer id {id} is reserved for brokers: ids come from AllocateProducerIds");
    Err(Failure::new(Code::PermissionDenied, "PRODUCER", text))
}

/// What makes a call one that may be repeated.
fn stamp(request: &v1::PublishRequest) -> Result<Option<Stamp>, Failure> {
    let Some(v1::ProducerStamp { id, sequence }) = request.producer else { return Ok(None) };
    if request.partition.is_none() {
        return Err(Failure::invalid(
            "PARTITION",
            "a call with a producer names its partition: sequences count for each",
        ));
    }
    refuse_own_producers(id)?;
    if id == 0 || sequence < 0 {
        return Err(Failure::invalid(
            "PRODUCER",
            format!(
                "producer {id} with sequence {sequence} is none: ids come from AllocateProducerIds, sequences count up from 0"
            ),
        ));
    }
    Ok(Some(Stamp { id: id as i64, epoch: 0, sequence }))
}

/// By the first message's key, else the partition led here, so that a plain call needs no second hop.
fn choose_partition(context: &Context, request: &v1::PublishRequest) -> Result<u32, Failure> {
    let name = full_name(&request.topic)?;
    context.find(&name, 0)?;
    let meta = context.shared.meta();
    let groups = &meta.topics[&name].groups;
    if let Some(key) = &request.messages[0].key {
        return Ok(records::partition_of(key, groups.len() as u32));
    }
    let led = groups.iter().position(|g| context.shared.leads(GroupId(*g)));
    Ok(led.unwrap_or(0) as u32)
}
