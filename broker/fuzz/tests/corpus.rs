//! What decoders read every day, and what was found before, once more: without libFuzzer, in the usual suite.

use bytes::Bytes;
use prost::Message as _;
use std::path::{Path, PathBuf};
use weir_core::cursor::{CursorUpdate, Failed, OffsetRange, Plan};
use weir_core::entry::{Context, Control, Kind};
use weir_core::eraftpb::Entry;
use weir_core::ids::ReplicaId;
use weir_core::meta::command;
use weir_core::meta::state::{Broker, MetaState};
use weir_core::partition::PartitionState;
use weir_core::storage::{Checkpoint, HardState};
use weir_proto::records::{Compression, Record, Stamp, encode};
use weir_proto::v1;
use weir_store::keys::{log, state};

fn corpus(target: &str) -> PathBuf {
    Path::new("corpus").join(target) // tests run in their crate's folder, wherever that was built
}

#[test]
fn the_kept_corpus_of_every_target() {
    for (name, target) in weir_fuzz::TARGETS {
        let files = std::fs::read_dir(corpus(name)).unwrap().map(|f| f.unwrap().path());
        let count = files.map(|file| target(&std::fs::read(&file).unwrap())).count();
        assert!(count > 0, "{name} has no corpus");
        println!("{name}: {count} inputs");
    }
}

/// With WEIR_BLESS these become the beginning of the corpus.
#[test]
fn what_weir_itself_writes() {
    for (name, target) in weir_fuzz::TARGETS {
        for (at, data) in written(name).iter().enumerate() {
            target(data);
            if std::env::var_os("WEIR_BLESS").is_some() {
                std::fs::create_dir_all(corpus(name)).unwrap();
                std::fs::write(corpus(name).join(format!("written-{at}")), data).unwrap();
            }
        }
    }
}

fn written(target: &str) -> Vec<Vec<u8>> {
    match target {
        "batch" => batches().iter().map(|b| b.to_vec()).collect(),
        "record" => batches().iter().map(|b| [&b[22..23], &[2], &b[61..]].concat()).collect(),
        "entry" => entries().iter().map(entry).collect(),
        "snapshot" => vec![partition_state(), meta_state()],
        "rows" => rows(),
        "spec" => specs(),
        _ => vec![include_bytes!("../../../examples/orders.yaml").to_vec()],
    }
}

fn batches() -> Vec<Bytes> {
    let record = |key: &str, value: &str| Record {
        key: Some(key.to_owned().into()),
        value: Some(value.to_owned().into()),
        headers: vec![("content-type".into(), Some("text/plain".into())), ("content-type".into(), None)],
        timestamp_ms: 1_700_000_000_000,
    };
    let two = [record("k", "hello hello hello hello"), record("", "")];
    let codecs =
        [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd].into_iter();
    codecs.map(|codec| encode(&two, codec, Some(Stamp { id: 7, epoch: 1, sequence: 4 })).unwrap()).collect()
}

fn entries() -> Vec<Entry> {
    let context = |kind, count| Context { kind, base_offset: 9, count, append_time_ms: 1_700_000_000_000 }.encode();
    let cursor = CursorUpdate {
        subscription: 5,
        seek: Some(3),
        acked: vec![OffsetRange { start: 4, end: 6 }, OffsetRange { start: 7, end: 8 }],
        failed: vec![Failed { offset: 6, deliveries: 2 }],
        plan: Some(Plan { producer: 1 << 62, sequence: 3, offsets: vec![8, 9], renews: true }),
        ..Default::default()
    };
    let kind = command::Kind::Expect(Broker { name: "weir-3".into(), ..Default::default() });
    let command = command::Command { kind: Some(kind) }.encode_to_vec();
    let payloads = [
        (context(Kind::Batch, 2), batches()[0].clone()),
        (context(Kind::Control, 0), Control { cursors: vec![cursor], ..Default::default() }.to_bytes()),
        (context(Kind::Meta, 0), command.into()),
        (Bytes::new(), Bytes::new()),
    ];
    let made = |(context, data)| Entry { index: 12, term: 3, context, data, ..Default::default() };
    payloads.into_iter().map(made).collect()
}

fn entry(entry: &Entry) -> Vec<u8> {
    let mut out = entry.index.to_be_bytes().to_vec();
    log::encode(&log::key(1, entry.index), entry, &mut out);
    out
}

fn partition_state() -> Vec<u8> {
    let mut partition = PartitionState { next_offset: 9, ..Default::default() };
    entries().iter().for_each(|e| partition.apply(e));
    let checkpoint = Checkpoint {
        index: 12,
        term: 3,
        voters: vec![1, 2, 3],
        next_offset: partition.next_offset,
        state: partition.encode(),
        ..Default::default()
    };
    checkpoint.encode_to_vec()
}

fn meta_state() -> Vec<u8> {
    let brokers = [1, 2, 3].map(|id| Broker { id, name: format!("weir-{id}"), ..Default::default() });
    MetaState::form("cluster", &brokers).encode_to_vec()
}

fn rows() -> Vec<Vec<u8>> {
    let (hard, replica) = (state::key(3, state::HARD), state::key(3, state::REPLICA));
    let row = |key: &[u8], value: Vec<u8>| [&[key.len() as u8], key, &value].concat();
    vec![
        row(&hard, state::encode_hard(&hard, &HardState { term: 2, vote: 1, commit: 9 })),
        row(&replica, state::encode_replica(&replica, ReplicaId(8), state::Standing::Quarantined)),
        row(&log::key(1, 12), entry(&entries()[0])[8..].to_vec()),
    ]
}

/// What Weir writes with a few bytes changed, the same ones each time: most of it is decoded in part.
#[test]
fn records_with_changed_bytes_reach_every_reader() {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as usize
    };
    for data in written("record") {
        for _ in 0..2_000 {
            let mut changed = data.clone();
            for _ in 0..=next(3) {
                let at = next(changed.len());
                changed[at] = next(256) as u8;
            }
            changed.truncate(changed.len() - next(2) * next(8));
            weir_fuzz::record(&changed);
        }
    }
}

/// A manifest, and what it declares as the Admin service takes it; and the values that once wrapped.
fn specs() -> Vec<Vec<u8>> {
    let topic = |retention_ms| v1::TopicSpec { partitions: 1, replicas: 1, retention_ms, ..Default::default() };
    let subscription = v1::SubscriptionSpec { topic: "t".into(), start_ms: Some(0), ..Default::default() };
    let both = |topic: v1::TopicSpec| {
        let topic = topic.encode_to_vec();
        [&[topic.len() as u8], topic.as_slice(), &subscription.encode_to_vec()].concat()
    };
    let endless = "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: t}\nspec: {retention: {time: 18446744073709552s}}\n";
    vec![
        include_bytes!("../../../examples/orders.yaml").to_vec(),
        endless.as_bytes().to_vec(),
        both(topic(Some(60_000))),
        both(topic(Some(u64::MAX))),
        both(topic(None)),
    ]
}
