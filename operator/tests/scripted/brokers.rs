//! Brokers in memory: they hold topics and subscriptions, drain in steps, and note what they were told.

use crate::api::Server;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use tonic::{Code, Request, Response, Status};
use weir_operator::brokers::Brokers;
use weir_proto::v1;

/// What the brokers are.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) brokers: Vec<v1::Broker>,
    pub(crate) topics: BTreeMap<String, v1::Topic>,
    pub(crate) subscriptions: BTreeMap<String, v1::Subscription>,
    /// names of brokers that run and have everything
    pub(crate) alive: BTreeSet<String>,
    pub(crate) applied: Vec<v1::ApplyTopicRequest>,
    pub(crate) deleted: Vec<v1::DeleteRequest>,
    /// drains are refused for this reason
    pub(crate) refuses_drains: Option<&'static str>,
    /// messages that nobody has acknowledged, and bytes of log, in each partition
    pub(crate) traffic: u64,
    ids: u64,
}

impl State {
    /// Three replicas of one partition, and what a topic of the test holds.
    pub(crate) fn place(&mut self) {
        let active: Vec<u64> = self.brokers.iter().filter(|b| b.phase == "active").map(|b| b.id).collect();
        for topic in self.topics.values_mut() {
            for partition in &mut topic.partitions {
                // one replica a step, as brokers do it
                let moved = partition.replicas.iter().position(|r| !active.contains(r));
                let free = active.iter().find(|b| !partition.replicas.contains(b)).copied();
                if let (Some(at), Some(to)) = (moved, free) {
                    partition.replicas[at] = to;
                }
                partition.settled = partition.replicas.iter().all(|r| active.contains(r));
                partition.leader = partition.replicas[0];
            }
        }
    }

    /// True where a broker holds something.
    pub(crate) fn holds(&self, id: u64) -> bool {
        self.topics.values().flat_map(|t| &t.partitions).any(|p| p.replicas.contains(&id))
    }

    /// As brokers do it: each topic has three replicas, or those it was made with.
    fn check_drain(&self, id: u64) -> Result<(), Status> {
        if let Some(reason) = self.refuses_drains {
            return Err(refusal(Code::FailedPrecondition, reason, "no drain"));
        }
        let is_active = |b: &&v1::Broker| b.phase == "active";
        let left = self.brokers.iter().filter(is_active).filter(|b| b.id != id).count();
        let drained = self.brokers.iter().filter(is_active).any(|b| b.id == id);
        let partitions = self.topics.values().flat_map(|t| &t.partitions);
        let wanted = partitions.map(|p| p.replicas.len()).max().unwrap_or(1);
        if drained && wanted > left {
            let text = format!("{wanted} replicas need {wanted} brokers, {left} would be left");
            return Err(refusal(Code::FailedPrecondition, "TOO_FEW_BROKERS", &text));
        }
        Ok(())
    }

    fn in_sync(&self, id: u64) -> bool {
        self.brokers.iter().any(|b| b.id == id && self.alive.contains(&b.name))
    }

    /// Replicas in sync of the partition that has the fewest.
    pub(crate) fn in_sync_min(&self) -> usize {
        let partitions = self.topics.values().flat_map(|t| &t.partitions);
        partitions.map(|p| p.replicas.iter().filter(|r| self.in_sync(**r)).count()).min().unwrap_or(usize::MAX)
    }

    pub(crate) fn expect(&mut self, name: &str) -> u64 {
        self.ids += 1;
        let name = name.to_owned();
        self.brokers.push(v1::Broker { id: self.ids, name, phase: "expected".into(), ..Default::default() });
        self.ids
    }
}

/// Them, behind one address.
#[derive(Clone, Default)]
pub(crate) struct Scripted {
    state: Arc<Mutex<State>>,
    server: Server,
}

type Applied = Result<Response<v1::ApplyResponse>, Status>;

