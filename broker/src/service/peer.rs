//! Calls between brokers. The sender of each is verified before anything changes: it names this cluster, a member of it, and this broker.

use super::{Context, number};
use crate::declare;
use crate::formation::{self, Formation};
use crate::node_loop::Event;
use crate::outbox::{self, Limit};
use crate::peers;
use crate::status::Failure;
use crate::vouched::members;
use prost::Message as _;
use std::sync::{Arc, OnceLock};
use tonic::{Code, Request, Response, Status, Streaming};
use weir_core::ids::BrokerId;
use weir_core::incarnation::Incarnation;
use weir_core::meta::command::{Command, Kind};
use weir_core::meta::state::{Broker, Phase};
use weir_core::node::PeerMessage;
use weir_proto::v1;
use weir_proto::v1::peer_server::Peer;

/// A broker may be replaced under its name after this much silence, ms.
const SILENCE_MS: u64 = 2_000;
/// Of the reason why a broker begins with an empty disk, so many characters are kept.
const REASON_CHARS_MAX: usize = 500;

/// Answers peers, also before this broker has an identity.
#[derive(Clone)]
pub struct PeerService {
    /// The identity.
    pub formation: Arc<Formation>,
    /// Set once the node runs.
    pub context: Arc<OnceLock<Context>>,
}

impl PeerService {
    fn running(&self) -> Result<&Context, Failure> {
        let starting = || Failure::new(Code::Unavailable, "STARTING", "the broker is starting");
        self.context.get().ok_or_else(starting)
    }

    /// A refusal, counted where the broker runs.
    fn refused(&self, failure: impl Into<Failure>) -> Failure {
        let failure = failure.into();
        match self.context.get() {
            Some(context) => context.rejected(failure),
            None => failure,
        }
    }

    /// The broker that a hello names, where it names this cluster and is meant for this broker.
    fn named(&self, hello: Option<v1::PeerHello>) -> Result<BrokerId, Failure> {
        let hello = hello.ok_or_else(|| Failure::invalid("HELLO", "a peer begins with a hello"))?;
        let identity = self.formation.identity();
        if hello.cluster_id != identity.cluster_id || hello.broker_id == identity.broker_id || hello.broker_id == 0 {
            let text = format!("broker {} of cluster '{}' is no peer of this one", hello.broker_id, hello.cluster_id);
            return Err(Failure::new(Code::PermissionDenied, "NOT_A_PEER", text));
        }
        if hello.to_broker_id != identity.broker_id {
            // without this a broker on an empty disk would answer as the one it replaced, and vote as it
            let text = format!("this is broker {}, not {}", identity.broker_id, hello.to_broker_id);
            return Err(Failure::new(Code::FailedPrecondition, "OTHER_BROKER", text));
        }
        Ok(BrokerId(hello.broker_id))
    }

    /// The running broker, once the sender of a call is known to be a member.
    async fn called_by(&self, hello: Option<v1::PeerHello>) -> Result<&Context, Failure> {
        let context = self.running()?;
        let from = self.named(hello)?;
        check_member(context, from).await.map_err(|f| context.rejected(f))?;
        Ok(context)
    }
}

/// Refuses a sender that is not a member of the cluster (any more).
async fn check_member(context: &Context, from: BrokerId) -> Result<(), Failure> {
    let meta = context.shared.meta();
    // ids only grow: one below the newest that is not there was removed; another may have joined since, unknown here
    let refused = match meta.broker(from) {
        Some(broker) => (broker.phase() == Phase::Lost).then_some(peers::REMOVED),
        // one that knows no members yet hears its leader
        None if meta.brokers.is_empty() => None,
        None if from.0 <= meta.last_id => Some(peers::REMOVED),
        None => (!context.vouched.vouch_for(from, &meta).await).then_some("NOT_A_MEMBER"),
    };
    let Some(reason) = refused else { return Ok(()) };
    Err(Failure::new(Code::PermissionDenied, reason, format!("broker {from} is not a member of the cluster")))
}

