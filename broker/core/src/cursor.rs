//! A subscription's replicated position in one partition: everything below the cursor is acked,
//! and above it a bitmap of what was acked. Changed only by control entries of the partition's own log.

use bytes::Bytes;
use roaring::RoaringTreemap;
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

impl OffsetRange {
    /// Of one message.
    pub fn one(offset: u64) -> Self {
        Self { start: offset, end: offset + 1 }
    }
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
    /// They are not published: they are written again at the end of their own log.
    #[prost(bool, tag = "4")]
    pub renews: bool,
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
    /// Begins as a copy of this subscription's cursor, where there is one; one that has begun stays as it is. 0 for none.
    #[prost(uint64, tag = "7")]
    pub snapshot_of: u64,
    /// Set the cursor to a copy of this subscription's, where there is one. 0 for none.
    #[prost(uint64, tag = "8")]
    pub return_to: u64,
}

/// The state of one subscription in one partition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cursor {
    /// Everything below is acked.
    position: u64,
    /// acked above the position, which is not among them
    acked: RoaringTreemap,
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
    /// Acked ranges above it, as they were written before there was a bitmap.
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
    /// Offsets acked above the position, as <https://github.com/RoaringBitmap/RoaringFormatSpec> has it for 64 bits.
    #[prost(bytes = "bytes", tag = "7")]
    pub bitmap: Bytes,
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

    /// Marks `start..end` acked, and the position moves over what is whole.
    pub fn ack(&mut self, range: OffsetRange) {
        let (start, end) = (range.start.max(self.position), range.end);
        if start >= end {
            return;
        }
        if !self.failed.is_empty() {
            let done: Vec<u64> = self.failed.range(start..end).map(|(offset, _)| *offset).collect();
            done.iter().for_each(|offset| {
                self.failed.remove(offset);
            });
        }
        if start > self.position {
            self.acked.insert_range(start..end);
            return;
        }
        // each offset is walked over once, and then forgotten
        self.acked.remove_range(..end);
        self.position = end;
        let run = self.acked.iter().zip(end..).take_while(|(acked, next)| acked == next).count() as u64;
        if run > 0 {
            self.position += run;
            self.acked.remove_range(..self.position);
        }
    }

    /// Whether `offset` was acked.
    pub fn is_acked(&self, offset: u64) -> bool {
        offset < self.position || self.acked.contains(offset)
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

    /// Messages acked above the position.
    pub fn acked_above(&self) -> u64 {
        self.acked.len()
    }

    /// The position in a log that begins at `start`, and how many messages are acked from there on: retention may have removed what was
    /// never acked, and nobody waits for that any more.
    pub fn within(&self, start: u64) -> (u64, u64) {
        match start.checked_sub(1) {
            Some(last_removed) if start > self.position => (start, self.acked.len() - self.acked.rank(last_removed)),
            _ => (self.position, self.acked.len()),
        }
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
        let seeks = self.0.get(&update.subscription).map(|c| c.seeks);
        let copied = if seeks.is_none() && update.snapshot_of != 0 { update.snapshot_of } else { update.return_to };
        let moved = update.seek.map(Cursor::at).or_else(|| self.0.get(&copied).cloned()); // no subscription has the id 0
        if let Some(moved) = moved {
            let seeks = seeks.unwrap_or(0) + 1;
            self.0.insert(update.subscription, Cursor { seeks, plan: None, ..moved });
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
                acked: Vec::new(),
                bitmap: bitmap(&c.acked),
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
            // the checkpoint's checksum was right: what cannot be read was never written
            cursor.acked |= RoaringTreemap::deserialize_from(&r.bitmap[..]).unwrap_or_default();
            r.failed.iter().for_each(|failed| cursor.fail(*failed));
            cursor.plan.clone_from(&r.plan);
            cursor.seeks = r.seeks;
            (r.subscription, cursor)
        };
        Self(records.iter().map(cursor).collect())
    }
}

