//! Inboxes: answers to requests reach their asker at the broker it is connected to.

use super::Context;
use crate::peers;
use crate::status::Failure;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use tokio::sync::mpsc;
use tonic::{Code, Request, Response, Status};
use weir_core::ids::BrokerId;
use weir_core::meta::state::Phase;
use weir_proto::v1;
use weir_proto::v1::requester_server::Requester;

/// Answers an asker has not read yet; beyond them an answer is refused.
const UNREAD_MAX: usize = 128;
/// Bytes of an answer's value.
const ANSWER_BYTES_MAX: usize = 1 << 20;

type Answer = Result<v1::InboxMessage, Status>;

/// The inboxes of a broker.
#[derive(Clone, Default)]
pub struct Inboxes(Arc<Mutex<HashMap<String, mpsc::Sender<Answer>>>>);

impl Inboxes {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<String, mpsc::Sender<Answer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An inbox that is read; it is gone once this is dropped.
struct Open {
    inboxes: Inboxes,
    id: String,
    answers: mpsc::Receiver<Answer>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.inboxes.all().remove(&self.id);
    }
}

impl futures::Stream for Open {
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Option<Answer>> {
        self.answers.poll_recv(cx)
    }
}

#[tonic::async_trait]
impl Requester for Context {
    type InboxStream = Pin<Box<dyn futures::Stream<Item = Answer> + Send>>;

    async fn inbox(&self, _: Request<v1::InboxRequest>) -> Result<Response<Self::InboxStream>, Status> {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let (sender, answers) = mpsc::channel(UNREAD_MAX);
        let address = format!("{}/{id}", self.shared.broker);
        let _ = sender.try_send(Ok(v1::InboxMessage { address, message: None }));
        self.inboxes.all().insert(id.clone(), sender);
        Ok(Response::new(Box::pin(Open { inboxes: self.inboxes.clone(), id, answers })))
    }

    async fn reply(&self, request: Request<v1::ReplyRequest>) -> Result<Response<v1::ReplyResponse>, Status> {
        let request = request.into_inner();
        let wrong = || {
            Failure::invalid(
                "ADDRESS",
                format!("'{}' is not the address of an inbox", request.address.escape_default()),
            )
        };
        let (broker, id) = request.address.split_once('/').ok_or_else(wrong)?;
        let broker = BrokerId(broker.parse().map_err(|_| wrong())?);
        let gone = || Failure::new(Code::NotFound, "NO_INBOX", "the asker is gone: nobody waits for this answer");
        if request.message.as_ref().map_or(0, |m| m.value.len()) > ANSWER_BYTES_MAX {
            let text = format!("an answer has {ANSWER_BYTES_MAX} bytes at most; put more into a topic, and say where");
            return Err(self.rejected(Failure::invalid("TOO_LARGE", text)).into());
        }
        if broker != self.shared.broker {
            let meta = self.shared.meta();
            // one that lost its disk has another id now, at the same address
            let there = meta.broker(broker).filter(|b| b.phase() != Phase::Lost && !request.forwarded);
            let address = there.map(|b| b.client_address.clone()).ok_or_else(gone)?;
            let request = v1::ReplyRequest { forwarded: true, ..request };
            let unreachable = |e: tonic::transport::Error| {
                Failure::new(
                    Code::Unavailable,
                    "NO_INBOX",
                    format!("the asker's broker at {address} is not reached: {e}"),
                )
            };
            let channel = peers::endpoint(&address).map_err(unreachable)?.connect().await.map_err(unreachable)?;
            return v1::requester_client::RequesterClient::new(channel)
                .max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX)
                .reply(request)
                .await;
        }
        let inbox = self.inboxes.all().get(id).cloned().ok_or_else(gone)?;
        match inbox.try_send(Ok(v1::InboxMessage { address: String::new(), message: request.message })) {
            Ok(()) => Ok(Response::new(v1::ReplyResponse {})),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(self.rejected(gone()).into()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                let text = "the asker does not read its answers";
                Err(self.rejected(Failure::new(Code::ResourceExhausted, "INBOX_FULL", text)).into())
            }
        }
    }
}
