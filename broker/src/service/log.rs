//! Reading a partition's log by offset.

use super::{Context, Found};
use crate::shared::Partition;
use crate::status::Failure;
use futures::Stream;
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use weir_core::tail::LogBatch;
use weir_proto::v1;
use weir_proto::v1::log_server::Log;

/// Longest wait of a fetch, ms.
const WAIT_MS_MAX: u32 = 30_000;
/// Most bytes one answer holds.
const BYTES_MAX: u32 = 16 << 20;

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
    let text = format!("offset {offset} is outside of the log, which has {start} to {end}");
    Err(Failure::new(Code::OutOfRange, "OFFSET", text))
}

async fn fetch(
    context: &Context,
    topic: &str,
    mut partition: Partition,
    request: &v1::FetchRequest,
) -> Result<v1::FetchResponse, Failure> {
    check_range(context, &mut partition, request.offset).await?;
    let bytes_max = if request.bytes_max == 0 { 1 << 20 } else { request.bytes_max.min(BYTES_MAX) } as usize;
    let wait = Duration::from_millis(request.wait_ms.min(WAIT_MS_MAX).into());
    let _ = tokio::time::timeout(
        wait,
        partition.progress.wait_for(|p| p.high_watermark > request.offset || p.serving.is_none()),
    )
    .await;
    let batches = partition.read(request.offset, bytes_max).await?;
    let batches: Vec<v1::Batch> = batches.into_iter().map(to_wire).collect();
    context.metrics.fetched(topic, &batches);
    Ok(v1::FetchResponse {
        batches,
        high_watermark: partition.tail.high_watermark(),
        start_offset: partition.tail.start_offset(),
    })
}

#[tonic::async_trait]
impl Log for Context {
    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<v1::FetchResponse>, Status> {
        let request = request.into_inner();
        let Found { group, topic, .. } = self.find(&request.topic, request.partition).map_err(|f| self.rejected(f))?;
        let partition = self.led_partition(group).await.map_err(|f| self.rejected(f))?;
        let answer = fetch(self, &topic, partition, &request).await;
        Ok(Response::new(answer.map_err(|f| self.rejected(f))?))
    }

    type FetchStreamStream = Pin<Box<dyn Stream<Item = Result<v1::FetchResponse, Status>> + Send>>;

    async fn fetch_stream(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchStreamStream>, Status> {
        let mut request = request.into_inner();
        let Found { group, topic, .. } = self.find(&request.topic, request.partition).map_err(|f| self.rejected(f))?;
        let mut partition = self.led_partition(group).await.map_err(|f| self.rejected(f))?;
        check_range(self, &mut partition, request.offset).await.map_err(|f| self.rejected(f))?;
        request.wait_ms = 1_000;
        let (sender, receiver) = mpsc::channel(4);
        let context = self.clone();
        tokio::spawn(async move {
            loop {
                let answer = match context.led_partition(group).await {
                    Ok(partition) => fetch(&context, &topic, partition, &request).await,
                    Err(failure) => Err(failure),
                };
                let ended = answer.is_err();
                if let Ok(response) = &answer
                    && let Some(last) = response.batches.last()
                {
                    request.offset = last.base_offset + u64::from(last.count);
                }
                if sender.send(answer.map_err(Status::from)).await.is_err() || ended {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let request = request.into_inner();
        let Found { group, .. } = self.find(&request.topic, request.partition).map_err(|f| self.rejected(f))?;
        let partition = self.led_partition(group).await.map_err(|f| self.rejected(f))?;
        let high_watermark = partition.tail.high_watermark();
        let offset = match request.time_ms {
            0 => high_watermark,
            time => partition.offset_at(time).map_err(Failure::from)?,
        };
        let start_offset = partition.tail.start_offset();
        Ok(Response::new(v1::ListOffsetsResponse { start_offset, high_watermark, offset }))
    }
}
