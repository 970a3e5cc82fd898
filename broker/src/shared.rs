//! What the node's thread publishes for everybody else: metadata, leaders, partitions' tails and high watermarks.

use crate::node_loop::{Event, NodeHandle};
use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::watch;
use weir_core::ids::{BrokerId, GroupId, META_GROUP};
use weir_core::meta::state::MetaState;
use weir_core::storage::{Store, StoreError};
use weir_core::tail::{LogBatch, Tail};
use weir_store::rocks::RocksStore;

/// How far a partition held here is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// One past the last record that is known to be committed.
    pub high_watermark: u64,
    /// The term in which this broker leads it and knows all that was committed before: [`weir_core::group::Group::serves`].
    pub serving: Option<u64>,
}

/// A partition held here, for readers.
#[derive(Clone)]
pub struct Partition {
    /// Its group.
    pub group: GroupId,
    /// Recent entries.
    pub tail: Arc<Tail>,
    /// Moves with the high watermark, and with leadership.
    pub progress: watch::Receiver<Progress>,
    store: Arc<RocksStore>,
    node: NodeHandle,
}

impl Partition {
    /// The term in which this broker serves the partition, if it does.
    pub fn serving(&self) -> Option<u64> {
        self.progress.borrow().serving
    }

    /// Committed batches from `offset` on: from memory where they are recent, else from the store.
    pub async fn read(&self, offset: u64, bytes_max: usize) -> Result<Vec<LogBatch>, StoreError> {
        if let Some(batches) = self.tail.batches(offset, bytes_max) {
            return Ok(batches);
        }
        let this = self.clone();
        let read = tokio::task::spawn_blocking(move || this.read_store(offset, bytes_max)).await;
        let read = read.map_err(|e| StoreError::Io(e.to_string()))?;
        if let Err(error) = &read
            && error.is_damage()
        {
            self.node.send(Event::Damage(self.group, error.clone()));
        }
        read
    }

    fn read_store(&self, offset: u64, bytes_max: usize) -> Result<Vec<LogBatch>, StoreError> {
        let high = self.tail.first_index();
        let Some(low) = self.store.locate_offset(self.group, offset)?.filter(|low| *low < high) else {
            return Ok(self.tail.batches(offset, bytes_max).unwrap_or_default());
        };
        let limit = self.tail.high_watermark();
        let entries = self.store.entries(self.group, low, high, bytes_max as u64)?;
        Ok(entries.iter().filter_map(LogBatch::of).filter(|b| b.end_offset() <= limit).collect())
    }

    /// Offset of the first record appended at or after `time_ms`, or the high watermark.
    pub fn offset_at(&self, time_ms: u64) -> Result<u64, StoreError> {
        let high_watermark = self.tail.high_watermark();
        let found = self.tail.offset_at(&*self.store, self.group, time_ms)?;
        Ok(found.map_or(high_watermark, |offset| offset.min(high_watermark)))
    }
}

struct Slot {
    tail: Arc<Tail>,
    progress: watch::Sender<Progress>,
}

/// See the module.
pub struct Shared {
    /// This broker; 0 before it has joined.
    pub broker: BrokerId,
    /// For how long nothing has come of what this broker tries, ms; see [`weir_core::node::Node::stalled`].
    pub stalled_ms: AtomicU64,
    /// The metadata as applied here.
    pub meta: watch::Sender<Arc<MetaState>>,
    leaders: RwLock<HashMap<GroupId, (u64, BrokerId)>>,
    partitions: RwLock<HashMap<GroupId, Slot>>,
    store: Arc<RocksStore>,
    node: NodeHandle,
}

impl Shared {
    /// Of a broker.
    pub fn new(broker: BrokerId, store: Arc<RocksStore>, node: NodeHandle) -> Self {
        let (meta, _) = watch::channel(Arc::default());
        Self {
            broker,
            stalled_ms: AtomicU64::new(0),
            meta,
            leaders: RwLock::default(),
            partitions: RwLock::default(),
            store,
            node,
        }
    }

    /// The metadata.
    pub fn meta(&self) -> Arc<MetaState> {
        self.meta.borrow().clone()
    }

    /// A partition held here.
    pub fn partition(&self, group: GroupId) -> Option<Partition> {
        let partitions = self.partitions.read().unwrap_or_else(PoisonError::into_inner);
        let slot = partitions.get(&group)?;
        let (tail, progress) = (slot.tail.clone(), slot.progress.subscribe());
        Some(Partition { group, tail, progress, store: self.store.clone(), node: self.node.clone() })
    }

    /// Who leads a group.
    pub fn leader(&self, group: GroupId) -> Option<BrokerId> {
        self.leaders.read().unwrap_or_else(PoisonError::into_inner).get(&group).map(|(_, broker)| *broker)
    }

    /// Whether this broker leads a group, and takes what is published; what it says of the log holds once it
    /// [serves](Progress::serving).
    pub fn leads(&self, group: GroupId) -> bool {
        self.leader(group) == Some(self.broker)
    }

    /// Whether this broker leads a group and knows all that was committed before.
    pub fn serves(&self, group: GroupId) -> bool {
        let partitions = self.partitions.read().unwrap_or_else(PoisonError::into_inner);
        partitions.get(&group).is_some_and(|slot| slot.progress.borrow().serving.is_some())
    }

    /// Who leads the metadata group.
    pub fn controller(&self) -> Option<BrokerId> {
        self.leader(META_GROUP)
    }

    pub(crate) fn set_leader(&self, group: GroupId, leader: Option<(u64, BrokerId)>, serving: Option<u64>) {
        let mut leaders = self.leaders.write().unwrap_or_else(PoisonError::into_inner);
        match leader {
            Some(leader) => leaders.insert(group, leader),
            None => leaders.remove(&group),
        };
        drop(leaders);
        self.progressed(group, |progress| progress.serving = serving);
    }

    pub(crate) fn set_partition(&self, group: GroupId, tail: Option<Arc<Tail>>) {
        let mut partitions = self.partitions.write().unwrap_or_else(PoisonError::into_inner);
        let gone = match tail {
            Some(tail) => {
                let (progress, _) = watch::channel(Progress { high_watermark: tail.high_watermark(), serving: None });
                partitions.insert(group, Slot { tail, progress })
            }
            None => partitions.remove(&group),
        };
        if let Some(gone) = gone {
            gone.progress.send_modify(|progress| progress.serving = None); // who reads it still is not to take it for a leader's
        }
    }

    pub(crate) fn advanced(&self, group: GroupId, offset: u64) {
        self.progressed(group, |progress| progress.high_watermark = offset);
    }

    fn progressed(&self, group: GroupId, change: impl FnOnce(&mut Progress)) {
        let partitions = self.partitions.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = partitions.get(&group) {
            slot.progress.send_modify(change);
        }
    }
}
