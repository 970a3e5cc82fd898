//! Records out of batches, for subscriptions that look at them one by one. A batch may hold many times its bytes once it is decompressed,
//! and its records more again as values in memory: all of it is taken from one budget for the broker, before it is decompressed.
//! What takes long is done on threads of its own, a few at a time, so that the threads that all share never wait for one subscription.

use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use weir_proto::records::{self, Record};

/// Bytes of decompressed records in one broker.
pub const UNPACKED_BYTES_MAX: usize = 256 << 20;
/// What decompresses to less is decompressed where it is wanted.
const INLINE_BYTES_MAX: usize = 256 << 10;
/// Bytes of a header in memory, beside its value.
const HEADER_BYTES: usize = 96;
/// Headers for which there is room at first; a batch with more is unpacked again, with room for all it may have.
const HEADERS_A_RECORD: usize = 4;

/// See the module.
#[derive(Clone)]
pub struct Unpacker {
    /// KiB of [`UNPACKED_BYTES_MAX`]
    room: Arc<Semaphore>,
    /// who may use a processor for longer
    turns: Arc<Semaphore>,
}

impl Default for Unpacker {
    fn default() -> Self {
        let turns = std::thread::available_parallelism().map_or(1, |n| (n.get() / 4).max(1));
        Self { room: Arc::new(Semaphore::new(UNPACKED_BYTES_MAX / 1024)), turns: Arc::new(Semaphore::new(turns)) }
    }
}

/// What unpacking a batch needs.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    kib: u32,
    headers: u64,
    bytes: usize,
}

/// A batch's records, and the room they take.
pub struct Unpacked {
    /// The records, or why they cannot be decoded.
    pub records: Result<Vec<Record>, String>,
    room: OwnedSemaphorePermit,
}

impl Unpacked {
    /// Bytes taken of the budget.
    pub fn bytes(&self) -> usize {
        self.room.num_permits() * 1024
    }
}

impl Need {
    /// Whether there is as much room as is needed.
    pub fn fits(&self, room: &OwnedSemaphorePermit) -> bool {
        room.num_permits() >= self.kib as usize
    }
}

impl Unpacker {
    /// What a batch needs.
    pub fn need(batch: &Bytes) -> Need {
        let bytes = records::unfolding_bytes_max(batch);
        let count = records::count(batch);
        let headers = count.saturating_mul(HEADERS_A_RECORD).saturating_add(1_000);
        Self::room_for(bytes, count, headers as u64)
    }

    fn room_for(bytes: usize, count: usize, headers: u64) -> Need {
        let all = bytes
            .saturating_add(count.saturating_mul(size_of::<Record>()))
            .saturating_add((headers as usize).saturating_mul(HEADER_BYTES));
        let kib = all.min(UNPACKED_BYTES_MAX).div_ceil(1024).max(1) as u32;
        Need { kib, headers, bytes }
    }

    /// Room, if there is any now.
    pub fn try_room(&self, need: Need) -> Option<OwnedSemaphorePermit> {
        self.room.clone().try_acquire_many_owned(need.kib).ok()
    }

    /// Waits for room, in turn. Who waits holds none: else two could wait for each other.
    pub async fn room(&self, need: Need) -> OwnedSemaphorePermit {
        self.room.clone().acquire_many_owned(need.kib).await.expect("never closed")
    }

    /// Whether less is free than one batch may need.
    pub fn is_scarce(&self) -> bool {
        self.room.available_permits() * 1024 < records::READ_BYTES_MAX
    }

    /// Unpacks a batch within the room for it. A batch with unusually many headers gives back its need instead.
    pub async fn unpack(&self, batch: &Bytes, need: Need, room: OwnedSemaphorePermit) -> Result<Unpacked, Need> {
        let decode = {
            let batch = batch.clone();
            move || records::decode_within(&batch, need.bytes, need.headers)
        };
        let decoded = self.of_size(need.bytes, decode).await;
        match decoded {
            Ok(records) => Ok(Unpacked { records: Ok(records), room }),
            Err(records::Undecodable::Headers) if need.headers < records::HEADERS_MAX => {
                Err(Self::room_for(need.bytes, records::count(batch), records::HEADERS_MAX))
            }
            Err(error) => Ok(Unpacked { records: Err(error.to_string()), room }),
        }
    }

    /// Does what takes as long as this many bytes take: on a thread of its own where they are many.
    pub async fn of_size<T: Send + 'static>(&self, bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
        if bytes > INLINE_BYTES_MAX { self.at_length(work).await } else { work() }
    }

    /// Does what may take long on a thread of its own, when its turn comes.
    pub async fn at_length<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _turn = self.turn().await;
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// The right to use a processor for longer than others.
    pub async fn turn(&self) -> OwnedSemaphorePermit {
        self.turns.clone().acquire_owned().await.expect("never closed")
    }
}
