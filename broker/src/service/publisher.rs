//! Publishing: one call with plain messages, and a stream of batches with many in flight.

use super::{Context, Found, full_name};
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
use weir_proto::records::{self, Compression, Record, Stamp};
use weir_proto::v1;
use weir_proto::v1::publisher_server::Publisher;

/// A plain message as a record; one without a time happened now.
pub(crate) fn record(m: v1::Message) -> Record {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now_ms = now.map_or(0, |d| d.as_millis() as i64);
    Record {
        key: (!m.key.is_empty()).then_some(m.key),
        value: Some(m.value),
        headers: m.headers.into_iter().collect(),
        timestamp_ms: if m.timestamp_ms == 0 { now_ms } else { m.timestamp_ms },
    }
}

type AckStream = Pin<Box<dyn Stream<Item = Result<v1::PublishAck, Status>> + Send>>;

struct Checked {
    topic: String,
    group: GroupId,
    data: Bytes,
    header: BatchHeader,
}

fn check(context: &Context, topic: &str, partition: u32, data: Bytes) -> Result<Checked, Failure> {
    let Found { group, batch_bytes_max: limit, topic } = context.find(topic, partition)?;
    if data.len() > limit as usize {
        let text = format!("the batch has {} bytes, topic {topic} takes at most {limit}", data.len());
        return Err(Failure::invalid("TOO_LARGE", text));
    }
    let header = BatchHeader::validate(&data)?;
    if !context.shared.leads(group) {
        return Err(context.not_leader(group));
    }
    Ok(Checked { topic, group, data, header })
}

/// Bytes of one stream's batches whose answers were not taken yet; a client that reads no answers is heard no further.
const UNREAD_BYTES_MAX: usize = 64 << 20;

fn kib(bytes: usize) -> u32 {
    (bytes as u32).div_ceil(1024).max(1)
}

pub(crate) async fn budget(of: &Arc<Semaphore>, bytes: usize) -> OwnedSemaphorePermit {
    of.clone().acquire_many_owned(kib(bytes)).await.expect("never closed")
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
        let scheduled = request.messages.iter().filter(|m| m.deliver_at_ms > 0).count();
        if scheduled > 0 {
            if scheduled < request.messages.len() {
                let text = "of one call's messages either all have a time to be delivered at, or none has";
                return Err(self.rejected(Failure::invalid("DELIVER_AT", text)).into());
            }
            let topic = self.find(&request.topic, partition).map_err(|f| self.rejected(f))?.topic;
            let timed = |m: v1::Message| (m.deliver_at_ms, record(m));
            let list = request.messages.into_iter().map(timed).map(|(at, record)| (record, at)).collect();
            let base_offset = self.schedule(&topic, partition, list, stamp).await?;
            return Ok(Response::new(v1::PublishResponse { partition, base_offset, scheduled: true }));
        }
        let list: Vec<Record> = request.messages.into_iter().map(record).collect();
        let batch = records::encode(&list, Compression::None, stamp).map_err(|e| Failure::invalid("RECORDS", e))?;
        let bytes = batch.len();
        let checked = check(self, &request.topic, partition, batch).map_err(|f| self.rejected(f))?;
        let _permit = budget(&self.budget, bytes).await;
        let started = Instant::now();
        let Checked { topic, group, data, header } = checked;
        let reply = self.node.call(|to| Event::Publish { group, data, header, to }).await;
        match reply.ok_or_else(Failure::stopping)? {
            Reply::Published { base_offset, .. } => {
                self.metrics.published(&topic, header.count, bytes, started);
                Ok(Response::new(v1::PublishResponse { partition, base_offset, scheduled: false }))
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
        let v1::CancelScheduledRequest { topic, partition, offset } = request.into_inner();
        let topic = full_name(&topic).map_err(|f| self.rejected(f))?;
        self.cancel_scheduled(&topic, partition, offset).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::CancelScheduledResponse {}))
    }

    async fn allocate_producer_ids(
        &self,
        request: Request<v1::AllocateProducerIdsRequest>,
    ) -> Result<Response<v1::AllocateProducerIdsResponse>, Status> {
        let count = request.into_inner().count.clamp(1, 1_000);
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
            unread = budget(&of_stream, batch.batch.len()) => unread,
            () = replies.closed() => break,
        };
        let budget = budget(&context.budget, batch.batch.len()).await;
        match check(&context, &batch.topic, batch.partition, batch.batch) {
            Ok(Checked { topic, group, data, header }) => {
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

/// What makes a call one that may be repeated.
fn stamp(request: &v1::PublishRequest) -> Result<Option<Stamp>, Failure> {
    let Some(v1::ProducerStamp { id, sequence }) = request.producer else { return Ok(None) };
    if request.partition.is_none() {
        return Err(Failure::invalid(
            "PARTITION",
            "a call with a producer names its partition: sequences count for each",
        ));
    }
    // a broker's own producers have ids beyond these
    if id == 0 || id >= OWN_PRODUCERS || sequence < 0 {
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
    let key = &request.messages[0].key;
    if !key.is_empty() {
        return Ok(records::partition_of(key, groups.len() as u32));
    }
    let led = groups.iter().position(|g| context.shared.leads(GroupId(*g)));
    Ok(led.unwrap_or(0) as u32)
}
