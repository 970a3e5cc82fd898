//! Reading: a topic's partitions by offset, and an exclusive subscription with acks.

use crate::{Client, Error, is_transient, waits};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use weir_proto::records::{self, Record};
use weir_proto::v1;

/// What the broker reads for one answer. Buffers of more are given back to the system and taken anew each time.
const ANSWER_BYTES: u32 = 1 << 20;
/// Time that [`Pull::close`] waits for the broker to end the stream. A process that exits earlier drops its connection, and the messages
/// in flight to it count as failed deliveries.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// How often a subscription is opened again whose topic or which itself was re-created.
const RECREATED_TRIES: u32 = 10;

/// A record that was read.
#[derive(Clone, Debug)]
pub struct Message {
    /// Full name of its topic.
    pub topic: Arc<str>,
    /// Id of its topic: with it, an offset that is kept says which topic it is of ([`From::OffsetOf`]).
    pub topic_id: u64,
    /// Partition.
    pub partition: u32,
    /// Offset.
    pub offset: u64,
    /// When the leader appended it, ms since the epoch.
    pub append_time_ms: u64,
    /// One more than the deliveries that failed: 1 for the first.
    pub delivery: u32,
    /// The record.
    pub record: Record,
}

/// Where reading a topic starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// At the oldest record kept.
    Earliest,
    /// After the newest.
    Latest,
    /// At an offset.
    Offset(u64),
    /// At an offset that was read earlier, of the topic that had this id then: refused if the topic was re-created meanwhile.
    OffsetOf { topic_id: u64, offset: u64 },
    /// At the first record appended at or after this time, ms since the epoch.
    Time(u64),
}

/// A message as it came one by one.
fn received(topic: &Arc<str>, topic_id: u64, m: v1::ReceivedMessage) -> Message {
    let record = m.message.unwrap_or_default().into();
    let v1::ReceivedMessage { partition, offset, append_time_ms, delivery, .. } = m;
    Message { topic: topic.clone(), topic_id, partition, offset, append_time_ms, delivery, record }
}

/// A batch whose records cannot be decoded: every reader passes over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// Full name of its topic.
    pub topic: Arc<str>,
    /// Partition.
    pub partition: u32,
    /// Its first offset, or the one that reading started from inside it.
    pub first: u64,
    /// One past its last offset.
    pub next: u64,
    /// What is wrong with it.
    pub why: String,
}

impl PassedOver {
    fn log(&self) {
        let Self { topic, partition, first, next, why } = self;
        tracing::warn!(%topic, partition, first, next, why, "records cannot be decoded: their batch is passed over");
    }
}

/// What comes of reading a partition by offset.
#[derive(Clone, Debug)]
pub enum Read {
    /// The messages of a batch.
    Messages(Vec<Message>),
    /// No messages of a batch.
    PassedOver(PassedOver),
}

/// The messages of a batch from an offset on.
fn unpack(
    (topic, topic_id): (&Arc<str>, u64),
    partition: u32,
    batch: &v1::Batch,
    from: u64,
) -> Result<Vec<Message>, PassedOver> {
    let message = |at, record| Message {
        topic: topic.clone(),
        topic_id,
        partition,
        offset: batch.base_offset + at as u64,
        append_time_ms: batch.append_time_ms,
        delivery: 1,
        record,
    };
    match records::decode_as(&batch.batch, message) {
        Ok(mut messages) => {
            if from > batch.base_offset {
                messages.retain(|m| m.offset >= from);
            }
            Ok(messages)
        }
        Err(why) => {
            let (first, next) = (batch.base_offset.max(from), end_of(batch));
            Err(PassedOver { topic: topic.clone(), partition, first, next, why: why.to_string() })
        }
    }
}

/// One past the last offset of a batch.
fn end_of(batch: &v1::Batch) -> u64 {
    batch.base_offset.saturating_add(batch.count.into())
}

/// Both ends of a partition's log, and the offset at a time, ms since the epoch.
pub async fn offsets(
    client: &Client,
    topic: &str,
    partition: u32,
    time_ms: Option<u64>,
) -> Result<v1::ListOffsetsResponse, Error> {
    offsets_of(client, topic, 0, partition, time_ms).await
}

