//! Publishing: records gather into batches by bytes and linger, batches go out pipelined, answers come back.
//!
//! Each partition has a task of its own, which keeps its batches in order over retries and failover: after a broken stream it sends
//! all that is unanswered again, from the oldest on, and the broker answers what it already has with its old offset.

use crate::{Client, Error, waits};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use weir_proto::records::{self, Compression, Record, Stamp};
use weir_proto::v1;

/// Batches unanswered on one partition; below what a broker remembers of a producer (32).
const IN_FLIGHT_MAX: usize = 16;
/// Between two looks at how many partitions a topic has.
const GROWTH_LOOK: Duration = Duration::from_secs(5);
/// A stream that answers nothing for this long while batches wait is taken for dead.
const SILENCE_MAX: Duration = Duration::from_millis(2_000);

/// How a producer works.
#[derive(Clone, Debug)]
pub struct Options {
    /// A batch is closed at this size, bytes.
    pub batch_bytes: usize,
    /// or after this long.
    pub linger: Duration,
    /// Records waiting or under way, bytes; beyond them [`Producer::send`] waits.
    pub memory_bytes: usize,
    /// A record not acknowledged by then has failed (whether it is stored is then unknown).
    pub deadline: Duration,
    /// Of batches.
    pub compression: Compression,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch_bytes: 128 << 10,
            linger: Duration::from_millis(2),
            memory_bytes: 64 << 20,
            deadline: Duration::from_secs(30),
            compression: Compression::None,
        }
    }
}

/// Where a record was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Partition.
    pub partition: u32,
    /// Offset.
    pub offset: u64,
}

type Outcome = Result<Position, Error>;

struct Queued {
    record: Record,
    done: oneshot::Sender<Outcome>,
    _memory: OwnedSemaphorePermit,
    since: Instant,
}

/// Records that wait for a stream.
struct Queue {
    receiver: mpsc::UnboundedReceiver<Queued>,
    /// taken from it to see how long they have waited; they come first
    looked_at: VecDeque<Queued>,
}

impl Queue {
    fn try_recv(&mut self) -> Option<Queued> {
        self.looked_at.pop_front().or_else(|| self.receiver.try_recv().ok())
    }

    async fn recv(&mut self) -> Option<Queued> {
        match self.looked_at.pop_front() {
            Some(next) => Some(next),
            None => self.receiver.recv().await,
        }
    }

    /// Takes out those that have waited for `deadline`.
    fn expired(&mut self, deadline: Duration) -> Vec<Queued> {
        self.looked_at.extend(std::iter::from_fn(|| self.receiver.try_recv().ok()));
        let old = self.looked_at.iter().take_while(|q| q.since.elapsed() >= deadline).count();
        self.looked_at.drain(..old).collect()
    }
}

struct Inner {
    client: Client,
    options: Options,
    topic: String,
    memory: Arc<Semaphore>,
    partitions: Mutex<HashMap<u32, mpsc::UnboundedSender<Queued>>>,
    round_robin: AtomicU32,
    /// partitions the topic has; it may grow
    count: AtomicU32,
}

/// Publishes to one topic. Cheap to clone.
#[derive(Clone)]
pub struct Producer(Arc<Inner>);

impl Producer {
    /// A producer for a topic that exists.
    pub async fn open(client: &Client, topic: &str, options: Options) -> Result<Self, Error> {
        let cluster = client.connect(options.deadline).await?;
        let missing = || Error::Refused {
            code: tonic::Code::NotFound,
            reason: "NO_TOPIC".into(),
            message: format!("topic {topic} does not exist; make it with `weir topic apply`"),
        };
        let count = cluster.topic(topic).ok_or_else(missing)?.partitions.len() as u32;
        let memory = Arc::new(Semaphore::new((options.memory_bytes / 64).max(1)));
        let inner = Inner {
            client: client.clone(),
            options,
            topic: topic.to_owned(),
            memory,
            partitions: Mutex::default(),
            round_robin: 0.into(),
            count: count.into(),
        };
        let inner = Arc::new(inner);
        tokio::spawn(follow_growth(Arc::downgrade(&inner)));
        Ok(Self(inner))
    }

    /// Takes a record once there is memory for it; the receiver gets its position.
    /// Records of one key are stored in the order of their `send`s, as long as the topic keeps its number of partitions;
    /// it is seen to have grown within five seconds, and then keys move to other partitions.
    pub async fn send(&self, record: Record) -> Result<oneshot::Receiver<Outcome>, Error> {
        let count = self.0.count.load(Ordering::Relaxed);
        let partition = match &record.key {
            Some(key) => records::partition_of(key, count),
            // a run of records stays on one partition, so that batches fill
            None => self.0.round_robin.fetch_add(1, Ordering::Relaxed) / 1_000 % count,
        };
        self.send_to(partition, record).await
    }

