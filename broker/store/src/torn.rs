//! What the write-ahead logs of a database hold, found without opening it. Their torn tail is what was being written when the power went:
//! RocksDB leaves it out without a word, and so it may, since nothing of it was synced, nothing acknowledged. Here it is counted. The
//! number of the last write says whether all that was synced is still there. Logs are read block by block.
//!
//! The format: <https://github.com/facebook/rocksdb/wiki/Write-Ahead-Log-File-Format>.

use std::fs::File;
use std::io::{Read, Result, SeekFrom};
use std::path::{Path, PathBuf};

const BLOCK_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 7;
/// Types of fragments: a whole record, and a record's first, middle and last ones.
const WHOLE: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// A record begins with the sequence number of its first write and the number of its writes.
const COUNT_AT: usize = 8;
const WRITES_AT: usize = 12;

/// What the write-ahead logs in a folder hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Bytes at the end of the newest one that are no whole record; 0 where all is whole.
    pub torn_bytes: u64,
    /// RocksDB's sequence number of the last write in them, before the first fragment whose checksum differs; 0 where there is none.
    pub last_sequence: u64,
}

/// Looks into the write-ahead logs in `folder`.
pub fn find(folder: &Path) -> Result<Found> {
    let mut newest_first = logs(folder)?.into_iter().rev();
    let Some(newest) = newest_first.next() else { return Ok(Found::default()) };
    let mut found = look_into(File::open(newest)?)?;
    for older in newest_first {
        if found.last_sequence > 0 {
            break; // a later log holds later writes
        }
        found.last_sequence = look_into(File::open(older)?)?.last_sequence;
    }
    Ok(found)
}

/// The first write-ahead log of `folder` in which a fragment's checksum differs.
pub fn damaged_log(folder: &Path) -> Option<PathBuf> {
    logs(folder).ok()?.into_iter().find(|file| File::open(file).and_then(checksums_match).is_ok_and(|match_| !match_))
}

/// Compares the checksums of all whole fragments.
fn checksums_match(log: impl Read) -> Result<bool> {
    let mut match_ = true;
    let ends = each_fragment(log, |fragment, _| {
        match_ = fragment.checksum_matches();
        match_
    })?;
    Ok(ends && match_)
}

fn look_into(mut log: impl Read + std::io::Seek) -> Result<Found> {
    let (mut whole, mut last_sequence, mut matches) = (0, 0, true);
    let mut record = Vec::with_capacity(WRITES_AT);
    each_fragment(&mut log, |fragment, end| {
        matches &= fragment.checksum_matches();
        let Fragment { kind, content, .. } = *fragment;
        if matches!(kind, WHOLE | FIRST) {
            record.clear();
        }
        let wanted = (WRITES_AT - record.len()).min(content.len());
        record.extend_from_slice(&content[..wanted]);
        if !matches!(kind, FIRST | MIDDLE) {
            whole = end;
        }
        if matches && matches!(kind, WHOLE | LAST) {
            last_sequence = last_write(&record).unwrap_or(last_sequence);
        }
        true
    })?;
    log.seek(SeekFrom::Start(whole))?;
    Ok(Found { torn_bytes: rest_bytes(log)?, last_sequence })
}

/// The sequence number of the last write of a record that begins so.
fn last_write(record: &[u8]) -> Option<u64> {
    let first = u64::from_le_bytes(record.get(..COUNT_AT)?.try_into().ok()?);
    let count = u32::from_le_bytes(record.get(COUNT_AT..WRITES_AT)?.try_into().ok()?);
    first.checked_add(count.into())?.checked_sub(1)
}

/// Bytes up to the end, unless all of them are zero: room that was set aside.
fn rest_bytes(mut log: impl Read) -> Result<u64> {
    let (mut block, mut bytes, mut is_zero) = (vec![0; BLOCK_BYTES], 0, true);
    loop {
        let length = log.read(&mut block)?;
        if length == 0 {
            return Ok(if is_zero { 0 } else { bytes });
        }
        bytes += length as u64;
        is_zero &= block[..length].iter().all(|b| *b == 0);
    }
}

/// A CRC as RocksDB stores it, so that the CRC of bytes that hold CRCs is of use.
pub(crate) fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A fragment of a record.
struct Fragment<'a> {
    kind: u8,
    content: &'a [u8],
    crc: u32,
}

impl Fragment<'_> {
    /// CRC-32C over type and content, masked as RocksDB does.
    fn checksum_matches(&self) -> bool {
        masked(crc32c::crc32c_append(crc32c::crc32c(&[self.kind]), self.content)) == self.crc
    }
}

