//! Request and reply: a question is an ordinary message on a topic, its answer comes to an inbox at a broker.

use crate::producer::{Options, Producer};
use crate::{Client, Error, waits};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use weir_proto::records::Record;
use weir_proto::v1;

/// Header of a request: where its answer goes.
pub const REPLY_TO: &str = "weir-reply-to";
/// Header of a request and of its answer: which belong together.
pub const CORRELATION_ID: &str = "weir-correlation-id";

type Pending = Arc<Mutex<HashMap<Bytes, oneshot::Sender<Record>>>>;

/// Asks and waits for answers. One serves any number of requests at a time.
pub struct Requester {
    client: Client,
    pending: Pending,
    /// the inbox's address, empty while there is none
    address: watch::Receiver<String>,
    producers: tokio::sync::Mutex<HashMap<String, Producer>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Requester {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Requester {
    /// Opens an inbox at any broker, and another where that one fails.
    pub fn open(client: &Client) -> Self {
        let (told, address) = watch::channel(String::new());
        let pending = Pending::default();
        let task = tokio::spawn(keep_inbox(client.clone(), pending.clone(), told));
        Self { client: client.clone(), pending, address, producers: Default::default(), task }
    }

    /// Publishes a question and waits for its first answer; later ones are dropped. Fails after `within`: whether the question
    /// was worked on is then unknown.
    pub async fn request(&self, topic: &str, question: Record, within: Duration) -> Result<Record, Error> {
        let asked = self.ask(topic, question);
        let last = format!("no answer from the readers of {topic}");
        tokio::time::timeout(within, asked).await.unwrap_or(Err(Error::Deadline { after: within, last }))
    }

    async fn ask(&self, topic: &str, mut question: Record) -> Result<Record, Error> {
        let mut address = self.address.clone();
        let address = address.wait_for(|a| !a.is_empty()).await.map_err(|_| Error::Closed)?.clone();
        let id = Bytes::from(format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)));
        question.set_header(REPLY_TO, address);
        question.set_header(CORRELATION_ID, id.clone());
        let (answered, answer) = oneshot::channel();
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), answered);
        // also when this is dropped because time is up
        let _forget = Forget(&self.pending, id);
        let producer = self.producer(topic).await?;
        producer.send(question).await?.await?;
        answer.await.map_err(|_| Error::Closed)
    }

    async fn producer(&self, topic: &str) -> Result<Producer, Error> {
        let mut producers = self.producers.lock().await;
        if let Some(producer) = producers.get(topic) {
            return Ok(producer.clone());
        }
        let options = Options { linger: Duration::ZERO, ..Default::default() };
        let producer = Producer::open(&self.client, topic, options).await?;
        producers.insert(topic.to_owned(), producer.clone());
        Ok(producer)
    }
}

struct Forget<'a>(&'a Pending, Bytes);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

async fn keep_inbox(client: Client, pending: Pending, told: watch::Sender<String>) {
    let mut waits = waits();
    loop {
        if let Err(error) = read_inbox(&client, &pending, &told).await {
            tracing::debug!(%error, "the inbox ended; opening another");
        } else {
            waits = crate::waits();
        }
        told.send_replace(String::new());
        tokio::time::sleep(waits.next().unwrap_or(Duration::from_millis(200))).await;
    }
}

/// Hands answers to who waits for them; one nobody waits for (any more) is dropped.
async fn read_inbox(client: &Client, pending: &Pending, told: &watch::Sender<String>) -> Result<(), Error> {
    let cluster = client.connect(Duration::from_secs(10)).await?;
    let Some(address) = cluster.answered_by() else { return Ok(()) }; // it has just started
    let mut requester = v1::requester_client::RequesterClient::new(client.channel(&address)?)
        .max_decoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
    let mut answers = requester.inbox(v1::InboxRequest {}).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        let Some(message) = answer.message else {
            told.send_replace(answer.address);
            continue;
        };
        let record = Record::from(message);
        let waiting = record
            .header(CORRELATION_ID)
            .and_then(|id| pending.lock().unwrap_or_else(PoisonError::into_inner).remove(id));
        if let Some(waiting) = waiting {
            let _ = waiting.send(record);
        }
    }
    Ok(())
}

/// Whether a message asks for an answer.
pub fn is_request(message: &Record) -> bool {
    message.header(REPLY_TO).is_some()
}

/// Answers a request. Refused with NOT_FOUND where the asker is gone: it gave up, or was restarted.
pub async fn reply(client: &Client, request: &Record, mut answer: Record) -> Result<(), Error> {
    let missing = |name: &str| Error::Refused {
        code: tonic::Code::InvalidArgument,
        reason: "NO_REPLY_TO".to_owned(),
        message: format!("the message has no header {name}: it asks for no answer"),
    };
    let address = request.header(REPLY_TO).ok_or_else(|| missing(REPLY_TO))?;
    let id = request.header(CORRELATION_ID).ok_or_else(|| missing(CORRELATION_ID))?.clone();
    answer.set_header(CORRELATION_ID, id);
    let request =
        v1::ReplyRequest { address: String::from_utf8_lossy(address).into_owned(), message: Some(answer.into()) };
    client
        .anywhere(|address| {
            let request = request.clone();
            async move {
                let channel = client.channel(&address).map_err(|e| tonic::Status::internal(e.to_string()))?;
                let requester = v1::requester_client::RequesterClient::new(channel);
                let mut requester = requester.max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX);
                Ok(requester.reply(request).await?.into_inner())
            }
        })
        .await
        .map(drop)
}
