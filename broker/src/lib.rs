//! A Weir broker: the thin shell around [`weir_core`]. [`start`] runs one in this process; `weir-broker` is its program.

#![deny(clippy::print_stdout, clippy::print_stderr)] // see `output`

pub mod answer;
pub mod aside;
pub mod budget;
pub mod catch_up;
pub mod config;
pub mod dead_letter;
pub mod declare;
pub mod files;
pub mod filter;
pub mod formation;
pub mod garbage;
pub mod guard;
pub mod hub;
pub mod logging;
pub mod metrics;
pub mod node_loop;
pub mod outbox;
pub mod outlet;
pub mod output;
pub mod peers;
pub mod push;
pub mod room;
pub mod scheduler;
pub mod selection;
pub mod service;
pub mod shared;
pub mod status;
pub mod throttle;
pub mod unpack;
mod unreadable;
pub mod verify;
pub mod vital;
pub mod vouched;

use answer::Answering;
use anyhow::Context as _;
use config::Config;
use files::Shares;
use formation::Formation;
use guard::{Brief, Deadlines};
use metrics::Metrics;
use node_loop::{Clock, Event, NodeHandle};
use service::Context;
use service::peer::PeerService;
use shared::Shared;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tonic::service::Routes;
use tonic::transport::Server;
use vouched::Vouched;
use weir_core::ids::{BrokerId, META_GROUP, ReplicaId};
use weir_core::meta::state::{Broker, MetaState};
use weir_core::node::{Limits, Node};
use weir_proto::v1;
use weir_store::rocks::RocksStore;

/// A broker running in this process.
pub struct Running {
    /// Its addresses, as bound.
    pub client: SocketAddr,
    /// Administrators'.
    pub admin: SocketAddr,
    /// Peers'.
    pub peer: SocketAddr,
    /// Metrics and health.
    pub metrics: SocketAddr,
    /// Its id.
    pub broker: BrokerId,
    /// What it publishes.
    pub shared: Arc<Shared>,
    node: NodeHandle,
    store: Weak<RocksStore>,
    _place: Option<weir_proto::inproc::Place>,
}

/// The runtime brokers are at their best in: half as many workers as there are processors, or as `TOKIO_WORKER_THREADS` says. To wake
/// another worker takes longer than most of what there is to do, and the store has threads of its own.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        builder.worker_threads(std::thread::available_parallelism().map_or(1, |n| n.get() / 2).max(1));
    }
    builder.enable_all().build()
}

async fn bind(address: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} for {what}; is it in use?"))
}

/// A socket at a path, also where a broker that ended left its own behind.
fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    let stale = path.metadata().is_ok_and(|m| m.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
    if stale {
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path).with_context(|| format!("cannot listen on {} for clients; is it in use?", path.display()))
}

fn server(deadlines: Deadlines) -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(weir_proto::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(weir_proto::CONNECTION_WINDOW_BYTES)
        .max_frame_size(weir_proto::FRAME_BYTES)
        .max_concurrent_streams(1_024)
        .http2_keepalive_interval(Some(deadlines.ping_after))
        .http2_keepalive_timeout(Some(deadlines.answer_within))
}

