//! Bounds on connections: so many in all, so many from one address, and none without a deadline. Those beyond are closed at once;
//! the others are served. Accepting pauses where the system has no file for another one.
//!
//! A gRPC connection sends the beginning of HTTP/2 by its first deadline, however it is divided. From then on HTTP/2 pings it: one that
//! is in the middle of a frame, or of a request's headers, cannot answer, and is closed. One whose client neither reads nor answers is closed
//! here, since HTTP/2 cannot write to it what would end it. A connection of the metrics port has one deadline for everything.

use crate::budget::Connection;
use crate::metrics::Metrics;
use futures::Stream;
use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::Connected;

/// What a client of HTTP/2 sends in any case: the preface, and the header of its first frame.
const BEGINNING_BYTES: usize = 24 + 9;
/// Accepting pauses for this long after an error, such as too many open files.
const PAUSE: Duration = Duration::from_millis(200);
/// One address may have this part of all connections.
const ADDRESS_SHARE: usize = 4;

/// When connections are closed that get no further.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// The beginning of HTTP/2 comes by then.
    pub beginning: Duration,
    /// A client that has said nothing for this long is pinged.
    pub ping_after: Duration,
    /// It answers a ping by then.
    pub answer_within: Duration,
    /// A connection of the metrics port is closed by then, answered or not.
    pub metrics: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            beginning: Duration::from_secs(5),
            ping_after: Duration::from_secs(10),
            answer_within: Duration::from_secs(20),
            metrics: Duration::from_secs(15),
        }
    }
}

impl Deadlines {
    /// A client from which nothing has come for this long did not answer a ping, twice over.
    fn silence(&self) -> Duration {
        2 * (self.ping_after + self.answer_within)
    }
}

#[derive(Default)]
struct Counts {
    all: usize,
    each: HashMap<IpAddr, usize>,
}

/// Who is connected to one listener.
#[derive(Clone)]
struct Guard {
    max: usize,
    /// from one address
    each: usize,
    deadlines: Deadlines,
    /// whether a connection lasts for one request only
    is_brief: bool,
    counts: Arc<Mutex<Counts>>,
    metrics: Arc<Metrics>,
}

impl Guard {
    fn admit<S>(&self, stream: S, address: IpAddr) -> Option<Guarded<S>> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = counts.each.get(&address).copied().unwrap_or(0);
        if counts.all >= self.max || from_there >= self.each {
            self.metrics.rejected.with_label_values(&["CONNECTIONS"]).inc();
            return None; // dropped, and so closed
        }
        counts.all += 1;
        counts.each.insert(address, from_there + 1);
        self.metrics.connections.inc();
        let place = Place { guard: self.clone(), address };
        let (stage, within) = match self.is_brief {
            true => (Stage::Brief, self.deadlines.metrics),
            false => (Stage::Beginning { missing: BEGINNING_BYTES }, self.deadlines.beginning),
        };
        let deadline = Box::pin(tokio::time::sleep(within));
        Some(Guarded { stream, stage, deadline, answers: Arc::default(), place })
    }
}

/// A connection's place, given back when it ends.
struct Place {
    guard: Guard,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.guard.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.all -= 1;
        if let Some(count) = counts.each.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.each.remove(&self.address);
            }
        }
        self.guard.metrics.connections.dec();
    }
}

/// What the deadline of a connection is for.
enum Stage {
    /// All of it.
    Brief,
    /// Its beginning, of which so many bytes are missing.
    Beginning { missing: usize },
    /// The next bytes after these.
    Begun { heard: Instant },
}

/// An admitted connection.
pub struct Guarded<S> {
    stream: S,
    stage: Stage,
    deadline: Pin<Box<Sleep>>,
    /// what its answers take; requests carry it
    answers: Arc<Connection>,
    place: Place,
}

impl<S> Guarded<S> {
    /// What came of reading or writing; fails where that waits, and the deadline has passed.
    fn unless_late<T>(&mut self, polled: Poll<T>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        if polled.is_pending() || matches!(self.stage, Stage::Brief) {
            self.check(cx)?;
        }
        polled.map(Ok)
    }

    fn check(&mut self, cx: &mut Context<'_>) -> Result<()> {
        while self.deadline.as_mut().poll(cx).is_ready() {
            // set anew here, not with each read
            let until = match self.stage {
                Stage::Begun { heard } => Some(heard + self.place.guard.deadlines.silence()),
                Stage::Brief | Stage::Beginning { .. } => None,
            };
            match until.filter(|until| *until > Instant::now()) {
                Some(until) => self.deadline.as_mut().reset(until),
                None => return Err(Error::new(ErrorKind::TimedOut, "the connection had its time")),
            }
        }
        Ok(())
    }

