//! Changes of topics, subscriptions and brokers. Every call may be repeated.

use super::{Context, full_name};
use crate::filter::Filter;
use crate::status::Failure;
use tonic::{Request, Response, Status};
use weir_core::delivery::{Mode, Policy, WAIT_MS_MAX};
use weir_core::ids::{BrokerId, META_GROUP};
use weir_core::meta::command::{ApplySubscription, ApplyTopic, Delete, Kind, Placement, SetPhase, TakeSnapshot};
use weir_core::meta::placement;
use weir_core::meta::state as core;
use weir_core::pattern;
use weir_proto::v1;
use weir_proto::v1::admin_server::Admin;

/// Partitions of one topic.
const PARTITIONS_MAX: u32 = 10_000;
/// Largest batch a topic may take, bytes: what fits every message on the way.
const MESSAGE_BYTES_MAX: u32 = 32 << 20;
/// Patterns of routing keys of one subscription.
const ROUTING_KEYS_MAX: usize = 32;
/// Bytes of one pattern.
const PATTERN_BYTES_MAX: usize = 255;
/// Requests under way from one partition to a push endpoint.
const PUSH_CONCURRENCY_MAX: u32 = 100;

fn topic_spec(spec: Option<v1::TopicSpec>) -> Result<core::TopicSpec, Failure> {
    let spec = spec.ok_or_else(|| Failure::invalid("SPEC", "a topic needs a spec"))?;
    if spec.partitions == 0 || spec.partitions > PARTITIONS_MAX {
        return Err(Failure::invalid(
            "PARTITIONS",
            format!("partitions must be 1 to {PARTITIONS_MAX}, not {}", spec.partitions),
        ));
    }
    if spec.replicas == 0 || spec.replicas > 7 {
        return Err(Failure::invalid("REPLICAS", format!("replicas must be 1 to 7, not {}", spec.replicas)));
    }
    if spec.message_bytes_max > MESSAGE_BYTES_MAX {
        let text = format!("the largest message may have {MESSAGE_BYTES_MAX} bytes at most");
        return Err(Failure::invalid("MESSAGE_BYTES", text));
    }
    Ok(core::TopicSpec {
        partitions: spec.partitions,
        replicas: spec.replicas,
        retention_ms: spec.retention_ms,
        retention_bytes: spec.retention_bytes,
        message_bytes_max: spec.message_bytes_max,
        quorum_memory: spec.quorum_memory,
        schedule_for: String::new(),
    })
}

/// Brokers for so many new partitions.
pub(crate) fn placements(meta: &core::MetaState, partitions: u32, replicas: u32) -> Result<Vec<Placement>, Failure> {
    let placed = placement::place(placement::candidates(meta), partitions, replicas)?;
    Ok(placed.iter().map(|p| Placement { brokers: p.iter().map(|b| b.0).collect() }).collect())
}

fn delete(request: v1::DeleteRequest) -> Result<Delete, Failure> {
    let v1::DeleteRequest { name, owner_uid, release } = request;
    Ok(Delete { name: full_name(&name)?, owner_uid, release })
}

/// The topic of a subscription: a full name, or a pattern of a namespace's.
fn topic_or_pattern(topic: &str) -> Result<String, Failure> {
    if !pattern::is_pattern(topic) {
        return full_name(topic);
    }
    let (namespace, names) = topic.split_once('/').unwrap_or(("default", topic));
    // a word that a `*` or `#` could stand for
    let instance = names.replace(['*', '#'], "x");
    full_name(&format!("{namespace}/{instance}"))?;
    if names.len() > PATTERN_BYTES_MAX || !pattern::is_well_formed(names) {
        let text = format!("'{topic}' is not a pattern: * and # stand for whole words, between dots");
        return Err(Failure::invalid("PATTERN", text));
    }
    Ok(format!("{namespace}/{names}"))
}

