//! The producer table: which sequences of which producer a partition has, so that a repeated publish is
//! answered with the offset it already has. Keyed by producer id with its epoch, and it holds user offsets, never Raft indexes.

use crate::batch::ProducerStamp;
use std::collections::{BTreeMap, VecDeque};
use thiserror::Error;

/// Batches remembered for each producer. A client keeps fewer than this unanswered on one partition.
pub const BATCHES_MAX: usize = 32;
/// Producers remembered for each partition; beyond it the one that wrote longest ago is forgotten.
pub const PRODUCERS_MAX: usize = 10_000;

/// Producer ids from here on are brokers' own, one for each dead letter or result; the metadata group's count up from 1.
pub const OWN_PRODUCERS: u64 = 1 << 62;
/// Of those, so many are remembered for each partition, beside the others: none pushes out a client's.
pub const OWN_PRODUCERS_MAX: usize = 20_000;

/// Why an idempotent publish was refused.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum SequenceError {
    /// A newer epoch of the producer has written.
    #[error("producer {id} epoch {epoch} is fenced by epoch {newer}")]
    Fenced { id: u64, epoch: u16, newer: u16 },
    /// A batch before this one is missing.
    #[error("producer {id} sent sequence {found}, the partition expects {expected}")]
    OutOfOrder { id: u64, expected: i32, found: i32 },
    /// The partition does not remember the producer, or not this far back.
    #[error("producer {id} sequence {sequence} is not remembered; take a new producer id")]
    Unknown { id: u64, sequence: i32 },
}

/// The verdict on a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not seen before: append it.
    Fresh,
    /// Already in the log at this base offset.
    Duplicate { base_offset: u64 },
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Seen {
    #[prost(int32, tag = "1")]
    first: i32,
    #[prost(uint32, tag = "2")]
    count: u32,
    #[prost(uint64, tag = "3")]
    base_offset: u64,
}

/// What a partition remembers of one producer. Encoded in checkpoints.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProducerRecord {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint32, tag = "2")]
    epoch: u32,
    #[prost(message, repeated, tag = "3")]
    seen: Vec<Seen>,
}

#[derive(Clone, Debug, PartialEq)]
struct Producer {
    epoch: u16,
    seen: VecDeque<Seen>,
}

/// The table of one partition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProducerTable {
    producers: BTreeMap<u64, Producer>,
    /// base offset of each producer's latest batch → its id: who to forget first; of clients' producers, and of brokers' own
    by_age: [BTreeMap<u64, u64>; 2],
}

/// Which of the two a producer is in, and how many that holds.
fn class(id: u64) -> (usize, usize) {
    if id < OWN_PRODUCERS { (0, PRODUCERS_MAX) } else { (1, OWN_PRODUCERS_MAX) }
}

/// `sequence + n`, wrapping from `i32::MAX` to 0.
pub fn sequence_add(sequence: i32, n: u32) -> i32 {
    ((i64::from(sequence) + i64::from(n)) & i64::from(i32::MAX)) as i32
}

impl ProducerTable {
    /// Judges a batch before it is appended. Changes nothing.
    pub fn check(&self, stamp: &ProducerStamp, count: u32) -> Result<Verdict, SequenceError> {
        let ProducerStamp { id, epoch, sequence } = *stamp;
        let Some(producer) = self.producers.get(&id) else {
            return if sequence == 0 { Ok(Verdict::Fresh) } else { Err(SequenceError::Unknown { id, sequence }) };
        };
        if epoch < producer.epoch {
            return Err(SequenceError::Fenced { id, epoch, newer: producer.epoch });
        }
        if epoch > producer.epoch {
            return if sequence == 0 {
                Ok(Verdict::Fresh)
            } else {
                Err(SequenceError::OutOfOrder { id, expected: 0, found: sequence })
            };
        }
        let last = producer.seen.back().expect("a producer in the table has a batch");
        let expected = sequence_add(last.first, last.count);
        if sequence == expected {
            return Ok(Verdict::Fresh);
        }
        if let Some(seen) = producer.seen.iter().find(|s| s.first == sequence && s.count == count) {
            return Ok(Verdict::Duplicate { base_offset: seen.base_offset });
        }
        // half of the ring behind the expected sequence is the past
        let behind = (i64::from(expected) - i64::from(sequence)) & i64::from(i32::MAX);
        if behind < i64::from(i32::MAX) / 2 {
            Err(SequenceError::Unknown { id, sequence })
        } else {
            Err(SequenceError::OutOfOrder { id, expected, found: sequence })
        }
    }

