//! The store in memory, which keeps what was only written apart from what was synced: [`MemStore::crash`] forgets the former.
//! For tests and the simulation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use weir_core::entry::{Context, Kind};
use weir_core::eraftpb::Entry;
use weir_core::ids::{BrokerId, GroupId, ReplicaId};
use weir_core::incarnation::Incarnation;
use weir_core::storage::{Checkpoint, HardState, Store, StoreError, StoredGroup, WriteOp};

#[derive(Clone, Debug, Default)]
struct Held {
    replica: ReplicaId,
    quarantined: bool,
    destroyed: bool,
    hard: HardState,
    checkpoints: BTreeMap<u64, Checkpoint>,
    entries: BTreeMap<u64, Entry>,
}

impl Held {
    fn batches(&self) -> impl Iterator<Item = (u64, Context)> + '_ {
        let context = |(index, entry): (&u64, &Entry)| Some((*index, Context::of(entry)?));
        self.entries.iter().filter_map(context).filter(|(_, c)| c.kind == Kind::Batch)
    }
}

type Groups = BTreeMap<GroupId, Held>;

#[derive(Default)]
struct Inner {
    written: Groups,
    synced: Groups,
    /// rounds, in order
    unsynced: Vec<Vec<WriteOp>>,
    /// entries that cannot be read any more
    damaged: BTreeSet<(GroupId, u64)>,
    /// of brokers, written and synced
    incarnations: (Incarnations, Incarnations),
    /// why no entry can be read now
    failing: Option<StoreError>,
}

type Incarnations = BTreeMap<BrokerId, Incarnation>;

/// See the module.
#[derive(Default)]
pub struct MemStore(Mutex<Inner>);

impl MemStore {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Power is lost: what was not synced is gone, except the first `kept` rounds of it.
    pub fn crash(&self, kept: usize) {
        let mut inner = self.inner();
        let unsynced = std::mem::take(&mut inner.unsynced);
        for op in unsynced.iter().take(kept).flatten() {
            apply(&mut inner.synced, op);
            remember(&mut inner.incarnations.1, op);
        }
        inner.written = inner.synced.clone();
        inner.incarnations.0 = inner.incarnations.1.clone();
    }

    /// A copy of what is synced, as of a volume.
    pub fn copy(&self) -> Self {
        let inner = self.inner();
        let synced = inner.synced.clone();
        let known = inner.incarnations.1.clone();
        Self(Mutex::new(Inner {
            written: synced.clone(),
            synced,
            incarnations: (known.clone(), known),
            ..Default::default()
        }))
    }

    /// Entries that cannot be read any more.
    pub fn damaged(&self) -> Vec<(GroupId, u64)> {
        self.inner().damaged.iter().copied().collect()
    }

    /// Every read of entries fails with this error, until it is called with none.
    pub fn fail_reads(&self, error: Option<StoreError>) {
        self.inner().failing = error;
    }

    /// Damaged entries are as they were written again, as where a file was put back.
    pub fn repair(&self) {
        self.inner().damaged.clear();
    }

    /// An entry cannot be read any more, until its group's data is removed or replaced.
    pub fn damage(&self, group: GroupId, index: u64) {
        self.inner().damaged.insert((group, index));
    }
}

fn remember(known: &mut Incarnations, op: &WriteOp) {
    if let WriteOp::Incarnation { broker, incarnation } = op {
        known.insert(*broker, *incarnation);
    }
}

fn apply(groups: &mut Groups, op: &WriteOp) {
    match op {
        WriteOp::Create { group, replica, checkpoint } => {
            let checkpoints = checkpoint.iter().map(|c| (c.index, c.clone())).collect();
            groups.insert(*group, Held { replica: *replica, checkpoints, ..Default::default() });
        }
        WriteOp::Destroy { group, replica } => {
            groups.insert(*group, Held { replica: *replica, destroyed: true, ..Default::default() });
        }
        WriteOp::Incarnation { .. } => {}
        WriteOp::Append { group, .. }
        | WriteOp::SetHardState { group, .. }
        | WriteOp::PutCheckpoint { group, .. }
        | WriteOp::DropCheckpoint { group, .. }
        | WriteOp::Truncate { group, .. }
        | WriteOp::Install { group, .. }
        | WriteOp::Quarantine { group, .. } => {
            if let Some(held) = groups.get_mut(group) {
                apply_to(held, op);
            }
        }
    }
}