fn bitmap(acked: &RoaringTreemap) -> Bytes {
    if acked.is_empty() {
        return Bytes::new();
    }
    let mut out = Vec::with_capacity(acked.serialized_size());
    acked.serialize_into(&mut out).expect("memory takes it");
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_second_of_a_million_acked_takes_an_eighth_of_a_byte_each() {
        let mut cursors = Cursors::default();
        let mut cursor = Cursor::at(7);
        (0..500_000).map(|at| 8 + 2 * at).for_each(|o| cursor.ack(OffsetRange::one(o)));
        assert_eq!((cursor.position(), cursor.acked_above()), (7, 500_000));
        cursors.0.insert(1, cursor);
        let records = cursors.to_records();
        let bytes = prost::Message::encoded_len(&records[0]);
        assert!(bytes < 140_000, "{bytes} bytes");
        assert_eq!(Cursors::from_records(&records), cursors);
    }

    #[test]
    fn who_is_moved_has_no_plan_any_more() {
        let mut cursors = Cursors::default();
        let plan = Some(Plan::default());
        cursors.apply(&CursorUpdate { subscription: 1, seek: Some(10), plan, ..Default::default() });
        assert!(cursors.get(1).unwrap().plan().is_some());
        cursors.apply(&CursorUpdate { subscription: 1, seek: Some(10), ..Default::default() });
        assert!(cursors.get(1).unwrap().plan().is_none());
    }

    #[test]
    fn checkpoints_of_before_bitmaps_are_read() {
        let acked = vec![OffsetRange { start: 5, end: 7 }, OffsetRange { start: 9, end: 10 }];
        let old = CursorRecord { subscription: 1, position: 3, acked, ..Default::default() };
        let cursors = Cursors::from_records(&[old]);
        let cursor = cursors.get(1).unwrap();
        assert_eq!((cursor.position(), cursor.acked_above()), (3, 3));
        assert!(cursor.is_acked(6) && cursor.is_acked(9) && !cursor.is_acked(7));
    }

    #[test]
    fn what_retention_has_removed_is_neither_before_nor_above_a_position() {
        let mut cursor = Cursor::at(3);
        cursor.ack(OffsetRange { start: 5, end: 7 });
        cursor.ack(OffsetRange { start: 9, end: 10 });
        let backlog = |start| {
            let (position, acked) = cursor.within(start);
            assert!(position >= start.max(3));
            12 - position - acked
        };
        // of 3 to 11, those that are left and not acked
        let wanted = |start| (start..12).filter(|o| !cursor.is_acked(*o)).count() as u64;
        for start in 0..=12 {
            assert_eq!(backlog(start), wanted(start), "a log from {start} on");
        }
        assert_eq!((cursor.within(0), cursor.within(3), cursor.within(6)), ((3, 3), (3, 3), (6, 2)));
    }

    #[test]
    fn a_snapshot_is_taken_once_and_returned_to_as_often_as_wanted() {
        let mut cursors = Cursors::default();
        let ack = |start, end| CursorUpdate {
            subscription: 1,
            acked: vec![OffsetRange { start, end }],
            ..Default::default()
        };
        cursors.apply(&CursorUpdate { subscription: 1, seek: Some(10), ..Default::default() });
        cursors.apply(&ack(12, 14));
        let take = CursorUpdate { subscription: 2, snapshot_of: 1, ..Default::default() };
        cursors.apply(&take);
        cursors.apply(&ack(10, 20));
        cursors.apply(&take);
        assert_eq!(cursors.get(2).unwrap().position(), 10, "taken once");
        for round in 2..4 {
            cursors.apply(&CursorUpdate { subscription: 1, return_to: 2, ..Default::default() });
            let back = cursors.get(1).unwrap();
            assert_eq!((back.position(), back.acked_above(), back.seeks()), (10, 2, round));
            cursors.apply(&ack(10, 20));
        }
        let nowhere = CursorUpdate { subscription: 1, return_to: 9, ..Default::default() };
        cursors.apply(&nowhere);
        assert_eq!(cursors.get(1).unwrap().position(), 20);
    }

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