/// Starts a broker: opens its data, gets its identity (forming or joining a cluster where it must), and serves.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let peers = config.peer_list().map_err(anyhow::Error::msg)?;
    config.check().map_err(anyhow::Error::msg)?;
    std::fs::create_dir_all(&config.data).with_context(|| format!("cannot make {}", config.data.display()))?;
    room::check(&config.data).map_err(anyhow::Error::msg)?;
    let clients = bind(config.client_listen, "clients").await?;
    let socket = config.client_socket.as_deref().map(bind_unix).transpose()?;
    let peer_listener = bind(config.peer_listen, "peers").await?;
    let admins = bind(config.admin_listen, "administrators").await?;
    let scrapers = bind(config.metrics_listen, "metrics").await?;
    let (client, peer, admin, metrics_at) =
        (clients.local_addr()?, peer_listener.local_addr()?, admins.local_addr()?, scrapers.local_addr()?);
    let shares = files::shares(files::raise(), config.connections_max).map_err(anyhow::Error::msg)?;
    let room = room::Room::open(&config.data);
    let can_replace = formation::others_can_replace(peers.clone(), config.name.clone(), config.data.clone());
    let aside::Opened { store, rebuilt } = aside::open(&config.data, config.accept_loss, can_replace.clone()).await?;
    let expected = if config.cluster_id.is_empty() { aside::cluster(&config.data) } else { config.cluster_id.clone() };
    let me = Broker {
        name: config.name.clone(),
        client_address: config.advertised(client),
        peer_address: config.advertised(peer),
        admin_address: config.advertised(admin),
        rack: config.rack.clone(),
        rebuilt_because: aside::why(&config.data),
        ..Default::default()
    };
    let formation = Arc::new(Formation::open(me.clone(), peers, expected, store.clone())?);
    let running = Arc::new(OnceLock::new());
    let metrics = Arc::new(Metrics::new(config.data.clone()));
    let scrapers = Brief::new(scrapers, shares.metrics, config.deadlines, metrics.clone());
    vital::serve("the metrics server", metrics::serve(scrapers, running.clone()));
    if rebuilt {
        metrics.store_rebuilt();
    }
    let service = PeerService { formation: formation.clone(), context: running.clone() };
    let service = v1::peer_server::PeerServer::new(service)
        .max_decoding_message_size(weir_proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
    metrics.torn_bytes.set(store.torn_bytes() as i64);
    if store.torn_bytes() > 0 {
        tracing::warn!(
            bytes = store.torn_bytes(),
            "the write-ahead log had a torn tail: what was being written when it ended"
        );
    }
    let peer_connections = guard::incoming(peer_listener, shares.peers, config.deadlines, metrics.clone());
    vital::serve(
        "the peer server",
        server(config.deadlines).add_service(service).serve_with_incoming(peer_connections),
    );
    let (identity, known) = formation.establish().await?;
    let broker = BrokerId(identity.broker_id);
    aside::remember(&config.data, &identity.cluster_id)
        .and_then(|()| aside::has_joined(&config.data))
        .with_context(|| format!("cannot write to {}", config.data.display()))?;
    let weak_store = Arc::downgrade(&store);
    let node = NodeHandle::default();
    let clock = Clock::new();
    let seed = uuid::Uuid::new_v4().as_u64_pair().0;
    let mut core = Node::open(broker, store.clone(), Limits::default(), seed, clock.now())?;
    let not_opened = core.damaged().keys().copied().filter(|id| core.not_opened(*id).is_some()).collect();
    let shared = Arc::new(Shared::new(broker, store.clone(), node.clone(), not_opened));
    if let Some(why) = core.not_opened(META_GROUP) {
        anyhow::bail!("the metadata in {} cannot be read: {why}", config.data.display());
    }
    if core.group(META_GROUP).is_none() && !core.damaged().contains_key(&META_GROUP) && !identity.state.is_empty() {
        let state: MetaState = prost::Message::decode(identity.state.clone())?;
        core.create_meta(ReplicaId(broker.0), Some(&state));
    }
    let runtime = tokio::runtime::Handle::current();
    let vouched = Arc::new(Vouched::new(me.name.clone(), identity.cluster_id.clone(), formation.others(), known));
    shared.set_standing(Some(core.standing()), None);
    if core.meta().brokers.len() == 1 {
        tracing::info!("a cluster of one broker cannot notice that its volume was rolled back to an older copy");
    }
    let mut peer_streams = peers::Peers::new(shared.clone(), runtime, identity.cluster_id.clone(), vouched.clone());
    let data = config.data.clone();
    peer_streams.on_removal(move || aside::leave(&data, broker.0, "was removed from the cluster"));
    let data = config.data.clone();
    peer_streams.on_rollback(move || aside::leave(&data, broker.0, "has a volume that was rolled back"));
    node_loop::start(&node, core, clock, store, shared.clone(), metrics.clone(), peer_streams)?;
    let (hubs, turn, throttles, inboxes, schedulers, local) = Default::default();
    let context = Context {
        shared: shared.clone(),
        node: node.clone(),
        metrics,
        formation,
        vouched,
        budget: Default::default(),
        unpacker: Default::default(),
        local,
        hubs,
        turn,
        throttles,
        inboxes,
        channels: Default::default(),
        schedulers,
    };
    let _ = running.set(context.clone());
    let services = client_services(&context)?;
    let place = config.inproc.then(|| {
        let taken = || format!("another broker of this process is called {}", config.name);
        weir_proto::inproc::register(&config.name, services.clone()).with_context(taken)
    });
    let place = place.transpose().inspect_err(|_| node.send(Event::Stop(tokio::sync::oneshot::channel().0)))?;
    serve_clients(&context, services, (clients, socket), admins, (shares, config.deadlines))?;
    vital::spawn("garbage collection", garbage::collect(node.clone(), weak_store.clone(), config.data.clone()));
    vital::spawn(
        "the watch over the disk's space",
        room.watch(node.clone(), weak_store.clone(), context.metrics.clone()),
    );
    let metrics = context.metrics.clone();
    vital::spawn("the watch over the store", aside::watch(weak_store.clone(), metrics, can_replace));
    vital::spawn("the scheduler", scheduler::tend(context.clone()));
    vital::spawn("push", push::tend(context.clone()));
    vital::spawn("the watch over what this broker lacks", catch_up::watch(context.clone()));
    vital::spawn("the update of addresses", keep_addresses(context, Broker { id: broker.0, ..me }));
    tracing::info!(%broker, %client, %admin, %peer, metrics = %metrics_at, "serving");
    Ok(Running { client, admin, peer, metrics: metrics_at, broker, shared, node, store: weak_store, _place: place })
}

