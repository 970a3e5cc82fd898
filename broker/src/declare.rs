//! Specs as the protocol carries them, made into those that the metadata keeps, and back: every bound is checked here, and every
//! default filled in. Pure; [`crate::service::admin`] proposes what comes of it.

use crate::filter::Filter;
use crate::scheduler;
use crate::service::{bounds, full_name};
use crate::status::Failure;
use tonic::Code;
use weir_core::delivery::{Mode, Policy};
use weir_core::meta::command::{Command, Kind};
use weir_core::meta::state as core;
use weir_core::pattern;
use weir_proto::limits::{self, OutOfBounds};
use weir_proto::v1;

/// How long a push endpoint may take where its subscription does not say, ms.
const PUSH_TIMEOUT_MS_DEFAULT: u64 = 10_000;
/// Characters of a full name.
const NAME_CHARS_MAX: usize = 2 * weir_proto::names::CHARS_MAX + 1;

// the core bounds what members ask for as well: both must be the same
const _: () = assert!(limits::WAIT_MS_MAX == weir_core::delivery::WAIT_MS_MAX);
const _: () = assert!(weir_proto::names::CHARS_MAX == weir_core::meta::names::PART_BYTES_MAX);
const _: () =
    assert!(limits::ACK_DEADLINE.max <= limits::WAIT_MS_MAX && limits::BACKOFF_MAX.max <= limits::WAIT_MS_MAX);

impl From<OutOfBounds> for Failure {
    fn from(refused: OutOfBounds) -> Self {
        Self::invalid(refused.limit.reason, format!("{} {}", refused.limit.wire, refused.message))
    }
}

/// A topic's spec.
pub fn topic(spec: Option<v1::TopicSpec>) -> Result<core::TopicSpec, Failure> {
    let spec = spec.ok_or_else(|| Failure::invalid("SPEC", "a topic needs a spec"))?;
    limits::check_topic(&spec)?;
    // in the metadata 0 says that there is none: it is outside of all these bounds
    Ok(core::TopicSpec {
        partitions: spec.partitions,
        replicas: spec.replicas,
        retention_ms: spec.retention_ms.unwrap_or(0),
        retention_bytes: spec.retention_bytes.unwrap_or(0),
        message_bytes_max: spec.message_bytes_max.unwrap_or(0),
        quorum_memory: spec.quorum_memory,
        schedule_for: String::new(),
    })
}

/// A subscription's spec.
pub fn subscription(spec: Option<v1::SubscriptionSpec>) -> Result<core::SubscriptionSpec, Failure> {
    let spec = spec.ok_or_else(|| Failure::invalid("SPEC", "a subscription needs a spec"))?;
    limits::check_subscription(&spec)?;
    let mode = Mode::try_from(spec.mode)
        .map_err(|_| Failure::invalid("MODE", format!("this broker knows no mode {}", spec.mode)))?;
    let start = if spec.from_earliest { core::Start::Earliest } else { core::Start::Latest };
    let default = Policy::default();
    let whole = core::SubscriptionSpec {
        topic: topic_or_pattern(&spec.topic)?,
        start: start.into(),
        ack_deadline_ms: spec.ack_deadline_ms.unwrap_or(default.ack_deadline_ms),
        mode: mode.into(),
        backoff_min_ms: spec.backoff_min_ms,
        backoff_max_ms: spec.backoff_max_ms.unwrap_or(default.backoff_max_ms.max(spec.backoff_min_ms)),
        in_flight_max: spec.in_flight_max.unwrap_or(default.leased_max as u32),
        deliveries_max: spec.deliveries_max.unwrap_or(0),
        dead_letter_topic: match spec.dead_letter_topic.as_str() {
            "" => String::new(),
            topic => full_name(topic)?,
        },
        filter: spec.filter,
        messages_per_second: spec.messages_per_second.unwrap_or(0),
        bytes_per_second: spec.bytes_per_second.unwrap_or(0),
        burst_messages: spec.burst_messages.unwrap_or(0),
        in_flight_member_max: spec.in_flight_member_max.unwrap_or(0),
        priorities: spec.priorities,
        routing_keys: routing_keys(spec.routing_keys)?,
        push: spec.push.map(|p| push(p, mode)).transpose()?,
        start_ms: spec.start_ms,
    };
    let reads = |topic: &str| topic == whole.topic || pattern::matches_topic(&whole.topic, topic);
    if !whole.dead_letter_topic.is_empty() && reads(&whole.dead_letter_topic) {
        return Err(Failure::invalid("DEAD_LETTER_TOPIC", "a topic cannot take its own dead letters"));
    }
    if whole.priorities && mode != Mode::Shared {
        return Err(Failure::invalid("PRIORITIES", "priorities need the mode shared: in the others order is kept"));
    }
    Ok(whole)
}