impl Scripted {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A change, which is made whether or not the operator still learns of it; nothing, where it has ended before.
    fn changed<T>(&self, changes: bool, change: impl FnOnce(&mut State) -> T) -> Result<T, Status> {
        if self.server.has_ended() {
            return Err(Status::unavailable("the operator ended here"));
        }
        let done = change(&mut self.state());
        if changes && self.server.changes_elsewhere() {
            return Err(Status::unavailable("the operator ended here"));
        }
        Ok(done)
    }

    /// Serves them on a free port.
    pub(crate) async fn serve(server: &Server) -> (Self, Brokers) {
        let scripted = Self { server: server.clone(), ..Self::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let router = tonic::transport::Server::builder()
            .add_service(v1::metadata_server::MetadataServer::new(scripted.clone()))
            .add_service(v1::admin_server::AdminServer::new(scripted.clone()));
        tokio::spawn(router.serve_with_incoming(incoming));
        (scripted, Brokers::at(&address.to_string()))
    }

    /// One broker that is always there.
    pub(crate) async fn lonely(server: &Server) -> (Self, Brokers) {
        let (scripted, brokers) = Self::serve(server).await;
        {
            let mut state = scripted.state();
            state.expect("default-broker-0");
            state.brokers[0].phase = "active".into();
            state.alive.insert("default-broker-0".into());
        }
        (scripted, brokers)
    }
}

/// Topics of a page.
const PAGE_MAX: usize = 2;

fn done() -> Applied {
    Ok(Response::new(v1::ApplyResponse::default()))
}

#[tonic::async_trait]
impl v1::metadata_server::Metadata for Scripted {
    async fn get(&self, request: Request<v1::GetMetadataRequest>) -> Result<Response<v1::GetMetadataResponse>, Status> {
        let after = request.into_inner().page_token;
        let state = self.state();
        if state.alive.is_empty() {
            return Err(Status::unavailable("no broker runs"));
        }
        let with_address = |b: &v1::Broker| v1::Broker { admin_address: "any:1".into(), ..b.clone() };
        let mut topics: Vec<v1::Topic> = state.topics.values().filter(|t| t.name > after).cloned().collect();
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        let is_last = topics.len() <= PAGE_MAX;
        topics.truncate(PAGE_MAX);
        Ok(Response::new(v1::GetMetadataResponse {
            cluster_id: "c".into(),
            brokers: state.brokers.iter().map(with_address).collect(),
            next_page_token: topics.last().filter(|_| !is_last).map_or(String::new(), |last| last.name.clone()),
            topics,
            subscriptions: if is_last { state.subscriptions.values().cloned().collect() } else { Vec::new() },
            ..Default::default()
        }))
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let state = self.state();
        let replica = |id: &u64| v1::ReplicaStatus {
            broker: *id,
            in_sync: state.in_sync(*id),
            voter: true,
            ..Default::default()
        };
        let mut partitions = Vec::new();
        for topic in state.topics.values() {
            let of = state.subscriptions.values();
            let of = of.filter(|s| s.spec.as_ref().is_some_and(|x| x.topic == topic.name));
            let named = |s: &v1::Subscription| v1::SubscriptionStatus {
                subscription: s.name.clone(),
                backlog: state.traffic,
                backlog_bytes: state.traffic,
                oldest_ms: Some(1),
                ..Default::default()
            };
            let subscriptions: Vec<_> = of.map(named).collect();
            partitions.extend(topic.partitions.iter().map(|p| v1::PartitionStatus {
                topic: topic.name.clone(),
                group: p.group,
                term: 1,
                replicas: p.replicas.iter().map(replica).collect(),
                subscriptions: subscriptions.clone(),
                log_bytes: state.traffic,
                ..Default::default()
            }));
        }
        Ok(Response::new(v1::DescribeResponse { partitions, ..Default::default() }))
    }
}

#[tonic::async_trait]
impl v1::admin_server::Admin for Scripted {
    async fn apply_topic(&self, request: Request<v1::ApplyTopicRequest>) -> Applied {
        let asked = request.into_inner();
        self.changed(true, |state| {
            let replicas: Vec<u64> = state.brokers.iter().take(1).map(|b| b.id).collect();
            let leader = replicas.first().copied().unwrap_or_default();
            let partition = v1::Partition { group: 7, leader, replicas, settled: true, partition: 0 };
            let topic = v1::Topic {
                name: asked.name.clone(),
                spec: asked.spec,
                owner_uid: asked.owner_uid.clone(),
                partitions: vec![partition],
                ..Default::default()
            };
            state.topics.insert(asked.name.clone(), topic);
            state.applied.push(asked);
        })?;
        done()
    }

