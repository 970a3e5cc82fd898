//! Stops a replica that can no longer be sure of its lease. The lease library renews it, and goes on leading while the API server
//! does not answer it; another replica may reach the server and take over meanwhile. So the lease is read beside that, and who has
//! not seen it renewed lately stops before anybody else may begin.

use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use std::time::{Duration, Instant};

/// The lease runs out this long after it was renewed, s; then another may take it.
pub const LEASE_SECONDS: u64 = 15;
/// It is renewed this long before, s.
pub const GRACE_SECONDS: u64 = 8;
/// Between two reads, and as long as one may take.
const LOOK: Duration = Duration::from_secs(2);
/// Not seen renewed for this long: a renewal is seen [`LOOK`] after it at the latest, so that [`LEASE_SECONDS`] are not over.
const SURE_FOR: Duration = Duration::from_secs(LEASE_SECONDS - 4);

/// What was seen of the lease.
struct Fence {
    identity: String,
    renewed: Option<String>,
    seen: Instant,
}

impl Fence {
    /// Takes a read lease (none where it could not be read); whether this replica may still act.
    fn holds(&mut self, lease: Option<&Lease>, now: Instant) -> bool {
        if let Some(spec) = lease.and_then(|l| l.spec.as_ref()) {
            if spec.holder_identity.as_deref() != Some(&self.identity) {
                return false;
            }
            let renewed = spec.renew_time.as_ref().map(|t| t.0.to_string());
            if renewed != self.renewed {
                self.renewed = renewed;
                self.seen = now;
            }
        }
        now.duration_since(self.seen) < SURE_FOR
    }
}

/// Returns once this replica must not act any more.
pub async fn lost(leases: Api<Lease>, name: &str, identity: &str) {
    let mut fence = Fence { identity: identity.to_owned(), renewed: None, seen: Instant::now() };
    loop {
        let read = tokio::time::timeout(LOOK, leases.get(name)).await;
        let lease = read.ok().and_then(Result::ok);
        if !fence.holds(lease.as_ref(), Instant::now()) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, second: i64) -> Lease {
        let time = k8s_openapi::jiff::Timestamp::from_second(second).unwrap();
        let mut lease = Lease::default();
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(holder.to_owned());
        spec.renew_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(time));
        lease
    }

    #[test]
    fn a_replica_stops_when_it_has_not_seen_its_lease_renewed_and_at_once_when_another_has_it() {
        let begun = Instant::now();
        let at = |s: u64| begun + Duration::from_secs(s);
        let mut fence = Fence { identity: "me".into(), renewed: None, seen: begun };
        assert!(fence.holds(Some(&lease("me", 100)), at(0)));
        assert!(fence.holds(None, at(4)), "one read that fails says nothing");
        assert!(fence.holds(Some(&lease("me", 107)), at(8)));
        assert!(fence.holds(Some(&lease("me", 107)), at(18)), "read, but not renewed");
        assert!(!fence.holds(None, at(19)));
        assert!(!fence.holds(Some(&lease("me", 107)), at(20)));
        assert!(fence.holds(Some(&lease("me", 120)), at(21)));
        assert!(!fence.holds(Some(&lease("other", 121)), at(22)));
    }
}
