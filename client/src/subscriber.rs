//! Reading a subscription: all partitions of all its topics at once, opened again after failovers, new ones as they appear.

use crate::consumer::{From, Message, PassedOver, Pull, offsets_of};
use crate::{Client, Cluster, Error, Record, full_name, waits};
use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use weir_proto::v1;

/// Between two looks at which partitions there are.
const GROWTH_LOOK: Duration = Duration::from_secs(5);
/// The same, where a pattern says which topics.
const TOPICS_LOOK: Duration = Duration::from_millis(500);
/// Lists of messages on their way from all partitions; what more there is stays with the brokers.
const LISTS_MAX: usize = 4;

/// How a subscriber reads.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name among the members of the subscription.
    pub member: String,
    /// Messages of one partition that are under way or unanswered; more are sent as these are acked or given back.
    pub credit: u32,
    /// Messages that [`Subscriber::next`] will be asked for at most: no partition is asked for more. `None` for no end.
    pub max: Option<u64>,
    /// Is sent which batches are passed over since their records cannot be decoded, in whatever mode; it is known before any message
    /// behind them is delivered. What it has no room for is only logged, as it is where there is none.
    pub passed_over: Option<mpsc::Sender<PassedOver>>,
}

impl Default for Options {
    fn default() -> Self {
        let member = format!("weir-{}-{:08x}", std::process::id(), fastrand::u32(..));
        Self { member, credit: 1_000, max: None, passed_over: None }
    }
}

/// What is to become of a message.
#[derive(Debug)]
enum Action {
    Drop,
    Ack(u64),
    Nack(u64, Option<Duration>),
    Extend(u64, Duration),
}

/// A message that must be answered: [`Delivered::ack`] or [`Delivered::nack`]. One that is dropped comes again after its deadline.
#[derive(Debug)]
pub struct Delivered {
    /// The message.
    pub message: Message,
    actions: mpsc::UnboundedSender<Action>,
    answered: bool,
    from: Arc<Source>,
}

#[derive(Debug)]
struct Source {
    client: Client,
    subscription: String,
    subscription_id: u64,
}

impl Drop for Delivered {
    fn drop(&mut self) {
        if !self.answered {
            let _ = self.actions.send(Action::Drop); // another may come in its place
        }
    }
}

impl Delivered {
    /// It is done with. Should the broker fail before it has heard, the message comes again.
    pub fn ack(mut self) {
        self.answered = true;
        let _ = self.actions.send(Action::Ack(self.message.offset));
    }

    /// It is done with, and this came of it: the records are published to `topic` (all to the partition of the first one's key) and the
    /// message is acked, in one step. Says where they lie; `None` where the message was acked before. An error leaves the message
    /// delivered as it was: it comes again after its deadline, and its result is published once, however often this is called.
    pub async fn ack_with_publish(self, topic: &str, records: Vec<Record>) -> Result<Option<(u32, u64)>, Error> {
        let messages = records.into_iter().map(v1::Message::from).collect();
        let result = v1::AcknowledgeWithPublishRequest { to: topic.to_owned(), messages, ..Default::default() };
        self.ack_publishing(result).await
    }

    /// It is a dead letter: the broker publishes it again, as it was, to the topic it came from, for the subscription that failed at it,
    /// and acks it here in one step. Returns its new place; `None` where that was done before. After an error it stays a dead letter.
    pub async fn give_back(self) -> Result<Option<(u32, u64)>, Error> {
        self.ack_publishing(v1::AcknowledgeWithPublishRequest { give_back: true, ..Default::default() }).await
    }

    async fn ack_publishing(mut self, what: v1::AcknowledgeWithPublishRequest) -> Result<Option<(u32, u64)>, Error> {
        let (client, message) = (&self.from.client, &self.message);
        let request = v1::AcknowledgeWithPublishRequest {
            subscription: self.from.subscription.clone(),
            subscription_id: self.from.subscription_id,
            topic: message.topic.to_string(),
            topic_id: message.topic_id,
            partition: message.partition,
            offset: message.offset,
            ..what
        };
        let call = |address: String| {
            let request = request.clone();
            async move {
                let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
                let mut subscriber = v1::subscriber_client::SubscriberClient::new(channel)
                    .max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
                Ok(subscriber.acknowledge_with_publish(request).await?.into_inner())
            }
        };
        let answer = client.at_leader(&message.topic, message.partition, Duration::from_secs(30), call).await?;
        self.answered = true;
        let _ = self.actions.send(Action::Drop); // there is room for another
        Ok((!answer.already).then_some((answer.partition, answer.base_offset)))
    }

