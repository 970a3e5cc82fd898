//! What a broker is told at start.

use crate::guard::Deadlines;
use clap::Parser;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use weir_proto::names;

/// Shown below the help.
pub const EXAMPLE: &str = "Example, three brokers on one machine, the first of them:
  weir-broker --name b1 --data /var/lib/weir/b1 --peers b1=127.0.0.1:7421,b2=127.0.0.1:7431,b3=127.0.0.1:7441";

/// One broker of a Weir cluster.
#[derive(Parser, Clone, Debug)]
#[command(name = "weir-broker", version, after_help = EXAMPLE)]
pub struct Config {
    /// This broker's name, as it stands in --peers.
    #[arg(long, env = "WEIR_NAME", default_value = "weir-0")]
    pub name: String,
    /// Folder of its data; made if missing.
    #[arg(long, env = "WEIR_DATA")]
    pub data: PathBuf,
    /// Where clients are served (gRPC).
    #[arg(long, env = "WEIR_CLIENT_LISTEN", default_value = "127.0.0.1:7420", value_parser = listen_address)]
    pub client_listen: SocketAddr,
    /// A Unix socket on which clients are served too: on one machine quicker than loopback.
    #[arg(long, env = "WEIR_CLIENT_SOCKET")]
    pub client_socket: Option<PathBuf>,
    /// Whether clients of this process reach it as `inproc:` and its name.
    #[arg(skip)]
    pub inproc: bool,
    /// When connections are closed that get no further.
    #[arg(skip)]
    pub deadlines: Deadlines,
    /// Where peers are served.
    #[arg(long, env = "WEIR_PEER_LISTEN", default_value = "127.0.0.1:7421", value_parser = listen_address)]
    pub peer_listen: SocketAddr,
    /// Where administrators are served.
    #[arg(long, env = "WEIR_ADMIN_LISTEN", default_value = "127.0.0.1:7422", value_parser = listen_address)]
    pub admin_listen: SocketAddr,
    /// Where metrics and health are served (HTTP).
    #[arg(long, env = "WEIR_METRICS_LISTEN", default_value = "127.0.0.1:9464", value_parser = listen_address)]
    pub metrics_listen: SocketAddr,
    /// Host, without a port, by which clients and brokers reach this one. Default: the listen addresses. Required where one of
    /// them is 0.0.0.0 or [::], which names no machine.
    #[arg(long, env = "WEIR_ADVERTISE_HOST", value_parser = host)]
    pub advertise_host: Option<String>,
    /// The brokers that form the cluster, name=host:port of their peer listeners; none for a cluster of one.
    #[arg(long, env = "WEIR_PEERS", value_delimiter = ',')]
    pub peers: Vec<String>,
    /// The cluster this broker belongs to, once there is one: an empty disk then joins it, and never forms another.
    #[arg(long, env = "WEIR_CLUSTER_ID", default_value = "")]
    pub cluster_id: String,
    /// Connections to each gRPC listener at one time, a quarter of them from one address at most.
    #[arg(long, env = "WEIR_CONNECTIONS_MAX", default_value_t = 8_192, value_parser = at_least_one)]
    pub connections_max: usize,
    /// Goes on without acknowledged records that are lost: the write that the error of a start names. Of no effect at any other loss.
    #[arg(long, env = "WEIR_ACCEPT_LOSS", value_name = "WRITE")]
    pub accept_loss: Option<u64>,
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

    /// Why others could not reach this broker by the addresses it would announce, if so.
    pub fn check(&self) -> Result<(), String> {
        if !names::is_part(&self.name) {
            return Err(format!("--name {}", names::refusal(&self.name)));
        }
        let listens = [
            ("--client-listen", self.client_listen),
            ("--peer-listen", self.peer_listen),
            ("--admin-listen", self.admin_listen),
        ];
        match listens.iter().find(|(_, at)| at.ip().is_unspecified() && self.advertise_host.is_none()) {
            Some((flag, at)) => Err(format!("{flag} {at}: {UNREACHABLE}")),
            None => Ok(()),
        }
    }

