//! Publishing: records gather into batches by bytes and linger, batches go out pipelined, answers come back.
//!
//! A record is written into its partition's open batch by the sender itself, so that a record costs neither a message between tasks
//! nor an allocation. Each partition has a task, which keeps its batches in order over retries and failover: after a broken stream
//! it sends all that is unanswered again, from the oldest on, and the broker answers what it already has with its old offset.

use crate::{Client, Error, waits};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::Shared;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use weir_proto::records::{self, Builder, Compression, Record, Stamp};
use weir_proto::v1;

/// Batches unanswered on one partition; below what a broker remembers of a producer (32).
const IN_FLIGHT_MAX: usize = 16;
/// Between two looks at how many partitions a topic has.
const GROWTH_LOOK: Duration = Duration::from_secs(5);
/// A stream that answers nothing for this long while batches wait is taken for dead.
const SILENCE_MAX: Duration = Duration::from_millis(2_000);
/// And is left before, where the others say that the partition has another leader: they are asked this often. A broker whose machine
/// is gone says nothing, and is replaced in less than a second.
const SILENCE_LOOK: Duration = Duration::from_millis(400);
/// Streams that end within this time ask together who leads now.
const ASK_TOGETHER: Duration = Duration::from_millis(20);
/// A batch that cannot go out takes records for no longer than this, or the linger: its records reach their deadline together.
const OPEN_MAX: Duration = Duration::from_millis(100);

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
            linger: Duration::from_micros(500),
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

/// A batch's partition and first offset.
type Outcome = Result<(u32, u64), Error>;

/// Where a record was stored, or why it was not: a future. A record goes its way also where this is dropped.
#[derive(Clone, Debug)]
pub struct Receipt {
    batch: Shared<oneshot::Receiver<Outcome>>,
    /// the record's place in its batch
    at: u32,
}

impl Future for Receipt {
    type Output = Result<Position, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(self.batch.poll_unpin(cx)).unwrap_or(Err(Error::Closed));
        let at = u64::from(self.at);
        Poll::Ready(outcome.map(|(partition, base)| Position { partition, offset: base + at }))
    }
}

/// What a batch's records hold of the producer's memory.
struct Held {
    of: Arc<Semaphore>,
    units: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.of.add_permits(self.units);
    }
}

/// Whom to tell of a batch, and since when they wait.
struct Waiting {
    done: oneshot::Sender<Outcome>,
    /// when its last record came, by a clock that is read quickly and is some milliseconds behind
    last: coarsetime::Instant,
    memory: Held,
}

impl Waiting {
    fn is_late(&self, deadline: Duration) -> bool {
        Duration::from(self.last.elapsed()) >= deadline
    }

    /// Those who do not wait any more need no answer.
    fn tell(self, outcome: Outcome) {
        let _ = self.done.send(outcome);
    }
}

/// A batch that takes records.
struct Open {
    builder: Builder,
    since: Instant,
    first: coarsetime::Instant,
    waiting: Waiting,
    receipts: Shared<oneshot::Receiver<Outcome>>,
}

/// A batch that takes no more, and was not sent.
struct Full {
    builder: Builder,
    waiting: Waiting,
}

#[derive(Default)]
struct Gathered {
    full: VecDeque<Full>,
    open: Option<Open>,
    /// bytes of the batch before, which the next one is likely to have too
    usual_bytes: usize,
    /// no more records come
    ended: bool,
    /// nobody takes them any more
    abandoned: bool,
}

impl Gathered {
    fn close(&mut self, Open { builder, waiting, .. }: Open) -> Full {
        self.usual_bytes = builder.bytes();
        Full { builder, waiting }
    }
}

