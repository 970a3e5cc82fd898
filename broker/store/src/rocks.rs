//! The store over RocksDB. One database a broker, four column families, one WriteBatch a round.
//!
//! Large values of the log go to blob files when a memtable is flushed, so that compaction moves keys, not payloads. A sync of the
//! write-ahead log waits for whatever else the disk has to do, so that is kept in small pieces: little memtables, of which each leaves
//! small files, written past the page cache, and what is removed goes in pieces ([`crate::removal`]). Retention
//! gives blob files back by itself where all in them is gone, oldest first; what lies between what is kept is collected when it is
//! more than that (the broker asks for it).
//! A torn tail of the write-ahead log is accepted at start, nothing else: point-in-time recovery would open an
//! older state as if all were well. A log that lacks what was synced is refused ([`crate::synced`]).
//!
//! Damage that RocksDB finds in its own files, whatever it was doing, is noted in the folder ([`RocksStore::damage`]): reading on is
//! possible, but every compaction would fail. Damage of a payload is damage of one entry.

use crate::direct;
use crate::keys::state::Standing;
use crate::keys::{self, incarnations, log, offsets, state};
use crate::removal::Removal;
use crate::room::{Sizes, Small};
use crate::synced::{self, Mark, Synced};
use crate::torn;
use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBRecoveryMode, Direction, ErrorKind, IteratorMode, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use weir_core::entry::{Context, Kind, entry_bytes};
use weir_core::eraftpb::Entry;
use weir_core::ids::{BrokerId, GroupId, ReplicaId};
use weir_core::incarnation::Incarnation;
use weir_core::storage::{Checkpoint, HardState, Store, StoreError, StoredGroup, WriteOp};

const LOG: &str = "log";
const OFFSETS: &str = "offsets";
const STATE: &str = "state";
const META: &str = "meta";
/// Values of at least this many bytes are kept in blob files once flushed.
const BLOB_BYTES_MIN: u64 = 1 << 10;
/// What writers are slowed down to when the last memtable is begun, before they wait for a flush. RocksDB's own 16 MiB is a pause.
const DELAYED_BYTES_PER_SECOND: u64 = 128 << 20;
/// What is flushed goes to the disk in pieces of this size.
const PIECE_BYTES: u64 = 256 << 10;

/// Tables and blob files open at one time, where the limit of open files allows it.
const TABLES_OPEN_MAX: usize = 512;
/// Files open beside those: logs, the manifest, what flushes and compactions read and write.
const FILES_BESIDE: usize = 64;
/// Name of the file that notes damage in a database's folder.
const DAMAGED: &str = "DAMAGED";

/// See the module.
pub struct RocksStore {
    db: DB,
    path: PathBuf,
    /// `None` where the store was opened for reading only
    removal: Option<Removal>,
    synced: Option<Synced>,
    ends: Mutex<Ends>,
    torn_bytes: u64,
    damage: OnceLock<String>,
}

/// The partitions' end offsets as written, and their sum.
#[derive(Default)]
struct Ends {
    each: HashMap<GroupId, u64>,
    sum: u64,
    /// writes that have begun and are not counted yet
    writing: u32,
}

impl Ends {
    fn set(&mut self, group: GroupId, end: u64) {
        let before = if end == 0 { self.each.remove(&group) } else { self.each.insert(group, end) };
        self.sum = self.sum.saturating_add(end).saturating_sub(before.unwrap_or(0));
    }
}

/// Files that a store holds open of each large kind until they are removed ([`crate::removal`]), under this limit of open files.
pub(crate) fn held_max(limit: usize) -> usize {
    if limit < 4_096 { 16 } else { 64 }
}

fn tables_open_max(limit: usize) -> usize {
    (limit / 4).min(TABLES_OPEN_MAX)
}

/// Files that a store has open at most, in a process that may open `limit` files.
pub fn files_max(limit: usize) -> usize {
    tables_open_max(limit) + 3 * held_max(limit) + FILES_BESIDE
}

/// How many files this process may open.
pub(crate) fn files_limit() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// About what an entry takes in a write beside its data: keys, its place by offset, the log's own fields.
const ENTRY_BYTES_MORE: usize = 160;

