//! What the node's thread publishes for everybody else: metadata, leaders, partitions' tails and high watermarks.

use crate::node_loop::{Event, NodeHandle};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use weir_core::ids::{BrokerId, GroupId, META_GROUP};
use weir_core::incarnation::Standing;
use weir_core::meta::index::Metadata;
use weir_core::rate::Bucket;
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
    /// Replicas here that have not had all that was committed since this broker started; see [`crate::catch_up`].
    pub lacking: AtomicUsize,
    /// Incarnation of this broker's data, as it is on its disk; 0 while it does not take part.
    pub incarnation: AtomicU64,
    /// Whether this broker takes part, and the brokers whose volumes are known to be rolled back.
    standing: RwLock<(Standing, BTreeSet<BrokerId>)>,
    /// what may be published to partitions led here whose publishers are slowed
    paces: RwLock<HashMap<GroupId, Arc<Mutex<Bucket>>>>,
    /// how many there are
    slowed: AtomicUsize,
    /// The metadata as applied here.
    pub meta: watch::Sender<Arc<Metadata>>,
    /// Replicas here that could not be opened and that nobody replaces: the broker serves without them.
    pub not_opened: HashSet<GroupId>,
    leaders: RwLock<HashMap<GroupId, (u64, BrokerId)>>,
    partitions: RwLock<HashMap<GroupId, Slot>>,
    store: Arc<RocksStore>,
    node: NodeHandle,
    started: Instant,
}

/// A publisher that is slowed looks at least this often whether it still is, ms.
const PACE_WAIT_MS_MAX: u64 = 200;

impl Shared {
    /// Of a broker.
    pub fn new(broker: BrokerId, store: Arc<RocksStore>, node: NodeHandle, not_opened: HashSet<GroupId>) -> Self {
        let (meta, _) = watch::channel(Arc::default());
        Self {
            broker,
            stalled_ms: AtomicU64::new(0),
            lacking: AtomicUsize::new(usize::MAX),
            incarnation: AtomicU64::new(0),
            standing: RwLock::default(),
            paces: RwLock::default(),
            slowed: AtomicUsize::new(0),
            meta,
            not_opened,
            leaders: RwLock::default(),
            partitions: RwLock::default(),
            store,
            node,
            started: Instant::now(),
        }
    }

    /// Whether this broker takes part, and if not, why.
    pub fn standing(&self) -> Standing {
        self.standing.read().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Brokers whose volumes are known to be rolled back.
    pub fn rolled_back(&self) -> BTreeSet<BrokerId> {
        self.standing.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    pub(crate) fn set_standing(&self, standing: Option<Standing>, rolled_back: Option<BTreeSet<BrokerId>>) {
        let mut held = self.standing.write().unwrap_or_else(PoisonError::into_inner);
        held.0 = standing.unwrap_or(held.0);
        if let Some(rolled_back) = rolled_back {
            held.1 = rolled_back;
        }
    }

    pub(crate) fn set_pace(&self, group: GroupId, limit: Option<u64>, now_ms: u64) {
        let mut paces = self.paces.write().unwrap_or_else(PoisonError::into_inner);
        match limit {
            // a twentieth of a second at once
            Some(limit) => paces.insert(group, Arc::new(Mutex::new(Bucket::new(limit, limit / 20, now_ms)))),
            None => paces.remove(&group),
        };
        self.slowed.store(paces.len(), Ordering::Release);
    }

    /// Waits until `bytes` may be published to a partition whose publishers are slowed; at once elsewhere.
    pub async fn keep_pace(&self, group: GroupId, bytes: usize) {
        while self.slowed.load(Ordering::Acquire) > 0 {
            let pace = self.paces.read().unwrap_or_else(PoisonError::into_inner).get(&group).cloned();
            let Some(pace) = pace else { return };
            let wait_ms = {
                let mut bucket = pace.lock().unwrap_or_else(PoisonError::into_inner);
                if bucket.available(self.pace_ms()) > 0 {
                    bucket.take(bytes as u64);
                    return;
                }
                bucket.wait_ms().unwrap_or(0).clamp(1, PACE_WAIT_MS_MAX)
            };
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        }
    }

    /// Time of [`Self::set_pace`], ms.
    pub(crate) fn pace_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The metadata.
    pub fn meta(&self) -> Arc<Metadata> {
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
