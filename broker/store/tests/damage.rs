//! Files that are damaged, missing or cut off: nothing that was synced is lost without an error, nothing that could be put back is
//! removed, and what is not affected is served.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use weir_core::entry::{Context, Kind};
use weir_core::eraftpb::Entry;
use weir_core::ids::{BrokerId, GroupId, ReplicaId};
use weir_core::incarnation::Incarnation;
use weir_core::storage::{Checkpoint, HardState, Store as _, StoreError, WriteOp};
use weir_store::blobs;
use weir_store::rocks::RocksStore;

const GROUP: GroupId = GroupId(1);

/// Appends entries `from..to` of ten records each, and syncs them.
fn append(store: &RocksStore, from: u64, to: u64, bytes: usize) {
    for index in from..to {
        let base_offset = (index - 2) * 10;
        let context = Context { kind: Kind::Batch, base_offset, count: 10, append_time_ms: index }.encode();
        let entry = Entry { index, term: 1, context, data: vec![index as u8; bytes].into(), ..Default::default() };
        let hard = HardState { term: 1, vote: 1, commit: index };
        let append = WriteOp::Append { group: GROUP, entries: vec![entry], replace_from: None };
        store.write(&[append, WriteOp::SetHardState { group: GROUP, hard }]).unwrap();
        store.sync().unwrap();
    }
}

fn begin(path: &Path) -> RocksStore {
    let store = RocksStore::open(path).unwrap();
    let checkpoint = Some(Checkpoint { index: 1, term: 1, voters: vec![1], ..Default::default() });
    store.write(&[WriteOp::Create { group: GROUP, replica: ReplicaId(1), checkpoint }]).unwrap();
    store
}

fn files(path: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(path).unwrap().map(|f| f.unwrap().path()).collect();
    found.retain(|f| f.extension().is_some_and(|e| e == extension) && f.metadata().unwrap().len() > 0);
    found.sort();
    found
}

fn flip(file: &Path, at: u64) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at as usize] ^= 16;
    std::fs::write(file, bytes).unwrap();
}

fn contents(path: &Path) -> BTreeMap<PathBuf, (Vec<u8>, std::time::SystemTime)> {
    let all = std::fs::read_dir(path).unwrap().map(|f| f.unwrap().path());
    all.map(|f| (f.clone(), (std::fs::read(&f).unwrap(), f.metadata().unwrap().modified().unwrap()))).collect()
}

fn last_index(store: &RocksStore) -> u64 {
    store.load().unwrap()[0].last_index
}

#[test]
fn a_database_without_its_current_or_manifest_is_damaged_and_whole_again_once_the_file_is_back() {
    for what in ["CURRENT", "MANIFEST"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        append(&begin(path), 2, 12, 2_000);
        let all = std::fs::read_dir(path).unwrap().map(|f| f.unwrap().path());
        let missing = all.into_iter().find(|f| f.file_name().unwrap().to_str().unwrap().starts_with(what)).unwrap();
        let away = path.join("kept");
        std::fs::rename(&missing, &away).unwrap();
        for _ in 0..2 {
            let Err(error) = RocksStore::open(path) else { panic!("without {what} another database was begun") };
            let StoreError::Corrupt(text) = &error else { panic!("{error:?}") };
            assert!(text.contains(what), "the file is named: {text}");
        }
        std::fs::rename(&away, &missing).unwrap();
        assert_eq!(last_index(&RocksStore::open(path).unwrap()), 11);
    }
}

