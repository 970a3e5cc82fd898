//! Gives the room of large files back in small steps. Where a file system discards what is freed, to remove a file of 16 MiB holds up
//! whatever else the disk has to do for 10 to 40 ms, syncs of the write-ahead log among it. So the large files of a database
//! are held open: one that was removed keeps its blocks, and they are cut off its end a piece at a time. Where nothing is held,
//! as after a kill, the kernel gives all of it back at once, as without this.

use crate::rocks::{files_limit, held_max};
use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Cut off at once.
const PIECE_BYTES: u64 = 1 << 20;
/// Between two pieces,
const PAUSE_MAX: Duration = Duration::from_millis(8);
/// or less, so that what waits is gone in about this time.
const GONE_AFTER: Duration = Duration::from_secs(2);
/// The folder is looked through when so much was written since.
const LOOK_BYTES: u64 = 4 << 20;
/// Between two looks,
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// also where nothing is written: files that are held are asked whether they were removed.
const LOOK_IDLE: Duration = Duration::from_secs(1);
/// With less room on the disk than this, all of it is given back at once.
const ROOM_BYTES: u64 = 2 << 30;

/// Suffixes of the files that grow large.
const KINDS: [&str; 3] = ["log", "blob", "sst"];
/// Of them that of a table.
const TABLE: usize = 2;

/// A file's kind, as its place in [`KINDS`], and its number, which RocksDB does not use again.
type Name = (usize, u64);

/// See the module. Ends with it.
pub(crate) struct Removal {
    written: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Removal {
    /// Watches a database's folder.
    pub(crate) fn of(folder: &Path) -> std::io::Result<Self> {
        let (written, ended) = (Arc::new(AtomicU64::new(LOOK_BYTES)), Arc::new(AtomicBool::new(false)));
        let mut files = Files { folder: folder.to_owned(), ..Files::default() };
        let (counted, over) = (written.clone(), ended.clone());
        let thread = std::thread::Builder::new().name("weir-removal".into()).spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let busy = counted.load(Ordering::Relaxed) >= LOOK_BYTES;
                if busy {
                    counted.store(0, Ordering::Relaxed);
                    files.hold();
                }
                files.find_removed();
                let next = Instant::now() + LOOK_EVERY;
                if files.removed.is_empty() {
                    std::thread::park_timeout(if busy { LOOK_EVERY } else { LOOK_IDLE });
                }
                while Instant::now() < next && files.cut() && !over.load(Ordering::Relaxed) {}
            }
        })?;
        Ok(Self { written, ended, thread: Some(thread) })
    }

    /// So much was written to the database.
    pub(crate) fn wrote(&self, bytes: u64) {
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if let Some(thread) = self.thread.as_ref().filter(|_| before < LOOK_BYTES && before + bytes >= LOOK_BYTES) {
            thread.thread().unpark();
        }
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

#[derive(Default)]
struct Files {
    folder: PathBuf,
    held: BTreeMap<Name, File>,
    /// with the bytes that are left of each
    removed: VecDeque<(File, u64)>,
}

impl Files {
    fn path(&self, (kind, number): Name) -> PathBuf {
        self.folder.join(format!("{number:06}.{}", KINDS[kind]))
    }

    fn names(&self) -> Vec<Name> {
        let Ok(folder) = std::fs::read_dir(&self.folder) else { return Vec::new() };
        let name = |file: std::fs::DirEntry| {
            let name = file.file_name();
            let (number, kind) = name.to_str()?.split_once('.')?;
            Some((KINDS.iter().position(|k| *k == kind)?, number.parse().ok()?))
        };
        folder.filter_map(|file| name(file.ok()?)).collect()
    }

    /// Opens what will be removed next, without which there is no harm: the oldest logs and blob files, and of tables, which go once they
    /// are merged, the newest that are large.
    fn hold(&mut self) {
        let mut names = self.names();
        names.sort_unstable_by_key(|&(kind, number)| (kind, if kind == TABLE { u64::MAX - number } else { number }));
        let mut left = [held_max(files_limit()); KINDS.len()];
        self.held.keys().for_each(|(kind, _)| left[*kind] = left[*kind].saturating_sub(1));
        for name in names {
            let path = self.path(name);
            let large = || name.0 != TABLE || path.metadata().is_ok_and(|m| m.len() > PIECE_BYTES);
            if left[name.0] > 0 && !self.held.contains_key(&name) && large() {
                let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
                if file.metadata().is_ok_and(|m| m.nlink() == 1) {
                    left[name.0] -= 1;
                    self.held.insert(name, file);
                }
            }
        }
    }

    /// Takes those whose last name is gone.
    fn find_removed(&mut self) {
        let nowhere = |file: &File| file.metadata().is_ok_and(|m| m.nlink() == 0);
        let unlinked = self.held.iter().filter(|(_, file)| nowhere(file)).map(|(name, _)| *name);
        let removed: Vec<Name> = unlinked.filter(|name| !self.path(*name).exists()).collect();
        for file in removed.iter().filter_map(|name| self.held.remove(name)) {
            self.removed.extend(file.metadata().map(|m| (file, m.len())));
        }
        let is_low = || rustix::fs::statvfs(&self.folder).is_ok_and(|disk| disk.f_bavail * disk.f_frsize < ROOM_BYTES);
        if !self.removed.is_empty() && is_low() {
            self.removed.clear();
        }
    }

    /// Cuts a piece off the first, and waits as long as there is time for; false where nothing is left.
    fn cut(&mut self) -> bool {
        let waiting: u64 = self.removed.iter().map(|(_, bytes)| bytes).sum();
        let Some((file, bytes)) = self.removed.front_mut() else { return false };
        *bytes = bytes.saturating_sub(PIECE_BYTES);
        if *bytes == 0 || file.set_len(*bytes).is_err() {
            self.removed.pop_front();
        }
        sleep(PAUSE_MAX.min(GONE_AFTER.mul_f64(PIECE_BYTES as f64 / waiting as f64)));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_removed_goes_in_pieces_and_what_was_not_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = Files { folder: folder.path().to_owned(), ..Files::default() };
        let names = ["000007.log", "000008.log", "000009.blob", "000010.sst", "000011.sst", "CURRENT"];
        for name in names {
            let small = name == "000011.sst";
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_len(if small { 100 } else { 3 * PIECE_BYTES }).unwrap();
        }
        files.hold();
        assert_eq!(files.held.keys().copied().collect::<Vec<_>>(), [(0, 7), (0, 8), (1, 9), (2, 10)]);
        files.find_removed();
        assert!(files.removed.is_empty() && !files.cut());

        std::fs::remove_file(folder.path().join("000007.log")).unwrap();
        // another name keeps it
        std::fs::hard_link(folder.path().join("000009.blob"), folder.path().join("copy")).unwrap();
        std::fs::remove_file(folder.path().join("000009.blob")).unwrap();
        files.find_removed();
        let left = |files: &Files| files.removed.iter().map(|(f, _)| f.metadata().unwrap().len()).collect::<Vec<_>>();
        // on a disk with little room nothing waits
        if !files.removed.is_empty() {
            assert_eq!(left(&files), [3 * PIECE_BYTES]);
            assert!(files.cut());
            assert_eq!(left(&files), [2 * PIECE_BYTES]);
            assert!(files.cut() && files.cut() && !files.cut());
        }
        for name in ["000008.log", "copy", "000010.sst"] {
            assert_eq!(folder.path().join(name).metadata().unwrap().len(), 3 * PIECE_BYTES, "{name}");
        }
    }
}
