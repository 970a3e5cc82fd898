//! The paths that every message takes, each as something that can be done again and again: for `make bench` (time and allocations)
//! and for the bound on instructions that the tests keep.

mod embedded;
mod trio;

use bytes::Bytes;
pub use embedded::Embedded;
use std::hint::black_box;
use std::sync::Arc;
use trio::Trio;
use weir_core::batch::BatchHeader;
use weir_proto::records::{self, Compression, Record, Stamp};
use weir_store::mem::MemStore;
use weir_store::rocks::RocksStore;

/// Records of a batch where nothing else is said.
pub const RECORDS: usize = 1_000;
/// Bytes of a record's value.
pub const VALUE_BYTES: usize = 100;

/// A path.
pub struct Path {
    /// What is done, in a word or two.
    pub name: &'static str,
    /// Bytes of records that one step moves.
    pub bytes: usize,
    /// Makes what a step needs, and gives the step.
    pub prepare: fn() -> Box<dyn FnMut()>,
}

/// The paths in the order a message takes them.
pub const PATHS: [Path; 6] = [
    Path { name: "encode", bytes: RECORDS * VALUE_BYTES, prepare: encode },
    Path { name: "validate", bytes: RECORDS * VALUE_BYTES, prepare: validate },
    Path { name: "core-one-replica", bytes: RECORDS * VALUE_BYTES, prepare: || publish(1, RECORDS) },
    Path { name: "core-three-replicas", bytes: RECORDS * VALUE_BYTES, prepare: || publish(3, RECORDS) },
    Path { name: "core-three-replicas-single", bytes: VALUE_BYTES, prepare: || publish(3, 1) },
    Path { name: "decode", bytes: RECORDS * VALUE_BYTES, prepare: decode },
];

fn some_records(count: usize) -> Vec<Record> {
    let value = Bytes::from(vec![b'x'; VALUE_BYTES]);
    vec![Record { value: Some(value), timestamp_ms: 1_700_000_000_000, ..Default::default() }; count]
}

/// A batch of so many records.
pub fn batch(records: usize) -> Bytes {
    let stamp = Some(Stamp { id: -1, epoch: -1, sequence: -1 });
    records::encode(&some_records(records), Compression::None, stamp).expect("they are right")
}

fn encode() -> Box<dyn FnMut()> {
    let list = some_records(RECORDS);
    Box::new(move || drop(black_box(records::encode(black_box(&list), Compression::None, None))))
}

fn validate() -> Box<dyn FnMut()> {
    let batch = batch(RECORDS);
    Box::new(move || drop(black_box(BatchHeader::validate(black_box(&batch)))))
}

fn decode() -> Box<dyn FnMut()> {
    let batch = batch(RECORDS);
    Box::new(move || drop(black_box(records::decode(black_box(&batch)))))
}

/// A batch through the cores of so many brokers, from its publishing to its answer; they keep their logs in memory.
pub fn publish(brokers: u64, records: usize) -> Box<dyn FnMut()> {
    let mut cores = Trio::new((0..brokers).map(|_| Arc::new(MemStore::default()) as _).collect());
    let batch = batch(records);
    Box::new(move || _ = black_box(cores.publish(batch.clone())))
}

/// As [`publish`] through one broker whose log is RocksDB in `folder`, synced before the answer.
pub fn publish_to_disk(folder: &std::path::Path, records: usize) -> Box<dyn FnMut()> {
    let store = RocksStore::open(folder).expect("an empty folder");
    let mut cores = Trio::new(vec![Arc::new(store)]);
    let batch = batch(records);
    Box::new(move || _ = black_box(cores.publish(batch.clone())))
}
