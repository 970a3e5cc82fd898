//! The store over RocksDB beside the one over memory: the same rounds leave the same, whenever it is closed, opened or
//! compacted in between. And what is damaged on disk is either still read as it was, or said to be damaged.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use weir_core::entry::{Context, Kind};
use weir_core::eraftpb::Entry;
use weir_core::ids::{GroupId, ReplicaId};
use weir_core::storage::{Checkpoint, HardState, Store, StoreError, WriteOp};
use weir_store::mem::MemStore;
use weir_store::rocks::RocksStore;

/// Groups in play.
const GROUPS: u64 = 3;

#[derive(Clone, Debug)]
enum Step {
    Create {
        with_checkpoint: bool,
    },
    /// (records, or none for an entry without payload; bytes), after the last `replaced` entries were replaced
    Append {
        entries: Vec<(u32, usize)>,
        replaced: u64,
    },
    Hard {
        term: u64,
        vote: u64,
        commit: u64,
    },
    Checkpoint,
    Thin {
        which: usize,
    },
    Truncate {
        which: usize,
    },
    Install {
        ahead: u64,
    },
    Quarantine,
    Destroy,
}

#[derive(Clone, Debug)]
enum Act {
    /// steps, each for a group; one atomic write
    Round(Vec<(u64, Step)>),
    Sync,
    Reopen,
    Compact,
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![6 => 0usize..300, 1 => 1_000usize..6_000];
    let entries = prop::collection::vec((prop_oneof![1 => Just(0u32), 6 => 1u32..20], size), 1..6);
    prop_oneof![
        3 => any::<bool>().prop_map(|with_checkpoint| Step::Create { with_checkpoint }),
        12 => (entries, prop_oneof![3 => Just(0u64), 1 => 1u64..8])
            .prop_map(|(entries, replaced)| Step::Append { entries, replaced }),
        2 => (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(term, vote, commit)| Step::Hard { term, vote, commit }),
        4 => Just(Step::Checkpoint),
        1 => any::<usize>().prop_map(|which| Step::Thin { which }),
        2 => any::<usize>().prop_map(|which| Step::Truncate { which }),
        1 => (0u64..50).prop_map(|ahead| Step::Install { ahead }),
        1 => Just(Step::Quarantine),
        1 => Just(Step::Destroy),
    ]
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let round = prop::collection::vec((0..GROUPS, step()), 1..6).prop_map(Act::Round);
    prop::collection::vec(
        prop_oneof![12 => round, 3 => Just(Act::Sync), 2 => Just(Act::Reopen), 1 => Just(Act::Compact)],
        1..40,
    )
}

/// What the core knows of a group when it writes: only what it could ask for is asked for.
#[derive(Clone, Default)]
struct Known {
    replica: u64,
    alive: bool,
    /// after each index: next offset and append time
    after: BTreeMap<u64, (u64, u64)>,
    checkpoints: BTreeSet<u64>,
}

impl Known {
    fn last(&self) -> u64 {
        self.after.last_key_value().map_or(0, |(index, _)| *index)
    }

    fn op(&mut self, group: u64, step: &Step) -> Option<WriteOp> {
        let id = GroupId(group);
        if let Step::Create { with_checkpoint } = step {
            let replica = self.replica + 1;
            *self = Self { replica, alive: true, ..Default::default() };
            let checkpoint = with_checkpoint.then(|| self.checkpoint_at(3, (7, 1_000)));
            return Some(WriteOp::Create { group: id, replica: ReplicaId(replica), checkpoint });
        }
        if !self.alive {
            return None;
        }
        if let Step::Install { ahead } = step {
            let index = self.last() + ahead + 1;
            let (offset, time) = self.after.values().next_back().copied().unwrap_or((0, 0));
            *self = Self { replica: self.replica, alive: true, ..Default::default() };
            let checkpoint = self.checkpoint_at(index, (offset + ahead, time));
            return Some(WriteOp::Install { group: id, checkpoint });
        }
        match step {
            Step::Hard { term, vote, commit } => {
                let hard = HardState { term: *term, vote: *vote, commit: *commit };
                Some(WriteOp::SetHardState { group: id, hard })
            }
            Step::Quarantine => Some(WriteOp::Quarantine { group: id, replica: ReplicaId(self.replica) }),
            Step::Destroy => {
                self.alive = false;
                Some(WriteOp::Destroy { group: id, replica: ReplicaId(self.replica) })
            }
            _ if self.checkpoints.is_empty() => None, // it waits for its first
            Step::Append { entries, replaced } => Some(self.append(id, entries, *replaced)),
            Step::Checkpoint => {
                let (index, after) = (self.last(), self.after[&self.last()]);
                Some(WriteOp::PutCheckpoint { group: id, checkpoint: self.checkpoint_at(index, after) })
            }
            Step::Thin { which } => {
                let later: Vec<u64> = self.checkpoints.iter().skip(1).copied().collect();
                let index = *later.get(which % later.len().max(1))?;
                self.checkpoints.remove(&index);
                Some(WriteOp::DropCheckpoint { group: id, index })
            }
            Step::Truncate { which } => {
                let index = *self.checkpoints.iter().nth(which % self.checkpoints.len())?;
                self.checkpoints = self.checkpoints.split_off(&index);
                self.after = self.after.split_off(&index);
                Some(WriteOp::Truncate { group: id, index, offset: self.after[&index].0 })
            }
            Step::Create { .. } | Step::Install { .. } => None,
        }
    }