    /// Records a batch that was appended at `base_offset`.
    pub fn record(&mut self, stamp: &ProducerStamp, count: u32, base_offset: u64) {
        let producer =
            self.producers.entry(stamp.id).or_insert_with(|| Producer { epoch: stamp.epoch, seen: VecDeque::new() });
        if let Some(last) = producer.seen.back() {
            self.by_age[class(stamp.id).0].remove(&last.base_offset);
        }
        if producer.epoch != stamp.epoch {
            producer.epoch = stamp.epoch;
            producer.seen.clear();
        }
        if producer.seen.len() == BATCHES_MAX {
            producer.seen.pop_front();
        }
        producer.seen.push_back(Seen { first: stamp.sequence, count, base_offset });
        let (class, most) = class(stamp.id);
        let by_age = &mut self.by_age[class];
        by_age.insert(base_offset, stamp.id);
        if by_age.len() > most
            && let Some((_, oldest)) = by_age.pop_first()
        {
            self.producers.remove(&oldest);
        }
    }

    /// The table as records for a checkpoint.
    pub fn to_records(&self) -> Vec<ProducerRecord> {
        self.producers
            .iter()
            .map(|(id, p)| ProducerRecord { id: *id, epoch: p.epoch.into(), seen: p.seen.iter().copied().collect() })
            .collect()
    }

    /// The table out of a checkpoint's records.
    pub fn from_records(records: &[ProducerRecord]) -> Self {
        let mut table = Self::default();
        for record in records {
            if let Some(last) = record.seen.last() {
                table.by_age[class(record.id).0].insert(last.base_offset, record.id);
                let producer = Producer { epoch: record.epoch as u16, seen: record.seen.iter().copied().collect() };
                table.producers.insert(record.id, producer);
            }
        }
        table
    }

    /// Producers remembered.
    pub fn len(&self) -> usize {
        self.producers.len()
    }

    /// Whether none is remembered.
    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(epoch: u16, sequence: i32) -> ProducerStamp {
        ProducerStamp { id: 1, epoch, sequence }
    }

    #[test]
    fn a_repeated_batch_gets_its_old_offset_and_a_gap_is_refused() {
        let mut table = ProducerTable::default();
        assert_eq!(table.check(&stamp(0, 0), 3), Ok(Verdict::Fresh));
        table.record(&stamp(0, 0), 3, 10);
        table.record(&stamp(0, 3), 2, 13);
        assert_eq!(table.check(&stamp(0, 0), 3), Ok(Verdict::Duplicate { base_offset: 10 }));
        assert_eq!(table.check(&stamp(0, 5), 1), Ok(Verdict::Fresh));
        assert_eq!(table.check(&stamp(0, 6), 1), Err(SequenceError::OutOfOrder { id: 1, expected: 5, found: 6 }));
        assert_eq!(table.check(&stamp(0, 1), 1), Err(SequenceError::Unknown { id: 1, sequence: 1 }));
        assert_eq!(ProducerTable::from_records(&table.to_records()), table);
    }

    #[test]
    fn a_new_epoch_fences_the_old_and_starts_at_zero() {
        let mut table = ProducerTable::default();
        table.record(&stamp(0, 0), 1, 0);
        assert!(matches!(table.check(&stamp(1, 4), 1), Err(SequenceError::OutOfOrder { .. })));
        assert_eq!(table.check(&stamp(1, 0), 1), Ok(Verdict::Fresh));
        table.record(&stamp(1, 0), 1, 1);
        assert!(matches!(table.check(&stamp(0, 1), 1), Err(SequenceError::Fenced { .. })));
    }

    #[test]
    fn sequences_wrap_from_the_largest_to_zero() {
        let mut table = ProducerTable::default();
        table.record(&stamp(0, i32::MAX - 1), 2, 0);
        assert_eq!(table.check(&stamp(0, 0), 1), Ok(Verdict::Fresh));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest_writer() {
        let mut table = ProducerTable::default();
        for id in 0..=PRODUCERS_MAX as u64 {
            table.record(&ProducerStamp { id, epoch: 0, sequence: 0 }, 1, id);
        }
        assert_eq!(table.len(), PRODUCERS_MAX);
        assert!(table.check(&ProducerStamp { id: 0, epoch: 0, sequence: 1 }, 1).is_err());
    }
}