    /// The address others use for a listener.
    pub fn advertised(&self, bound: SocketAddr) -> String {
        match &self.advertise_host {
            Some(host) if host.contains(':') => format!("[{host}]:{}", bound.port()),
            Some(host) => format!("{host}:{}", bound.port()),
            None => bound.to_string(),
        }
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("nobody could connect; use 1 or more".to_owned()),
        Ok(count) => Ok(count),
        Err(_) => Err("use a whole number, 1 or more".to_owned()),
    }
}

/// Why an address without a host cannot be announced.
pub const UNREACHABLE: &str = "others cannot be sent to an address that names no machine; say by which host they reach this one, with --advertise-host";

/// An address to listen on: an IP address or a host of this machine, and a port.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let wrong = |why: String| format!("use host:port, such as 127.0.0.1:7420, localhost:7420 or [::1]:7420: {why}");
    let (host, port) =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).ok_or_else(|| wrong("no port".into()))?;
    let port: u16 = port.parse().map_err(|_| wrong(format!("'{port}' is not a port, which is 0 to 65535")))?;
    let found: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(|e| wrong(e.to_string()))?.collect();
    // what clients try first for a name with addresses of both kinds
    let first = found.iter().find(|a| a.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| wrong(format!("'{host}' has no address")))
}

/// A host without a port: a name or an IP address.
pub fn host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    let named = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    match bare.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => {
            Err(format!("{ip} names no machine: use a host by which others reach this one"))
        }
        Ok(_) => Ok(bare.to_owned()),
        Err(_) if (1..=253).contains(&bare.len()) && bare.chars().all(named) => Ok(bare.to_owned()),
        Err(_) => Err("use a host without a port, such as broker-0.example.com or 192.0.2.7".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_nobody_could_connect_with_are_refused() {
        let parse = |more: &[&str]| Config::try_parse_from([&["weir-broker", "--data", "/nowhere"], more].concat());
        for bad in ["0", "-1", "", "many", "99999999999999999999999"] {
            assert!(parse(&["--connections-max", bad]).is_err(), "{bad}");
        }
        assert_eq!(parse(&["--connections-max", "1"]).unwrap().connections_max, 1);
        for bad in ["", "B1", "b 1", "b/1", "b\n", &"b".repeat(254)] {
            let refused = parse(&["--name", bad]).unwrap().check().expect_err(bad);
            assert!(refused.starts_with("--name '") && refused.len() < 300, "{refused}");
        }
        assert_eq!(parse(&["--name", "b-1.zone-2"]).unwrap().check(), Ok(()));
    }

    #[test]
    fn addresses_to_listen_on_may_name_this_machine() {
        assert_eq!(listen_address("127.0.0.1:7420"), Ok(SocketAddr::from(([127, 0, 0, 1], 7420))));
        assert!(listen_address("localhost:7420").is_ok_and(|a| a.ip().is_loopback() && a.port() == 7420));
        assert!(listen_address("[::1]:0").is_ok_and(|a| a.is_ipv6()));
        for bad in ["", "7420", ":7420", "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:", "localhost:http"]
        {
            assert!(listen_address(bad).is_err_and(|e| e.starts_with("use host:port")), "{bad}");
        }
    }

    #[test]
    fn an_announced_host_names_a_machine() {
        let config = |host: Option<&str>| {
            let mut arguments = vec!["weir-broker", "--data", "d", "--client-listen", "0.0.0.0:7420"];
            arguments.extend(host.iter().flat_map(|h| ["--advertise-host", *h]));
            Config::try_parse_from(arguments)
        };
        assert!(config(None).unwrap().check().unwrap_err().contains("--advertise-host"));
        let bound = SocketAddr::from(([0, 0, 0, 0], 7420));
        for (given, address) in
            [("b1.example.com", "b1.example.com:7420"), ("::1", "[::1]:7420"), ("[::1]", "[::1]:7420")]
        {
            let config = config(Some(given)).unwrap();
            assert_eq!((config.check(), config.advertised(bound)), (Ok(()), address.to_owned()));
        }
        for bad in ["0.0.0.0", "::", "", "b1:7420", "http://b1", "b 1"] {
            assert!(config(Some(bad)).is_err(), "{bad}");
        }
    }
}
