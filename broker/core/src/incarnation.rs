//! Guard against rolled-back volumes: whether the data of this broker is the newest that ever was.
//!
//! An old copy of a volume forgets votes and acknowledged records, and nothing in the copy itself shows that. Therefore each
//! broker counts the starts and the progress of its data in an [`Incarnation`], which other brokers remember. A broker that starts
//! with data asks the others first, and until then it neither votes nor appends.
//!
//! | state | meaning |
//! |---|---|
//! | [`Standing::Asking`] | The other brokers are asked which incarnation of this broker they know. |
//! | [`Standing::Recording`] | They know of none above. The next one is being written and synced. |
//! | [`Standing::TakingPart`] | Everything is as usual. |
//! | [`Standing::RolledBack`] | One knows a newer incarnation. This data is never used again. |
//!
//! An incarnation is on the broker's own disk before another broker learns of it, and only then in the metadata. A crash between
//! these steps leaves the broker's own number the highest, so a healthy broker never appears to be rolled back.

use crate::group::Group;
use crate::ids::{BrokerId, META_GROUP};
use crate::meta::command::{Command, Kind, SetIncarnation};
use crate::meta::state::{MetaState, Phase};
use crate::node::{Alarm, Node, PeerMessage, mix};
use crate::storage::WriteOp;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// How far the data of a broker has come: its starts in the upper 32 bits, and marks within one start in the lower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// Number of starts.
    pub fn start(self) -> u64 {
        self.0 >> 32
    }

    /// The incarnation of the next start.
    pub fn next_start(self) -> Self {
        Self(self.start().saturating_add(1).min(u64::from(u32::MAX)) << 32)
    }

    /// The next mark while the broker runs.
    pub fn next_mark(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.start(), self.0 & u64::from(u32::MAX))
    }
}

/// Asks which incarnation of the sender the receiver knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Incarnation of the sender's data.
    pub incarnation: Incarnation,
    /// Identifies the sender's process: an answer to an earlier one counts for nothing.
    pub nonce: u64,
}

/// Answers a [`Query`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// As in the query.
    pub nonce: u64,
    /// The newest incarnation of the asking broker that the sender knows.
    pub newest: Incarnation,
    /// Whether the sender itself takes part, so that its own data is known to be the newest.
    pub takes_part: bool,
    /// Version of the metadata that `members` is from.
    pub version: u64,
    /// Brokers of the cluster.
    pub members: Vec<BrokerId>,
    /// Whether the others have everything without the asking broker, as the metadata leader sees it: the data may be set aside.
    pub rebuild: bool,
    /// Brokers whose volumes are known to be rolled back.
    pub rolled_back: Vec<BrokerId>,
    /// Log time of the sender, ms since the epoch: the asking broker has compared clocks before it takes part.
    pub log_ms: u64,
}

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Other brokers are being asked.
    #[default]
    Asking,
    /// The next incarnation is on its way to the disk.
    Recording,
    /// As usual.
    TakingPart,
    /// Another broker knows a newer incarnation of this one.
    RolledBack {
        /// That incarnation.
        newest: Incarnation,
        /// The broker that knows it.
        known_by: BrokerId,
    },
}

/// What follows from the answers so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// More answers are needed.
    Wait,
    /// This data is the newest, as far as can be known.
    Newest,
    /// It is not.
    Old { newest: Incarnation, known_by: BrokerId },
}

/// Judges the answers that the broker `me` got about its data of incarnation `own`. `version` and `members` are its own metadata.
///
/// One answer that names a newer incarnation decides. Otherwise either all members must have answered, or a majority that counts
/// only members that take part, or after a while (`waited`) any majority: where a whole cluster starts, each member may be the
/// only one that remembers.
pub fn judge(
    me: BrokerId,
    own: Incarnation,
    version: u64,
    members: &[BrokerId],
    answers: &BTreeMap<BrokerId, Answer>,
    waited: bool,
) -> Judgement {
    let newest = answers.iter().max_by_key(|(_, a)| a.newest).filter(|(_, a)| a.newest > own);
    if let Some((known_by, answer)) = newest {
        return Judgement::Old { newest: answer.newest, known_by: *known_by };
    }
    // metadata of a broker that was away may name members that are gone for good
    let newer = answers.values().filter(|a| a.version > version).max_by_key(|a| a.version);
    let members = newer.map_or(members, |a| &a.members[..]);
    let others: BTreeSet<BrokerId> = members.iter().copied().filter(|b| *b != me).collect();
    let majority = others.len().div_ceil(2);
    let from = |counts: fn(&Answer) -> bool| others.iter().filter(|b| answers.get(b).is_some_and(counts)).count();
    let (all, running) = (from(|_| true), from(|a| a.takes_part));
    if all == others.len() || running >= majority || waited && all >= majority {
        return Judgement::Newest;
    }
    Judgement::Wait
}

