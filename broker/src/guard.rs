//! Bounds on connections: so many in all, so many from one address, and none that says nothing. Those beyond are closed at once;
//! the others are served.

use crate::metrics::Metrics;
use futures::{Stream, StreamExt as _};
use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::Sleep;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::server::Connected;

/// A connection that has said nothing by then is closed.
const FIRST_WORD_WITHIN: Duration = Duration::from_secs(5);
/// One address may have this part of all connections.
const ADDRESS_SHARE: usize = 4;

#[derive(Default)]
struct Counts {
    all: usize,
    each: HashMap<IpAddr, usize>,
}

/// Who is connected to one listener.
#[derive(Clone)]
struct Guard {
    max: usize,
    counts: Arc<Mutex<Counts>>,
    metrics: Arc<Metrics>,
}

impl Guard {
    fn admit_tcp(&self, stream: TcpStream) -> Option<Guarded<TcpStream>> {
        let address = stream.peer_addr().ok()?.ip();
        // answers are small and wait for nothing else
        let _ = stream.set_nodelay(true);
        self.admit(stream, address)
    }

    fn admit<S>(&self, stream: S, address: IpAddr) -> Option<Guarded<S>> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = counts.each.get(&address).copied().unwrap_or(0);
        if counts.all >= self.max || from_there >= (self.max / ADDRESS_SHARE).max(1) {
            self.metrics.rejected.with_label_values(&["CONNECTIONS"]).inc();
            return None; // dropped, and so closed
        }
        counts.all += 1;
        counts.each.insert(address, from_there + 1);
        self.metrics.connections.inc();
        let place = Place { guard: self.clone(), address };
        Some(Guarded { stream, silent: Some(Box::pin(tokio::time::sleep(FIRST_WORD_WITHIN))), _place: place })
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

/// An admitted connection.
pub struct Guarded<S> {
    stream: S,
    /// runs until the first word
    silent: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

/// A listener's connections, at most `max` at one time.
pub fn incoming(
    listener: TcpListener,
    max: usize,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = Result<Guarded<TcpStream>>> {
    let guard = Guard { max, counts: Arc::default(), metrics };
    TcpListenerStream::new(listener).filter_map(move |stream| {
        let admitted = stream.map(|s| guard.admit_tcp(s)).transpose();
        async move { admitted }
    })
}

/// As [`incoming`], of a Unix socket: all connections are from this machine.
pub fn incoming_unix(
    listener: UnixListener,
    max: usize,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = Result<Guarded<UnixStream>>> {
    let guard = Guard { max: max * ADDRESS_SHARE, counts: Arc::default(), metrics };
    UnixListenerStream::new(listener).filter_map(move |stream| {
        let admitted = stream.map(|s| guard.admit(s, Ipv6Addr::UNSPECIFIED.into())).transpose();
        async move { admitted }
    })
}

impl<S: Connected> Connected for Guarded<S> {
    type ConnectInfo = S::ConnectInfo;
    fn connect_info(&self) -> S::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        if let Some(silent) = &mut self.silent
            && silent.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(Error::new(ErrorKind::TimedOut, "the connection said nothing")));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.silent = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
