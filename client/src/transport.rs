//! How a broker is reached, as the prefix of its address says: `http://` (or nothing), `https://`, `unix:PATH`, and `inproc:NAME` for
//! a broker of this very process.

use crate::Error;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::service::Routes;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use weir_proto::inproc;

/// Calls to one broker. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Transport {
    /// Over a socket.
    Socket(Channel),
    /// To a broker of this process.
    Inproc(Routes),
}

impl Service<http::Request<Body>> for Transport {
    type Response = http::Response<Body>;
    type Error = StdError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        match self {
            Self::Socket(channel) => channel.poll_ready(cx).map_err(Into::into),
            Self::Inproc(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self {
            Self::Socket(channel) => channel.call(request).map(|answer| answer.map_err(Into::into)).boxed(),
            Self::Inproc(services) => services.call(request).map(|answer| answer.map_err(Into::into)).boxed(),
        }
    }
}

/// What stands before an address's colon, where that says how to reach it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Scheme {
    #[default]
    Http,
    Https,
    Unix,
    Inproc,
}

impl Scheme {
    /// Splits an address as people write it; `host:port` stays for the first two.
    pub(crate) fn split(address: &str) -> (Self, &str) {
        let known =
            [("http://", Self::Http), ("https://", Self::Https), ("unix:", Self::Unix), ("inproc:", Self::Inproc)];
        let found = known.into_iter().find_map(|(prefix, scheme)| Some((scheme, address.strip_prefix(prefix)?)));
        match found.unwrap_or((Self::Http, address)) {
            (scheme @ (Self::Http | Self::Https), rest) => (scheme, rest.trim_end_matches('/')),
            (scheme, rest) => (scheme, rest),
        }
    }

    /// Whether it reaches one broker, which others reach by another address.
    pub(crate) fn is_local(self) -> bool {
        matches!(self, Self::Unix | Self::Inproc)
    }
}

/// Whether what listens at an address answers a request of HTTP/1, which brokers do on their port for metrics only.
pub(crate) async fn speaks_http1(address: &str, within: Duration) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET / HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes()).await?;
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).await?;
        std::io::Result::Ok(answer == *b"HTTP/1.")
    };
    matches!(tokio::time::timeout(within, ask).await, Ok(Ok(true)))
}

/// A lazily connected way to a broker.
pub(crate) fn open(scheme: Scheme, address: &str) -> Result<Transport, Error> {
    let bad = || Error::Address(address.to_owned());
    let uri = match scheme {
        Scheme::Inproc => return inproc::find(address).map(Transport::Inproc).ok_or_else(bad),
        Scheme::Unix => format!("unix:{address}"),
        Scheme::Http => format!("http://{address}"),
        Scheme::Https => format!("https://{address}"),
    };
    let mut endpoint = Endpoint::from_shared(uri).map_err(|_| bad())?;
    if scheme == Scheme::Https {
        endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots()).map_err(|_| bad())?;
    }
    let channel = endpoint
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .initial_stream_window_size(weir_proto::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(weir_proto::CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(1))
        .keep_alive_timeout(Duration::from_secs(2))
        .connect_lazy();
    Ok(Transport::Socket(channel))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_how_it_is_reached() {
        let cases = [
            ("127.0.0.1:7420", (Scheme::Http, "127.0.0.1:7420")),
            ("http://weir:7420/", (Scheme::Http, "weir:7420")),
            ("https://weir:7420", (Scheme::Https, "weir:7420")),
            ("unix:/run/weir.sock", (Scheme::Unix, "/run/weir.sock")),
            ("inproc:weir-0", (Scheme::Inproc, "weir-0")),
        ];
        cases.into_iter().for_each(|(address, split)| assert_eq!(Scheme::split(address), split));
    }
}
