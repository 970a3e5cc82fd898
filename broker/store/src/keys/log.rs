//! Column family `log`: one Raft entry.
//!
//! Key: group u64 ‖ index u64. Value:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | CRC-32C of the key and of bytes 4.. |
//! | 4..12 | term |
//! | 12 | entry type: 0 normal, 1 membership change, 2 membership change v2 |
//! | 13 | length of the context, n |
//! | 14..14+n | context (see `weir_core::entry`) |
//! | 14+n.. | data: the record batch as it was published |

use super::{key16, u64_at};
use bytes::Bytes;
use weir_core::eraftpb::{Entry, EntryType};

/// Bytes before the context.
pub const PREFIX_BYTES: usize = 14;

/// The key of an entry.
pub fn key(group: u64, index: u64) -> [u8; 16] {
    key16(group, index)
}

/// Appends the value of an entry to `out`.
pub fn encode(key: &[u8; 16], entry: &Entry, out: &mut Vec<u8>) {
    let kind = match entry.get_entry_type() {
        EntryType::EntryNormal => 0,
        EntryType::EntryConfChange => 1,
        EntryType::EntryConfChangeV2 => 2,
    };
    let context_len = u8::try_from(entry.context.len()).expect("a context is 21 bytes or none");
    let start = out.len();
    out.reserve(PREFIX_BYTES + entry.context.len() + entry.data.len());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&entry.term.to_be_bytes());
    out.extend_from_slice(&[kind, context_len]);
    out.extend_from_slice(&entry.context);
    out.extend_from_slice(&entry.data);
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), &out[start + 4..]);
    out[start..start + 4].copy_from_slice(&crc.to_be_bytes());
}

/// Reads an entry back. The error says what is wrong with the bytes.
pub fn decode(key: &[u8], value: Bytes) -> Result<Entry, &'static str> {
    let index = u64_at(key, 8).ok_or("a key of the wrong length")?;
    if value.len() < PREFIX_BYTES {
        return Err("shorter than its fixed fields");
    }
    let said = u32::from_be_bytes(value[..4].try_into().expect("four bytes"));
    if crc32c::crc32c_append(crc32c::crc32c(key), &value[4..]) != said {
        return Err("its checksum differs");
    }
    let context_end = PREFIX_BYTES + value[13] as usize;
    if value.len() < context_end {
        return Err("its context ends early");
    }
    let mut entry = Entry { index, term: u64_at(&value, 4).expect("length checked"), ..Default::default() };
    entry.set_entry_type(match value[12] {
        0 => EntryType::EntryNormal,
        1 => EntryType::EntryConfChange,
        2 => EntryType::EntryConfChangeV2,
        _ => return Err("an unknown entry type"),
    });
    entry.context = value.slice(PREFIX_BYTES..context_end);
    entry.data = value.slice(context_end..);
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_entry_survives_and_any_flipped_bit_is_found(
            index in any::<u64>(), term in any::<u64>(), context in proptest::collection::vec(any::<u8>(), 0..22),
            data in proptest::collection::vec(any::<u8>(), 0..200), flip in any::<u64>(),
        ) {
            let entry = Entry { index, term, context: context.into(), data: data.into(), ..Default::default() };
            let key = key(7, index);
            let mut value = Vec::new();
            encode(&key, &entry, &mut value);
            prop_assert_eq!(decode(&key, value.clone().into()), Ok(entry));
            let at = flip as usize % (value.len() * 8);
            value[at / 8] ^= 1 << (at % 8);
            prop_assert!(decode(&key, value.into()).is_err());
        }

        #[test]
        fn keys_sort_as_group_and_index(a in any::<(u64, u64)>(), b in any::<(u64, u64)>()) {
            prop_assert_eq!(key(a.0, a.1).cmp(&key(b.0, b.1)), a.cmp(&b));
        }
    }
}
