//! The recent entries of one group in memory, shared between the core that appends and the readers that serve consumers.
//! Readers never see past the high watermark. Payloads are shared `Bytes`.

use crate::entry::{Context, Kind, entry_bytes};
use crate::ids::GroupId;
use crate::storage::{Store, StoreError};
use bytes::Bytes;
use raft::eraftpb::Entry;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A record batch out of the log, with what the leader added to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBatch {
    /// Offset of its first record.
    pub base_offset: u64,
    /// Number of records.
    pub count: u32,
    /// Raft term in which it was appended: Kafka's leader epoch.
    pub term: u64,
    /// When the leader appended it, ms since the epoch.
    pub append_time_ms: u64,
    /// The batch as it was published.
    pub data: Bytes,
}

impl LogBatch {
    /// The batch in an entry, if it has one.
    pub fn of(entry: &Entry) -> Option<Self> {
        let context = Context::of(entry).filter(|c| c.kind == Kind::Batch)?;
        Some(Self {
            base_offset: context.base_offset,
            count: context.count,
            term: entry.term,
            append_time_ms: context.append_time_ms,
            data: entry.data.clone(),
        })
    }

    /// One past its last offset.
    pub fn end_offset(&self) -> u64 {
        self.base_offset + u64::from(self.count)
    }
}

#[derive(Clone)]
struct Held {
    entry: Entry,
    /// next offset before this entry
    base_offset: u64,
    /// next offset after it
    end_offset: u64,
}

#[derive(Default)]
struct Inner {
    /// index of the front entry, or of the next one where empty
    first: u64,
    /// term of the entry before it, where one was evicted: Raft asks for it with each append, whatever else went
    term_before: Option<u64>,
    held: VecDeque<Held>,
    end_offset: u64,
    bytes: u64,
}

/// The shared tail of one group.
#[derive(Default)]
pub struct Tail {
    inner: RwLock<Inner>,
    high_watermark: AtomicU64,
    start_offset: AtomicU64,
}

impl Tail {
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties it; the next entry has index `next` and begins at offset `end_offset`.
    pub fn reset(&self, next: u64, end_offset: u64) {
        *self.write() = Inner { first: next, end_offset, ..Default::default() };
    }

    /// One past the last committed record: what readers may see.
    pub fn high_watermark(&self) -> u64 {
        self.high_watermark.load(Ordering::Acquire)
    }

    /// Moves the high watermark.
    pub fn set_high_watermark(&self, offset: u64) {
        self.high_watermark.store(offset, Ordering::Release);
    }

    /// Offset of the first record retention has left.
    pub fn start_offset(&self) -> u64 {
        self.start_offset.load(Ordering::Acquire)
    }

    /// Moves the start of the log forward, if it is not there yet.
    pub fn raise_start_offset(&self, offset: u64) {
        self.start_offset.fetch_max(offset, Ordering::AcqRel);
    }

    /// Sets the start of the log.
    pub fn set_start_offset(&self, offset: u64) {
        self.start_offset.store(offset, Ordering::Release);
    }

    /// One past the last record in the log, committed or not.
    pub fn end_offset(&self) -> u64 {
        self.read().end_offset
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.read().bytes
    }

    /// Appends entries; where they overlap what is held, what is held from there on goes.
    /// Returns (index, offset) from which old entries were replaced.
    pub fn append(&self, entries: &[Entry]) -> Option<(u64, u64)> {
        let mut inner = self.write();
        let first_new = entries.first()?.index;
        let mut replaced = None;
        while inner.first + inner.held.len() as u64 > first_new {
            let old = inner.held.pop_back().expect("uncommitted entries are never evicted");
            inner.bytes -= entry_bytes(&old.entry);
            inner.end_offset = old.base_offset;
            replaced = Some((first_new, old.base_offset));
        }
        assert_eq!(inner.first + inner.held.len() as u64, first_new, "a gap in the log");
        for entry in entries {
            let base_offset = inner.end_offset;
            if let Some(context) = Context::of(entry) {
                assert_eq!(context.base_offset, base_offset, "offsets run on without gaps");
                inner.end_offset = context.end_offset();
            }
            inner.bytes += entry_bytes(entry);
            let end_offset = inner.end_offset;
            inner.held.push_back(Held { entry: entry.clone(), base_offset, end_offset });
        }
        replaced
    }

    /// Drops entries from the front up to and including index `upto`, until at most `bytes_max` are left.
    pub fn evict(&self, upto: u64, bytes_max: u64) {
        let mut inner = self.write();
        while inner.bytes > bytes_max && inner.first <= upto {
            let Some(old) = inner.held.pop_front() else { return };
            inner.bytes -= entry_bytes(&old.entry);
            inner.first += 1;
            inner.term_before = Some(old.entry.term);
        }
    }

