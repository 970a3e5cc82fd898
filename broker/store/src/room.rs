//! How much of a disk the store needs for itself. What it holds in memory is in the write-ahead log and is written a second time when
//! a memtable is flushed, also at its next opening, and compaction writes before it removes. So a part of each disk is kept
//! back from messages, and on a small one the store has less in memory and in its log, in proportion.

use std::path::Path;

/// What is kept back on a large disk, bytes: more than the store has in memory.
const RESERVE_BYTES_MAX: u64 = 256 << 20;
/// What is kept back on any disk, bytes: the least with which the store can do its work.
const RESERVE_BYTES_MIN: u64 = 64 << 20;
/// A disk smaller than this is refused, bytes: beside what is kept back, the log and what is in memory, half of it is for messages.
pub const DISK_BYTES_MIN: u64 = 8 * RESERVE_BYTES_MIN;

/// Free and whole bytes of the disk of a folder.
pub fn of(folder: &Path) -> Option<(u64, u64)> {
    rustix::fs::statvfs(folder).ok().map(|d| (d.f_bavail * d.f_frsize, d.f_blocks * d.f_frsize))
}

/// What is kept back on a disk of so many bytes: a 16th of it, within bounds.
pub fn reserve_of(disk_bytes: u64) -> u64 {
    (disk_bytes / 16).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
}

/// Sizes of a store, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// A memtable is flushed at this size.
    pub(crate) memtable: u64,
    /// In all memtables.
    pub(crate) memtables: u64,
    /// Of write-ahead logs.
    pub(crate) log: u64,
    /// On a small disk; `None`: as RocksDB has them.
    pub(crate) small: Option<Small>,
}

/// Sizes on a small disk, bytes: nothing that compaction writes before it removes is large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Small {
    /// Of the first level of tables.
    pub(crate) level: u64,
    /// Of one table.
    pub(crate) table: u64,
    /// Of one compaction.
    pub(crate) compaction: u64,
}

impl Sizes {
    /// Those for a disk of so many bytes.
    pub(crate) fn of(disk_bytes: u64) -> Self {
        let reserve = reserve_of(disk_bytes);
        let small = Small { level: reserve / 4, table: reserve / 16, compaction: reserve / 4 };
        let small = (reserve < RESERVE_BYTES_MAX).then_some(small);
        let log = if small.is_some() { reserve / 2 } else { reserve };
        Self { memtable: reserve / 16, memtables: reserve / 4 * 3, log, small }
    }

    /// Those for the disk of a folder; of a large one where it cannot be looked at.
    pub(crate) fn at(folder: &Path) -> Self {
        Self::of(of(folder).map_or(u64::MAX, |(_, whole)| whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_has_to_write_fits_into_what_is_kept_back() {
        let mib = 1 << 20;
        assert_eq!(Sizes::of(1 << 40), Sizes { memtable: 16 * mib, memtables: 192 * mib, log: 256 * mib, small: None });
        for disk in [0, DISK_BYTES_MIN, 1 << 30, 3 << 30, 4 << 30, u64::MAX] {
            let (sizes, reserve) = (Sizes::of(disk), reserve_of(disk));
            assert!(sizes.memtables + sizes.memtable <= reserve, "{disk}");
            assert!(sizes.log <= reserve, "{disk}");
            assert!(sizes.small.is_none_or(|s| s.level.max(s.compaction) <= reserve / 4), "{disk}");
        }
        let (sizes, reserve) = (Sizes::of(DISK_BYTES_MIN), reserve_of(DISK_BYTES_MIN));
        assert!(2 * reserve + sizes.log + sizes.memtables <= DISK_BYTES_MIN / 2, "half of it is for messages");
    }
}
