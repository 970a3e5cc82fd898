//! Delivers one subscription in one partition led here: a task that owns the [`Delivery`], reads the log ahead of its members,
//! and writes their acks, gathered, into the partition's log. It begins with the first member, and ends when
//! nobody reads any more, leadership goes, or the subscription changes; members open again then.

use crate::answer::wire_bytes;
use crate::budget::{ANSWER_BYTES_MAX, Answers, Held};
use crate::dead_letter::{self, DeadLetter, Source};
use crate::filter::Filter;
use crate::node_loop::{Event, ReplyTo};
use crate::outbox::{self, Limit, Origin, Published, Reason};
use crate::outlet::{Outlet, Unsent};
use crate::selection::{self, Selection, Stopped};
use crate::service::{Context, log, subscriber};
use crate::shared::Partition;
use crate::status::Failure;
use crate::throttle::Throttle;
use crate::unpack::{Need, Unpacked, Unpacker};
use crate::unreadable::{Reported, Unreadable};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::JoinSet;
use tonic::Code;
use weir_core::cursor::{Cursor, CursorUpdate, Failed, OffsetRange};
use weir_core::delivery::{Delivery, Grant, MemberId, Mode, Policy, Return, Standing, disjoint};
use weir_core::entry::Control;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::state::SubscriptionSpec;
use weir_core::node::{Refusal, Reply};
use weir_core::pattern;
use weir_core::tail::LogBatch;
use weir_proto::records::{self, Compression, Record};
use weir_proto::v1;

/// Header with a message's priority: a digit.
const PRIORITY: &str = "weir-priority";
/// Bytes read ahead at one time, and of one response.
const READ_BYTES: usize = 1 << 20;
/// Messages given out between two looks at what members say.
const TURN_MESSAGES: usize = 1_024;
/// Batches kept that were given out already.
const KEPT_MAX: usize = 16;
/// Bytes of them, with their records.
const KEPT_BYTES_MAX: usize = 256 << 10;
/// Time taken to give messages to one member.
const GIVING_MAX: Duration = Duration::from_millis(2);
/// Time taken to judge messages on a thread of its own, before another subscription has its turn.
const LONG_TURN: Duration = Duration::from_millis(5);
/// Time taken for commands, and for records, before others on this thread have their turn.
const TURN: Duration = Duration::from_micros(500);
/// Commands waiting for the task.
const COMMANDS_MAX: usize = 1_024;
/// Commands taken before the hub looks at anything else.
const TURN_COMMANDS: usize = 1_024;
/// Bytes read ahead of the members and not given out.
const AHEAD_BYTES_MAX: usize = 4 << 20;
/// Bytes of batches read anew for one member's turn, beyond which the rest waits for the next.
const GIVEN_BYTES_MAX: usize = 8 << 20;
/// Bytes of a response beside its messages.
const ENVELOPE_BYTES: usize = 64;
/// Bytes of one entry of what is delivered again.
const REDELIVERED_BYTES_MAX: usize = 24;
/// Batches that were passed over and that members are told of at one time.
const ANNOUNCED_MAX: usize = 1_000;
/// Between two looks at deadlines, leadership and the subscription.
const TICK: Duration = Duration::from_millis(50);
/// Messages being buried at one time.
const BURIALS_MAX: usize = 16;
/// Wait after the first attempt to move a dead letter that failed; it doubles with each, up to the longest.
const BURY_AGAIN: Duration = Duration::from_secs(1);
const BURY_AGAIN_MAX: Duration = Duration::from_secs(60);
/// A hub without members ends after this long.
const IDLE: Duration = Duration::from_secs(5);

/// What a call for messages gets, with its part of the budget.
pub type Pulled = (Vec<v1::ReceivedMessage>, Option<Held>);

/// What the task is told.
pub enum Command {
    /// A stream opens; the answer is its member id, or why not.
    Attach { name: String, messages: bool, out: Outlet, answer: oneshot::Sender<Result<MemberId, Failure>> },
    /// A stream says something.
    Say(MemberId, v1::PullRequest),
    /// A stream ended: by its member, or because the connection was lost.
    Detach { member: MemberId, clean: bool },
    /// One call for messages.
    Pull { name: String, max: u64, wait: Duration, answers: Answers, answer: oneshot::Sender<Result<Pulled, Failure>> },
    /// The answer of a call was not handed out.
    Release(Vec<OffsetRange>),
    /// One call with acks: answered, with their number, once they are in the log.
    Acknowledge { ranges: Vec<v1::OffsetRange>, answer: oneshot::Sender<Result<u64, Failure>> },
    /// One call with nacks or longer deadlines.
    Adjust { nacks: Vec<v1::Nacked>, extensions: Vec<v1::Extension> },
    /// Publishes what came of a message to a topic, then acks it: answered once the ack is in the log.
    AcknowledgeWithPublish { offset: u64, what: ToPublish, answer: oneshot::Sender<Result<Outcome, Failure>> },
    /// Moves the position: answered once it is in the log, and then the hub begins anew.
    Seek { to: SeekTo, answer: oneshot::Sender<Result<u64, Failure>> },
}

/// What is published when a message is acknowledged with it.
#[derive(Clone)]
pub enum ToPublish {
    /// A result, for a topic.
    Result { to: String, records: Vec<Record> },
    /// The message itself, a dead letter, for the topic that it came from.
    GiveBack,
}

impl ToPublish {
    /// Bytes of the batch that is made of it; a dead letter is read by the call that gives it back.
    fn batch_bytes(&self) -> usize {
        match self {
            Self::Result { records, .. } => records::batch_bytes_max(records),
            Self::GiveBack => 0,
        }
    }
}

/// What became of an ack with a result.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// The result lies there, and the message is done with.
    Published(Published),
    /// The message was done with before.
    Already,
}

/// Where a position is moved.
#[derive(Clone, Copy, Debug)]
pub enum SeekTo {
    /// To an offset, with no acks above it.
    Offset(u64),
    /// To where a snapshot is, with its acks.
    Snapshot(SubscriptionId),
}

/// A result that was published, or not, and who waits for the ack.
struct Resulted {
    offset: u64,
    published: Result<Option<Published>, Failure>,
    answer: oneshot::Sender<Result<Outcome, Failure>>,
}

type Key = (GroupId, SubscriptionId);

/// The hubs of a broker.
#[derive(Clone, Default)]
pub struct Hubs(Arc<Mutex<HashMap<Key, mpsc::Sender<Command>>>>);

impl Hubs {
    /// The hub of a subscription in a partition, where it runs.
    pub fn find(&self, key: Key) -> Option<mpsc::Sender<Command>> {
        let hubs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hubs.get(&key).filter(|h| !h.is_closed()).cloned()
    }

    /// The hub, started at `cursor`, as it was in a term, where it does not run.
    pub fn find_or_start(
        &self,
        context: &Context,
        key: Key,
        name: &str,
        topic: &str,
        spec: SubscriptionSpec,
        (term, cursor): (u64, Cursor),
    ) -> Result<mpsc::Sender<Command>, Failure> {
        let filter = Filter::compile(&spec.filter)?;
        let mut hubs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hub) = hubs.get(&key).filter(|h| !h.is_closed()) {
            return Ok(hub.clone());
        }
        let policy = spec.policy();
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        if filter.is_some() {
            context.metrics.unfiltered.with_label_values(&[name]); // an increase is seen only of a series that is there
        }
        let hub = Hub {
            context: context.clone(),
            group: key.0,
            term,
            subscription: key.1,
            topic: topic.to_owned(),
            name: name.to_owned().into(),
            policy,
            selection: Arc::new(Selection {
                metrics: context.metrics.clone(),
                subscription: name.to_owned().into(),
                filter,
                routing_keys: spec.routing_keys.clone(),
                topic: topic.to_owned(),
            }),
            spec,
            throttle: context.throttles.of(key.1),
            to_bury: BTreeMap::new(),
            burials: JoinSet::new(),
            unreadable: Unreadable::default(),
            passed_over: Vec::new(),
            reported: Reported::default(),
            results: JoinSet::new(),
            resulting: BTreeSet::new(),
            delivery: Delivery::new(policy, cursor),
            begun: Instant::now(),
            members: BTreeMap::new(),
            last_member: 0,
            ahead: VecDeque::new(),
            under_way: Default::default(),
            looked: Instant::now(),
            unwritten: Vec::new(),
            unwritten_failed: Vec::new(),
            confirm: Vec::new(),
            writing: None,
            idle_since: Instant::now(),
            taken: Arc::default(),
            extended: Instant::now(),
            reads: context.budget.answers(Default::default()),
            room: None,
            asking: None,
            is_busy: false,
        };
        tokio::spawn(hub.run(receiver));
        hubs.insert(key, commands.clone());
        Ok(commands)
    }
}