    fn append(&mut self, group: GroupId, entries: &[(u32, usize)], replaced: u64) -> WriteOp {
        // never what a checkpoint covers
        let kept = self.last().saturating_sub(replaced).max(*self.checkpoints.last().expect("looked at"));
        let replace_from = (kept < self.last()).then(|| (kept + 1, self.after[&kept].0));
        self.after.split_off(&(kept + 1));
        let made = entries.iter().map(|(count, bytes)| {
            let index = self.last() + 1;
            let (base_offset, time) = self.after[&(index - 1)];
            let append_time_ms = time + u64::from(count % 3);
            self.after.insert(index, (base_offset + u64::from(*count), append_time_ms));
            let context = Context { kind: Kind::Batch, base_offset, count: *count, append_time_ms };
            let data = vec![index as u8; *bytes].into();
            let context = if *count == 0 { bytes::Bytes::new() } else { context.encode() };
            Entry { index, term: index / 7, context, data, ..Default::default() }
        });
        WriteOp::Append { group, entries: made.collect(), replace_from }
    }

    fn checkpoint_at(&mut self, index: u64, after: (u64, u64)) -> Checkpoint {
        self.checkpoints.insert(index);
        self.after.insert(index, after);
        Checkpoint { index, term: 1, voters: vec![1, 2, 3], next_offset: after.0, ..Default::default() }
    }
}

/// Makes one round of several steps.
fn round(known: &mut BTreeMap<u64, Known>, steps: &[(u64, Step)]) -> Vec<WriteOp> {
    steps.iter().filter_map(|(group, step)| known.entry(*group).or_default().op(*group, step)).collect()
}

/// All there is to see of a group.
#[derive(Clone, Debug, PartialEq)]
struct Picture {
    group: GroupId,
    replica: ReplicaId,
    quarantined: bool,
    destroyed: bool,
    hard: HardState,
    last_index: u64,
    checkpoints: Vec<Checkpoint>,
    pages: Vec<Vec<Entry>>,
    found: Vec<Option<u64>>,
}

fn picture(store: &dyn Store) -> Result<Vec<Picture>, StoreError> {
    store.load()?.into_iter().map(|stored| picture_of(store, stored)).collect()
}

fn picture_of(store: &dyn Store, stored: weir_core::storage::StoredGroup) -> Result<Picture, StoreError> {
    let group = stored.group;
    let mut seen = Picture {
        group,
        replica: stored.replica,
        quarantined: stored.quarantined,
        destroyed: stored.destroyed,
        hard: stored.hard,
        last_index: stored.last_index,
        checkpoints: Vec::new(),
        pages: Vec::new(),
        found: Vec::new(),
    };
    for checkpoint in &stored.checkpoints {
        seen.checkpoints.extend(store.checkpoint(group, checkpoint.index)?);
    }
    let mut low = stored.checkpoints.first().map_or(1, |c| c.index + 1);
    while low <= stored.last_index {
        let page = store.entries(group, low, stored.last_index + 1, 3_000)?;
        low += page.len() as u64;
        seen.pages.push(page);
    }
    let contexts: Vec<Context> = seen.pages.iter().flatten().filter_map(Context::of).collect();
    let last = contexts.last().map_or((0, 0), |c| (c.end_offset(), c.append_time_ms));
    for offset in contexts.iter().map(|c| c.base_offset).chain([0, last.0, last.0 + 1]) {
        seen.found.push(store.locate_offset(group, offset)?);
    }
    for time in contexts.iter().map(|c| c.append_time_ms).chain([0, last.1 + 1]) {
        seen.found.push(store.locate_time(group, time)?);
        seen.found.push(store.offset_at(group, time)?);
    }
    Ok(seen)
}