/// The reflection service of a listener: it names what is served there, and no more.
macro_rules! reflection {
    ($($service:literal),*) => {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(weir_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health")
            $(.with_service_name(concat!("weir.v1.", $service)))*
            .build_v1()
    };
}

/// What clients are served.
fn client_services(context: &Context) -> anyhow::Result<Routes> {
    let (_, health) = tonic_health::server::health_reporter();
    let limit = weir_proto::MESSAGE_BYTES_MAX;
    let c = || context.clone();
    Ok(Routes::new(reflection!("Publisher", "Subscriber", "Requester", "Log", "Metadata")?)
        .add_service(health)
        .add_service(v1::publisher_server::PublisherServer::new(c()).max_decoding_message_size(limit))
        .add_service(Answering(v1::subscriber_server::SubscriberServer::new(c()).max_decoding_message_size(limit)))
        .add_service(Answering(v1::requester_server::RequesterServer::new(c()).max_decoding_message_size(limit)))
        .add_service(Answering(v1::log_server::LogServer::new(c())))
        .add_service(v1::metadata_server::MetadataServer::new(c())))
}

fn serve_clients(
    context: &Context,
    services: Routes,
    (clients, socket): (TcpListener, Option<UnixListener>),
    admins: TcpListener,
    (shares, deadlines): (Shares, Deadlines),
) -> anyhow::Result<()> {
    let clients = guard::incoming(clients, shares.clients, deadlines, context.metrics.clone());
    let clients = server(deadlines).add_routes(services.clone()).serve_with_incoming(clients);
    let (_, health) = tonic_health::server::health_reporter();
    let admins = server(deadlines)
        .add_service(reflection!("Admin", "Metadata")?)
        .add_service(health)
        .add_service(v1::admin_server::AdminServer::new(context.clone()))
        .add_service(v1::metadata_server::MetadataServer::new(context.clone()))
        .serve_with_incoming(guard::incoming(admins, shares.admins, deadlines, context.metrics.clone()));
    vital::serve("the client server", clients);
    if let Some(socket) = socket {
        let incoming = guard::incoming_unix(socket, shares.socket, deadlines, context.metrics.clone());
        vital::serve("the socket's server", server(deadlines).add_routes(services).serve_with_incoming(incoming));
    }
    vital::serve("the admin server", admins);
    Ok(())
}

/// Tells the metadata group where this broker is reached, whenever that is not what it says.
async fn keep_addresses(context: Context, me: Broker) {
    loop {
        let meta = context.shared.meta();
        let known = meta.broker(BrokerId(me.id));
        // told no rack, it is where an administrator says
        let rack = if me.rack.is_empty() { known.map_or("", |b| &b.rack) } else { &me.rack };
        let update = Broker { rack: rack.to_owned(), ..me.clone() };
        let addresses =
            |b: &Broker| (b.client_address.clone(), b.peer_address.clone(), b.admin_address.clone(), b.rack.clone());
        let stale = known.is_some_and(|b| addresses(b) != addresses(&update));
        if stale && let Err(error) = context.propose(weir_core::meta::command::Kind::UpdateBroker(update)).await {
            tracing::debug!(%error, "telling the cluster this broker's addresses");
        }
        tokio::time::sleep(Duration::from_millis(if stale { 200 } else { 1_000 })).await;
    }
}

impl Running {
    /// Panics in the core: on its own thread, or on the one that calls it.
    #[cfg(test)]
    pub(crate) fn panic_core(&self, on_its_own_thread: bool) {
        self.node.panic(on_its_own_thread);
    }

    /// Waits until every group held here has a leader.
    pub async fn ready(&self) {
        while metrics::why_not_ready(&self.shared).is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stops as planned: leadership moves away first, then checkpoints are written.
    pub async fn stop(self) {
        for _ in 0..40 {
            let ask = |node: &mut Node| {
                node.resign();
                node.led_with_others()
            };
            match self.node.ask(ask).await {
                Some(0) | None => break,
                Some(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        let (stopped, wait) = tokio::sync::oneshot::channel();
        self.node.send(Event::Stop(stopped));
        let _ = tokio::time::timeout(Duration::from_secs(10), wait).await;
        if let Some(store) = self.store.upgrade() {
            store.stop_background_work();
        }
    }
}
