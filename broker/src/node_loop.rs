//! What runs the core. Whoever has something to tell it runs it there and then, where nobody else does; else its own thread does, which
//! also lets time pass. So a message alone crosses no thread on its way, and many are taken at once. The core never waits for the disk:
//! a thread writes and syncs rounds, taking all that have gathered; one reads old entries for followers that are behind. Only a small
//! round that needs no sync is written at once, where that does not mean waiting. A failed write or sync ends the process: nothing
//! is acknowledged after it.

use crate::metrics::Metrics;
use crate::shared::Shared;
use crate::vital::{EndOnPanic, die};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use weir_core::batch::BatchHeader;
use weir_core::entry::Control;
use weir_core::eraftpb::Entry;
use weir_core::group::Group;
use weir_core::ids::{BrokerId, GroupId, Ticket};
use weir_core::incarnation::Standing;
use weir_core::meta::command::Command;
use weir_core::node::{Effects, Fetch, Node, Now, PeerMessage, Refusal, Reply, Round};
use weir_core::storage::{Store, StoreError, WriteOp};

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
    /// A control record, of what began in this term of its leader: in another it is refused.
    Control { group: GroupId, control: Control, term: u64, to: ReplyTo },
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

/// Events taken in one turn at most.
const TURN_EVENTS_MAX: usize = 4_096;
/// With more events waiting than this, the core's own thread takes them.
const IN_PASSING_MAX: usize = 4;
/// A round of at most so many bytes may be written in passing.
const ROUND_BYTES_MAX: usize = 64 << 10;
/// The core's thread looks at least this often at what time it is.
const TICK: Duration = Duration::from_millis(25);

#[derive(Default)]
struct Inbox {
    events: VecDeque<Event>,
    ended: bool,
}

#[derive(Default)]
struct Desk {
    inbox: Mutex<Inbox>,
    /// empty before the core runs, and once it has ended
    driver: Mutex<Option<Driver>>,
    thread: OnceLock<Thread>,
}

/// Tells the core what has happened, and runs it where nobody else does.
#[derive(Clone, Default)]
pub struct NodeHandle(Arc<Desk>);

impl NodeHandle {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an event in; how many there are then, 0 where nobody takes them any more.
    fn put(&self, event: Event) -> usize {
        let mut inbox = self.inbox();
        if inbox.ended {
            return 0;
        }
        inbox.events.push_back(event);
        inbox.events.len()
    }

    /// Leaves an event to the core's own thread.
    fn leave(&self, event: Event) {
        if self.put(event) > 0 {
            self.wake();
        }
    }

