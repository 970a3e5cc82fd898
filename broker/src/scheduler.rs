//! Messages that are due later: they are held in an internal topic, partition by partition, and a task at each partition's leader
//! publishes them to their topic when their time has come. What it is about to publish is written first (a plan), so that after a
//! failover the same goes out under the same producer and sequence, and stands there once.

use crate::hub::push_range;
use crate::node_loop::Event;
use crate::outbox::{self, Limit};
use crate::service::{Context, Found, admin, subscriber};
use crate::shared::Partition;
use crate::status::Failure;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use tonic::Code;
use weir_core::cursor::{Cursor, CursorUpdate, OffsetRange, Plan};
use weir_core::entry::Control;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::command::{ApplyTopic, Kind};
use weir_core::meta::names;
use weir_core::meta::state::{Topic, TopicSpec};
use weir_core::node::{Reply, mix};
use weir_core::schedule::Schedule;
use weir_proto::records::{self, Compression, Record, Stamp};

/// Header that says when a message is due, ms since the epoch.
pub const DELIVER_AT: &str = "weir-deliver-at";
/// Header of a message that was written again at the end of its log: its first offset there, by which it is cancelled.
const FIRST_OFFSET: &str = "weir-scheduled-offset";
/// Where a log of what is scheduled keeps so many bytes, and most of its messages are published, the oldest are written again at its end:
/// one that is due in a year would keep all that was scheduled after it.
const RENEW_BYTES_MIN: u64 = 48 << 20;
/// Between two looks at that.
const RENEW_LOOK: Duration = Duration::from_secs(5);
/// Offsets examined at one look.
const RENEW_SCAN_MAX: usize = 1_000_000;
/// Messages that were written again, and may be cancelled by their first offsets.
const RENEWED_MAX: usize = 1_000_000;
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
pub(crate) const OVERHEAD_BYTES: u32 = 1_024;

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
            let Some(target) = meta.topics.get(&topic.spec.schedule_for) else { continue };
            let (context, target) = (context.clone(), (target.name.clone(), target.id));
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
    /// id of that topic: nothing goes to another one that is re-created under its name
    target_id: u64,
    partition: u32,
    cursor: Cursor,
    schedule: Schedule,
    /// what is read next of the log
    next: u64,
    /// the next plan's
    producer: u64,
    sequence: i32,
    /// messages that their topic refuses: kept in the log, unacknowledged
    refused: BTreeSet<u64>,
    /// messages that were written again: their offsets by their first ones
    renewed: HashMap<u64, u64>,
}