/// The spec that a topic's metadata is made of.
pub fn topic_declared(spec: &core::TopicSpec) -> v1::TopicSpec {
    v1::TopicSpec {
        partitions: spec.partitions,
        replicas: spec.replicas,
        retention_ms: set(spec.retention_ms),
        retention_bytes: set(spec.retention_bytes),
        message_bytes_max: set(spec.message_bytes_max),
        quorum_memory: spec.quorum_memory,
    }
}

/// The spec that a subscription's metadata is made of.
pub fn subscription_declared(spec: &core::SubscriptionSpec) -> v1::SubscriptionSpec {
    v1::SubscriptionSpec {
        topic: spec.topic.clone(),
        from_earliest: spec.start() == core::Start::Earliest,
        start_ms: spec.start_ms,
        ack_deadline_ms: set(spec.ack_deadline_ms),
        mode: spec.mode,
        backoff_min_ms: spec.backoff_min_ms,
        backoff_max_ms: set(spec.backoff_max_ms),
        in_flight_max: set(spec.in_flight_max),
        deliveries_max: set(spec.deliveries_max),
        dead_letter_topic: spec.dead_letter_topic.clone(),
        filter: spec.filter.clone(),
        messages_per_second: set(spec.messages_per_second),
        bytes_per_second: set(spec.bytes_per_second),
        burst_messages: set(spec.burst_messages),
        in_flight_member_max: set(spec.in_flight_member_max),
        priorities: spec.priorities,
        routing_keys: spec.routing_keys.clone(),
        push: spec.push.as_ref().map(|p| v1::Push {
            endpoint: p.endpoint.clone(),
            concurrency: set(p.concurrency),
            timeout_ms: set(p.timeout_ms),
        }),
    }
}

/// The metadata has 0 for what was not set.
fn set<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

/// The topic of a subscription: a full name, or a pattern of a namespace's.
fn topic_or_pattern(topic: &str) -> Result<String, Failure> {
    if !pattern::is_pattern(topic) {
        return full_name(topic);
    }
    let (namespace, names) = topic.split_once('/').unwrap_or((weir_proto::names::NAMESPACE_DEFAULT, topic));
    // a word that a `*` or `#` could stand for
    let instance = names.replace(['*', '#'], "x");
    full_name(&format!("{namespace}/{instance}"))?;
    if !pattern::is_well_formed(names) {
        let text = format!("'{topic}' is not a pattern: * and # stand for whole words, between dots");
        return Err(Failure::invalid("PATTERN", text));
    }
    Ok(format!("{namespace}/{names}"))
}

fn routing_keys(patterns: Vec<String>) -> Result<Vec<String>, Failure> {
    match patterns.iter().find(|p| !pattern::is_well_formed(p)) {
        Some(bad) => {
            let shown: String = bad.chars().take(60).collect();
            let text = format!("'{shown}' is not a pattern of routing keys: words between dots, * for one, # for any");
            Err(Failure::invalid("ROUTING_KEYS", text))
        }
        None => Ok(patterns),
    }
}

fn push(push: v1::Push, mode: Mode) -> Result<core::Push, Failure> {
    crate::push::check_endpoint(&push.endpoint)?;
    let ordered = matches!(mode, Mode::Exclusive | Mode::Failover);
    let concurrency = if ordered { 1 } else { push.concurrency.unwrap_or(1) };
    Ok(core::Push {
        endpoint: push.endpoint,
        concurrency,
        timeout_ms: push.timeout_ms.unwrap_or(PUSH_TIMEOUT_MS_DEFAULT),
    })
}

