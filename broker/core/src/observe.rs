//! What a node says about the groups it leads, for metrics, for people and for the operator. Reads, changes nothing.

use crate::group::{Group, Machine};
use crate::ids::{BrokerId, GroupId};
use crate::node::Node;

/// A group as its leader sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroupStatus {
    /// The group.
    pub group: GroupId,
    /// Raft term.
    pub term: u64,
    /// Offset of the first record kept.
    pub start_offset: u64,
    /// One past the last committed record.
    pub high_watermark: u64,
    /// Bytes of log kept.
    pub log_bytes: u64,
    /// Members: voters and learners.
    pub replicas: Vec<ReplicaStatus>,
    /// Subscriptions' positions.
    pub cursors: Vec<CursorStatus>,
}

/// A member of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReplicaStatus {
    /// Its broker, 0 where that is not known (any more).
    pub broker: BrokerId,
    /// Has nearly all of the log, and was heard of lately.
    pub in_sync: bool,
    /// Votes.
    pub voter: bool,
    /// Entries it lacks.
    pub entries_behind: u64,
    /// The same in bytes, by the average entry.
    pub bytes_behind: u64,
}

/// A subscription's position.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CursorStatus {
    /// Its id.
    pub subscription: u64,
    /// Everything below is acked.
    pub position: u64,
    /// Messages acked above.
    pub acked_above: u64,
}

impl Node {
    /// The groups led here, but those whose leader does not know yet where they end.
    pub fn observe(&self) -> Vec<GroupStatus> {
        self.groups.values().filter(|g| g.serves()).map(observe).collect()
    }
}

fn observe(group: &Group) -> GroupStatus {
    let (first, last) = (group.log().oldest().map_or(0, |c| c.index), group.last_index());
    let average = group.kept_bytes() / (last - first.min(last)).max(1);
    let conf = group.conf();
    let replica = |id: &u64| {
        let me = *id == group.replica().0;
        let behind = if me { 0 } else { group.lag(*id).unwrap_or(last) };
        ReplicaStatus {
            broker: group.brokers.get(id).copied().unwrap_or_default(),
            in_sync: me || group.caught_up(*id),
            voter: conf.voters.contains(id),
            entries_behind: behind,
            bytes_behind: (behind * average).min(group.kept_bytes()),
        }
    };
    let cursors = match group.machine() {
        Machine::Partition(state) => state
            .cursors
            .iter()
            .map(|(subscription, c)| CursorStatus {
                subscription,
                position: c.position(),
                acked_above: c.acked_above(),
            })
            .collect(),
        Machine::Meta(_) => Vec::new(),
    };
    let tail = group.log().tail();
    GroupStatus {
        group: group.id(),
        term: group.term(),
        start_offset: tail.start_offset(),
        high_watermark: tail.high_watermark(),
        log_bytes: group.kept_bytes(),
        replicas: conf.voters.iter().chain(&conf.learners).map(replica).collect(),
        cursors,
    }
}
