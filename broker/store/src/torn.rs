//! The torn tail of a write-ahead log: what was being written when the power went. RocksDB leaves it out without a word, and so it may:
//! nothing of it was synced, nothing acknowledged. Here it is counted.
//!
//! The format: <https://github.com/facebook/rocksdb/wiki/Write-Ahead-Log-File-Format>.

use std::path::Path;

const BLOCK_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 7;
/// Types of fragments: a record's first and its middle ones, after which others must follow.
const OPEN: [u8; 2] = [2, 3];

/// Bytes at the end of the newest write-ahead log in `folder` that are no whole record; 0 where there is none, or all is whole.
pub fn torn_bytes(folder: &Path) -> std::io::Result<u64> {
    let number = |path: &Path| path.file_stem()?.to_str()?.parse::<u64>().ok();
    let files = std::fs::read_dir(folder)?.filter_map(|f| f.ok().map(|f| f.path()));
    let logs = files.filter(|f| f.extension().is_some_and(|e| e == "log"));
    let newest = logs.max_by_key(|f| number(f));
    newest.map_or(Ok(0), |log| Ok(torn(&std::fs::read(log)?)))
}

fn torn(log: &[u8]) -> u64 {
    let (mut at, mut whole) = (0, 0);
    while log.len() - at >= HEADER_BYTES {
        let room = BLOCK_BYTES - at % BLOCK_BYTES;
        if room < HEADER_BYTES {
            at += room.min(log.len() - at); // a block's end that is too small for a header
            continue;
        }
        let (length, kind) = (usize::from(u16::from_le_bytes([log[at + 4], log[at + 5]])), log[at + 6]);
        if kind == 0 && length == 0 {
            return (at - whole) as u64; // room that was set aside and not used
        }
        if HEADER_BYTES + length > log.len() - at {
            break;
        }
        at += HEADER_BYTES + length;
        if !OPEN.contains(&kind) {
            whole = at;
        }
    }
    let rest = &log[whole..];
    if rest.iter().all(|b| *b == 0) { 0 } else { rest.len() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(kind: u8, bytes: usize) -> Vec<u8> {
        let mut out = vec![9, 9, 9, 9];
        out.extend((bytes as u16).to_le_bytes());
        out.push(kind);
        out.extend(vec![7; bytes]);
        out
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
}