fn routing_keys(patterns: Vec<String>) -> Result<Vec<String>, Failure> {
    if patterns.len() > ROUTING_KEYS_MAX {
        return Err(Failure::invalid("ROUTING_KEYS", format!("{ROUTING_KEYS_MAX} patterns of routing keys at most")));
    }
    match patterns.iter().find(|p| p.len() > PATTERN_BYTES_MAX || !pattern::is_well_formed(p)) {
        Some(bad) => {
            let shown: String = bad.chars().take(60).collect();
            let text = format!("'{shown}' is not a pattern of routing keys: words between dots, * for one, # for any");
            Err(Failure::invalid("ROUTING_KEYS", text))
        }
        None => Ok(patterns),
    }
}

fn push(push: Option<v1::Push>, mode: Mode) -> Result<Option<core::Push>, Failure> {
    let Some(push) = push else { return Ok(None) };
    crate::push::check_endpoint(&push.endpoint)?;
    let ordered = matches!(mode, Mode::Exclusive | Mode::Failover);
    let concurrency = if ordered { 1 } else { push.concurrency.clamp(1, PUSH_CONCURRENCY_MAX) };
    let timeout_ms = if push.timeout_ms == 0 { 10_000 } else { push.timeout_ms.min(600_000) };
    Ok(Some(core::Push { endpoint: push.endpoint, concurrency, timeout_ms }))
}

fn snapshot(request: v1::SnapshotRequest) -> Result<TakeSnapshot, Failure> {
    let subscription = full_name(&request.subscription)?;
    if request.name.contains('/') {
        return Err(Failure::invalid("NAME", "a snapshot's name has no '/'"));
    }
    full_name(&request.name)?;
    Ok(TakeSnapshot { subscription, name: request.name })
}

fn no_broker(id: u64) -> Failure {
    Failure::new(tonic::Code::NotFound, "NO_BROKER", format!("there is no broker {id}"))
}

impl Context {
    fn applied(&self) -> Response<v1::ApplyResponse> {
        Response::new(v1::ApplyResponse { version: self.shared.meta().version })
    }
}

#[tonic::async_trait]
impl Admin for Context {
    async fn apply_topic(
        &self,
        request: Request<v1::ApplyTopicRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let request = request.into_inner();
        let name = full_name(&request.name)?;
        let spec = topic_spec(request.spec)?;
        self.decide(|meta| {
            let had = meta.topics.get(&name).map_or(0, |t| t.groups.len() as u32);
            let missing = spec.partitions.saturating_sub(had);
            // also where none is missing: more replicas than brokers are refused, not waited for
            let placements = placements(meta, missing, spec.replicas)?;
            let change = ApplyTopic {
                name: name.clone(),
                spec: spec.clone(),
                owner_uid: request.owner_uid.clone(),
                generation: request.generation,
                placements,
            };
            Ok(Kind::ApplyTopic(change).into())
        })
        .await?;
        Ok(self.applied())
    }

    async fn delete_topic(&self, request: Request<v1::DeleteRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        self.propose(Kind::DeleteTopic(delete(request.into_inner())?)).await?;
        Ok(self.applied())
    }

    async fn apply_subscription(
        &self,
        request: Request<v1::ApplySubscriptionRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let request = request.into_inner();
        let spec = request.spec.ok_or_else(|| Failure::invalid("SPEC", "a subscription needs a spec"))?;
        let start = if spec.from_earliest { core::Start::Earliest } else { core::Start::Latest };
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        let default = Policy::default();
        let mode = Mode::try_from(spec.mode)
            .map_err(|_| Failure::invalid("MODE", format!("this broker knows no mode {}", spec.mode)))?;
        let whole = core::SubscriptionSpec {
            topic: topic_or_pattern(&spec.topic)?,
            start: start.into(),
            ack_deadline_ms: or(spec.ack_deadline_ms, default.ack_deadline_ms).min(WAIT_MS_MAX),
            mode: mode.into(),
            backoff_min_ms: spec.backoff_min_ms,
            backoff_max_ms: or(spec.backoff_max_ms, default.backoff_max_ms).max(spec.backoff_min_ms),
            in_flight_max: or(spec.in_flight_max.into(), default.leased_max).min(1_000_000) as u32,
            deliveries_max: spec.deliveries_max,
            dead_letter_topic: match spec.dead_letter_topic.as_str() {
                "" => String::new(),
                topic => full_name(topic)?,
            },
            filter: spec.filter,
            messages_per_second: spec.messages_per_second,
            bytes_per_second: spec.bytes_per_second,
            burst_messages: spec.burst_messages,
            in_flight_member_max: spec.in_flight_member_max,
            priorities: spec.priorities,
            routing_keys: routing_keys(spec.routing_keys)?,
            push: push(spec.push, mode)?,
            start_ms: spec.start_ms,
        };
        let reads = |topic: &str| topic == whole.topic || pattern::matches_topic(&whole.topic, topic);
        if !whole.dead_letter_topic.is_empty() && reads(&whole.dead_letter_topic) {
            return Err(Failure::invalid("DEAD_LETTER_TOPIC", "a topic cannot take its own dead letters").into());
        }
        if whole.priorities && mode != Mode::Shared {
            return Err(
                Failure::invalid("PRIORITIES", "priorities need the mode shared: in the others order is kept").into()
            );
        }
        Filter::compile(&whole.filter)?;
        let change = ApplySubscription {
            name: full_name(&request.name)?,
            spec: whole,
            owner_uid: request.owner_uid,
            generation: request.generation,
        };
        self.propose(Kind::ApplySubscription(change)).await?;
        Ok(self.applied())
    }

