//! The replicated state of one partition, and how committed entries change it. Same entries, same state, on every replica.

use crate::batch::BatchHeader;
use crate::cursor::{CursorRecord, Cursors};
use crate::entry::{Context, Control, Kind, entry_bytes};
use crate::producer::{ProducerRecord, ProducerTable};
use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb::Entry;

/// Applied state of a partition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PartitionState {
    /// One past the last applied record: the high watermark.
    pub next_offset: u64,
    /// Which producer wrote what.
    pub producers: ProducerTable,
    /// Subscriptions' positions.
    pub cursors: Cursors,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(message, repeated, tag = "1")]
    producers: Vec<ProducerRecord>,
    #[prost(message, repeated, tag = "2")]
    cursors: Vec<CursorRecord>,
}

impl PartitionState {
    /// Applies one committed entry. Entries without payload change nothing.
    pub fn apply(&mut self, entry: &Entry) {
        let Some(context) = Context::of(entry) else { return };
        match context.kind {
            Kind::Batch => self.record_batch(&context, &entry.data),
            Kind::Control => {
                if let Ok(control) = Control::decode(entry.data.clone()) {
                    control.cursors.iter().for_each(|update| self.cursors.apply(update));
                }
            }
            Kind::Meta => {}
        }
    }

    fn record_batch(&mut self, context: &Context, data: &[u8]) {
        assert_eq!(context.base_offset, self.next_offset, "batches follow each other");
        self.next_offset = context.end_offset();
        if let Ok(BatchHeader { producer: Some(stamp), count, .. }) = BatchHeader::check_shape(data) {
            self.producers.record(&stamp, count, context.base_offset);
        }
    }

    /// The state for a checkpoint (the next offset stands beside it).
    pub fn encode(&self) -> Bytes {
        Encoded { producers: self.producers.to_records(), cursors: self.cursors.to_records() }.encode_to_vec().into()
    }

    /// The state out of a checkpoint.
    pub fn decode(state: &Bytes, next_offset: u64) -> Result<Self, prost::DecodeError> {
        let encoded = Encoded::decode(state.clone())?;
        Ok(Self {
            next_offset,
            producers: ProducerTable::from_records(&encoded.producers),
            cursors: Cursors::from_records(&encoded.cursors),
        })
    }
}

/// Running sums over a log that checkpoints carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogSums {
    /// Bytes of entries since the group's beginning.
    pub bytes: u64,
    /// Append time of the last entry that has one, ms since the epoch.
    pub append_time_ms: u64,
}

impl LogSums {
    /// Counts one entry.
    pub fn add(&mut self, entry: &Entry) {
        self.bytes += entry_bytes(entry);
        if let Some(context) = Context::of(entry) {
            self.append_time_ms = self.append_time_ms.max(context.append_time_ms);
        }
    }
}
