//! The memory that messages may take in a broker while they are on their way: published and not yet committed, or read and not yet
//! written to a socket. One budget of bytes for the whole broker; a connection gets a part of what is free, so that no
//! number of slow readers uses it up. It is free again when the last byte has left, however slowly an HTTP/2 window opens.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of messages on their way in one broker.
pub const UNDER_WAY_BYTES_MAX: usize = 256 << 20;
/// The part of them that answers may take: publishers always have the rest.
pub const ANSWERS_BYTES_MAX: usize = 128 << 20;
/// Most bytes of one answer, or one message where that alone is larger: what clients of gRPC take with usual settings is 4 MiB.
pub const ANSWER_BYTES_MAX: usize = 3 << 20;
/// Size of an answer for which there is always a place, bytes, once anything is free.
const ANSWER_BYTES_MIN: usize = 64 << 10;
/// One connection's answers may take this part of what is free.
const CONNECTION_SHARE: usize = 4;
/// One answer may take this part of what is free.
const ANSWER_SHARE: usize = 16;
/// Wait before an answer for which there was no room is tried again.
const RETRY: Duration = Duration::from_millis(10);

fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024).max(1)).unwrap_or(u32::MAX)
}

/// See the module.
#[derive(Clone)]
pub struct Budget {
    /// KiB of everything
    all: Arc<Semaphore>,
    /// KiB of answers, which are of `all` too
    answers: Arc<Semaphore>,
}

impl Default for Budget {
    fn default() -> Self {
        let semaphore = |bytes: usize| Arc::new(Semaphore::new(bytes / 1024));
        Self { all: semaphore(UNDER_WAY_BYTES_MAX), answers: semaphore(ANSWERS_BYTES_MAX) }
    }
}

impl Budget {
    /// Waits until a publish of this size has room.
    pub async fn publish(&self, bytes: usize) -> OwnedSemaphorePermit {
        self.all.clone().acquire_many_owned(Self::of_publish(bytes)).await.expect("never closed")
    }

    /// Room for a publish of this size, if there is any now.
    pub fn try_publish(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        self.all.clone().try_acquire_many_owned(Self::of_publish(bytes)).ok()
    }

    fn of_publish(bytes: usize) -> u32 {
        kib(bytes).min(((UNDER_WAY_BYTES_MAX - ANSWERS_BYTES_MAX) / 1024) as u32)
    }

    /// The answers of one connection.
    pub fn answers(&self, connection: Arc<Connection>) -> Answers {
        Answers { budget: self.clone(), connection }
    }

    fn free(&self) -> usize {
        self.answers.available_permits().min(self.all.available_permits()).saturating_mul(1024)
    }
}

/// What one connection's answers take now, bytes.
#[derive(Debug, Default)]
pub struct Connection(AtomicUsize);

/// Room for the answers to one connection.
#[derive(Clone)]
pub struct Answers {
    budget: Budget,
    connection: Arc<Connection>,
}

impl Answers {
    /// Bytes that the connection's next answer should have at most; what is free is divided so that something always is.
    pub fn room(&self) -> usize {
        let free = self.budget.free();
        let of_connection = (free / CONNECTION_SHARE).saturating_sub(self.connection.0.load(Ordering::Relaxed));
        of_connection.min(free / ANSWER_SHARE).max(ANSWER_BYTES_MIN)
    }

    /// Takes room for an answer, if there is any now. A connection without answers under way gets one of any size.
    pub fn try_take(&self, bytes: usize) -> Option<Held> {
        let held = self.connection.0.load(Ordering::Relaxed);
        let share = self.budget.free() / CONNECTION_SHARE;
        if held > 0 && held.saturating_add(bytes) > share {
            return None;
        }
        let kib = kib(bytes).min((ANSWERS_BYTES_MAX / 1024) as u32);
        let answers = self.budget.answers.clone().try_acquire_many_owned(kib).ok()?;
        let all = self.budget.all.clone().try_acquire_many_owned(kib).ok()?;
        let bytes = answers.num_permits() * 1024;
        self.connection.0.fetch_add(bytes, Ordering::Relaxed);
        Some(Held { answers, all, connection: self.connection.clone() })
    }

    /// As [`Self::try_take`]; waits until there is room.
    pub async fn take(&self, bytes: usize) -> Held {
        loop {
            if let Some(held) = self.try_take(bytes) {
                return held;
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Bytes taken from the budget; dropped, they are free again.
#[derive(Debug)]
pub struct Held {
    answers: OwnedSemaphorePermit,
    all: OwnedSemaphorePermit,
    connection: Arc<Connection>,
}

impl Held {
    /// Bytes taken.
    pub fn bytes(&self) -> usize {
        self.answers.num_permits() * 1024
    }

    /// Gives back what is more than `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        let more = self.answers.num_permits().saturating_sub(kib(bytes) as usize);
        if more > 0 {
            drop((self.answers.split(more), self.all.split(more)));
            self.connection.0.fetch_sub(more * 1024, Ordering::Relaxed);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.connection.0.fetch_sub(self.bytes(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_readers_leave_room_for_others_and_for_publishers() {
        let budget = Budget::default();
        let mut held = Vec::new();
        for _ in 0..16 {
            let slow = budget.answers(Default::default());
            while let Some(more) = slow.try_take(slow.room().min(ANSWER_BYTES_MAX)) {
                held.push(more);
            }
        }
        let taken: usize = held.iter().map(Held::bytes).sum();
        assert!(taken < ANSWERS_BYTES_MAX, "{taken}");
        let other = budget.answers(Default::default());
        assert!(other.try_take(ANSWER_BYTES_MIN).is_some(), "another connection still has its share");
        let publishers = budget.all.available_permits() * 1024;
        assert!(publishers >= UNDER_WAY_BYTES_MAX - ANSWERS_BYTES_MAX, "{publishers}");
        held.clear();
        assert_eq!(budget.free(), ANSWERS_BYTES_MAX);
    }

    #[test]
    fn what_is_given_back_early_is_free_and_a_large_message_has_room_alone() {
        let budget = Budget::default();
        let answers = budget.answers(Default::default());
        let mut held = answers.try_take(34 << 20).unwrap();
        assert!(answers.try_take(34 << 20).is_none(), "a second one waits");
        held.shrink_to(1000);
        assert_eq!((held.bytes(), answers.connection.0.load(Ordering::Relaxed)), (1024, 1024));
        drop(held);
        assert_eq!((budget.free(), answers.connection.0.load(Ordering::Relaxed)), (ANSWERS_BYTES_MAX, 0));
        assert!(answers.try_take(usize::MAX).is_some(), "more than there is waits for all there is");
    }
}
