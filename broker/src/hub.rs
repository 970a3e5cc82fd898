//! Delivers one subscription in one partition led here: a task that owns the [`Delivery`], reads the log ahead of its members,
//! and writes their acks, gathered, into the partition's log. It begins with the first member, and ends when
//! nobody reads any more, leadership goes, or the subscription changes; members open again then.

use crate::filter::Filter;
use crate::node_loop::{Event, ReplyTo};
use crate::outbox::{self, Origin, Published, Reason};
use crate::service::{Context, log, publisher, subscriber};
use crate::shared::Partition;
use crate::status::Failure;
use crate::throttle::Throttle;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use weir_core::cursor::{Cursor, CursorUpdate, Failed, OffsetRange};
use weir_core::delivery::{Delivery, Grant, MemberId, Mode, Policy, Standing};
use weir_core::entry::Control;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::state::SubscriptionSpec;
use weir_core::node::{Refusal, Reply};
use weir_core::pattern;
use weir_core::tail::LogBatch;
use weir_proto::records::{self, Record};
use weir_proto::v1;

/// Header of a message that only the subscription of this full name wants (a dead letter that was put back). Not looked at where
/// whole batches are delivered.
const ONLY_FOR: &str = "weir-only-for";
/// Header with a message's priority: a digit.
const PRIORITY: &str = "weir-priority";
/// Header with the words that patterns of routing keys match.
const ROUTING_KEY: &str = "weir-routing-key";
/// Bytes read ahead at one time, and of one response.
const READ_BYTES: usize = 1 << 20;
/// Messages given out between two looks at what members say.
const TURN_MESSAGES: usize = 4_096;
/// Responses a member has not read yet; beyond them it gets nothing more.
const UNREAD_MAX: usize = 16;
/// Commands waiting for the task.
const COMMANDS_MAX: usize = 1_024;
/// Commands taken before the hub looks at anything else.
const TURN_COMMANDS: usize = 1_024;
/// Bytes read ahead of the members and not given out.
const AHEAD_BYTES_MAX: usize = 4 << 20;
/// Bytes of unpacked records beyond which no further batch is unpacked.
const UNPACKED_BYTES_MAX: usize = 64 << 20;
/// Bytes of batches read anew for one member's turn, beyond which the rest waits for the next.
const GIVEN_BYTES_MAX: usize = 8 << 20;
/// Bytes of one call's messages: what clients take without being told to.
const CALL_BYTES_MAX: usize = 3 << 20;
/// Between two looks at deadlines, leadership and the subscription.
const TICK: Duration = Duration::from_millis(50);
/// Messages being buried at one time.
const BURIALS_MAX: usize = 16;
/// One that could not be buried is tried again after this long.
const BURY_AGAIN: Duration = Duration::from_secs(1);
/// A hub without members ends after this long.
const IDLE: Duration = Duration::from_secs(5);

/// What a member's stream is sent.
pub type Response = Result<v1::PullResponse, Status>;

/// What the task is told.
pub enum Command {
    /// A stream opens; the answer is its member id, or why not.
    Attach {
        name: String,
        messages: bool,
        out: mpsc::Sender<Response>,
        answer: oneshot::Sender<Result<MemberId, Failure>>,
    },
    /// A stream says something.
    Say(MemberId, v1::PullRequest),
    /// A stream ended.
    Detach(MemberId),
    /// One call for messages.
    Pull { name: String, max: u64, wait: Duration, answer: oneshot::Sender<Result<Vec<v1::ReceivedMessage>, Failure>> },
    /// One call with acks: answered, with their number, once they are in the log.
    Acknowledge { ranges: Vec<v1::OffsetRange>, answer: oneshot::Sender<Result<u64, Failure>> },
    /// One call with nacks or longer deadlines.
    Adjust { nacks: Vec<v1::Nacked>, extensions: Vec<v1::Extension> },
    /// Publishes what came of a message to a topic, then acks it: answered once the ack is in the log.
    AcknowledgeWithPublish {
        offset: u64,
        to: String,
        records: Vec<Record>,
        answer: oneshot::Sender<Result<Outcome, Failure>>,
    },
    /// Moves the position: answered once it is in the log, and then the hub begins anew.
    Seek { to: SeekTo, answer: oneshot::Sender<Result<u64, Failure>> },
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
        let hub = Hub {
            context: context.clone(),
            group: key.0,
            term,
            subscription: key.1,
            topic: topic.to_owned(),
            name: name.to_owned().into(),
            spec,
            policy,
            filter,
            throttle: context.throttles.of(key.1),
            to_bury: VecDeque::new(),
            burials: JoinSet::new(),
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
        };
        tokio::spawn(hub.run(receiver));
        hubs.insert(key, commands.clone());
        Ok(commands)
    }
}