/// Refuses a command that another broker hands on if that could not have made it of a request. What brokers decide by themselves is
/// proposed by the metadata leader alone, and a broker that joins asks it to verify that.
pub fn handed_on(command: &Command) -> Result<(), Failure> {
    let spec_of = |name: &str, is_right: bool| {
        let text = format!("no request makes this specification of {name}");
        if is_right { Ok(()) } else { Err(Failure::invalid("SPEC", text)) }
    };
    match &command.kind {
        Some(Kind::ApplyTopic(change)) => {
            owner_uid(change.owner_uid.clone())?;
            let mut declared = change.spec.clone();
            if declared.schedule_for.is_empty() {
                full_name(&change.name)?;
            } else {
                declared.message_bytes_max = declared.message_bytes_max.saturating_sub(scheduler::OVERHEAD_BYTES);
                declared.schedule_for = String::new();
            }
            spec_of(&change.name, topic(Some(topic_declared(&declared)))? == declared)
        }
        Some(Kind::ApplySubscription(change)) => {
            full_name(&change.name)?;
            owner_uid(change.owner_uid.clone())?;
            Filter::compile(&change.spec.filter)?;
            let declared = subscription(Some(subscription_declared(&change.spec)))?;
            spec_of(&change.name, declared == change.spec)
        }
        Some(Kind::AllocateProducers(count)) => bounds::producer_ids(*count).map(drop),
        Some(Kind::Expect(broker)) => {
            rack(broker.rack.clone())?;
            broker_name(broker.name.clone()).map(drop)
        }
        Some(Kind::UpdateBroker(broker)) => rack(broker.rack.clone()).map(drop),
        Some(Kind::DeleteTopic(change) | Kind::DeleteSubscription(change)) => {
            // not checked as a name: that of a snapshot with a long name is longer than a client's
            at_most("NAME", "name", NAME_CHARS_MAX, change.name.clone())?;
            owner_uid(change.owner_uid.clone()).map(drop)
        }
        Some(Kind::TakeSnapshot(change)) => {
            full_name(&change.subscription)?;
            part(&change.name)
        }
        Some(Kind::OpenRedrive(change)) => full_name(&change.subscription).map(drop),
        Some(Kind::SetPhase(_)) => Ok(()),
        Some(Kind::Register(_) | Kind::Reassign(_) | Kind::Settled(_) | Kind::SetIncarnation(_)) | None => {
            Err(Failure::new(Code::PermissionDenied, "COMMAND", "no broker hands this command on"))
        }
    }
}

/// A broker's name.
pub fn broker_name(name: String) -> Result<String, Failure> {
    part(&name).map(|()| name)
}

/// Refuses what is not one part of a name.
pub fn part(name: &str) -> Result<(), Failure> {
    let refusal = || Failure::invalid("NAME", weir_proto::names::refusal(name));
    if weir_proto::names::is_part(name) { Ok(()) } else { Err(refusal()) }
}

/// The uid of a resource.
pub fn owner_uid(uid: String) -> Result<String, Failure> {
    at_most("OWNER_UID", "owner_uid", limits::OWNER_UID_CHARS_MAX, uid)
}

/// A failure domain; empty for none.
pub fn rack(rack: String) -> Result<String, Failure> {
    at_most("RACK", "rack", limits::RACK_CHARS_MAX, rack)
}

