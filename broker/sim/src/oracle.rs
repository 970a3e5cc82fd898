//! What must be true of a simulated cluster.

use crate::clients::value_of;
use crate::{Faults, Host, World};
use weir_checker::Log;
use weir_core::group::Group;
use weir_core::ids::{BrokerId, META_GROUP};
use weir_core::incarnation::Standing;
use weir_core::node::Node;
use weir_core::storage::Store as _;

/// Everything is as wanted this long after the last fault, ms.
const SETTLES_WITHIN_MS: u64 = 120_000;

impl World {
    /// Whether all groups are as the metadata wants them, each replica there and with everything, on a broker that knows its data is its own.
    pub(crate) fn is_whole(&self) -> bool {
        let Some(controller) = self.controller() else { return false };
        let meta = self.hosts[&controller].node.as_ref().expect("it leads").meta().clone();
        let groups = self.groups.iter().copied().chain([META_GROUP]);
        groups.into_iter().all(|id| {
            let Some(assignment) = meta.assignment(id).filter(|a| a.is_settled()) else { return false };
            let Some(leader) = self.leader_of(id).and_then(|b| self.group_at(b, id)) else { return false };
            assignment.replicas.iter().all(|replica| {
                let takes_part = |n: &&Node| n.standing() == Standing::TakingPart;
                let node = self.hosts.get(&BrokerId(replica.broker)).and_then(|host| host.node.as_ref());
                let held = node.filter(takes_part).and_then(|n| n.group(id));
                // what has just been appended is on its way
                held.is_some_and(|g| g.replica().0 == replica.id && g.applied() + 8 >= leader.applied())
            })
        })
    }

    /// Heals everything; then all must become whole, and go on.
    pub fn settle(&mut self) {
        self.become_whole();
        let before = self.progress();
        self.run(3_000, Faults::None);
        let stuck = before.iter().zip(self.progress()).position(|(before, after)| *before == after);
        assert_eq!(stuck, None, "healed, and nothing of this producer is taken any more");
        self.become_whole(); // leadership may just be moving to where it is preferred
    }

    fn become_whole(&mut self) {
        let begun = self.now;
        self.heal();
        while !(self.is_whole() && self.joining.is_empty() && self.draining.is_none()) {
            self.run(500, Faults::None);
            self.heal();
            let waited = self.now - begun;
            assert!(waited < SETTLES_WITHIN_MS, "healed {waited} ms ago, and not whole: {}", self.describe());
        }
    }

    fn describe(&self) -> String {
        let group = |g: &Group| {
            let (leader, asleep) = (g.leader().map_or(0, |l| l.0), if g.is_asleep() { " asleep" } else { "" });
            let voters = &g.conf().voters;
            format!("{}:r{} t{} a{} l{leader} of {voters:?}{asleep}", g.id(), g.replica().0, g.term(), g.applied())
        };
        let host = |(id, host): (&BrokerId, &Host)| match &host.node {
            Some(node) => {
                let groups: Vec<String> = node.groups().map(group).collect();
                let damaged = (node.damaged(), host.store.damaged());
                format!("{} {id} [{}] damaged {damaged:?}", host.name, groups.join(", "))
            }
            None => format!("{} {id} down", host.name),
        };
        let hosts: Vec<String> = self.hosts.iter().map(host).collect();
        let meta = self.controller().and_then(|c| Some(self.hosts[&c].node.as_ref()?.meta().clone()));
        let groups: Vec<String> =
            meta.iter().flat_map(|m| m.groups.iter().map(|(id, a)| format!("{id}: {a:?}"))).collect();
        format!(
            "{}\n{}\ndraining {:?}, {} joining",
            hosts.join("\n"),
            groups.join("\n"),
            self.draining,
            self.joining.len()
        )
    }

    /// Holds every replica against what the clients saw.
    pub fn check(&mut self) {
        for partition in 0..self.groups.len() as u32 {
            let leader = self.leader_of(self.groups[partition as usize]).expect("it is whole");
            self.saw_position(leader, partition);
        }
        let logs: Vec<Log<u64>> = self.hosts.iter().flat_map(|(id, host)| self.logs_of(*id, host)).collect();
        assert!(!logs.is_empty(), "nobody holds anything");
        self.history.check(&logs).assert_clean();
        let ids = self.allocator.tester.serialized_history();
        assert!(ids.is_some(), "the metadata is not linearizable: {:?}", self.allocator.tester);
    }

    fn logs_of(&self, id: BrokerId, host: &Host) -> Vec<Log<u64>> {
        let Some(node) = host.node.as_ref() else { return Vec::new() };
        let of_partition = |(partition, group): (usize, &weir_core::ids::GroupId)| {
            let group = node.group(*group)?;
            let log = group.log();
            let mut records = Vec::new();
            let mut index = log.oldest()?.index + 1;
            while index <= group.applied() {
                let entries = log.tail().entries(index, group.applied() + 1, u64::MAX).unwrap_or_else(|| {
                    let high = log.tail().first_index().min(group.applied() + 1);
                    host.store.entries(group.id(), index, high, u64::MAX).expect("readable")
                });
                index += entries.len() as u64;
                let batches = entries.iter().filter_map(weir_core::tail::LogBatch::of);
                records.extend(batches.map(|b| (b.base_offset, value_of(&b.data))));
            }
            let start = log.tail().start_offset();
            Some(Log { of: id.to_string(), partition: partition as u32, start, records })
        };
        self.groups.iter().enumerate().filter_map(of_partition).collect()
    }
}
