//! Reading a partition's log by offset.

use super::{Context, Found, bounds};
use crate::answer::{self, Answer};
use crate::budget::Answers;
use crate::shared::Partition;
use crate::status::Failure;
use futures::Stream;
use prost::encoding::encoded_len_varint;
use std::pin::Pin;
use std::time::Duration;
use tonic::{Code, Request, Response, Status};
use weir_core::ids::GroupId;
use weir_core::tail::LogBatch;
use weir_proto::v1;
use weir_proto::v1::log_server::Log;

/// Bytes of an answer beside its batches.
const ENVELOPE_BYTES: usize = 64;
/// Longest wait of a fetch, ms.
const WAIT_MS_MAX: u32 = 30_000;

/// For how long a leader that is cut off from the others may lead on, in a partition that slept. Another may have committed meanwhile
/// what it has not: an offset beyond the end may be right for so long.
const CUT_OFF_MAX: Duration = Duration::from_millis(1_500);

/// A batch as the wire has it.
pub fn to_wire(batch: LogBatch) -> v1::Batch {
    v1::Batch {
        base_offset: batch.base_offset,
        count: batch.count,
        leader_epoch: batch.term,
        append_time_ms: batch.append_time_ms,
        batch: batch.data,
    }
}

/// The failure for an offset outside of the log.
pub async fn check_range(context: &Context, partition: &mut Partition, offset: u64) -> Result<(), Failure> {
    if offset > partition.tail.high_watermark() {
        let seen = partition.progress.wait_for(|p| p.high_watermark >= offset || p.serving.is_none());
        let _ = tokio::time::timeout(CUT_OFF_MAX, seen).await;
        if partition.serving().is_none() {
            return Err(context.not_leader(partition.group));
        }
    }
    let (start, end) = (partition.tail.start_offset(), partition.tail.high_watermark());
    if (start..=end).contains(&offset) {
        return Ok(());
    }
    let number = context.shared.meta().assignment(partition.group).map_or(0, |a| a.partition);
    let text = format!("offset {offset} is outside of the log of partition {number}, which has {start} to {end}");
    Err(Failure::new(Code::OutOfRange, "OFFSET", text))
}

/// Bytes a batch takes within an answer.
pub fn wire_bytes(batch: &v1::Batch) -> usize {
    let length = prost::Message::encoded_len(batch);
    1 + encoded_len_varint(length as u64) + length
}

/// Reads batches into an answer for which there is room: first the room, then the bytes. One batch is an answer however large it is.
async fn read(
    partition: &Partition,
    topic_id: u64,
    request: &v1::FetchRequest,
    answers: &Answers,
) -> Result<(v1::FetchResponse, crate::budget::Held), Failure> {
    let wanted = bounds::fetch_bytes(request.bytes_max)?;
    let mut held = answers.take(wanted.min(answers.room())).await;
    loop {
        let most = held.bytes().min(wanted).saturating_sub(ENVELOPE_BYTES);
        let batches = partition.read(request.offset, most).await?;
        let (mut bytes, mut response) = (0, v1::FetchResponse { topic_id, ..Default::default() });
        for batch in batches.into_iter().map(to_wire) {
            bytes += wire_bytes(&batch);
            if !response.batches.is_empty() && bytes > most {
                break;
            }
            response.batches.push(batch);
        }
        response.high_watermark = partition.tail.high_watermark();
        response.start_offset = partition.tail.start_offset();
        let bytes = answer::wire_bytes(&response);
        if bytes <= held.bytes() {
            held.shrink_to(bytes);
            return Ok((response, held));
        }
        drop((response, held)); // nothing is held while this waits
        held = answers.take(bytes).await;
    }
}

/// The answer to a fetch, and the offset to go on at.
async fn fetch(
    context: &Context,
    topic: &str,
    topic_id: u64,
    mut partition: Partition,
    request: &v1::FetchRequest,
    answers: &Answers,
) -> Result<(Answer, u64), Failure> {
    check_range(context, &mut partition, request.offset).await?;
    let wait = Duration::from_millis(request.wait_ms.min(WAIT_MS_MAX).into());
    let _ = tokio::time::timeout(
        wait,
        partition.progress.wait_for(|p| p.high_watermark > request.offset || p.serving.is_none()),
    )
    .await;
    let (response, held) = read(&partition, topic_id, request, answers).await?;
    context.metrics.fetched(topic, &response.batches);
    let next = response.batches.last().map_or(request.offset, |last| last.base_offset + u64::from(last.count));
    Ok((Answer::new(&response, held), next))
}

/// A stream of fetches. Each is read once the connection takes more; nothing is read ahead of it.
struct Follow {
    context: Context,
    group: GroupId,
    topic: String,
    topic_id: u64,
    request: v1::FetchRequest,
    answers: Answers,
}

impl Follow {
    async fn next(mut self) -> Option<(Result<Answer, Status>, Option<Self>)> {
        let answer = match self.context.led_partition(self.group).await {
            Ok(partition) => {
                fetch(&self.context, &self.topic, self.topic_id, partition, &self.request, &self.answers).await
            }
            Err(failure) => Err(failure),
        };
        match answer {
            Ok((answer, next)) => {
                self.request.offset = next;
                Some((Ok(answer), Some(self)))
            }
            Err(failure) => Some((Err(failure.into()), None)),
        }
    }
}

#[tonic::async_trait]
impl Log for Context {
    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<v1::FetchResponse>, Status> {
        let answers = self.answers(&request);
        let request = request.into_inner();
        let found = self.find(&request.topic, request.partition).and_then(|f| f.of_topic(request.topic_id));
        let Found { group, topic, topic_id, .. } = found.map_err(|f| self.rejected(f))?;
        let partition = self.led_partition(group).await.map_err(|f| self.rejected(f))?;
        let answer = fetch(self, &topic, topic_id, partition, &request, &answers).await;
        Ok(answer::once(Default::default(), answer.map_err(|f| self.rejected(f))?.0))
    }

    type FetchStreamStream = Pin<Box<dyn Stream<Item = Result<v1::FetchResponse, Status>> + Send>>;

    async fn fetch_stream(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchStreamStream>, Status> {
        let answers = self.answers(&request);
        let mut request = request.into_inner();
        let found = self.find(&request.topic, request.partition).and_then(|f| f.of_topic(request.topic_id));
        let Found { group, topic, topic_id, .. } = found.map_err(|f| self.rejected(f))?;
        let mut partition = self.led_partition(group).await.map_err(|f| self.rejected(f))?;
        check_range(self, &mut partition, request.offset).await.map_err(|f| self.rejected(f))?;
        request.wait_ms = 1_000;
        let follow = Follow { context: self.clone(), group, topic, topic_id, request, answers };
        let stream = futures::stream::unfold(Some(follow), |follow| async { follow?.next().await });
        Ok(answer::stream(Box::pin(futures::stream::empty()), stream))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let request = request.into_inner();
        let found = self.find(&request.topic, request.partition).and_then(|f| f.of_topic(request.topic_id));
        let Found { group, topic_id, .. } = found.map_err(|f| self.rejected(f))?;
        let partition = self.led_partition(group).await.map_err(|f| self.rejected(f))?;
        let high_watermark = partition.tail.high_watermark();
        let offset = match request.time_ms {
            None => high_watermark,
            Some(time) => partition.offset_at(time).map_err(Failure::from)?,
        };
        let start_offset = partition.tail.start_offset();
        Ok(Response::new(v1::ListOffsetsResponse { start_offset, high_watermark, offset, topic_id }))
    }
}
