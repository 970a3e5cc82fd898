//! Column family `state`: what a group is beside its log.
//!
//! | key | value |
//! |---|---|
//! | group u64 ‖ `c` ‖ index u64 | CRC-32C u32 of key and rest ‖ `weir_core::storage::Checkpoint` as protobuf |
//! | group u64 ‖ `h` | CRC-32C u32 ‖ term u64 ‖ vote u64 ‖ commit u64 |
//! | group u64 ‖ `r` | CRC-32C u32 ‖ replica id u64 ‖ standing u8, see [`Standing`] |

use super::u64_at;
use prost::Message as _;
use weir_core::ids::ReplicaId;
use weir_core::storage::{Checkpoint, HardState};

/// Tag of checkpoints.
pub const CHECKPOINT: u8 = b'c';
/// Tag of hard states.
pub const HARD: u8 = b'h';
/// Tag of replica records.
pub const REPLICA: u8 = b'r';

/// How a replica stands here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It takes part.
    Whole = 0,
    /// Found damaged: it takes part in nothing.
    Quarantined = 1,
    /// Removed; its id is kept, so that it is never made again.
    Destroyed = 2,
}

/// Key of a group's hard state or replica record.
pub fn key(group: u64, tag: u8) -> [u8; 9] {
    let mut key = [0; 9];
    key[..8].copy_from_slice(&group.to_be_bytes());
    key[8] = tag;
    key
}

/// Key of a checkpoint.
pub fn checkpoint_key(group: u64, index: u64) -> [u8; 17] {
    let mut out = [0; 17];
    out[..9].copy_from_slice(&key(group, CHECKPOINT));
    out[9..].copy_from_slice(&index.to_be_bytes());
    out
}

pub(super) fn seal(key: &[u8], body: &[u8]) -> Vec<u8> {
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), body);
    let mut out = crc.to_be_bytes().to_vec();
    out.extend_from_slice(body);
    out
}

pub(super) fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Option<&'a [u8]> {
    let said = u32::from_be_bytes(value.get(..4)?.try_into().ok()?);
    (crc32c::crc32c_append(crc32c::crc32c(key), &value[4..]) == said).then_some(&value[4..])
}

/// Value of a hard state.
pub fn encode_hard(key: &[u8], hard: &HardState) -> Vec<u8> {
    seal(key, &[hard.term, hard.vote, hard.commit].map(u64::to_be_bytes).concat())
}

/// Reads a hard state; `None` where damaged.
pub fn decode_hard(key: &[u8], value: &[u8]) -> Option<HardState> {
    let body = unseal(key, value)?;
    Some(HardState { term: u64_at(body, 0)?, vote: u64_at(body, 8)?, commit: u64_at(body, 16)? })
}

/// Value of a replica record.
pub fn encode_replica(key: &[u8], replica: ReplicaId, standing: Standing) -> Vec<u8> {
    let mut body = replica.0.to_be_bytes().to_vec();
    body.push(standing as u8);
    seal(key, &body)
}

/// Reads a replica record; `None` where damaged.
pub fn decode_replica(key: &[u8], value: &[u8]) -> Option<(ReplicaId, Standing)> {
    let body = unseal(key, value)?;
    let standing = match body.get(8)? {
        0 => Standing::Whole,
        1 => Standing::Quarantined,
        2 => Standing::Destroyed,
        _ => return None,
    };
    Some((ReplicaId(u64_at(body, 0)?), standing))
}

/// Value of a checkpoint.
pub fn encode_checkpoint(key: &[u8], checkpoint: &Checkpoint) -> Vec<u8> {
    seal(key, &checkpoint.encode_to_vec())
}

/// Reads a checkpoint; `None` where damaged.
pub fn decode_checkpoint(key: &[u8], value: &[u8]) -> Option<Checkpoint> {
    Checkpoint::decode(unseal(key, value)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_on_disk_are_these() {
        let k = key(3, HARD);
        let hard = HardState { term: 2, vote: 1, commit: 9 };
        let value = encode_hard(&k, &hard);
        assert_eq!(value[4..], [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(decode_hard(&k, &value), Some(hard));
        assert_eq!(decode_hard(&key(4, HARD), &value), None, "a value under another key is damage");
        let r = key(3, REPLICA);
        assert_eq!(
            decode_replica(&r, &encode_replica(&r, ReplicaId(8), Standing::Destroyed)),
            Some((ReplicaId(8), Standing::Destroyed))
        );
        let c = checkpoint_key(3, 5);
        let checkpoint = Checkpoint { index: 5, term: 2, voters: vec![1, 2], ..Default::default() };
        assert_eq!(decode_checkpoint(&c, &encode_checkpoint(&c, &checkpoint)), Some(checkpoint));
    }
}
