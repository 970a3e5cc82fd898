//! What a Raft entry of a partition carries. The record batch is the entry's `data`, untouched;
//! what the leader adds stands in the entry's `context`, so no batch is ever copied to be stamped.
//!
//! Context of a data entry, big-endian, 21 bytes:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | kind: 1 batch, 2 control, 3 metadata command |
//! | 1..9 | base offset |
//! | 9..13 | record count |
//! | 13..21 | append time, ms since the epoch by the leader's clock |

use crate::cursor::CursorUpdate;
use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb::{Entry, EntryType};

/// Bytes of the context.
pub const CONTEXT_BYTES: usize = 21;

/// What kind of payload an entry has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A record batch.
    Batch = 1,
    /// A [`Control`] record.
    Control = 2,
    /// A command to the metadata group.
    Meta = 3,
}

/// The decoded context of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// What the payload is.
    pub kind: Kind,
    /// Offset of the first record (for control entries: the next offset at that point).
    pub base_offset: u64,
    /// Records in the payload; 0 for control entries.
    pub count: u32,
    /// When the leader appended it, ms since the epoch.
    pub append_time_ms: u64,
}

impl Context {
    /// Encodes as documented above.
    pub fn encode(&self) -> Bytes {
        let mut out = [0u8; CONTEXT_BYTES];
        out[0] = self.kind as u8;
        out[1..9].copy_from_slice(&self.base_offset.to_be_bytes());
        out[9..13].copy_from_slice(&self.count.to_be_bytes());
        out[13..21].copy_from_slice(&self.append_time_ms.to_be_bytes());
        Bytes::copy_from_slice(&out)
    }

    /// Decodes; `None` for an entry without payload (a new leader's empty one, a membership change) or a malformed one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != CONTEXT_BYTES {
            return None;
        }
        let kind = match bytes[0] {
            1 => Kind::Batch,
            2 => Kind::Control,
            3 => Kind::Meta,
            _ => return None,
        };
        let context = Self {
            kind,
            base_offset: u64::from_be_bytes(bytes[1..9].try_into().ok()?),
            count: u32::from_be_bytes(bytes[9..13].try_into().ok()?),
            append_time_ms: u64::from_be_bytes(bytes[13..21].try_into().ok()?),
        };
        // what ends beyond all offsets is malformed
        context.base_offset.checked_add(u64::from(context.count)).map(|_| context)
    }

    /// The context of `entry` where it is a normal one with a payload.
    pub fn of(entry: &Entry) -> Option<Self> {
        (entry.get_entry_type() == EntryType::EntryNormal).then(|| Self::decode(&entry.context)).flatten()
    }

    /// One past the last offset of the payload.
    pub fn end_offset(&self) -> u64 {
        self.base_offset + u64::from(self.count)
    }
}

/// Where retention cuts a partition's log. The leader decides it, for all replicas alike.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Cut {
    /// Entries up to and including this index may be removed. Each replica removes them up to a checkpoint of its own.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// Offset of the first record that is kept: the start of the log, on every replica.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
}

/// A small record that changes a partition's replicated state beside its log of batches.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Control {
    /// Changes to subscriptions' cursors.
    #[prost(message, repeated, tag = "1")]
    pub cursors: Vec<CursorUpdate>,
    /// Moves the start of the log; one before the present start changes nothing.
    #[prost(message, optional, tag = "2")]
    pub cut: Option<Cut>,
}

impl Control {
    /// Encodes as protobuf.
    pub fn to_bytes(&self) -> Bytes {
        self.encode_to_vec().into()
    }
}

/// Bytes an entry takes, as retention and limits count them.
pub fn entry_bytes(entry: &Entry) -> u64 {
    (entry.data.len() + entry.context.len() + 32) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_survives_encoding_and_others_are_refused() {
        let context = Context { kind: Kind::Batch, base_offset: 1 << 40, count: 7, append_time_ms: 1_700_000_000_000 };
        assert_eq!(Context::decode(&context.encode()), Some(context));
        assert_eq!(Context::decode(b""), None);
        assert_eq!(Context::decode(&[9; CONTEXT_BYTES]), None);
    }
}
