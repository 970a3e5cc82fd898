//! The last write that was synced, kept beside the log. RocksDB knows which of its closed logs were synced and how far, but of the log
//! it writes now only what it finds: one that was cut off or removed opens as if nothing had been there. This file is written after
//! each sync and not synced itself, so it never names a write that was not synced. After a power loss it may be behind.
//!
//! | bytes | content |
//! |---|---|
//! | 0..4 | `WSYN` |
//! | 4..12 | RocksDB's sequence number of the last synced write, big-endian |
//! | 12..20 | sum of the partitions' end offsets there, big-endian; all ones where it is not known |
//! | 20..24 | CRC-32C of the bytes before, big-endian |

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Name of the file in a database's folder.
const NAME: &str = "SYNCED";
const BYTES: usize = 24;

/// What was synced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// RocksDB's sequence number of the last synced write.
    pub sequence: u64,
    /// Sum of the partitions' end offsets there, if no write was under way.
    pub records: Option<u64>,
}

fn encode(mark: Mark) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    out[..4].copy_from_slice(b"WSYN");
    out[4..12].copy_from_slice(&mark.sequence.to_be_bytes());
    out[12..20].copy_from_slice(&mark.records.unwrap_or(u64::MAX).to_be_bytes());
    let crc = crc32c::crc32c(&out[..20]);
    out[20..].copy_from_slice(&crc.to_be_bytes());
    out
}

fn decode(bytes: &[u8]) -> Option<Mark> {
    let records = Some(crate::keys::u64_at(bytes, 12)?).filter(|sum| *sum != u64::MAX);
    let mark = Mark { sequence: crate::keys::u64_at(bytes, 4)?, records };
    (bytes == encode(mark)).then_some(mark)
}

/// The mark in a database's folder. `None` where there is none, or it was torn by a power loss.
pub fn read(folder: &Path) -> Option<Mark> {
    decode(&std::fs::read(folder.join(NAME)).ok()?)
}

/// Keeps the mark of an open database.
pub(crate) struct Synced(File);

impl Synced {
    /// Begins with a mark, on disk.
    pub(crate) fn create(folder: &Path, mark: Mark) -> Result<Self> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(folder.join(NAME))?;
        file.set_len(BYTES as u64)?;
        file.write_all_at(&encode(mark), 0)?;
        file.sync_all()?;
        File::open(folder)?.sync_all()?;
        Ok(Self(file))
    }

    /// Moves the mark on. A failure leaves it behind, which is a lower bound as well.
    pub(crate) fn move_to(&self, mark: Mark) {
        let _ = self.0.write_all_at(&encode(mark), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_and_a_torn_one_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), None);
        let mark = Mark { sequence: 7, records: Some(3) };
        let synced = Synced::create(folder.path(), Mark::default()).unwrap();
        assert_eq!(read(folder.path()), Some(Mark::default()));
        synced.move_to(mark);
        assert_eq!(read(folder.path()), Some(mark));
        let bytes = encode(mark);
        for at in 0..BYTES * 8 {
            let mut flipped = bytes;
            flipped[at / 8] ^= 1 << (at % 8);
            assert_eq!(decode(&flipped), None);
        }
        assert_eq!(decode(&bytes[..BYTES - 1]), None);
    }
}