/// A key and its value.
type Row = (Box<[u8]>, Box<[u8]>);

/// RocksDB says corruption also where it could not look at a file, and an I/O error where a file of its own is missing: no retry
/// brings that back.
fn io(error: rocksdb::Error) -> StoreError {
    let kind = error.kind();
    let text = error.into_string();
    let is_missing = text.contains("No such file or directory") || text.contains("create_if_missing is false");
    match kind {
        _ if is_missing => StoreError::Corrupt(text),
        ErrorKind::Corruption if !text.contains("IO error") => StoreError::Corrupt(text),
        _ => StoreError::Io(text),
    }
}

/// Whether there is a database in `path`, or what is left of one: without its `CURRENT`, RocksDB would begin a new one and remove
/// the files of the old one.
fn is_there(path: &Path) -> std::io::Result<bool> {
    let is_data = |name: &str| {
        name == "CURRENT" || [".sst", ".blob", ".log"].iter().any(|e| name.ends_with(e) && !name.starts_with("LOG"))
    };
    let mut names = std::fs::read_dir(path)?.filter_map(|file| file.ok()?.file_name().into_string().ok());
    Ok(names.any(|name| is_data(&name)))
}

fn database_options(direct: bool, sizes: Sizes) -> Options {
    // of what is flushed by way of the page cache so much is under way at most; the crate has no other way to say so
    let known = format!("strict_bytes_per_sync=true;delayed_write_rate={DELAYED_BYTES_PER_SECOND}");
    let mut options = Options::default().get_options_from_string(known).expect("RocksDB knows these options");
    options.set_bytes_per_sync(PIECE_BYTES);
    options.set_writable_file_max_buffer_size(PIECE_BYTES);
    options.set_use_direct_io_for_flush_and_compaction(direct);
    options.create_missing_column_families(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_total_wal_size(sizes.log); // what a start after a kill reads again
    options.set_db_write_buffer_size(sizes.memtables as usize);
    // on a small disk one compaction at a time: each needs room
    options.set_max_background_jobs(if sizes.small.is_some() { 2 } else { 3 });
    // what RocksDB says of itself, and its list of files, would grow for years
    options.set_keep_log_file_num(3);
    options.set_max_log_file_size((sizes.memtable / 4) as usize);
    options.set_max_manifest_file_size(sizes.memtable as usize);
    options.set_max_open_files(i32::try_from(tables_open_max(files_limit())).unwrap_or(i32::MAX));
    options.set_skip_stats_update_on_db_open(true);
    options
}

fn log_options(sizes: Sizes) -> Options {
    let mut options = family_options(sizes);
    options.set_max_write_buffer_number((sizes.memtables / sizes.memtable) as i32);
    options.set_enable_blob_files(true);
    options.set_min_blob_size(BLOB_BYTES_MIN);
    options.set_blob_file_size(256 << 20);
    // compaction moves keys only; what moves payloads is asked for, see `collect_garbage`
    options.set_enable_blob_gc(false);
    options.set_blob_gc_age_cutoff(1.0);
    // the tables hold keys and are small: many of them are no reason to let writers wait
    options.set_level_zero_slowdown_writes_trigger(200);
    options.set_level_zero_stop_writes_trigger(400);
    options
}

fn family_options(sizes: Sizes) -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(sizes.memtable as usize);
    if let Some(Small { level, table, compaction }) = sizes.small {
        options.set_max_bytes_for_level_base(level);
        options.set_target_file_size_base(table);
        options.set_max_compaction_bytes(compaction);
    }
    let mut tables = BlockBasedOptions::default();
    tables.set_bloom_filter(10.0, false);
    options.set_block_based_table_factory(&tables);
    options
}

fn families(damaged: bool, sizes: Sizes) -> impl Iterator<Item = ColumnFamilyDescriptor> {
    let small = || family_options(sizes);
    let families = [(LOG, log_options(sizes)), (OFFSETS, small()), (STATE, small()), (META, small())];
    families.into_iter().map(move |(name, mut options)| {
        // each would fail at the damaged file, and writes with it
        options.set_disable_auto_compactions(damaged);
        ColumnFamilyDescriptor::new(name, options)
    })
}

