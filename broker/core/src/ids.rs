//! Identifiers and positions. Newtypes, so that an offset is never passed for an index.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(/// A broker's identity: given once by the metadata group, kept on disk, never reused.
    BrokerId);
id!(/// A Raft group: the metadata group is 0, each partition has one. Never reused.
    GroupId);
id!(/// One replica of one group. A replica that lost its data comes back under a new id,
    /// so a stale message or vote can never be counted for it.
    ReplicaId);
id!(/// A topic's identity; a topic deleted and made again under one name has a new one.
    TopicId);
id!(/// A subscription's identity; never reused.
    SubscriptionId);
id!(/// Correlates a request with its reply; made by the caller of [`crate::node::Node`].
    Ticket);

/// The metadata group.
pub const META_GROUP: GroupId = GroupId(0);

/// A replica and the broker that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Replica {
    /// The replica's id, which is its id in Raft.
    pub id: ReplicaId,
    /// The broker that holds it.
    pub broker: BrokerId,
}
