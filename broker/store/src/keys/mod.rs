//! Keys and values, one file for each kind. All integers big-endian, so that keys sort as their numbers do.

pub mod incarnations;
pub mod log;
pub mod offsets;
pub mod state;

/// The first eight bytes of every key: the group.
pub fn group_prefix(group: u64) -> [u8; 8] {
    group.to_be_bytes()
}

pub(crate) fn key16(group: u64, second: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&group.to_be_bytes());
    key[8..].copy_from_slice(&second.to_be_bytes());
    key
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