/// Ticks after which any majority of answers is enough: 5 s.
const WAIT_TICKS: u64 = 100;
/// A mark is set at most once in this time, and only together with what is written anyway, ms.
const MARK_EVERY_MS: u64 = 1_000;
/// Another broker's incarnation is written at the latest after this many ticks (10 s), even if nothing else is written.
const REMEMBER_TICKS: u64 = 200;

/// The guard of one broker.
#[derive(Default)]
pub(crate) struct Guard {
    pub(crate) standing: Standing,
    /// on this broker's disk
    pub(crate) own: Incarnation,
    /// in a round that is not confirmed yet
    writing: Option<(u64, Incarnation)>,
    marked_ms: u64,
    nonce: u64,
    asked_since: u64,
    answers: BTreeMap<BrokerId, Answer>,
    /// of other brokers, the newest known
    newest: BTreeMap<BrokerId, Incarnation>,
    /// of those, not on this disk yet
    unwritten: BTreeSet<BrokerId>,
    /// brokers that asked with data older than is known here
    rolled_back: BTreeSet<BrokerId>,
}

impl Guard {
    /// The guard of the broker `me` as its disk has it; an empty disk holds nothing that could be old.
    pub(crate) fn open(me: BrokerId, incarnations: &[(BrokerId, Incarnation)], empty: bool, seed: u64) -> Self {
        let own = incarnations.iter().find(|(b, _)| *b == me).map_or(Incarnation::default(), |(_, i)| *i);
        let newest = incarnations.iter().copied().filter(|(b, _)| *b != me).collect();
        let fresh = empty && own == Incarnation::default();
        let standing = if fresh { Standing::TakingPart } else { Standing::Asking };
        Self { standing, own, nonce: mix(seed), newest, ..Self::default() }
    }
}

impl Node {
    /// Whether this broker votes and appends, and if not, why.
    pub fn standing(&self) -> Standing {
        self.guard.standing
    }

    /// The incarnation of this broker's data, as it is on its disk.
    pub fn incarnation(&self) -> Incarnation {
        self.guard.own
    }

    /// Brokers whose volumes are known to be rolled back.
    pub fn rolled_back(&self) -> &BTreeSet<BrokerId> {
        &self.guard.rolled_back
    }

    pub(crate) fn takes_part(&self) -> bool {
        self.guard.standing == Standing::TakingPart
    }

    /// Writes the first incarnation of an empty disk, or asks about the data of another.
    pub(crate) fn begin_guard(&mut self) {
        if self.takes_part() {
            self.record_start();
        } else {
            self.consider_answers();
            self.ask_about_incarnation();
        }
    }

    fn record_start(&mut self) {
        let incarnation = self.guard.own.next_start();
        self.ops.push(WriteOp::Incarnation { broker: self.broker, incarnation });
        self.guard.writing = Some((0, incarnation)); // the round gets its number when it is made
    }

    fn members(&self) -> Vec<BrokerId> {
        let there = |p: Phase| matches!(p, Phase::Active | Phase::Draining);
        self.meta.brokers.values().filter(|b| there(b.phase())).map(|b| BrokerId(b.id)).collect()
    }

