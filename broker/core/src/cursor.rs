//! A subscription's replicated position in one partition: everything below the cursor is acked,
//! and above it the acked ranges. Changed only by control entries of the partition's own log.

use std::collections::BTreeMap;

/// A half-open range of offsets, `start..end`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct OffsetRange {
    /// First offset.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// One past the last.
    #[prost(uint64, tag = "2")]
    pub end: u64,
}

/// How often a message was delivered and not acked.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Failed {
    /// Its offset.
    #[prost(uint64, tag = "1")]
    pub offset: u64,
    /// Deliveries so far.
    #[prost(uint32, tag = "2")]
    pub deliveries: u32,
}

/// What a scheduler is about to publish elsewhere: written before, so that the same is published again after a failover, under the
/// same producer and sequence, and is known to be there where it was.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Plan {
    /// Producer it is published as.
    #[prost(uint64, tag = "1")]
    pub producer: u64,
    /// Sequence of the first.
    #[prost(int32, tag = "2")]
    pub sequence: i32,
    /// The messages, by their offsets here, in the order they are published.
    #[prost(uint64, repeated, tag = "3")]
    pub offsets: Vec<u64>,
}

/// A change of one subscription's cursor, as it stands in a control entry.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CursorUpdate {
    /// The subscription.
    #[prost(uint64, tag = "1")]
    pub subscription: u64,
    /// Set the cursor here and forget all acks (a seek, or the start position).
    #[prost(uint64, optional, tag = "2")]
    pub seek: Option<u64>,
    /// Offsets that were acked.
    #[prost(message, repeated, tag = "3")]
    pub acked: Vec<OffsetRange>,
    /// Forget the subscription.
    #[prost(bool, tag = "4")]
    pub delete: bool,
    /// Messages that were delivered and came back.
    #[prost(message, repeated, tag = "5")]
    pub failed: Vec<Failed>,
    /// Replaces the plan.
    #[prost(message, optional, tag = "6")]
    pub plan: Option<Plan>,
}

/// The state of one subscription in one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Everything below is acked.
    position: u64,
    /// acked ranges above the position, start → end, disjoint and not adjacent
    acked: BTreeMap<u64, u64>,
    /// deliveries of unacked messages that came back
    failed: BTreeMap<u64, u32>,
    plan: Option<Plan>,
    /// how often it was set to a place
    seeks: u64,
}

/// A [`Cursor`] as it stands in a checkpoint.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CursorRecord {
    /// The subscription.
    #[prost(uint64, tag = "1")]
    pub subscription: u64,
    /// Its position.
    #[prost(uint64, tag = "2")]
    pub position: u64,
    /// Acked ranges above it.
    #[prost(message, repeated, tag = "3")]
    pub acked: Vec<OffsetRange>,
    /// Deliveries of unacked messages that came back.
    #[prost(message, repeated, tag = "4")]
    pub failed: Vec<Failed>,
    /// The newest plan.
    #[prost(message, optional, tag = "5")]
    pub plan: Option<Plan>,
    /// How often it was set to a place.
    #[prost(uint64, tag = "6")]
    pub seeks: u64,
}

impl Cursor {
    /// A cursor at `position` with nothing acked above it.
    pub fn at(position: u64) -> Self {
        Self { position, ..Self::default() }
    }

    /// Everything below this is acked.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Marks `start..end` acked; ranges merge, and the position moves over what is whole.
    pub fn ack(&mut self, range: OffsetRange) {
        let (mut start, mut end) = (range.start.max(self.position), range.end);
        if start >= end {
            return;
        }
        if !self.failed.is_empty() {
            let done: Vec<u64> = self.failed.range(start..end).map(|(offset, _)| *offset).collect();
            done.iter().for_each(|offset| {
                self.failed.remove(offset);
            });
        }
        // ranges are disjoint: from the last one back, until one ends before this begins
        let before = self.acked.range(..=end).rev();
        let overlapping: Vec<u64> = before.take_while(|(_, e)| **e >= start).map(|(s, _)| *s).collect();
        for s in overlapping {
            let e = self.acked.remove(&s).expect("just found");
            start = start.min(s);
            end = end.max(e);
        }
        if start <= self.position {
            self.position = end;
        } else {
            self.acked.insert(start, end);
        }
    }

    /// Whether `offset` was acked.
    pub fn is_acked(&self, offset: u64) -> bool {
        offset < self.position || self.acked.range(..=offset).next_back().is_some_and(|(_, end)| *end > offset)
    }