/// As [`offsets`], of the topic with this id only; 0 stands for any.
async fn offsets_of(
    client: &Client,
    topic: &str,
    topic_id: u64,
    partition: u32,
    time_ms: Option<u64>,
) -> Result<v1::ListOffsetsResponse, Error> {
    client
        .at_leader(topic, partition, Duration::from_secs(10), |address| async move {
            let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
            let request = v1::ListOffsetsRequest { topic: topic.to_owned(), partition, time_ms, topic_id };
            Ok(v1::log_client::LogClient::new(channel).list_offsets(request).await?.into_inner())
        })
        .await
}

/// Reads one partition from a place on and sends whole batches' messages; follows the leader; ends when the receiver is dropped,
/// or, with `until_end`, at the high watermark as it is met. A topic that is deleted and re-created meanwhile ends it with an error of
/// the reason `TOPIC_RECREATED`: its offsets are of the topic before. Batches that cannot be decoded are logged and passed over;
/// [`read_partition_and_say`] sends which they are.
pub async fn read_partition(
    client: Client,
    topic: String,
    partition: u32,
    from: From,
    until_end: bool,
    out: mpsc::Sender<Result<Vec<Message>, Error>>,
) {
    let messages = |read| match read {
        Read::Messages(messages) => messages,
        Read::PassedOver(batch) => {
            batch.log();
            Vec::new()
        }
    };
    if let Err(error) = read(&client, &topic, partition, from, until_end, &out, messages).await {
        let _ = out.send(Err(error)).await;
    }
}

/// As [`read_partition`]; also sends which batches were passed over, in their place between the messages.
pub async fn read_partition_and_say(
    client: Client,
    topic: String,
    partition: u32,
    from: From,
    until_end: bool,
    out: mpsc::Sender<Result<Read, Error>>,
) {
    if let Err(error) = read(&client, &topic, partition, from, until_end, &out, |read| read).await {
        let _ = out.send(Err(error)).await;
    }
}

async fn read<T>(
    client: &Client,
    topic: &str,
    partition: u32,
    from: From,
    until_end: bool,
    out: &mpsc::Sender<Result<T, Error>>,
    item: impl Fn(Read) -> T,
) -> Result<(), Error> {
    let time = if let From::Time(time) = from { Some(time) } else { None };
    let known_id = if let From::OffsetOf { topic_id, .. } = from { topic_id } else { 0 };
    let ends = offsets_of(client, topic, known_id, partition, time).await?;
    // offsets are of this topic, not of one that is re-created under its name while it is read
    let topic_id = ends.topic_id;
    let mut offset = match from {
        From::Earliest => ends.start_offset,
        From::Latest => ends.high_watermark,
        From::Offset(offset) | From::OffsetOf { offset, .. } => offset,
        From::Time(_) => ends.offset,
    };
    if until_end && offset >= ends.high_watermark {
        return Ok(());
    }
    let mut waits = waits();
    let name = Arc::from(crate::full_name(topic));
    loop {
        let request = v1::FetchRequest {
            topic: topic.to_owned(),
            partition,
            offset,
            bytes_max: Some(ANSWER_BYTES),
            wait_ms: 1_000,
            topic_id,
        };
        let mut responses = client
            .at_leader(topic, partition, Duration::from_secs(30), |address| {
                let request = request.clone();
                async move {
                    let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
                    let log = v1::log_client::LogClient::new(channel);
                    let mut log = log.max_decoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
                    Ok(log.fetch_stream(request).await?.into_inner())
                }
            })
            .await?;
        loop {
            let response = match responses.message().await {
                Ok(Some(response)) => response,
                Ok(None) => break,
                Err(status) if is_transient(&status) => break,
                Err(status) => return Err(status.into()),
            };
            for batch in &response.batches {
                let read = unpack((&name, topic_id), partition, batch, offset);
                offset = end_of(batch);
                if out.send(Ok(item(read.map_or_else(Read::PassedOver, Read::Messages)))).await.is_err() {
                    return Ok(());
                }
            }
            if until_end && offset >= response.high_watermark {
                return Ok(());
            }
            if out.is_closed() {
                return Ok(());
            }
        }
        tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
        let _ = client.refresh().await;
    }
}