impl RocksStore {
    /// Opens or creates the database in `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_accepting(path, None)
    }

    /// Opens or creates the database in `path`, also where its log lacks synced writes or is damaged, if `accepted` is the last
    /// write that was synced: then the log is taken as far as it can be read.
    pub fn open_accepting(path: &Path, accepted: Option<u64>) -> Result<Self, StoreError> {
        let failed = |e: std::io::Error| StoreError::Io(format!("{}: {e}", path.display()));
        std::fs::create_dir_all(path).map_err(failed)?;
        let is_there = is_there(path).map_err(failed)?;
        let mark = synced::read(path).filter(|_| is_there);
        let accepts = mark.is_some_and(|m| Some(m.sequence) == accepted);
        let logs = torn::find(path).unwrap_or_default();
        let mark = mark.filter(|_| !accepts);
        // a log that goes on after the last synced write has that one too, and need not be read twice
        if let Some(mark) = mark.filter(|mark| logs.last_sequence <= mark.sequence) {
            Self::check_synced(path, mark)?;
        }
        let damage = Self::noted_damage(path);
        let sizes = Sizes::at(path);
        let mut options = database_options(direct::works(path), sizes);
        options.create_if_missing(!is_there);
        if accepts {
            options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
            options.set_track_and_verify_wals_in_manifest(false);
        }
        let db = DB::open_cf_descriptors(&options, path, families(damage.is_some(), sizes)).map_err(io)?;
        let removal = Removal::of(path).map_err(|e| StoreError::Io(format!("a thread: {e}")))?;
        let mut store = Self::of(db, path, logs.torn_bytes, damage);
        store.removal = Some(removal);
        if accepts {
            store.forget_lost()?;
        }
        // where a table cannot be read, the count is left at what can be
        let ends = store.read_ends().unwrap_or_default();
        store.ends = Mutex::new(ends);
        store.synced = Some(Synced::create(path, store.mark()).map_err(failed)?);
        Ok(store)
    }

    /// Opens a database that no process writes, without changing anything in its folder.
    pub fn open_for_reading(path: &Path) -> Result<Self, StoreError> {
        let sizes = Sizes::at(path);
        let mut options = database_options(false, sizes);
        options.set_info_logger(rocksdb::InfoLogger::new_callback_logger(LogLevel::Fatal, |_, _| {}));
        let db = DB::open_cf_descriptors_read_only(&options, path, families(true, sizes), false).map_err(io)?;
        let torn_bytes = torn::find(path).unwrap_or_default().torn_bytes;
        Ok(Self::of(db, path, torn_bytes, Self::noted_damage(path)))
    }

    fn of(db: DB, path: &Path, torn_bytes: u64, damage: Option<String>) -> Self {
        let damage = damage.map_or_else(OnceLock::new, OnceLock::from);
        let (removal, synced, ends) = Default::default();
        Self { db, path: path.to_owned(), removal, synced, ends, torn_bytes, damage }
    }

    /// Whether the database is what it was at the last sync, or later. Opening it for writing would remove files that it does not know
    /// any more, so it is read first.
    fn check_synced(path: &Path, mark: Mark) -> Result<(), StoreError> {
        Self::open_for_reading(path)?.lost_since(mark).map_or(Ok(()), Err)
    }

    /// The loss of what was synced at a mark.
    pub fn lost_since(&self, mark: Mark) -> Option<StoreError> {
        let found = self.db.latest_sequence_number();
        // where a table cannot be read, that is reported by whoever reads it
        let records = self.read_ends().ok().map(|ends| ends.sum);
        // a database whose list of files is an older one may hold the newest log
        let is_other = found == mark.sequence && mark.records.is_some() && records.is_some() && records != mark.records;
        let records = mark.records.zip(records).map(|(then, now)| then.saturating_sub(now));
        (found < mark.sequence || is_other).then_some(StoreError::Lost { synced: mark.sequence, found, records })
    }

    /// After a loss that was accepted: what a group knew to be committed and no longer has is not committed.
    fn forget_lost(&self) -> Result<(), StoreError> {
        let mut ops = Vec::new();
        for stored in self.load()? {
            if stored.hard.commit > stored.last_index {
                let hard = HardState { commit: stored.last_index, ..stored.hard };
                ops.push(WriteOp::SetHardState { group: stored.group, hard });
            }
        }
        self.write(&ops)?;
        self.sync()
    }

    /// The partitions' end offsets as the database has them.
    fn read_ends(&self) -> Result<Ends, StoreError> {
        let mut ends = Ends::default();
        let mut iterator = self.db.raw_iterator_cf(self.family(OFFSETS));
        iterator.seek_to_first();
        while let Some(group) = iterator.key().and_then(|key| keys::u64_at(key, 0)) {
            ends.set(GroupId(group), self.end_offset(GroupId(group))?);
            let Some(next) = group.checked_add(1) else { break };
            iterator.seek(keys::group_prefix(next));
        }
        iterator.status().map_err(|e| self.failed(e))?;
        Ok(ends)
    }

    /// One past the last offset of a group's log; 0 where it has no batch.
    pub fn end_offset(&self, group: GroupId) -> Result<u64, StoreError> {
        let mut iterator = self.db.raw_iterator_cf(self.family(OFFSETS));
        iterator.seek_for_prev(offsets::key(group.0, u64::MAX));
        let last = iterator.key().filter(|key| key.starts_with(&keys::group_prefix(group.0)));
        let end = last.and_then(|key| keys::u64_at(key, 8)).map_or(0, |last| last.saturating_add(1));
        iterator.status().map_err(|e| self.failed(e))?;
        Ok(end)
    }

    /// Counts what a write changed. What removes entries is rare, and read again.
    fn count_ends(&self, ops: &[WriteOp]) {
        let end = |op: &WriteOp| match op {
            WriteOp::Append { group, entries, replace_from: None } => {
                let contexts = entries.iter().rev().filter_map(Context::of);
                let last = contexts.filter(|c| c.kind == Kind::Batch).map(|c| c.end_offset()).next();
                last.map(|end| (*group, end))
            }
            WriteOp::Append { group, .. }
            | WriteOp::Create { group, .. }
            | WriteOp::Truncate { group, .. }
            | WriteOp::Install { group, .. }
            | WriteOp::Destroy { group, .. } => Some((*group, self.end_offset(*group).unwrap_or(0))),
            _ => None,
        };
        let changed: Vec<(GroupId, u64)> = ops.iter().filter_map(end).collect();
        let mut ends = self.ends();
        changed.into_iter().for_each(|(group, end)| ends.set(group, end));
        ends.writing -= 1;
    }

    /// What a sync that begins now makes durable.
    fn mark(&self) -> Mark {
        let ends = self.ends();
        Mark { sequence: self.db.latest_sequence_number(), records: (ends.writing == 0).then_some(ends.sum) }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Damage that RocksDB found in its own files, now or before this start. Nothing is compacted any more then, so that writes
    /// go on; the store is to be rebuilt from other brokers, or restored.
    pub fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Damage that was noted in a database's folder before.
    pub fn noted_damage(path: &Path) -> Option<String> {
        std::fs::read_to_string(path.join(DAMAGED)).ok().map(|text| text.trim().to_owned())
    }

    /// Notes damage of the store as a whole, for the next start as well.
    pub fn note_damage(&self, what: &str) {
        self.damage.get_or_init(|| {
            if self.removal.is_some() {
                let path = self.path.join(DAMAGED);
                let noted = std::fs::write(&path, format!("{what}\n"));
                let _ = noted.and_then(|()| std::fs::File::open(&path)?.sync_all());
            }
            what.to_owned()
        });
    }

    /// Takes an error of RocksDB's, and notes damage of its own files.
    fn failed(&self, error: rocksdb::Error) -> StoreError {
        let error = io(error);
        if let StoreError::Corrupt(what) = &error {
            self.note_damage(what);
        }
        error
    }

    /// An error at an entry: that of a payload, which lies in a file of its own kind, is damage of this entry alone.
    fn failed_at(&self, group: GroupId, index: u64, error: rocksdb::Error) -> StoreError {
        match io(error) {
            StoreError::Corrupt(what) if self.is_of_payload(&what) => StoreError::Damaged { group, index, what },
            StoreError::Corrupt(what) => {
                self.note_damage(&what);
                StoreError::Corrupt(what)
            }
            error => error,
        }
    }

    fn is_of_payload(&self, what: &str) -> bool {
        what.replace(&*self.path.to_string_lossy(), "").to_lowercase().contains("blob")
    }

    /// Bytes of the write-ahead log's torn tail that were left out at opening.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("opened with it")
    }

    /// A value of the broker itself (its identity), not of a group.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get_cf(self.family(META), key).map_err(|e| self.failed(e))
    }

    /// Writes and syncs a value of the broker itself.
    pub fn put_meta(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db.put_cf_opt(self.family(META), key, value, &options).map_err(|e| self.failed(e))
    }

    /// A number RocksDB keeps of itself, such as `rocksdb.estimate-live-data-size`.
    pub fn property(&self, name: &str) -> Option<u64> {
        self.db.property_int_value_cf(self.family(LOG), name).ok().flatten()
    }

    /// Bytes of blob files, with what is garbage in them.
    pub fn blob_bytes(&self) -> u64 {
        self.property("rocksdb.total-blob-file-size").unwrap_or(0)
    }

    /// Bytes in memory that are written when memtables are flushed, or at the next opening.
    pub fn unflushed_bytes(&self) -> u64 {
        let of = |name| self.db.property_int_value_cf(self.family(name), "rocksdb.size-all-mem-tables").ok().flatten();
        [LOG, OFFSETS, STATE, META].into_iter().filter_map(of).sum()
    }

    /// Bytes of write-ahead logs.
    pub fn log_bytes(&self) -> u64 {
        let files = std::fs::read_dir(&self.path).into_iter().flatten().filter_map(Result::ok);
        let logs = files.filter(|file| file.path().extension().is_some_and(|e| e == "log"));
        logs.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
    }

    /// Rewrites blob files without their garbage. Takes as long, and meanwhile as much room, as it takes to write what is kept.
    pub fn collect_garbage(&self) -> Result<(), StoreError> {
        let collect = |on: &str| {
            let options = [("enable_blob_garbage_collection", on)];
            self.db.set_options_cf(self.family(LOG), &options).map_err(|e| self.failed(e))
        };
        collect("true")?;
        let mut options = CompactOptions::default();
        options.set_exclusive_manual_compaction(false);
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        self.db.compact_range_cf_opt(self.family(LOG), None::<&[u8]>, None::<&[u8]>, &options);
        collect("false")
    }

    /// Ends what runs in the background, such as [`Self::collect_garbage`]: a process that ends does not wait for it.
    pub fn stop_background_work(&self) {
        self.db.cancel_all_background_work(false);
    }

    /// Writes all there is in memory to tables, as happens by itself with time.
    pub fn flush(&self) -> Result<(), StoreError> {
        [LOG, OFFSETS, STATE, META]
            .iter()
            .try_for_each(|name| self.db.flush_cf(self.family(name)).map_err(|e| self.failed(e)))
    }

    /// Writes all there is in memory to tables and merges them, as happens by itself with time.
    pub fn compact(&self) -> Result<(), StoreError> {
        self.flush()?;
        for name in [LOG, OFFSETS, STATE, META] {
            self.db.compact_range_cf(self.family(name), None::<&[u8]>, None::<&[u8]>);
        }
        Ok(())
    }

    fn add_op(&self, batch: &mut WriteBatch, op: &WriteOp, buffer: &mut Vec<u8>) {
        match op {
            WriteOp::Create { group, replica, checkpoint } => {
                self.wipe(batch, *group);
                self.put_replica(batch, *group, *replica, Standing::Whole);
                checkpoint.iter().for_each(|c| self.put_checkpoint(batch, *group, c));
            }
            WriteOp::Append { group, entries, replace_from } => {
                if let Some((index, offset)) = replace_from {
                    batch.delete_range_cf(self.family(LOG), log::key(group.0, *index), log::key(group.0, u64::MAX));
                    let from = offsets::key(group.0, *offset);
                    batch.delete_range_cf(self.family(OFFSETS), from, offsets::key(group.0, u64::MAX));
                }
                entries.iter().for_each(|e| self.put_entry(batch, *group, e, buffer));
            }
            WriteOp::SetHardState { group, hard } => {
                let key = state::key(group.0, state::HARD);
                batch.put_cf(self.family(STATE), key, state::encode_hard(&key, hard));
            }
            WriteOp::PutCheckpoint { group, checkpoint } => self.put_checkpoint(batch, *group, checkpoint),
            WriteOp::DropCheckpoint { group, index } => {
                batch.delete_cf(self.family(STATE), state::checkpoint_key(group.0, *index));
            }
            WriteOp::Truncate { group, index, offset } => {
                batch.delete_range_cf(self.family(LOG), log::key(group.0, 0), log::key(group.0, index + 1));
                batch.delete_range_cf(self.family(OFFSETS), offsets::key(group.0, 0), offsets::key(group.0, *offset));
                let (from, to) = (state::checkpoint_key(group.0, 0), state::checkpoint_key(group.0, *index));
                batch.delete_range_cf(self.family(STATE), from, to);
            }
            WriteOp::Install { group, checkpoint } => {
                self.wipe_log(batch, *group);
                self.put_checkpoint(batch, *group, checkpoint);
            }
            WriteOp::Incarnation { broker, incarnation } => {
                batch.put_cf(
                    self.family(META),
                    incarnations::key(*broker),
                    incarnations::encode(*broker, *incarnation),
                );
            }
            WriteOp::Quarantine { group, replica } => {
                self.put_replica(batch, *group, *replica, Standing::Quarantined);
            }
            WriteOp::Destroy { group, replica } => {
                self.wipe(batch, *group);
                self.put_replica(batch, *group, *replica, Standing::Destroyed);
            }
        }
    }

    fn put_entry(&self, batch: &mut WriteBatch, group: GroupId, entry: &Entry, buffer: &mut Vec<u8>) {
        let key = log::key(group.0, entry.index);
        buffer.clear();
        log::encode(&key, entry, buffer);
        batch.put_cf(self.family(LOG), key, &*buffer);
        if let Some(context) = Context::of(entry).filter(|c| c.kind == Kind::Batch) {
            let key = offsets::key(group.0, context.end_offset() - 1);
            batch.put_cf(self.family(OFFSETS), key, offsets::value(entry.index, context.append_time_ms));
        }
    }

    fn put_checkpoint(&self, batch: &mut WriteBatch, group: GroupId, checkpoint: &Checkpoint) {
        let key = state::checkpoint_key(group.0, checkpoint.index);
        batch.put_cf(self.family(STATE), key, state::encode_checkpoint(&key, checkpoint));
    }

    fn put_replica(&self, batch: &mut WriteBatch, group: GroupId, replica: ReplicaId, standing: Standing) {
        let key = state::key(group.0, state::REPLICA);
        batch.put_cf(self.family(STATE), key, state::encode_replica(&key, replica, standing));
    }

    fn wipe_log(&self, batch: &mut WriteBatch, group: GroupId) {
        batch.delete_range_cf(self.family(LOG), log::key(group.0, 0), log::key(group.0, u64::MAX));
        batch.delete_range_cf(self.family(OFFSETS), offsets::key(group.0, 0), offsets::key(group.0, u64::MAX));
        let (from, to) = (state::checkpoint_key(group.0, 0), state::checkpoint_key(group.0, u64::MAX));
        batch.delete_range_cf(self.family(STATE), from, to);
    }

    fn wipe(&self, batch: &mut WriteBatch, group: GroupId) {
        self.wipe_log(batch, group);
        batch.delete_cf(self.family(STATE), state::key(group.0, state::HARD));
        batch.delete_cf(self.family(STATE), state::key(group.0, state::REPLICA));
    }

    /// Index of the last entry of a group.
    fn last_index(&self, group: GroupId) -> Result<u64, StoreError> {
        let end = log::key(group.0, u64::MAX);
        let mut iterator = self.db.iterator_cf(self.family(LOG), IteratorMode::From(&end, Direction::Reverse));
        match iterator.next().transpose().map_err(|e| self.failed(e))? {
            Some((key, _)) if key.starts_with(&keys::group_prefix(group.0)) => Ok(keys::u64_at(&key, 8).unwrap_or(0)),
            _ => Ok(0),
        }
    }

    fn load_group(&self, group: u64, rows: &[Row]) -> Result<StoredGroup, StoreError> {
        let group = GroupId(group);
        let last_index = self.last_index(group)?;
        let mut stored = StoredGroup {
            group,
            replica: ReplicaId(0),
            quarantined: false,
            destroyed: false,
            hard: HardState::default(),
            checkpoints: Vec::new(),
            last_index,
        };
        let mut whole = true;
        for (key, value) in rows {
            match key[8] {
                state::CHECKPOINT => match state::decode_checkpoint(key, value) {
                    Some(checkpoint) => stored.checkpoints.push(checkpoint),
                    None => whole = false,
                },
                state::HARD => match state::decode_hard(key, value) {
                    Some(hard) => stored.hard = hard,
                    None => whole = false,
                },
                state::REPLICA => match state::decode_replica(key, value) {
                    Some((replica, standing)) => {
                        stored.replica = replica;
                        stored.quarantined = standing == Standing::Quarantined;
                        stored.destroyed = standing == Standing::Destroyed;
                    }
                    None => whole = false,
                },
                _ => {}
            }
        }
        stored.quarantined |= !whole || stored.replica == ReplicaId(0);
        stored.last_index = stored.last_index.max(stored.checkpoints.last().map_or(0, |c| c.index));
        Ok(stored)
    }

    fn offset_row(&self, group: GroupId, from: u64) -> Result<Option<(u64, u64, u64)>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(offsets::key(group.0, u64::MAX).to_vec());
        let from = offsets::key(group.0, from);
        let mode = IteratorMode::From(&from, Direction::Forward);
        let row = self
            .db
            .iterator_cf_opt(self.family(OFFSETS), options, mode)
            .next()
            .transpose()
            .map_err(|e| self.failed(e))?;
        Ok(row.and_then(|(key, value)| {
            let (index, time) = offsets::decode(&value)?;
            Some((keys::u64_at(&key, 8)?, index, time))
        }))
    }
}