    /// As [`Self::send`], to a partition of the caller's choice.
    pub async fn send_to(&self, partition: u32, record: Record) -> Result<oneshot::Receiver<Outcome>, Error> {
        if let Some(name) = records::repeated_header(&record) {
            let message = format!("header {name} stands twice in a record");
            return Err(Error::Refused { code: tonic::Code::InvalidArgument, reason: "RECORDS".into(), message });
        }
        let bytes = size(&record);
        let units = (bytes.div_ceil(64)).min(self.0.options.memory_bytes / 64).max(1) as u32;
        let _memory = self.0.memory.clone().acquire_many_owned(units).await.map_err(|_| Error::Closed)?;
        let (done, outcome) = oneshot::channel();
        let queued = Queued { record, done, _memory, since: Instant::now() };
        self.partition(partition).send(queued).map_err(|_| Error::Closed)?;
        Ok(outcome)
    }

    fn partition(&self, partition: u32) -> mpsc::UnboundedSender<Queued> {
        let mut partitions = self.0.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        let start = || {
            let (sender, receiver) = mpsc::unbounded_channel();
            let task = Task {
                client: self.0.client.clone(),
                options: self.0.options.clone(),
                topic: self.0.topic.clone(),
                partition,
                producer_id: None,
                next_sequence: 0,
                in_flight: VecDeque::new(),
                next_id: 1,
            };
            tokio::spawn(task.run(Queue { receiver, looked_at: VecDeque::new() }));
            sender
        };
        partitions.entry(partition).or_insert_with(start).clone()
    }
}

/// Looks at the topic's number of partitions until the producer is dropped.
async fn follow_growth(producer: Weak<Inner>) {
    loop {
        tokio::time::sleep(GROWTH_LOOK).await;
        let Some(inner) = producer.upgrade() else { return };
        // a topic deleted meanwhile is for its partitions' streams to notice
        if let Ok(cluster) = inner.client.refresh().await
            && let Some(topic) = cluster.topic(&inner.topic)
        {
            inner.count.fetch_max(topic.partitions.len() as u32, Ordering::Relaxed);
        }
    }
}

fn size(record: &Record) -> usize {
    let headers: usize = record.headers.iter().map(|(n, v)| n.len() + v.len()).sum();
    record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len) + headers + 24
}

struct Batch {
    id: u64,
    bytes: Bytes,
    waiting: Vec<Queued>,
}

struct Task {
    client: Client,
    options: Options,
    topic: String,
    partition: u32,
    producer_id: Option<i64>,
    next_sequence: i32,
    in_flight: VecDeque<Batch>,
    next_id: u64,
}

/// Why a stream was left.
enum Left {
    /// All is sent and answered, and no more records come.
    Finished,
    /// Open another one; the text is for people.
    Again(String),
}

impl Task {
    async fn run(mut self, mut queue: Queue) {
        let mut waits = waits();
        loop {
            let answered_before = self.next_id - self.in_flight.len() as u64;
            let last = match self.stream(&mut queue).await {
                Ok(Left::Finished) => return,
                Ok(Left::Again(why)) => why,
                Err(error) => error.to_string(),
            };
            self.expire(&last, &mut queue);
            if self.next_id - self.in_flight.len() as u64 > answered_before {
                waits = crate::waits();
            }
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
            let _ = self.client.refresh().await;
        }
    }

    /// What is beyond its deadline fails. What follows a batch that was sent must not be taken for it: a new producer id begins.
    fn expire(&mut self, last: &str, queue: &mut Queue) {
        let deadline = self.options.deadline;
        let failed = |queued: Queued| {
            let _ = queued.done.send(Err(Error::Deadline { after: deadline, last: last.to_owned() }));
        };
        queue.expired(deadline).into_iter().for_each(failed);
        let old = |b: &Batch| b.waiting.iter().all(|q| q.since.elapsed() >= deadline);
        if !self.in_flight.front().is_some_and(old) {
            return;
        }
        while let Some(batch) = self.in_flight.pop_front() {
            batch.waiting.into_iter().for_each(failed);
        }
        self.producer_id = None;
    }

    async fn producer_id(&mut self, address: &str) -> Result<i64, Error> {
        if let Some(id) = self.producer_id {
            return Ok(id);
        }
        let mut client = v1::publisher_client::PublisherClient::new(self.client.channel(address)?);
        let asked = client.allocate_producer_ids(v1::AllocateProducerIdsRequest { count: 1 });
        let late = |_| Error::Deadline { after: SILENCE_MAX, last: format!("{address} gives no producer id") };
        let answer = tokio::time::timeout(SILENCE_MAX, asked).await.map_err(late)??;
        let id = answer.into_inner().first_id as i64;
        self.producer_id = Some(id);
        self.next_sequence = 0;
        Ok(id)
    }