/// Where one partition's records gather.
#[derive(Default)]
struct Lane {
    gathered: Mutex<Gathered>,
    news: Notify,
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a record of so many bytes into the open batch, which from then on holds the record's share of the memory.
    fn put(
        &self,
        record: &Record,
        bytes: usize,
        options: &Options,
        memory: &Arc<Semaphore>,
        share: SemaphorePermit<'_>,
    ) -> Result<Receipt, Error> {
        let now = coarsetime::Instant::now();
        let mut gathered = self.lock();
        if gathered.abandoned {
            return Err(Error::Closed);
        }
        let lasts = options.linger.max(OPEN_MAX);
        let is_over = |open: &mut Open| {
            open.builder.bytes() + bytes > options.batch_bytes
                || Duration::from(now.duration_since(open.first)) >= lasts
        };
        let mut news = false;
        if let Some(over) = gathered.open.take_if(is_over) {
            let full = gathered.close(over);
            gathered.full.push_back(full);
            news = true;
        }
        let usual_bytes = gathered.usual_bytes;
        let units = share.num_permits();
        share.forget(); // the batch gives it back
        let open = match &mut gathered.open {
            Some(open) => {
                open.waiting.memory.units += units;
                open.waiting.last = now;
                open
            }
            none => {
                news = true;
                let (done, receipts) = oneshot::channel();
                let builder = Builder::new(options.compression, bytes.max(usual_bytes));
                let waiting = Waiting { done, last: now, memory: Held { of: memory.clone(), units } };
                none.insert(Open { builder, since: Instant::now(), first: now, waiting, receipts: receipts.shared() })
            }
        };
        let receipt = Receipt { batch: open.receipts.clone(), at: open.builder.count() };
        open.builder.push(record);
        if open.builder.bytes() >= options.batch_bytes
            && let Some(full) = gathered.open.take()
        {
            let full = gathered.close(full);
            gathered.full.push_back(full);
            news = true;
        }
        drop(gathered);
        if news {
            self.news.notify_one();
        }
        Ok(receipt)
    }

    /// The next batch, once it is full or has lingered; `None` where no more comes.
    async fn next(&self, linger: Duration) -> Option<Full> {
        loop {
            let left = {
                let mut gathered = self.lock();
                if let Some(full) = gathered.full.pop_front() {
                    return Some(full);
                }
                let left = gathered.open.as_ref().map(|open| linger.saturating_sub(open.since.elapsed()));
                if left.is_some_and(|left| left.is_zero() || gathered.ended) {
                    return gathered.open.take().map(|open| gathered.close(open));
                }
                if gathered.ended {
                    return None;
                }
                left
            };
            match left {
                Some(left) => drop(tokio::time::timeout(left, self.news.notified()).await),
                None => self.news.notified().await,
            }
        }
    }

    /// Takes out what has waited for `deadline`.
    fn late(&self, deadline: Duration) -> Vec<Waiting> {
        let mut gathered = self.lock();
        let late = gathered.full.iter().take_while(|full| full.waiting.is_late(deadline)).count();
        let mut out: Vec<Waiting> = gathered.full.drain(..late).map(|full| full.waiting).collect();
        if gathered.full.is_empty() {
            out.extend(gathered.open.take_if(|open| open.waiting.is_late(deadline)).map(|open| open.waiting));
        }
        out
    }

    fn end(&self) {
        self.lock().ended = true;
        self.news.notify_one();
    }
}