    /// Notes that an unacked message was delivered so often and came back.
    pub fn fail(&mut self, failed: Failed) {
        if !self.is_acked(failed.offset) {
            self.failed.insert(failed.offset, failed.deliveries);
        }
    }

    /// How often an unacked message was delivered and came back.
    pub fn deliveries(&self, offset: u64) -> u32 {
        self.failed.get(&offset).copied().unwrap_or(0)
    }

    /// How often it was set to a place: by a seek, or as its start.
    pub fn seeks(&self) -> u64 {
        self.seeks
    }

    /// What was last about to be published elsewhere; done where all of it is acked.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// Acked ranges above the position.
    pub fn acked_ranges(&self) -> impl Iterator<Item = OffsetRange> + '_ {
        self.acked.iter().map(|(start, end)| OffsetRange { start: *start, end: *end })
    }

    /// Messages acked above the position.
    pub fn acked_above(&self) -> u64 {
        self.acked.iter().map(|(s, e)| e - s).sum()
    }
}

/// All cursors of one partition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cursors(BTreeMap<u64, Cursor>);

impl Cursors {
    /// Applies one change.
    pub fn apply(&mut self, update: &CursorUpdate) {
        if update.delete {
            self.0.remove(&update.subscription);
            return;
        }
        if let Some(position) = update.seek {
            let seeks = self.0.get(&update.subscription).map_or(0, |c| c.seeks) + 1;
            self.0.insert(update.subscription, Cursor { seeks, ..Cursor::at(position) });
        }
        if let Some(cursor) = self.0.get_mut(&update.subscription) {
            update.acked.iter().for_each(|range| cursor.ack(*range));
            update.failed.iter().for_each(|failed| cursor.fail(*failed));
            if update.plan.is_some() {
                cursor.plan.clone_from(&update.plan);
            }
        }
    }

    /// One subscription's cursor.
    pub fn get(&self, subscription: u64) -> Option<&Cursor> {
        self.0.get(&subscription)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Cursor)> {
        self.0.iter().map(|(id, cursor)| (*id, cursor))
    }

    /// For a checkpoint.
    pub fn to_records(&self) -> Vec<CursorRecord> {
        self.iter()
            .map(|(subscription, c)| CursorRecord {
                subscription,
                position: c.position,
                acked: c.acked_ranges().collect(),
                failed: c
                    .failed
                    .iter()
                    .map(|(offset, deliveries)| Failed { offset: *offset, deliveries: *deliveries })
                    .collect(),
                plan: c.plan.clone(),
                seeks: c.seeks,
            })
            .collect()
    }

    /// Out of a checkpoint.
    pub fn from_records(records: &[CursorRecord]) -> Self {
        let cursor = |r: &CursorRecord| {
            let mut cursor = Cursor::at(r.position);
            r.acked.iter().for_each(|range| cursor.ack(*range));
            r.failed.iter().for_each(|failed| cursor.fail(*failed));
            cursor.plan.clone_from(&r.plan);
            cursor.seeks = r.seeks;
            (r.subscription, cursor)
        };
        Self(records.iter().map(cursor).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn acks_in_any_order_equal_a_set_of_offsets(acks in proptest::collection::vec((0u64..200, 1u64..20), 0..60)) {
            let mut cursor = Cursor::at(10);
            let mut model: std::collections::BTreeSet<u64> = (0..10).collect();
            for (start, len) in acks {
                let failed = (start..start + len + 3).find(|o| !model.contains(o));
                failed.iter().for_each(|o| cursor.fail(Failed { offset: *o, deliveries: 2 }));
                cursor.ack(OffsetRange { start, end: start + len });
                prop_assert_eq!(failed.map(|o| cursor.deliveries(o)), failed.map(|o| if o < start + len { 0 } else { 2 }));
                model.extend(start..start + len);
                let first_gap = (0..).find(|o| !model.contains(o)).unwrap();
                prop_assert_eq!(cursor.position(), first_gap);
                for offset in 0..250 {
                    prop_assert_eq!(cursor.is_acked(offset), model.contains(&offset));
                }
                prop_assert_eq!(cursor.acked_above(), model.iter().filter(|o| **o > first_gap).count() as u64);
            }
            let mut cursors = Cursors::default();
            cursors.0.insert(4, cursor);
            prop_assert_eq!(Cursors::from_records(&cursors.to_records()), cursors);
        }
    }
}
