//! How a group's membership gets from what it is to what is wanted, one step at a time:
//! add a learner, let it catch up, then one joint change that promotes and removes. Pure.

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};

/// What the leader does next.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Membership is what is wanted.
    Settled,
    /// Something is under way; ask again.
    Wait,
    /// Propose this change.
    Change(ConfChangeV2),
    /// The leader itself is not wanted: hand leadership to this replica first.
    Transfer(u64),
}

fn change(list: impl IntoIterator<Item = (ConfChangeType, u64)>) -> Step {
    let single = |(kind, id)| {
        let mut c = ConfChangeSingle::default();
        c.set_change_type(kind);
        c.node_id = id;
        c
    };
    let mut out = ConfChangeV2::default();
    out.set_changes(list.into_iter().map(single).collect::<Vec<_>>().into());
    Step::Change(out)
}

/// The next step of a leader `me` whose group has membership `conf`.
/// `caught_up` tells whether a replica has nearly all of the log and was heard of lately.
pub fn next_step(
    me: u64,
    conf: &ConfState,
    want_voters: &[u64],
    want_learners: &[u64],
    caught_up: impl Fn(u64) -> bool,
) -> Step {
    if !conf.voters_outgoing.is_empty() {
        // it leaves by itself, unless the leader that entered it stepped down at the wrong moment
        return Step::Change(ConfChangeV2::default());
    }
    let member = |id: &u64| conf.voters.contains(id) || conf.learners.contains(id);
    if let Some(missing) = want_voters.iter().chain(want_learners).find(|id| !member(id)) {
        return change([(ConfChangeType::AddLearnerNode, *missing)]);
    }
    let promote: Vec<u64> = want_voters.iter().copied().filter(|id| conf.learners.contains(id)).collect();
    if promote.iter().any(|id| !caught_up(*id)) {
        return Step::Wait;
    }
    let unwanted = |id: &&u64| !want_voters.contains(id) && !want_learners.contains(id) && **id != me;
    let remove = conf.voters.iter().chain(&conf.learners).filter(unwanted).copied();
    let demote = conf.voters.iter().filter(|id| want_learners.contains(id) && **id != me).copied();
    let list: Vec<_> = (promote.iter().map(|id| (ConfChangeType::AddNode, *id)))
        .chain(demote.map(|id| (ConfChangeType::AddLearnerNode, id)))
        .chain(remove.map(|id| (ConfChangeType::RemoveNode, id)))
        .collect();
    if !list.is_empty() {
        return change(list);
    }
    if want_voters.contains(&me) {
        return Step::Settled;
    }
    want_voters.iter().find(|id| caught_up(**id)).map_or(Step::Wait, |id| Step::Transfer(*id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(voters: &[u64], learners: &[u64]) -> ConfState {
        ConfState { voters: voters.to_vec(), learners: learners.to_vec(), ..Default::default() }
    }

    fn kinds(step: Step) -> Vec<(ConfChangeType, u64)> {
        let Step::Change(c) = step else { panic!("{step:?}") };
        c.get_changes().iter().map(|c| (c.get_change_type(), c.node_id)).collect()
    }

    #[test]
    fn a_replica_is_replaced_by_way_of_a_learner() {
        let want = [1, 2, 4];
        let add = kinds(next_step(1, &conf(&[1, 2, 3], &[]), &want, &[], |_| true));
        assert_eq!(add, vec![(ConfChangeType::AddLearnerNode, 4)]);
        assert_eq!(next_step(1, &conf(&[1, 2, 3], &[4]), &want, &[], |_| false), Step::Wait);
        let joint = kinds(next_step(1, &conf(&[1, 2, 3], &[4]), &want, &[], |_| true));
        assert_eq!(joint, vec![(ConfChangeType::AddNode, 4), (ConfChangeType::RemoveNode, 3)]);
        assert_eq!(next_step(1, &conf(&[1, 2, 4], &[]), &want, &[], |_| true), Step::Settled);
    }

    #[test]
    fn a_leader_that_is_not_wanted_hands_over_before_it_goes() {
        assert_eq!(next_step(3, &conf(&[1, 2, 3], &[]), &[1, 2], &[], |_| true), Step::Transfer(1));
        assert_eq!(next_step(3, &conf(&[1, 2, 3], &[]), &[1, 2], &[], |_| false), Step::Wait);
        let removed = kinds(next_step(1, &conf(&[1, 2, 3], &[]), &[1, 2], &[], |_| true));
        assert_eq!(removed, vec![(ConfChangeType::RemoveNode, 3)]);
    }
}