/// Where a member's messages go.
enum Out {
    /// A stream, of whole batches or of messages.
    Stream { to: Box<Outlet>, messages: bool },
    /// Calls; the one that waits now.
    Calls { waiting: Option<Waiting>, last: Instant },
}

struct Waiting {
    answer: oneshot::Sender<Result<Pulled, Failure>>,
    answers: Answers,
    until: Instant,
}

struct Member {
    name: String,
    out: Out,
}

/// A batch read ahead, its records unpacked where somebody wants them one by one.
struct Ahead {
    batch: LogBatch,
    unpacked: Option<Unpacked>,
    /// of the first records, whether they are wanted
    judged: Vec<bool>,
    /// what unpacking it needs, once that is known
    need: Option<Need>,
    _held: Option<Held>,
}

impl Member {
    /// The messages its connection has not taken.
    fn untaken(&mut self) -> Vec<OffsetRange> {
        match &mut self.out {
            Out::Stream { to, .. } => to.untaken().collect(),
            Out::Calls { .. } => Vec::new(),
        }
    }
}

impl Ahead {
    fn of(batch: LogBatch, held: Option<Held>) -> Self {
        Self { batch, unpacked: None, judged: Vec::new(), need: None, _held: held }
    }

    /// The records, where they are unpacked, or why they cannot be decoded.
    fn records(&self) -> Option<Result<&[Record], &str>> {
        Some(self.unpacked.as_ref()?.records.as_deref().map_err(String::as_str))
    }

    fn is_unreadable(&self) -> bool {
        matches!(self.records(), Some(Err(_)))
    }

    /// The record at an offset, where it is unpacked.
    fn record(&self, offset: u64) -> Option<&Record> {
        let inside = usize::try_from(offset.checked_sub(self.batch.base_offset)?).ok()?;
        self.records()?.ok()?.get(inside)
    }

    /// Bytes in memory.
    fn bytes(&self) -> usize {
        self.batch.data.len() + self.unpacked.as_ref().map_or(0, Unpacked::bytes)
    }
}

/// Whom to tell that acks are in the log.
enum Confirm {
    Acks(u64, oneshot::Sender<Result<u64, Failure>>),
    Result(Outcome, oneshot::Sender<Result<Outcome, Failure>>),
}

impl Confirm {
    fn tell(self, failure: Option<Failure>) {
        match self {
            Self::Acks(count, answer) => drop(answer.send(failure.map_or(Ok(count), Err))),
            Self::Result(outcome, answer) => drop(answer.send(failure.map_or(Ok(outcome), Err))),
        }
    }
}

struct Hub {
    context: Context,
    group: GroupId,
    /// the leadership it belongs to: nothing is written in another
    term: u64,
    subscription: SubscriptionId,
    topic: String,
    /// its full name
    name: Bytes,
    spec: SubscriptionSpec,
    policy: Policy,
    selection: Arc<Selection>,
    throttle: Throttle,
    /// messages that failed too often, by when they may be moved and by offset, and those on their way; with attempts that failed
    to_bury: BTreeMap<(Instant, u64), (Failed, u32)>,
    burials: JoinSet<(Failed, u32, Result<(), Failure>)>,
    /// batches that are passed over because their records cannot be decoded
    unreadable: Unreadable,
    /// what was passed over, and members are not told of yet
    passed_over: Vec<v1::PassedOver>,
    /// offsets of batches that members could not decode, and that are not examined yet
    reported: Reported,
    /// results being published
    results: JoinSet<Resulted>,
    /// of these messages
    resulting: BTreeSet<u64>,
    delivery: Delivery,
    begun: Instant,
    members: BTreeMap<MemberId, Member>,
    last_member: MemberId,
    /// batches that hold what was fed and not given out, and some that were
    ahead: VecDeque<Ahead>,
    /// acks and failed deliveries that are in the entry under way
    under_way: (Vec<OffsetRange>, Vec<Failed>),
    /// when time, leadership and the subscription were looked at
    looked: Instant,
    /// acks not handed to the log yet, who waits for them, and the answer to those under way
    unwritten: Vec<OffsetRange>,
    unwritten_failed: Vec<Failed>,
    confirm: Vec<Confirm>,
    writing: Option<(oneshot::Receiver<Reply>, Vec<Confirm>)>,
    idle_since: Instant,
    /// wakes this task where a connection took what its member waits behind
    taken: Arc<Notify>,
    /// when the leases of what no connection has taken were moved
    extended: Instant,
    /// room for what is read ahead
    reads: Answers,
    /// room to unpack a batch that was asked for, and the question
    room: Option<OwnedSemaphorePermit>,
    asking: Option<Asking>,
    /// judging used up the last turn
    is_busy: bool,
}

type Asking = Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>;

