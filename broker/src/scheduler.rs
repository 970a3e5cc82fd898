//! Messages that are due later: they lie in the topic `NAME.scheduled`, partition by partition, and a task at each partition's leader
//! publishes them to their topic when their time has come. What it is about to publish is written first (a plan), so that after a
//! failover the same goes out under the same producer and sequence, and stands there once.

use crate::hub::push_range;
use crate::node_loop::Event;
use crate::outbox;
use crate::service::{Context, Found, admin, subscriber};
use crate::shared::Partition;
use crate::status::Failure;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use tonic::Code;
use weir_core::cursor::{Cursor, CursorUpdate, OffsetRange, Plan};
use weir_core::entry::Control;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::command::{ApplySubscription, ApplyTopic, Kind};
use weir_core::meta::state::{MetaState, Start, SubscriptionSpec, TopicSpec};
use weir_core::node::Reply;
use weir_core::schedule::Schedule;
use weir_proto::records::{self, Compression, Record, Stamp};

/// Header that says when a message is due, ms since the epoch.
pub const DELIVER_AT: &str = "weir-deliver-at";
/// Messages of one partition held in memory, 16 bytes each and what a set takes.
const HELD_MAX: usize = 200_000;
/// Messages published at one time; what is read for them is read once.
const TAKEN_MAX: usize = 10_000;
/// Messages of one batch.
const BATCH_MAX: usize = 1_000;
/// Bytes read at one time.
const READ_BYTES: usize = 1 << 20;
/// Between two looks at what this broker leads, and the longest sleep of a task.
const LOOK: Duration = Duration::from_millis(500);
/// Between two tries to publish.
const AGAIN: Duration = Duration::from_millis(100);
/// Room for what a record and a batch take beside a message, bytes.
const OVERHEAD_BYTES: usize = 1_024;

/// The topic, and the subscription with its position, that hold what is scheduled for a topic.
pub fn name_for(topic: &str) -> String {
    format!("{topic}.scheduled")
}

/// Takes a message back; the answer says whether it was still there.
pub struct Cancel {
    offset: u64,
    answer: oneshot::Sender<Result<(), Failure>>,
}

/// The scheduler tasks of a broker, by group.
#[derive(Clone, Default)]
pub struct Schedulers(Arc<Mutex<HashMap<GroupId, mpsc::Sender<Cancel>>>>);