/// Offsets, in order, as ranges.
fn runs(offsets: &[u64]) -> Vec<v1::OffsetRange> {
    let mut out: Vec<v1::OffsetRange> = Vec::new();
    for &offset in offsets {
        match out.last_mut().filter(|last| last.end == offset) {
            Some(last) => last.end += 1,
            None => out.push(v1::OffsetRange { start: offset, end: offset + 1 }),
        }
    }
    out
}

/// One partition of a subscription, of any mode.
pub struct Pull {
    requests: mpsc::Sender<v1::PullRequest>,
    responses: tonic::Streaming<v1::PullResponse>,
    topic: Arc<str>,
    topic_id: u64,
    subscription_id: u64,
    partition: u32,
}

impl Pull {
    /// Opens a partition of a subscription's topic (a full name) as `member`, with credit for so many messages.
    pub async fn open(
        client: &Client,
        subscription: &str,
        topic: &str,
        partition: u32,
        member: &str,
        credit: u32,
    ) -> Result<Self, Error> {
        let open = || {
            let cluster = client.cluster();
            v1::PullOpen {
                subscription: subscription.to_owned(),
                topic: topic.to_owned(),
                partition,
                member: member.to_owned(),
                messages: false,
                topic_id: cluster.topic(topic).map_or(0, |t| t.id),
                subscription_id: cluster.subscription(subscription).map_or(0, |s| s.id),
            }
        };
        let mut tries = 0;
        loop {
            match Self::open_as(client, open(), credit).await {
                Err(Error::Refused { reason, .. }) if reason.ends_with("_RECREATED") && tries < RECREATED_TRIES => {
                    // what this client knew is old, or what the broker knows is older still
                    tokio::time::sleep(Duration::from_millis(50) * tries).await;
                    tries += 1;
                    client.refresh().await?;
                }
                other => return other,
            }
        }
    }

    async fn open_as(client: &Client, open: v1::PullOpen, credit: u32) -> Result<Self, Error> {
        let (name, topic_id, partition) = (open.topic.clone(), open.topic_id, open.partition);
        let subscription_id = open.subscription_id;
        let call = |address: String| {
            let (open, topic) = (open.clone(), name.as_str().into());
            async move {
                let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
                let (requests, receiver) = mpsc::channel(16);
                let first = v1::PullRequest { open: Some(open), credit_messages: credit, ..Default::default() };
                let _ = requests.try_send(first);
                let client = v1::subscriber_client::SubscriberClient::new(channel);
                let mut client = client.max_decoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
                let responses = client.streaming_pull(ReceiverStream::new(receiver)).await?.into_inner();
                Ok(Self { requests, responses, topic, topic_id, subscription_id, partition })
            }
        };
        client.at_leader(&name, partition, Duration::from_secs(10), call).await
    }

    /// Id of the subscription that delivers; 0 where the client had not heard of it.
    pub(crate) fn subscription_id(&self) -> u64 {
        self.subscription_id
    }