/// Where a member's messages go.
enum Out {
    /// A stream, of whole batches or of messages.
    Stream { to: mpsc::Sender<Response>, messages: bool },
    /// Calls; the one that waits now.
    Calls { waiting: Option<Waiting>, last: Instant },
}

struct Waiting {
    answer: oneshot::Sender<Result<Vec<v1::ReceivedMessage>, Failure>>,
    until: Instant,
}

struct Member {
    name: String,
    out: Out,
    /// since when it has not read what it was sent
    unread_since: Option<Instant>,
}

/// A batch read ahead, its records unpacked where somebody wants them one by one.
struct Ahead {
    batch: LogBatch,
    records: Option<Vec<Record>>,
    /// bytes of the records, once they are unpacked
    unpacked: usize,
}

impl Ahead {
    fn of(batch: LogBatch) -> Self {
        Self { batch, records: None, unpacked: 0 }
    }

    fn unpack(&mut self) -> &mut Vec<Record> {
        self.records.get_or_insert_with(|| {
            let records = records::decode(&self.batch.data).unwrap_or_default();
            let length = |b: &Option<Bytes>| b.as_ref().map_or(0, |b| b.len());
            self.unpacked = records.iter().map(|r| length(&r.key) + length(&r.value) + 64).sum();
            records
        })
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
    filter: Option<Filter>,
    throttle: Throttle,
    /// messages that failed too often, from when on they may be moved, and those on their way
    to_bury: VecDeque<(Failed, Instant)>,
    burials: JoinSet<(Failed, Result<(), Failure>)>,
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
}

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
                Out::Stream { to, .. } => drop(to.try_send(Err(failure.clone().into()))),
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
                Command::Say(..) | Command::Detach(_) | Command::Adjust { .. } => {}
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
        let (group, term, control) = (self.group, self.term, Control { cursors: vec![update] });
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
            let more = self.read_ahead(&partition).await?;
            let given = self.give_out(&partition).await?;
            if (given == TURN_MESSAGES || (more && given > 0)) && commands.is_empty() && self.looked.elapsed() < TICK {
                tokio::task::yield_now().await;
                continue;
            }
            self.bury(&partition).await?;
            let hungry = self.delivery.wants() > 0;
            // what is allowed next, where the rate is what holds things up
            let slowed = self.delivery.has_ready() && self.throttle.available() == 0;
            let pause = Duration::from_millis(self.throttle.wait_ms());
            tokio::select! {
                command = commands.recv() => {
                    let Some(mut command) = command else { return Ok(()) };
                    for _ in 0..TURN_COMMANDS {
                        if let Command::Seek { to, answer } = command {
                            let _ = answer.send(self.seek(to).await);
                            return Ok(());
                        }
                        self.take(command);
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
                Some(done) = self.burials.join_next(), if !self.burials.is_empty() => self.buried(done),
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
                let _ = answer.send(self.attach(name, Out::Stream { to: out, messages }));
            }
            Command::Say(id, request) => {
                if self.members.contains_key(&id) {
                    self.delivery.credit(id, request.credit_messages.into());
                    self.ack(&request.acks);
                    self.adjust(&request.nacks, &request.extensions, now_ms);
                }
            }
            Command::Detach(id) => {
                self.members.remove(&id);
                self.delivery.detach(id);
            }
            Command::Pull { name, max, wait, answer } => self.pull(name, max, wait, answer),
            Command::Acknowledge { ranges, answer } => {
                let count = self.ack(&ranges);
                self.confirm.push(Confirm::Acks(count, answer));
            }
            Command::AcknowledgeWithPublish { offset, to, records, answer } => {
                self.acknowledge_with_publish(offset, to, records, answer);
            }
            Command::Adjust { nacks, extensions } => self.adjust(&nacks, &extensions, now_ms),
            Command::Seek { .. } => unreachable!("taken before"),
        }
    }

