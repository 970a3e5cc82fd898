//! Answers that hold messages, as bytes on their way to a connection. tonic keeps the buffer of a stream's last answer until the
//! next one, and hands an answer to HTTP/2 as a whole. Here an answer is encoded once it is wanted, given out in
//! pieces as windows open, and its bytes are part of the [budget](crate::budget) until the last of them is written.

use crate::budget::Held;
use bytes::{BufMut as _, Bytes};
use futures::{Stream, StreamExt as _};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;
use tonic::{Response, Status};

/// Bytes given to HTTP/2 at one time; an answer counts as handed out when its last piece is.
const PIECE_BYTES: usize = 64 << 10;
/// gRPC's prefix of a message: a flag and its length.
pub(crate) const PREFIX_BYTES: usize = 5;

/// Bytes an answer takes on the wire.
pub fn wire_bytes(message: &impl Message) -> usize {
    message.encoded_len() + PREFIX_BYTES
}

/// What is done once an answer is handed out (true), or dropped before (false).
pub struct OnEnd(Option<Box<dyn FnOnce(bool) + Send>>);

impl OnEnd {
    fn handed_out(mut self) {
        if let Some(end) = self.0.take() {
            end(true);
        }
    }
}

impl Drop for OnEnd {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end(false);
        }
    }
}

/// An encoded answer.
pub struct Answer {
    bytes: Bytes,
    end: OnEnd,
    pieces: Option<Arc<AtomicU64>>,
}

struct Owned {
    bytes: Vec<u8>,
    _held: Held,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Answer {
    /// Encodes a message that takes its part of the budget until its bytes are written.
    pub fn new(message: &impl Message, held: Held) -> Self {
        let length = message.encoded_len();
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + length);
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        message.encode_raw(&mut bytes);
        Self { bytes: Bytes::from_owner(Owned { bytes, _held: held }), end: OnEnd(None), pieces: None }
    }

    /// With what is done at its end.
    pub fn on_end(self, end: impl FnOnce(bool) + Send + 'static) -> Self {
        Self { end: OnEnd(Some(Box::new(end))), ..self }
    }

    /// Counts the pieces that are handed out.
    pub fn counted(self, pieces: Arc<AtomicU64>) -> Self {
        Self { pieces: Some(pieces), ..self }
    }

