//! How a broker gets its identity. A cluster is formed once, only when all the brokers named at start answer and none of
//! them belongs to a cluster: first all keep the plan on disk, then all act on it. An empty disk that finds
//! a cluster joins it under a new id; an empty disk alone waits.

use crate::aside::{self, CanReplace};
use crate::peers;
use prost::Message as _;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use weir_core::ids::BrokerId;
use weir_core::meta::state::{Broker, MetaState};
use weir_core::storage::StoreError;
use weir_proto::v1;
use weir_store::rocks::RocksStore;

const KEY: &str = "identity";
/// Bytes of a cluster's id; brokers make ids of 36.
const CLUSTER_ID_BYTES_MAX: usize = 128;

/// What a broker's disk says it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Identity {
    /// The cluster.
    #[prost(string, tag = "1")]
    pub cluster_id: String,
    /// Its id there.
    #[prost(uint64, tag = "2")]
    pub broker_id: u64,
    /// Takes part; false while it has only prepared.
    #[prost(bool, tag = "3")]
    pub active: bool,
    /// The state the cluster starts with, where this broker formed it.
    #[prost(bytes = "bytes", tag = "4")]
    pub state: bytes::Bytes,
}

/// The identity and what changes it.
pub struct Formation {
    /// This broker as others will know it.
    pub me: Broker,
    peers: Vec<(String, String)>,
    /// the cluster an administrator knows this broker to belong to; empty where there may be none yet
    expected: String,
    store: Arc<RocksStore>,
    identity: Mutex<Identity>,
    changed: Notify,
}

/// Why a plan to form a cluster is refused.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It is of another cluster than this broker.
    #[error("{name} {relation} cluster '{own}', not '{asked}'")]
    OtherCluster {
        /// This broker.
        name: String,
        /// What binds it to its cluster.
        relation: &'static str,
        /// That cluster.
        own: String,
        /// The cluster of the plan.
        asked: String,
    },
    /// This broker acts on this plan already.
    #[error("{name} is a member of cluster '{own}' already")]
    Formed {
        /// This broker.
        name: String,
        /// Its cluster.
        own: String,
    },
    /// The plan to act on was not kept here.
    #[error("no plan of cluster '{0}' is prepared here; prepare it first")]
    NotPrepared(String),
    /// The plan is none for this broker.
    #[error("{0}")]
    Invalid(String),
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Asks a broker who it is.
pub(crate) async fn hello(address: &str, name: &str, cluster_id: &str) -> anyhow::Result<v1::HelloResponse> {
    let ask = async {
        let request = v1::HelloRequest { name: name.to_owned(), cluster_id: cluster_id.to_owned() };
        anyhow::Ok(peers::connect(address).await?.hello(request).await?.into_inner())
    };
    tokio::time::timeout(Duration::from_secs(1), ask).await?
}

/// Asks the other members of the cluster whether they can replace the data of the broker called `name`.
pub fn others_can_replace(peers: Vec<(String, String)>, name: String, data: PathBuf) -> CanReplace {
    let asked = Arc::new((peers, name));
    Arc::new(move || {
        let (asked, cluster_id) = (asked.clone(), aside::cluster(&data));
        Box::pin(async move {
            let (peers, name) = &*asked;
            for (_, address) in peers.iter().filter(|(n, _)| n != name && !cluster_id.is_empty()) {
                if let Ok(hello) = hello(address, name, &cluster_id).await
                    && hello.active
                    && hello.cluster_id == cluster_id
                    && hello.caller_is_replaceable
                {
                    return true;
                }
            }
            false
        })
    })
}

