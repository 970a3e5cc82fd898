//! What there is and where.

use super::{Context, full_name};
use tonic::{Request, Response, Status};
use weir_core::ids::GroupId;
use weir_core::meta::state as core;
use weir_proto::v1;
use weir_proto::v1::metadata_server::Metadata;

fn topic(context: &Context, meta: &core::MetaState, topic: &core::Topic) -> v1::Topic {
    let partition = |(at, group): (usize, &u64)| {
        let assignment = meta.groups.get(group);
        v1::Partition {
            partition: at as u32,
            group: *group,
            leader: context.shared.leader(GroupId(*group)).map_or(0, |b| b.0),
            replicas: assignment.map(|a| a.replicas.iter().map(|r| r.broker).collect()).unwrap_or_default(),
            settled: assignment.is_some_and(|a| a.is_settled()),
        }
    };
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
        partitions: topic.groups.iter().enumerate().map(partition).collect(),
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

fn subscription(s: &core::Subscription) -> v1::Subscription {
    let spec = v1::SubscriptionSpec {
        topic: s.spec.topic.clone(),
        from_earliest: s.spec.start() == core::Start::Earliest,
        ack_deadline_ms: s.spec.ack_deadline_ms,
    };
    v1::Subscription { name: s.name.clone(), id: s.id, spec: Some(spec) }
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
            subscriptions: meta.subscriptions.values().map(subscription).collect(),
            answered_by: self.shared.broker.0,
            controller: self.shared.controller().map_or(0, |b| b.0),
        }))
    }
}