    fn consider_answers(&mut self) {
        if self.guard.standing != Standing::Asking {
            return;
        }
        let waited = self.ticks - self.guard.asked_since >= WAIT_TICKS;
        let (version, members) = (self.meta.version, self.members());
        match judge(self.broker, self.guard.own, version, &members, &self.guard.answers, waited) {
            Judgement::Wait => {}
            Judgement::Newest => {
                self.guard.standing = Standing::Recording;
                self.out.standing = Some(Standing::Recording);
                self.record_start();
            }
            Judgement::Old { newest, known_by } => {
                let standing = Standing::RolledBack { newest, known_by };
                self.guard.standing = standing;
                self.out.standing = Some(standing);
                self.out.alarms.push(Alarm::RolledBack { broker: self.broker, data: self.guard.own, newest });
                self.names_rolled_back([self.broker]);
            }
        }
    }

    fn names_rolled_back(&mut self, brokers: impl IntoIterator<Item = BrokerId>) {
        let before = self.guard.rolled_back.len();
        self.guard.rolled_back.extend(brokers);
        if self.guard.rolled_back.len() != before {
            self.out.rolled_back = Some(self.guard.rolled_back.clone());
        }
    }

    /// Asks all brokers that are known or have sent something, while this one does not take part.
    pub(crate) fn ask_about_incarnation(&mut self) {
        if !matches!(self.guard.standing, Standing::Asking | Standing::RolledBack { .. }) {
            return;
        }
        self.consider_answers(); // also because time has passed
        let query = Query { incarnation: self.guard.own, nonce: self.guard.nonce };
        let mut others: BTreeSet<BrokerId> = self.members().into_iter().chain(self.heard.keys().copied()).collect();
        others.remove(&self.broker);
        self.out.direct.extend(others.into_iter().map(|to| (to, PeerMessage::IncarnationQuery(query))));
    }

    /// Takes part from now on.
    fn take_part(&mut self) {
        self.guard.standing = Standing::TakingPart;
        self.out.standing = Some(Standing::TakingPart);
        self.guard.answers.clear();
        self.out.pulse = Some(self.pulse()); // others know of it before anything is acknowledged
        let alone = |g: &&mut Group| g.conf().voters == [g.replica().0];
        for group in self.groups.values_mut().filter(alone) {
            group.campaign(); // alone, it need not wait for anyone
        }
        self.dirty.extend(self.groups.keys());
    }

    /// The newest incarnation of a broker that is known here.
    fn newest_of(&self, broker: BrokerId) -> Incarnation {
        let recorded = self.meta.broker(broker).map_or(0, |b| b.incarnation);
        self.guard.newest.get(&broker).copied().unwrap_or_default().max(Incarnation(recorded))
    }

    /// Learns the incarnation of a broker that takes part. Returns true if it was started anew.
    pub(crate) fn learn_incarnation(&mut self, broker: BrokerId, incarnation: Incarnation) -> bool {
        if self.guard.rolled_back.remove(&broker) {
            self.out.rolled_back = Some(self.guard.rolled_back.clone());
        }
        let known = self.guard.newest.entry(broker).or_default();
        if *known >= incarnation {
            return false;
        }
        let started = known.start() != incarnation.start();
        *known = incarnation;
        self.guard.unwritten.insert(broker);
        started
    }

    pub(crate) fn answer_query(&mut self, from: BrokerId, query: Query) {
        let newest = self.newest_of(from);
        if newest > query.incarnation && !self.guard.rolled_back.contains(&from) {
            self.out.alarms.push(Alarm::RolledBack { broker: from, data: query.incarnation, newest });
            self.names_rolled_back([from]);
        }
        let answer = Answer {
            nonce: query.nonce,
            newest,
            takes_part: self.takes_part(),
            version: self.meta.version,
            members: self.members(),
            rebuild: self.may_rebuild(from),
            rolled_back: self.guard.rolled_back.iter().copied().collect(),
            log_ms: self.now.log_ms,
        };
        self.out.direct.push((from, PeerMessage::IncarnationAnswer(answer)));
    }

    pub(crate) fn take_answer(&mut self, from: BrokerId, answer: Answer) {
        let asking = matches!(self.guard.standing, Standing::Asking | Standing::RolledBack { .. });
        if !asking || answer.nonce != self.guard.nonce {
            return;
        }
        self.compare_clocks(from, answer.log_ms);
        let rebuild = answer.rebuild;
        let named: Vec<BrokerId> = answer.rolled_back.iter().copied().filter(|b| *b != self.broker).collect();
        self.names_rolled_back(named);
        self.guard.answers.insert(from, answer);
        self.consider_answers();
        if let Standing::RolledBack { newest, .. } = self.guard.standing
            && rebuild
        {
            self.out.set_aside = Some(newest);
        }
    }

