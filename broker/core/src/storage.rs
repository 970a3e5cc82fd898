//! What the core asks of a disk. Implemented in `weir-store` over RocksDB and over memory.
//! Writes are gathered into rounds: one atomic batch over all groups, then (at most) one sync.

use crate::entry::Context;
use crate::ids::{BrokerId, GroupId, ReplicaId};
use crate::incarnation::Incarnation;
use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry};
use thiserror::Error;

/// A failed read or write.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// Data that was written is not what is read back: checksum, continuity or encoding.
    #[error("group {group}: damaged at index {index}: {what}")]
    Damaged { group: GroupId, index: u64, what: String },
    /// The entries asked for were removed by retention.
    #[error("group {group}: index {index} was removed by retention")]
    Compacted { group: GroupId, index: u64 },
    /// The store itself found its files damaged.
    #[error("damaged: {0}")]
    Corrupt(String),
    /// The write-ahead log lacks writes that were synced.
    #[error(
        "the data was synced up to write {synced}, and what is there ends at write {found}: {} acknowledged records are lost",
        records.map_or("an unknown number of".to_owned(), |n| n.to_string())
    )]
    Lost { synced: u64, found: u64, records: Option<u64> },
    /// The disk said no. After a failed write or sync the process must end.
    #[error("{0}")]
    Io(String),
}

impl StoreError {
    /// Whether what was once synced is not what is there now: no retry helps, the data must be had from elsewhere.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Corrupt(_) | Self::Lost { .. })
    }
}

/// Raft's hard state: what must be synced before it is told to anyone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// Current term.
    pub term: u64,
    /// Replica voted for in that term, 0 for none.
    pub vote: u64,
    /// Highest index known committed (may lag).
    pub commit: u64,
}

/// A group's applied state at one index. The oldest one is also the group's truncation point,
/// and what a follower that is too far behind is given before the log that follows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Checkpoint {
    /// Raft index up to which everything is applied in `state`.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// Term of that index.
    #[prost(uint64, tag = "2")]
    pub term: u64,
    /// Voters (incoming, where the configuration is joint).
    #[prost(uint64, repeated, tag = "3")]
    pub voters: Vec<u64>,
    /// Learners.
    #[prost(uint64, repeated, tag = "4")]
    pub learners: Vec<u64>,
    /// Outgoing voters of a joint configuration.
    #[prost(uint64, repeated, tag = "5")]
    pub voters_outgoing: Vec<u64>,
    /// Learners once the joint configuration is left.
    #[prost(uint64, repeated, tag = "6")]
    pub learners_next: Vec<u64>,
    /// Whether the joint configuration is left automatically.
    #[prost(bool, tag = "7")]
    pub auto_leave: bool,
    /// Next offset: the high watermark at this point.
    #[prost(uint64, tag = "8")]
    pub next_offset: u64,
    /// Bytes of entries from the group's beginning up to here.
    #[prost(uint64, tag = "9")]
    pub log_bytes: u64,
    /// Append time of the last entry, ms since the epoch.
    #[prost(uint64, tag = "10")]
    pub append_time_ms: u64,
    /// The state machine's own encoding.
    #[prost(bytes = "bytes", tag = "11")]
    pub state: Bytes,
}

impl Checkpoint {
    /// The membership at this point.
    pub fn conf_state(&self) -> ConfState {
        ConfState {
            voters: self.voters.clone(),
            learners: self.learners.clone(),
            voters_outgoing: self.voters_outgoing.clone(),
            learners_next: self.learners_next.clone(),
            auto_leave: self.auto_leave,
            ..Default::default()
        }
    }

    /// Takes over a membership.
    pub fn set_conf_state(&mut self, conf: &ConfState) {
        self.voters = conf.voters.clone();
        self.learners = conf.learners.clone();
        self.voters_outgoing = conf.voters_outgoing.clone();
        self.learners_next = conf.learners_next.clone();
        self.auto_leave = conf.auto_leave;
    }
}

