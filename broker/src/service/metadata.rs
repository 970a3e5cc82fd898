//! What there is and where.

use super::pages::{self, Behind, Place, Room};
use super::{Context, bounds};
use crate::budget::ANSWER_BYTES_MAX;
use crate::declare;
use std::collections::{HashMap, HashSet};
use tonic::{Request, Response, Status};
use weir_core::ids::{GroupId, META_GROUP};
use weir_core::meta::{index, names, state as core};
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
        spec: Some(declare::topic_declared(&topic.spec)),
        partitions: (0..).zip(&topic.groups).map(|(at, g)| partition(context, meta, at, *g)).collect(),
        owner_uid: topic.owner_uid.clone(),
        generation: topic.generation,
        internal: names::is_internal(&topic.name),
        scheduled_for: topic.spec.schedule_for.clone(),
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
        rebuilt_because: broker.rebuilt_because.clone(),
    }
}

fn subscription(meta: &index::Metadata, s: &core::Subscription) -> v1::Subscription {
    let mut topics: Vec<String> = meta.topics_of(&s.spec).map(|t| t.name.clone()).collect();
    topics.sort_unstable(); // a page that ends within them is continued behind the last name
    v1::Subscription {
        name: s.name.clone(),
        id: s.id,
        spec: Some(declare::subscription_declared(&s.spec)),
        owner_uid: s.owner_uid.clone(),
        generation: s.generation,
        snapshot_of: s.snapshot_of,
        topics,
        internal: names::is_internal(&s.name),
        snapshot: s.snapshot_name.clone(),
        redrive_of: s.redrive_of,
    }
}

impl Context {
    /// How all partitions stand that this broker leads.
    pub async fn describe_all(&self) -> Vec<v1::PartitionStatus> {
        self.describe_from(&HashSet::new(), Place::default(), usize::MAX).await.0
    }

    /// How the partitions stand that this broker leads, by group; only those of `topics` (full names), all where there are none. From a
    /// place on, until they have `bytes_max` on the wire; the next place is where there are more.
    async fn describe_from(
        &self,
        topics: &HashSet<String>,
        from: Place,
        bytes_max: usize,
    ) -> (Vec<v1::PartitionStatus>, Option<Place>) {
        let meta = self.shared.meta();
        let names: HashMap<u64, &String> = meta.topics.values().map(|t| (t.id, &t.name)).collect();
        let subscriptions: HashMap<u64, &String> = meta.subscriptions.values().map(|s| (s.id, &s.name)).collect();
        let mut out = Vec::new();
        let mut room = Room::beside(&v1::DescribeResponse { broker: u64::MAX, ..Default::default() }, bytes_max);
        let first = GroupId(from.group);
        for status in self.node.ask(move |node| node.observe(first)).await.unwrap_or_default() {
            let Some(assignment) = meta.assignment(status.group) else { continue };
            let topic = names.get(&assignment.topic).map_or("", |n| n.as_str());
            if !topics.is_empty() && !topics.contains(topic) {
                continue;
            }
            let replica = |r: &ReplicaStatus| v1::ReplicaStatus {
                broker: r.broker.0,
                in_sync: r.in_sync,
                voter: r.voter,
                entries_behind: r.entries_behind,
                bytes_behind: r.bytes_behind,
            };
            let mut partition = v1::PartitionStatus {
                topic: topic.to_owned(),
                partition: assignment.partition,
                group: status.group.0,
                term: status.term,
                start_offset: status.start_offset,
                high_watermark: status.high_watermark,
                log_bytes: status.log_bytes,
                replicas: status.replicas.iter().map(replica).collect(),
                subscriptions: Vec::new(),
                slowed_percent: status.slowed_percent,
            };
            let behind = if status.group == first { from.subscription } else { 0 };
            let mut place = Place { group: status.group.0, subscription: behind };
            if !room.take(&partition) {
                return (out, Some(place));
            }
            for cursor in status.cursors.iter().filter(|c| c.subscription > behind) {
                let Some(name) = subscriptions.get(&cursor.subscription) else { continue };
                let backlog = status.high_watermark.saturating_sub(cursor.position + cursor.acked_above);
                let kept = status.high_watermark.saturating_sub(status.start_offset).max(1);
                let bytes = u128::from(status.log_bytes) * u128::from(backlog) / u128::from(kept);
                let position = v1::SubscriptionStatus {
                    subscription: (*name).clone(),
                    position: cursor.position,
                    backlog,
                    backlog_bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
                    acked_above: cursor.acked_above,
                    oldest_ms: self.append_time_ms(status.group, cursor.position).await,
                };
                if !room.take(&position) {
                    out.push(partition);
                    return (out, Some(place));
                }
                place.subscription = cursor.subscription;
                partition.subscriptions.push(position);
            }
            out.push(partition);
        }
        (out, None)
    }

    /// When the record at `offset` was appended, ms since the epoch; `None` where there is none.
    async fn append_time_ms(&self, group: GroupId, offset: u64) -> Option<u64> {
        let partition = self.shared.partition(group).filter(|p| offset < p.tail.high_watermark())?;
        let batches = partition.read(offset.max(partition.tail.start_offset()), 1).await;
        batches.ok().and_then(|b| b.first().map(|b| b.append_time_ms))
    }
}

#[tonic::async_trait]
impl Metadata for Context {
    async fn get(&self, request: Request<v1::GetMetadataRequest>) -> Result<Response<v1::GetMetadataResponse>, Status> {
        let v1::GetMetadataRequest { topics: wanted, page_token } = request.into_inner();
        let behind = Behind::parse(&page_token).map_err(|f| self.rejected(f))?;
        let wanted = bounds::topics(&wanted).map_err(|f| self.rejected(f))?;
        let meta = self.shared.meta();
        let head = v1::GetMetadataResponse {
            cluster_id: meta.cluster_id.clone(),
            version: meta.version,
            brokers: meta.brokers.values().map(broker).collect(),
            answered_by: self.shared.broker.0,
            controller: self.shared.controller().map_or(0, |b| b.0),
            metadata_group: Some(partition(self, &meta, 0, META_GROUP.0)),
            rolled_back_brokers: self.shared.rolled_back().iter().map(|b| b.0).collect(),
            ..Default::default()
        };
        let is_wanted = |t: &core::Topic| wanted.is_empty() || wanted.contains(&t.name);
        let topic = |t: &core::Topic| is_wanted(t).then(|| topic(self, &meta, t));
        Ok(Response::new(pages::fill(head, &meta, behind, topic, |s| subscription(&meta, s))))
    }

    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let v1::DescribeRequest { topics, page_token } = request.into_inner();
        let from = Place::parse(&page_token).map_err(|f| self.rejected(f))?;
        let topics = bounds::topics(&topics).map_err(|f| self.rejected(f))?;
        let (partitions, next) = self.describe_from(&topics, from, ANSWER_BYTES_MAX).await;
        let next_page_token = next.map_or(String::new(), Place::token);
        Ok(Response::new(v1::DescribeResponse { broker: self.shared.broker.0, partitions, next_page_token }))
    }
}