#[test]
fn a_log_that_was_cut_off_or_removed_is_refused_with_what_is_lost_and_opens_once_it_is_back() {
    for how in ["cut", "removed"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        append(&begin(path), 2, 52, 500);
        let log = files(path, "log").pop().unwrap();
        let whole = std::fs::read(&log).unwrap();
        match how {
            "cut" => std::fs::write(&log, &whole[..whole.len() / 2]).unwrap(),
            _ => std::fs::remove_file(&log).unwrap(),
        }
        let mut lost_write = 0;
        for _ in 0..3 {
            let Err(StoreError::Lost { synced, found, records }) = RocksStore::open(path).map(drop) else {
                panic!("{how}: the loss is not noticed")
            };
            assert!(found < synced);
            let expected = if how == "cut" { 200..300 } else { 500..501 };
            assert!(records.is_some_and(|n| expected.contains(&n)), "{how}: {records:?}");
            lost_write = synced;
        }
        let wrong = RocksStore::open_accepting(path, Some(lost_write - 1)).map(drop);
        assert!(matches!(wrong, Err(StoreError::Lost { .. })), "another loss was accepted: {wrong:?}");
        std::fs::write(&log, &whole).unwrap();
        assert_eq!(last_index(&RocksStore::open(path).unwrap()), 51, "{how}: put back, nothing is lost");
    }
}

#[test]
fn a_loss_that_is_accepted_is_accepted_once_and_writing_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let store = begin(path);
    append(&store, 2, 52, 500);
    drop(store);
    let log = files(path, "log").pop().unwrap();
    let whole = std::fs::read(&log).unwrap();
    std::fs::write(&log, &whole[..whole.len() / 2]).unwrap();
    let Err(StoreError::Lost { synced, .. }) = RocksStore::open(path).map(drop) else { panic!("not noticed") };
    let store = RocksStore::open_accepting(path, Some(synced)).unwrap();
    let held = store.load().unwrap().pop().unwrap();
    assert!(held.last_index < 51 && held.hard.commit <= held.last_index, "{held:?}");
    append(&store, held.last_index + 1, held.last_index + 5, 500);
    drop(store);
    assert_eq!(last_index(&RocksStore::open(path).unwrap()), held.last_index + 4);
    let log = files(path, "log").pop();
    if let Some(log) = log {
        std::fs::remove_file(log).unwrap();
    }
    assert!(RocksStore::open_accepting(path, Some(synced)).is_ok(), "all of it is in tables");
}

#[test]
fn a_damaged_log_opens_up_to_the_damage_if_the_loss_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    append(&begin(path), 2, 52, 500);
    let mark = weir_store::synced::read(path).unwrap();
    let log = files(path, "log").pop().unwrap();
    flip(&log, log.metadata().unwrap().len() / 2);
    assert!(RocksStore::open(path).is_err_and(|e| e.is_damage()));
    assert_eq!(weir_store::torn::damaged_log(path), Some(log));
    let store = RocksStore::open_accepting(path, Some(mark.sequence)).unwrap();
    let held = store.load().unwrap().pop().unwrap();
    assert!((10..51).contains(&held.last_index) && held.hard.commit <= held.last_index, "{held:?}");
}

#[test]
fn a_power_loss_that_takes_only_what_was_not_synced_is_no_loss() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let store = begin(path);
    append(&store, 2, 20, 500);
    let synced = files(path, "log").pop().unwrap().metadata().unwrap().len();
    // written and never synced
    let context = Context { kind: Kind::Batch, base_offset: 180, count: 10, append_time_ms: 20 }.encode();
    let entry = Entry { index: 20, term: 1, context, data: vec![9; 500].into(), ..Default::default() };
    store.write(&[WriteOp::Append { group: GROUP, entries: vec![entry], replace_from: None }]).unwrap();
    drop(store);
    let log = files(path, "log").pop().unwrap();
    let whole = std::fs::read(&log).unwrap();
    assert!(whole.len() as u64 > synced);
    let mark = weir_store::synced::read(path).unwrap();
    let last = || weir_store::torn::find(path).unwrap().last_sequence;
    assert!(last() > mark.sequence, "all that was synced is there, and more: this log is read once");
    std::fs::write(&log, &whole[..synced as usize]).unwrap();
    assert_eq!(last(), mark.sequence);
    assert_eq!(last_index(&RocksStore::open(path).unwrap()), 19);
    // and a mark that the power loss took back or tore says nothing
    std::fs::write(path.join("SYNCED"), []).unwrap();
    assert_eq!(last_index(&RocksStore::open(path).unwrap()), 19);
}

