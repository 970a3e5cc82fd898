//! What there is and where.

use super::{Context, full_name};
use std::collections::HashMap;
use tonic::{Request, Response, Status};
use weir_core::ids::{GroupId, META_GROUP};
use weir_core::meta::state as core;
use weir_core::observe::ReplicaStatus;
use weir_proto::v1;
use weir_proto::v1::metadata_server::Metadata;

fn partition(context: &Context, meta: &core::MetaState, partition: u32, group: u64) -> v1::Partition {
    let assignment = meta.groups.get(&group);
    v1::Partition {
        partition,
        group,
        leader: context.shared.leader(GroupId(group)).map_or(0, |b| b.0),
        replicas: assignment.map(|a| a.replicas.iter().map(|r| r.broker).collect()).unwrap_or_default(),
        settled: assignment.is_some_and(|a| a.is_settled()),
    }
}

fn topic(context: &Context, meta: &core::MetaState, topic: &core::Topic) -> v1::Topic {
    v1::Topic {
        name: topic.name.clone(),
        id: topic.id,
        spec: Some(v1::TopicSpec {
            partitions: topic.spec.partitions,
            replicas: topic.spec.replicas,
            retention_ms: topic.spec.retention_ms,
            retention_bytes: topic.spec.retention_bytes,
            message_bytes_max: topic.spec.message_bytes_max,
            quorum_memory: topic.spec.quorum_memory,
        }),
        partitions: (0..).zip(&topic.groups).map(|(at, g)| partition(context, meta, at, *g)).collect(),
        owner_uid: topic.owner_uid.clone(),
        generation: topic.generation,
    }
}

fn broker(broker: &core::Broker) -> v1::Broker {
    v1::Broker {
        id: broker.id,
        name: broker.name.clone(),
        client_address: broker.client_address.clone(),
        admin_address: broker.admin_address.clone(),
        rack: broker.rack.clone(),
        phase: format!("{:?}", broker.phase()).to_lowercase(),
    }
}

fn subscription(meta: &core::MetaState, s: &core::Subscription) -> v1::Subscription {
    let spec = v1::SubscriptionSpec {
        topic: s.spec.topic.clone(),
        from_earliest: s.spec.start() == core::Start::Earliest,
        start_ms: s.spec.start_ms,
        ack_deadline_ms: s.spec.ack_deadline_ms,
        mode: s.spec.mode,
        backoff_min_ms: s.spec.backoff_min_ms,
        backoff_max_ms: s.spec.backoff_max_ms,
        in_flight_max: s.spec.in_flight_max,
        deliveries_max: s.spec.deliveries_max,
        dead_letter_topic: s.spec.dead_letter_topic.clone(),
        filter: s.spec.filter.clone(),
        messages_per_second: s.spec.messages_per_second,
        bytes_per_second: s.spec.bytes_per_second,
        burst_messages: s.spec.burst_messages,
        in_flight_member_max: s.spec.in_flight_member_max,
        priorities: s.spec.priorities,
        routing_keys: s.spec.routing_keys.clone(),
        push: s.spec.push.as_ref().map(|p| v1::Push {
            endpoint: p.endpoint.clone(),
            concurrency: p.concurrency,
            timeout_ms: p.timeout_ms,
        }),
    };
    v1::Subscription {
        name: s.name.clone(),
        id: s.id,
        spec: Some(spec),
        owner_uid: s.owner_uid.clone(),
        generation: s.generation,
        snapshot_of: s.snapshot_of,
        topics: meta.topics_of(&s.spec).map(|t| t.name.clone()).collect(),
    }
}

impl Context {
    /// How the partitions stand that this broker leads; only those of `topics` (full names), all where there are none.
    pub async fn describe(&self, topics: &[String]) -> Vec<v1::PartitionStatus> {
        let meta = self.shared.meta();
        let names: HashMap<u64, &String> = meta.topics.values().map(|t| (t.id, &t.name)).collect();
        let subscriptions: HashMap<u64, &String> = meta.subscriptions.values().map(|s| (s.id, &s.name)).collect();
        let mut out = Vec::new();
        for status in self.node.ask(|node| node.observe()).await.unwrap_or_default() {
            let Some(assignment) = meta.assignment(status.group) else { continue };
            let topic = names.get(&assignment.topic).map_or("", |n| n.as_str());
            if !topics.is_empty() && !topics.iter().any(|t| t == topic) {
                continue;
            }
            let mut positions = Vec::new();
            for cursor in &status.cursors {
                let Some(name) = subscriptions.get(&cursor.subscription) else { continue };
                let backlog = status.high_watermark.saturating_sub(cursor.position + cursor.acked_above);
                let kept = status.high_watermark.saturating_sub(status.start_offset).max(1);
                let bytes = u128::from(status.log_bytes) * u128::from(backlog) / u128::from(kept);
                positions.push(v1::SubscriptionStatus {
                    subscription: (*name).clone(),
                    position: cursor.position,
                    backlog,
                    backlog_bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
                    acked_above: cursor.acked_above,
                    oldest_ms: self.append_time_ms(status.group, cursor.position).await,
                });
            }
            let replica = |r: &ReplicaStatus| v1::ReplicaStatus {
                broker: r.broker.0,
                in_sync: r.in_sync,
                voter: r.voter,
                entries_behind: r.entries_behind,
                bytes_behind: r.bytes_behind,
            };
            out.push(v1::PartitionStatus {
                topic: topic.to_owned(),
                partition: assignment.partition,
                group: status.group.0,
                term: status.term,
                start_offset: status.start_offset,
                high_watermark: status.high_watermark,
                log_bytes: status.log_bytes,
                replicas: status.replicas.iter().map(replica).collect(),
                subscriptions: positions,
            });
        }
        out
    }

    /// When the record at `offset` was appended, ms since the epoch; 0 where there is none.
    async fn append_time_ms(&self, group: GroupId, offset: u64) -> u64 {
        let Some(partition) = self.shared.partition(group) else { return 0 };
        if offset >= partition.tail.high_watermark() {
            return 0;
        }
        let batches = partition.read(offset.max(partition.tail.start_offset()), 1).await;
        batches.ok().and_then(|b| b.first().map(|b| b.append_time_ms)).unwrap_or(0)
    }
}

#[tonic::async_trait]
impl Metadata for Context {
    async fn get(&self, request: Request<v1::GetMetadataRequest>) -> Result<Response<v1::GetMetadataResponse>, Status> {
        let wanted = request.into_inner().topics;
        let wanted = wanted.iter().map(|t| full_name(t)).collect::<Result<Vec<_>, _>>()?;
        let meta = self.shared.meta();
        let topics = meta.topics.values().filter(|t| wanted.is_empty() || wanted.contains(&t.name));
        Ok(Response::new(v1::GetMetadataResponse {
            cluster_id: meta.cluster_id.clone(),
            version: meta.version,
            brokers: meta.brokers.values().map(broker).collect(),
            topics: topics.map(|t| topic(self, &meta, t)).collect(),
            subscriptions: meta.subscriptions.values().map(|s| subscription(&meta, s)).collect(),
            answered_by: self.shared.broker.0,
            controller: self.shared.controller().map_or(0, |b| b.0),
            metadata_group: Some(partition(self, &meta, 0, META_GROUP.0)),
        }))
    }

    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let topics = request.into_inner().topics;
        let topics = topics.iter().map(|t| full_name(t)).collect::<Result<Vec<_>, _>>()?;
        let partitions = Context::describe(self, &topics).await;
        Ok(Response::new(v1::DescribeResponse { broker: self.shared.broker.0, partitions }))
    }
}
