//! The store over RocksDB. One database a broker, four column families, one WriteBatch a round.
//!
//! Large values of the log go to blob files when a memtable is flushed, so that compaction moves keys, not payloads. A sync of the
//! write-ahead log waits for whatever else the disk has to do, so that is kept in small pieces: little memtables, of which each leaves
//! small files, written past the page cache, and what is removed goes in pieces ([`crate::removal`]). Retention
//! gives blob files back by itself where all in them is gone, oldest first; what lies between what is kept is collected when it is
//! more than that (the broker asks for it).
//! A torn tail of the write-ahead log is accepted at start, nothing else: point-in-time recovery would open an
//! older state as if all were well.

use crate::direct;
use crate::keys::state::Standing;
use crate::keys::{self, log, offsets, state};
use crate::removal::Removal;
use crate::torn::torn_bytes;
use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBRecoveryMode, Direction, ErrorKind, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions,
};
use std::path::Path;
use weir_core::entry::{Context, Kind, entry_bytes};
use weir_core::eraftpb::Entry;
use weir_core::ids::{GroupId, ReplicaId};
use weir_core::storage::{Checkpoint, HardState, Store, StoreError, StoredGroup, WriteOp};

const LOG: &str = "log";
const OFFSETS: &str = "offsets";
const STATE: &str = "state";
const META: &str = "meta";
/// Values of at least this many bytes are kept in blob files once flushed.
const BLOB_BYTES_MIN: u64 = 1 << 10;
/// A memtable of the log is flushed at this size,
const MEMTABLE_BYTES: usize = 16 << 20;
/// and so much may be in all of them.
const MEMTABLES_BYTES: usize = 192 << 20;
/// What writers are slowed down to when the last memtable is begun, before they wait for a flush. RocksDB's own 16 MiB is a pause.
const DELAYED_BYTES_PER_SECOND: u64 = 128 << 20;
/// What is flushed goes to the disk in pieces of this size.
const PIECE_BYTES: u64 = 256 << 10;

/// See the module.
pub struct RocksStore {
    db: DB,
    removal: Removal,
    torn_bytes: u64,
}

/// About what an entry takes in a write beside its data: keys, its place by offset, the log's own fields.
const ENTRY_BYTES_MORE: usize = 160;

/// A key and its value.
type Row = (Box<[u8]>, Box<[u8]>);

fn io(error: rocksdb::Error) -> StoreError {
    match error.kind() {
        ErrorKind::Corruption => StoreError::Corrupt(error.into_string()),
        _ => StoreError::Io(error.into_string()),
    }
}

fn database_options(direct: bool) -> Options {
    // of what is flushed by way of the page cache so much is under way at most; the crate has no other way to say so
    let known = format!("strict_bytes_per_sync=true;delayed_write_rate={DELAYED_BYTES_PER_SECOND}");
    let mut options = Options::default().get_options_from_string(known).expect("RocksDB knows these options");
    options.set_bytes_per_sync(PIECE_BYTES);
    options.set_writable_file_max_buffer_size(PIECE_BYTES);
    options.set_use_direct_io_for_flush_and_compaction(direct);
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_total_wal_size(256 << 20); // what a start after a kill reads again
    options.set_db_write_buffer_size(MEMTABLES_BYTES);
    options.set_max_background_jobs(3);
    options.set_keep_log_file_num(3);
    options.set_max_open_files(512);
    options.set_skip_stats_update_on_db_open(true);
    options
}

fn log_options() -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(MEMTABLE_BYTES);
    options.set_max_write_buffer_number((MEMTABLES_BYTES / MEMTABLE_BYTES) as i32);
    options.set_enable_blob_files(true);
    options.set_min_blob_size(BLOB_BYTES_MIN);
    options.set_blob_file_size(256 << 20);
    // compaction moves keys only; what moves payloads is asked for, see `collect_garbage`
    options.set_enable_blob_gc(false);
    options.set_blob_gc_age_cutoff(1.0);
    // the tables hold keys and are small: many of them are no reason to let writers wait
    options.set_level_zero_slowdown_writes_trigger(200);
    options.set_level_zero_stop_writes_trigger(400);
    options.set_block_based_table_factory(&tables());
    options
}