    /// As metadata leader: whether every group of which a broker holds a replica has a majority of voters elsewhere, on brokers that
    /// run and are not rolled back. Then its data may go.
    fn may_rebuild(&self, broker: BrokerId) -> bool {
        if !self.groups.get(&META_GROUP).is_some_and(Group::serves) {
            return false;
        }
        let lives = |id: u64| {
            let id = BrokerId(id);
            id == self.broker || self.was_heard(id) && !self.guard.rolled_back.contains(&id)
        };
        self.meta.groups.values().filter(|a| a.replica_on(broker).is_some()).all(|assignment| {
            let voters = assignment.replicas.iter().filter(|r| !r.learner);
            let elsewhere = voters.clone().filter(|r| r.broker != broker.0 && lives(r.broker)).count();
            elsewhere > voters.count() / 2
        })
    }

    /// Adds to a round that is synced anyway what is to be remembered of incarnations, and sets a mark in this broker's own.
    pub(crate) fn mark_round(&mut self, round: u64, sync: bool, ops: &mut Vec<WriteOp>) {
        if let Some((number, _)) = self.guard.writing.as_mut().filter(|(number, _)| *number == 0) {
            *number = round;
            self.guard.marked_ms = self.now.mono_ms;
            return;
        }
        if !sync || !self.takes_part() {
            return;
        }
        // in the same round as what they ask this broker to keep, so that an ack of it is proof of them
        self.remember_others(ops);
        if self.now.mono_ms < self.guard.marked_ms.saturating_add(MARK_EVERY_MS) {
            return;
        }
        self.guard.marked_ms = self.now.mono_ms;
        if self.guard.writing.is_none() {
            let incarnation = self.guard.own.next_mark();
            self.guard.writing = Some((round, incarnation));
            ops.push(WriteOp::Incarnation { broker: self.broker, incarnation });
        }
    }

    fn remember_others(&mut self, ops: &mut Vec<WriteOp>) {
        for broker in std::mem::take(&mut self.guard.unwritten) {
            if let Some(incarnation) = self.guard.newest.get(&broker).copied() {
                ops.push(WriteOp::Incarnation { broker, incarnation });
            }
        }
    }

    /// What other brokers said of themselves is written, also where nothing else is.
    pub(crate) fn remember_incarnations(&mut self) {
        if self.takes_part() && self.ticks.is_multiple_of(REMEMBER_TICKS) && !self.guard.unwritten.is_empty() {
            let mut ops = std::mem::take(&mut self.ops);
            self.remember_others(&mut ops);
            self.ops = ops;
        }
    }

    /// Rounds up to this one are on disk.
    pub(crate) fn incarnation_synced(&mut self, round: u64) {
        let Some((_, incarnation)) = self.guard.writing.filter(|(number, _)| *number != 0 && *number <= round) else {
            return;
        };
        self.guard.writing = None;
        self.guard.own = incarnation;
        if self.guard.standing == Standing::Recording {
            self.take_part();
        }
    }

    /// As metadata leader: starts of brokers that the metadata does not name yet.
    pub(crate) fn unrecorded_starts(&self) -> Vec<Command> {
        let own = (self.broker, self.guard.own);
        let all = self.guard.newest.iter().map(|(b, i)| (*b, *i)).chain([own]);
        let new = all.filter(|(broker, incarnation)| {
            let recorded = self.meta.broker(*broker).map(|b| Incarnation(b.incarnation).start());
            recorded.is_some_and(|start| start < incarnation.start())
        });
        new.map(|(b, i)| Kind::SetIncarnation(SetIncarnation { broker: b.0, incarnation: i.0 }).into()).collect()
    }

