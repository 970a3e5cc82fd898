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

/// A record that was read.
#[derive(Clone, Debug)]
pub struct Message {
    /// Full name of its topic.
    pub topic: Arc<str>,
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
    /// At the first record appended at or after this time, ms since the epoch.
    Time(u64),
}

/// A plain message as a record.
pub(crate) fn record_of(message: v1::Message) -> Record {
    let v1::Message { key, value, headers, timestamp_ms, .. } = message;
    let key = (!key.is_empty()).then_some(key);
    Record { key, value: Some(value), headers: headers.into_iter().collect(), timestamp_ms }
}

/// A record as a plain message.
pub(crate) fn message_of(record: Record) -> v1::Message {
    v1::Message {
        key: record.key.unwrap_or_default(),
        value: record.value.unwrap_or_default(),
        headers: record.headers.into_iter().collect(),
        timestamp_ms: record.timestamp_ms,
        ..Default::default()
    }
}

/// A message as it came one by one.
fn received(topic: &Arc<str>, m: v1::ReceivedMessage) -> Message {
    let record = record_of(m.message.unwrap_or_default());
    let (partition, offset) = (m.partition, m.offset);
    Message { topic: topic.clone(), partition, offset, append_time_ms: m.append_time_ms, delivery: m.delivery, record }
}

fn unpack(topic: &Arc<str>, partition: u32, batch: &v1::Batch, from: u64) -> Result<Vec<Message>, Error> {
    let bad = |what: String| Error::Refused { code: tonic::Code::DataLoss, reason: "BATCH".into(), message: what };
    let message = |at, record| Message {
        topic: topic.clone(),
        partition,
        offset: batch.base_offset + at as u64,
        append_time_ms: batch.append_time_ms,
        delivery: 1,
        record,
    };
    let mut messages = records::decode_as(&batch.batch, message).map_err(bad)?;
    if from > batch.base_offset {
        messages.retain(|m| m.offset >= from);
    }
    Ok(messages)
}

/// Where a position stands in a partition's log.
pub async fn offsets(
    client: &Client,
    topic: &str,
    partition: u32,
    time_ms: u64,
) -> Result<v1::ListOffsetsResponse, Error> {
    client
        .at_leader(topic, partition, Duration::from_secs(10), |address| async move {
            let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
            let request = v1::ListOffsetsRequest { topic: topic.to_owned(), partition, time_ms };
            Ok(v1::log_client::LogClient::new(channel).list_offsets(request).await?.into_inner())
        })
        .await
}

/// Reads one partition from a place on and sends whole batches' messages; follows the leader; ends when the receiver is dropped,
/// or, with `until_end`, at the high watermark as it is met.
pub async fn read_partition(
    client: Client,
    topic: String,
    partition: u32,
    from: From,
    until_end: bool,
    out: mpsc::Sender<Result<Vec<Message>, Error>>,
) {
    if let Err(error) = read(&client, &topic, partition, from, until_end, &out).await {
        let _ = out.send(Err(error)).await;
    }
}

