//! What a dispatcher has sent to one stream and the connection has not taken yet. Such messages were never handed out: whatever ends the
//! stream, they return to their places uncounted, and their leases do not run out meanwhile.

use crate::answer::{Answer, wire_bytes};
use crate::budget::{Answers, Held};
use futures::{Stream, StreamExt as _};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use weir_core::cursor::OffsetRange;
use weir_proto::v1;

/// Responses that wait for the connection; beyond half of them the member gets nothing more.
const UNTAKEN_MAX: usize = 16;
/// Bytes that wait for the connection, unless less is free.
const UNTAKEN_BYTES_MAX: usize = 8 << 20;

/// A dispatcher that hears nothing of a stream's end for so long takes its connection for lost.
const ABANDONED: Duration = Duration::from_secs(1);

/// How far the connection is.
#[derive(Default)]
struct Progress {
    /// responses taken
    taken: AtomicU64,
    /// pieces of responses taken
    pieces: Arc<AtomicU64>,
    /// the dispatcher waits for the next one to be taken
    awaited: AtomicBool,
    /// wakes it
    wake: Arc<Notify>,
    /// what waits is somebody else's now
    withdrawn: AtomicBool,
}

/// A response on its way, with its part of the budget.
pub struct Sent {
    /// What is sent.
    pub response: v1::PullResponse,
    held: Held,
    progress: Arc<Progress>,
}

/// The receiving end: a connection, or a push request.
pub struct Inlet(mpsc::Receiver<Result<Sent, Status>>);

impl Inlet {
    /// The next response, which counts as handed out.
    pub async fn recv(&mut self) -> Option<Result<v1::PullResponse, Status>> {
        loop {
            match self.0.recv().await? {
                Ok(sent) if sent.is_withdrawn() => {}
                Ok(sent) => {
                    sent.progress.took();
                    return Some(Ok(sent.response));
                }
                Err(status) => return Some(Err(status)),
            }
        }
    }

    /// As answers of a stream.
    pub fn into_answers(self) -> impl Stream<Item = Result<Answer, Status>> + Send + 'static {
        let kept = |sent: &Result<Sent, Status>| std::future::ready(!sent.as_ref().is_ok_and(Sent::is_withdrawn));
        ReceiverStream::new(self.0).filter(kept).map(|sent| {
            let Sent { response, held, progress } = sent?;
            let pieces = progress.pieces.clone();
            let took = move |all: bool| {
                if all {
                    progress.took();
                }
            };
            Ok(Answer::new(&response, held).on_end(took).counted(pieces))
        })
    }
}

impl Progress {
    fn took(&self) {
        self.taken.fetch_add(1, Ordering::SeqCst);
        if self.awaited.swap(false, Ordering::SeqCst) {
            self.wake.notify_one();
        }
    }
}

impl Sent {
    fn is_withdrawn(&self) -> bool {
        self.progress.withdrawn.load(Ordering::SeqCst)
    }
}

struct Untaken {
    number: u64,
    bytes: usize,
    ranges: Vec<OffsetRange>,
}

/// The sending end, which a dispatcher holds.
pub struct Outlet {
    to: mpsc::Sender<Result<Sent, Status>>,
    answers: Answers,
    progress: Arc<Progress>,
    untaken: VecDeque<Untaken>,
    bytes: usize,
    sent: u64,
    /// since when the connection has taken nothing, and how many pieces it had taken then
    still_since: Option<(Instant, u64)>,
    /// when it was first seen that nobody receives
    closed_since: Option<Instant>,
}

/// Why a response was not sent.
pub enum Unsent {
    /// There is no room for it now.
    Full,
    /// Nobody receives any more.
    Closed,
}

/// Both ends of a stream whose answers take their room from `answers`.
pub fn open(answers: Answers) -> (Outlet, Inlet) {
    let (to, receiver) = mpsc::channel(UNTAKEN_MAX);
    let (progress, untaken) = Default::default();
    (
        Outlet { to, answers, progress, untaken, bytes: 0, sent: 0, still_since: None, closed_since: None },
        Inlet(receiver),
    )
}

impl Outlet {
    /// Wakes `wake` when the connection takes a response.
    pub fn wakes(&mut self, wake: Arc<Notify>) {
        self.progress = Arc::new(Progress { wake, ..Default::default() });
    }

    /// Sends a response, which holds the messages of `ranges`.
    pub fn send(&mut self, response: v1::PullResponse, ranges: &[OffsetRange]) -> Result<(), Unsent> {
        self.forget_taken();
        let place = self.to.try_reserve().map_err(|e| match e {
            mpsc::error::TrySendError::Full(()) => Unsent::Full,
            mpsc::error::TrySendError::Closed(()) => Unsent::Closed,
        })?;
        let bytes = wire_bytes(&response);
        if !self.untaken.is_empty() && self.bytes + bytes > self.room() {
            return Err(Unsent::Full);
        }
        let held = self.answers.try_take(bytes).ok_or(Unsent::Full)?;
        let pieces = self.progress.pieces.load(Ordering::Relaxed);
        self.still_since.get_or_insert_with(|| (Instant::now(), pieces));
        self.untaken.push_back(Untaken { number: self.sent, bytes, ranges: ranges.to_vec() });
        self.sent += 1;
        self.bytes += bytes;
        place.send(Ok(Sent { response, held, progress: self.progress.clone() }));
        Ok(())
    }

