//! Checks blob files, which RocksDB reads one payload at a time and whose name its errors leave out.
//!
//! A file is a header of 30 bytes, records, and, once complete, a footer of 32. A record is key length, value length and expiration,
//! each 8 bytes; a masked CRC-32C of those; one of key and value; key; value. Little-endian.

use crate::torn::masked;
use std::fs::File;
use std::io::{BufReader, Read as _, Result};
use std::path::{Path, PathBuf};

const HEADER_BYTES: u64 = 30;
const FOOTER_BYTES: u64 = 32;
const RECORD_BYTES: u64 = 32;

/// A place in a blob file whose checksum differs; what follows it in the file is not checked where the lengths are damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// The file.
    pub file: PathBuf,
    /// Where the damaged record begins.
    pub at: u64,
}

/// All flaws of the blob files in a folder.
pub fn flaws(folder: &Path) -> Result<Vec<Flaw>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)?.filter_map(|f| f.ok().map(|f| f.path())).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "blob"));
    files.sort();
    let mut found = Vec::new();
    for file in files {
        check(&file, &mut found)?;
    }
    Ok(found)
}

fn check(path: &Path, found: &mut Vec<Flaw>) -> Result<()> {
    let file = File::open(path)?;
    let end = file.metadata()?.len().saturating_sub(FOOTER_BYTES);
    let mut file = BufReader::new(file);
    let mut header = [0; HEADER_BYTES as usize];
    let flaw = |at| Flaw { file: path.to_owned(), at };
    if end < HEADER_BYTES || file.read_exact(&mut header).is_err() {
        found.push(flaw(0));
        return Ok(());
    }
    let (mut at, mut payload) = (HEADER_BYTES, Vec::new());
    while at + RECORD_BYTES <= end {
        let mut record = [0; RECORD_BYTES as usize];
        file.read_exact(&mut record)?;
        let number = |from: usize| u64::from_le_bytes(record[from..from + 8].try_into().expect("eight bytes"));
        let crc = |from: usize| u32::from_le_bytes(record[from..from + 4].try_into().expect("four bytes"));
        let bytes = number(0).saturating_add(number(8));
        if masked(crc32c::crc32c(&record[..24])) != crc(24) || bytes > end - at - RECORD_BYTES {
            found.push(flaw(at)); // where the next record begins is not known
            return Ok(());
        }
        payload.resize(bytes as usize, 0);
        file.read_exact(&mut payload)?;
        if masked(crc32c::crc32c(&payload)) != crc(28) {
            found.push(flaw(at));
        }
        at += RECORD_BYTES + bytes;
    }
    Ok(())
}