#[test]
fn the_same_rounds_leave_the_same_in_rocksdb_and_in_memory() {
    let mut runner = TestRunner::new(Config { cases: 100, failure_persistence: None, ..Config::default() });
    let run = runner.run(&acts(), |acts| {
        let folder = tempfile::tempdir().unwrap();
        let mem = MemStore::default();
        let mut rocks = RocksStore::open(folder.path()).unwrap();
        let mut known = BTreeMap::new();
        for act in acts {
            match act {
                Act::Round(steps) => {
                    let ops = round(&mut known, &steps);
                    mem.write(&ops).unwrap();
                    rocks.write(&ops).unwrap();
                }
                Act::Sync => rocks.sync().unwrap(),
                Act::Compact => rocks.compact().unwrap(),
                Act::Reopen => {
                    drop(rocks);
                    rocks = RocksStore::open(folder.path()).unwrap();
                    prop_assert_eq!(picture(&rocks), picture(&mem));
                }
            }
        }
        prop_assert_eq!(picture(&rocks), picture(&mem));
        Ok(())
    });
    run.unwrap();
}

/// Found by the test above: what a round said of a replica that the same round made was lost.
#[test]
fn a_replica_made_and_quarantined_in_one_round_is_quarantined() {
    let folder = tempfile::tempdir().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    let (group, replica) = (GroupId(1), ReplicaId(2));
    store
        .write(&[WriteOp::Create { group, replica, checkpoint: None }, WriteOp::Quarantine { group, replica }])
        .unwrap();
    let held = store.load().unwrap();
    assert!(held[0].quarantined && held[0].replica == replica, "{held:?}");
}

/// A group of `count` entries after checkpoint 0, compacted into tables, then what `then` writes.
fn compacted(path: &Path, count: u64) -> (RocksStore, Known) {
    let store = RocksStore::open(path).unwrap();
    let mut known = Known::default();
    let mut ops: Vec<WriteOp> = known.op(1, &Step::Create { with_checkpoint: true }).into_iter().collect();
    ops.push(known.append(GroupId(1), &vec![(1, 100); count as usize], 0));
    store.write(&ops).unwrap();
    store.compact().unwrap();
    (store, known)
}

/// Whole files are removed at once: one whose last entry is kept is not among them.
#[test]
fn retention_up_to_the_entry_before_the_last_of_a_table_keeps_that_last_one() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut known) = compacted(folder.path(), 10);
    let last = known.last();
    let after = known.after[&(last - 1)];
    let checkpoint = known.checkpoint_at(last - 1, after);
    let group = GroupId(1);
    store.write(&[WriteOp::PutCheckpoint { group, checkpoint }]).unwrap();
    store.write(&[WriteOp::Truncate { group, index: last - 1, offset: after.0 }]).unwrap();
    assert_eq!(store.entries(group, last, last + 1, 0).map(|e| e.len()), Ok(1));
}

/// Found by the test above: a table that reached from a removed checkpoint to the first entry kept went with what was removed.
#[test]
fn a_table_that_ends_with_the_first_entry_kept_stays() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = RocksStore::open(folder.path()).unwrap();
    let mut known = BTreeMap::new();
    let group = GroupId(0);
    let install = [Step::Create { with_checkpoint: false }, Step::Install { ahead: 0 }];
    for step in install {
        store.write(&round(&mut known, &[(0, step)])).unwrap();
    }
    drop(store);
    store = RocksStore::open(folder.path()).unwrap();
    store.write(&round(&mut known, &[(0, Step::Append { entries: vec![(0, 0)], replaced: 0 })])).unwrap();
    store.compact().unwrap();
    store.write(&round(&mut known, &[(0, Step::Truncate { which: 0 })])).unwrap();
    assert_eq!(store.entries(group, 2, 3, 0).map(|e| e.len()), Ok(1));
}

