//! The replicated state of one partition, and how committed entries change it. Same entries, same state, on every replica.

use crate::batch::BatchHeader;
use crate::cursor::{CursorRecord, Cursors};
use crate::entry::{Context, Control, Cut, Kind, entry_bytes};
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
    /// The start of the log.
    pub cut: Cut,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(message, repeated, tag = "1")]
    producers: Vec<ProducerRecord>,
    #[prost(message, repeated, tag = "2")]
    cursors: Vec<CursorRecord>,
    #[prost(message, optional, tag = "3")]
    cut: Option<Cut>,
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
                    control.cut.iter().for_each(|cut| self.move_start(cut, entry.index));
                }
            }
            Kind::Meta => {}
        }
    }

    /// The start only grows, and never passes what the log had when the record was written.
    fn move_start(&mut self, cut: &Cut, at: u64) {
        self.cut.index = self.cut.index.max(cut.index.min(at));
        self.cut.offset = self.cut.offset.max(cut.offset.min(self.next_offset));
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
        let cut = Some(self.cut);
        Encoded { producers: self.producers.to_records(), cursors: self.cursors.to_records(), cut }
            .encode_to_vec()
            .into()
    }

    /// The state out of a checkpoint.
    pub fn decode(state: &Bytes, next_offset: u64) -> Result<Self, prost::DecodeError> {
        let encoded = Encoded::decode(state.clone())?;
        Ok(Self {
            next_offset,
            producers: ProducerTable::from_records(&encoded.producers),
            cursors: Cursors::from_records(&encoded.cursors),
            cut: encoded.cut.unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever leaders decided, in whatever order, and whatever a replica began with.
        #[test]
        fn the_start_of_a_log_never_moves_back_or_past_its_end_and_survives_a_checkpoint(
            cuts in proptest::collection::vec((any::<u64>(), any::<u64>()), 1..40), end in 0u64..1_000
        ) {
            let mut state = PartitionState { next_offset: end, ..Default::default() };
            for (at, (index, offset)) in (1u64..).zip(cuts) {
                let before = state.cut;
                let control = Control { cut: Some(Cut { index, offset }), ..Default::default() };
                let context = Context { kind: Kind::Control, base_offset: end, count: 0, append_time_ms: 0 }.encode();
                state.apply(&Entry { index: at, context, data: control.to_bytes(), ..Default::default() });
                prop_assert!(state.cut.index >= before.index && state.cut.offset >= before.offset);
                prop_assert!(state.cut.index <= at && state.cut.offset <= end);
                prop_assert_eq!(&PartitionState::decode(&state.encode(), end).unwrap(), &state);
            }
        }
    }
}
