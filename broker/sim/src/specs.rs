//! The core under topics and subscriptions of any values. Entry points refuse what is out of bounds; this is what must hold of
//! the numbers that they let through, and of all others too: no function panics, and nothing is deleted before its time.

use std::sync::Arc;
use weir_core::batch::{BatchHeader, synthetic};
use weir_core::cursor::{Cursor, OffsetRange};
use weir_core::delivery::{Delivery, Return};
use weir_core::ids::{BrokerId, GroupId, ReplicaId, Ticket};
use weir_core::meta::command::{ApplySubscription, ApplyTopic, Kind, Placement};
use weir_core::meta::plan;
use weir_core::meta::state::{Broker, MetaState, SubscriptionSpec, TopicSpec};
use weir_core::node::{Limits, Node, Now};
use weir_core::rate::Bucket;
use weir_core::schedule::Schedule;
use weir_core::storage::Store as _;
use weir_store::mem::MemStore;

/// When the node starts, ms since the epoch.
const BEGIN_MS: u64 = 1_700_000_000_000;
/// Ticks of a run; retention is evaluated several times within them.
const TICKS: u64 = 260;
/// More than a run writes into the log, bytes.
const WRITTEN_MAX: u64 = 1 << 20;
/// Messages that pass through the delivery.
const MESSAGES: u64 = 40;

/// Runs metadata, retention, delivery, rate and schedule with these specs. Panics where one of them does, or where a record is
/// removed that the topic's retention keeps.
pub fn run(topic: &TopicSpec, subscription: &SubscriptionSpec) {
    let mut meta = MetaState::form("c", &[Broker { id: 1, name: "b-1".to_owned(), ..Default::default() }]);
    // as declared: refused where the number of partitions is another than was placed
    let declared = ApplyTopic { name: "default/declared".into(), spec: topic.clone(), ..Default::default() };
    let _ = meta.apply(&Kind::ApplyTopic(declared).into());
    let spec = TopicSpec { partitions: 1, replicas: 1, ..topic.clone() };
    let placements = vec![Placement { brokers: vec![1] }];
    let topic = ApplyTopic { name: "default/t".into(), spec, placements, ..Default::default() };
    meta.apply(&Kind::ApplyTopic(topic.clone()).into()).expect("one partition was placed");
    retain(&meta, &topic.spec);
    let spec = SubscriptionSpec { topic: topic.name.clone(), ..subscription.clone() };
    let subscription = ApplySubscription { name: "default/s".into(), spec, ..Default::default() };
    meta.apply(&Kind::ApplySubscription(subscription.clone()).into()).expect("its topic exists");
    plan::plan(&meta);
    retain(&meta, &topic.spec);
    deliver(&subscription.spec);
    limit(&subscription.spec);
    schedule(&[subscription.spec.start_ms.unwrap_or(0), subscription.spec.ack_deadline_ms, topic.spec.retention_ms]);
}

/// A node alone: what is younger and less than the topic keeps is there at the end.
fn retain(meta: &MetaState, spec: &TopicSpec) {
    let store = Arc::new(MemStore::default());
    let limits = Limits { checkpoint_bytes: 1_000, ..Limits::default() };
    let at = |tick: u64| Now { mono_ms: tick * 50, log_ms: BEGIN_MS + tick * 50 };
    let mut node = Node::open(BrokerId(1), store.clone(), limits, 1, at(0)).expect("an empty store opens");
    node.create_meta(ReplicaId(1), Some(meta));
    for tick in 1..TICKS {
        node.tick(at(tick));
        if let Some(group) = meta.group_of("default/t", 0) {
            publish(&mut node, tick, group);
        }
        settle(&mut node, &store);
    }
    let group = meta.group_of("default/t", 0).and_then(|group| node.group(group)).expect("the topic's partition");
    let written = group.log().tail().end_offset();
    let start = group.log().tail().start_offset();
    assert!(written > 100, "{written} records were written");
    let old = spec.retention_ms > 0 && spec.retention_ms <= TICKS * 50;
    let large = spec.retention_bytes > 0 && spec.retention_bytes <= WRITTEN_MAX;
    assert!(start == 0 || old || large, "{start} records were removed that {spec:?} keeps");
}

fn publish(node: &mut Node, ticket: u64, group: GroupId) {
    let data = synthetic(1, None, &[7; 100]);
    let header = BatchHeader::validate(&data).expect("a whole batch");
    node.publish(Ticket(ticket), group, data.into(), &header);
}

/// Carries out what the node wants written until it wants nothing more.
fn settle(node: &mut Node, store: &MemStore) {
    while let Some(round) = node.drain().round {
        store.write(&round.ops).expect("memory takes every write");
        node.written(round.id);
        store.sync().expect("memory takes every sync");
        node.synced(round.id);
    }
}

/// Two members take, give back, keep for longer and let run out what they are given, with the largest numbers they can name.
fn deliver(spec: &SubscriptionSpec) {
    let mut delivery = Delivery::new(spec.policy(), Cursor::at(0));
    let mut now_ms = BEGIN_MS;
    for member in 1..3 {
        let _ = delivery.attach(member, &format!("m-{member}"));
        delivery.credit(member, u64::MAX);
    }
    for at in 0..MESSAGES {
        delivery.wants();
        delivery.feed(at % 5, (at % 12) as u8);
        let grants = delivery.grants(now_ms, 3);
        for grant in grants {
            let range = OffsetRange::one(grant.offset);
            match grant.offset % 4 {
                0 => drop(delivery.ack(range)),
                1 => {
                    let delay_ms = [None, Some(0), Some(u64::MAX)][(at % 3) as usize];
                    delivery.give_back(vec![(range, Return::Failed { delay_ms })], now_ms);
                }
                2 => delivery.extend(OffsetRange { start: 0, end: u64::MAX }, u64::MAX, now_ms),
                _ => {}
            }
        }
        now_ms = now_ms.saturating_add(1 << (at + 8).min(62));
        delivery.tick(now_ms);
        for dying in delivery.take_dying() {
            delivery.bury(dying.offset);
        }
        delivery.take_failed();
    }
    delivery.tick(u64::MAX);
    delivery.detach(1);
    assert!(delivery.cursor().position() <= MESSAGES);
}

/// The declared rate, taken far beyond what there is.
fn limit(spec: &SubscriptionSpec) {
    for (per_second, burst) in [(spec.messages_per_second, spec.burst_messages), (spec.bytes_per_second, 0)] {
        let mut bucket = Bucket::new(per_second, burst, 0);
        for now_ms in [0, 1, 1_000, BEGIN_MS, u64::MAX] {
            let there = bucket.available(now_ms);
            bucket.take(there);
            bucket.take(u64::MAX);
            bucket.wait_ms();
            bucket.give(burst);
        }
    }
}

/// Messages due at these times, and around them.
fn schedule(times: &[u64]) {
    let mut schedule = Schedule::new(4);
    for (offset, due) in times.iter().flat_map(|t| [*t, t.wrapping_sub(1), t.wrapping_add(1), u64::MAX]).enumerate() {
        schedule.add(due, offset as u64);
    }
    for now_ms in [0, BEGIN_MS, u64::MAX - 1, u64::MAX] {
        schedule.take_due(now_ms, 3);
        schedule.next_due_ms();
    }
}