/// One change to the store. A round is a list of them, applied in order, atomically.
#[derive(Clone, Debug)]
pub enum WriteOp {
    /// A new replica; without a checkpoint it waits for one from its leader.
    Create { group: GroupId, replica: ReplicaId, checkpoint: Option<Checkpoint> },
    /// Appends entries; before that, removes all from `replace_from` = (index, offset) on.
    Append { group: GroupId, entries: Vec<Entry>, replace_from: Option<(u64, u64)> },
    /// Replaces the hard state.
    SetHardState { group: GroupId, hard: HardState },
    /// Adds a checkpoint.
    PutCheckpoint { group: GroupId, checkpoint: Checkpoint },
    /// Removes one checkpoint (thinning).
    DropCheckpoint { group: GroupId, index: u64 },
    /// Retention: removes entries up to and including `index`, all of offsets below `offset`, and older checkpoints.
    Truncate { group: GroupId, index: u64, offset: u64 },
    /// Replaces log and checkpoints by one checkpoint from the leader.
    Install { group: GroupId, checkpoint: Checkpoint },
    /// Marks the replica as damaged: it never takes part again.
    Quarantine { group: GroupId, replica: ReplicaId },
    /// Removes everything of the group, except that this replica once was here: it is never made again.
    Destroy { group: GroupId, replica: ReplicaId },
    /// Remembers the newest incarnation of a broker, of this one too.
    Incarnation { broker: BrokerId, incarnation: Incarnation },
}

/// What a store holds of one group at start.
#[derive(Clone, Debug)]
pub struct StoredGroup {
    /// The group.
    pub group: GroupId,
    /// Which replica of it this is.
    pub replica: ReplicaId,
    /// Found damaged before.
    pub quarantined: bool,
    /// Removed by a recorded decision: only its replica id is left.
    pub destroyed: bool,
    /// Hard state, default for a replica that never had one.
    pub hard: HardState,
    /// Checkpoints, oldest first; empty for a replica that waits for its first.
    pub checkpoints: Vec<Checkpoint>,
    /// Index of the last entry, or of the newest checkpoint where there is none after it.
    pub last_index: u64,
}

/// Durable storage of many groups.
pub trait Store: Send + Sync + 'static {
    /// All groups held.
    fn load(&self) -> Result<Vec<StoredGroup>, StoreError>;
    /// Incarnations remembered, see [`WriteOp::Incarnation`].
    fn incarnations(&self) -> Result<Vec<(BrokerId, Incarnation)>, StoreError>;
    /// Entries `low..high` in order without gaps, at least one, stopping after `bytes_max`. Verified.
    fn entries(&self, group: GroupId, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, StoreError>;
    /// Index of the first entry that holds an offset at or above `offset`.
    fn locate_offset(&self, group: GroupId, offset: u64) -> Result<Option<u64>, StoreError>;
    /// Index of the first entry from which on a record at or after `time_ms` may stand.
    fn locate_time(&self, group: GroupId, time_ms: u64) -> Result<Option<u64>, StoreError>;
    /// Offset of the first record of that entry: what reads from `time_ms` on.
    fn offset_at(&self, group: GroupId, time_ms: u64) -> Result<Option<u64>, StoreError> {
        let Some(index) = self.locate_time(group, time_ms)? else { return Ok(None) };
        let entry = self.entries(group, index, index + 1, 0)?;
        Ok(entry.first().and_then(Context::of).map(|c| c.base_offset))
    }
    /// A checkpoint by index.
    fn checkpoint(&self, group: GroupId, index: u64) -> Result<Option<Checkpoint>, StoreError>;
    /// Applies a round atomically; readable afterwards, durable only after [`Self::sync`].
    fn write(&self, ops: &[WriteOp]) -> Result<(), StoreError>;
    /// As [`Self::write`], where that does not mean to wait for what runs in the background; false where it would, and nothing was
    /// written.
    fn try_write(&self, ops: &[WriteOp]) -> Result<bool, StoreError> {
        self.write(ops).map(|()| true)
    }
    /// Makes all that was written durable.
    fn sync(&self) -> Result<(), StoreError>;
}
