//! `make bench`: how long each path takes, and how often it asks for memory.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::cell::LazyCell;
use std::hint::black_box;
use std::sync::Arc;
use weir_bench::{Embedded, PATHS, RECORDS, VALUE_BYTES, publish_to_disk};
use weir_broker::filter::{Filter, WORK_MAX};
use weir_core::eraftpb::Entry;
use weir_core::ids::GroupId;
use weir_core::storage::{Store as _, WriteOp};
use weir_proto::records::Record;
use weir_store::rocks::RocksStore;

/// Says how often a step asks for memory, once it has run a while.
fn allocations(name: &str, step: &mut dyn FnMut()) {
    (0..100).for_each(|_| step());
    let counted = allocation_counter::measure(|| (0..100).for_each(|_| step()));
    println!(
        "{name}: {:.1} allocations, {} bytes of them",
        counted.count_total as f64 / 100.0,
        counted.bytes_total / 100
    );
}

fn paths(criterion: &mut Criterion) {
    for path in &PATHS {
        let mut step = (path.prepare)();
        allocations(path.name, &mut step);
        let mut group = criterion.benchmark_group("paths");
        group.throughput(Throughput::Bytes(path.bytes as u64));
        group.bench_function(path.name, |bencher| bencher.iter(&mut step));
    }
}

fn disk(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("disk");
    let folder = tempfile::tempdir().expect("a folder");
    for (name, records) in [("publish-one-record", 1), ("publish-one-batch", RECORDS)] {
        let mut step = publish_to_disk(&folder.path().join(name), records);
        group.throughput(Throughput::Bytes((records * VALUE_BYTES) as u64));
        group.bench_function(name, |bencher| bencher.iter(&mut step));
    }
    let store = Arc::new(RocksStore::open(&folder.path().join("rounds")).expect("an empty folder"));
    for kib in [1usize, 16, 64, 256] {
        let mut index = 0;
        group.throughput(Throughput::Bytes(6 * kib as u64 * 1_024));
        // six partitions' values in one write, and one sync, as a broker does it
        group.bench_function(format!("round-six-times-{kib}-KiB"), |bencher| {
            bencher.iter(|| {
                index += 1;
                let entry = Entry { index, term: 1, data: vec![b'x'; kib << 10].into(), ..Default::default() };
                let append =
                    |group| WriteOp::Append { group: GroupId(group), entries: vec![entry.clone()], replace_from: None };
                let ops: Vec<WriteOp> = (1..=6).map(append).collect();
                store.write(black_box(&ops)).expect("there is room");
                store.sync().expect("there is room");
            });
        });
    }
}

/// One message in flight, three brokers in this process.
fn replicated(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("three-brokers");
    let embedded = LazyCell::new(|| Embedded::start("bench", 3).expect("brokers start"));
    group.throughput(Throughput::Elements(1));
    for topic in ["synced", "memory"] {
        let run = |times| embedded.one_by_one(topic, times, false).expect("it is acknowledged").into_iter().sum();
        group.bench_function(format!("publish-{topic}"), |bencher| bencher.iter_custom(run));
    }
}

/// One message in flight through one broker of this process, until a reader has it.
fn in_process(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one-broker");
    let embedded = LazyCell::new(|| Embedded::start("alone", 1).expect("a broker starts"));
    group.throughput(Throughput::Elements(1));
    let run = |times| embedded.one_by_one("memory", times, true).expect("it is read").into_iter().sum();
    group.bench_function("to-reader-in-process", |bencher| bencher.iter_custom(run));
}

/// The most expensive filters that are accepted, each over the longest key for which it is still evaluated, with the estimate of what
/// that takes at most.
fn filters(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("filters");
    group.sample_size(10);
    let grown = (0..7).fold("key".to_owned(), |text, _| format!("({text} + {text})"));
    let patterns = |one: &str, times| vec![format!("key.matches('{one}')"); times].join(" || ");
    let scans: Vec<String> = (0..40).map(|i| format!("key.contains('{}b{i}')", "a".repeat(20))).collect();
    let entries: Vec<String> = (0..100).map(|i| format!("key + '{i}': 1")).collect();
    let expressions = [
        ("one-word", "key == 'a'".to_owned()),
        ("texts-put-together", format!("{grown} == ''")),
        ("one-pattern", patterns("^(a|aa|[ab]c?)*b$", 1)),
        ("sixteen-patterns", patterns("(a|aa|[ab]c?)*b$", 16)),
        ("pattern-of-many-states", patterns("[ab]*a[ab]{60}[x-z]", 1)),
        ("patterns-of-many-states", patterns("[ab]*a[ab]{400}[x-z]", 4)),
        ("unicode-pattern", patterns(r"\\w{2}[x-z]", 1)),
        ("text-looked-for", scans.join(" || ")),
        ("list-of-keys", format!("'b' in [{}]", vec!["key"; 400].join(", "))),
        ("map-of-keys", format!("{{{}}}['b'] == 1", entries.join(", "))),
        ("times-parsed", vec!["timestamp(string(timestamp)) > timestamp"; 30].join(" || ")),
    ];
    // without a pattern that an automaton could learn
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if seed >> 63 == 0 { b'a' } else { b'b' }
    };
    let letters: Vec<u8> = (0..1 << 20).map(|_| next()).collect();
    for (name, expression) in expressions {
        let filter = match Filter::compile(&expression) {
            Ok(filter) => filter.expect("it is not empty"),
            Err(why) => {
                println!("filters/{name}: refused: {}", why.message);
                continue;
            }
        };
        let with_key = |bytes: usize| Record { key: Some(letters[..bytes].to_vec().into()), ..Default::default() };
        let longest = (0..=20).rev().map(|power| with_key(1 << power)).find(|record| filter.work(record) <= WORK_MAX);
        let Some(record) = longest else { continue };
        let (bytes, ms) = (record.key.as_ref().map_or(0, |key| key.len()), filter.work(&record) as f64 / 1e6);
        println!("filters/{name}: a key of {bytes} bytes, estimated at {ms:.3} ms at most");
        group.bench_function(name, |bencher| bencher.iter(|| filter.verdict(black_box(&record))));
    }
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20);
    targets = paths, filters, disk, replicated, in_process
}
criterion_main!(all);