struct Inner {
    client: Client,
    options: Options,
    topic: String,
    memory: Arc<Semaphore>,
    /// of the partitions there were at the beginning, once used
    lanes: Vec<OnceLock<Arc<Lane>>>,
    /// of those that came later, or are not there
    more_lanes: Mutex<HashMap<u32, Arc<Lane>>>,
    round_robin: AtomicU32,
    /// partitions the topic has; it may grow
    count: AtomicU32,
    ids: Arc<Ids>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let more = self.more_lanes.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.lanes.iter().filter_map(OnceLock::get).chain(more.values()).for_each(|lane| lane.end());
    }
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
            lanes: (0..count).map(|_| OnceLock::new()).collect(),
            more_lanes: Mutex::default(),
            round_robin: 0.into(),
            count: count.into(),
            ids: Arc::new(Ids { ahead: count.clamp(1, IDS_MAX), left: Default::default() }),
        };
        let inner = Arc::new(inner);
        tokio::spawn(follow_growth(Arc::downgrade(&inner)));
        Ok(Self(inner))
    }

    /// Takes a record once there is memory for it; the receipt gets its position.
    /// Records of one key are stored in the order of their `send`s, as long as the topic keeps its number of partitions;
    /// it is seen to have grown within five seconds, and then keys move to other partitions.
    pub async fn send(&self, record: Record) -> Result<Receipt, Error> {
        let count = self.0.count.load(Ordering::Relaxed);
        let partition = match &record.key {
            Some(key) => records::partition_of(key, count),
            // a run of records stays on one partition, so that batches fill
            None => self.0.round_robin.fetch_add(1, Ordering::Relaxed) / 1_000 % count,
        };
        self.send_to(partition, record).await
    }

    /// As [`Self::send`], to a partition of the caller's choice.
    pub async fn send_to(&self, partition: u32, record: Record) -> Result<Receipt, Error> {
        let refused = |reason: &str, message| {
            let (code, reason) = (tonic::Code::InvalidArgument, reason.to_owned());
            Err(Error::Refused { code, reason, message })
        };
        let bytes = size(&record);
        if bytes > weir_proto::MESSAGE_BYTES_MAX {
            let most = weir_proto::MESSAGE_BYTES_MAX;
            return refused("TOO_LARGE", format!("the record has {bytes} bytes, and a message at most {most}"));
        }
        let Inner { memory, options, .. } = &*self.0;
        let units = (bytes.div_ceil(64)).min(options.memory_bytes / 64).max(1);
        let share = match memory.try_acquire_many(units as u32) {
            Ok(share) => share,
            Err(_) => memory.acquire_many(units as u32).await.map_err(|_| Error::Closed)?,
        };
        let put = |lane: &Lane| lane.put(&record, bytes, options, memory, share);
        match self.0.lanes.get(partition as usize) {
            Some(lane) => put(lane.get_or_init(|| self.start_lane(partition))),
            None => {
                let mut more = self.0.more_lanes.lock().unwrap_or_else(PoisonError::into_inner);
                put(more.entry(partition).or_insert_with(|| self.start_lane(partition)))
            }
        }
    }

    fn start_lane(&self, partition: u32) -> Arc<Lane> {
        let lane = Arc::<Lane>::default();
        let task = Task {
            lane: lane.clone(),
            client: self.0.client.clone(),
            options: self.0.options.clone(),
            topic: self.0.topic.clone(),
            partition,
            ids: self.0.ids.clone(),
            producer_id: None,
            topic_id: 0,
            stored: false,
            next_sequence: 0,
            in_flight: VecDeque::new(),
            next_id: 1,
            tried: None,
        };
        tokio::spawn(task.run());
        lane
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
    let length = |b: &Option<Bytes>| b.as_ref().map_or(0, Bytes::len);
    let headers: usize = record.headers.iter().map(|(n, v)| n.len() + length(v)).sum();
    length(&record.key) + length(&record.value) + headers + 24
}

/// A batch under way.
struct Batch {
    id: u64,
    bytes: Bytes,
    waiting: Waiting,
}

struct Task {
    lane: Arc<Lane>,
    client: Client,
    options: Options,
    topic: String,
    partition: u32,
    ids: Arc<Ids>,
    producer_id: Option<i64>,
    /// of the topic that the producer's sequences are of; 0 where it is not known
    topic_id: u64,
    /// something was stored under the producer's id
    stored: bool,
    next_sequence: i32,
    in_flight: VecDeque<Batch>,
    next_id: u64,
    /// where the last stream went
    tried: Option<String>,
}

impl Drop for Task {
    /// However it ended: nobody waits for what nobody sends.
    fn drop(&mut self) {
        let unsent = std::mem::replace(&mut *self.lane.lock(), Gathered { abandoned: true, ..Default::default() });
        drop(unsent); // which wakes those who wait, with nothing locked
    }
}

/// Most producer ids asked for at once.
const IDS_MAX: u32 = 1_000;

/// Producer ids that were given to this producer: one for each partition, so all of them are asked for with the first.
struct Ids {
    ahead: u32,
    left: tokio::sync::Mutex<Range<i64>>,
}

impl Ids {
    /// The caller decides how long to wait for the broker.
    async fn next(&self, client: &Client, address: &str) -> Result<i64, Error> {
        let mut left = self.left.lock().await;
        if let Some(id) = left.next() {
            return Ok(id);
        }
        let mut client = v1::publisher_client::PublisherClient::new(client.channel(address)?);
        let asked = client.allocate_producer_ids(v1::AllocateProducerIdsRequest { count: self.ahead });
        let first = asked.await?.into_inner().first_id as i64;
        *left = first + 1..first + i64::from(self.ahead);
        Ok(first)
    }
}

