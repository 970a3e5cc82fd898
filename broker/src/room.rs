//! The disk's last room. A file of some MiB stands beside the data; where the disk is low it goes, so that the store can be opened and
//! what is small can still be written (votes, acknowledgements, metadata, retention's deletions), while the core takes on no
//! more batches. Once there is room again it is put back.

use crate::metrics::Metrics;
use crate::node_loop::NodeHandle;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use weir_core::node::Disk;

/// What is kept back on a large disk, bytes (more than the store may have in memory to write at its next opening); a 16th of a
/// small one.
const RESERVE_BYTES_MAX: u64 = 256 << 20;
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// See the module.
pub struct Room {
    folder: PathBuf,
    file: PathBuf,
    bytes: u64,
    disk: Disk,
    /// the file system sets no room aside
    without: bool,
}

/// Free and whole bytes of the disk of a folder.
pub fn of(folder: &Path) -> Option<(u64, u64)> {
    rustix::fs::statvfs(folder).ok().map(|d| (d.f_bavail * d.f_frsize, d.f_blocks * d.f_frsize))
}

/// What is kept back on a disk of so many bytes.
pub fn reserve_of(disk_bytes: u64) -> u64 {
    (disk_bytes / 16).min(RESERVE_BYTES_MAX)
}

impl Room {
    /// Looks at the disk of `data`, before its store is opened.
    pub fn open(data: &Path) -> Self {
        let bytes = of(data).map_or(0, |(_, whole)| reserve_of(whole));
        let file = data.join("reserve");
        let mut room = Self { folder: data.to_owned(), file, bytes, disk: Disk::Room, without: false };
        room.look();
        room
    }

    /// Takes the reserve away or puts it back. A disk that cannot be looked at is as it was.
    fn look(&mut self) {
        let Some((free, _)) = of(&self.folder) else { return };
        let there = std::fs::metadata(&self.file).is_ok_and(|file| file.len() == self.bytes);
        let missing = if there { 0 } else { self.bytes };
        self.disk = match self.disk {
            Disk::Room if free < self.bytes && there => Disk::Low,
            Disk::Room if free < self.bytes / 2 => Disk::Full,
            Disk::Low | Disk::Full if free > missing + 2 * self.bytes => Disk::Room,
            Disk::Low if !there && free < self.bytes / 2 => Disk::Full,
            Disk::Full if free > self.bytes => Disk::Low,
            disk => disk,
        };
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
    pub async fn watch(mut self, node: NodeHandle, metrics: Arc<Metrics>) {
        let mut told = Disk::Room;
        loop {
            let disk = self.disk;
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
            if node.ask(move |node| node.set_disk(disk)).await.is_none() {
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
            self.look();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_reserve_where_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let room = Room::open(folder.path());
        assert_eq!(room.disk, Disk::Room);
        let held = std::fs::metadata(folder.path().join("reserve")).unwrap();
        assert!(held.len() == room.bytes && room.bytes > 0, "{} of {} bytes", held.len(), room.bytes);
    }
}