    /// Bytes came.
    fn has_heard(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let now = Instant::now();
        match &mut self.stage {
            Stage::Brief => {}
            Stage::Beginning { missing } if *missing > bytes => *missing -= bytes,
            Stage::Beginning { .. } => {
                self.stage = Stage::Begun { heard: now };
                self.deadline.as_mut().reset(now + self.place.guard.deadlines.silence());
            }
            Stage::Begun { heard } => *heard = now,
        }
    }
}

/// A listener of either kind.
trait Accept {
    type Stream;
    fn accept(&self) -> impl Future<Output = Result<(Self::Stream, IpAddr)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    async fn accept(&self) -> Result<(TcpStream, IpAddr)> {
        let (stream, address) = Self::accept(self).await?;
        // answers are small and wait for nothing else
        let _ = stream.set_nodelay(true);
        Ok((stream, address.ip()))
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    /// All connections are from this machine.
    async fn accept(&self) -> Result<(UnixStream, IpAddr)> {
        let (stream, _) = Self::accept(self).await?;
        Ok((stream, Ipv6Addr::UNSPECIFIED.into()))
    }
}

/// The next connection that has a place. Accepting pauses while the system has no file for one: it would fail again at once.
async fn next<L: Accept>(listener: &L, guard: &Guard) -> Guarded<L::Stream> {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                if let Some(admitted) = guard.admit(stream, address) {
                    return admitted;
                }
            }
            // a connection that ended before it was accepted
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => {
                guard.metrics.rejected.with_label_values(&["ACCEPT"]).inc();
                if let Some(left_out) = guard.metrics.seldom.now("accept", "") {
                    tracing::warn!(%error, left_out, "cannot accept connections; accepting pauses for {PAUSE:?}");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn stream<L: Accept>(listener: L, guard: Guard) -> impl Stream<Item = Result<Guarded<L::Stream>>> {
    futures::stream::unfold((listener, guard), async |(listener, guard)| {
        let admitted = next(&listener, &guard).await;
        Some((Ok(admitted), (listener, guard)))
    })
}

/// A listener's connections, at most `max` at one time.
pub fn incoming(
    listener: TcpListener,
    max: usize,
    deadlines: Deadlines,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = Result<Guarded<TcpStream>>> {
    let each = (max / ADDRESS_SHARE).max(1);
    stream(listener, Guard { max, each, deadlines, is_brief: false, counts: Arc::default(), metrics })
}

/// As [`incoming`], of a Unix socket: all connections are from this machine, which may have all of them.
pub fn incoming_unix(
    listener: UnixListener,
    max: usize,
    deadlines: Deadlines,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = Result<Guarded<UnixStream>>> {
    stream(listener, Guard { max, each: max, deadlines, is_brief: false, counts: Arc::default(), metrics })
}

/// A listener whose connections last for one short request each, for [`axum::serve`].
pub struct Brief {
    listener: TcpListener,
    guard: Guard,
}

impl Brief {
    /// At most `max` connections at one time; each is closed by its deadline, whatever its state.
    pub fn new(listener: TcpListener, max: usize, deadlines: Deadlines, metrics: Arc<Metrics>) -> Self {
        let each = (max / ADDRESS_SHARE).max(1);
        Self { listener, guard: Guard { max, each, deadlines, is_brief: true, counts: Arc::default(), metrics } }
    }
}

impl axum::serve::Listener for Brief {
    type Io = Guarded<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let admitted = next(&self.listener, &self.guard).await;
        let address = admitted.stream.peer_addr();
        (admitted, address.unwrap_or_else(|_| (Ipv6Addr::UNSPECIFIED, 0).into()))
    }

    fn local_addr(&self) -> Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl<S> Connected for Guarded<S> {
    type ConnectInfo = Arc<Connection>;
    fn connect_info(&self) -> Arc<Connection> {
        self.answers.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer)?;
        self.has_heard(buffer.filled().len() - before);
        self.unless_late(polled, cx)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes)?;
        self.unless_late(polled, cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)?;
        self.unless_late(polled, cx)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx)?;
        self.unless_late(polled, cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(cx)?;
        self.unless_late(polled, cx)
    }
}