/// Hands on what a peer says, until it ends or has no voice any more.
async fn hear(
    context: &Context,
    from: BrokerId,
    incarnation: Incarnation,
    frames: &mut Streaming<v1::PeerFrame>,
) -> Result<(), Status> {
    let mut first = Some(PeerMessage::Incarnation(incarnation));
    while let Some(frame) = frames.message().await? {
        if frame.hello.is_some() {
            let again = Failure::invalid("HELLO", "only the first frame of a stream holds a hello");
            return Err(context.rejected(again).into());
        }
        check_member(context, from).await?;
        let messages = first.take().into_iter().chain(peers::from_frame(frame)).collect();
        context.node.send(Event::Peer(from, messages));
    }
    Ok(())
}

/// Refuses a request to join unless the broker at the address that it names answers with its name and belongs to no cluster yet.
async fn check_joiner(context: &Context, request: &v1::JoinRequest) -> Result<(), Failure> {
    let hello = formation::hello(&request.peer_address, &context.formation.me.name, &request.cluster_id).await;
    if hello.is_ok_and(|hello| hello.name == request.name && !hello.active) {
        return Ok(());
    }
    let text = format!("no broker called '{}' answers at {} and waits to join", request.name, request.peer_address);
    Err(Failure::new(Code::PermissionDenied, "NOT_A_PEER", text))
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Result<Response<v1::HelloResponse>, Status> {
        let identity = self.formation.identity();
        let caller_is_replaceable = match self.context.get() {
            Some(context) => {
                let name = request.into_inner().name;
                context.node.ask(move |node| node.can_replace(&name)).await.unwrap_or(false)
            }
            None => false,
        };
        Ok(Response::new(v1::HelloResponse {
            name: self.formation.me.name.clone(),
            cluster_id: identity.cluster_id,
            broker_id: identity.broker_id,
            active: identity.active,
            caller_is_replaceable,
            members: self.context.get().map(|c| members(&c.shared.meta())).unwrap_or_default(),
        }))
    }

    async fn prepare(&self, request: Request<v1::FormRequest>) -> Result<Response<v1::FormResponse>, Status> {
        let request = request.into_inner();
        let prepared = self.formation.prepare(&request.cluster_id, request.state);
        prepared.map_err(|error| self.refused(error))?;
        Ok(Response::new(v1::FormResponse {}))
    }

    async fn activate(&self, request: Request<v1::FormRequest>) -> Result<Response<v1::FormResponse>, Status> {
        let activated = self.formation.activate(&request.into_inner().cluster_id);
        activated.map_err(|error| self.refused(error))?;
        Ok(Response::new(v1::FormResponse {}))
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let context = self.running()?;
        let mut request = request.into_inner();
        if request.passed_on.is_some() {
            self.called_by(request.passed_on.take()).await?;
        }
        let cluster_id = self.formation.identity().cluster_id;
        if request.cluster_id != cluster_id {
            let text = format!("this broker is of another cluster than '{}'", request.cluster_id);
            return Err(context.rejected(Failure::new(Code::PermissionDenied, "NOT_A_PEER", text)).into());
        }
        let no_controller = |what: String| Failure::new(Code::Unavailable, "NO_CONTROLLER", what);
        let controller = context.shared.controller();
        let controller = controller.ok_or_else(|| no_controller("no metadata leader now".to_owned()))?;
        let meta = context.shared.meta();
        if controller != context.shared.broker {
            let address = meta.broker(controller).map(|b| b.peer_address.clone());
            let address = address.ok_or_else(|| no_controller("no metadata leader now".to_owned()))?;
            let mut peer = peers::connect(&address).await.map_err(|e| no_controller(e.to_string()))?;
            request.passed_on = Some(context.hello_to(controller));
            return peer.join(request).await;
        }
        check_joiner(context, &request).await.map_err(|f| context.rejected(f))?;
        if let Some(old) = meta.broker_named(&request.name).filter(|b| b.phase() != Phase::Expected) {
            let id = BrokerId(old.id);
            let silent =
                context.node.ask(move |node| node.is_silent(id, SILENCE_MS)).await.ok_or_else(Failure::stopping)?;
            if !silent {
                let text = format!("a broker called {} (id {id}) was heard of just now", request.name);
                return Err(Failure::new(Code::FailedPrecondition, "NAME_IN_USE", text).into());
            }
        }
        let broker = Broker {
            name: request.name,
            client_address: request.client_address,
            peer_address: request.peer_address,
            admin_address: request.admin_address,
            rack: request.rack,
            rebuilt_because: request.rebuilt_because.chars().take(REASON_CHARS_MAX).collect(),
            ..Default::default()
        };
        let broker_id = number(context.propose_here(Kind::Register(broker).into()).await?);
        Ok(Response::new(v1::JoinResponse { cluster_id: meta.cluster_id.clone(), broker_id }))
    }

    async fn propose(&self, request: Request<v1::ProposeRequest>) -> Result<Response<v1::ProposeResponse>, Status> {
        let v1::ProposeRequest { command, hello } = request.into_inner();
        let context = self.called_by(hello).await?;
        let command = Command::decode(command).map_err(|e| Failure::invalid("COMMAND", e.to_string()))?;
        declare::handed_on(&command).map_err(|f| context.rejected(f))?;
        let number = number(context.propose_here(command).await?);
        Ok(Response::new(v1::ProposeResponse { number, version: context.shared.meta().version }))
    }

    async fn exchange(&self, request: Request<Streaming<v1::PeerFrame>>) -> Result<Response<v1::PeerDone>, Status> {
        let context = self.running()?.clone();
        let mut frames = request.into_inner();
        let first = frames.message().await?;
        let hello = first.and_then(|f| f.hello);
        let incarnation = Incarnation(hello.as_ref().map_or(0, |h| h.incarnation));
        let from = self.named(hello)?;
        let heard = hear(&context, from, incarnation, &mut frames).await;
        context.node.send(Event::LostContact(from));
        heard?;
        Ok(Response::new(v1::PeerDone {}))
    }

    async fn forward(&self, request: Request<v1::ForwardRequest>) -> Result<Response<v1::ForwardResponse>, Status> {
        let v1::ForwardRequest { hello, topic, partition, batch, carried } = request.into_inner();
        let context = self.called_by(hello).await?;
        let _budget = context.budget.publish(batch.len()).await;
        let limit = if carried { Limit::Carried } else { Limit::Topic };
        let appended = outbox::append(context, &topic, partition, batch, limit).await;
        let base_offset = appended.map_err(|f| context.rejected(f))?;
        Ok(Response::new(v1::ForwardResponse { base_offset }))
    }

    async fn pass_reply(&self, request: Request<v1::PassReplyRequest>) -> Result<Response<v1::ReplyResponse>, Status> {
        let v1::PassReplyRequest { hello, address, message } = request.into_inner();
        let context = self.called_by(hello).await?;
        context.take_reply(&address, message).map_err(|f| context.rejected(f))?;
        Ok(Response::new(v1::ReplyResponse {}))
    }

    async fn committed(
        &self,
        request: Request<v1::CommittedRequest>,
    ) -> Result<Response<v1::CommittedResponse>, Status> {
        let hello = request.into_inner().hello;
        let from = BrokerId(hello.as_ref().map_or(0, |h| h.broker_id));
        let context = self.called_by(hello).await?;
        let asked = context.node.ask(move |node| node.committed_for(from)).await.ok_or_else(Failure::stopping)?;
        let groups = asked.into_iter().map(|(group, index)| v1::CommittedGroup { group: group.0, index }).collect();
        Ok(Response::new(v1::CommittedResponse { groups }))
    }
}
