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
    /// Percent by which publishers are slowed, so that a replica catches up.
    pub slowed_percent: u64,
    /// Subscriptions' positions, by id.
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
    /// Everything below is acked, or was removed by retention.
    pub position: u64,
    /// Messages acked above.
    pub acked_above: u64,
}

impl Node {
    /// The groups led here with this id or a higher one, by id, but those whose leader does not know yet where they end.
    pub fn observe(&self, from: GroupId) -> Vec<GroupStatus> {
        let slowed = |g: &Group| self.paces.get(&g.id()).map_or(0, |p| p.share());
        let serving = self.groups.range(from..).map(|(_, group)| group).filter(|g| g.serves());
        serving.map(|g| GroupStatus { slowed_percent: slowed(g), ..observe(g) }).collect()
    }
}

impl Node {
    /// The groups led here in which the replica of `broker` is a member as it is wanted, and the index of the last entry that is
    /// committed in each. A broker that has applied as much is in sync.
    pub fn committed_for(&self, broker: BrokerId) -> Vec<(GroupId, u64)> {
        let of = |group: &Group| {
            let replica = self.meta().assignment(group.id())?.replica_on(broker)?;
            let members = if replica.learner { &group.conf().learners } else { &group.conf().voters };
            (group.serves() && members.contains(&replica.id)).then(|| (group.id(), group.applied()))
        };
        self.groups.values().filter_map(of).collect()
    }
}

fn observe(group: &Group) -> GroupStatus {
    let last = group.last_index();
    let conf = group.conf();
    let replica = |id: &u64| {
        let me = *id == group.replica().0;
        let behind = if me { 0 } else { group.lag(*id).unwrap_or(last) };
        ReplicaStatus {
            broker: group.brokers.get(id).copied().unwrap_or_default(),
            in_sync: me || group.caught_up(*id),
            voter: conf.voters.contains(id),
            entries_behind: behind,
            bytes_behind: group.bytes_of(behind),
        }
    };
    let tail = group.log().tail();
    let cursors = match group.machine() {
        Machine::Partition(state) => state
            .cursors
            .iter()
            .map(|(subscription, c)| {
                let (position, acked_above) = c.within(tail.start_offset());
                CursorStatus { subscription, position, acked_above }
            })
            .collect(),
        Machine::Meta(_) => Vec::new(),
    };
    GroupStatus {
        group: group.id(),
        term: group.term(),
        start_offset: tail.start_offset(),
        high_watermark: tail.high_watermark(),
        log_bytes: group.kept_bytes(),
        slowed_percent: 0,
        replicas: conf.voters.iter().chain(&conf.learners).map(replica).collect(),
        cursors,
    }
}