async fn run(
    context: Context,
    group: GroupId,
    position: SubscriptionId,
    (target, target_id): (String, u64),
    partition: u32,
    mut cancels: mpsc::Receiver<Cancel>,
) -> Result<(), Failure> {
    let (term, cursor) = subscriber::cursor(&context, group, position).await?;
    let mut log = context.led_partition(group).await?;
    let next = cursor.position();
    // one that was moved has no plan any more: what it published before is not known to be there
    let producer = outbox::own_producer(group.0 ^ mix(cursor.seeks()));
    let schedule = Schedule::new(HELD_MAX);
    let (sequence, refused, renewed) = (0, BTreeSet::new(), HashMap::new());
    let mut this = Scheduler {
        context,
        group,
        term,
        position,
        target,
        target_id,
        partition,
        cursor,
        schedule,
        next,
        producer,
        sequence,
        refused,
        renewed,
    };
    if let Some(plan) = this.cursor.plan().cloned() {
        this.producer = plan.producer;
        this.sequence = plan.sequence;
        if plan.offsets.iter().any(|o| !this.cursor.is_acked(*o)) {
            this.publish(&log, plan.offsets.clone(), plan.renews, true).await?;
        } else {
            this.sequence = weir_core::producer::sequence_add(plan.sequence, plan.offsets.len() as u32);
        }
    }
    let mut looked = Instant::now();
    loop {
        if log.serving() != Some(term) {
            return Err(this.context.not_leader(group));
        }
        if looked.elapsed() >= RENEW_LOOK {
            looked = Instant::now();
            this.renew(&log).await?;
        }
        if this.schedule.is_exhausted() {
            this.schedule.begin_again();
            this.next = this.cursor.position();
        }
        this.read(&log).await?;
        let due = this.schedule.take_due(now_ms(), TAKEN_MAX);
        if !due.is_empty() {
            this.publish(&log, due, false, false).await?;
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

/// The first offset of a message that was written again.
fn first_offset(record: &Record) -> Option<u64> {
    std::str::from_utf8(record.header(FIRST_OFFSET)?).ok()?.parse().ok()
}

/// When a scheduled message is due, ms since the epoch; 0 where nothing says so.
pub fn due_of(record: &Record) -> u64 {
    record.header(DELIVER_AT).and_then(|value| std::str::from_utf8(value).ok()?.parse().ok()).unwrap_or(0)
}

fn ranges(mut offsets: Vec<u64>) -> Vec<OffsetRange> {
    offsets.sort_unstable();
    let mut out: Vec<OffsetRange> = Vec::new();
    offsets.into_iter().for_each(|offset| push_range(&mut out, OffsetRange::one(offset)));
    out
}

/// Batches of messages, in order, none larger than the topic takes but of one message alone.
fn pack(list: impl Iterator<Item = (u64, Record)>, limit: usize) -> VecDeque<Vec<(u64, Record)>> {
    let mut out: VecDeque<Vec<(u64, Record)>> = VecDeque::new();
    let mut bytes = 0;
    for (offset, record) in list {
        let more = records::encoded_bytes_max(&record);
        match out.back_mut().filter(|batch| batch.len() < BATCH_MAX && bytes + more <= limit) {
            Some(batch) => {
                bytes += more;
                batch.push((offset, record));
            }
            None => {
                bytes = weir_core::batch::HEADER_BYTES + more;
                out.push_back(vec![(offset, record)]);
            }
        }
    }
    out
}

impl Scheduler {
    /// Takes up what has come to the log since. Batches that cannot be decoded name no time: they are passed over and counted.
    async fn read(&mut self, log: &Partition) -> Result<(), Failure> {
        while self.next < log.tail.high_watermark() {
            let batches = log.read(self.next, READ_BYTES).await?;
            if batches.is_empty() {
                return Ok(());
            }
            for batch in batches {
                let (start, end) = (batch.base_offset.max(self.next), batch.end_offset());
                match records::decode(&batch.data) {
                    Ok(list) => {
                        for (record, offset) in list.iter().zip(batch.base_offset..) {
                            let taken = self.cursor.is_acked(offset) || self.refused.contains(&offset);
                            if offset >= start && !taken {
                                self.schedule.add(due_of(record), offset);
                                first_offset(record).and_then(|first| self.renewed.insert(first, offset));
                            }
                        }
                    }
                    Err(why) if !self.cursor.is_acked(start) => {
                        self.context.metrics.undecodable.with_label_values(&["skipped"]).inc();
                        let (partition, last) = (self.partition, end - 1);
                        if let Some(left_out) = self.context.metrics.seldom.now("scheduled", &self.target) {
                            tracing::warn!(
                                scheduled_for = self.target,
                                partition,
                                first = start,
                                last,
                                why,
                                left_out,
                                "scheduled records cannot be decoded: their batch is passed over"
                            );
                        }
                        self.write(vec![OffsetRange { start, end }], None).await?;
                    }
                    Err(_) => {}
                }
                self.next = self.next.max(end);
            }
        }
        Ok(())
    }

    fn find_target(&self) -> Result<Found, Failure> {
        self.context.find(&self.target, self.partition)?.of_topic(self.target_id)
    }

    /// Writes the oldest messages again at the end of the log, where they keep much that is published.
    async fn renew(&mut self, log: &Partition) -> Result<(), Failure> {
        let (group, start) = (self.group, self.cursor.position());
        let span = self.next.saturating_sub(start);
        if self.cursor.acked_above() * 2 < span || self.renewed.len() >= RENEWED_MAX {
            return Ok(());
        }
        let kept = self.context.node.ask(move |node| node.group(group).map_or(0, |g| g.kept_bytes())).await;
        if kept.unwrap_or(0) < RENEW_BYTES_MIN {
            return Ok(());
        }
        let left = |offset: &u64| !self.cursor.is_acked(*offset) && !self.refused.contains(offset);
        let oldest: Vec<u64> = (start..self.next).take(RENEW_SCAN_MAX).filter(left).take(BATCH_MAX).collect();
        for (offset, record) in self.fetch(log, &oldest).await? {
            self.schedule.forget(due_of(&record), offset);
        }
        self.publish(log, oldest, true, false).await
    }

    /// Publishes messages, in this order, and counts them as done; or, with `renews`, writes them again. `again` repeats a plan that is in
    /// the log.
    async fn publish(&mut self, log: &Partition, due: Vec<u64>, renews: bool, mut again: bool) -> Result<(), Failure> {
        let mut found = self.fetch(log, &due).await?;
        let Found { batch_bytes_max, .. } = self.find_target()?; // deleted: what is scheduled goes with it
        // those that are not found lie below the log's start, or cannot be decoded
        let mut done: Vec<u64> = due.iter().copied().filter(|offset| !found.contains_key(offset)).collect();
        let list = due.into_iter().filter_map(|offset| {
            let mut record = found.remove(&offset)?;
            let first = first_offset(&record).unwrap_or(offset);
            record.headers.retain(|(name, _)| name != FIRST_OFFSET);
            if renews {
                record.set_header(FIRST_OFFSET, first.to_string());
            }
            self.renewed.remove(&first);
            Some((offset, record))
        });
        // a plan is one batch, and is repeated as it was
        let mut batches = if again { VecDeque::from([list.collect()]) } else { pack(list, batch_bytes_max as usize) };
        while let Some(batch) = batches.pop_front().filter(|batch: &Vec<_>| !batch.is_empty()) {
            let repeated = std::mem::take(&mut again);
            let offsets: Vec<u64> = batch.iter().map(|(offset, _)| *offset).collect();
            if !repeated {
                let plan = Plan { producer: self.producer, sequence: self.sequence, offsets: offsets.clone(), renews };
                self.write(ranges(std::mem::take(&mut done)), Some(plan)).await?;
            }
            match self.publish_batch(&batch, renews).await? {
                None => done = offsets,
                // it is not stored: its parts are published under the same sequence
                Some(_) if batch.len() > 1 => {
                    let mut first = batch;
                    let second = first.split_off(first.len() / 2);
                    batches.push_front(second);
                    batches.push_front(first);
                }
                Some(failure) => self.keep_refused(offsets[0], &failure),
            }
        }
        self.write(ranges(done), None).await
    }

    /// A message that its topic refuses is kept where it is, unacknowledged; another leader of its partition tries again.
    fn keep_refused(&mut self, offset: u64, failure: &Failure) {
        let (topic, partition, why) = (&self.target, self.partition, &failure.message);
        if let Some(left_out) = self.context.metrics.seldom.now("refused", topic) {
            tracing::warn!(
                topic,
                partition,
                offset,
                why,
                left_out,
                "a scheduled message is refused by its topic: it is kept, unpublished"
            );
        }
        self.context.metrics.scheduled_refused.inc();
        self.refused.insert(offset);
    }

    /// Publishes one batch under the plan that was written; returns why it was refused, where it was.
    async fn publish_batch(&mut self, batch: &[(u64, Record)], renews: bool) -> Result<Option<Failure>, Failure> {
        let topic = if renews { names::scheduled(self.target_id) } else { self.target.clone() };
        let list: Vec<Record> = batch.iter().map(|(_, record)| record.clone()).collect();
        loop {
            let stamp = Stamp { id: self.producer as i64, epoch: 0, sequence: self.sequence };
            let encoded = match records::encode(&list, Compression::None, Some(stamp)) {
                Ok(encoded) => encoded,
                Err(why) => return Ok(Some(Failure::invalid("RECORDS", why))),
            };
            // accepted before, they are published whatever the topic's limit has become
            self.find_target()?;
            match outbox::send(&self.context, &topic, self.partition, encoded, Limit::Carried).await {
                Ok(_) => break,
                // the partition has forgotten this producer: it begins anew, as another
                Err(failure) if failure.reason == "SEQUENCE" => {
                    self.producer = outbox::own_producer(self.producer);
                    self.sequence = 0;
                    let offsets = batch.iter().map(|(offset, _)| *offset).collect();
                    let plan = Plan { producer: self.producer, sequence: 0, offsets, renews };
                    self.write(Vec::new(), Some(plan)).await?;
                }
                Err(failure) if ["TOO_LARGE", "BATCH"].contains(&failure.reason) => return Ok(Some(failure)),
                Err(failure) => {
                    if !self.context.shared.leads(self.group) || failure.code == Code::NotFound {
                        return Err(failure);
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
        self.sequence = weir_core::producer::sequence_add(self.sequence, list.len() as u32);
        Ok(None)
    }

    /// Writes what is done, and what comes next, into the log; returns once a majority has it.
    async fn write(&mut self, acked: Vec<OffsetRange>, plan: Option<Plan>) -> Result<(), Failure> {
        if acked.is_empty() && plan.is_none() {
            return Ok(());
        }
        let update = CursorUpdate { subscription: self.position.0, acked: acked.clone(), plan, ..Default::default() };
        let control = Control { cursors: vec![update], ..Default::default() };
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

    /// The records at these offsets; each batch is read and decoded once. Left out are those below the log's start, and those of batches
    /// that cannot be decoded; one that just cannot be read is a failure.
    async fn fetch(&self, log: &Partition, offsets: &[u64]) -> Result<HashMap<u64, Record>, Failure> {
        let mut wanted = offsets.to_vec();
        wanted.sort_unstable();
        let mut out = HashMap::with_capacity(wanted.len());
        let mut at = 0;
        while at < wanted.len() {
            let batches = log.read(wanted[at], READ_BYTES).await?;
            let lost = || Failure::new(Code::Unavailable, "NOT_READ", "scheduled messages could not be read");
            let end = batches.last().map(|b| b.end_offset()).filter(|end| *end > wanted[at]).ok_or_else(lost)?;
            let first = batches.first().map_or(end, |b| b.base_offset);
            if first > wanted[at] && log.tail.start_offset() <= wanted[at] {
                return Err(lost());
            }
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
        }
        Ok(out)
    }

    async fn cancel(&mut self, log: &Partition, first: u64) -> Result<(), Failure> {
        let offset = self.renewed.get(&first).copied().unwrap_or(first);
        let end = log.tail.high_watermark();
        if offset >= end {
            return Err(never_scheduled(&self.target, self.partition, offset, end));
        }
        if self.cursor.is_acked(offset) {
            let text = "nothing is scheduled there: it was published, or cancelled, before";
            return Err(Failure::new(Code::NotFound, "NOT_SCHEDULED", text));
        }
        self.schedule.remove(offset);
        self.write(vec![OffsetRange::one(offset)], None).await?;
        self.renewed.remove(&first);
        Ok(())
    }
}

/// The topic that holds what is scheduled for a topic, as it should be.
fn schedule_spec(topic: &Topic, schedule: Option<&Topic>) -> TopicSpec {
    let had = schedule.map_or(0, |t| t.groups.len() as u32);
    let TopicSpec { partitions, replicas, quorum_memory, message_bytes_max, .. } = topic.spec;
    let largest = if message_bytes_max == 0 { crate::service::BATCH_BYTES_DEFAULT } else { message_bytes_max };
    TopicSpec {
        partitions: partitions.max(had),
        replicas,
        quorum_memory,
        message_bytes_max: largest.saturating_add(OVERHEAD_BYTES),
        schedule_for: topic.name.clone(),
        ..Default::default() // nothing goes before it was published
    }
}

/// No message was scheduled at an offset, of `end` that were.
fn never_scheduled(topic: &str, partition: u32, offset: u64, end: u64) -> Failure {
    let there = match end.checked_sub(1) {
        None => "none ever was".to_owned(),
        Some(last) => format!("those that were have the offsets 0 to {last}"),
    };
    let text = format!("no message was ever scheduled at offset {offset} of partition {partition} of {topic}: {there}");
    Failure::new(Code::NotFound, "NEVER_SCHEDULED", text)
}

fn missing_topic(topic: &str) -> Failure {
    Failure::new(Code::NotFound, "NO_TOPIC", format!("topic {topic} does not exist"))
}

impl Context {
    /// Makes the topic that holds what is scheduled for `topic`, or brings it up to date with that; gives its name.
    async fn prepare_schedule(&self, topic: &str, topic_id: u64) -> Result<String, tonic::Status> {
        let name = names::scheduled(topic_id);
        let meta = self.shared.meta();
        let target = meta.topics.get(topic).ok_or_else(|| missing_topic(topic))?;
        let there = meta.topics.get(&name);
        if there.is_some_and(|t| t.spec == schedule_spec(target, there)) {
            return Ok(name);
        }
        self.decide(|meta| {
            let target = meta.topics.get(topic).filter(|t| t.id == topic_id).ok_or_else(|| missing_topic(topic))?;
            let there = meta.topics.get(&name);
            let spec = schedule_spec(target, there);
            let missing = spec.partitions - there.map_or(0, |t| t.groups.len() as u32);
            let placements = admin::placements(meta, missing, spec.replicas)?;
            Ok(Kind::ApplyTopic(ApplyTopic { name: name.clone(), spec, placements, ..Default::default() }).into())
        })
        .await?;
        Ok(name)
    }

    /// Stores messages until they are due; each with its time, and all once where they have a stamp. Gives the offset of the first.
    pub(crate) async fn schedule(
        &self,
        topic: &str,
        topic_id: u64,
        partition: u32,
        mut list: Vec<(Record, u64)>,
        stamp: Option<Stamp>,
    ) -> Result<u64, tonic::Status> {
        // their topic must take them now: later they are published whatever its limit is then
        let Found { batch_bytes_max, .. } = self.find(topic, partition)?;
        let records: usize = list.iter().map(|(record, _)| records::encoded_bytes_max(record)).sum();
        let bytes = weir_core::batch::HEADER_BYTES + records;
        if bytes > batch_bytes_max as usize {
            let text = format!("the batch has {bytes} bytes, topic {topic} takes at most {batch_bytes_max}");
            return Err(self.rejected(Failure::invalid("TOO_LARGE", text)).into());
        }
        let name = self.prepare_schedule(topic, topic_id).await?;
        for (record, due_ms) in &mut list {
            record.headers.retain(|(name, _)| name != FIRST_OFFSET);
            record.set_header(DELIVER_AT, due_ms.to_string());
        }
        let list: Vec<Record> = list.into_iter().map(|(record, _)| record).collect();
        let batch = records::encode(&list, Compression::None, stamp).map_err(|e| Failure::invalid("RECORDS", e))?;
        let _budget = self.budget.publish(batch.len()).await;
        // a topic that has just been made gets its leaders within moments
        let mut tries = 0;
        loop {
            match outbox::send(self, &name, partition, batch.clone(), Limit::Carried).await {
                Err(failure) if tries < 20 && failure.reason == "NOT_LEADER" => {
                    tries += 1;
                    tokio::time::sleep(AGAIN).await;
                }
                other => return other.map_err(|f| self.rejected(f).into()),
            }
        }
    }

    /// Takes a scheduled message back, where this broker leads its partition.
    pub(crate) async fn cancel_scheduled(
        &self,
        topic: &str,
        topic_id: u64,
        partition: u32,
        offset: u64,
    ) -> Result<(), Failure> {
        let target = self.find(topic, partition)?.of_topic(topic_id)?;
        let schedule = names::scheduled(target.topic_id);
        if !self.shared.meta().topics.contains_key(&schedule) {
            return Err(match never_scheduled(&target.topic, partition, offset, 0) {
                Failure { reason, message, .. } => self.missing(reason, message),
            });
        }
        let Found { group, .. } = self.find(&schedule, partition)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn batches_keep_order_and_are_as_large_as_their_encoding(
            sizes in proptest::collection::vec((0usize..400, 0usize..5, 0usize..300), 0..60), limit in 100usize..2_000,
        ) {
            let record = |(value, headers, header): &(usize, usize, usize)| Record {
                value: Some(vec![1; *value].into()),
                headers: vec![("name".to_owned(), Some(vec![2; *header].into())); *headers],
                ..Default::default()
            };
            let list: Vec<(u64, Record)> = (0..).zip(sizes.iter().map(record)).collect();
            let batches = pack(list.clone().into_iter(), limit);
            for batch in &batches {
                let records: Vec<Record> = batch.iter().map(|(_, record)| record.clone()).collect();
                let bytes = records::encode(&records, Compression::None, None).unwrap().len();
                prop_assert!(batch.len() == 1 || bytes <= limit, "{} messages of {bytes} bytes", batch.len());
            }
            prop_assert_eq!(batches.into_iter().flatten().collect::<Vec<_>>(), list);
        }
    }
}