    /// It failed: it comes again after `delay`, or by the subscription's back-off.
    pub fn nack(mut self, delay: Option<Duration>) {
        self.answered = true;
        let _ = self.actions.send(Action::Nack(self.message.offset, delay));
    }

    /// It needs longer: its deadline is `deadline` from now.
    pub fn extend(&self, deadline: Duration) {
        let _ = self.actions.send(Action::Extend(self.message.offset, deadline));
    }
}

type Lists = mpsc::Sender<Result<Vec<Delivered>, Error>>;

/// A member of a subscription. Closed or dropped it leaves: what was acked is sent first, and what was not, prefetched messages
/// included, is for others at once without being counted as failed. [`Subscriber::close`] waits for that; a process that
/// ends before loses its connection, and then what was handed out to it counts as one failed delivery.
pub struct Subscriber {
    lists: mpsc::Receiver<Result<Vec<Delivered>, Error>>,
    here: VecDeque<Delivered>,
    /// messages given to the caller
    seen: Arc<AtomicU64>,
    /// ends when all partitions' tasks have
    tasks: mpsc::Receiver<()>,
}

impl Subscriber {
    /// Opens all partitions. Refused where another member holds an exclusive subscription.
    pub async fn open(client: &Client, subscription: &str, options: Options) -> Result<Self, Error> {
        let cluster = client.connect(Duration::from_secs(10)).await?;
        let full = full_name(subscription);
        let found = cluster.subscription(&full).ok_or_else(|| Error::no_subscription(&full))?;
        let wanted = found.spec.as_ref().map(|s| s.topic.clone()).unwrap_or_default();
        let many = weir_proto::is_pattern(&wanted);
        if !many && found.topics.is_empty() {
            return Err(Error::no_topic(&wanted));
        }
        let (lists, receiver) = mpsc::channel(LISTS_MAX);
        let (task, tasks) = mpsc::channel(1);
        let (open, seen) = (Open::default(), Arc::new(AtomicU64::new(0)));
        let partition = |topic: &str, partition| Partition {
            client: client.clone(),
            subscription: full.clone(),
            topic: topic.to_owned(),
            partition,
            many,
            options: options.clone(),
            lists: lists.clone(),
            open: open.clone(),
            seen: seen.clone(),
            _task: task.clone(),
        };
        // one after the other: two that open an exclusive subscription at once do not share it between them
        let mut opened = Vec::new();
        for topic in &found.topics {
            let count = cluster.topic(topic).map_or(0, |t| t.partitions.len() as u32);
            for at in 0..count {
                let partition = partition(topic, at);
                opened.push((partition.open().await?, partition));
            }
        }
        for (pull, partition) in opened {
            partition.spawn(pull);
        }
        tokio::spawn(follow_growth(partition("", 0)));
        Ok(Self { lists: receiver, here: VecDeque::new(), seen, tasks })
    }

    /// Leaves the subscription once the brokers know what was acked; what was not comes to others at once.
    pub async fn close(self) {
        let Self { lists, here, mut tasks, .. } = self;
        drop((lists, here));
        while tasks.recv().await.is_some() {}
    }