impl Formation {
    /// Reads the disk.
    pub fn open(
        me: Broker,
        peers: Vec<(String, String)>,
        expected: String,
        store: Arc<RocksStore>,
    ) -> Result<Self, StoreError> {
        let found = store.meta(KEY)?;
        let identity = found.map(|bytes| Identity::decode(&*bytes)).transpose();
        let identity = identity.map_err(|e| {
            let what = format!("the broker's identity is damaged: {e}");
            store.note_damage(&what);
            StoreError::Corrupt(what)
        })?;
        let identity = Mutex::new(identity.unwrap_or_default());
        Ok(Self { me, peers, expected, store, identity, changed: Notify::new() })
    }

    /// Names and peer addresses of the other brokers, as configured at start.
    pub fn others(&self) -> Vec<(String, String)> {
        self.peers.iter().filter(|(name, _)| *name != self.me.name).cloned().collect()
    }

    /// The identity now.
    pub fn identity(&self) -> Identity {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, identity: Identity) -> Result<(), StoreError> {
        let mut held = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        self.store.put_meta(KEY, &identity.encode_to_vec())?;
        *held = identity;
        drop(held);
        self.changed.notify_waiters();
        Ok(())
    }

    /// A coordinator asks to keep its plan.
    pub fn prepare(&self, cluster_id: &str, state: bytes::Bytes) -> Result<(), PlanError> {
        self.check_cluster(cluster_id)?;
        let now = self.identity();
        if now.active {
            return Err(PlanError::Formed { name: self.me.name.clone(), own: now.cluster_id });
        }
        let meta =
            MetaState::decode(state.clone()).map_err(|e| PlanError::Invalid(format!("the plan's state: {e}")))?;
        if cluster_id.is_empty() || cluster_id.len() > CLUSTER_ID_BYTES_MAX {
            let bytes = cluster_id.len();
            let text = format!("a cluster's id has 1 to {CLUSTER_ID_BYTES_MAX} bytes, not {bytes}");
            return Err(PlanError::Invalid(text));
        }
        if meta.cluster_id != cluster_id {
            let text = format!("the plan of cluster '{cluster_id}' holds the state of cluster '{}'", meta.cluster_id);
            return Err(PlanError::Invalid(text));
        }
        let mine = meta.broker_named(&self.me.name).map(|b| b.id);
        let absent = || PlanError::Invalid(format!("{} is not in the plan of cluster '{cluster_id}'", self.me.name));
        let broker_id = mine.ok_or_else(absent)?;
        Ok(self.keep(Identity { cluster_id: cluster_id.to_owned(), broker_id, active: false, state })?)
    }

    /// Refuses a plan of another cluster than the one that this broker belongs to, or is meant for.
    fn check_cluster(&self, asked: &str) -> Result<(), PlanError> {
        let now = self.identity();
        let (relation, own) = match now.active {
            true => ("belongs to", now.cluster_id),
            false => ("is to join", self.expected.clone()),
        };
        if own.is_empty() || own == asked {
            return Ok(());
        }
        Err(PlanError::OtherCluster { name: self.me.name.clone(), relation, own, asked: asked.to_owned() })
    }

    /// The plan is kept by all: act on it.
    pub fn activate(&self, cluster_id: &str) -> Result<(), PlanError> {
        self.check_cluster(cluster_id)?;
        let now = self.identity();
        if cluster_id.is_empty() || now.cluster_id != cluster_id {
            return Err(PlanError::NotPrepared(cluster_id.to_owned()));
        }
        if !now.active {
            self.keep(Identity { active: true, ..now })?;
        }
        Ok(())
    }