    /// Sends an event; a stopped node drops it, and with it the reply's sender.
    pub fn send(&self, event: Event) {
        match self.put(event) {
            0 => return,
            1..=IN_PASSING_MAX => {}
            _ => return self.wake(),
        }
        match self.0.driver.try_lock() {
            Ok(mut driver) => {
                if let Some(driver) = driver.as_mut() {
                    driver.turn(self);
                }
            }
            // who has it sees this event before it goes, or wakes the thread
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(_)) => die("the core panicked"),
        }
        self.pass_on();
    }

    /// What came while the core was busy here is its thread's.
    fn pass_on(&self) {
        if !self.inbox().events.is_empty() {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(thread) = self.0.thread.get() {
            thread.unpark();
        }
    }

    /// Sends a request and waits for its reply; `None` where the node has stopped.
    pub async fn call(&self, event: impl FnOnce(ReplyTo) -> Event) -> Option<Reply> {
        let (to, reply) = oneshot::channel();
        self.send(event(ReplyTo::Call(to)));
        reply.await.ok()
    }

    /// Panics in the core: on its own thread, or on the one that calls it.
    #[cfg(test)]
    pub(crate) fn panic(&self, on_its_own_thread: bool) {
        let event = Event::Ask(Box::new(|_| panic!("as a fault would")));
        if on_its_own_thread {
            self.leave(event);
        } else {
            let handle = self.clone();
            drop(std::thread::spawn(move || handle.send(event)).join());
        }
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

/// Readings of the two clocks, of which the quickest is used.
const CLOCK_READINGS: usize = 10;

/// Reads the monotonic clock and the wall clock (ms) as close together as possible. `read` returns the wall clock between two readings of
/// the monotonic clock. The thread may be preempted between them, so the quickest of [`CLOCK_READINGS`] is used.
fn read_clocks(mut read: impl FnMut() -> (Instant, u64, Instant)) -> (Instant, u64) {
    let readings = (0..CLOCK_READINGS).map(|_| read());
    let (started, wall_ms, _) = readings.min_by_key(|(before, _, after)| *after - *before).expect("at least one");
    (started, wall_ms)
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
        let wall_ms = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let (started, wall_ms) = read_clocks(|| (Instant::now(), wall_ms(), Instant::now()));
        Self { started, wall_ms }
    }

    /// Now.
    pub fn now(&self) -> Now {
        let elapsed = self.started.elapsed().as_millis() as u64;
        Now { mono_ms: 1_000 + elapsed, log_ms: self.wall_ms + elapsed }
    }
}

/// The core, with all that is around it.
struct Driver {
    node: Node,
    clock: Clock,
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    peers: Box<dyn PeerSender>,
    disk: Disk,
    disk_thread: JoinHandle<()>,
    waiting: HashMap<Ticket, ReplyTo>,
    last_ticket: u64,
    stop: Option<oneshot::Sender<()>>,
}

/// Runs the core, on a thread of its own and on those of its callers, until it is told to stop.
pub fn start(
    handle: &NodeHandle,
    node: Node,
    clock: Clock,
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    peers: impl PeerSender,
) -> std::io::Result<()> {
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    let (rounds, to_write) = channel();
    let (reads, to_read) = channel();
    let (from, reader) = (store.clone(), handle.clone());
    thread("weir-reader").spawn(move || run_reader(&*from, &to_read, &reader))?;
    let (to, writer, counted) = (store.clone(), handle.clone(), metrics.clone());
    let disk_thread = thread("weir-disk").spawn(move || run_disk(&*to, &to_write, &writer, &counted))?;
    let disk = Disk { rounds, reads, handed: 0, synced: 0 };
    let (peers, waiting) = (Box::new(peers), HashMap::new());
    let driver =
        Driver { node, clock, store, shared, metrics, peers, disk, disk_thread, waiting, last_ticket: 0, stop: None };
    *handle.0.driver.lock().unwrap_or_else(PoisonError::into_inner) = Some(driver);
    let handle = handle.clone();
    let (ready, is_ready) = channel::<()>();
    thread("weir-node").spawn(move || {
        let _ = handle.0.thread.set(std::thread::current());
        drop(ready);
        run(&handle);
    })?;
    let _ = is_ready.recv(); // from now on it can be woken
    Ok(())
}

/// The core's own thread.
fn run(handle: &NodeHandle) {
    let _end = EndOnPanic("the core's thread");
    let ended = loop {
        let mut place = handle.0.driver.lock().unwrap_or_else(|_| die("the core panicked"));
        let Some(driver) = place.as_mut() else { return };
        driver.turn(handle);
        if driver.stop.is_some() {
            break place.take();
        }
        drop(place);
        if handle.inbox().events.is_empty() {
            std::thread::park_timeout(TICK);
        }
    };
    let inbox = std::mem::replace(&mut *handle.inbox(), Inbox { ended: true, ..Default::default() });
    drop(inbox); // who waits for an answer sees that none comes
    if let Some(driver) = ended {
        driver.end();
    }
}

impl Driver {
    /// Takes all that has gathered into one round, lets time pass, and does what comes of it.
    fn turn(&mut self, handle: &NodeHandle) {
        if self.stop.is_some() {
            return handle.wake();
        }
        let _end = EndOnPanic("the core");
        let now = self.clock.now();
        self.node.set_now(now);
        for _ in 0..TURN_EVENTS_MAX {
            let Some(event) = handle.inbox().events.pop_front() else { break };
            self.last_ticket += 1;
            self.take(event, Ticket(self.last_ticket));
            if self.stop.is_some() {
                handle.wake();
                break;
            }
        }
        // after what has come: where the turn before was a long one, peers that have spoken meanwhile were not silent
        self.node.tick(now);
        // before a peer hears of it: see `peers::Link`
        let takes_part = self.node.standing() == Standing::TakingPart;
        let incarnation = if takes_part { self.node.incarnation().0 } else { 0 };
        self.shared.incarnation.store(incarnation, Ordering::Release);
        // a round that was written at once has effects of its own
        while self.carry_out() {}
        self.shared.stalled_ms.store(self.node.stalled(), Ordering::Relaxed);
    }

    /// The last: checkpoints are written, then the disk's threads end.
    fn end(mut self) {
        self.node.checkpoint_all();
        if let Some(round) = self.node.drain().round {
            let _ = self.disk.rounds.send(round);
        }
        drop(self.disk);
        let _ = self.disk_thread.join();
        if let Some(stopped) = self.stop {
            let _ = stopped.send(());
        }
    }

    fn take(&mut self, event: Event, ticket: Ticket) {
        let node = &mut self.node;
        match event {
            Event::Peer(from, messages) => messages.into_iter().for_each(|m| node.peer(from, m)),
            Event::LostContact(with) => node.lost_contact(with),
            Event::Publish { group, data, header, to } => {
                self.waiting.insert(ticket, to);
                node.publish(ticket, group, data, &header);
            }
            Event::Control { group, control, term, to } => {
                if node.group(group).is_none_or(|g| g.term() != term) {
                    return to.send(Reply::Refused(Refusal::NotLeader));
                }
                self.waiting.insert(ticket, to);
                node.control(ticket, group, &control);
            }
            Event::Command { command, to } => {
                self.waiting.insert(ticket, to);
                node.command(ticket, &command);
            }
            Event::Written(round) => node.written(round),
            Event::Synced(round) => {
                self.disk.synced = round;
                node.synced(round);
            }
            Event::Fetched(fetch, read) => node.fetched(fetch, read),
            Event::Damage(group, error) => node.found_damage(group, error),
            Event::Ask(read) => read(node),
            Event::Stop(stopped) => self.stop = Some(stopped),
        }
    }

    /// Does what the core wants; true where a round was written meanwhile.
    fn carry_out(&mut self) -> bool {
        let mut effects = self.node.drain();
        let mut written = None;
        if let Some(round) = effects.round.take() {
            if self.write_in_passing(&round) {
                written = Some(round.id);
            } else {
                self.disk.handed = round.id;
                let _ = self.disk.rounds.send(round);
            }
        }
        for fetch in effects.fetches.drain(..) {
            let _ = self.disk.reads.send(fetch);
        }
        for damage in effects.damage.drain(..) {
            self.metrics.damaged(&damage);
        }
        for alarm in effects.alarms.drain(..) {
            self.metrics.alarm(&alarm);
            tracing::error!("{alarm}");
        }
        if effects.standing.is_some() || effects.rolled_back.is_some() {
            self.shared.set_standing(effects.standing, effects.rolled_back.take());
        }
        for (group, limit) in effects.paces.drain(..) {
            tracing::info!(%group, bytes_per_second = limit, "publishers are slowed while a replica catches up, or no longer");
            self.shared.set_pace(group, limit, self.shared.pace_ms());
        }
        for group in effects.opened.drain(..) {
            self.shared.set_partition(group, self.node.group(group).map(|g| g.log().tail().clone()));
        }
        for (group, offset) in effects.advanced.drain(..) {
            self.shared.advanced(group, offset);
        }
        for group in effects.leaders.drain(..) {
            let leader = self.node.leader_of(group);
            // another may have announced itself in a newer term
            let own = self.node.group(group).filter(|_| leader.is_some_and(|(_, b)| b == self.shared.broker));
            let serving = own.filter(|g| g.serves()).map(Group::term);
            tracing::debug!(%group, ?leader, ?serving, "leader");
            self.shared.set_leader(group, leader, serving);
        }
        if effects.meta.take().is_some() {
            self.shared.meta.send_replace(self.node.meta().clone());
        }
        self.peers.send(&mut effects);
        for (ticket, reply) in effects.replies {
            if let Some(to) = self.waiting.remove(&ticket) {
                to.send(reply);
            }
        }
        let Some(round) = written else { return false };
        self.node.written(round);
        self.node.synced(round);
        true
    }

    /// Writes a round at once: one that needs no sync, is small, and comes after no other, where the store need not wait for anything.
    fn write_in_passing(&self, round: &Round) -> bool {
        let bytes = |op: &WriteOp| match op {
            WriteOp::Append { entries, .. } => entries.iter().map(|e| e.data.len()).sum(),
            _ => 0,
        };
        let apart = self.disk.handed == self.disk.synced;
        if round.sync || !apart || round.ops.iter().map(bytes).sum::<usize>() > ROUND_BYTES_MAX {
            return false;
        }
        self.store.try_write(&round.ops).unwrap_or_else(|error| die(&format!("a write failed: {error}")))
    }
}

/// The threads that touch the disk.
struct Disk {
    rounds: Sender<Round>,
    reads: Sender<Fetch>,
    /// the newest round given to the disk's thread, and the newest it has done
    handed: u64,
    synced: u64,
}

fn run_disk(store: &dyn Store, rounds: &Receiver<Round>, handle: &NodeHandle, metrics: &Metrics) {
    let _end = EndOnPanic("the disk's thread");
    while let Ok(first) = rounds.recv() {
        let mut last = first.id;
        let (mut sync, mut in_memory) = (first.sync, first.in_memory);
        let mut ops = first.ops;
        for next in rounds.try_iter().take(64) {
            last = next.id;
            sync |= next.sync;
            in_memory |= next.in_memory;
            ops.extend(next.ops);
        }
        let started = Instant::now();
        if let Err(error) = store.write(&ops) {
            die(&format!("a write failed: {error}"));
        }
        if sync && in_memory {
            handle.leave(Event::Written(last)); // the core goes on meanwhile
        }
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
    let _end = EndOnPanic("the reader's thread");
    while let Ok(fetch) = reads.recv() {
        let read = store.entries(fetch.group, fetch.low, fetch.high, fetch.bytes_max);
        handle.send(Event::Fetched(fetch, read));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_time_is_not_set_back_by_a_thread_that_is_preempted_at_start() {
        let begun = Instant::now();
        // ms before and after the wall clock is read; only one reading is not interrupted
        let mut preempted = [(80, 0), (0, 90), (0, 0), (200, 1)].into_iter().cycle();
        let mut now_ms = 0;
        let read = || {
            let (first, second) = preempted.next().expect("endless");
            let before = now_ms;
            let wall = before + first;
            now_ms = wall + second;
            let at = |ms| begun + Duration::from_millis(ms);
            (at(before), 5_000 + wall, at(now_ms))
        };
        let (started, wall_ms) = read_clocks(read);
        assert_eq!(wall_ms - 5_000, (started - begun).as_millis() as u64);
    }
}