#[test]
fn damage_of_a_table_is_noted_for_the_store_and_writes_go_on_after_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let store = begin(path);
    append(&store, 2, 1_000, 100);
    store.compact().unwrap();
    drop(store);
    let table = files(path, "sst").into_iter().max_by_key(|f| f.metadata().unwrap().len()).unwrap();
    flip(&table, table.metadata().unwrap().len() / 2);
    let store = RocksStore::open(path).unwrap();
    assert_eq!(store.damage(), None);
    let error = store.entries(GROUP, 2, 1_000, u64::MAX).expect_err("a bit has flipped");
    assert!(matches!(&error, StoreError::Corrupt(text) if text.contains(".sst")), "{error:?}");
    assert!(store.damage().is_some_and(|what| what.contains(table.file_name().unwrap().to_str().unwrap())));
    drop(store);
    let store = RocksStore::open(path).unwrap();
    assert!(store.damage().is_some(), "known at the next start");
    for round in 0..12 {
        append(&store, 1_000 + round * 10, 1_010 + round * 10, 100);
        store.flush().unwrap(); // a compaction would read the damaged table, and no write would succeed after it
    }
    assert_eq!(store.entries(GROUP, 1_100, 1_120, u64::MAX).unwrap().len(), 20);
}

/// They are written with every start of a broker, and read before anything else.
#[test]
fn damage_of_the_incarnations_is_noted_for_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let store = begin(path);
    append(&store, 2, 10, 100);
    store.flush().unwrap();
    let before = files(path, "sst");
    let row = |id| WriteOp::Incarnation { broker: BrokerId(id), incarnation: Incarnation(id << 32) };
    store.write(&(1..1_000).map(row).collect::<Vec<_>>()).unwrap();
    store.sync().unwrap();
    store.flush().unwrap();
    drop(store);
    let table = files(path, "sst").into_iter().find(|f| !before.contains(f)).unwrap();
    flip(&table, 1_000);
    let store = RocksStore::open(path).unwrap();
    assert_eq!(store.damage(), None);
    assert!(matches!(store.incarnations(), Err(StoreError::Corrupt(_))));
    assert!(store.damage().is_some_and(|what| what.contains(table.file_name().unwrap().to_str().unwrap())));
    drop(store);
    assert!(RocksStore::open(path).unwrap().damage().is_some(), "known at the next start");
}

#[test]
fn damage_of_a_payload_is_damage_of_its_entry_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let store = begin(path);
    append(&store, 2, 50, 5_000);
    store.compact().unwrap();
    drop(store);
    let blob = files(path, "blob").pop().unwrap();
    assert_eq!(blobs::flaws(path).unwrap(), []);
    flip(&blob, 10_000);
    let flaws = blobs::flaws(path).unwrap();
    assert!(matches!(&flaws[..], [blobs::Flaw { file, at: 5_000..10_000 }] if *file == blob), "{flaws:?}");
    let store = RocksStore::open(path).unwrap();
    let error = store.entries(GROUP, 2, 50, u64::MAX).expect_err("a bit has flipped");
    assert!(matches!(error, StoreError::Damaged { index: 2..10, .. }), "{error:?}");
    assert_eq!(store.damage(), None);
    assert_eq!(store.entries(GROUP, 10, 50, u64::MAX).unwrap().len(), 40);
    drop(store);
    let away = path.join("kept");
    std::fs::rename(&blob, &away).unwrap();
    let store = RocksStore::open(path).unwrap();
    let error = store.entries(GROUP, 10, 50, u64::MAX).expect_err("the file is missing");
    assert!(matches!(&error, StoreError::Damaged { what, .. } if what.contains(".blob")), "{error:?}");
    drop(store);
    std::fs::rename(&away, &blob).unwrap();
    assert_eq!(RocksStore::open(path).unwrap().entries(GROUP, 10, 50, u64::MAX).unwrap().len(), 40);
}

#[test]
fn reading_a_folder_changes_nothing_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    append(&begin(path), 2, 52, 2_000);
    let before = contents(path);
    let store = RocksStore::open_for_reading(path).unwrap();
    assert_eq!(last_index(&store), 51);
    assert_eq!(store.entries(GROUP, 2, 52, u64::MAX).unwrap().len(), 50);
    drop(store);
    assert!(before == contents(path));
}