fn small_options() -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(16 << 20);
    options.set_block_based_table_factory(&tables());
    options
}

fn tables() -> BlockBasedOptions {
    let mut tables = BlockBasedOptions::default();
    tables.set_bloom_filter(10.0, false);
    tables
}

impl RocksStore {
    /// Opens or creates the database in `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let families =
            [(LOG, log_options()), (OFFSETS, small_options()), (STATE, small_options()), (META, small_options())];
        let families = families.map(|(name, options)| ColumnFamilyDescriptor::new(name, options));
        std::fs::create_dir_all(path).map_err(|e| StoreError::Io(format!("{}: {e}", path.display())))?;
        let torn_bytes = torn_bytes(path).unwrap_or(0);
        let options = database_options(direct::works(path));
        let db = DB::open_cf_descriptors(&options, path, families).map_err(io)?;
        let removal = Removal::of(path).map_err(|e| StoreError::Io(format!("a thread: {e}")))?;
        Ok(Self { db, removal, torn_bytes })
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
        self.db.get_cf(self.family(META), key).map_err(io)
    }

    /// Writes and syncs a value of the broker itself.
    pub fn put_meta(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db.put_cf_opt(self.family(META), key, value, &options).map_err(io)
    }

    /// A number RocksDB keeps of itself, such as `rocksdb.estimate-live-data-size`.
    pub fn property(&self, name: &str) -> Option<u64> {
        self.db.property_int_value_cf(self.family(LOG), name).ok().flatten()
    }

    /// Bytes of blob files, with what is garbage in them.
    pub fn blob_bytes(&self) -> u64 {
        self.property("rocksdb.total-blob-file-size").unwrap_or(0)
    }

    /// Rewrites blob files without their garbage. Takes as long, and meanwhile as much room, as it takes to write what is kept.
    pub fn collect_garbage(&self) -> Result<(), StoreError> {
        let collect = |on: &str| {
            let options = [("enable_blob_garbage_collection", on)];
            self.db.set_options_cf(self.family(LOG), &options).map_err(io)
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

    /// Writes all there is in memory to tables and merges them, as happens by itself with time.
    pub fn compact(&self) -> Result<(), StoreError> {
        for name in [LOG, OFFSETS, STATE, META] {
            self.db.flush_cf(self.family(name)).map_err(io)?;
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
        match iterator.next().transpose().map_err(io)? {
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
        let row = self.db.iterator_cf_opt(self.family(OFFSETS), options, mode).next().transpose().map_err(io)?;
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
            let (key, value) = row.map_err(io)?;
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
        iterator.status().map_err(io)?;
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
        let Some((key, value)) = last.transpose().map_err(io)? else { return Ok(None) };
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
        let Some(value) = self.db.get_cf(self.family(STATE), key).map_err(io)? else { return Ok(None) };
        let damaged = || StoreError::Damaged { group, index, what: "its checkpoint's checksum differs".to_owned() };
        state::decode_checkpoint(&key, &value).map(Some).ok_or_else(damaged)
    }

    fn write(&self, ops: &[WriteOp]) -> Result<(), StoreError> {
        self.write_by(ops, &WriteOptions::default()).map_err(io)
    }

    fn try_write(&self, ops: &[WriteOp]) -> Result<bool, StoreError> {
        let mut options = WriteOptions::default();
        options.set_no_slowdown(true);
        match self.write_by(ops, &options) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Incomplete => Ok(false),
            Err(error) => Err(io(error)),
        }
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.db.flush_wal(true).map_err(io)
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
        self.db.write_opt(batch, options)?;
        self.removal.wrote(bytes as u64);
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