impl Store for RocksStore {
    fn load(&self) -> Result<Vec<StoredGroup>, StoreError> {
        let mut groups = Vec::new();
        let mut rows: Vec<Row> = Vec::new();
        let mut current = None;
        for row in self.db.iterator_cf(self.family(STATE), IteratorMode::Start) {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            let group = keys::u64_at(&key, 0);
            if current != group {
                if let Some(done) = current {
                    groups.push(self.load_group(done, &rows)?);
                }
                rows.clear();
                current = group;
            }
            rows.push((key, value));
        }
        if let Some(done) = current {
            groups.push(self.load_group(done, &rows)?);
        }
        Ok(groups)
    }

    fn incarnations(&self) -> Result<Vec<(BrokerId, Incarnation)>, StoreError> {
        let mut out = Vec::new();
        let mode = IteratorMode::From(incarnations::PREFIX, Direction::Forward);
        for row in self.db.iterator_cf(self.family(META), mode) {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            if !key.starts_with(incarnations::PREFIX) {
                break;
            }
            let damaged = || {
                let what = "the record of an incarnation has another checksum";
                self.note_damage(what);
                StoreError::Corrupt(what.to_owned())
            };
            out.push(incarnations::decode(&key, &value).ok_or_else(damaged)?);
        }
        Ok(out)
    }

