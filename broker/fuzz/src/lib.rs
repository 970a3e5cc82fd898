//! Decoders of bytes from elsewhere, each under whatever bytes there may be: no panic, no memory beyond what came, and what is
//! taken is read back as the same. `fuzz_targets` runs them under libFuzzer, `tests/corpus.rs` over what was found before.

use bytes::Bytes;
use prost::Message as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use weir_broker::dead_letter::{self, Source};
use weir_broker::declare;
use weir_broker::filter::Filter;
use weir_broker::metrics::Metrics;
use weir_broker::selection::{self, Selection};
use weir_broker::service::bounds;
use weir_broker::{hub, scheduler};
use weir_core::batch::BatchHeader;
use weir_core::cursor::Failed;
use weir_core::entry::{Context, Control};
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::command::Command;
use weir_core::meta::plan::plan;
use weir_core::meta::state::{Broker, MetaState};
use weir_core::partition::PartitionState;
use weir_core::storage::Checkpoint;
use weir_core::tail::LogBatch;
use weir_proto::records::{Compression, Record, decode, encode, of_encoded, seal};
use weir_proto::{limits, v1};
use weir_store::keys::{log, offsets, state};

/// Takes whatever bytes there may be.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 7] = [
    ("batch", batch),
    ("record", record),
    ("entry", entry),
    ("snapshot", snapshot),
    ("rows", rows),
    ("manifest", manifest),
    ("spec", spec),
];

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
    seal(&mut mended);
    look_at_batch(&mended);
}

fn look_at_batch(data: &[u8]) {
    let header = BatchHeader::validate(data);
    let records = weir_proto::records::decode(&Bytes::copy_from_slice(data));
    if let (Ok(header), Ok(records)) = (header, records) {
        assert_eq!(records.len(), header.count as usize, "as many records as the broker counted");
    }
}

/// Records of any bytes in a batch whose header is right, through every reader: each record that is decoded is carried whole by all that
/// move or deliver it, and a batch that is not is a dead letter of its own. The first byte is the codec, the second the count.
pub fn record(data: &[u8]) {
    let [codec, count, body @ ..] = data else { return };
    let codecs = [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];
    let (compression, count) = (codecs[usize::from(codec % 5)], i32::from(*count).max(1));
    let batch = of_encoded(body, compression, count).expect("far below 2 GiB");
    if BatchHeader::validate(&batch).is_err() {
        return; // it is not stored
    }
    let source = Source {
        subscription: SubscriptionId(1),
        subscription_name: "default/s".to_owned(),
        dead_letter_topic: "default/dead".to_owned(),
        topic: "default/t".to_owned(),
        partition: 0,
        group: GroupId(2),
        seeks: 0,
    };
    assert_eq!(Compression::of_batch(&batch), Some(compression));
    match decode(&batch) {
        Ok(records) => {
            assert_eq!(records.len(), count as usize, "as many records as the broker counted");
            assert_eq!(decode(&encode(&records, compression, None).expect("decoded before")), Ok(records.clone()));
            records.into_iter().for_each(|record| carry(&source, record, compression));
        }
        Err(_) => {
            let stored =
                LogBatch { base_offset: 5, count: count as u32, term: 1, append_time_ms: 9, data: batch.clone() };
            let letter = dead_letter::of_batch(&source, &stored);
            assert_eq!(letter.record().value, Some(batch), "byte for byte");
        }
    }
}

static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Arc::new(Metrics::new("/".into())));

fn carry(source: &Source, record: Record, compression: Compression) {
    let message = v1::Message::from(record.clone());
    let sent = v1::Message::decode(message.encode_to_vec().as_slice()).expect("what was just written");
    assert_eq!(Record::from(sent.clone()), record, "a message on the wire is the record");
    let received = v1::ReceivedMessage { message: Some(sent), ..Default::default() };
    let _ = weir_broker::push::to_request("http://h/x", "default/t", &received);
    for filter in ["key == 'a' || size > 3", "headers.a == 'b' && timestamp > timestamp('2023-01-01T00:00:00Z')"] {
        Filter::compile(filter).ok().flatten().expect("a filter").verdict(&record);
    }
    let _ = (scheduler::due_of(&record), hub::priority(&record));
    let selection = Selection {
        subscription: Bytes::from_static(b"default/s"),
        filter: None,
        routing_keys: vec!["a.#".to_owned()],
        topic: String::new(),
        metrics: METRICS.clone(),
    };
    let limit = selection::Limit { wanted: 1, time: std::time::Duration::from_secs(1), costly: true };
    selection.judge(std::slice::from_ref(&record), &mut Vec::new(), limit);
    let letter = dead_letter::of_message(source, record.clone(), Failed { offset: 5, deliveries: 3 }, compression);
    let mut moved =
        decode(&encode(&[letter.record().clone()], compression, None).expect("a record")).expect("a record");
    let own = |name: &str| name.starts_with(dead_letter::PREFIX);
    moved[0].headers.retain(|(name, _)| !own(name));
    let mut kept = record;
    kept.headers.retain(|(name, _)| !own(name));
    assert_eq!(moved, [kept], "a dead letter is the whole message");
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

/// Specs through every entry point, and the core run over what they let through: as manifests, as the Admin service's messages (a
/// length, the topic's, the subscription's), and as what a consumer says of messages.
pub fn spec(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let (mut declared, mut errors) = Default::default();
        weir_crds::manifest::read_text(Path::new("topics.yaml"), text, &mut declared, &mut errors);
        let weir_crds::manifest::Declared { topics, subscriptions, .. } = declared;
        // what a manifest may say, a broker takes: the bounds are the same ones
        for topic in &topics {
            declare::topic(Some(topic.spec)).expect("within the bounds of a manifest");
        }
        for subscription in &subscriptions {
            limits::check_subscription(&subscription.spec).expect("within the bounds of a manifest");
        }
        let topic = topics.first().map(|t| t.spec);
        let subscription = subscriptions.first().map(|s| s.spec.clone());
        run(topic, subscription);
    }
    let Some((length, rest)) = data.split_first() else { return };
    let (topic, subscription) = rest.split_at(rest.len().min(usize::from(*length)));
    run(v1::TopicSpec::decode(topic).ok(), v1::SubscriptionSpec::decode(subscription).ok());
    if let Ok(said) = v1::PullRequest::decode(rest)
        && bounds::settlement(&said.acks, &said.nacks, &said.extensions).is_ok()
    {
        let waits = said.nacks.iter().filter_map(|n| n.delay_ms).chain(said.extensions.iter().map(|e| e.deadline_ms));
        assert!(waits.max().is_none_or(|longest| longest <= limits::WAIT_MS_MAX));
    }
}

fn run(topic: Option<v1::TopicSpec>, subscription: Option<v1::SubscriptionSpec>) {
    if let Ok(topic) = declare::topic(topic) {
        weir_sim::specs::run(&topic, &declare::subscription(subscription).unwrap_or_default());
    } else if let Ok(subscription) = declare::subscription(subscription) {
        weir_sim::specs::run(&Default::default(), &subscription);
    }
}