fn at_most(reason: &'static str, field: &str, max: usize, text: String) -> Result<String, Failure> {
    let chars = text.chars().count();
    let refusal = || Failure::invalid(reason, format!("{field} has {chars} characters, at most {max} are taken"));
    if chars <= max { Ok(text) } else { Err(refusal()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> v1::SubscriptionSpec {
        v1::SubscriptionSpec { topic: "t".into(), ..Default::default() }
    }

    #[test]
    fn each_number_outside_of_its_bounds_is_refused_by_its_name() {
        let topic_of = |change: fn(&mut v1::TopicSpec)| {
            let mut spec = v1::TopicSpec { partitions: 1, replicas: 1, ..Default::default() };
            change(&mut spec);
            topic(Some(spec)).expect_err("out of bounds").message
        };
        assert_eq!(
            topic_of(|s| s.retention_ms = Some(u64::MAX)),
            "retention_ms must be 1s to 36500d, not 18446744073709551615ms"
        );
        assert!(topic_of(|s| s.retention_ms = Some(0)).starts_with("retention_ms must be 1s to 36500d"));
        assert!(topic_of(|s| s.retention_bytes = Some(u64::MAX)).starts_with("retention_bytes must be 1 to 1024Ti"));
        assert!(topic_of(|s| s.message_bytes_max = Some(0)).starts_with("message_bytes_max must be 64 to 32Mi"));
        assert!(topic_of(|s| s.partitions = 0).starts_with("partitions must be 1 to 10000"));
        assert!(topic_of(|s| s.replicas = u32::MAX).starts_with("replicas must be 1 to 7"));
        let subscription_of = |change: fn(&mut v1::SubscriptionSpec)| {
            let mut spec = spec();
            change(&mut spec);
            subscription(Some(spec)).expect_err("out of bounds").message
        };
        assert!(subscription_of(|s| s.ack_deadline_ms = Some(0)).starts_with("ack_deadline_ms must be 1ms to 1d"));
        assert!(
            subscription_of(|s| s.ack_deadline_ms = Some(u64::MAX)).starts_with("ack_deadline_ms must be 1ms to 1d")
        );
        assert!(subscription_of(|s| s.backoff_min_ms = u64::MAX).starts_with("backoff_min_ms must be 0ms to 1d"));
        assert!(subscription_of(|s| s.backoff_max_ms = Some(0)).starts_with("backoff_max_ms must be 1ms to 1d"));
        assert!(subscription_of(|s| s.in_flight_max = Some(0)).starts_with("in_flight_max must be 1 to 1000000"));
        assert!(
            subscription_of(|s| s.in_flight_member_max = Some(u32::MAX)).starts_with("in_flight_member_max must be")
        );
        assert!(subscription_of(|s| s.deliveries_max = Some(0)).starts_with("deliveries_max must be 1 to 1000"));
        assert!(subscription_of(|s| s.messages_per_second = Some(u64::MAX)).starts_with("messages_per_second must be"));
        assert!(subscription_of(|s| s.bytes_per_second = Some(0)).starts_with("bytes_per_second must be 1 to 1Ti"));
        assert!(subscription_of(|s| s.burst_messages = Some(u64::MAX)).starts_with("burst_messages must be"));
        assert!(subscription_of(|s| s.start_ms = Some(u64::MAX)).starts_with("start_ms must be"));
        assert!(subscription_of(|s| s.mode = 9).contains("no mode 9"));
        let push = |push: v1::Push| subscription(Some(v1::SubscriptionSpec { push: Some(push), ..spec() }));
        let there = v1::Push { endpoint: "http://mail/".into(), ..Default::default() };
        let refused = push(v1::Push { concurrency: Some(0), ..there.clone() }).expect_err("none at a time").message;
        assert!(refused.starts_with("push.concurrency must be 1 to 100"), "{refused}");
        let refused = push(v1::Push { timeout_ms: Some(600_001), ..there }).expect_err("too long").message;
        assert!(refused.starts_with("push.timeout_ms must be 1ms to 10m"), "{refused}");
        assert!(subscription(None).is_err() && topic(None).is_err());
    }

    #[test]
    fn a_value_that_is_absent_gets_its_default_and_one_that_is_given_is_kept() {
        let made = subscription(Some(spec())).expect("all by default");
        assert_eq!((made.ack_deadline_ms, made.backoff_max_ms, made.in_flight_max), (30_000, 60_000, 100_000));
        assert_eq!((made.start_ms, made.deliveries_max), (None, 0));
        let slow = v1::SubscriptionSpec { backoff_min_ms: 300_000, start_ms: Some(0), ..spec() };
        let made = subscription(Some(slow)).expect("within all bounds");
        assert_eq!((made.backoff_max_ms, made.start_ms), (300_000, Some(0)), "the epoch is a time like others");
    }

    #[test]
    fn what_no_request_makes_is_not_handed_on() {
        use weir_core::meta::command::*;
        let topic_spec = v1::TopicSpec { partitions: 3, replicas: 3, ..Default::default() };
        let topic_spec = topic(Some(topic_spec)).expect("a topic");
        let push = v1::Push { endpoint: "http://mail/".into(), ..Default::default() };
        let whole = v1::SubscriptionSpec {
            topic: "shop/#.*".into(),
            mode: Mode::Shared.into(),
            filter: "key == 'a'".into(),
            routing_keys: vec!["*.paid".into()],
            push: Some(push),
            ..Default::default()
        };
        let whole = subscription(Some(whole)).expect("a subscription");
        let plain = subscription(Some(spec())).expect("a subscription");
        let made = |change: &dyn Fn(&mut core::TopicSpec)| {
            let mut spec = topic_spec.clone();
            change(&mut spec);
            Kind::ApplyTopic(ApplyTopic { name: "shop/t".into(), spec, ..Default::default() })
        };
        let subscribed = |change: &dyn Fn(&mut core::SubscriptionSpec)| {
            let mut spec = whole.clone();
            change(&mut spec);
            Kind::ApplySubscription(ApplySubscription { name: "shop/s".into(), spec, ..Default::default() })
        };
        let snapshot =
            |subscription: &str, name: &str| TakeSnapshot { subscription: subscription.into(), name: name.into() };
        let delete = |name: &str, uid: &str| Delete { name: name.into(), owner_uid: uid.into(), release: false };
        let named = |name: &str| core::Broker { name: name.into(), ..Default::default() };
        let largest = limits::BATCH_BYTES.max as u32 + scheduler::OVERHEAD_BYTES;
        let schedule = |bytes| made(&move |s| (s.schedule_for, s.message_bytes_max) = ("shop/t".into(), bytes));
        for kind in [
            made(&|_| ()),
            made(&|s| s.message_bytes_max = limits::BATCH_BYTES.max as u32),
            schedule(largest),
            subscribed(&|_| ()),
            subscribed(&|s| *s = plain.clone()),
            Kind::AllocateProducers(1_000),
            Kind::Expect(named("b-9")),
            Kind::UpdateBroker(named("b-9")),
            Kind::SetPhase(SetPhase::default()),
            Kind::TakeSnapshot(snapshot("shop/s", "before")),
            Kind::DeleteTopic(delete("shop/t", "u")),
            Kind::DeleteSubscription(delete(&weir_core::meta::names::snapshot(u64::MAX, &"x".repeat(253)), "")),
            Kind::OpenRedrive(OpenRedrive { subscription: "shop/s".into() }),
        ] {
            assert!(handed_on(&kind.clone().into()).is_ok(), "{kind:?}");
        }
        let uid = "u".repeat(limits::OWNER_UID_CHARS_MAX + 1);
        let by_another = [Kind::DeleteTopic(delete("shop/t", &uid)), Kind::DeleteSubscription(delete("shop/s", &uid))];
        let owned =
            ApplyTopic { name: "shop/t".into(), spec: topic_spec.clone(), owner_uid: uid, ..Default::default() };
        let internal = ApplyTopic { name: "weir-system/x".into(), spec: topic_spec.clone(), ..Default::default() };
        for kind in [
            made(&|s| s.partitions = 10_001),
            made(&|s| s.replicas = u32::MAX),
            made(&|s| s.retention_ms = u64::MAX),
            made(&|s| s.retention_bytes = u64::MAX),
            made(&|s| s.message_bytes_max = u32::MAX),
            schedule(largest + 1),
            Kind::ApplyTopic(owned),
            Kind::ApplyTopic(internal),
            subscribed(&|s| s.topic = "t".into()), // without its namespace
            subscribed(&|s| s.mode = 9),
            subscribed(&|s| s.start = 9),
            subscribed(&|s| s.ack_deadline_ms = u64::MAX),
            subscribed(&|s| s.backoff_min_ms = u64::MAX),
            subscribed(&|s| s.backoff_max_ms = 0),
            subscribed(&|s| s.in_flight_max = u32::MAX),
            subscribed(&|s| s.filter = "no filter (".into()),
            subscribed(&|s| s.routing_keys = vec!["a".into(); 33]),
            subscribed(&|s| s.routing_keys = vec!["a*".into()]),
            subscribed(&|s| s.push.iter_mut().for_each(|p| p.concurrency = u32::MAX)),
            subscribed(&|s| s.push.iter_mut().for_each(|p| p.timeout_ms = 0)),
            subscribed(&|s| s.push.iter_mut().for_each(|p| p.endpoint = "file:///".into())),
            Kind::DeleteTopic(delete(&"x".repeat(3 << 20), "")),
            Kind::TakeSnapshot(snapshot("shop/s", "a/b")),
            Kind::TakeSnapshot(snapshot("weir-system/s", "before")),
            Kind::OpenRedrive(OpenRedrive { subscription: "../s".into() }),
            Kind::AllocateProducers(0),
            Kind::AllocateProducers(u32::MAX),
            Kind::Expect(named("")),
            Kind::Expect(core::Broker { rack: "r".repeat(256), ..named("b-9") }),
            Kind::UpdateBroker(core::Broker { rack: "r".repeat(256), ..named("b-9") }),
            Kind::Register(named("b-1")),
            Kind::Reassign(Reassign::default()),
            Kind::Settled(Settled::default()),
            Kind::SetIncarnation(SetIncarnation { broker: 1, incarnation: u64::MAX }),
        ]
        .into_iter()
        .chain(by_another)
        {
            assert!(handed_on(&kind.clone().into()).is_err(), "{kind:?}");
        }
        assert!(handed_on(&Command::default()).is_err());
    }
}