    fn into_frames(self) -> impl Stream<Item = Frame<Bytes>> {
        let Self { mut bytes, end, pieces } = self;
        let mut end = Some(end);
        let next = move || {
            if bytes.is_empty() {
                return None;
            }
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            if let Some(pieces) = &pieces {
                pieces.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(end) = end.take_if(|_| bytes.is_empty()) {
                end.handed_out();
            }
            Some(Frame::data(piece))
        };
        futures::stream::iter(std::iter::from_fn(next))
    }
}

/// A body in the making, which [`Answering`] puts in the place of tonic's.
#[derive(Clone)]
struct Replacement(Arc<Mutex<Option<Body>>>);

/// A response whose body is a stream of answers. What tonic itself would send for it is not sent.
pub fn stream<T>(placeholder: T, answers: impl Stream<Item = Result<Answer, Status>> + Send + 'static) -> Response<T> {
    let frames = answers.flat_map(|answer| match answer {
        Ok(answer) => answer.into_frames().map(Ok).left_stream(),
        Err(status) => futures::stream::iter([Err(status)]).right_stream(),
    });
    // the first failure ends it; a status is always last
    let ended = futures::stream::iter([Err(Status::new(tonic::Code::Ok, ""))]);
    let frames = frames.chain(ended).scan(false, |over, frame| {
        let frame = (!*over).then_some(frame);
        *over |= matches!(frame, Some(Err(_)));
        futures::future::ready(frame)
    });
    let frames = frames.map(|frame| {
        frame.or_else(|status| {
            let mut trailers = http::HeaderMap::new();
            status.add_header(&mut trailers)?;
            Ok::<_, Status>(Frame::trailers(trailers))
        })
    });
    let mut response = Response::new(placeholder);
    let body = Body::new(StreamBody::new(frames));
    response.extensions_mut().insert(Replacement(Arc::new(Mutex::new(Some(body)))));
    response
}

/// A response with one answer.
pub fn once<T>(placeholder: T, answer: Answer) -> Response<T> {
    stream(placeholder, futures::stream::iter([Ok(answer)]))
}

fn replace(mut response: http::Response<Body>) -> http::Response<Body> {
    if let Some(Replacement(body)) = response.extensions_mut().remove()
        && let Some(body) = body.lock().unwrap_or_else(PoisonError::into_inner).take()
    {
        *response.body_mut() = body;
    }
    response
}

/// A service whose answers are [`stream`]s.
#[derive(Clone)]
pub struct Answering<S>(pub S);

impl<S: NamedService> NamedService for Answering<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Answering<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible>,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = futures::future::MapOk<S::Future, fn(http::Response<Body>) -> http::Response<Body>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        futures::TryFutureExt::map_ok(self.0.call(request), replace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use http_body_util::BodyExt as _;
    use std::sync::atomic::AtomicUsize;
    use weir_proto::v1;

    fn answer(bytes: usize, budget: &Budget, handed: &Arc<AtomicUsize>) -> Answer {
        let message = v1::Message { value: Some(vec![7; bytes].into()), ..Default::default() };
        let held = budget.answers(Default::default()).try_take(wire_bytes(&message)).unwrap();
        let handed = handed.clone();
        Answer::new(&message, held).on_end(move |all| {
            handed.fetch_add(if all { 1 } else { 100 }, Ordering::SeqCst);
        })
    }

    fn body_of(response: Response<()>) -> Body {
        let (_, (), extensions) = response.into_parts();
        let mut response = http::Response::new(Body::empty());
        *response.extensions_mut() = extensions;
        replace(response).into_body()
    }

    #[tokio::test]
    async fn an_answer_is_in_the_budget_until_its_last_piece_is_gone() {
        let (budget, handed) = (Budget::default(), Arc::new(AtomicUsize::new(0)));
        let fresh = budget.answers(Default::default()).room();
        let large = answer(150_000, &budget, &handed);
        let mut body = body_of(once((), large));
        let mut pieces = Vec::new();
        let mut status = None;
        while let Some(frame) = body.frame().await {
            match frame.unwrap().into_data() {
                Ok(piece) => {
                    assert!(piece.len() <= PIECE_BYTES);
                    pieces.push(piece);
                    assert_eq!(handed.load(Ordering::SeqCst), usize::from(pieces.len() == 3));
                }
                Err(frame) => status = frame.into_trailers().ok(),
            }
        }
        assert_eq!(status.unwrap()["grpc-status"], "0");
        let whole: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
        assert_eq!(u32::from_be_bytes(whole[1..5].try_into().unwrap()) as usize, whole.len() - 5);
        assert_eq!(v1::Message::decode(&whole[5..]).unwrap().value.unwrap().len(), 150_000);
        drop(body);
        let last = pieces.pop();
        drop(pieces);
        assert!(budget.answers(Default::default()).room() < fresh, "the last piece is not written yet");
        drop(last);
        assert_eq!(budget.answers(Default::default()).room(), fresh);
    }

    #[tokio::test]
    async fn a_failure_ends_the_stream_and_what_was_not_handed_out_says_so() {
        let (budget, handed) = (Budget::default(), Arc::new(AtomicUsize::new(0)));
        let (first, second) = (answer(10, &budget, &handed), answer(100_000, &budget, &handed));
        let answers = [Ok(first), Err(Status::aborted("over")), Ok(second)];
        let mut body = body_of(stream((), futures::stream::iter(answers)));
        assert!(body.frame().await.unwrap().unwrap().is_data());
        let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(
            (&trailers["grpc-status"], &trailers["grpc-message"]),
            (&"10".parse().unwrap(), &"over".parse().unwrap())
        );
        assert!(body.frame().await.is_none());
        drop(body);
        assert_eq!(handed.load(Ordering::SeqCst), 101);
    }
}