    async fn delete_subscription(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        self.propose(Kind::DeleteSubscription(delete(request.into_inner())?)).await?;
        Ok(self.applied())
    }

    async fn take_snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        self.propose(Kind::TakeSnapshot(snapshot(request.into_inner())?)).await?;
        Ok(self.applied())
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let name = snapshot(request.into_inner())?.full_name();
        self.propose(Kind::DeleteSubscription(Delete { name, ..Default::default() })).await?;
        Ok(self.applied())
    }

    async fn add_broker(
        &self,
        request: Request<v1::AddBrokerRequest>,
    ) -> Result<Response<v1::AddBrokerResponse>, Status> {
        let broker = core::Broker { name: request.into_inner().name, ..Default::default() };
        let id = self.propose(Kind::Expect(broker)).await?;
        Ok(Response::new(v1::AddBrokerResponse { id }))
    }

    async fn drain_broker(
        &self,
        request: Request<v1::DrainBrokerRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let v1::DrainBrokerRequest { id, cancel } = request.into_inner();
        self.decide(|meta| {
            let broker = meta.brokers.get(&id).ok_or_else(|| no_broker(id))?;
            let wanted = if cancel { core::Phase::Active } else { core::Phase::Draining };
            if broker.phase() == core::Phase::Expected && !cancel {
                // it never came: nothing is to be moved
                return Ok(Kind::SetPhase(SetPhase { broker: id, phase: 0, removed: true }).into());
            }
            let hears = meta.assignment(META_GROUP).is_some_and(|a| a.replica_on(BrokerId(id)).is_some());
            if cancel && !hears {
                let text = format!("broker {id} is out of the metadata already; let it go, and add it again");
                return Err(Failure::new(tonic::Code::FailedPrecondition, "PHASE", text));
            }
            if !matches!(broker.phase(), core::Phase::Active | core::Phase::Draining) {
                let text = format!("broker {id} is {:?}; only an active one can be drained", broker.phase());
                return Err(Failure::new(tonic::Code::FailedPrecondition, "PHASE", text));
            }
            Ok(Kind::SetPhase(SetPhase { broker: id, phase: wanted.into(), removed: false }).into())
        })
        .await?;
        Ok(self.applied())
    }

    async fn set_broker_rack(
        &self,
        request: Request<v1::SetBrokerRackRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let v1::SetBrokerRackRequest { id, rack } = request.into_inner();
        self.decide(|meta| {
            let broker = meta.brokers.get(&id).ok_or_else(|| no_broker(id))?;
            Ok(Kind::UpdateBroker(core::Broker { rack: rack.clone(), ..broker.clone() }).into())
        })
        .await?;
        Ok(self.applied())
    }

    async fn set_log_level(
        &self,
        request: Request<v1::SetLogLevelRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        crate::logging::set_filter(&request.into_inner().filter).map_err(|e| Failure::invalid("FILTER", e))?;
        Ok(self.applied())
    }
}
