//! Batches whose records cannot be decoded, as a subscription treats them. Any client can have one stored: a publish is checked by its
//! header and checksum only. A subscription passes over such a batch, so that what follows is delivered. Where it has a dead-letter topic
//! the batch is moved there first, unchanged, as one dead letter; its offsets are acknowledged in the log once that is done. Another
//! leader finds a batch that was not moved yet by itself.

use crate::dead_letter::{self, Source};
use crate::service::Context;
use crate::shared::Partition;
use crate::status::Failure;
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use weir_core::cursor::OffsetRange;
use weir_core::tail::LogBatch;
use weir_proto::v1;

/// Batches that wait to be moved. More are left to the next leader of the partition, and unacknowledged until then.
const WAITING_MAX: usize = 10_000;
/// Batches that members reported and the broker has not examined. More are delivered again after their deadline, and reported again.
const REPORTED_MAX: usize = 10_000;
/// Batches being moved at one time.
const MOVING_MAX: usize = 4;
/// Shortest and longest wait after a move that failed.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A batch that is to be moved, and the offsets that are acknowledged once it is.
struct Waiting {
    base_offset: u64,
    acked: Vec<OffsetRange>,
}

/// The outcome of a move: offsets to acknowledge.
pub(crate) struct Moved(Waiting, Result<(), Failure>);

/// The unreadable batches of one subscription in one partition.
#[derive(Default)]
pub(crate) struct Unreadable {
    waiting: VecDeque<Waiting>,
    moving: JoinSet<Moved>,
    /// first offset of the batch that was counted last: one that is found in parts is counted once
    counted: Option<u64>,
    retry_at: Option<Instant>,
    pause: Duration,
}

impl Unreadable {
    /// Whether a batch is being moved or is to be.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.moving.is_empty()
    }

    /// Counts a batch, of which `acked` were not acknowledged before, and takes it on. Returns the ranges that may be acknowledged at
    /// once: all, where there is no dead-letter topic.
    pub(crate) fn pass_over(
        &mut self,
        context: &Context,
        source: &Source,
        batch: &LogBatch,
        why: &str,
        acked: Vec<OffsetRange>,
    ) -> Vec<OffsetRange> {
        if acked.is_empty() {
            return acked;
        }
        if self.counted.replace(batch.base_offset) != Some(batch.base_offset) {
            let outcome = if source.dead_letter_topic.is_empty() { "skipped" } else { "found" };
            context.metrics.undecodable.with_label_values(&[outcome]).inc();
            if let Some(left_out) = context.metrics.seldom.now("passed over", &source.subscription_name) {
                tracing::warn!(
                    topic = source.topic,
                    partition = source.partition,
                    first = batch.base_offset,
                    last = batch.end_offset() - 1,
                    subscription = source.subscription_name,
                    dead_letter_topic = source.dead_letter_topic,
                    why,
                    left_out,
                    "records cannot be decoded: their batch is passed over"
                );
            }
        }
        if source.dead_letter_topic.is_empty() {
            return acked;
        }
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push_back(Waiting { base_offset: batch.base_offset, acked });
        }
        Vec::new()
    }

    /// Starts moves, as many as may run.
    pub(crate) fn start(&mut self, context: &Context, source: &Source, partition: &Partition) {
        if self.retry_at.is_some_and(|at| at > Instant::now()) {
            return;
        }
        while self.moving.len() < MOVING_MAX {
            let Some(next) = self.waiting.pop_front() else { return };
            let (context, source, partition) = (context.clone(), source.clone(), partition.clone());
            self.moving.spawn(async move {
                let moved = move_batch(&context, &source, &partition, next.base_offset).await;
                Moved(next, moved)
            });
        }
    }

    /// The next move that ended; pending where none runs.
    pub(crate) async fn next(&mut self) -> Moved {
        loop {
            match self.moving.join_next().await {
                Some(Ok(moved)) => return moved,
                Some(Err(error)) => tracing::error!(%error, "moving an unreadable batch"),
                None => std::future::pending().await,
            }
        }
    }

    /// What a move that ended allows to acknowledge. One that failed is repeated later.
    pub(crate) fn ended(&mut self, context: &Context, source: &Source, moved: Moved) -> Vec<OffsetRange> {
        let Moved(batch, outcome) = moved;
        let count = |outcome: &str| context.metrics.undecodable.with_label_values(&[outcome]).inc();
        match outcome {
            Ok(()) => {
                (self.retry_at, self.pause) = (None, Duration::ZERO);
                count("moved");
                batch.acked
            }
            Err(failure) => {
                self.pause = (self.pause * 2).clamp(RETRY_MIN, RETRY_MAX);
                self.retry_at = Some(Instant::now() + self.pause);
                count("failed");
                if let Some(left_out) = context.metrics.seldom.now("unreadable", &source.subscription_name) {
                    tracing::warn!(
                        subscription = source.subscription_name,
                        topic = source.topic,
                        partition = source.partition,
                        offset = batch.base_offset,
                        to = source.dead_letter_topic,
                        why = failure.message,
                        left_out,
                        "an unreadable batch could not be moved; it is tried again"
                    );
                }
                self.waiting.push_front(batch);
                Vec::new()
            }
        }
    }
}

/// Offsets of batches that members could not decode, and that are not examined yet.
#[derive(Default)]
pub(crate) struct Reported(BTreeSet<u64>);

impl Reported {
    /// Adds a report, as far as there is room for it.
    pub(crate) fn add(&mut self, ranges: &[v1::OffsetRange]) {
        for range in ranges {
            if self.0.len() >= REPORTED_MAX {
                return;
            }
            self.0.insert(range.start);
        }
    }

    /// The next one to examine.
    pub(crate) fn first(&self) -> Option<u64> {
        self.0.first().copied()
    }

    /// Removes one that is examined.
    pub(crate) fn remove(&mut self, offset: u64) {
        self.0.remove(&offset);
    }
}

async fn move_batch(
    context: &Context,
    source: &Source,
    partition: &Partition,
    base_offset: u64,
) -> Result<(), Failure> {
    let batches = partition.read(base_offset, 1).await?;
    match batches.into_iter().next().filter(|batch| batch.base_offset == base_offset) {
        Some(batch) => dead_letter::publish(context, source, dead_letter::of_batch(source, &batch), base_offset).await,
        None if partition.tail.start_offset() > base_offset => Ok(()), // retention was faster
        None => Err(Failure::new(tonic::Code::Unavailable, "NOT_READ", "the batch could not be read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_bounded_however_many_come_before_they_are_examined() {
        let mut reported = Reported::default();
        for from in (0..5).map(|report| report * REPORTED_MAX as u64) {
            let ranges: Vec<_> =
                (from..from + REPORTED_MAX as u64).map(|start| v1::OffsetRange { start, end: start + 1 }).collect();
            reported.add(&ranges);
        }
        let mut examined = 0;
        while let Some(offset) = reported.first() {
            assert_eq!(offset, examined);
            reported.remove(offset);
            examined += 1;
        }
        assert_eq!(examined, REPORTED_MAX as u64);
        reported.add(&[v1::OffsetRange { start: 7, end: 8 }]);
        assert_eq!(reported.first(), Some(7), "there is room again");
    }
}
