//! The threads of a broker. One runs the core and never waits for the disk; one writes and syncs rounds,
//! taking all that have gathered at once; one reads old entries for followers that are behind. A failed write or sync ends the process: nothing is acknowledged after it.

use crate::metrics::Metrics;
use crate::shared::Shared;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use weir_core::batch::BatchHeader;
use weir_core::entry::Control;
use weir_core::eraftpb::Entry;
use weir_core::ids::{BrokerId, GroupId, Ticket};
use weir_core::meta::command::Command;
use weir_core::node::{Effects, Fetch, Node, Now, PeerMessage, Reply, Round};
use weir_core::storage::{Store, StoreError};

/// Where a reply goes.
pub enum ReplyTo {
    /// To one waiting call.
    Call(oneshot::Sender<Reply>),
    /// To a publish stream, with the request's id, and what the batch holds of the broker's budget until it is answered, and of the
    /// stream's until the answer was taken.
    Stream {
        to: mpsc::UnboundedSender<(u64, Reply, OwnedSemaphorePermit)>,
        id: u64,
        budget: OwnedSemaphorePermit,
        unread: OwnedSemaphorePermit,
    },
}

impl ReplyTo {
    fn send(self, reply: Reply) {
        match self {
            // a caller that is gone needs no answer
            Self::Call(to) => drop(to.send(reply)),
            Self::Stream { to, id, budget, unread } => {
                drop(budget);
                drop(to.send((id, reply, unread)));
            }
        }
    }
}

/// What the node's thread is told.
pub enum Event {
    /// From a peer whose connection proved who it is.
    Peer(BrokerId, Vec<PeerMessage>),
    /// The connection from a peer broke.
    LostContact(BrokerId),
    /// A batch whose header was checked.
    Publish { group: GroupId, data: bytes::Bytes, header: BatchHeader, to: ReplyTo },
    /// A control record.
    Control { group: GroupId, control: Control, to: ReplyTo },
    /// A metadata command.
    Command { command: Box<Command>, to: ReplyTo },
    /// All rounds up to this one are written.
    Written(u64),
    /// And synced.
    Synced(u64),
    /// Old entries were read.
    Fetched(Fetch, Result<Vec<Entry>, StoreError>),
    /// A reader found a group's data damaged.
    Damage(GroupId, StoreError),
    /// Runs on the thread, with the node at hand.
    Ask(Box<dyn FnOnce(&mut Node) + Send>),
    /// The last: checkpoints are written, then both threads end.
    Stop(oneshot::Sender<()>),
}

/// Sends to the node's thread.
#[derive(Clone)]
pub struct NodeHandle(Sender<Event>);

impl NodeHandle {
    /// Sends an event; a stopped node drops it, and with it the reply's sender.
    pub fn send(&self, event: Event) {
        let _ = self.0.send(event);
    }

    /// Sends a request and waits for its reply; `None` where the node has stopped.
    pub async fn call(&self, event: impl FnOnce(ReplyTo) -> Event) -> Option<Reply> {
        let (to, reply) = oneshot::channel();
        self.send(event(ReplyTo::Call(to)));
        reply.await.ok()
    }

    /// Reads from the node on its thread.
    pub async fn ask<T: Send + 'static>(&self, read: impl FnOnce(&mut Node) -> T + Send + 'static) -> Option<T> {
        let (to, answer) = oneshot::channel();
        self.send(Event::Ask(Box::new(move |node| drop(to.send(read(node))))));
        answer.await.ok()
    }
}

/// Where messages to peers go.
pub trait PeerSender: Send + 'static {
    /// Queues what is for other brokers; what cannot be queued is dropped, as the network might.
    fn send(&mut self, effects: &mut Effects);
}

/// Monotonic time, and the wall clock as it was at start moved on by it.
pub struct Clock {
    started: Instant,
    wall_ms: u64,
}

impl Clock {
    /// Starts now.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let wall_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        Self { started: Instant::now(), wall_ms }
    }

    /// Now.
    pub fn now(&self) -> Now {
        let elapsed = self.started.elapsed().as_millis() as u64;
        Now { mono_ms: 1_000 + elapsed, log_ms: self.wall_ms + elapsed }
    }
}

/// A channel to a node that is not running yet.
pub fn channel_pair() -> (NodeHandle, Receiver<Event>) {
    let (to, from) = channel();
    (NodeHandle(to), from)
}

