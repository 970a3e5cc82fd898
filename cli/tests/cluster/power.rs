//! Brokers on a disk that can lose power: a small library, preloaded, writes down how far each file was synced; a cut then takes
//! what lies beyond, or leaves some of it, torn.

use super::{Cluster, Down};
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use weir_client::Client;

/// Of a test; in a folder of its own.
pub(crate) struct Power {
    folder: tempfile::TempDir,
}

/// What a cut left behind.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    /// Bytes that were written, not synced, and are gone.
    pub(crate) lost_bytes: u64,
    /// Files of which some such bytes stayed.
    pub(crate) torn_files: u32,
}

impl Power {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("power.c"), folder.path().join("power.so"));
        fs::write(&source, include_str!("power.c")).unwrap();
        let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]).status();
        assert!(built.expect("a C compiler").success());
        Self { folder }
    }

    /// Three brokers under it, and their folder.
    pub(crate) fn start(&self) -> (Cluster, Client, PathBuf) {
        let down = Down::new();
        let folder = down.data.path().to_owned();
        let cluster = down.start(|serve| self.preload(serve, &folder));
        let client = Client::new(&cluster.servers).unwrap();
        (cluster, client, folder)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// For `weir serve`, whose data is in this folder.
    pub(crate) fn preload(&self, serve: &mut Command, data: &Path) {
        serve.env("LD_PRELOAD", self.file("power.so")).env("WEIR_POWER_DIR", data);
        serve.env("WEIR_POWER_JOURNAL", self.file("journal")).env("WEIR_POWER_FAIL", self.file("fail"));
        serve.env("WEIR_POWER_CLOCK", self.file("clock"));
    }

    /// Syncs of files below this folder fail from now on.
    pub(crate) fn fail(&self, below: &Path) {
        self.tell("fail", below.to_str().unwrap());
    }

    pub(crate) fn repair(&self) {
        fs::remove_file(self.file("fail")).unwrap();
    }

    /// The wall clock is off by so many seconds from now on.
    pub(crate) fn jump(&self, seconds: i64) {
        self.tell("clock", &seconds.to_string());
    }

    /// Writes a file that the library reads, at once or not at all.
    fn tell(&self, name: &str, text: &str) {
        let new = self.file("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.file(name)).unwrap();
    }

    fn synced(&self) -> HashMap<PathBuf, u64> {
        let mut sizes: HashMap<PathBuf, u64> = HashMap::new();
        for line in fs::read_to_string(self.file("journal")).unwrap().lines() {
            let mut words = line.splitn(3, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("S"), Some(size), Some(path)) => drop(sizes.insert(path.into(), size.parse().unwrap())),
                (Some("R"), Some(from), Some(to)) => {
                    let size = sizes.remove(Path::new(from)).unwrap_or(0);
                    sizes.insert(to.into(), size);
                }
                _ => panic!("{line}"),
            }
        }
        sizes
    }

    /// The machine with these files lost power. Nothing may have them open.
    pub(crate) fn cut(&self, below: &Path) -> Cut {
        let synced = self.synced();
        assert!(!synced.is_empty(), "nothing was ever synced: the library was not loaded");
        let mut cut = Cut::default();
        let mut folders = vec![below.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let length = path.metadata().unwrap().len();
                let kept = synced.get(&path).copied().unwrap_or(0).min(length);
                if kept == length {
                    continue;
                }
                // of what was not synced all is gone, or some stayed, the end of it torn
                let stays = if fastrand::bool() { fastrand::u64(0..=length - kept) } else { 0 };
                let mut file = OpenOptions::new().write(true).open(&path).unwrap();
                file.set_len(kept + stays).unwrap();
                if stays > 0 {
                    let torn = stays.min(fastrand::u64(1..=64));
                    file.seek(SeekFrom::Start(kept + stays - torn)).unwrap();
                    file.write_all(&vec![0; torn as usize]).unwrap();
                    cut.torn_files += 1;
                }
                cut.lost_bytes += length - kept - stays;
            }
        }
        cut
    }
}