impl Hub {
    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64 + 1
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let failure = match self.serve(&mut commands).await {
            Ok(()) => Failure::new(Code::Aborted, "AGAIN", "the delivery begins anew; open it again"),
            Err(failure) => failure,
        };
        commands.close(); // whoever finds it now starts another
        for (_, member) in std::mem::take(&mut self.members) {
            match member.out {
                Out::Stream { to, .. } => to.end(failure.clone().into()),
                Out::Calls { waiting: Some(w), .. } => drop(w.answer.send(Err(failure.clone()))),
                Out::Calls { waiting: None, .. } => {}
            }
        }
        let under_way = self.writing.take().map(|(_, confirm)| confirm).unwrap_or_default();
        for confirm in self.confirm.drain(..).chain(under_way) {
            confirm.tell(Some(failure.clone()));
        }
        while let Ok(command) = commands.try_recv() {
            match command {
                Command::Attach { answer, .. } => drop(answer.send(Err(failure.clone()))),
                Command::Pull { answer, .. } => drop(answer.send(Err(failure.clone()))),
                Command::Acknowledge { answer, .. } => drop(answer.send(Err(failure.clone()))),
                Command::Seek { answer, .. } => drop(answer.send(Err(failure.clone()))),
                Command::AcknowledgeWithPublish { answer, .. } => drop(answer.send(Err(failure.clone()))),
                Command::Say(..) | Command::Detach { .. } | Command::Adjust { .. } | Command::Release(_) => {}
            }
        }
    }

    /// Nothing of this hub may reach the log behind a seek: what is under way is waited for, what is not is dropped.
    async fn seek(&mut self, to: SeekTo) -> Result<u64, Failure> {
        if let Some((reply, confirm)) = self.writing.take() {
            let written = matches!(reply.await, Ok(Reply::Done));
            confirm.into_iter().for_each(|c| c.tell((!written).then(Failure::stopping)));
        }
        self.unwritten.clear();
        self.unwritten_failed.clear();
        // a snapshot that was just declared is of the position before: every partition gets its part within moments; one that came
        // later begins at its start, as the snapshot does there
        let meta = self.context.shared.meta();
        for snapshot in meta.subscriptions.values().filter(|s| s.snapshot_of == self.subscription.0) {
            subscriber::cursor(&self.context, self.group, SubscriptionId(snapshot.id)).await?;
        }
        let mut update = CursorUpdate { subscription: self.subscription.0, ..Default::default() };
        let offset = match to {
            SeekTo::Offset(offset) => *update.seek.insert(offset),
            SeekTo::Snapshot(snapshot) => {
                update.return_to = snapshot.0;
                0
            }
        };
        let (group, term, control) = (self.group, self.term, Control { cursors: vec![update], ..Default::default() });
        let reply = self.context.node.call(|to| Event::Control { group, control, term, to }).await;
        match reply.ok_or_else(Failure::stopping)? {
            Reply::Done => Ok(offset),
            Reply::Refused(refusal) => Err(self.context.failure(group, refusal)),
            other => Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}"))),
        }
    }

    async fn serve(&mut self, commands: &mut mpsc::Receiver<Command>) -> Result<(), Failure> {
        let mut partition = self.context.led_partition(self.group).await?;
        self.throttle.adjust(&self.spec, &self.context.shared.meta(), &self.context.shared);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // nothing can be unpacked while room is asked for
            let (mut more, mut given) = (false, 0);
            if self.asking.is_none() {
                more = self.read_ahead(&partition).await?;
                given = self.give_out(&partition).await?;
            }
            more &= self.asking.is_none();
            if (given == TURN_MESSAGES || more) && commands.is_empty() && self.looked.elapsed() < TICK {
                tokio::task::yield_now().await;
                continue;
            }
            self.examine_reported(&partition).await?;
            if !self.unreadable.is_empty() {
                self.unreadable.start(&self.context, &self.source(), &partition);
            }
            self.bury(&partition).await?;
            let hungry = self.delivery.wants() > 0 && self.asking.is_none();
            if !hungry && self.context.unpacker.is_scarce() {
                self.give_up_room(); // others need what this one may unpack again
            }
            // what is allowed next, where the rate is what holds things up
            let slowed = self.delivery.has_ready() && self.throttle.available() == 0;
            let pause = Duration::from_millis(self.throttle.wait_ms());
            tokio::select! {
                command = commands.recv() => {
                    let Some(mut command) = command else { return Ok(()) };
                    let begun = Instant::now();
                    for _ in 0..TURN_COMMANDS {
                        if let Command::Seek { to, answer } = command {
                            let _ = answer.send(self.seek(to).await);
                            return Ok(());
                        }
                        self.take(command);
                        if begun.elapsed() > TURN {
                            tokio::task::yield_now().await;
                            break;
                        }
                        match commands.try_recv() {
                            Ok(next) => command = next,
                            Err(_) => break,
                        }
                    }
                    self.write_acks();
                    if self.looked.elapsed() >= TICK && !self.check(&partition)? {
                        return Ok(()); // however much members say, time passes
                    }
                }
                reply = async { (&mut self.writing.as_mut().expect("guarded").0).await }, if self.writing.is_some() => {
                    self.written(reply)?;
                }
                () = tokio::time::sleep(pause), if slowed => {}
                () = self.taken.notified() => self.resume(),
                () = tokio::task::yield_now(), if more => {}
                room = async { self.asking.as_mut().expect("guarded").await }, if self.asking.is_some() => {
                    self.asking = None;
                    self.room = Some(room);
                }
                Some(done) = self.burials.join_next(), if !self.burials.is_empty() => self.buried(done),
                moved = self.unreadable.next() => {
                    let acked = self.unreadable.ended(&self.context, &self.source(), moved);
                    self.unwritten.extend(acked);
                    self.write_acks();
                }
                Some(done) = self.results.join_next(), if !self.results.is_empty() => self.resulted(done),
                _ = tick.tick() => {
                    if !self.check(&partition)? {
                        return Ok(());
                    }
                }
                moved = partition.progress.changed(), if hungry => {
                    moved.map_err(|_| self.context.not_leader(self.group))?;
                }
            }
        }
    }

    fn take(&mut self, command: Command) {
        let now_ms = self.now_ms();
        match command {
            Command::Attach { name, messages, out, answer } => {
                // whole batches only where nothing is told or chosen message by message
                let messages = messages || self.wants_records();
                let mut to = Box::new(out);
                to.wakes(self.taken.clone());
                let _ = answer.send(self.attach(name, Out::Stream { to, messages }));
            }
            Command::Say(id, request) => {
                if self.members.contains_key(&id) {
                    self.delivery.credit(id, request.credit_messages.into());
                    self.ack(&request.acks);
                    self.adjust(&request.nacks, &request.extensions, now_ms);
                    self.reported.add(&request.unreadable);
                }
            }
            Command::Detach { member, clean } => self.end(member, clean),
            Command::Pull { name, max, wait, answers, answer } => {
                self.pull(name, max, Waiting { answer, answers, until: Instant::now() + wait });
            }
            Command::Release(ranges) => self.delivery.take_back(&ranges),
            Command::Acknowledge { ranges, answer } => {
                let count = self.ack(&ranges);
                self.confirm.push(Confirm::Acks(count, answer));
            }
            Command::AcknowledgeWithPublish { offset, what, answer } => {
                self.acknowledge_with_publish(offset, what, answer);
            }
            Command::Adjust { nacks, extensions } => self.adjust(&nacks, &extensions, now_ms),
            Command::Seek { .. } => unreachable!("taken before"),
        }
    }

    fn attach(&mut self, name: String, out: Out) -> Result<MemberId, Failure> {
        let id = self.last_member + 1;
        if self.policy.mode == Mode::Exclusive {
            for before in self.members.values_mut().filter(|m| m.name == name) {
                if let Out::Stream { to, .. } = &mut before.out {
                    self.delivery.take_back(&to.withdraw());
                }
            }
        }
        let held = |e: weir_core::delivery::Held| Failure::new(Code::FailedPrecondition, "EXCLUSIVE", e.to_string());
        self.delivery.attach(id, &name).map_err(held)?;
        self.last_member = id;
        // in the exclusive mode a member's new stream replaces its old one
        let delivery = &self.delivery;
        let replaced: Vec<MemberId> = self.members.keys().copied().filter(|m| !delivery.is_attached(*m)).collect();
        for old in replaced {
            let text = "the member opened the partition again elsewhere";
            let failure = Failure::new(Code::Aborted, "REPLACED", text);
            match self.members.remove(&old).map(|m| m.out) {
                Some(Out::Stream { to, .. }) => to.end(failure.into()),
                Some(Out::Calls { waiting: Some(w), .. }) => drop(w.answer.send(Err(failure))),
                Some(Out::Calls { waiting: None, .. }) | None => {}
            }
        }
        self.members.insert(id, Member { name, out });
        Ok(id)
    }

    /// Removes a member. What its connection has not taken was handed to nobody, whatever ended it.
    fn end(&mut self, id: MemberId, clean: bool) {
        let Some(member) = self.members.remove(&id) else { return };
        if let Out::Stream { mut to, .. } = member.out {
            self.delivery.take_back(&to.withdraw());
        }
        if clean { self.delivery.leave(id) } else { self.delivery.detach(id) }
    }

    /// Members whose connections took something may have more.
    fn resume(&mut self) {
        for (id, member) in &mut self.members {
            if let Out::Stream { to, .. } = &mut member.out {
                self.delivery.pause(*id, to.is_full());
            }
        }
    }

    fn pull(&mut self, name: String, max: u64, waiting: Waiting) {
        let known = self.members.iter().find(|(_, m)| m.name == name && matches!(m.out, Out::Calls { .. }));
        let id = match known.map(|(id, _)| *id) {
            Some(id) => id,
            None => match self.attach(name, Out::Calls { waiting: None, last: Instant::now() }) {
                Ok(id) => id,
                Err(failure) => return drop(waiting.answer.send(Err(failure))),
            },
        };
        self.delivery.revoke_credit(id);
        self.delivery.credit(id, max);
        let waiting = Some(waiting);
        if let Some(member) = self.members.get_mut(&id) {
            let before = std::mem::replace(&mut member.out, Out::Calls { waiting, last: Instant::now() });
            if let Out::Calls { waiting: Some(w), .. } = before {
                let _ = w.answer.send(Ok((Vec::new(), None))); // one call at a time; the one before got nothing
            }
        }
    }

    fn ack(&mut self, ranges: &[v1::OffsetRange]) -> u64 {
        let mut count = 0;
        let ranges = ranges.iter().map(|r| (OffsetRange { start: r.start, end: r.end }, ())).collect();
        for (range, ()) in disjoint(ranges) {
            for acked in self.delivery.ack(range) {
                count += acked.end - acked.start;
                push_range(&mut self.unwritten, acked);
            }
        }
        count
    }

    fn acknowledge_with_publish(
        &mut self,
        offset: u64,
        what: ToPublish,
        answer: oneshot::Sender<Result<Outcome, Failure>>,
    ) {
        match self.delivery.standing(offset) {
            Standing::Acked => return drop(answer.send(Ok(Outcome::Already))),
            Standing::Other => {
                let text = "this leader has not delivered the message (yet): it comes (again)";
                return drop(answer.send(Err(Failure::new(Code::FailedPrecondition, "NOT_DELIVERED", text))));
            }
            Standing::Given => {}
        }
        if !self.resulting.insert(offset) {
            let text = "a result of the message is being published already";
            return drop(answer.send(Err(Failure::new(Code::Unavailable, "UNDER_WAY", text))));
        }
        // it is nobody else's until its result is there
        let held_ms = outbox::ANSWER_MAX.as_millis() as u64 + self.policy.ack_deadline_ms;
        self.delivery.extend(OffsetRange::one(offset), held_ms, self.now_ms());
        let seeks = self.delivery.cursor().seeks();
        let origin =
            Origin { subscription: self.subscription, group: self.group, offset, seeks, reason: Reason::Result };
        let context = self.context.clone();
        self.results.spawn(async move {
            let bytes = what.batch_bytes();
            let published = match what {
                ToPublish::Result { to, records } => {
                    let _budget = context.budget.publish(bytes).await;
                    outbox::publish(&context, &to, records, Compression::None, origin, Limit::Topic).await
                }
                ToPublish::GiveBack => dead_letter::give_back(&context, origin).await,
            };
            Resulted { offset, published, answer }
        });
    }

    /// The result is published: the message is done with.
    fn resulted(&mut self, done: Result<Resulted, tokio::task::JoinError>) {
        let Ok(Resulted { offset, published, answer }) = done else { return };
        self.resulting.remove(&offset);
        match published {
            Ok(at) => {
                self.ack(&[v1::OffsetRange { start: offset, end: offset + 1 }]);
                // its member may have gone meanwhile, for the last time it may: it is no dead letter
                self.unwritten.extend(self.delivery.bury(offset));
                let outcome = at.map_or(Outcome::Already, Outcome::Published);
                self.confirm.push(Confirm::Result(outcome, answer));
                self.write_acks();
            }
            Err(failure) => drop(answer.send(Err(failure))),
        }
    }

    fn adjust(&mut self, nacks: &[v1::Nacked], extensions: &[v1::Extension], now_ms: u64) {
        // what has a result under way is done with, or will come again
        let resulting = |n: &v1::Nacked| self.resulting.range(n.start..n.end.max(n.start)).next().is_some();
        let how = |n: &v1::Nacked| {
            if n.uncounted { Return::Uncounted } else { Return::Failed { delay_ms: n.delay_ms } }
        };
        let ranges = nacks.iter().filter(|n| !resulting(n));
        let ranges = ranges.map(|n| (OffsetRange { start: n.start, end: n.end }, how(n))).collect();
        self.delivery.give_back(ranges, now_ms);
        let ranges = extensions.iter().map(|e| (OffsetRange { start: e.start, end: e.end }, e.deadline_ms)).collect();
        for (range, deadline_ms) in disjoint(ranges) {
            self.delivery.extend(range, deadline_ms, now_ms);
        }
    }

    /// One control entry at a time: acks that come meanwhile gather into the next.
    fn write_acks(&mut self) {
        self.unwritten_failed.extend(self.delivery.take_failed());
        let nothing = self.unwritten.is_empty() && self.unwritten_failed.is_empty() && self.confirm.is_empty();
        if self.writing.is_some() || nothing {
            return;
        }
        let acked = std::mem::take(&mut self.unwritten);
        let failed = std::mem::take(&mut self.unwritten_failed);
        self.under_way = (acked.clone(), failed.clone());
        let update = CursorUpdate { subscription: self.subscription.0, acked, failed, ..Default::default() };
        let (to, reply) = oneshot::channel();
        let control = Control { cursors: vec![update], ..Default::default() };
        let to = ReplyTo::Call(to);
        self.context.node.send(Event::Control { group: self.group, control, term: self.term, to });
        self.writing = Some((reply, std::mem::take(&mut self.confirm)));
    }

    fn written(&mut self, reply: Result<Reply, oneshot::error::RecvError>) -> Result<(), Failure> {
        let (_, confirm) = self.writing.take().expect("under way");
        let failure = match reply {
            Ok(Reply::Done) => None,
            Ok(Reply::Refused(Refusal::Overloaded)) => {
                // publishers are ahead: the same again, a little later
                self.unwritten.append(&mut self.under_way.0);
                // what failed again since has a higher count, and stands behind
                self.under_way.1.append(&mut self.unwritten_failed);
                self.unwritten_failed = std::mem::take(&mut self.under_way.1);
                self.confirm.extend(confirm);
                return Ok(());
            }
            Ok(Reply::Refused(refusal)) => Some(self.context.failure(self.group, refusal)),
            _ => Some(Failure::stopping()),
        };
        confirm.into_iter().for_each(|c| c.tell(failure.clone()));
        self.write_acks();
        failure.map_or(Ok(()), Err)
    }

    /// Looks at time, leadership and the subscription; false where the hub should end.
    fn check(&mut self, partition: &Partition) -> Result<bool, Failure> {
        self.looked = Instant::now();
        // before another term of this broker others may have written acks
        if partition.serving() != Some(self.term) {
            return Err(self.context.not_leader(self.group));
        }
        let meta = self.context.shared.meta();
        let Some(found) = meta.subscription_by_id(self.subscription) else {
            return Err(Failure::new(Code::NotFound, "NO_SUBSCRIPTION", "the subscription was deleted"));
        };
        if found.spec != self.spec {
            return Ok(false);
        }
        self.throttle.adjust(&self.spec, &meta, &self.context.shared);
        self.tend_members();
        self.delivery.tick(self.now_ms());
        self.pass_to(partition.tail.start_offset());
        self.write_acks();
        if !self.members.is_empty() || self.writing.is_some() || !self.unreadable.is_empty() {
            self.idle_since = Instant::now();
        }
        Ok(self.idle_since.elapsed() < IDLE)
    }

    /// What retention took can be delivered to nobody.
    fn pass_to(&mut self, start: u64) {
        self.unwritten.extend(self.delivery.pass_to(start));
    }

    fn tend_members(&mut self) {
        let (now, deadline) = (Instant::now(), Duration::from_millis(self.policy.ack_deadline_ms));
        // a lease runs from when its message is handed out
        let extend = self.extended.elapsed() > deadline / 4;
        let mut gone = Vec::new();
        let mut untaken = Vec::new();
        for (id, member) in &mut self.members {
            if extend {
                untaken.extend(member.untaken());
            }
            match &mut member.out {
                Out::Stream { to, .. } => {
                    self.delivery.pause(*id, to.is_full());
                    if to.is_abandoned() {
                        gone.push(*id);
                    } else if to.is_still(deadline) {
                        // what it holds is for others; should it live, it may open again
                        let text = "the member has read nothing for as long as it may hold a message";
                        self.context.rejected(Failure::new(Code::Aborted, "READS_NOTHING", text));
                        gone.push(*id);
                    }
                }
                Out::Calls { waiting, last } => {
                    self.delivery.pause(*id, false); // where there was no room, there may be now
                    if waiting.as_ref().is_some_and(|w| w.until <= now || w.answer.is_closed())
                        && let Some(w) = waiting.take()
                    {
                        self.delivery.revoke_credit(*id);
                        let _ = w.answer.send(Ok((Vec::new(), None)));
                    }
                    if waiting.is_none() && last.elapsed() > deadline && self.delivery.leased_by(*id) == 0 {
                        gone.push(*id);
                    }
                }
            }
        }
        if extend {
            self.extended = now;
            let (deadline_ms, now_ms) = (self.policy.ack_deadline_ms, self.now_ms());
            untaken.into_iter().for_each(|range| self.delivery.extend(range, deadline_ms, now_ms));
        }
        gone.into_iter().for_each(|id| self.end(id, false));
    }

    fn wants_records(&self) -> bool {
        !matches!(self.policy.mode, Mode::Exclusive | Mode::Failover) || self.singly()
    }

    /// Whether messages are chosen or told one by one, and not in whole batches as they were published.
    fn singly(&self) -> bool {
        self.selection.filter.is_some() || self.policy.deliveries_max > 0 || !self.spec.routing_keys.is_empty()
    }

    /// Moves what failed too often to the dead-letter topic, some at a time; where there is none, it is dropped.
    async fn bury(&mut self, partition: &Partition) -> Result<(), Failure> {
        if self.policy.deliveries_max == 0 {
            return Ok(());
        }
        let now = Instant::now();
        self.to_bury.extend(self.delivery.take_dying().into_iter().map(|failed| ((now, failed.offset), (failed, 0))));
        while self.burials.len() < BURIALS_MAX
            && let Some(next) = self.to_bury.first_entry().filter(|next| next.key().0 <= now)
        {
            let (failed, attempts) = next.remove();
            if self.resulting.contains(&failed.offset) {
                self.to_bury.insert((now + TICK, failed.offset), (failed, attempts)); // its result decides
                continue;
            }
            if !self.delivery.is_dying(failed.offset) {
                continue;
            }
            if self.spec.dead_letter_topic.is_empty() {
                self.context.metrics.dead_letters.with_label_values(&[&self.topic, "dropped"]).inc();
                self.unwritten.extend(self.delivery.bury(failed.offset));
                continue;
            }
            if !self.hold_records(failed.offset, partition).await? {
                self.to_bury.insert((now, failed.offset), (failed, attempts));
                break; // when there is room to unpack it
            }
            let (context, source) = (self.context.clone(), self.source());
            let Some(letter) = self.dead_letter(&source, failed) else {
                if partition.tail.start_offset() > failed.offset {
                    self.unwritten.extend(self.delivery.bury(failed.offset)); // retention was faster
                } else {
                    self.to_bury.insert((now + BURY_AGAIN, failed.offset), (failed, attempts)); // it was not read just now
                }
                continue;
            };
            // a copy, and its encoding; one at a time waits for them in turn, so that others' publishes do not keep it out
            let bytes = 2 * letter.bytes();
            let room = self.context.budget.try_publish(bytes);
            if room.is_none() && !self.burials.is_empty() {
                self.to_bury.insert((now + TICK, failed.offset), (failed, attempts));
                break;
            }
            self.burials.spawn(async move {
                let _room = match room {
                    Some(room) => room,
                    None => context.budget.publish(bytes).await,
                };
                let moved = dead_letter::publish(&context, &source, letter, failed.offset).await;
                (failed, attempts, moved)
            });
        }
        self.write_acks();
        Ok(())
    }

    fn buried(&mut self, done: Result<(Failed, u32, Result<(), Failure>), tokio::task::JoinError>) {
        let Ok((failed, attempts, outcome)) = done else { return };
        match outcome {
            Ok(()) => {
                self.context.metrics.dead_letters.with_label_values(&[&self.topic, "moved"]).inc();
                self.unwritten.extend(self.delivery.bury(failed.offset));
                self.write_acks();
            }
            Err(failure) => {
                let (to, why, subscription) = (&self.spec.dead_letter_topic, failure.message, self.name_text());
                if let Some(left_out) = self.context.metrics.seldom.now("dead letter", &subscription) {
                    tracing::warn!(
                        subscription,
                        topic = self.topic,
                        offset = failed.offset,
                        to,
                        why,
                        left_out,
                        "a dead letter could not be moved; again soon"
                    );
                }
                self.context.metrics.dead_letters.with_label_values(&[&self.topic, "failed"]).inc();
                let wait = BURY_AGAIN.saturating_mul(1 << attempts.min(6)).min(BURY_AGAIN_MAX);
                self.to_bury.insert((Instant::now() + wait, failed.offset), (failed, attempts.saturating_add(1)));
            }
        }
    }

    /// The subscription's full name.
    fn name_text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Where this hub's dead letters come from.
    fn source(&self) -> Source {
        let meta = self.context.shared.meta();
        Source {
            subscription: self.subscription,
            subscription_name: self.name_text(),
            dead_letter_topic: self.spec.dead_letter_topic.clone(),
            topic: self.topic.clone(),
            partition: meta.assignment(self.group).map_or(0, |a| a.partition),
            group: self.group,
            seeks: self.delivery.cursor().seeks(),
        }
    }

    /// The dead letter of a message whose batch is held: the whole batch, where it cannot be decoded.
    fn dead_letter(&mut self, source: &Source, failed: Failed) -> Option<DeadLetter> {
        let ahead = &self.ahead[self.find(failed.offset)?];
        let compression = Compression::of_batch(&ahead.batch.data).unwrap_or_default();
        if ahead.is_unreadable() {
            return Some(dead_letter::of_batch(source, &ahead.batch));
        }
        let record = owned(ahead.record(failed.offset)?.clone());
        Some(dead_letter::of_message(source, record, failed, compression))
    }

    /// Passes over the batch at `offset`, of which `acked` were not acknowledged before, where its records cannot be decoded. Returns what
    /// there is to say of it.
    fn pass_over(&mut self, offset: u64, acked: Vec<OffsetRange>) -> Option<v1::PassedOver> {
        let source = self.source();
        let ahead = &self.ahead[self.find(offset)?];
        let Some(Err(why)) = ahead.records() else { return None };
        let offsets = v1::OffsetRange { start: acked.first()?.start, end: acked.last()?.end };
        let passed_over = v1::PassedOver { offsets: Some(offsets), why: why.to_owned() };
        let acked = self.unreadable.pass_over(&self.context, &source, &ahead.batch, why, acked);
        self.unwritten.extend(acked);
        Some(passed_over)
    }

    /// Tells all streams what was passed over. One that has no room for it is not told: it counts, and is logged, in any case.
    fn announce(&mut self, high_watermark: u64) {
        if self.passed_over.is_empty() {
            return;
        }
        let passed_over = std::mem::take(&mut self.passed_over);
        let streams = self.members.iter().filter(|(_, m)| matches!(m.out, Out::Stream { .. }));
        for id in streams.map(|(id, _)| *id).collect::<Vec<_>>() {
            let passed_over = passed_over.clone();
            self.send(id, vec![v1::PullResponse { passed_over, high_watermark, ..Default::default() }]);
        }
    }

    /// Decides on batches that members could not decode: what this broker can decode is delivered again.
    async fn examine_reported(&mut self, partition: &Partition) -> Result<(), Failure> {
        while let Some(offset) = self.reported.first() {
            if self.asking.is_some() {
                break;
            }
            let is_given = self.delivery.standing(offset) == Standing::Given;
            if is_given && !self.hold_records(offset, partition).await? {
                break; // when there is room to unpack it
            }
            self.reported.remove(offset);
            if !is_given {
                continue;
            }
            let Some(at) = self.find(offset) else { continue };
            let ahead = &self.ahead[at];
            let range = OffsetRange { start: offset, end: ahead.batch.end_offset() };
            if ahead.is_unreadable() {
                let acked = self.delivery.ack(range);
                self.pass_over(offset, acked); // the member knows it
            } else {
                let subscription = self.name_text();
                if let Some(left_out) = self.context.metrics.seldom.now("reported", &subscription) {
                    let text = "a member cannot decode a batch that its broker can";
                    tracing::warn!(subscription, topic = self.topic, offset, left_out, "{text}");
                }
                let failed = Return::Failed { delay_ms: None };
                self.delivery.give_back(vec![(range, failed)], self.now_ms());
            }
        }
        Ok(())
    }

    /// Feeds the delivery what its members have credit for, for a while; true where there is more to be done at once.
    async fn read_ahead(&mut self, partition: &Partition) -> Result<bool, Failure> {
        let (mut bytes, begun) = (0, Instant::now());
        while self.delivery.wants() > 0 && self.delivery.next() < partition.tail.high_watermark() {
            if bytes >= AHEAD_BYTES_MAX || begun.elapsed() > TURN {
                return Ok(true);
            }
            let next = self.delivery.next();
            let Some(at) = self.find(next) else {
                let read = self.read(next, partition).await?;
                let Some(first_offset) = read else { return Ok(false) };
                if first_offset > next {
                    self.pass_to(first_offset); // retention was faster
                }
                bytes += self.ahead.back().map_or(0, |a| a.batch.data.len());
                continue;
            };
            if !self.wants_records() {
                self.feed(at);
                continue;
            }
            if !self.unpack(at).await {
                return Ok(false);
            }
            let inside = (next - self.ahead[at].batch.base_offset) as usize;
            let is_over = self.ahead[at].judged.len() <= inside && self.judge(at).await;
            self.feed(at);
            if is_over {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads batches from an offset on, as many as there is room for, but one. Returns the first offset that is held of them.
    async fn read(&mut self, offset: u64, partition: &Partition) -> Result<Option<u64>, Failure> {
        let most = self.reads.room().min(READ_BYTES);
        let Some(reserved) = self.reads.try_take(most) else { return Ok(None) }; // the next look tries again
        let batches = partition.read(offset, most).await?;
        drop(reserved);
        let first_offset = batches.first().map(|b| b.base_offset.max(offset));
        for (at, batch) in batches.into_iter().enumerate() {
            let held = self.reads.try_take(batch.data.len());
            if held.is_none() && at > 0 {
                break;
            }
            self.put_ahead(Ahead::of(batch, held));
        }
        Ok(first_offset)
    }

    fn put_ahead(&mut self, ahead: Ahead) {
        let at = self.ahead.partition_point(|a| a.batch.base_offset < ahead.batch.base_offset);
        if self.ahead.get(at).is_none_or(|a| a.batch.base_offset != ahead.batch.base_offset) {
            self.ahead.insert(at, ahead);
        }
    }

    /// Room to unpack a batch. Where there is none now it is asked for, and this task holds none until it comes.
    fn room_for(&mut self, need: Need) -> Option<OwnedSemaphorePermit> {
        if self.asking.is_some() {
            return None;
        }
        if let Some(room) = self.room.take().filter(|room| need.fits(room)) {
            return Some(room);
        }
        let unpacker = self.context.unpacker.clone();
        if let Some(room) = unpacker.try_room(need) {
            return Some(room);
        }
        self.give_up_room();
        let room = unpacker.try_room(need);
        if room.is_none() {
            self.asking = Some(Box::pin(async move { unpacker.room(need).await }));
        }
        room
    }

    fn give_up_room(&mut self) {
        self.room = None;
        self.ahead.iter_mut().for_each(|ahead| ahead.unpacked = None);
    }

    /// Unpacks a batch; false where it must wait for room.
    async fn unpack(&mut self, at: usize) -> bool {
        if self.ahead[at].unpacked.is_some() {
            return true;
        }
        let data = self.ahead[at].batch.data.clone();
        let mut need = self.ahead[at].need.unwrap_or_else(|| Unpacker::need(&data));
        loop {
            let Some(room) = self.room_for(need) else { return false };
            match self.context.unpacker.clone().unpack(&data, need, room).await {
                Ok(unpacked) => {
                    self.ahead[at].unpacked = Some(unpacked);
                    return true;
                }
                Err(more) => {
                    need = more;
                    self.ahead[at].need = Some(more);
                }
            }
        }
    }

    /// Judges records of a batch, as many as are wanted now; true where the turn is over. What is costly is judged on a thread of its own,
    /// and one that used up its turn waits for the next among its like: no number of subscriptions holds up the others' threads.
    async fn judge(&mut self, at: usize) -> bool {
        let limit = selection::Limit { wanted: self.delivery.wants(), time: TURN, costly: false };
        let unpacker = self.context.unpacker.clone();
        let selection = self.selection.clone();
        let ahead = &mut self.ahead[at];
        let Some(Unpacked { records: Ok(records), .. }) = &mut ahead.unpacked else { return false };
        let before = ahead.judged.len();
        let stopped = {
            let _turn = if self.is_busy { Some(unpacker.turn().await) } else { None };
            selection.judge(records, &mut ahead.judged, limit)
        };
        self.is_busy = stopped == Stopped::Time;
        if stopped != Stopped::Costly || ahead.judged.len() > before {
            return stopped != Stopped::Done;
        }
        let (list, mut judged) = (std::mem::take(records), std::mem::take(&mut ahead.judged));
        let limit = selection::Limit { time: LONG_TURN, costly: true, ..limit };
        let judge = move || {
            selection.judge(&list, &mut judged, limit);
            (list, judged)
        };
        (*records, ahead.judged) = unpacker.at_length(judge).await;
        true
    }

    /// Feeds what is read and judged of a batch, from the next offset on, as far as it is wanted.
    fn feed(&mut self, at: usize) {
        let mut next = self.delivery.next();
        let mut wants = self.delivery.wants();
        let ahead = &self.ahead[at];
        let (base, end) = (ahead.batch.base_offset, ahead.batch.end_offset());
        if ahead.is_unreadable() {
            let mut acked = Vec::new();
            while next < end {
                next += 1;
                self.delivery.feed_past().into_iter().for_each(|passed| push_range(&mut acked, passed));
            }
            let passed_over = self.pass_over(base, acked);
            self.passed_over.extend(passed_over.filter(|_| self.passed_over.len() < ANNOUNCED_MAX));
            return;
        }
        let singly = self.wants_records();
        while next < end && wants > 0 {
            let record = ahead.record(next);
            let judged = if singly { ahead.judged.get((next - base) as usize) } else { Some(&true) };
            let Some(is_wanted) = judged else { return };
            next += 1;
            if !is_wanted {
                if let Some(passed) = self.delivery.feed_past() {
                    push_range(&mut self.unwritten, passed);
                }
                continue;
            }
            let key = record.and_then(|r| r.key.as_ref());
            let urgency = if self.policy.priorities { record.map_or(0, priority) } else { 0 };
            self.delivery.feed(key.map_or(0, |k| records::hash_of(k)), urgency);
            wants -= 1;
        }
    }

    /// Gives members what is theirs; says how many messages.
    async fn give_out(&mut self, partition: &Partition) -> Result<usize, Failure> {
        self.announce(partition.tail.high_watermark());
        let allowed = self.throttle.available().min(TURN_MESSAGES);
        let grants = if allowed > 0 { self.delivery.grants(self.now_ms(), allowed) } else { Vec::new() };
        let count = grants.len();
        if count > 0 {
            let mut each: BTreeMap<MemberId, Vec<Grant>> = BTreeMap::new();
            for grant in grants {
                each.entry(grant.member).or_default().push(grant);
            }
            for (id, grants) in each {
                self.give(id, &grants, partition).await?;
            }
        }
        // what lies behind the window's beginning is not needed again; of the rest a little is kept, and read anew where it is
        let (position, next) = (self.delivery.cursor().position(), self.delivery.next());
        let mut kept: usize = self.ahead.iter().map(Ahead::bytes).sum();
        while let Some(first) = self.ahead.front().filter(|a| {
            let end = a.batch.end_offset();
            let many = self.ahead.len() > KEPT_MAX || kept > KEPT_BYTES_MAX;
            end <= position || (end <= next && many)
        }) {
            kept -= first.bytes();
            self.ahead.pop_front();
        }
        Ok(count)
    }

    async fn give(&mut self, id: MemberId, grants: &[Grant], partition: &Partition) -> Result<(), Failure> {
        let by_message = match self.members.get(&id).map(|m| &m.out) {
            Some(Out::Stream { messages, .. }) => *messages,
            Some(Out::Calls { .. }) => true,
            None => return Ok(()),
        };
        let begun = Instant::now();
        let held = |this: &Self| this.ahead.iter().map(Ahead::bytes).sum::<usize>();
        let before = held(self);
        let mut given = Given::default();
        let mut count = grants.len();
        for (at, grant) in grants.iter().enumerate() {
            if !by_message {
                self.hold(grant.offset, partition).await?;
            } else if self.hold_records(grant.offset, partition).await? {
                self.add_message(grant, &mut given);
            } else {
                count = at; // when there is room to unpack it
                break;
            }
            // what comes again may lie far apart, a batch each: the rest waits for its turn
            if at % 16 == 15 && (held(self) > before + GIVEN_BYTES_MAX || begun.elapsed() > GIVING_MAX) {
                count = at + 1;
                break;
            }
        }
        self.withdraw(id, &grants[count..]);
        let grants = &grants[..count];
        self.charge(grants);
        let high_watermark = partition.tail.high_watermark();
        if !by_message {
            let responses = self.batches(grants, high_watermark, self.response_bytes(id));
            self.send(id, responses);
            return Ok(());
        }
        let passed_over = self.pass_over_given(&given.unreadable);
        if !passed_over.is_empty() {
            self.send(id, vec![v1::PullResponse { passed_over, high_watermark, ..Default::default() }]);
        }
        let messages = given.into_messages();
        if messages.is_empty() {
            return Ok(()); // nothing that was leased can be decoded: a call waits on
        }
        if matches!(self.members.get(&id), Some(Member { out: Out::Calls { .. }, .. })) {
            self.answer_call(id, messages);
        } else {
            let response = |messages| v1::PullResponse { messages, high_watermark, ..Default::default() };
            let responses = split(messages, self.response_bytes(id)).into_iter().map(response).collect();
            self.send(id, responses);
        }
        Ok(())
    }

    /// Bytes a member's next response should have at most.
    fn response_bytes(&self, id: MemberId) -> usize {
        match self.members.get(&id).map(|m| &m.out) {
            Some(Out::Stream { to, .. }) => to.response_bytes().min(READ_BYTES),
            _ => READ_BYTES,
        }
    }

    /// Adds the message of a grant, whose batch is unpacked.
    fn add_message(&self, grant: &Grant, given: &mut Given) {
        let Some(at) = self.find(grant.offset) else { return };
        let ahead = &self.ahead[at];
        if ahead.is_unreadable() {
            return given.unreadable.push((ahead.batch.base_offset, *grant));
        }
        let Some(record) = ahead.record(grant.offset) else { return };
        if given.last_batch != Some(ahead.batch.base_offset) {
            given.last_batch = Some(ahead.batch.base_offset);
            given.pinned += ahead.batch.data.len();
        }
        // what was decompressed is not kept for a part of it
        let is_compressed = Compression::of_batch(&ahead.batch.data) != Some(Compression::None);
        let record = if is_compressed { owned(record.clone()) } else { record.clone() };
        let meta = given.partition.get_or_insert_with(|| {
            let meta = self.context.shared.meta();
            // the topic only where a member cannot know it
            let topic = if pattern::is_pattern(&self.spec.topic) { self.topic.clone() } else { String::new() };
            (meta.assignment(self.group).map_or(0, |a| a.partition), topic)
        });
        let (partition, topic) = meta.clone();
        given.messages.push(v1::ReceivedMessage {
            partition,
            offset: grant.offset,
            delivery: grant.delivery,
            append_time_ms: ahead.batch.append_time_ms,
            topic,
            message: Some(record.into()),
            topic_id: 0, // a call that asks for messages knows it
            subscription_id: self.subscription.0,
        });
    }

    /// Passes over what was leased of batches that cannot be decoded: a member in whose mode batches are not decoded before they are leased
    /// takes messages one by one.
    fn pass_over_given(&mut self, unreadable: &[(u64, Grant)]) -> Vec<v1::PassedOver> {
        let mut passed_over = Vec::new();
        for batch in unreadable.chunk_by(|(a, _), (b, _)| a == b) {
            let mut acked = Vec::new();
            for (_, grant) in batch {
                let range = OffsetRange::one(grant.offset);
                self.delivery.ack(range).into_iter().for_each(|range| push_range(&mut acked, range));
                self.delivery.credit(grant.member, 1);
            }
            passed_over.extend(self.pass_over(batch[0].1.offset, acked));
        }
        passed_over
    }

    /// What was granted goes to another time, with the credit it took.
    fn withdraw(&mut self, id: MemberId, grants: &[Grant]) {
        let ranges: Vec<OffsetRange> = grants.iter().map(|g| OffsetRange::one(g.offset)).collect();
        self.delivery.take_back(&ranges);
        self.delivery.credit(id, ranges.len() as u64);
    }

    /// Answers the call of a member: with as much as one answer holds and there is room for; the rest returns.
    fn answer_call(&mut self, id: MemberId, messages: Vec<v1::ReceivedMessage>) {
        self.delivery.revoke_credit(id);
        let Some(Member { out: Out::Calls { waiting, .. }, .. }) = self.members.get_mut(&id) else { return };
        let offsets = |messages: &[v1::ReceivedMessage]| -> Vec<OffsetRange> {
            messages.iter().map(|m| OffsetRange::one(m.offset)).collect()
        };
        let Some(call) = waiting.take() else { return self.delivery.take_back(&offsets(&messages)) };
        let all = offsets(&messages);
        let mut parts = split(messages, call.answers.room().min(ANSWER_BYTES_MAX)).into_iter();
        let messages = parts.next().unwrap_or_default();
        let kept = messages.len();
        let response = v1::PullMessagesResponse { messages };
        let room = call.answers.try_take(wire_bytes(&response));
        let Some(held) = room else {
            // the next look tries again
            let credit = all.len() as u64;
            self.delivery.take_back(&all);
            self.delivery.credit(id, credit);
            self.delivery.pause(id, true);
            *waiting = Some(call);
            return;
        };
        self.delivery.take_back(&all[kept..]);
        if call.answer.send(Ok((response.messages, Some(held)))).is_err() {
            self.delivery.take_back(&all); // the caller left: others may have them
        }
    }

    fn send(&mut self, id: MemberId, responses: Vec<v1::PullResponse>) {
        let Some(Member { out: Out::Stream { to, .. }, .. }) = self.members.get_mut(&id) else { return };
        let mut full = false;
        let mut returned = Vec::new();
        for response in responses {
            let mut ranges = Vec::new();
            if response.until_offset > response.from_offset {
                ranges.push(OffsetRange { start: response.from_offset, end: response.until_offset });
            }
            for message in &response.messages {
                push_range(&mut ranges, OffsetRange::one(message.offset));
            }
            // once something went back, what follows it does too: it would overtake it
            if full {
                returned.extend(ranges);
                continue;
            }
            let (records, bytes) = crate::metrics::delivered(&response);
            match to.send(response, &ranges) {
                Ok(()) => self.context.metrics.delivered(&self.topic, records, bytes),
                Err(Unsent::Full) => {
                    full = true; // it reads slowly, or there is no room: the rest goes back, with the credit it took
                    returned.extend(ranges);
                }
                Err(Unsent::Closed) => {
                    full = true; // its end is on its way
                    returned.extend(ranges);
                }
            }
        }
        let full = to.is_full() || full;
        self.delivery.take_back(&returned);
        self.delivery.credit(id, returned.iter().map(|r| r.end - r.start).sum());
        self.delivery.pause(id, full);
    }

    /// Takes what goes out off the declared rate: bytes are those of the log, by the average of each batch.
    fn charge(&mut self, grants: &[Grant]) {
        let mut bytes = 0;
        if self.spec.bytes_per_second > 0 {
            for grant in grants {
                let batch = self.find(grant.offset).map(|at| &self.ahead[at].batch);
                bytes += batch.map_or(0, |b| b.data.len() as u64 / u64::from(b.count.max(1)));
            }
        }
        self.throttle.take(grants.len() as u64, bytes);
    }

    /// Makes sure that the batch with an offset is held.
    async fn hold(&mut self, offset: u64, partition: &Partition) -> Result<(), Failure> {
        if self.find(offset).is_some() {
            return Ok(());
        }
        let batches = partition.read(offset, 1).await?;
        if let Some(batch) = batches.into_iter().next().filter(|b| b.base_offset <= offset) {
            let held = self.reads.try_take(batch.data.len());
            self.put_ahead(Ahead::of(batch, held));
        }
        Ok(())
    }

    /// As [`Self::hold`], with its records; false where they must wait for room.
    async fn hold_records(&mut self, offset: u64, partition: &Partition) -> Result<bool, Failure> {
        self.hold(offset, partition).await?;
        match self.find(offset) {
            Some(at) => Ok(self.unpack(at).await),
            None => Ok(true), // retention was faster
        }
    }

    fn find(&self, offset: u64) -> Option<usize> {
        let at = self.ahead.partition_point(|a| a.batch.base_offset <= offset).checked_sub(1)?;
        (self.ahead[at].batch.end_offset() > offset).then_some(at)
    }

    /// Runs of offsets as whole batches.
    fn batches(&self, grants: &[Grant], high_watermark: u64, bytes_max: usize) -> Vec<v1::PullResponse> {
        let mut out: Vec<v1::PullResponse> = Vec::new();
        let mut bytes = 0;
        let bytes_max = bytes_max.saturating_sub(ENVELOPE_BYTES);
        for grant in grants {
            let Some(at) = self.find(grant.offset) else { continue };
            let batch = &self.ahead[at].batch;
            let last = out.last_mut().filter(|r| r.until_offset == grant.offset);
            match last {
                Some(run) if run.batches.last().is_some_and(|b| b.base_offset == batch.base_offset) => {
                    run.until_offset += 1;
                }
                Some(run) if bytes + batch.data.len() + ENVELOPE_BYTES <= bytes_max => {
                    bytes += batch.data.len() + ENVELOPE_BYTES;
                    run.batches.push(log::to_wire(batch.clone()));
                    run.until_offset += 1;
                }
                _ => {
                    bytes = batch.data.len() + ENVELOPE_BYTES;
                    out.push(v1::PullResponse {
                        batches: vec![log::to_wire(batch.clone())],
                        from_offset: grant.offset,
                        until_offset: grant.offset + 1,
                        high_watermark,
                        ..Default::default()
                    });
                }
            }
            if let Some(run) = out.last_mut().filter(|_| grant.delivery > 1) {
                run.redelivered.push(v1::Redelivered { offset: grant.offset, delivery: grant.delivery });
                bytes += REDELIVERED_BYTES_MAX;
            }
        }
        out
    }
}

/// Messages that are about to be sent.
#[derive(Default)]
struct Given {
    messages: Vec<v1::ReceivedMessage>,
    /// grants of batches that cannot be decoded, with the first offset of each
    unreadable: Vec<(u64, Grant)>,
    /// bytes of the batches that the messages are parts of
    pinned: usize,
    last_batch: Option<u64>,
    partition: Option<(u32, String)>,
}

impl Given {
    /// The messages. They are copied where they would keep much more in memory than themselves.
    fn into_messages(self) -> Vec<v1::ReceivedMessage> {
        let bytes: usize = self.messages.iter().map(prost::Message::encoded_len).sum();
        let mut messages = self.messages;
        if self.pinned > 2 * bytes + KEPT_BYTES_MAX {
            for received in &mut messages {
                received.message = received.message.take().map(|m| owned(m.into()).into());
            }
        }
        messages
    }
}

/// A record whose parts are in memory of their own.
fn owned(record: Record) -> Record {
    let part = |bytes: Option<Bytes>| bytes.map(|b| Bytes::copy_from_slice(&b));
    let headers = record.headers.into_iter().map(|(name, value)| (name, part(value))).collect();
    Record { key: part(record.key), value: part(record.value), headers, timestamp_ms: record.timestamp_ms }
}

/// A message's priority: the digit in its header; 0 where there is none.
pub fn priority(record: &Record) -> u8 {
    match record.header(PRIORITY).map(|value| &value[..]) {
        Some([digit @ b'0'..=b'9']) => digit - b'0',
        _ => 0,
    }
}

/// Adds a range, to the one before it where they touch.
pub(crate) fn push_range(ranges: &mut Vec<OffsetRange>, next: OffsetRange) {
    match ranges.last_mut().filter(|last| last.end == next.start) {
        Some(last) => last.end = next.end,
        None => ranges.push(next),
    }
}

/// Messages in answers of at most so many bytes, or of one message where that alone is larger.
fn split(messages: Vec<v1::ReceivedMessage>, bytes_max: usize) -> Vec<Vec<v1::ReceivedMessage>> {
    let bytes_max = bytes_max.saturating_sub(ENVELOPE_BYTES);
    let mut out: Vec<Vec<v1::ReceivedMessage>> = Vec::new();
    let mut bytes = 0;
    for message in messages {
        // its tag and length, and itself: headers, key and all
        let size = wire_bytes(&message) + 1;
        match out.last_mut().filter(|_| bytes + size <= bytes_max) {
            Some(last) => last.push(message),
            None => {
                bytes = 0;
                out.push(vec![message]);
            }
        }
        bytes += size;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_counts_with_all_of_its_encoding() {
        let name = "n".repeat(50_000);
        let record = Record {
            key: Some(vec![1; 20_000].into()),
            value: None,
            headers: vec![(name, Some(vec![2; 30_000].into()))],
            timestamp_ms: 7,
        };
        let records = vec![record; 3];
        let bytes = records::encode(&records, Compression::None, None).unwrap().len();
        let counted = ToPublish::Result { to: "default/t".into(), records }.batch_bytes();
        assert!((bytes..bytes + 100).contains(&counted), "{counted} counted of {bytes}");
    }
}