    fn entries(&self, group: GroupId, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, StoreError> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_upper_bound(log::key(group.0, high).to_vec());
        let mut iterator = self.db.raw_iterator_cf_opt(self.family(LOG), options);
        iterator.seek(log::key(group.0, low));
        let mut out: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        while let Some((key, value)) = iterator.item() {
            let index = low + out.len() as u64;
            if key != log::key(group.0, index) {
                let what = "the entry is missing, a later one is there".to_owned();
                return Err(StoreError::Damaged { group, index, what });
            }
            let entry = log::decode(key, Bytes::copy_from_slice(value));
            let entry = entry.map_err(|what| StoreError::Damaged { group, index, what: what.to_owned() })?;
            bytes += entry_bytes(&entry);
            if !out.is_empty() && bytes > bytes_max {
                break;
            }
            out.push(entry);
            if bytes >= bytes_max {
                break;
            }
            iterator.next();
        }
        iterator.status().map_err(|e| self.failed_at(group, low + out.len() as u64, e))?;
        if out.is_empty() {
            return Err(StoreError::Damaged { group, index: low, what: "the entry is missing".to_owned() });
        }
        Ok(out)
    }

    fn locate_offset(&self, group: GroupId, offset: u64) -> Result<Option<u64>, StoreError> {
        Ok(self.offset_row(group, offset)?.map(|(_, index, _)| index))
    }

