//! No value of a topic's or subscription's spec makes the core panic, or delete a record before its time.

use proptest::prelude::*;
use weir_core::meta::state::{Push, SubscriptionSpec, TopicSpec};
use weir_sim::specs;

/// Numbers at the edges of what they are kept in, and any others.
fn number() -> impl Strategy<Value = u64> {
    let edges = (0u32..64, -2i64..3).prop_map(|(bit, by)| (1u64 << bit).wrapping_add_signed(by));
    prop_oneof![
        edges,
        Just(0),
        Just(u64::MAX),
        Just(i64::MAX as u64),
        Just((i64::MAX as u64).wrapping_mul(1_000)),
        any::<u64>()
    ]
}

fn small() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..20, Just(u32::MAX), any::<u32>()]
}

prop_compose! {
    fn topic()(
        partitions in small(), replicas in small(), retention_ms in number(), retention_bytes in number(),
        message_bytes_max in small(), quorum_memory in any::<bool>(),
    ) -> TopicSpec {
        let schedule_for = String::new();
        TopicSpec { partitions, replicas, retention_ms, retention_bytes, message_bytes_max, quorum_memory, schedule_for }
    }
}

prop_compose! {
    fn subscription()(
        (start, mode, deliveries_max, in_flight_max, in_flight_member_max) in (0i32..3, -1i32..5, small(), small(), small()),
        (ack_deadline_ms, backoff_min_ms, backoff_max_ms) in (number(), number(), number()),
        (messages_per_second, bytes_per_second, burst_messages) in (number(), number(), number()),
        start_ms in proptest::option::of(number()),
        (priorities, concurrency, timeout_ms) in (any::<bool>(), small(), number()),
    ) -> SubscriptionSpec {
        let push = Some(Push { endpoint: "http://mail/".into(), concurrency, timeout_ms });
        SubscriptionSpec {
            start, ack_deadline_ms, mode, backoff_min_ms, backoff_max_ms, in_flight_max, deliveries_max,
            messages_per_second, bytes_per_second, burst_messages, in_flight_member_max, priorities, push, start_ms,
            ..Default::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..Default::default() })]

    #[test]
    fn no_spec_makes_the_core_panic_or_delete_a_record_early(topic in topic(), subscription in subscription()) {
        specs::run(&topic, &subscription);
    }
}

/// The values of the report: two endless retentions, and one that was taken for 384 ms.
#[test]
fn an_endless_retention_keeps_everything() {
    for retention_ms in [u64::MAX, (i64::MAX as u64).wrapping_mul(1_000), i64::MAX as u64] {
        let topic = TopicSpec { retention_ms, retention_bytes: u64::MAX, ..Default::default() };
        specs::run(&topic, &SubscriptionSpec::default());
    }
}