    /// Forgets brokers that are gone for good; ids only grow.
    pub(crate) fn forget_incarnations(&mut self, meta: &MetaState) {
        let there = |b: &BrokerId| b.0 > meta.last_id || meta.broker(*b).is_some_and(|b| b.phase() != Phase::Lost);
        self.guard.newest.retain(|broker, _| there(broker));
        let before = self.guard.rolled_back.len();
        self.guard.rolled_back.retain(there);
        if self.guard.rolled_back.len() != before {
            self.out.rolled_back = Some(self.guard.rolled_back.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: BrokerId = BrokerId(1);

    fn answer(newest: u64, takes_part: bool) -> Answer {
        Answer { newest: Incarnation(newest), takes_part, ..Default::default() }
    }

    fn judged(own: u64, members: u64, answers: &[(u64, Answer)], waited: bool) -> Judgement {
        let members: Vec<BrokerId> = (1..=members).map(BrokerId).collect();
        let answers = answers.iter().map(|(b, a)| (BrokerId(*b), a.clone())).collect();
        judge(ME, Incarnation(own), 7, &members, &answers, waited)
    }

    #[test]
    fn one_broker_that_knows_a_newer_incarnation_decides() {
        let old = Judgement::Old { newest: Incarnation(6), known_by: BrokerId(3) };
        assert_eq!(judged(5, 3, &[(2, answer(5, true)), (3, answer(6, false))], false), old);
        assert_eq!(judged(5, 9, &[(3, answer(6, false))], false), old);
    }

    #[test]
    fn a_running_majority_is_enough_at_once_and_others_are_waited_for() {
        assert_eq!(judged(5, 1, &[], false), Judgement::Newest, "alone");
        assert_eq!(judged(5, 3, &[], true), Judgement::Wait);
        assert_eq!(judged(5, 3, &[(2, answer(5, true))], false), Judgement::Newest);
        assert_eq!(judged(5, 3, &[(2, answer(5, false))], false), Judgement::Wait, "the third may know better");
        assert_eq!(judged(5, 3, &[(2, answer(5, false))], true), Judgement::Newest);
        assert_eq!(judged(5, 3, &[(2, answer(5, false)), (3, answer(0, false))], false), Judgement::Newest);
        assert_eq!(judged(5, 5, &[(2, answer(5, true))], true), Judgement::Wait, "two of five are no majority");
        assert_eq!(judged(5, 5, &[(9, answer(5, true)), (8, answer(5, true))], true), Judgement::Wait, "no members");
    }

    #[test]
    fn members_that_were_replaced_while_this_broker_was_away_are_not_waited_for() {
        let newer = Answer { version: 8, members: [1, 4, 5].map(BrokerId).to_vec(), ..answer(5, true) };
        assert_eq!(judged(5, 3, &[(4, newer)], false), Judgement::Newest);
    }

    #[test]
    fn starts_and_marks_only_grow() {
        let first = Incarnation::default().next_start();
        assert!(first.next_mark() > first && first.next_mark().next_start() > first.next_mark());
        let last = Incarnation(u64::MAX);
        assert!(last.next_mark() >= last && last.next_start().start() == last.start());
    }

    proptest! {
        /// Each step of a start may be the last before a crash, and each message may be lost or late.
        #[test]
        fn a_healthy_broker_is_never_taken_for_one_that_was_rolled_back(steps in proptest::collection::vec(0u8..4, 1..200)) {
            let (mut disk, mut announced, mut recorded) = Default::default();
            for step in steps {
                match step {
                    0 => disk = Incarnation::next_start(disk),
                    1 => disk = disk.next_mark(),
                    2 => announced = disk,
                    _ => recorded = announced.max(recorded),
                }
                let known = answer(announced.max(recorded).0, true);
                prop_assert_eq!(judged(disk.0, 3, &[(2, known)], false), Judgement::Newest);
            }
        }

        /// A copy from before the last mark that another broker knows is always found by that broker.
        #[test]
        fn an_older_copy_is_found_by_every_broker_that_knows_a_newer_mark(copy in 0u64..1 << 40, more in 1u64..1 << 40) {
            let found = judged(copy, 3, &[(2, answer(copy + more, false))], true);
            prop_assert_eq!(found, Judgement::Old { newest: Incarnation(copy + more), known_by: BrokerId(2) });
        }
    }
}