async fn read(
    client: &Client,
    topic: &str,
    partition: u32,
    from: From,
    until_end: bool,
    out: &mpsc::Sender<Result<Vec<Message>, Error>>,
) -> Result<(), Error> {
    let time = if let From::Time(time) = from { time } else { 0 };
    let ends = offsets(client, topic, partition, time).await?;
    let mut offset = match from {
        From::Earliest => ends.start_offset,
        From::Latest => ends.high_watermark,
        From::Offset(offset) => offset,
        From::Time(_) => ends.offset,
    };
    if until_end && offset >= ends.high_watermark {
        return Ok(());
    }
    let mut waits = waits();
    let name = Arc::from(crate::full_name(topic));
    loop {
        let request =
            v1::FetchRequest { topic: topic.to_owned(), partition, offset, bytes_max: ANSWER_BYTES, wait_ms: 1_000 };
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
                let messages = unpack(&name, partition, batch, offset)?;
                offset = batch.base_offset + u64::from(batch.count);
                if out.send(Ok(messages)).await.is_err() {
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

/// One partition of a subscription, of any mode.
pub struct Pull {
    requests: mpsc::Sender<v1::PullRequest>,
    responses: tonic::Streaming<v1::PullResponse>,
    topic: Arc<str>,
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
        client
            .at_leader(topic, partition, Duration::from_secs(10), |address| async move {
                let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
                let (requests, receiver) = mpsc::channel(16);
                let (subscription, member) = (subscription.to_owned(), member.to_owned());
                let open = v1::PullOpen { subscription, topic: topic.to_owned(), partition, member, messages: false };
                let first = v1::PullRequest { open: Some(open), credit_messages: credit, ..Default::default() };
                let _ = requests.try_send(first);
                let client = v1::subscriber_client::SubscriberClient::new(channel);
                let mut client = client.max_decoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
                let responses = client.streaming_pull(ReceiverStream::new(receiver)).await?.into_inner();
                Ok(Self { requests, responses, topic: topic.into(), partition })
            })
            .await
    }

    /// The next messages, in order; `None` where the stream ended and is to be opened again.
    pub async fn next(&mut self) -> Result<Option<Vec<Message>>, Error> {
        match self.responses.message().await {
            Ok(Some(response)) => {
                let mut out: Vec<Message> = response.messages.into_iter().map(|m| received(&self.topic, m)).collect();
                for batch in &response.batches {
                    let messages = unpack(&self.topic, self.partition, batch, response.from_offset)?;
                    out.extend(messages.into_iter().filter(|m| m.offset < response.until_offset));
                }
                for again in &response.redelivered {
                    out.iter_mut().filter(|m| m.offset == again.offset).for_each(|m| m.delivery = again.delivery);
                }
                Ok(Some(out))
            }
            Ok(None) => Ok(None),
            Err(status) if is_transient(&status) => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// Ends the stream once the broker has heard all that was said on it, or after a second.
    pub async fn close(self) {
        let Self { requests, mut responses, .. } = self;
        drop(requests);
        let to_the_end = async { while let Ok(Some(_)) = responses.message().await {} };
        let _ = tokio::time::timeout(Duration::from_secs(1), to_the_end).await;
    }

    /// Acks these messages, and gives credit for as many more.
    pub async fn ack_all(&self, messages: &[Message]) -> Result<(), Error> {
        let offsets: Vec<u64> = messages.iter().map(|m| m.offset).collect();
        self.answer(&offsets, &[], &[], 0).await
    }

    /// Gives a message back: it comes again after `delay`, or by the subscription's back-off.
    pub async fn nack(&self, offset: u64, delay: Option<Duration>) -> Result<(), Error> {
        self.answer(&[], &[(offset, delay)], &[], 0).await
    }

    /// Keeps a message for longer, from now.
    pub async fn extend(&self, offset: u64, deadline: Duration) -> Result<(), Error> {
        self.answer(&[], &[], &[(offset, deadline)], 0).await
    }

    /// Acks, gives back and keeps for longer in one request; what was acked or given back is credit for as many more, and `credit`
    /// for so many beside.
    pub async fn answer(
        &self,
        acks: &[u64],
        nacks: &[(u64, Option<Duration>)],
        extensions: &[(u64, Duration)],
        credit: u32,
    ) -> Result<(), Error> {
        let mut request =
            v1::PullRequest { credit_messages: (acks.len() + nacks.len()) as u32 + credit, ..Default::default() };
        for &offset in acks {
            match request.acks.last_mut().filter(|last| last.end == offset) {
                Some(last) => last.end += 1,
                None => request.acks.push(v1::OffsetRange { start: offset, end: offset + 1 }),
            }
        }
        let ms = |d: Duration| d.as_millis() as u64;
        let nacked = |(offset, delay): &(u64, Option<Duration>)| v1::Nacked {
            start: *offset,
            end: offset + 1,
            delay_ms: delay.map(ms),
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