    /// Append times never fall along the log, so a binary search over offsets finds the place in some forty seeks.
    fn locate_time(&self, group: GroupId, time_ms: u64) -> Result<Option<u64>, StoreError> {
        let end = offsets::key(group.0, u64::MAX);
        let last = self.db.iterator_cf(self.family(OFFSETS), IteratorMode::From(&end, Direction::Reverse)).next();
        let Some((key, value)) = last.transpose().map_err(|e| self.failed(e))? else { return Ok(None) };
        if !key.starts_with(&keys::group_prefix(group.0)) || offsets::decode(&value).is_none_or(|v| v.1 < time_ms) {
            return Ok(None);
        }
        let (mut low, mut high) = (0, keys::u64_at(&key, 8).unwrap_or(0));
        while low < high {
            let middle = low + (high - low) / 2;
            match self.offset_row(group, middle)? {
                Some((last_offset, _, time)) if time < time_ms => low = last_offset + 1,
                _ => high = middle,
            }
        }
        Ok(self.offset_row(group, low)?.map(|(_, index, _)| index))
    }

    fn checkpoint(&self, group: GroupId, index: u64) -> Result<Option<Checkpoint>, StoreError> {
        let key = state::checkpoint_key(group.0, index);
        let Some(value) = self.db.get_cf(self.family(STATE), key).map_err(|e| self.failed(e))? else { return Ok(None) };
        let damaged = || StoreError::Damaged { group, index, what: "its checkpoint's checksum differs".to_owned() };
        state::decode_checkpoint(&key, &value).map(Some).ok_or_else(damaged)
    }

