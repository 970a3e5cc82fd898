//! Column family `offsets`: where an offset stands in the log.
//!
//! Key: group u64 ‖ last offset of the batch u64. Value: index u64 ‖ append time u64 (ms since the epoch).

use super::{key16, u64_at};

/// The key of a batch by its last offset.
pub fn key(group: u64, last_offset: u64) -> [u8; 16] {
    key16(group, last_offset)
}

/// The value.
pub fn value(index: u64, append_time_ms: u64) -> [u8; 16] {
    key16(index, append_time_ms)
}

/// (index, append time) out of a value.
pub fn decode(value: &[u8]) -> Option<(u64, u64)> {
    Some((u64_at(value, 0)?, u64_at(value, 8)?))
}