impl Schedulers {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<GroupId, mpsc::Sender<Cancel>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Starts a task for each partition of scheduled messages that this broker comes to lead.
pub async fn tend(context: Context) {
    loop {
        let meta = context.shared.meta();
        let schedules = meta.topics.values().filter(|t| !t.spec.schedule_for.is_empty());
        for (topic, partition, group) in
            schedules.flat_map(|t| t.groups.iter().enumerate().map(move |(at, g)| (t, at as u32, GroupId(*g))))
        {
            let runs = context.schedulers.all().get(&group).is_some_and(|t| !t.is_closed());
            let Some(position) = meta.subscriptions.get(&topic.name).map(|s| SubscriptionId(s.id)) else { continue };
            if runs || !context.shared.leads(group) {
                continue;
            }
            let (sender, cancels) = mpsc::channel(64);
            context.schedulers.all().insert(group, sender);
            let (context, target) = (context.clone(), topic.spec.schedule_for.clone());
            tokio::spawn(async move {
                if let Err(failure) = run(context, group, position, target, partition, cancels).await {
                    tracing::debug!(%group, why = failure.message, "the scheduler of a partition ended");
                }
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

struct Scheduler {
    context: Context,
    group: GroupId,
    /// the leadership it belongs to: nothing is written in another
    term: u64,
    position: SubscriptionId,
    target: String,
    partition: u32,
    cursor: Cursor,
    schedule: Schedule,
    /// what is read next of the log
    next: u64,
    /// the next plan's
    producer: u64,
    sequence: i32,
}

async fn run(
    context: Context,
    group: GroupId,
    position: SubscriptionId,
    target: String,
    partition: u32,
    mut cancels: mpsc::Receiver<Cancel>,
) -> Result<(), Failure> {
    let (term, cursor) = subscriber::cursor(&context, group, position).await?;
    let mut log = context.led_partition(group).await?;
    let next = cursor.position();
    let producer = outbox::own_producer(group.0);
    let schedule = Schedule::new(HELD_MAX);
    let mut this =
        Scheduler { context, group, term, position, target, partition, cursor, schedule, next, producer, sequence: 0 };
    if let Some(plan) = this.cursor.plan().cloned() {
        this.producer = plan.producer;
        this.sequence = plan.sequence;
        if plan.offsets.iter().any(|o| !this.cursor.is_acked(*o)) {
            this.publish(&log, plan.offsets.clone(), true).await?;
        } else {
            this.sequence = weir_core::producer::sequence_add(plan.sequence, plan.offsets.len() as u32);
        }
    }
    loop {
        if log.serving() != Some(term) {
            return Err(this.context.not_leader(group));
        }
        if this.schedule.is_exhausted() {
            this.schedule.begin_again();
            this.next = this.cursor.position();
        }
        this.read(&log).await?;
        let due = this.schedule.take_due(now_ms(), TAKEN_MAX);
        if !due.is_empty() {
            this.publish(&log, due, false).await?;
            continue;
        }
        if this.schedule.is_exhausted() {
            continue;
        }
        let wait = this.schedule.next_due_ms().map_or(LOOK, |due| Duration::from_millis(due.saturating_sub(now_ms())));
        tokio::select! {
            cancel = cancels.recv() => {
                let Some(Cancel { offset, answer }) = cancel else { return Ok(()) };
                let _ = answer.send(this.cancel(&log, offset).await);
            }
            moved = log.progress.changed() => moved.map_err(|_| this.context.not_leader(group))?,
            () = tokio::time::sleep(wait.min(LOOK)) => {}
        }
    }
}

fn due_of(record: &Record) -> u64 {
    let header = record.headers.iter().find(|(name, _)| name == DELIVER_AT);
    header.and_then(|(_, value)| std::str::from_utf8(value).ok()?.parse().ok()).unwrap_or(0)
}

fn ranges(mut offsets: Vec<u64>) -> Vec<OffsetRange> {
    offsets.sort_unstable();
    let mut out: Vec<OffsetRange> = Vec::new();
    offsets.into_iter().for_each(|offset| push_range(&mut out, OffsetRange::one(offset)));
    out
}

impl Scheduler {
    /// Takes up what has come to the log since.
    async fn read(&mut self, log: &Partition) -> Result<(), Failure> {
        while self.next < log.tail.high_watermark() {
            let batches = log.read(self.next, READ_BYTES).await?;
            if batches.is_empty() {
                return Ok(());
            }
            for batch in batches {
                for (at, record) in records::decode(&batch.data).unwrap_or_default().iter().enumerate() {
                    let offset = batch.base_offset + at as u64;
                    if offset >= self.next && !self.cursor.is_acked(offset) {
                        self.schedule.add(due_of(record), offset);
                    }
                }
                self.next = self.next.max(batch.end_offset());
            }
        }
        Ok(())
    }

    /// Publishes messages, in this order, and counts them as done. `again` repeats a plan that stands in the log.
    async fn publish(&mut self, log: &Partition, due: Vec<u64>, again: bool) -> Result<(), Failure> {
        let mut found = self.fetch(log, &due).await?;
        let limit = match self.context.find(&self.target, self.partition) {
            Ok(Found { batch_bytes_max, .. }) => batch_bytes_max as usize,
            Err(failure) => return Err(failure), // deleted: what is scheduled goes with it
        };
        let mut done: Vec<u64> = Vec::new();
        let mut rest = due.into_iter().peekable();
        while rest.peek().is_some() {
            let (mut offsets, mut list, mut bytes) = (Vec::new(), Vec::new(), 0);
            while let Some(offset) = rest.peek().copied() {
                let Some(record) = found.get(&offset) else {
                    done.push(offset); // retention was faster
                    rest.next();
                    continue;
                };
                let size = record.value.as_ref().map_or(0, |v| v.len()) + OVERHEAD_BYTES / 8;
                // a plan is one batch, and is repeated as it was
                if !again
                    && !offsets.is_empty()
                    && (offsets.len() == BATCH_MAX || bytes + size + OVERHEAD_BYTES > limit)
                {
                    break;
                }
                bytes += size;
                list.extend(found.remove(&offset));
                offsets.push(offset);
                rest.next();
            }
            if offsets.is_empty() {
                break;
            }
            self.publish_batch(offsets.clone(), list, std::mem::take(&mut done), again).await?;
            done = offsets;
        }
        self.write(std::mem::take(&mut done), None).await
    }

    async fn publish_batch(
        &mut self,
        offsets: Vec<u64>,
        list: Vec<Record>,
        done: Vec<u64>,
        again: bool,
    ) -> Result<(), Failure> {
        let count = list.len() as u32;
        if !again {
            self.write(done, Some(Plan { producer: self.producer, sequence: self.sequence, offsets: offsets.clone() }))
                .await?;
        }
        loop {
            let stamp = Stamp { id: self.producer as i64, epoch: 0, sequence: self.sequence };
            let batch =
                records::encode(&list, Compression::None, Some(stamp)).map_err(|e| Failure::invalid("RECORDS", e))?;
            match outbox::send(&self.context, &self.target, self.partition, batch).await {
                Ok(_) => break,
                // the partition has forgotten this producer: it begins anew, as another
                Err(failure) if failure.reason == "SEQUENCE" => {
                    self.producer = outbox::own_producer(self.producer);
                    self.sequence = 0;
                    let plan = Plan { producer: self.producer, sequence: 0, offsets: offsets.clone() };
                    self.write(Vec::new(), Some(plan)).await?;
                }
                Err(failure) if failure.reason == "TOO_LARGE" => {
                    tracing::warn!(topic = self.target, why = failure.message, "scheduled messages are dropped");
                    self.context.rejected(failure);
                    return Ok(());
                }
                Err(failure) => {
                    if !self.context.shared.leads(self.group) || failure.code == Code::NotFound {
                        return Err(failure);
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
        self.sequence = weir_core::producer::sequence_add(self.sequence, count);
        Ok(())
    }

    /// Writes what is done, and what comes next, into the log; returns once a majority has it.
    async fn write(&mut self, done: Vec<u64>, plan: Option<Plan>) -> Result<(), Failure> {
        let acked = ranges(done);
        if acked.is_empty() && plan.is_none() {
            return Ok(());
        }
        let update = CursorUpdate { subscription: self.position.0, acked: acked.clone(), plan, ..Default::default() };
        let control = Control { cursors: vec![update] };
        let (group, term) = (self.group, self.term);
        loop {
            let control = control.clone();
            let reply = self.context.node.call(|to| Event::Control { group, control, term, to }).await;
            match reply.ok_or_else(Failure::stopping)? {
                Reply::Done => break,
                Reply::Refused(weir_core::node::Refusal::Overloaded) => tokio::time::sleep(AGAIN).await,
                Reply::Refused(refusal) => return Err(self.context.failure(group, refusal)),
                other => return Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}"))),
            }
        }
        acked.iter().for_each(|range| self.cursor.ack(*range));
        Ok(())
    }

    /// The records at these offsets; each batch is read and unpacked once.
    async fn fetch(&self, log: &Partition, offsets: &[u64]) -> Result<HashMap<u64, Record>, Failure> {
        let mut wanted = offsets.to_vec();
        wanted.sort_unstable();
        let mut out = HashMap::with_capacity(wanted.len());
        let mut at = 0;
        while at < wanted.len() {
            let batches = log.read(wanted[at], READ_BYTES).await?;
            let Some(end) = batches.last().map(|b| b.end_offset()) else { break };
            for batch in batches {
                if wanted.get(at).is_none_or(|o| *o >= batch.end_offset()) {
                    continue;
                }
                let mut list = records::decode(&batch.data).unwrap_or_default();
                while let Some(offset) = wanted.get(at).copied().filter(|o| *o < batch.end_offset()) {
                    let inside = offset.checked_sub(batch.base_offset).and_then(|i| list.get_mut(i as usize));
                    if let Some(record) = inside {
                        out.insert(offset, std::mem::take(record));
                    }
                    at += 1;
                }
            }
            while wanted.get(at).is_some_and(|o| *o < end) {
                at += 1;
            }
        }
        Ok(out)
    }

    async fn cancel(&mut self, log: &Partition, offset: u64) -> Result<(), Failure> {
        let there = offset < log.tail.high_watermark() && !self.cursor.is_acked(offset);
        if !there {
            let text = "nothing is scheduled there: it was published, or cancelled, before";
            return Err(Failure::new(Code::NotFound, "NOT_SCHEDULED", text));
        }
        self.schedule.remove(offset);
        self.write(vec![offset], None).await
    }
}

/// Whether everything is there that holds what is scheduled for a topic.
fn is_there(meta: &MetaState, topic: &str) -> bool {
    let name = name_for(topic);
    let partitions = |n: &str| meta.topics.get(n).map_or(0, |t| t.groups.len());
    meta.subscriptions.contains_key(&name) && partitions(&name) >= partitions(topic)
}

impl Context {
    /// Makes the topic, and the position in it, that hold what is scheduled for `topic`.
    async fn prepare_schedule(&self, topic: &str) -> Result<(), tonic::Status> {
        if is_there(&self.shared.meta(), topic) {
            return Ok(());
        }
        let name = name_for(topic);
        self.decide(|meta| {
            let missing = || Failure::new(Code::NotFound, "NO_TOPIC", format!("topic {topic} does not exist"));
            let spec = &meta.topics.get(topic).ok_or_else(missing)?.spec;
            let had = meta.topics.get(&name).map_or(0, |t| t.groups.len() as u32);
            let partitions = spec.partitions.max(had);
            let placements = admin::placements(meta, partitions - had, spec.replicas)?;
            let largest =
                if spec.message_bytes_max == 0 { crate::service::BATCH_BYTES_DEFAULT } else { spec.message_bytes_max };
            let spec = TopicSpec {
                partitions,
                replicas: spec.replicas,
                quorum_memory: spec.quorum_memory,
                message_bytes_max: largest + OVERHEAD_BYTES as u32,
                schedule_for: topic.to_owned(),
                ..Default::default() // nothing goes before it was published
            };
            Ok(Kind::ApplyTopic(ApplyTopic { name: name.clone(), spec, placements, ..Default::default() }).into())
        })
        .await?;
        let spec = SubscriptionSpec { topic: name.clone(), start: Start::Earliest.into(), ..Default::default() };
        self.propose(Kind::ApplySubscription(ApplySubscription { name, spec, ..Default::default() })).await?;
        Ok(())
    }

    /// Stores messages until they are due; each with its time, and all once where they have a stamp. Gives the offset of the first.
    pub(crate) async fn schedule(
        &self,
        topic: &str,
        partition: u32,
        mut list: Vec<(Record, u64)>,
        stamp: Option<Stamp>,
    ) -> Result<u64, tonic::Status> {
        self.prepare_schedule(topic).await?;
        for (record, due_ms) in &mut list {
            record.headers.retain(|(name, _)| name != DELIVER_AT);
            record.headers.push((DELIVER_AT.to_owned(), due_ms.to_string().into()));
        }
        let list: Vec<Record> = list.into_iter().map(|(record, _)| record).collect();
        let batch = records::encode(&list, Compression::None, stamp).map_err(|e| Failure::invalid("RECORDS", e))?;
        let name = name_for(topic);
        // a topic that has just been made gets its leaders within moments
        let mut tries = 0;
        loop {
            match outbox::send(self, &name, partition, batch.clone()).await {
                Err(failure) if tries < 20 && failure.reason == "NOT_LEADER" => {
                    tries += 1;
                    tokio::time::sleep(AGAIN).await;
                }
                other => return other.map_err(|f| self.rejected(f).into()),
            }
        }
    }

    /// Takes a scheduled message back, where this broker leads its partition.
    pub(crate) async fn cancel_scheduled(&self, topic: &str, partition: u32, offset: u64) -> Result<(), Failure> {
        let Found { group, .. } = self.find(&name_for(topic), partition)?;
        if !self.shared.leads(group) {
            return Err(self.not_leader(group));
        }
        let starting =
            || Failure::new(Code::Unavailable, "STARTING", "the partition's scheduler is starting; try again");
        let task = self.schedulers.all().get(&group).cloned().ok_or_else(starting)?;
        let (answer, cancelled) = oneshot::channel();
        task.send(Cancel { offset, answer }).await.map_err(|_| starting())?;
        cancelled.await.map_err(|_| starting())?
    }
}