/// Why a stream was left.
enum Left {
    /// All is sent and answered, and no more records come.
    Finished,
    /// Open another one; the text is for people.
    Again(String),
}

impl Task {
    async fn run(mut self) {
        let mut waits = waits();
        loop {
            let answered_before = self.next_id - self.in_flight.len() as u64;
            let last = match self.stream().await {
                Ok(Left::Finished) => return,
                Ok(Left::Again(why)) => why,
                Err(error) => error.to_string(),
            };
            self.expire(&last);
            if self.next_id - self.in_flight.len() as u64 > answered_before {
                waits = crate::waits();
            }
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
            // another lane, or a look at a silent broker, may have found the new leader
            let leader = self.client.cluster().leader(&self.topic, self.partition);
            if leader.is_none() || leader == self.tried {
                self.client.refresh_once(ASK_TOGETHER).await;
            }
        }
    }

    /// Ends, with the reason, when a broker is to be left that says nothing: it was heard at `heard`.
    fn silence(&self, address: &str, heard: Instant) -> impl Future<Output = String> + Send + use<> {
        let (client, topic, partition) = (self.client.clone(), self.topic.clone(), self.partition);
        let address = address.to_owned();
        async move {
            let end = heard + SILENCE_MAX;
            let mut look = heard + SILENCE_LOOK;
            while look < end {
                tokio::time::sleep_until(look.into()).await;
                look = Instant::now() + SILENCE_LOOK;
                if client.cluster().metadata.brokers.len() < 2 {
                    continue; // there are no others
                }
                let asked = client.refresh_once(SILENCE_LOOK / 2);
                let Ok(cluster) = tokio::time::timeout(SILENCE_LOOK, asked).await else { continue };
                if let Some(leader) = cluster.leader(&topic, partition).filter(|l| *l != address) {
                    return format!("{address} answers nothing, and {leader} leads the partition now");
                }
            }
            tokio::time::sleep_until(end.into()).await;
            format!("{address} answers nothing")
        }
    }

    /// What is beyond its deadline fails. What follows a batch that was sent must not be taken for it: a new producer id begins.
    fn expire(&mut self, last: &str) {
        let deadline = self.options.deadline;
        let failed = |waiting: Waiting| waiting.tell(Err(Error::Deadline { after: deadline, last: last.to_owned() }));
        self.lane.late(deadline).into_iter().for_each(failed);
        if !self.in_flight.front().is_some_and(|batch| batch.waiting.is_late(deadline)) {
            return;
        }
        self.in_flight.drain(..).for_each(|batch| failed(batch.waiting));
        self.producer_id = None;
    }

    async fn producer_id(&mut self, address: &str) -> Result<i64, Error> {
        if let Some(id) = self.producer_id {
            return Ok(id);
        }
        let id = self.ids.next(&self.client, address).await?;
        self.producer_id = Some(id);
        self.stored = false;
        self.next_sequence = 0;
        Ok(id)
    }

