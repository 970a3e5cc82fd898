//! Open files. The soft limit is raised to the hard one at start; what the store does not need is shared out among the listeners, so
//! that no number of connections takes a file from the store.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use weir_store::rocks;

/// Files beside the store's and the listeners' connections: listeners, event queues, connections to peers and push endpoints.
const OTHER_FILES: usize = 128;
/// With fewer files than this a broker does not start.
const FILES_MIN: usize = 512;
/// Connections to the metrics listener at one time.
const METRICS_MAX: usize = 64;

/// Connections that each listener accepts at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Clients.
    pub clients: usize,
    /// Clients by the Unix socket.
    pub socket: usize,
    /// Peers.
    pub peers: usize,
    /// Administrators.
    pub admins: usize,
    /// Metrics and health.
    pub metrics: usize,
}

/// Raises the soft limit of open files to the hard one, as far as the system allows it; returns the limit then.
pub fn raise() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// Shares out the files that a limit leaves, at most `connections_max` to a listener.
pub fn shares(limit: usize, connections_max: usize) -> Result<Shares, String> {
    if limit < FILES_MIN {
        return Err(format!(
            "this process may open {limit} files at most, and a broker needs {FILES_MIN}: raise the hard limit (ulimit -Hn)"
        ));
    }
    let left = limit.saturating_sub(rocks::files_max(limit) + OTHER_FILES);
    let metrics = (left / 16).min(METRICS_MAX);
    let eighth = (left / 8).min(connections_max);
    let clients = (left - metrics - 3 * eighth).min(connections_max);
    Ok(Shares { clients, socket: eighth, peers: eighth, admins: eighth, metrics })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_of_connections_takes_a_file_from_the_store() {
        for limit in [FILES_MIN, 1_000, 1_024, 4_096, 65_536, 1 << 20, usize::MAX] {
            let Shares { clients, socket, peers, admins, metrics } = shares(limit, 8_192).unwrap();
            let connections = clients + socket + peers + admins + metrics;
            assert!(connections + rocks::files_max(limit) + OTHER_FILES <= limit, "{limit}");
            assert!(
                clients >= 64 && peers >= 16 && admins >= 16 && metrics >= 8,
                "{limit}: {clients} {peers} {metrics}"
            );
        }
        assert_eq!(shares(1 << 20, 8_192).unwrap().clients, 8_192);
        assert!(shares(FILES_MIN - 1, 8_192).unwrap_err().contains("ulimit"));
    }

    #[test]
    fn the_soft_limit_is_the_hard_one_after_a_start() {
        let limit = raise();
        let now = getrlimit(Resource::Nofile);
        assert_eq!(now.current, now.maximum);
        assert_eq!(now.current.unwrap_or(u64::MAX), limit as u64);
    }
}