    /// Index of the first entry held (or of the next one).
    pub fn first_index(&self) -> u64 {
        self.read().first
    }

    /// Entries `low..high` up to `bytes_max`, at least one; `None` where `low` is not held.
    pub fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Option<Vec<Entry>> {
        let inner = self.read();
        let from = usize::try_from(low.checked_sub(inner.first)?).ok()?;
        let mut bytes = 0;
        let mut out = Vec::new();
        for held in inner.held.iter().skip(from).take((high - low) as usize) {
            bytes += entry_bytes(&held.entry);
            if !out.is_empty() && bytes > bytes_max {
                break;
            }
            out.push(held.entry.clone());
        }
        (!out.is_empty()).then_some(out)
    }

    /// Term of the entry at `index`, where that is held or the last one evicted.
    pub fn term(&self, index: u64) -> Option<u64> {
        let inner = self.read();
        if index + 1 == inner.first {
            return inner.term_before;
        }
        let at = usize::try_from(index.checked_sub(inner.first)?).ok()?;
        inner.held.get(at).map(|h| h.entry.term)
    }

    /// Index of the uncommitted or recent entry that holds `offset`, where held.
    pub fn index_of(&self, offset: u64) -> Option<u64> {
        let inner = self.read();
        let at = inner.held.partition_point(|h| h.end_offset <= offset);
        inner.held.get(at).filter(|h| h.base_offset <= offset).map(|h| h.entry.index)
    }

    /// Offset of the first record of a group, in memory or in its store, that was appended at or after `time_ms`, committed or not.
    pub fn offset_at(&self, store: &dyn Store, group: GroupId, time_ms: u64) -> Result<Option<u64>, StoreError> {
        // memory first: what is not there any more by the second look is in the store by then
        let recent = self.recent_at(time_ms);
        let stored = store.offset_at(group, time_ms)?;
        Ok(recent.into_iter().chain(stored).min())
    }

    fn recent_at(&self, time_ms: u64) -> Option<u64> {
        let inner = self.read();
        let batches = inner.held.iter().filter_map(|h| LogBatch::of(&h.entry));
        batches.filter(|b| b.append_time_ms >= time_ms).map(|b| b.base_offset).next()
    }

    /// Committed batches from the one that holds `offset` on, up to `bytes_max` but at least one;
    /// `None` where `offset` lies before what is held.
    pub fn batches(&self, offset: u64, bytes_max: usize) -> Option<Vec<LogBatch>> {
        let limit = self.high_watermark();
        let inner = self.read();
        if inner.held.front().map_or(inner.end_offset, |h| h.base_offset) > offset {
            return None;
        }
        let at = inner.held.partition_point(|h| h.end_offset <= offset);
        let mut out: Vec<LogBatch> = Vec::new();
        let mut bytes = 0;
        for held in inner.held.range(at..) {
            if held.end_offset > limit {
                break;
            }
            if let Some(batch) = LogBatch::of(&held.entry) {
                bytes += batch.data.len();
                if !out.is_empty() && bytes > bytes_max {
                    break;
                }
                out.push(batch);
            }
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, base_offset: u64, count: u32) -> Entry {
        let context = Context { kind: Kind::Batch, base_offset, count, append_time_ms: 5 }.encode();
        Entry { index, term: 1, context, data: Bytes::from(vec![0; 10]), ..Default::default() }
    }

    #[test]
    fn readers_see_committed_batches_only_and_conflicts_replace_the_end() {
        let tail = Tail::default();
        tail.reset(2, 0);
        assert_eq!(tail.append(&[entry(2, 0, 3), entry(3, 3, 2), entry(4, 5, 1)]), None);
        assert_eq!(tail.batches(0, 1000), Some(vec![]));
        tail.set_high_watermark(5);
        assert_eq!(tail.batches(1, 1000).unwrap().len(), 2);
        assert_eq!(tail.batches(4, 1000).unwrap()[0].base_offset, 3);
        assert_eq!(tail.append(&[entry(4, 5, 7)]), Some((4, 5)));
        assert_eq!(tail.end_offset(), 12);
        assert_eq!(tail.index_of(11), Some(4));
        assert_eq!((tail.recent_at(5), tail.recent_at(6)), (Some(0), None));
        tail.evict(2, 0);
        assert_eq!(tail.recent_at(0), Some(3));
        assert_eq!((tail.term(1), tail.term(2), tail.term(3)), (None, Some(1), Some(1)));
        assert_eq!(tail.batches(1, 1000), None);
        assert_eq!(tail.first_index(), 3);
    }
}