/// Hands over all whole fragments of a log in order, each with the place where it ends, until one is answered with false. Returns false where
/// a fragment is longer than its block, which none is.
fn each_fragment(mut log: impl Read, mut take: impl FnMut(&Fragment<'_>, u64) -> bool) -> Result<bool> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    for number in 0u64.. {
        block.clear();
        (&mut log).take(BLOCK_BYTES as u64).read_to_end(&mut block)?;
        let mut at = 0;
        // (a block's end that is too small for a header holds nothing)
        while let Some(header) = block.get(at..at + HEADER_BYTES) {
            let (length, kind) = (usize::from(u16::from_le_bytes([header[4], header[5]])), header[6]);
            if kind == 0 && length == 0 {
                return Ok(true); // room that was set aside and not used
            }
            let crc = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
            let Some(content) = block.get(at + HEADER_BYTES..at + HEADER_BYTES + length) else {
                return Ok(block.len() < BLOCK_BYTES); // cut off at the log's end
            };
            at += HEADER_BYTES + length;
            if !take(&Fragment { kind, content, crc }, number * BLOCK_BYTES as u64 + at as u64) {
                return Ok(true);
            }
        }
        if block.len() < BLOCK_BYTES {
            break;
        }
    }
    Ok(true)
}

fn logs(folder: &Path) -> Result<Vec<PathBuf>> {
    let files = std::fs::read_dir(folder)?.filter_map(|f| f.ok().map(|f| f.path()));
    let mut logs: Vec<PathBuf> = files.filter(|f| f.extension().is_some_and(|e| e == "log")).collect();
    logs.sort_unstable_by_key(|f| f.file_stem()?.to_str()?.parse::<u64>().ok());
    Ok(logs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn fragment(kind: u8, bytes: usize) -> Vec<u8> {
        fragment_of(kind, &vec![7; bytes])
    }

    fn fragment_of(kind: u8, content: &[u8]) -> Vec<u8> {
        let crc = masked(crc32c::crc32c_append(crc32c::crc32c(&[kind]), content));
        let mut out = crc.to_le_bytes().to_vec();
        out.extend((content.len() as u16).to_le_bytes());
        out.push(kind);
        out.extend_from_slice(content);
        out
    }

    fn torn(log: &[u8]) -> u64 {
        look_into(Cursor::new(log)).unwrap().torn_bytes
    }

    #[test]
    fn whole_records_are_not_torn_and_the_rest_is_counted() {
        let two = [fragment(1, 100), fragment(1, 50)].concat();
        assert_eq!(torn(&two), 0);
        assert_eq!(torn(&two[..two.len() - 1]), 56);
        assert_eq!(torn(&[two.clone(), vec![0; 300]].concat()), 0, "set aside");
        // a record over two blocks of which the second is missing
        let first = fragment(2, BLOCK_BYTES - two.len() - HEADER_BYTES);
        assert_eq!(torn(&[two.clone(), first.clone()].concat()), first.len() as u64);
        assert_eq!(torn(&[two, first, fragment(4, 10)].concat()), 0);
    }

    #[test]
    fn the_last_write_counts_whose_record_is_whole_and_matches_its_checksum() {
        let record = |sequence: u64, count: u32, bytes: usize| {
            [&sequence.to_le_bytes()[..], &count.to_le_bytes(), &vec![5; bytes]].concat()
        };
        let last = |log: &[u8]| look_into(Cursor::new(log)).unwrap().last_sequence;
        let one = fragment_of(WHOLE, &record(40, 3, 100));
        assert_eq!((last(&[]), last(&one)), (0, 42));
        // the next record begins with so little at the end of a block that its count is in the second one
        let filler = fragment_of(WHOLE, &record(43, 1, BLOCK_BYTES - one.len() - 2 * HEADER_BYTES - 10 - WRITES_AT));
        let next = record(44, 7, 500);
        let whole = [&one[..], &filler, &fragment_of(FIRST, &next[..10]), &fragment_of(LAST, &next[10..])].concat();
        assert_eq!(last(&whole), 50);
        assert_eq!(last(&whole[..whole.len() - 1]), 43, "it is not whole");
        let mut flipped = whole.clone();
        flipped[one.len() + 50] ^= 1;
        assert_eq!(last(&flipped), 42, "what follows damage counts for nothing");
        assert!(checksums_match(&whole[..]).unwrap() && !checksums_match(&flipped[..]).unwrap());
        flipped = whole;
        flipped[one.len() + 5] = 0xff; // longer than its block
        assert!(!checksums_match(&flipped[..]).unwrap());
    }
}
