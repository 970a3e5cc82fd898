//! Decoders of bytes from elsewhere, each under whatever bytes there may be: no panic, no memory beyond what came, and what is
//! taken is read back as the same. `fuzz_targets` runs them under libFuzzer, `tests/corpus.rs` over what was found before.

use bytes::Bytes;
use prost::Message as _;
use std::path::Path;
use weir_core::batch::BatchHeader;
use weir_core::entry::{Context, Control};
use weir_core::meta::command::Command;
use weir_core::meta::plan::plan;
use weir_core::meta::state::{Broker, MetaState};
use weir_core::partition::PartitionState;
use weir_core::storage::Checkpoint;
use weir_store::keys::{log, offsets, state};

/// Takes whatever bytes there may be.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 5] =
    [("batch", batch), ("entry", entry), ("snapshot", snapshot), ("rows", rows), ("manifest", manifest)];

/// A record batch: its header, and its records. Also with a length, a checksum and a codec that are right, which chance
/// does not find.
pub fn batch(data: &[u8]) {
    look_at_batch(data);
    let mut mended = data.to_vec();
    if mended.len() < weir_core::batch::HEADER_BYTES {
        return;
    }
    let length = (mended.len() - 12) as i32;
    mended[8..12].copy_from_slice(&length.to_be_bytes());
    mended[16] = 2;
    let crc = crc32c::crc32c(&mended[21..]);
    mended[17..21].copy_from_slice(&crc.to_be_bytes());
    look_at_batch(&mended);
}

fn look_at_batch(data: &[u8]) {
    let header = BatchHeader::validate(data);
    let records = weir_proto::records::decode(&Bytes::copy_from_slice(data));
    if let (Ok(header), Ok(records)) = (header, records) {
        assert_eq!(records.len(), header.count as usize, "as many records as the broker counted");
    }
}

/// A Raft entry: as the log keeps it, and applied to a partition.
pub fn entry(data: &[u8]) {
    let Some((index, value)) = data.split_first_chunk::<8>() else { return };
    let key = log::key(1, u64::from_be_bytes(*index));
    let mut value = value.to_vec();
    let _ = log::decode(&key, value.clone().into());
    if value.len() < log::PREFIX_BYTES {
        return;
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&key), &value[4..]);
    value[..4].copy_from_slice(&crc.to_be_bytes());
    let Ok(entry) = log::decode(&key, value.clone().into()) else { return };
    let mut again = Vec::new();
    log::encode(&key, &entry, &mut again);
    assert_eq!(again, value, "an entry is written as it was read");
    let context = Context::of(&entry);
    let mut partition = PartitionState { next_offset: context.map_or(0, |c| c.base_offset), ..Default::default() };
    partition.apply(&entry);
    let kept = PartitionState::decode(&partition.encode(), partition.next_offset);
    assert_eq!(kept, Ok(partition), "state survives its checkpoint");
    let _ = Control::decode(entry.data.clone());
    if let Ok(command) = Command::decode(entry.data.clone()) {
        let brokers = [1, 2, 3].map(|id| Broker { id, name: format!("weir-{id}"), ..Default::default() });
        let mut meta = MetaState::form("cluster", &brokers);
        let _ = meta.apply(&command);
        plan(&meta);
    }
}

/// A checkpoint as a leader sends it, and both kinds of state in one.
pub fn snapshot(data: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::decode(data) {
        let key = state::checkpoint_key(1, checkpoint.index);
        let kept = state::encode_checkpoint(&key, &checkpoint);
        assert_eq!(state::decode_checkpoint(&key, &kept), Some(checkpoint.clone()));
        look_at_state(&checkpoint.state, checkpoint.next_offset);
    }
    look_at_state(&Bytes::copy_from_slice(data), 1 << 40);
}

fn look_at_state(state: &Bytes, next_offset: u64) {
    if let Ok(partition) = PartitionState::decode(state, next_offset) {
        // of what was read once, all is kept: a bitmap may have come with empty containers, which are not written
        let written = partition.encode();
        let again = PartitionState::decode(&written, next_offset).expect("what was just written");
        assert_eq!(again.encode(), written, "state is written as it was read");
    }
    if let Ok(meta) = MetaState::decode(state.clone()) {
        assert_eq!(MetaState::decode(meta.encode_to_vec().as_slice()), Ok(meta));
    }
}

/// Rows of the store: any key, any value. The first byte says how long the key is.
pub fn rows(data: &[u8]) {
    let Some((length, rest)) = data.split_first() else { return };
    let (key, value) = rest.split_at(rest.len().min(usize::from(length % 32)));
    let sealed = crc32c::crc32c_append(crc32c::crc32c(key), value).to_be_bytes().into_iter();
    let sealed: Vec<u8> = sealed.chain(value.iter().copied()).collect();
    for value in [value, &sealed] {
        let _ = log::decode(key, Bytes::copy_from_slice(value));
        let _ = offsets::decode(value);
        if let Some(hard) = state::decode_hard(key, value) {
            assert!(value.starts_with(&state::encode_hard(key, &hard)) || value.len() != 28);
        }
        if let Some((replica, standing)) = state::decode_replica(key, value) {
            assert!(value.len() != 13 || state::encode_replica(key, replica, standing) == value);
        }
        let _ = state::decode_checkpoint(key, value);
    }
}

/// A file of manifests.
pub fn manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (mut declared, mut errors) = Default::default();
    weir_crds::manifest::read_text(Path::new("topics.yaml"), text, &mut declared, &mut errors);
    let lines = text.lines().count().max(1);
    for error in &errors {
        assert!((1..=lines + 1).contains(&error.line), "line {} of {lines}: {error}", error.line);
    }
    for (_, at) in declared.origins.values() {
        assert!((1..=lines + 1).contains(at), "declared in line {at} of {lines}");
    }
}
