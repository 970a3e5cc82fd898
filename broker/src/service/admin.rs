//! Changes of topics, subscriptions and brokers. Every call may be repeated.

use super::{Context, full_name};
use crate::declare;
use crate::filter::Filter;
use crate::status::Failure;
use tonic::{Request, Response, Status};
use weir_core::meta::command::{
    ApplySubscription, ApplyTopic, Delete, Kind, OpenRedrive, Placement, SetPhase, TakeSnapshot,
};
use weir_core::meta::state as core;
use weir_core::meta::{names, placement};
use weir_proto::v1::admin_server::Admin;
use weir_proto::{limits, v1};

/// Brokers for so many new partitions.
pub(crate) fn placements(meta: &core::MetaState, partitions: u32, replicas: u32) -> Result<Vec<Placement>, Failure> {
    let placed = placement::place(placement::candidates(meta), partitions, replicas)?;
    Ok(placed.iter().map(|p| Placement { brokers: p.iter().map(|b| b.0).collect() }).collect())
}

fn delete(request: v1::DeleteRequest) -> Result<Delete, Failure> {
    let v1::DeleteRequest { name, owner_uid, release } = request;
    Ok(Delete { name: full_name(&name)?, owner_uid: declare::owner_uid(owner_uid)?, release })
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
        let spec = declare::topic(request.spec)?;
        let owner_uid = declare::owner_uid(request.owner_uid)?;
        self.decide(|meta| {
            let had = meta.topics.get(&name).map_or(0, |t| t.groups.len() as u32);
            let missing = spec.partitions.saturating_sub(had);
            // also where none is missing: more replicas than brokers are refused, not waited for
            let placements = placements(meta, missing, spec.replicas)?;
            let change = ApplyTopic {
                name: name.clone(),
                spec: spec.clone(),
                owner_uid: owner_uid.clone(),
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
        let whole = declare::subscription(request.spec)?;
        Filter::compile(&whole.filter)?;
        let change = ApplySubscription {
            name: full_name(&request.name)?,
            spec: whole,
            owner_uid: declare::owner_uid(request.owner_uid)?,
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
        let TakeSnapshot { subscription, name } = snapshot(request.into_inner())?;
        self.decide(|meta| {
            let missing = || self.missing("NOT_FOUND", format!("subscription {subscription} has no snapshot {name}"));
            let name = meta.snapshot(&subscription, &name).ok_or_else(missing)?.name.clone();
            Ok(Kind::DeleteSubscription(Delete { name, ..Default::default() }).into())
        })
        .await?;
        Ok(self.applied())
    }

    async fn open_redrive(
        &self,
        request: Request<v1::OpenRedriveRequest>,
    ) -> Result<Response<v1::OpenRedriveResponse>, Status> {
        let subscription = full_name(&request.into_inner().subscription)?;
        self.propose(Kind::OpenRedrive(OpenRedrive { subscription: subscription.clone() })).await?;
        let meta = self.shared.meta();
        let gone = || self.missing("NOT_FOUND", format!("subscription {subscription} was deleted meanwhile"));
        let id = meta.subscriptions.get(&subscription).ok_or_else(gone)?.id;
        Ok(Response::new(v1::OpenRedriveResponse { position: names::redrive(id) }))
    }

    async fn add_broker(
        &self,
        request: Request<v1::AddBrokerRequest>,
    ) -> Result<Response<v1::AddBrokerResponse>, Status> {
        let broker = core::Broker { name: declare::broker_name(request.into_inner().name)?, ..Default::default() };
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
            if !matches!(broker.phase(), core::Phase::Active | core::Phase::Draining) {
                let text = format!("broker {id} is {:?}; only an active one can be drained or kept", broker.phase());
                return Err(Failure::new(tonic::Code::FailedPrecondition, "PHASE", text));
            }
            if cancel && broker.phase() == core::Phase::Draining && !meta.follows_metadata(id) {
                let text = format!("broker {id} is out of the metadata already; let it go, and add it again");
                return Err(Failure::new(tonic::Code::FailedPrecondition, "PHASE", text));
            }
            if !cancel && broker.phase() == core::Phase::Active {
                placement::check_drain(meta, id)?;
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
        let rack = declare::rack(rack)?;
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
        let filter = request.into_inner().filter;
        limits::LOG_FILTER.check_chars(&filter).map_err(Failure::from)?;
        crate::logging::set_filter(&filter).map_err(|e| Failure::invalid("FILTER", e))?;
        Ok(self.applied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deletion_holds_a_name_and_a_uid_of_bounded_length() {
        let request =
            |uid: usize| v1::DeleteRequest { name: "t".into(), owner_uid: "u".repeat(uid), ..Default::default() };
        assert_eq!(delete(request(limits::OWNER_UID_CHARS_MAX)).unwrap().name, "default/t");
        assert_eq!(delete(request(limits::OWNER_UID_CHARS_MAX + 1)).unwrap_err().reason, "OWNER_UID");
    }
}
