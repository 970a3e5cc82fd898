//! Between brokers. Who speaks is checked before anything it says is heard.

use super::{Context, number};
use crate::formation::Formation;
use crate::node_loop::Event;
use crate::peers;
use crate::status::Failure;
use crate::vouched::members;
use prost::Message as _;
use std::sync::{Arc, OnceLock};
use tonic::{Code, Request, Response, Status, Streaming};
use weir_core::ids::BrokerId;
use weir_core::meta::command::{Command, Kind};
use weir_core::meta::state::{Broker, Phase};
use weir_proto::v1;
use weir_proto::v1::peer_server::Peer;

/// A broker may be replaced under its name after this much silence, ms.
const SILENCE_MS: u64 = 2_000;

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
}

/// Hands on what a peer says, until it ends or has no voice any more.
async fn hear(context: &Context, from: BrokerId, frames: &mut Streaming<v1::PeerFrame>) -> Result<(), Status> {
    while let Some(frame) = frames.message().await? {
        let meta = context.shared.meta();
        // ids only grow: one below the newest that is not there was removed; another may have joined since, unknown here
        let refused = match meta.broker(from) {
            Some(broker) => (broker.phase() == Phase::Lost).then_some(peers::REMOVED),
            // one that knows no members yet hears its leader
            None if meta.brokers.is_empty() => None,
            None if from.0 <= meta.last_id => Some(peers::REMOVED),
            None => (!context.vouched.vouch_for(from, &meta).await).then_some("NOT_A_MEMBER"),
        };
        if let Some(reason) = refused {
            let text = format!("broker {from} is not a member of the cluster");
            return Err(Failure::new(Code::PermissionDenied, reason, text).into());
        }
        context.node.send(Event::Peer(from, peers::from_frame(frame)));
    }
    Ok(())
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloResponse>, Status> {
        let identity = self.formation.identity();
        Ok(Response::new(v1::HelloResponse {
            name: self.formation.me.name.clone(),
            cluster_id: identity.cluster_id,
            broker_id: identity.broker_id,
            active: identity.active,
            members: self.context.get().map(|c| members(&c.shared.meta())).unwrap_or_default(),
        }))
    }

    async fn prepare(&self, request: Request<v1::FormRequest>) -> Result<Response<v1::FormResponse>, Status> {
        let request = request.into_inner();
        self.formation.prepare(&request.cluster_id, request.state).map_err(Failure::from)?;
        Ok(Response::new(v1::FormResponse {}))
    }

    async fn activate(&self, request: Request<v1::FormRequest>) -> Result<Response<v1::FormResponse>, Status> {
        self.formation.activate(&request.into_inner().cluster_id).map_err(Failure::from)?;
        Ok(Response::new(v1::FormResponse {}))
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let context = self.running()?;
        let request = request.into_inner();
        if context.shared.controller() != Some(context.shared.broker) {
            let meta = context.shared.meta();
            let controller = context.shared.controller().and_then(|b| meta.broker(b)).map(|b| b.peer_address.clone());
            let address =
                controller.ok_or_else(|| Failure::new(Code::Unavailable, "NO_CONTROLLER", "no metadata leader now"))?;
            let mut peer = peers::connect(&address)
                .await
                .map_err(|e| Failure::new(Code::Unavailable, "NO_CONTROLLER", e.to_string()))?;
            return peer.join(request).await;
        }
        let meta = context.shared.meta();
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
            ..Default::default()
        };
        let broker_id = number(context.propose_here(Kind::Register(broker).into()).await?);
        Ok(Response::new(v1::JoinResponse { cluster_id: meta.cluster_id.clone(), broker_id }))
    }

    async fn propose(&self, request: Request<v1::ProposeRequest>) -> Result<Response<v1::ProposeResponse>, Status> {
        let context = self.running()?;
        let command =
            Command::decode(request.into_inner().command).map_err(|e| Failure::invalid("COMMAND", e.to_string()))?;
        let number = number(context.propose_here(command).await?);
        Ok(Response::new(v1::ProposeResponse { number, version: context.shared.meta().version }))
    }

    async fn exchange(&self, request: Request<Streaming<v1::PeerFrame>>) -> Result<Response<v1::PeerDone>, Status> {
        let context = self.running()?.clone();
        let mut frames = request.into_inner();
        let first = frames.message().await?;
        let hello =
            first.and_then(|f| f.hello).ok_or_else(|| Failure::invalid("HELLO", "a stream begins with a hello"))?;
        let identity = self.formation.identity();
        if hello.cluster_id != identity.cluster_id || hello.broker_id == identity.broker_id || hello.broker_id == 0 {
            let text = format!("broker {} of cluster '{}' is no peer of this one", hello.broker_id, hello.cluster_id);
            return Err(Failure::new(Code::PermissionDenied, "NOT_A_PEER", text).into());
        }
        if hello.to_broker_id != identity.broker_id {
            // without this a broker on an empty disk would answer as the one it replaced, and vote as it
            let text = format!("this is broker {}, not {}", identity.broker_id, hello.to_broker_id);
            return Err(Failure::new(Code::FailedPrecondition, "OTHER_BROKER", text).into());
        }
        let from = BrokerId(hello.broker_id);
        let heard = hear(&context, from, &mut frames).await;
        context.node.send(Event::LostContact(from));
        heard?;
        Ok(Response::new(v1::PeerDone {}))
    }
}