    /// The next messages, in order; `None` where the stream ended and is to be opened again.
    pub async fn next(&mut self) -> Result<Option<Vec<Message>>, Error> {
        match self.responses.message().await {
            Ok(Some(response)) => {
                let mut out: Vec<Message> =
                    response.messages.into_iter().map(|m| received(&self.topic, self.topic_id, m)).collect();
                let mut unreadable = Vec::new();
                for batch in &response.batches {
                    match unpack((&self.topic, self.topic_id), self.partition, batch, response.from_offset) {
                        Ok(messages) => out.extend(messages.into_iter().filter(|m| m.offset < response.until_offset)),
                        Err(passed) => {
                            passed.log();
                            let end = passed.next.min(response.until_offset);
                            unreadable.push(v1::OffsetRange { start: passed.first, end });
                        }
                    }
                }
                for again in &response.redelivered {
                    out.iter_mut().filter(|m| m.offset == again.offset).for_each(|m| m.delivery = again.delivery);
                }
                self.report(unreadable);
                Ok(Some(out))
            }
            Ok(None) => Ok(None),
            Err(status) if is_transient(&status) => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// Names batches that cannot be decoded: the broker passes over them, and they take no credit.
    fn report(&self, unreadable: Vec<v1::OffsetRange>) {
        if unreadable.is_empty() {
            return;
        }
        let count: u64 = unreadable.iter().map(|range| range.end.saturating_sub(range.start)).sum();
        let credit_messages = u32::try_from(count).unwrap_or(u32::MAX);
        let request = v1::PullRequest { unreadable, credit_messages, ..Default::default() };
        let requests = self.requests.clone();
        // in a task of its own, so that `next` may be cancelled; a stream that has ended delivers the batch again
        tokio::spawn(async move { requests.send(request).await });
    }

    /// Leaves: ends the stream once the broker has taken all that was sent on it, or after five seconds. What was not answered is for
    /// others at once, and does not count as failed.
    pub async fn close(self) {
        let Self { requests, mut responses, .. } = self;
        drop(requests);
        let to_the_end = async { while let Ok(Some(_)) = responses.message().await {} };
        let _ = tokio::time::timeout(CLOSE_WITHIN, to_the_end).await;
    }

    /// Acks these messages, and gives credit for as many more.
    pub async fn ack_all(&self, messages: &[Message]) -> Result<(), Error> {
        let offsets: Vec<u64> = messages.iter().map(|m| m.offset).collect();
        self.answer(&offsets, &[], &[], offsets.len() as u32).await
    }

    /// Gives a message back: it comes again after `delay`, or by the subscription's back-off. Gives credit for another.
    pub async fn nack(&self, offset: u64, delay: Option<Duration>) -> Result<(), Error> {
        self.answer(&[], &[(offset, delay)], &[], 1).await
    }

    /// Returns messages that nobody saw: they are for others at once, and no failed delivery is counted.
    pub async fn release(&self, offsets: &[u64]) -> Result<(), Error> {
        let released = |r: v1::OffsetRange| v1::Nacked { start: r.start, end: r.end, delay_ms: None, uncounted: true };
        let nacks = runs(offsets).into_iter().map(released).collect();
        let request = v1::PullRequest { nacks, ..Default::default() };
        self.requests.send(request).await.map_err(|_| Error::Closed)
    }

    /// Keeps a message for longer, from now.
    pub async fn extend(&self, offset: u64, deadline: Duration) -> Result<(), Error> {
        self.answer(&[], &[], &[(offset, deadline)], 0).await
    }

    /// Acks, gives back and keeps for longer in one request, with credit for so many more.
    pub async fn answer(
        &self,
        acks: &[u64],
        nacks: &[(u64, Option<Duration>)],
        extensions: &[(u64, Duration)],
        credit: u32,
    ) -> Result<(), Error> {
        let mut request = v1::PullRequest { credit_messages: credit, acks: runs(acks), ..Default::default() };
        let ms = |d: Duration| d.as_millis() as u64;
        let nacked = |(offset, delay): &(u64, Option<Duration>)| v1::Nacked {
            start: *offset,
            end: offset + 1,
            delay_ms: delay.map(ms),
            uncounted: false,
        };
        request.nacks = nacks.iter().map(nacked).collect();
        let extended = |(offset, deadline): &(u64, Duration)| v1::Extension {
            start: *offset,
            end: offset + 1,
            deadline_ms: ms(*deadline),
        };
        request.extensions = extensions.iter().map(extended).collect();
        self.requests.send(request).await.map_err(|_| Error::Closed)
    }

    /// Acks everything from `start` up to and not including `end`, and gives credit for as many more.
    pub async fn ack(&self, start: u64, end: u64) -> Result<(), Error> {
        let acks = vec![v1::OffsetRange { start, end }];
        let request = v1::PullRequest { acks, credit_messages: (end - start) as u32, ..Default::default() };
        self.requests.send(request).await.map_err(|_| Error::Closed)
    }
}