    fn write(&self, ops: &[WriteOp]) -> Result<(), StoreError> {
        self.write_by(ops, &WriteOptions::default()).map_err(|e| self.failed(e))
    }

    fn try_write(&self, ops: &[WriteOp]) -> Result<bool, StoreError> {
        let mut options = WriteOptions::default();
        options.set_no_slowdown(true);
        match self.write_by(ops, &options) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Incomplete => Ok(false),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn sync(&self) -> Result<(), StoreError> {
        // all that is counted here is in the log's file by now: a sync covers it
        let mark = self.mark();
        self.db.flush_wal(true).map_err(|e| self.failed(e))?;
        self.synced.iter().for_each(|synced| synced.move_to(mark));
        Ok(())
    }
}

impl RocksStore {
    fn write_by(&self, ops: &[WriteOp], options: &WriteOptions) -> Result<(), rocksdb::Error> {
        let data = |op: &WriteOp| match op {
            WriteOp::Append { entries, .. } => entries.iter().map(|e| e.data.len() + ENTRY_BYTES_MORE).sum(),
            _ => ENTRY_BYTES_MORE,
        };
        // it does not grow step by step, each with a copy
        let bytes = ops.iter().map(data).sum();
        let mut batch = WriteBatch::with_capacity_bytes(bytes);
        let mut buffer = Vec::new();
        ops.iter().for_each(|op| self.add_op(&mut batch, op, &mut buffer));
        self.ends().writing += 1;
        if let Err(error) = self.db.write_opt(batch, options) {
            self.ends().writing -= 1;
            return Err(error);
        }
        self.removal.iter().for_each(|removal| removal.wrote(bytes as u64));
        self.count_ends(ops);
        for op in ops {
            let (group, to) = match op {
                WriteOp::Truncate { group, index, .. } => (group, *index),
                WriteOp::Install { group, checkpoint } => (group, checkpoint.index),
                WriteOp::Destroy { group, .. } => (group, u64::MAX),
                _ => continue,
            };
            // whole files go at once, the end included; a failure leaves them to compaction
            let _ = self.db.delete_file_in_range_cf(self.family(LOG), log::key(group.0, 0), log::key(group.0, to));
        }
        Ok(())
    }
}