    /// Waits until this broker has an identity it may act on, forming or joining a cluster where it must.
    /// Also gives the addresses of the brokers found on the way.
    pub async fn establish(&self) -> anyhow::Result<(Identity, HashMap<BrokerId, String>)> {
        let others: Vec<&(String, String)> = self.peers.iter().filter(|(name, _)| *name != self.me.name).collect();
        let mut known = HashMap::new();
        let mut said = false;
        let mut refused = String::new();
        loop {
            let now = self.identity();
            if now.active {
                return Ok((now, known));
            }
            if others.is_empty() && self.expected.is_empty() {
                self.form(Vec::new()).await?;
                continue;
            }
            let mut hellos = Vec::new();
            for (name, address) in &others {
                if let Ok(hello) = hello(address, &self.me.name, &now.cluster_id).await {
                    if hello.active {
                        known.insert(BrokerId(hello.broker_id), address.clone());
                    }
                    hellos.push((name.clone(), address.clone(), hello));
                }
            }
            let right = |h: &v1::HelloResponse| self.expected.is_empty() || h.cluster_id == self.expected;
            if let Some((_, address, hello)) = hellos.iter().find(|(_, _, h)| h.active && right(h)) {
                if hello.cluster_id == now.cluster_id {
                    self.activate(&hello.cluster_id)?;
                } else if let Err(error) = self.join(address, &hello.cluster_id).await {
                    let why = format!("{error:#}");
                    if why != refused {
                        tracing::info!(%error, "waiting to join");
                        refused = why;
                    }
                }
            } else if !self.expected.is_empty() {
                if !said {
                    said = true;
                    tracing::warn!(
                        cluster = self.expected,
                        "this disk is empty and no broker of the cluster answers: waiting to join, another cluster is never formed"
                    );
                }
            } else if hellos.len() == others.len() && self.peers.iter().all(|(n, _)| *n >= self.me.name) {
                let found = hellos.into_iter().map(|(name, address, _)| (name, address)).collect();
                if let Err(error) = self.form(found).await {
                    tracing::info!(%error, "forming the cluster");
                }
            } else if !said {
                said = true;
                tracing::info!(
                    found = hellos.len(),
                    of = others.len(),
                    "waiting for the other brokers to form a cluster"
                );
            }
            let _ = tokio::time::timeout(Duration::from_millis(200), self.changed.notified()).await;
        }
    }

    /// As the first by name: writes the plan to all disks, then acts.
    async fn form(&self, others: Vec<(String, String)>) -> anyhow::Result<()> {
        let cluster_id = uuid::Uuid::new_v4().to_string();
        let mut brokers = vec![Broker { id: 1, ..self.me.clone() }];
        for (at, (name, peer_address)) in others.iter().enumerate() {
            let (name, peer_address) = (name.clone(), peer_address.clone());
            brokers.push(Broker { id: at as u64 + 2, name, peer_address, ..Default::default() });
        }
        let state = bytes::Bytes::from(MetaState::form(&cluster_id, &brokers).encode_to_vec());
        let request = v1::FormRequest { cluster_id: cluster_id.clone(), state: state.clone() };
        for (_, address) in &others {
            peers::connect(address).await?.prepare(request.clone()).await?;
        }
        self.prepare(&cluster_id, state)?;
        self.activate(&cluster_id)?;
        tracing::info!(cluster = cluster_id, brokers = brokers.len(), "formed a cluster");
        for (_, address) in &others {
            // one that misses this asks, and is told that the cluster is there
            if let Ok(mut peer) = peers::connect(address).await {
                let _ = peer.activate(request.clone()).await;
            }
        }
        Ok(())
    }

    async fn join(&self, address: &str, cluster_id: &str) -> anyhow::Result<()> {
        let request = v1::JoinRequest {
            name: self.me.name.clone(),
            client_address: self.me.client_address.clone(),
            peer_address: self.me.peer_address.clone(),
            admin_address: self.me.admin_address.clone(),
            rack: self.me.rack.clone(),
            cluster_id: cluster_id.to_owned(),
            passed_on: None,
            rebuilt_because: self.me.rebuilt_because.clone(),
        };
        let answer = peers::connect(address).await?.join(request).await?.into_inner();
        tracing::info!(cluster = answer.cluster_id, broker = answer.broker_id, "joined");
        let v1::JoinResponse { cluster_id, broker_id } = answer;
        self.keep(Identity { cluster_id, broker_id, active: true, state: bytes::Bytes::new() })?;
        Ok(())
    }
}