    async fn delete_topic(&self, request: Request<v1::DeleteRequest>) -> Applied {
        let asked = request.into_inner();
        let found = self.state().topics.contains_key(&asked.name);
        self.changed(found, |state| {
            match state.topics.get_mut(&asked.name) {
                Some(topic) if asked.release => topic.owner_uid.clear(),
                _ => drop(state.topics.remove(&asked.name)),
            }
            state.deleted.push(asked);
        })?;
        if found { done() } else { Err(not_found()) }
    }

    async fn apply_subscription(&self, request: Request<v1::ApplySubscriptionRequest>) -> Applied {
        let asked = request.into_inner();
        self.changed(true, |state| {
            let subscription = v1::Subscription {
                name: asked.name.clone(),
                spec: asked.spec,
                owner_uid: asked.owner_uid,
                generation: asked.generation,
                topics: vec!["shop/orders".into()],
                ..Default::default()
            };
            state.subscriptions.insert(asked.name, subscription);
        })?;
        done()
    }

    async fn delete_subscription(&self, request: Request<v1::DeleteRequest>) -> Applied {
        let asked = request.into_inner();
        let found = self.state().subscriptions.contains_key(&asked.name);
        self.changed(found, |state| {
            state.subscriptions.remove(&asked.name);
            state.deleted.push(asked);
        })?;
        if found { done() } else { Err(not_found()) }
    }

    async fn add_broker(
        &self,
        request: Request<v1::AddBrokerRequest>,
    ) -> Result<Response<v1::AddBrokerResponse>, Status> {
        let name = request.into_inner().name;
        let known = self.state().brokers.iter().any(|b| b.name == name);
        self.changed(!known, |state| {
            if !known {
                state.expect(&name);
            }
        })?;
        Ok(Response::new(v1::AddBrokerResponse::default()))
    }

    async fn drain_broker(&self, request: Request<v1::DrainBrokerRequest>) -> Applied {
        let v1::DrainBrokerRequest { id, cancel } = request.into_inner();
        if !cancel {
            self.state().check_drain(id)?;
        }
        let phase = if cancel { "active" } else { "draining" };
        let changes = self.state().brokers.iter().any(|b| b.id == id && b.phase != phase);
        self.changed(changes, |state| {
            if let Some(broker) = state.brokers.iter_mut().find(|b| b.id == id) {
                broker.phase = phase.into();
            }
        })?;
        done()
    }

    async fn take_snapshot(&self, _: Request<v1::SnapshotRequest>) -> Applied {
        done()
    }

    async fn delete_snapshot(&self, _: Request<v1::SnapshotRequest>) -> Applied {
        done()
    }

    async fn open_redrive(
        &self,
        _: Request<v1::OpenRedriveRequest>,
    ) -> Result<Response<v1::OpenRedriveResponse>, Status> {
        Ok(Response::new(v1::OpenRedriveResponse::default()))
    }

    async fn set_broker_rack(&self, _: Request<v1::SetBrokerRackRequest>) -> Applied {
        done()
    }

    async fn set_log_level(&self, _: Request<v1::SetLogLevelRequest>) -> Applied {
        done()
    }
}

/// As brokers refuse.
fn refusal(code: Code, reason: &str, text: &str) -> Status {
    use tonic_types::{ErrorDetails, StatusExt as _};
    let details = ErrorDetails::with_error_info(reason, "weir.dev", std::collections::HashMap::new());
    Status::with_error_details(code, text, details)
}

fn not_found() -> Status {
    refusal(Code::NotFound, "NOT_FOUND", "there is none")
}
