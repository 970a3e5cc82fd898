//! Inboxes: answers to requests reach their asker at the broker it is connected to. An answer that is given to another broker is passed on
//! to that one's peer port.

use super::Context;
use crate::answer::{self, Answer};
use crate::budget::Answers;
use crate::peers;
use crate::status::Failure;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use tokio::sync::mpsc;
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;
use weir_core::ids::BrokerId;
use weir_core::meta::state::Phase;
use weir_proto::v1;
use weir_proto::v1::requester_server::Requester;

/// Answers an asker has not read yet; beyond them an answer is refused.
const UNREAD_MAX: usize = 128;
/// Bytes of an answer, with its headers: a value of 1 MiB and what belongs to it.
const MESSAGE_BYTES_MAX: usize = (1 << 20) + (64 << 10);
/// Bytes of an inbox's address: a broker's id, a slash and 32 digits of the inbox.
const ADDRESS_BYTES_MAX: usize = 20 + 1 + 32;

/// An inbox that is read: where its answers go, and the room they have.
#[derive(Clone)]
struct Inbox {
    to: mpsc::Sender<Answer>,
    answers: Answers,
}

/// The inboxes of a broker.
#[derive(Clone, Default)]
pub struct Inboxes(Arc<Mutex<HashMap<String, Inbox>>>);

impl Inboxes {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<String, Inbox>> {
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
    type Item = Result<Answer, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Option<Self::Item>> {
        self.answers.poll_recv(cx).map(|answer| answer.map(Ok))
    }
}

#[tonic::async_trait]
impl Requester for Context {
    type InboxStream = Pin<Box<dyn futures::Stream<Item = Result<v1::InboxMessage, Status>> + Send>>;

    async fn inbox(&self, request: Request<v1::InboxRequest>) -> Result<Response<Self::InboxStream>, Status> {
        let room = self.answers(&request);
        let id = uuid::Uuid::new_v4().simple().to_string();
        let (sender, answers) = mpsc::channel(UNREAD_MAX);
        let address = format!("{}/{id}", self.shared.broker);
        let first = v1::InboxMessage { address, message: None };
        let held = room.take(answer::wire_bytes(&first)).await;
        let _ = sender.try_send(Answer::new(&first, held));
        self.inboxes.all().insert(id.clone(), Inbox { to: sender, answers: room });
        let open = Open { inboxes: self.inboxes.clone(), id, answers };
        Ok(answer::stream(Box::pin(futures::stream::empty()), open))
    }

    async fn reply(&self, request: Request<v1::ReplyRequest>) -> Result<Response<v1::ReplyResponse>, Status> {
        let v1::ReplyRequest { address, message } = request.into_inner();
        let message = message.ok_or_else(|| self.rejected(Failure::invalid("EMPTY", "a reply holds a message")))?;
        let place = Place::parse(&address).map_err(|f| self.rejected(f))?;
        if place.broker == self.shared.broker {
            self.put_into_inbox(&place, message).map_err(|f| self.rejected(f))?;
            return Ok(Response::new(v1::ReplyResponse {}));
        }
        check_size(&message).map_err(|f| self.rejected(f))?;
        let meta = self.shared.meta();
        // one that lost its disk has another id now, at the same address
        let there = meta.broker(place.broker).filter(|b| b.phase() != Phase::Lost);
        let peer_address = &there.ok_or_else(gone)?.peer_address;
        let unreachable = |e: tonic::transport::Error| {
            let text = format!("the asker's broker at {peer_address} is not reached: {e}");
            Failure::new(Code::Unavailable, "NO_INBOX", text)
        };
        let channel = self.channels.to(peer_address).map_err(unreachable)?;
        let request =
            v1::PassReplyRequest { hello: Some(self.hello_to(place.broker)), address, message: Some(message) };
        peers::client(channel).pass_reply(request).await.map_err(|status| {
            let reason = status.get_details_error_info().map_or(String::new(), |info| info.reason);
            if reason == "OTHER_BROKER" { gone().into() } else { status } // its inboxes went with its disk
        })
    }
}

/// Where an answer goes: `BROKER/ID`.
struct Place<'a> {
    broker: BrokerId,
    id: &'a str,
}

impl<'a> Place<'a> {
    fn parse(address: &'a str) -> Result<Self, Failure> {
        let place = Some(address).filter(|address| address.len() <= ADDRESS_BYTES_MAX);
        let place = place.and_then(|place| place.split_once('/'));
        let place = place.and_then(|(broker, id)| Some((broker.parse().ok()?, id)));
        let wrong = || {
            let shown: String = address.chars().take(ADDRESS_BYTES_MAX).flat_map(char::escape_default).collect();
            format!("'{shown}' is not the address of an inbox")
        };
        let (broker, id) = place.ok_or_else(|| Failure::invalid("ADDRESS", wrong()))?;
        Ok(Self { broker: BrokerId(broker), id })
    }
}

fn gone() -> Failure {
    Failure::new(Code::NotFound, "NO_INBOX", "the asker is gone: nobody waits for this answer")
}

fn check_size(message: &v1::Message) -> Result<(), Failure> {
    if prost::Message::encoded_len(message) <= MESSAGE_BYTES_MAX {
        return Ok(());
    }
    let text = format!(
        "an answer has {MESSAGE_BYTES_MAX} bytes at most, headers included; publish more to a topic, and answer with its offset"
    );
    Err(Failure::invalid("TOO_LARGE", text))
}

impl Context {
    /// Puts an answer that a client of another broker gave into an inbox here.
    pub(super) fn take_reply(&self, address: &str, message: Option<v1::Message>) -> Result<(), Failure> {
        let message = message.ok_or_else(|| Failure::invalid("EMPTY", "a reply holds a message"))?;
        self.put_into_inbox(&Place::parse(address)?, message)
    }

    fn put_into_inbox(&self, place: &Place<'_>, message: v1::Message) -> Result<(), Failure> {
        check_size(&message)?;
        let here = || self.inboxes.all().get(place.id).cloned();
        let inbox = Some(place.broker).filter(|b| *b == self.shared.broker).and_then(|_| here()).ok_or_else(gone)?;
        let message = v1::InboxMessage { address: String::new(), message: Some(message) };
        let held = inbox.answers.try_take(answer::wire_bytes(&message));
        match held.map(|held| inbox.to.try_send(Answer::new(&message, held))) {
            Some(Ok(())) => Ok(()),
            Some(Err(mpsc::error::TrySendError::Closed(_))) => Err(gone()),
            None | Some(Err(mpsc::error::TrySendError::Full(_))) => {
                Err(Failure::new(Code::ResourceExhausted, "INBOX_FULL", "the asker does not read its answers"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_a_broker_and_an_inbox_and_is_bounded() {
        let longest = format!("{}/{}", u64::MAX, uuid::Uuid::nil().simple());
        let place = Place::parse(&longest).unwrap();
        assert_eq!((place.broker, place.id.len()), (BrokerId(u64::MAX), 32));
        let long = format!("1/{}", "x".repeat(3 << 20));
        for bad in ["", "1", "x/y", &format!("{longest}0"), &long] {
            let refused = Place::parse(bad).err().unwrap();
            assert_eq!((refused.code, refused.reason), (Code::InvalidArgument, "ADDRESS"));
            assert!(refused.message.len() < 200, "{}", refused.message);
        }
    }
}
