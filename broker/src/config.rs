//! What a broker is told at start.

use clap::Parser;
use std::net::SocketAddr;
use std::path::PathBuf;

/// One broker of a Weir cluster.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "weir-broker",
    version,
    after_help = "Example, three brokers on one machine, the first of them:
  weir-broker --name b1 --data /var/lib/weir/b1 --peers b1=127.0.0.1:7421,b2=127.0.0.1:7431,b3=127.0.0.1:7441"
)]
pub struct Config {
    /// This broker's name, as it stands in --peers.
    #[arg(long, env = "WEIR_NAME", default_value = "weir-0")]
    pub name: String,
    /// Folder of its data; made if missing.
    #[arg(long, env = "WEIR_DATA")]
    pub data: PathBuf,
    /// Where clients are served (gRPC).
    #[arg(long, env = "WEIR_CLIENT_LISTEN", default_value = "127.0.0.1:7420")]
    pub client_listen: SocketAddr,
    /// A Unix socket on which clients are served too: on one machine quicker than loopback.
    #[arg(long, env = "WEIR_CLIENT_SOCKET")]
    pub client_socket: Option<PathBuf>,
    /// Whether clients of this process reach it as `inproc:` and its name.
    #[arg(skip)]
    pub inproc: bool,
    /// Where peers are served.
    #[arg(long, env = "WEIR_PEER_LISTEN", default_value = "127.0.0.1:7421")]
    pub peer_listen: SocketAddr,
    /// Where administrators are served.
    #[arg(long, env = "WEIR_ADMIN_LISTEN", default_value = "127.0.0.1:7422")]
    pub admin_listen: SocketAddr,
    /// Where metrics and health are served (HTTP).
    #[arg(long, env = "WEIR_METRICS_LISTEN", default_value = "127.0.0.1:9464")]
    pub metrics_listen: SocketAddr,
    /// host[:port] that others reach this broker by; default: the listen addresses.
    #[arg(long, env = "WEIR_ADVERTISE_HOST")]
    pub advertise_host: Option<String>,
    /// The brokers that form the cluster, name=host:port of their peer listeners; none for a cluster of one.
    #[arg(long, env = "WEIR_PEERS", value_delimiter = ',')]
    pub peers: Vec<String>,
    /// The cluster this broker belongs to, once there is one: an empty disk then joins it, and never forms another.
    #[arg(long, env = "WEIR_CLUSTER_ID", default_value = "")]
    pub cluster_id: String,
    /// Connections to each gRPC listener at one time, a quarter of them from one address at most.
    #[arg(long, env = "WEIR_CONNECTIONS_MAX", default_value_t = 8_192)]
    pub connections_max: usize,
    /// Failure domain, such as a zone. Empty: as an administrator says.
    #[arg(long, env = "WEIR_RACK", default_value = "")]
    pub rack: String,
}

impl Config {
    /// `--peers` as pairs of name and address.
    pub fn peer_list(&self) -> Result<Vec<(String, String)>, String> {
        let split = |p: &String| {
            let (name, address) = p.split_once('=').ok_or_else(|| format!("--peers: '{p}' is not name=host:port"))?;
            Ok((name.to_owned(), address.to_owned()))
        };
        self.peers.iter().map(split).collect()
    }

    /// The address others use for a listener.
    pub fn advertised(&self, bound: SocketAddr) -> String {
        match &self.advertise_host {
            Some(host) => format!("{host}:{}", bound.port()),
            None => bound.to_string(),
        }
    }
}