/// The store after each of a number of rounds, and the folder it is in.
fn history(path: &Path, seed: u64) -> Vec<Vec<Picture>> {
    let mem = MemStore::default();
    let store = RocksStore::open(path).unwrap();
    let mut known = BTreeMap::new();
    let mut states = vec![picture(&mem).unwrap()];
    for number in 0..24u64 {
        let group = number % GROUPS;
        let size = ((seed + number) * 197 % 2_900) as usize;
        let mut steps = vec![(group, Step::Append { entries: vec![(3, size), (0, 0), (1, 40)], replaced: number % 2 })];
        if number < GROUPS {
            steps.insert(0, (group, Step::Create { with_checkpoint: true }));
        }
        if number % 5 == 4 {
            steps.push((group, Step::Checkpoint));
        }
        if number == 17 {
            steps.push((group, Step::Truncate { which: 1 }));
        }
        steps.push((group, Step::Hard { term: number, vote: 1, commit: number }));
        let ops = round(&mut known, &steps);
        mem.write(&ops).unwrap();
        store.write(&ops).unwrap();
        store.sync().unwrap();
        states.push(picture(&mem).unwrap());
        if number == 6 || number == 12 {
            store.compact().unwrap(); // tables and blobs, not only a log
        }
    }
    drop(store);
    states
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(path).unwrap().map(|f| f.unwrap().path()).collect();
    found.retain(|f| f.is_file() && std::fs::metadata(f).is_ok_and(|m| m.len() > 0));
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in files(from) {
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

/// What came of opening a damaged folder.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// It said so: at opening, at reading, or by quarantine.
    Said,
    /// All is there.
    Whole,
    /// The newest rounds are gone: a torn tail of the write-ahead log.
    Torn,
}

fn outcome(path: &Path, states: &[Vec<Picture>]) -> Outcome {
    let Ok(store) = RocksStore::open(path) else { return Outcome::Said };
    let Ok(seen) = picture(&store) else { return Outcome::Said };
    let newest = states.last().unwrap();
    if seen == *newest {
        return Outcome::Whole;
    }
    if seen.iter().any(|p| p.quarantined) {
        return Outcome::Said;
    }
    assert!(states.contains(&seen), "silently another state: {seen:#?}");
    Outcome::Torn
}

/// Flips one bit, or cuts a file, of every kind of file there is; many times.
#[test]
fn no_flipped_bit_and_no_cut_file_is_read_as_if_it_were_whole() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let states = history(&whole, 5);
    let mut counts: BTreeMap<(String, &str, Outcome), u32> = BTreeMap::new();
    let mut state = 7u64;
    let mut random = |below: usize| {
        // a multiplicative congruential generator: <https://doi.org/10.1002/spe.3030>
        state = state.wrapping_mul(0xf135_7aea_2e62_a9c5).wrapping_add(1);
        (state >> 33) as usize % below
    };
    for round in 0..400 {
        let damaged = folder.path().join("damaged");
        copy(&whole, &damaged);
        let all = files(&damaged);
        let file = &all[random(all.len())];
        let mut bytes = std::fs::read(file).unwrap();
        let at = random(bytes.len());
        let how = if round % 4 == 0 { "cut" } else { "flipped" };
        match how {
            "cut" => bytes.truncate(at),
            _ => bytes[at] ^= 1 << random(8),
        }
        std::fs::write(file, &bytes).unwrap();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let outcome = outcome(&damaged, &states);
        // all was synced: not even the log of writes may end early
        let kind: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
        assert_ne!(outcome, Outcome::Torn, "{name} {how} at {at} of {}", bytes.len());
        *counts.entry((kind, how, outcome)).or_default() += 1;
        std::fs::remove_dir_all(&damaged).unwrap();
    }
    counts.iter().for_each(|(what, count)| println!("{count} × {what:?}"));
    let said = counts
        .iter()
        .filter(|((kind, how, outcome), _)| kind == ".log" && *how == "flipped" && *outcome == Outcome::Said);
    assert!(said.count() > 0, "nothing was damaged: {counts:?}");
}