    fn attach(&mut self, name: String, out: Out) -> Result<MemberId, Failure> {
        let id = self.last_member + 1;
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
                Some(Out::Stream { to, .. }) => drop(to.try_send(Err(failure.into()))),
                Some(Out::Calls { waiting: Some(w), .. }) => drop(w.answer.send(Err(failure))),
                Some(Out::Calls { waiting: None, .. }) | None => {}
            }
        }
        self.members.insert(id, Member { name, out, unread_since: None });
        Ok(id)
    }

    fn pull(
        &mut self,
        name: String,
        max: u64,
        wait: Duration,
        answer: oneshot::Sender<Result<Vec<v1::ReceivedMessage>, Failure>>,
    ) {
        let known = self.members.iter().find(|(_, m)| m.name == name && matches!(m.out, Out::Calls { .. }));
        let id = match known.map(|(id, _)| *id) {
            Some(id) => id,
            None => match self.attach(name, Out::Calls { waiting: None, last: Instant::now() }) {
                Ok(id) => id,
                Err(failure) => return drop(answer.send(Err(failure))),
            },
        };
        self.delivery.revoke_credit(id);
        self.delivery.credit(id, max);
        let waiting = Some(Waiting { answer, until: Instant::now() + wait });
        if let Some(member) = self.members.get_mut(&id) {
            let before = std::mem::replace(&mut member.out, Out::Calls { waiting, last: Instant::now() });
            if let Out::Calls { waiting: Some(w), .. } = before {
                let _ = w.answer.send(Ok(Vec::new())); // one call at a time; the one before got nothing
            }
        }
    }

    fn ack(&mut self, ranges: &[v1::OffsetRange]) -> u64 {
        let mut count = 0;
        for range in ranges {
            for acked in self.delivery.ack(OffsetRange { start: range.start, end: range.end }) {
                count += acked.end - acked.start;
                push_range(&mut self.unwritten, acked);
            }
        }
        count
    }

    fn acknowledge_with_publish(
        &mut self,
        offset: u64,
        to: String,
        records: Vec<Record>,
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
            let value = |r: &Record| r.value.as_ref().map_or(0, Bytes::len);
            let _budget = publisher::budget(&context.budget, records.iter().map(value).sum()).await;
            let published = outbox::publish(&context, &to, &records, origin).await;
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
        for n in nacks {
            // what has a result under way is done with, or will come again
            if self.resulting.range(n.start..n.end.max(n.start)).next().is_some() {
                continue;
            }
            self.delivery.nack(OffsetRange { start: n.start, end: n.end }, n.delay_ms, now_ms);
        }
        for e in extensions {
            self.delivery.extend(OffsetRange { start: e.start, end: e.end }, e.deadline_ms, now_ms);
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
        let control = Control { cursors: vec![update] };
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
        self.delivery.tick(self.now_ms());
        self.pass_to(partition.tail.start_offset());
        self.write_acks();
        self.tend_members();
        if !self.members.is_empty() || self.writing.is_some() {
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
        let mut gone = Vec::new();
        for (id, member) in &mut self.members {
            match &mut member.out {
                Out::Stream { to, .. } if to.is_closed() => gone.push(*id),
                Out::Stream { to, .. } => {
                    let unread = to.capacity() <= UNREAD_MAX / 2;
                    self.delivery.pause(*id, unread);
                    member.unread_since = unread.then(|| member.unread_since.unwrap_or(now));
                    if member.unread_since.is_some_and(|since| now - since > deadline) {
                        // what it holds is for others; should it live, it may open again
                        let text = "the member has read nothing for as long as it may hold a message";
                        self.context.rejected(Failure::new(Code::Aborted, "READS_NOTHING", text));
                        gone.push(*id);
                    }
                }
                Out::Calls { waiting, last } => {
                    if waiting.as_ref().is_some_and(|w| w.until <= now || w.answer.is_closed())
                        && let Some(w) = waiting.take()
                    {
                        self.delivery.revoke_credit(*id);
                        let _ = w.answer.send(Ok(Vec::new()));
                    }
                    if waiting.is_none() && last.elapsed() > deadline && self.delivery.leased_by(*id) == 0 {
                        gone.push(*id);
                    }
                }
            }
        }
        for id in gone {
            self.members.remove(&id);
            self.delivery.detach(id);
        }
    }

    fn wants_records(&self) -> bool {
        !matches!(self.policy.mode, Mode::Exclusive | Mode::Failover) || self.singly()
    }

    /// Whether messages are chosen or told one by one, and not in whole batches as they were published.
    fn singly(&self) -> bool {
        self.filter.is_some() || self.policy.deliveries_max > 0 || !self.spec.routing_keys.is_empty()
    }

    /// Moves what failed too often to the dead-letter topic, some at a time; where there is none, it is dropped.
    async fn bury(&mut self, partition: &Partition) -> Result<(), Failure> {
        if self.policy.deliveries_max == 0 {
            return Ok(());
        }
        let now = Instant::now();
        self.to_bury.extend(self.delivery.take_dying().into_iter().map(|failed| (failed, now)));
        while self.burials.len() < BURIALS_MAX && self.to_bury.front().is_some_and(|(_, from)| *from <= now) {
            let Some((failed, _)) = self.to_bury.pop_front() else { break };
            if self.resulting.contains(&failed.offset) {
                self.to_bury.push_back((failed, now + TICK)); // its result decides
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
            self.hold(failed.offset, partition).await?;
            let (context, to) = (self.context.clone(), self.spec.dead_letter_topic.clone());
            let seeks = self.delivery.cursor().seeks();
            let (subscription, group, offset) = (self.subscription, self.group, failed.offset);
            let origin = Origin { subscription, group, offset, seeks, reason: Reason::Dead };
            let Some(record) = self.dead_letter(failed) else {
                self.unwritten.extend(self.delivery.bury(failed.offset)); // retention was faster
                continue;
            };
            self.burials.spawn(async move { (failed, outbox::bury(&context, &to, record, origin).await) });
        }
        self.write_acks();
        Ok(())
    }

    fn buried(&mut self, done: Result<(Failed, Result<(), Failure>), tokio::task::JoinError>) {
        let Ok((failed, outcome)) = done else { return };
        match outcome {
            Ok(()) => {
                self.context.metrics.dead_letters.with_label_values(&[&self.topic, "moved"]).inc();
                self.unwritten.extend(self.delivery.bury(failed.offset));
                self.write_acks();
            }
            Err(failure) if failure.reason == "TOO_LARGE" => {
                // not even its key and headers fit: nothing may hold up the partition for ever
                let (to, why) = (&self.spec.dead_letter_topic, failure.message);
                tracing::warn!(topic = self.topic, offset = failed.offset, to, why, "a dead letter is dropped");
                self.context.metrics.dead_letters.with_label_values(&[&self.topic, "dropped"]).inc();
                self.unwritten.extend(self.delivery.bury(failed.offset));
                self.write_acks();
            }
            Err(failure) => {
                let (to, why) = (&self.spec.dead_letter_topic, failure.message);
                tracing::warn!(
                    topic = self.topic,
                    offset = failed.offset,
                    to,
                    why,
                    "a dead letter could not be moved; again soon"
                );
                self.context.metrics.dead_letters.with_label_values(&[&self.topic, "failed"]).inc();
                self.to_bury.push_back((failed, Instant::now() + BURY_AGAIN));
            }
        }
    }

    /// The record with where it comes from and why in its headers; those of an earlier burial are replaced.
    fn dead_letter(&mut self, failed: Failed) -> Option<Record> {
        let mut record = self.record(failed.offset)?.clone();
        let meta = self.context.shared.meta();
        let partition = meta.assignment(self.group).map_or(0, |a| a.partition);
        record.headers.retain(|(header, _)| !header.starts_with("weir-dead-"));
        for (header, value) in [
            ("reason", format!("{} deliveries failed", failed.deliveries).into()),
            ("subscription", self.name.clone()),
            ("topic", self.topic.clone().into()),
            ("partition", partition.to_string().into()),
            ("offset", failed.offset.to_string().into()),
            ("deliveries", failed.deliveries.to_string().into()),
        ] {
            record.headers.push((format!("weir-dead-{header}"), value));
        }
        Some(record)
    }

    /// Feeds the delivery what its members have credit for, so many bytes at a time; true where there is more.
    async fn read_ahead(&mut self, partition: &Partition) -> Result<bool, Failure> {
        let mut bytes = 0;
        while self.delivery.wants() > 0 && self.delivery.next() < partition.tail.high_watermark() {
            if bytes >= AHEAD_BYTES_MAX {
                return Ok(true);
            }
            let next = self.delivery.next();
            let held = self.ahead.back().is_some_and(|a| a.batch.end_offset() > next);
            if !held {
                let batches = partition.read(next, READ_BYTES).await?;
                let Some(first) = batches.first() else { return Ok(false) };
                if first.base_offset > next {
                    self.pass_to(first.base_offset); // retention was faster
                    continue;
                }
                bytes += batches.iter().map(|b| b.data.len()).sum::<usize>();
                self.ahead.extend(batches.into_iter().map(Ahead::of));
            }
            self.feed();
            if self.delivery.next() == next {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Feeds what was read, from the next offset on, as far as it is wanted.
    fn feed(&mut self) {
        let singly = self.wants_records();
        let mut next = self.delivery.next();
        let mut wants = self.delivery.wants();
        let (name, filter, keys) = (&self.name, self.filter.as_ref(), &self.spec.routing_keys[..]);
        let mut unpacked: usize = self.ahead.iter().map(|a| a.unpacked).sum();
        for ahead in &mut self.ahead {
            if ahead.batch.end_offset() <= next {
                continue;
            }
            if ahead.batch.base_offset > next || wants == 0 {
                return;
            }
            if singly && ahead.records.is_none() {
                if unpacked > UNPACKED_BYTES_MAX {
                    return; // small batches may hold much: what is here is given out first
                }
                ahead.unpack();
                unpacked += ahead.unpacked;
            }
            while next < ahead.batch.end_offset() && wants > 0 {
                let at = (next - ahead.batch.base_offset) as usize;
                let record = ahead.records.as_ref().and_then(|r| r.get(at));
                next += 1;
                if record.is_some_and(|r| !is_wanted(name, filter, keys, r)) {
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
    }

    /// Gives members what is theirs; says how many messages.
    async fn give_out(&mut self, partition: &Partition) -> Result<usize, Failure> {
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
        let much = self.ahead.iter().map(|a| a.unpacked).sum::<usize>() > UNPACKED_BYTES_MAX / 2;
        while self.ahead.front().is_some_and(|a| {
            let end = a.batch.end_offset();
            end <= position || (end <= next && (much || self.ahead.len() > UNREAD_MAX))
        }) {
            self.ahead.pop_front();
        }
        Ok(count)
    }

    async fn give(&mut self, id: MemberId, grants: &[Grant], partition: &Partition) -> Result<(), Failure> {
        let held = |this: &Self| this.ahead.iter().map(|a| a.batch.data.len() + a.unpacked).sum::<usize>();
        let before = held(self);
        let mut count = grants.len();
        for (at, grant) in grants.iter().enumerate() {
            self.hold(grant.offset, partition).await?;
            // what comes again may lie far apart, a batch each: the rest waits for its turn
            if at % 16 == 15 && held(self) > before + GIVEN_BYTES_MAX {
                count = at + 1;
                break;
            }
        }
        for rest in &grants[count..] {
            self.delivery.take_back(OffsetRange::one(rest.offset));
            self.delivery.credit(id, 1);
        }
        let grants = &grants[..count];
        self.charge(grants);
        let high_watermark = partition.tail.high_watermark();
        let Some(member) = self.members.get(&id) else { return Ok(()) };
        match &member.out {
            Out::Stream { to, messages: false } => {
                let responses = self.batches(grants, high_watermark);
                let to = to.clone();
                self.send(id, &to, responses);
            }
            Out::Stream { to, messages: true } => {
                let to = to.clone();
                let mut responses = Vec::new();
                let mut bytes = 0;
                let mut messages = Vec::new();
                for message in self.messages(grants) {
                    bytes += size(&message);
                    messages.push(message);
                    if bytes >= READ_BYTES {
                        bytes = 0;
                        let messages = std::mem::take(&mut messages);
                        responses.push(v1::PullResponse { messages, high_watermark, ..Default::default() });
                    }
                }
                if !messages.is_empty() {
                    responses.push(v1::PullResponse { messages, high_watermark, ..Default::default() });
                }
                self.send(id, &to, responses);
            }
            Out::Calls { .. } => {
                let mut messages = self.messages(grants);
                let mut bytes = 0;
                let fits = messages.iter().take_while(|m| {
                    bytes += size(m);
                    bytes <= CALL_BYTES_MAX
                });
                let keep = fits.count().max(1);
                for rest in messages.drain(keep.min(messages.len())..) {
                    let range = OffsetRange::one(rest.offset);
                    self.delivery.take_back(range);
                }
                self.delivery.revoke_credit(id);
                let Some(Member { out: Out::Calls { waiting, .. }, .. }) = self.members.get_mut(&id) else {
                    return Ok(());
                };
                let refused = match waiting.take() {
                    Some(w) => w.answer.send(Ok(messages)).is_err(),
                    None => true,
                };
                if refused {
                    // the caller went away: others may have them
                    for g in grants {
                        let range = OffsetRange::one(g.offset);
                        self.delivery.take_back(range);
                    }
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, id: MemberId, to: &mpsc::Sender<Response>, responses: Vec<v1::PullResponse>) {
        let mut full = false;
        for response in responses {
            match to.try_reserve() {
                // once something went back, what follows it does too: it would overtake it
                Ok(room) if !full => {
                    self.context.metrics.delivered(&self.topic, &response);
                    room.send(Ok(response));
                }
                Ok(_) | Err(mpsc::error::TrySendError::Full(())) => {
                    full = true;
                    // it reads slowly: the rest goes back, with the credit it took
                    let mut count = response.until_offset - response.from_offset;
                    let run = OffsetRange { start: response.from_offset, end: response.until_offset };
                    self.delivery.take_back(run);
                    for m in &response.messages {
                        count += 1;
                        self.delivery.take_back(OffsetRange::one(m.offset));
                    }
                    self.delivery.credit(id, count);
                }
                Err(mpsc::error::TrySendError::Closed(())) => {
                    self.members.remove(&id);
                    self.delivery.detach(id);
                    return;
                }
            }
        }
        self.delivery.pause(id, to.capacity() <= UNREAD_MAX / 2);
    }

    /// Takes what goes out off the declared rate.
    fn charge(&mut self, grants: &[Grant]) {
        let mut bytes = 0;
        if self.spec.bytes_per_second > 0 {
            for grant in grants {
                let length = |b: &Option<Bytes>| b.as_ref().map_or(0, |b| b.len() as u64);
                bytes += self.record(grant.offset).map_or(0, |r| length(&r.key) + length(&r.value));
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
            let at = self.ahead.partition_point(|a| a.batch.base_offset < batch.base_offset);
            self.ahead.insert(at, Ahead::of(batch));
        }
        Ok(())
    }

    fn find(&self, offset: u64) -> Option<usize> {
        let at = self.ahead.partition_point(|a| a.batch.base_offset <= offset).checked_sub(1)?;
        (self.ahead[at].batch.end_offset() > offset).then_some(at)
    }

    /// The record at an offset, where its batch is held and can be unpacked.
    fn record(&mut self, offset: u64) -> Option<&Record> {
        let at = self.find(offset)?;
        let ahead = &mut self.ahead[at];
        let inside = (offset - ahead.batch.base_offset) as usize;
        ahead.unpack().get(inside)
    }

    /// Runs of offsets as whole batches.
    fn batches(&self, grants: &[Grant], high_watermark: u64) -> Vec<v1::PullResponse> {
        let mut out: Vec<v1::PullResponse> = Vec::new();
        let mut bytes = 0;
        for grant in grants {
            let Some(at) = self.find(grant.offset) else { continue };
            let batch = &self.ahead[at].batch;
            let last = out.last_mut().filter(|r| r.until_offset == grant.offset);
            match last {
                Some(run) if run.batches.last().is_some_and(|b| b.base_offset == batch.base_offset) => {
                    run.until_offset += 1;
                }
                Some(run) if bytes < READ_BYTES => {
                    bytes += batch.data.len();
                    run.batches.push(log::to_wire(batch.clone()));
                    run.until_offset += 1;
                }
                _ => {
                    bytes = batch.data.len();
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
            }
        }
        out
    }

    fn messages(&mut self, grants: &[Grant]) -> Vec<v1::ReceivedMessage> {
        let meta = self.context.shared.meta();
        let partition = meta.assignment(self.group).map_or(0, |a| a.partition);
        // only where a member cannot know it
        let topic = if pattern::is_pattern(&self.spec.topic) { self.topic.as_str() } else { "" };
        let topic = topic.to_owned();
        let mut out = Vec::with_capacity(grants.len());
        let mut unreadable = Vec::new();
        for grant in grants {
            let Some(at) = self.find(grant.offset) else { continue };
            let ahead = &mut self.ahead[at];
            let append_time_ms = ahead.batch.append_time_ms;
            let base_offset = ahead.batch.base_offset;
            let records = ahead.unpack();
            let Some(record) = records.get((grant.offset - base_offset) as usize) else {
                unreadable.push(grant.offset);
                continue;
            };
            out.push(v1::ReceivedMessage {
                partition,
                offset: grant.offset,
                delivery: grant.delivery,
                append_time_ms,
                topic: topic.clone(),
                message: Some(v1::Message {
                    key: record.key.clone().unwrap_or_default(),
                    value: record.value.clone().unwrap_or_default(),
                    headers: record.headers.iter().cloned().collect(),
                    timestamp_ms: record.timestamp_ms,
                    ..Default::default()
                }),
            });
        }
        for offset in unreadable {
            // a batch whose checksum is right and whose records are not: no consumer can ever read it
            tracing::warn!(topic = self.topic, partition, offset, "a message that cannot be unpacked is passed over");
            self.context.metrics.rejected.with_label_values(&["UNREADABLE"]).inc();
            self.ack(&[v1::OffsetRange { start: offset, end: offset + 1 }]);
        }
        out
    }
}

fn header<'a>(record: &'a Record, name: &str) -> Option<&'a Bytes> {
    record.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value)
}

/// Whether a subscription wants a message: it is not meant for another one, its routing key matches, and it meets the filter.
fn is_wanted(subscription: &Bytes, filter: Option<&Filter>, routing_keys: &[String], record: &Record) -> bool {
    let routed = || {
        let key = header(record, ROUTING_KEY).map_or(Default::default(), |k| String::from_utf8_lossy(k));
        routing_keys.iter().any(|p| pattern::matches(p, &key))
    };
    header(record, ONLY_FOR).is_none_or(|name| name == subscription)
        && (routing_keys.is_empty() || routed())
        && filter.is_none_or(|f| f.admits(record))
}

/// A message's priority: the digit in its header; 0 where there is none.
fn priority(record: &Record) -> u8 {
    match header(record, PRIORITY).map(|value| &value[..]) {
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

fn size(message: &v1::ReceivedMessage) -> usize {
    message.message.as_ref().map_or(0, |m| m.key.len() + m.value.len()) + 64
}