    async fn stream(&mut self) -> Result<Left, Error> {
        let Some(address) = self.client.cluster().leader(&self.topic, self.partition) else {
            return Ok(Left::Again("the partition has no leader".to_owned()));
        };
        self.tried = Some(address.clone());
        let silence = self.silence(&address, Instant::now());
        tokio::select! {
            id = self.producer_id(&address) => { id?; }
            why = silence => return Ok(Left::Again(why)),
        }
        if !self.stored {
            self.topic_id = self.client.cluster().topic(&self.topic).map_or(0, |t| t.id);
        }
        let mut client = v1::publisher_client::PublisherClient::new(self.client.channel(&address)?)
            .max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
        let (sender, receiver) = mpsc::channel(IN_FLIGHT_MAX);
        for batch in &self.in_flight {
            let _ = sender.try_send(self.to_wire(batch));
        }
        let mut heard = Instant::now();
        let mut acks = tokio::select! {
            answer = client.publish_stream(ReceiverStream::new(receiver)) => answer?.into_inner(),
            why = self.silence(&address, heard) => return Ok(Left::Again(why)),
        };
        let mut open = true;
        heard = Instant::now();
        // of the time since then; made when it has been silent for a while
        let mut silence = None;
        loop {
            if !open && self.in_flight.is_empty() {
                return Ok(Left::Finished);
            }
            let room = open && self.in_flight.len() < IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                ack = acks.message() => {
                    (heard, silence) = (Instant::now(), None);
                    match ack? {
                        Some(ack) => if let Some(why) = self.answered(ack) { return Ok(Left::Again(why)) },
                        None => return Ok(Left::Again(format!("{address} ended the stream"))),
                    }
                }
                full = self.lane.next(self.options.linger), if room => match full {
                    Some(full) => {
                        let batch = self.stamp(full);
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
                () = tokio::time::sleep_until((heard + SILENCE_LOOK).into()), if silence.is_none() && !self.in_flight.is_empty() => {
                    silence = Some(Box::pin(self.silence(&address, heard)));
                }
                why = async { silence.as_mut().expect("guarded").await }, if silence.is_some() => return Ok(Left::Again(why)),
            }
        }
    }

    /// Makes a batch the next one of this producer.
    fn stamp(&mut self, Full { builder, waiting }: Full) -> Batch {
        let id = self.producer_id.expect("a stream has one");
        let stamp = Stamp { id, epoch: 0, sequence: self.next_sequence };
        self.next_sequence =
            ((i64::from(self.next_sequence) + i64::from(builder.count())) & i64::from(i32::MAX)) as i32;
        let bytes = builder.finish(Some(stamp)).expect("records encode");
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
            topic_id: self.topic_id,
        }
    }

    /// Takes an answer; says why where another stream is needed.
    fn answered(&mut self, ack: v1::PublishAck) -> Option<String> {
        use v1::publish_ack::Outcome;
        let at = self.in_flight.iter().position(|b| b.id == ack.id)?;
        match ack.outcome? {
            Outcome::BaseOffset(base) => {
                let batch = self.in_flight.remove(at).expect("just found");
                self.stored = true;
                batch.waiting.tell(Ok((self.partition, base)));
                None
            }
            Outcome::Error(error) if error.reason == "TOPIC_RECREATED" => Some(self.begin_in_new_topic(error)),
            Outcome::Error(error) => {
                let transient = error.code == tonic::Code::Unavailable as i32
                    || matches!(error.reason.as_str(), "NOT_LEADER" | "LEADERSHIP_LOST" | "OVERLOADED" | "SEQUENCE");
                if transient && !(error.reason == "SEQUENCE" && at == 0) {
                    // a sequence error behind an unanswered batch is that batch's doing
                    return Some(error.message);
                }
                let batch = self.in_flight.remove(at).expect("just found");
                let code = tonic::Code::from_i32(error.code);
                let (reason, message) = (error.reason, error.message.clone());
                batch.waiting.tell(Err(Error::Refused { code, reason, message }));
                // its sequences are missing now, so what is behind it begins anew
                self.renumber();
                Some(error.message)
            }
        }
    }

    /// The topic was re-created, which knows nothing of this producer. Where nothing was stored under its id the batches are a beginning,
    /// and go to the new topic as they are. Otherwise their sequences continue those of the topic before: their senders decide.
    fn begin_in_new_topic(&mut self, error: v1::Error) -> String {
        if !self.stored {
            return error.message; // the next stream asks for the new topic's id
        }
        self.producer_id = None;
        let v1::Error { code, message, reason, .. } = error;
        let code = tonic::Code::from_i32(code);
        for batch in std::mem::take(&mut self.in_flight) {
            let (reason, message) = (reason.clone(), message.clone());
            batch.waiting.tell(Err(Error::Refused { code, reason, message }));
        }
        message
    }