    /// Ends the stream with a status.
    pub fn end(&self, status: Status) {
        let _ = self.to.try_send(Err(status));
    }

    fn room(&self) -> usize {
        self.answers.room().min(UNTAKEN_BYTES_MAX)
    }

    /// Bytes that its next response should have at most.
    pub fn response_bytes(&self) -> usize {
        self.answers.room()
    }

    fn forget_taken(&mut self) {
        let taken = self.progress.taken.load(Ordering::SeqCst);
        let pieces = self.progress.pieces.load(Ordering::Relaxed);
        while let Some(first) = self.untaken.front().filter(|u| u.number < taken) {
            self.bytes -= first.bytes;
            self.untaken.pop_front();
            self.still_since = (!self.untaken.is_empty()).then(|| (Instant::now(), pieces));
        }
        if let Some(still) = self.still_since.as_mut().filter(|(_, before)| *before != pieces) {
            *still = (Instant::now(), pieces); // a slow reader reads
        }
    }

    /// Whether the member should get nothing more for now. If so, the dispatcher is woken once that may have changed.
    pub fn is_full(&mut self) -> bool {
        // first this, then the look: what is taken in between wakes
        self.progress.awaited.store(true, Ordering::SeqCst);
        self.forget_taken();
        let many = self.untaken.len() >= UNTAKEN_MAX / 2;
        let full = many || self.to.is_closed() || (!self.untaken.is_empty() && self.bytes >= self.room());
        if !full {
            self.progress.awaited.store(false, Ordering::SeqCst);
        }
        full
    }

    /// Whether nobody receives any more, and nobody said why either.
    pub fn is_abandoned(&mut self) -> bool {
        self.to.is_closed() && self.closed_since.get_or_insert_with(Instant::now).elapsed() > ABANDONED
    }

    /// What the connection has not taken goes to others: it is not given to it any more.
    pub fn withdraw(&mut self) -> Vec<OffsetRange> {
        self.progress.withdrawn.store(true, Ordering::SeqCst);
        self.untaken().collect()
    }

    /// Whether the connection has taken nothing of what waits for so long.
    pub fn is_still(&mut self, so_long: Duration) -> bool {
        self.forget_taken();
        self.still_since.is_some_and(|(since, _)| since.elapsed() > so_long)
    }

    /// The messages that the connection has not taken.
    pub fn untaken(&mut self) -> impl Iterator<Item = OffsetRange> + '_ {
        self.forget_taken();
        self.untaken.iter().flat_map(|u| u.ranges.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;

    fn response(bytes: usize) -> v1::PullResponse {
        let message = v1::Message { value: Some(vec![1; bytes].into()), ..Default::default() };
        let messages = vec![v1::ReceivedMessage { message: Some(message), ..Default::default() }];
        v1::PullResponse { messages, ..Default::default() }
    }

    #[tokio::test]
    async fn what_the_connection_has_not_taken_is_known_and_bounded_in_number_and_bytes() {
        let budget = Budget::default();
        let (mut outlet, mut inlet) = open(budget.answers(Default::default()));
        let one = |at: u64| [OffsetRange::one(at)];
        for at in 0..3 {
            assert!(outlet.send(response(10), &one(at)).is_ok());
        }
        assert!(inlet.recv().await.is_some());
        assert_eq!(outlet.untaken().collect::<Vec<_>>(), [OffsetRange::one(1), OffsetRange::one(2)]);
        assert!(!outlet.is_full());
        assert!(matches!(outlet.send(response(UNTAKEN_BYTES_MAX), &one(3)), Err(Unsent::Full)));
        while outlet.send(response(10), &one(4)).is_ok() {}
        assert!(outlet.is_full() && outlet.is_still(Duration::ZERO));
        while outlet.untaken().next().is_some() {
            inlet.recv().await;
        }
        assert!(!outlet.is_full() && !outlet.is_still(Duration::ZERO));
        assert!(outlet.send(response(UNTAKEN_BYTES_MAX), &one(9)).is_ok(), "one response, however large");
        drop(inlet);
        assert!(matches!(outlet.send(response(1), &one(10)), Err(Unsent::Closed)));
        assert_eq!(
            outlet.untaken().collect::<Vec<_>>(),
            [OffsetRange::one(9)],
            "lost with the stream, and handed to nobody"
        );
    }
}