    /// The next message, of any partition; `None` once all partitions have ended (the subscription was deleted, say).
    pub async fn next(&mut self) -> Option<Result<Delivered, Error>> {
        loop {
            if let Some(next) = self.here.pop_front() {
                self.seen.fetch_add(1, Ordering::Relaxed);
                return Some(Ok(next));
            }
            match self.lists.recv().await? {
                Ok(list) => self.here.extend(list),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Moves a subscription's position in all partitions, whoever reads it; to an offset only where all partitions have it. What was
/// leased before the move comes again where it lies behind the new position.
pub async fn seek(client: &Client, subscription: &str, to: From) -> Result<(), Error> {
    use v1::seek_request::To;
    let topic_id = if let From::OffsetOf { topic_id, .. } = to { topic_id } else { 0 };
    let to = match to {
        From::Earliest => To::Earliest(true),
        From::Latest => To::Latest(true),
        From::Offset(offset) | From::OffsetOf { offset, .. } => To::Offset(offset),
        From::Time(time) => To::TimeMs(time),
    };
    seek_all(client, subscription, to, topic_id).await
}

/// Moves a subscription back to a snapshot of it, in all partitions: what was not acked then comes again.
pub async fn seek_to_snapshot(client: &Client, subscription: &str, snapshot: &str) -> Result<(), Error> {
    seek_all(client, subscription, v1::seek_request::To::Snapshot(snapshot.to_owned()), 0).await
}

/// Refuses an offset that one of the partitions does not have, before any is moved.
async fn check_all(
    client: &Client,
    cluster: &Cluster,
    topics: &[String],
    (offset, topic_id): (u64, u64),
) -> Result<(), Error> {
    for topic in topics {
        for partition in 0..cluster.topic(topic).map_or(0, |t| t.partitions.len() as u32) {
            let v1::ListOffsetsResponse { start_offset: start, high_watermark: end, .. } =
                offsets_of(client, topic, topic_id, partition, None).await?;
            if !(start..=end).contains(&offset) {
                let text = format!(
                    "offset {offset} is outside of the log of partition {partition} of {topic}, which has {start} to {end}; \
                     no partition was moved"
                );
                return Err(Error::Refused {
                    code: tonic::Code::OutOfRange,
                    reason: "OFFSET".to_owned(),
                    message: text,
                });
            }
        }
    }
    Ok(())
}

async fn seek_all(client: &Client, subscription: &str, to: v1::seek_request::To, topic_id: u64) -> Result<(), Error> {
    let cluster = client.connect(Duration::from_secs(10)).await?;
    let full = full_name(subscription);
    let topics = cluster.subscription(&full).map(|s| s.topics.clone());
    let topics = topics.ok_or_else(|| Error::no_subscription(&full))?;
    if let v1::seek_request::To::Offset(offset) = to {
        check_all(client, &cluster, &topics, (offset, topic_id)).await?;
    }
    for topic in &topics {
        let count = cluster.topic(topic).map_or(0, |t| t.partitions.len() as u32);
        for partition in 0..count {
            let (subscription, topic_name, to) = (full.clone(), topic.clone(), Some(to.clone()));
            // a seek is of whatever has the name now
            let request =
                v1::SeekRequest { subscription, topic: topic_name, partition, to, topic_id, subscription_id: 0 };
            let call = |address: String| {
                let request = request.clone();
                async move {
                    let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
                    Ok(v1::subscriber_client::SubscriberClient::new(channel).seek(request).await?.into_inner())
                }
            };
            client.at_leader(topic, partition, Duration::from_secs(10), call).await?;
        }
    }
    Ok(())
}

/// Opens partitions that appear until the subscriber is dropped; those of a topic made again under its name too.
async fn follow_growth(like: Partition) {
    let look = if like.many { TOPICS_LOOK } else { GROWTH_LOOK };
    loop {
        tokio::select! {
            () = like.lists.closed() => return,
            () = tokio::time::sleep(look) => {}
        }
        let Ok(cluster) = like.client.refresh().await else { continue };
        let Some(found) = cluster.subscription(&like.subscription) else { continue };
        if found.topics.is_empty() && !like.many {
            return;
        }
        for topic in &found.topics {
            for partition in 0..cluster.topic(topic).map_or(0, |t| t.partitions.len() as u32) {
                let next = Partition { topic: topic.clone(), partition, ..like.clone() };
                if next.is_open() {
                    continue;
                }
                match next.open().await {
                    Ok(pull) => next.spawn(pull),
                    Err(Error::Deadline { .. }) => break, // it has no leader yet: the next look tries again
                    Err(error) if next.is_gone(&error) => break,
                    Err(error) => return drop(like.lists.send(Err(error)).await),
                }
            }
        }
    }
}

/// Partitions that are read, by topic and number.
type Open = Arc<Mutex<HashSet<(String, u32)>>>;

/// How a stream ended.
enum Ended {
    /// Open it again; whether it brought anything.
    Again { served: bool },
    /// It will fail again.
    Failed(Error),
}

#[derive(Clone)]
struct Partition {
    client: Client,
    subscription: String,
    topic: String,
    partition: u32,
    /// of one topic of many: its end is not the subscription's
    many: bool,
    options: Options,
    lists: Lists,
    open: Open,
    seen: Arc<AtomicU64>,
    _task: mpsc::Sender<()>,
}

impl Partition {
    /// Messages that are wanted still.
    fn wanted(&self) -> u64 {
        self.options.max.map_or(u64::MAX, |max| max.saturating_sub(self.seen.load(Ordering::Relaxed)))
    }

    /// Opens the partition. Also says for how many messages it was given credit.
    async fn open(&self) -> Result<(Pull, u64), Error> {
        let Options { member, credit, .. } = &self.options;
        let credit = u64::from(*credit).min(self.wanted()) as u32;
        let pull = Pull::open(&self.client, &self.subscription, &self.topic, self.partition, member, credit).await?;
        Ok((pull.saying(self.options.passed_over.clone()), credit.into()))
    }

    fn all_open(&self) -> MutexGuard<'_, HashSet<(String, u32)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_open(&self) -> bool {
        self.all_open().contains(&(self.topic.clone(), self.partition))
    }

    /// Reads it in a task of its own.
    fn spawn(self, pull: (Pull, u64)) {
        let key = (self.topic.clone(), self.partition);
        self.all_open().insert(key.clone());
        let open = self.open.clone();
        tokio::spawn(async move {
            self.run(pull).await;
            open.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        });
    }

    /// Whether a topic among many was deleted.
    fn is_gone(&self, error: &Error) -> bool {
        self.many
            && matches!(error, Error::Refused { code: tonic::Code::NotFound, reason, .. } if reason != "NO_SUBSCRIPTION")
    }

    /// Delivers and answers until the subscriber is dropped; opens again after a failover.
    async fn run(self, (mut pull, mut asked): (Pull, u64)) {
        let mut waits = waits();
        loop {
            // answers to messages of a stream that ended say nothing to the next: those come again
            let (actions, receiver) = mpsc::unbounded_channel();
            let ended = self.serve(&mut pull, asked, actions, receiver).await;
            if self.lists.is_closed() {
                return pull.close().await;
            }
            match ended {
                Ended::Failed(error) if self.is_gone(&error) => return,
                Ended::Failed(error) => return drop(self.lists.send(Err(error)).await),
                Ended::Again { served: true } => waits = crate::waits(),
                Ended::Again { served: false } => {}
            }
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
            let _ = self.client.refresh().await;
            match self.open().await {
                Ok(again) => (pull, asked) = again,
                // for as long as it takes: a cluster may be away for minutes
                Err(Error::Deadline { last, .. }) => tracing::warn!(partition = self.partition, last, "opening again"),
                Err(error) if self.is_gone(&error) => return,
                Err(error) => return drop(self.lists.send(Err(error)).await),
            }
        }
    }

    /// Until the stream ends or nobody listens any more.
    async fn serve(
        &self,
        pull: &mut Pull,
        mut asked: u64,
        actions: mpsc::UnboundedSender<Action>,
        mut receiver: mpsc::UnboundedReceiver<Action>,
    ) -> Ended {
        let mut served = false;
        let wanted = self.wanted();
        let mut waiting: VecDeque<Vec<Message>> = VecDeque::new();
        let (client, subscription) = (self.client.clone(), self.subscription.clone());
        let from = Arc::new(Source { client, subscription, subscription_id: pull.subscription_id() });
        loop {
            tokio::select! {
                biased;
                () = self.lists.closed() => {
                    // what was answered already is still told
                    while let Ok(action) = receiver.try_recv() {
                        let _ = self.answer(pull, action, 0, &mut receiver).await;
                    }
                    return Ended::Again { served };
                }
                action = receiver.recv() => {
                    let Some(action) = action else { return Ended::Again { served } };
                    match self.answer(pull, action, wanted.saturating_sub(asked), &mut receiver).await {
                        Ok(credit) => asked += credit,
                        Err(_) => return Ended::Again { served },
                    }
                }
                next = pull.next() => match next {
                    Ok(Some(messages)) if messages.is_empty() => {}
                    Ok(Some(messages)) => {
                        served = true;
                        waiting.push_back(messages); // as many as there is credit for
                    }
                    Ok(None) => return Ended::Again { served },
                    Err(error) => return Ended::Failed(error),
                },
                room = self.lists.reserve(), if !waiting.is_empty() => {
                    let (Ok(room), Some(messages)) = (room, waiting.pop_front()) else { continue };
                    let deliver = |message| Delivered {
                        message,
                        actions: actions.clone(),
                        answered: false,
                        from: from.clone(),
                    };
                    room.send(Ok(messages.into_iter().map(deliver).collect()));
                }
            }
        }
    }

    /// Sends what has been answered since, in one request, acks as ranges. What is done with is credit for as many more, at most
    /// `credit_max`; gives that.
    async fn answer(
        &self,
        pull: &Pull,
        first: Action,
        credit_max: u64,
        receiver: &mut mpsc::UnboundedReceiver<Action>,
    ) -> Result<u64, Error> {
        let (mut acks, mut nacks, mut extensions) = (Vec::new(), Vec::new(), Vec::new());
        let mut dropped = 0;
        let mut action = Some(first);
        while let Some(next) = action {
            match next {
                Action::Drop => dropped += 1,
                Action::Ack(offset) => acks.push(offset),
                Action::Nack(offset, delay) => nacks.push((offset, delay)),
                Action::Extend(offset, deadline) => extensions.push((offset, deadline)),
            }
            action = (acks.len() + dropped < self.options.credit as usize).then(|| receiver.try_recv().ok()).flatten();
        }
        acks.sort_unstable();
        let credit = ((acks.len() + nacks.len() + dropped) as u64).min(credit_max);
        pull.answer(&acks, &nacks, &extensions, credit as u32).await?;
        Ok(credit)
    }
}