    /// After a refused batch: those behind it were refused too (their sequences do not follow); they go out again under a new id.
    fn renumber(&mut self) {
        self.producer_id = None;
        for batch in std::mem::take(&mut self.in_flight) {
            let (code, reason) = (tonic::Code::Aborted, "ABORTED".to_owned());
            let message = "a batch before it was refused; send it again".to_owned();
            batch.waiting.tell(Err(Error::Refused { code, reason, message }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: usize = 1_000;

    struct Fixture {
        lane: Arc<Lane>,
        options: Options,
        memory: Arc<Semaphore>,
    }

    impl Fixture {
        fn new(batch_bytes: usize) -> Self {
            let options = Options { batch_bytes, linger: Duration::from_secs(3_600), ..Default::default() };
            Self { lane: Arc::default(), options, memory: Arc::new(Semaphore::new(MEMORY)) }
        }

        fn put(&self, bytes: usize) -> Result<Receipt, Error> {
            let record = Record { value: Some(vec![b'x'; bytes].into()), ..Default::default() };
            let share = self.memory.try_acquire_many(10).unwrap();
            self.lane.put(&record, size(&record), &self.options, &self.memory, share)
        }

        fn held(&self) -> usize {
            MEMORY - self.memory.available_permits()
        }
    }

    fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        future.now_or_never()
    }

    #[test]
    fn records_of_a_batch_get_the_offsets_that_follow_its_first() {
        let at = Fixture::new(1_000);
        let receipts = [at.put(10).unwrap(), at.put(10).unwrap()];
        let batch = now(at.lane.next(Duration::ZERO)).flatten().unwrap();
        assert_eq!((batch.builder.count(), at.held()), (2, 20));
        assert!(now(receipts[1].clone()).is_none(), "nobody has stored it");
        batch.waiting.tell(Ok((3, 40)));
        let offsets = receipts.map(|r| now(r).unwrap().unwrap());
        assert_eq!(offsets, [40, 41].map(|offset| Position { partition: 3, offset }));
        assert_eq!(at.held(), 0, "its memory is free again");
    }

    #[tokio::test]
    async fn a_batch_goes_when_the_next_record_has_no_room_in_it_and_not_before() {
        let at = Fixture::new(1_000);
        at.put(100).unwrap();
        assert!(now(at.lane.next(at.options.linger)).is_none());
        at.put(5_000).unwrap();
        let first = now(at.lane.next(at.options.linger)).flatten().unwrap();
        let second = now(at.lane.next(at.options.linger)).flatten().expect("it is full");
        assert_eq!((first.builder.count(), second.builder.count()), (1, 1));
        at.put(10).unwrap();
        assert!(now(at.lane.next(at.options.linger)).is_none());
    }

    #[test]
    fn what_waits_when_no_more_comes_goes_at_once() {
        let at = Fixture::new(1_000);
        at.put(10).unwrap();
        at.lane.end();
        assert!(now(at.lane.next(at.options.linger)).unwrap().is_some());
        assert!(now(at.lane.next(at.options.linger)).unwrap().is_none());
    }

    #[test]
    fn what_has_waited_too_long_is_taken_out_in_order() {
        let at = Fixture::new(1_000);
        let receipts = [at.put(900).unwrap(), at.put(900).unwrap()];
        assert!(at.lane.late(Duration::from_secs(3_600)).is_empty());
        let late = at.lane.late(Duration::ZERO);
        assert_eq!((late.len(), at.held()), (2, 20));
        late.into_iter().for_each(|waiting| waiting.tell(Err(Error::Closed)));
        assert!(receipts.into_iter().all(|r| matches!(now(r), Some(Err(Error::Closed)))));
        assert_eq!(at.held(), 0);
    }

    #[test]
    fn a_lane_that_nobody_takes_from_refuses_and_keeps_no_memory() {
        let at = Fixture::new(1_000);
        let waits = at.put(10).unwrap();
        let task = Task {
            lane: at.lane.clone(),
            client: Client::new("127.0.0.1:1").unwrap(),
            options: at.options.clone(),
            topic: "t".into(),
            partition: 0,
            ids: Arc::new(Ids { ahead: 1, left: Default::default() }),
            producer_id: None,
            topic_id: 0,
            stored: false,
            next_sequence: 0,
            in_flight: VecDeque::new(),
            next_id: 1,
            tried: None,
        };
        drop(task); // as where its runtime ends
        assert!(matches!(now(waits), Some(Err(Error::Closed))));
        assert!(matches!(at.put(10), Err(Error::Closed)));
        assert_eq!(at.held(), 0);
    }
}
