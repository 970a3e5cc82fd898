//! Brokers the metadata here does not name yet. One that joins, or was away while others were replaced, has old metadata: whoever
//! leads now may have joined later. Such a broker is heard once a member known here, or the one at an address this broker was
//! told at start, names it; then it can be answered, too, and the metadata follows.

use crate::formation::hello;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use weir_core::ids::BrokerId;
use weir_core::meta::state::{MetaState, Phase};
use weir_proto::v1;

/// Members are asked again no sooner.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Vouched {
    name: String,
    cluster_id: String,
    /// names and addresses, as configured at start
    peers: Vec<(String, String)>,
    known: Mutex<HashMap<BrokerId, String>>,
    asked: tokio::sync::Mutex<Option<Instant>>,
}

impl Vouched {
    /// Of the broker called `name`; `peers` are the other brokers' names and addresses that it was started with, `known` are brokers found
    /// while it joined.
    pub fn new(
        name: String,
        cluster_id: String,
        peers: Vec<(String, String)>,
        known: HashMap<BrokerId, String>,
    ) -> Self {
        Self { name, cluster_id, peers, known: Mutex::new(known), asked: Default::default() }
    }

    /// Where such a broker is reached.
    pub fn address(&self, broker: BrokerId) -> Option<String> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&broker).cloned()
    }

    /// The address that the broker called `name` has by the configuration of this one. The metadata may be older: brokers that were all
    /// stopped, and are started at other addresses, elect no leader that could change it before they reach each other.
    pub fn configured(&self, name: &str) -> Option<String> {
        self.peers.iter().find(|(n, _)| n == name).map(|(_, address)| address.clone())
    }

    /// It is not reached there: members are asked again.
    pub fn forget(&self, broker: BrokerId) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&broker);
    }

    /// Whether a member names `broker`; asks them where it is not known yet.
    pub async fn vouch_for(&self, broker: BrokerId, meta: &MetaState) -> bool {
        if self.address(broker).is_some() {
            return true;
        }
        let mut asked = self.asked.lock().await;
        if asked.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
            self.ask(meta).await;
            *asked = Some(Instant::now());
        }
        self.address(broker).is_some()
    }

    async fn ask(&self, meta: &MetaState) {
        let members = meta.brokers.values().filter(|b| b.phase() != Phase::Lost && b.name != self.name);
        let addresses: BTreeSet<String> = members
            .map(|b| b.peer_address.clone())
            .chain(self.peers.iter().map(|(_, address)| address.clone()))
            .filter(|a| !a.is_empty())
            .collect();
        let answers =
            addresses.iter().map(async |address| (address, hello(address, &self.name, &self.cluster_id).await));
        for (address, answer) in futures::future::join_all(answers).await {
            let Ok(answer) = answer else { continue };
            if !answer.active || answer.cluster_id != self.cluster_id {
                continue;
            }
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(BrokerId(answer.broker_id), address.clone());
            known.extend(answer.members.into_iter().map(|m| (BrokerId(m.broker_id), m.peer_address)));
        }
    }
}

/// Members as this broker knows them, for one that asks.
pub fn members(meta: &MetaState) -> Vec<v1::PeerMember> {
    let present = meta.brokers.values().filter(|b| b.phase() != Phase::Lost && !b.peer_address.is_empty());
    present.map(|b| v1::PeerMember { broker_id: b.id, peer_address: b.peer_address.clone() }).collect()
}