fn apply_to(held: &mut Held, op: &WriteOp) {
    match op {
        WriteOp::Append { entries, replace_from, .. } => {
            if let Some((index, _)) = replace_from {
                held.entries.split_off(index);
            }
            held.entries.extend(entries.iter().map(|e| (e.index, e.clone())));
        }
        WriteOp::SetHardState { hard, .. } => held.hard = *hard,
        WriteOp::PutCheckpoint { checkpoint, .. } => {
            held.checkpoints.insert(checkpoint.index, checkpoint.clone());
        }
        WriteOp::DropCheckpoint { index, .. } => {
            held.checkpoints.remove(index);
        }
        WriteOp::Truncate { index, .. } => {
            held.entries = held.entries.split_off(&(index + 1));
            held.checkpoints = held.checkpoints.split_off(index);
        }
        WriteOp::Install { checkpoint, .. } => {
            held.entries.clear();
            held.checkpoints = BTreeMap::from([(checkpoint.index, checkpoint.clone())]);
        }
        WriteOp::Quarantine { .. } => held.quarantined = true,
        WriteOp::Create { .. } | WriteOp::Destroy { .. } | WriteOp::Incarnation { .. } => {}
    }
}

impl Store for MemStore {
    fn load(&self) -> Result<Vec<StoredGroup>, StoreError> {
        let stored = |(group, held): (&GroupId, &Held)| StoredGroup {
            group: *group,
            replica: held.replica,
            quarantined: held.quarantined,
            destroyed: held.destroyed,
            hard: held.hard,
            checkpoints: held.checkpoints.values().cloned().collect(),
            last_index: held.entries.keys().chain(held.checkpoints.keys()).max().copied().unwrap_or(0),
        };
        Ok(self.inner().written.iter().map(stored).collect())
    }

    fn incarnations(&self) -> Result<Vec<(BrokerId, Incarnation)>, StoreError> {
        Ok(self.inner().incarnations.0.iter().map(|(b, i)| (*b, *i)).collect())
    }

    fn entries(&self, group: GroupId, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, StoreError> {
        let inner = self.inner();
        if let Some(error) = &inner.failing {
            return Err(error.clone());
        }
        let mut out: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        let held = inner.written.get(&group);
        for (index, entry) in held.into_iter().flat_map(|h| h.entries.range(low..high)) {
            if *index != low + out.len() as u64 {
                break;
            }
            bytes += weir_core::entry::entry_bytes(entry);
            if !out.is_empty() && bytes > bytes_max {
                break;
            }
            if inner.damaged.contains(&(group, *index)) {
                let what = "a bit has flipped".to_owned();
                return Err(StoreError::Damaged { group, index: *index, what });
            }
            out.push(entry.clone());
        }
        if out.is_empty() {
            let what = "missing".to_owned();
            return Err(StoreError::Damaged { group, index: low, what });
        }
        Ok(out)
    }

    fn locate_offset(&self, group: GroupId, offset: u64) -> Result<Option<u64>, StoreError> {
        let inner = self.inner();
        let held = inner.written.get(&group);
        let found = held.and_then(|h| h.batches().find(|(_, c)| c.end_offset() > offset));
        Ok(found.map(|(index, _)| index))
    }

    fn locate_time(&self, group: GroupId, time_ms: u64) -> Result<Option<u64>, StoreError> {
        let inner = self.inner();
        let held = inner.written.get(&group);
        let found = held.and_then(|h| h.batches().find(|(_, c)| c.append_time_ms >= time_ms));
        Ok(found.map(|(index, _)| index))
    }

    fn checkpoint(&self, group: GroupId, index: u64) -> Result<Option<Checkpoint>, StoreError> {
        Ok(self.inner().written.get(&group).and_then(|h| h.checkpoints.get(&index)).cloned())
    }

    fn write(&self, ops: &[WriteOp]) -> Result<(), StoreError> {
        let mut inner = self.inner();
        for op in ops {
            apply(&mut inner.written, op);
            remember(&mut inner.incarnations.0, op);
            if let WriteOp::Create { group, .. } | WriteOp::Destroy { group, .. } | WriteOp::Install { group, .. } = op
            {
                inner.damaged.retain(|(g, _)| g != group);
            }
        }
        inner.unsynced.push(ops.to_vec());
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let mut inner = self.inner();
        let unsynced = std::mem::take(&mut inner.unsynced);
        for op in unsynced.iter().flatten() {
            apply(&mut inner.synced, op);
            remember(&mut inner.incarnations.1, op);
        }
        Ok(())
    }
}
