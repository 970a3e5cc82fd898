//! The disk's last room. A file of some MiB stands beside the data; where the disk is low it goes, so that the store can be opened and
//! what is small can still be written (votes, acknowledgements, metadata, retention's deletions), while the core takes on no
//! more batches. Once there is room again it is put back.

use crate::metrics::Metrics;
use crate::node_loop::NodeHandle;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use weir_core::node::Disk;
use weir_store::rocks::RocksStore;
use weir_store::room::{DISK_BYTES_MIN, of, reserve_of};

/// Between two looks,
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// or less where there is little room: no disk takes more bytes a second than this.
const BYTES_PER_SECOND: u64 = 2 << 30;
/// and not less.
const LOOK_EVERY_MIN: Duration = Duration::from_millis(10);

/// See the module.
pub struct Room {
    folder: PathBuf,
    file: PathBuf,
    bytes: u64,
    disk: Disk,
    /// bytes of batches for which there is room until the next look
    room: u64,
    /// the file system sets no room aside
    without: bool,
}

/// Refuses a disk that is too small for a broker. One that cannot be looked at is taken.
pub fn check(data: &Path) -> Result<(), String> {
    match of(data) {
        Some((_, whole)) if whole < DISK_BYTES_MIN => Err(format!(
            "the disk of {} has {} MiB, and a broker needs {} at least: with less, what the store has to write would not fit beside what \
             it holds. Use a larger volume, or another folder",
            data.display(),
            whole >> 20,
            DISK_BYTES_MIN >> 20
        )),
        _ => Ok(()),
    }
}

impl Room {
    /// Looks at the disk of `data`, before its store is opened.
    pub fn open(data: &Path) -> Self {
        let bytes = of(data).map_or(0, |(_, whole)| reserve_of(whole));
        let file = data.join("reserve");
        let mut room = Self { folder: data.to_owned(), file, bytes, disk: Disk::Room, room: u64::MAX, without: false };
        room.look(0);
        room
    }

    /// Takes the reserve away or puts it back. What the store has in memory, `unflushed`, is to be written yet. A disk that cannot
    /// be looked at is as it was.
    fn look(&mut self, unflushed: u64) {
        let Some((free, _)) = of(&self.folder) else { return };
        let there = std::fs::metadata(&self.file).is_ok_and(|file| file.len() == self.bytes);
        let usable = (free + if there { self.bytes } else { 0 }).saturating_sub(unflushed);
        self.disk = stands(self.disk, usable, self.bytes, there);
        // a batch is written twice: into the log, and when it is flushed; half of what is kept back is for what is small
        self.room = usable.saturating_sub(self.bytes / 2) / 2;
        if self.disk != Disk::Room {
            let _ = std::fs::remove_file(&self.file);
        } else if !there && !self.without && free > 2 * self.bytes && self.put_back().is_err() {
            self.without = true;
            let _ = std::fs::remove_file(&self.file);
        }
    }

    fn put_back(&self) -> std::io::Result<()> {
        let file = std::fs::File::create(&self.file)?;
        Ok(rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, self.bytes)?)
    }

    /// Watches the disk as long as the node runs, and tells it.
    pub async fn watch(mut self, node: NodeHandle, store: Weak<RocksStore>, metrics: Arc<Metrics>) {
        let mut told = Disk::Room;
        let mut flush: Option<JoinHandle<()>> = None;
        while let Some(store) = store.upgrade() {
            self.look(store.unflushed_bytes());
            // what is in tables is in no log any more
            let is_idle = flush.as_ref().is_none_or(JoinHandle::is_finished);
            if self.disk != Disk::Room && is_idle && store.log_bytes() > self.bytes / 8 {
                flush = std::thread::Builder::new().name("weir-flush".into()).spawn(move || flush_all(&store)).ok();
            } else {
                drop(store);
            }
            let (disk, room) = (self.disk, self.room);
            if (disk == Disk::Room) != (told == Disk::Room) {
                metrics.disk_full.set((disk != Disk::Room).into());
                let folder = self.folder.display();
                match disk {
                    Disk::Room => tracing::info!(%folder, "the disk has room again"),
                    _ => {
                        tracing::error!(%folder, "the disk is full: no more messages are taken on until there is room")
                    }
                }
            }
            told = disk;
            if node.ask(move |node| node.set_disk(disk, room)).await.is_none() {
                return;
            }
            let filled_in = Duration::from_secs_f64(room as f64 / BYTES_PER_SECOND as f64);
            tokio::time::sleep(filled_in.clamp(LOOK_EVERY_MIN, LOOK_EVERY)).await;
        }
    }
}

/// How a disk stands of which so many bytes are `usable`, those of the reserve that is `there` among them, after it stood so `before`.
fn stands(before: Disk, usable: u64, reserve: u64, there: bool) -> Disk {
    let low = if there { 2 * reserve } else { reserve };
    match before {
        _ if usable < reserve / 16 => Disk::Exhausted,
        _ if usable < reserve / 8 => Disk::Spent,
        Disk::Spent | Disk::Exhausted if usable <= reserve / 4 => Disk::Spent,
        _ if usable < reserve / 2 => Disk::Full,
        Disk::Full | Disk::Spent | Disk::Exhausted if usable <= reserve => Disk::Full,
        Disk::Room if usable >= low => Disk::Room,
        // with the reserve put back, half as much again is left
        _ if usable > 2 * reserve + reserve / 2 => Disk::Room,
        _ => Disk::Low,
    }
}

fn flush_all(store: &RocksStore) {
    if let Err(error) = store.flush() {
        tracing::warn!(%error, "cannot write out what is in memory, to give room of the log back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_fills_passes_through_all_states_and_goes_back_only_with_more_room() {
        let seen = |usable: &mut dyn Iterator<Item = u64>| {
            let mut disk = Disk::Room;
            let mut seen = Vec::new();
            for usable in usable {
                let next = stands(disk, usable, 64, disk == Disk::Room);
                if next != disk {
                    seen.push((next, usable));
                }
                disk = next;
            }
            seen
        };
        let mut down_and_up = (0..=400).rev().chain(1..=400);
        let down = [(Disk::Low, 127), (Disk::Full, 31), (Disk::Spent, 7), (Disk::Exhausted, 3)];
        let back = [(Disk::Spent, 4), (Disk::Full, 17), (Disk::Low, 65), (Disk::Room, 161)];
        assert_eq!(seen(&mut down_and_up), [down, back].concat());
        assert_eq!(stands(Disk::Room, 100, 64, false), Disk::Room, "there was never a reserve");
        assert_eq!(stands(Disk::Room, 10, 64, false), Disk::Full);
    }

    #[test]
    fn there_is_a_reserve_where_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let room = Room::open(folder.path());
        assert_eq!(room.disk, Disk::Room);
        let held = std::fs::metadata(folder.path().join("reserve")).unwrap();
        assert!(held.len() == room.bytes && room.bytes > 0, "{} of {} bytes", held.len(), room.bytes);
    }
}