    async fn stream(&mut self, queue: &mut Queue) -> Result<Left, Error> {
        let Some(address) = self.client.cluster().leader(&self.topic, self.partition) else {
            return Ok(Left::Again("the partition has no leader".to_owned()));
        };
        self.producer_id(&address).await?;
        let mut client = v1::publisher_client::PublisherClient::new(self.client.channel(&address)?)
            .max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
        let (sender, receiver) = mpsc::channel(IN_FLIGHT_MAX);
        for batch in &self.in_flight {
            let _ = sender.try_send(self.to_wire(batch));
        }
        let open = client.publish_stream(ReceiverStream::new(receiver));
        let mut acks = match tokio::time::timeout(SILENCE_MAX, open).await {
            Ok(answer) => answer?.into_inner(),
            Err(_) => return Ok(Left::Again(format!("{address} does not answer"))),
        };
        let mut open = true;
        let mut heard = Instant::now();
        loop {
            if !open && self.in_flight.is_empty() {
                return Ok(Left::Finished);
            }
            let room = open && self.in_flight.len() < IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                ack = acks.message() => {
                    heard = Instant::now();
                    match ack? {
                        Some(ack) => if let Some(why) = self.answered(ack) { return Ok(Left::Again(why)) },
                        None => return Ok(Left::Again(format!("{address} ended the stream"))),
                    }
                }
                first = queue.recv(), if room => match first {
                    Some(first) => {
                        let batch = self.gather(first, queue).await;
                        let wire = self.to_wire(&batch);
                        if self.in_flight.is_empty() {
                            heard = Instant::now();
                        }
                        self.in_flight.push_back(batch);
                        if sender.send(wire).await.is_err() {
                            return Ok(Left::Again(format!("{address} closed the stream")));
                        }
                    }
                    None => open = false,
                },
                () = tokio::time::sleep(SILENCE_MAX), if !self.in_flight.is_empty() => {
                    if heard.elapsed() >= SILENCE_MAX {
                        return Ok(Left::Again(format!("{address} answers nothing")));
                    }
                }
            }
        }
    }

    /// Takes what is queued, waiting for more up to the linger, as one batch.
    async fn gather(&mut self, first: Queued, queue: &mut Queue) -> Batch {
        let mut bytes = size(&first.record);
        let mut waiting = vec![first];
        let linger = tokio::time::sleep(self.options.linger);
        tokio::pin!(linger);
        while bytes < self.options.batch_bytes {
            let next = match queue.try_recv() {
                Some(next) => Some(next),
                None if self.options.linger.is_zero() => None,
                None => tokio::select! { next = queue.recv() => next, () = &mut linger => None },
            };
            let Some(next) = next else { break };
            bytes += size(&next.record);
            waiting.push(next);
        }
        let list: Vec<Record> = waiting.iter_mut().map(|q| std::mem::take(&mut q.record)).collect();
        let id = self.producer_id.expect("a stream has one");
        let stamp = Stamp { id, epoch: 0, sequence: self.next_sequence };
        let bytes = records::encode(&list, self.options.compression, Some(stamp)).expect("records encode");
        self.next_sequence = ((i64::from(self.next_sequence) + list.len() as i64) & i64::from(i32::MAX)) as i32;
        let id = self.next_id;
        self.next_id += 1;
        Batch { id, bytes, waiting }
    }

    fn to_wire(&self, batch: &Batch) -> v1::PublishBatch {
        v1::PublishBatch {
            id: batch.id,
            topic: self.topic.clone(),
            partition: self.partition,
            batch: batch.bytes.clone(),
        }
    }

    /// Takes an answer; says why where another stream is needed.
    fn answered(&mut self, ack: v1::PublishAck) -> Option<String> {
        use v1::publish_ack::Outcome;
        let at = self.in_flight.iter().position(|b| b.id == ack.id)?;
        match ack.outcome? {
            Outcome::BaseOffset(base) => {
                let batch = self.in_flight.remove(at).expect("just found");
                for (i, queued) in batch.waiting.into_iter().enumerate() {
                    let _ = queued.done.send(Ok(Position { partition: self.partition, offset: base + i as u64 }));
                }
                None
            }
            Outcome::Error(error) => {
                let transient = error.code == tonic::Code::Unavailable as i32
                    || matches!(error.reason.as_str(), "NOT_LEADER" | "LEADERSHIP_LOST" | "OVERLOADED" | "SEQUENCE");
                if transient && !(error.reason == "SEQUENCE" && at == 0) {
                    // a sequence error behind an unanswered batch is that batch's doing
                    return Some(error.message);
                }
                let batch = self.in_flight.remove(at).expect("just found");
                for queued in batch.waiting {
                    let code = tonic::Code::from_i32(error.code);
                    let failure = Error::Refused { code, reason: error.reason.clone(), message: error.message.clone() };
                    let _ = queued.done.send(Err(failure));
                }
                // its sequences are missing now, so what is behind it begins anew
                self.renumber();
                Some(error.message)
            }
        }
    }

    /// After a refused batch: those behind it were refused too (their sequences do not follow); they go out again under a new id.
    fn renumber(&mut self) {
        self.producer_id = None;
        for batch in std::mem::take(&mut self.in_flight) {
            for queued in batch.waiting {
                let message = "a batch before it was refused; send it again".to_owned();
                let code = tonic::Code::Aborted;
                let _ = queued.done.send(Err(Error::Refused { code, reason: "ABORTED".to_owned(), message }));
            }
        }
    }
}