/// Runs the core until it is told to stop.
#[allow(clippy::too_many_arguments)] // called once, by the broker's start
pub fn run(
    mut node: Node,
    clock: Clock,
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    handle: NodeHandle,
    events: Receiver<Event>,
    mut peers: impl PeerSender,
) {
    let (rounds, disk) = channel();
    let disk_metrics = metrics.clone();
    let disk_thread = std::thread::Builder::new().name("weir-disk".into());
    let (reads, reader) = channel();
    let (reader_store, reader_handle) = (store.clone(), handle.clone());
    let reader_thread = std::thread::Builder::new().name("weir-reader".into());
    reader_thread.spawn(move || run_reader(&*reader_store, &reader, &reader_handle)).expect("a thread");
    let disk_thread = disk_thread.spawn(move || run_disk(&*store, &disk, &handle, &disk_metrics)).expect("a thread");
    let to_disk = Disk { rounds, reads };
    let mut waiting: HashMap<Ticket, ReplyTo> = HashMap::new();
    let mut last_ticket = 0;
    let tick = Duration::from_millis(25);
    let mut stop = None;
    while stop.is_none() {
        let mut event = match events.recv_timeout(tick) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        node.tick(clock.now());
        // all that has gathered goes into one round
        for _ in 0..4_096 {
            let Some(next) = event.take() else { break };
            last_ticket += 1;
            stop = take(&mut node, next, Ticket(last_ticket), &mut waiting).or(stop);
            event = events.try_recv().ok();
        }
        let effects = node.drain();
        shared.stalled_ms.store(node.stalled(), Ordering::Relaxed);
        carry_out(&node, effects, &shared, &metrics, &to_disk, &mut waiting, &mut peers);
    }
    node.checkpoint_all();
    if let Some(round) = node.drain().round {
        let _ = to_disk.rounds.send(round);
    }
    drop(to_disk);
    let _ = disk_thread.join();
    if let Some(stopped) = stop {
        let _ = stopped.send(());
    }
}

fn take(
    node: &mut Node,
    event: Event,
    ticket: Ticket,
    waiting: &mut HashMap<Ticket, ReplyTo>,
) -> Option<oneshot::Sender<()>> {
    match event {
        Event::Peer(from, messages) => messages.into_iter().for_each(|m| node.peer(from, m)),
        Event::LostContact(with) => node.lost_contact(with),
        Event::Publish { group, data, header, to } => {
            waiting.insert(ticket, to);
            node.publish(ticket, group, data, &header);
        }
        Event::Control { group, control, to } => {
            waiting.insert(ticket, to);
            node.control(ticket, group, &control);
        }
        Event::Command { command, to } => {
            waiting.insert(ticket, to);
            node.command(ticket, &command);
        }
        Event::Written(round) => node.written(round),
        Event::Synced(round) => node.synced(round),
        Event::Fetched(fetch, read) => node.fetched(fetch, read),
        Event::Damage(group, error) => node.found_damage(group, error),
        Event::Ask(read) => read(node),
        Event::Stop(stopped) => return Some(stopped),
    }
    None
}

/// The threads that touch the disk.
struct Disk {
    rounds: Sender<Round>,
    reads: Sender<Fetch>,
}

fn carry_out(
    node: &Node,
    mut effects: Effects,
    shared: &Shared,
    metrics: &Metrics,
    disk: &Disk,
    waiting: &mut HashMap<Ticket, ReplyTo>,
    peers: &mut impl PeerSender,
) {
    if let Some(round) = effects.round.take() {
        let _ = disk.rounds.send(round);
    }
    for fetch in effects.fetches.drain(..) {
        let _ = disk.reads.send(fetch);
    }
    for damage in effects.damage.drain(..) {
        metrics.damage.inc();
        tracing::error!(%damage, "damaged data: this replica takes part no more and will be rebuilt");
    }
    for group in effects.opened.drain(..) {
        shared.set_partition(group, node.group(group).map(|g| g.log().tail().clone()));
    }
    for (group, offset) in effects.advanced.drain(..) {
        shared.advanced(group, offset);
    }
    for group in effects.leaders.drain(..) {
        let leader = node.leader_of(group);
        tracing::debug!(%group, ?leader, "leader");
        shared.set_leader(group, leader);
    }
    if let Some(meta) = effects.meta.take() {
        shared.meta.send_replace(meta);
    }
    peers.send(&mut effects);
    for (ticket, reply) in effects.replies {
        if let Some(to) = waiting.remove(&ticket) {
            to.send(reply);
        }
    }
}

fn run_disk(store: &dyn Store, rounds: &Receiver<Round>, handle: &NodeHandle, metrics: &Metrics) {
    while let Ok(first) = rounds.recv() {
        let mut last = first.id;
        let mut sync = first.sync;
        let mut ops = first.ops;
        for next in rounds.try_iter().take(64) {
            last = next.id;
            sync |= next.sync;
            ops.extend(next.ops);
        }
        let started = Instant::now();
        if let Err(error) = store.write(&ops) {
            die(&format!("a write failed: {error}"));
        }
        handle.send(Event::Written(last));
        if sync {
            if let Err(error) = store.sync() {
                die(&format!("a sync failed: {error}"));
            }
            metrics.sync_seconds.observe(started.elapsed().as_secs_f64());
        }
        handle.send(Event::Synced(last));
    }
}

fn run_reader(store: &dyn Store, reads: &Receiver<Fetch>, handle: &NodeHandle) {
    while let Ok(fetch) = reads.recv() {
        let read = store.entries(fetch.group, fetch.low, fetch.high, fetch.bytes_max);
        handle.send(Event::Fetched(fetch, read));
    }
}

/// No retry and no further ack: what a disk says after a failed sync cannot be believed.
fn die(why: &str) -> ! {
    eprintln!("weir-broker: {why}; ending so that nothing unsynced is acknowledged");
    // RocksDB waits at a process's end for what it does in the background: no longer than this
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(1));
        std::process::abort();
    });
    std::process::exit(74);
}
