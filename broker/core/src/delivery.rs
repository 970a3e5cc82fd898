//! Who gets which message of a subscription in one partition, and when again. Pure; it lives in the leader's memory, beside
//! the replicated [`Cursor`]: after a failover a new leader begins with the cursor, and what was not acked comes again.
//!
//! Messages from the cursor's position on stand in a window. Each is ready, leased to a member until a deadline,
//! waiting to be ready again, or acked. In the ordered modes a lane (all messages, or those of one key) has one holder at a
//! time, and a message that waits holds up what follows it in its lane. In the mode shared there are no lanes: what is ready
//! stands in one pool, the oldest first, or by priority.

use crate::cursor::{Cursor, Failed, OffsetRange};
use crate::node::mix;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use thiserror::Error;

/// How messages are shared among members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Mode {
    /// One member, all messages in order; others are refused.
    Exclusive = 0,
    /// One member is active, in order; the next takes over when it goes.
    Failover = 1,
    /// Each message to one member, in no order.
    Shared = 2,
    /// A key's messages to one member at a time, in order.
    KeyShared = 3,
}

/// What a subscription asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// See [`Mode`].
    pub mode: Mode,
    /// How long a member may hold a message, ms.
    pub ack_deadline_ms: u64,
    /// Wait before the first redelivery, ms; it doubles with each.
    pub backoff_min_ms: u64,
    /// Longest wait before a redelivery, ms.
    pub backoff_max_ms: u64,
    /// Messages leased at one time, over all members.
    pub leased_max: u64,
    /// A message delivered so often and not acked is to be buried (see [`Delivery::take_dying`]); 0 for never.
    pub deliveries_max: u32,
    /// Messages leased at one time to one member.
    pub leased_by_member_max: u64,
    /// In [`Mode::Shared`]: of what is ready the highest priority goes first, and every [`OLDEST_EVERY`]th time the oldest.
    pub priorities: bool,
}

/// Priorities are 0 to 9, the most urgent.
pub const PRIORITY_MAX: u8 = 9;
/// With priorities, every so manyth message given out is the oldest that is ready: the nth oldest goes out after at most n times so
/// many others, however many urgent ones come.
pub const OLDEST_EVERY: u64 = 8;
/// With priorities, so many messages are held ready, to choose from.
pub const PRIORITY_AHEAD: u64 = 10_000;

/// Tickets of lanes that are not queued any more, in one member's queue, beside twice as many as there are lanes.
const STALE_TICKETS_MAX: usize = 64;

/// Messages a partition's window holds at least: one that waits long must not hold up the others where few may be leased.
const WINDOW_MIN: u64 = 2 * PRIORITY_AHEAD;

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: Mode::Exclusive,
            ack_deadline_ms: 30_000,
            backoff_min_ms: 0,
            backoff_max_ms: 60_000,
            leased_max: 100_000,
            deliveries_max: 0,
            leased_by_member_max: u64::MAX,
            priorities: false,
        }
    }
}

/// Longest delay or deadline a member may ask for: a day.
pub const WAIT_MS_MAX: u64 = 86_400_000;

/// A reader, as the shell numbers them; never reused.
pub type MemberId = u64;

/// Why a member was not let in.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("the subscription is exclusive and held by {holder}")]
pub struct Held {
    /// The member that has it.
    pub holder: String,
}

/// A message for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who gets it.
    pub member: MemberId,
    /// Which.
    pub offset: u64,
    /// One more than the deliveries that failed: 1 for the first.
    pub delivery: u32,
}

/// How a leased message returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Return {
    /// The delivery failed, which is counted: after a delay, or by the back-off.
    Failed {
        /// Delay, ms; 0 for at once.
        delay_ms: Option<u64>,
    },
    /// No handler saw it: to its place, at once, and not counted.
    Uncounted,
}

/// Ranges in order of their offsets, without empty ones and without overlaps, so that what is done for each costs no more than what all
/// of them hold.
pub fn disjoint<T>(mut ranges: Vec<(OffsetRange, T)>) -> Vec<(OffsetRange, T)> {
    ranges.sort_by_key(|(range, _)| range.start);
    let mut end = 0;
    for (range, _) in &mut ranges {
        range.start = range.start.max(end);
        end = end.max(range.end);
    }
    ranges.retain(|(range, _)| range.start < range.end);
    ranges
}

/// See [`Delivery::standing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was done with before.
    Acked,
    /// It was delivered, and may be acked.
    Given,
    /// It was not delivered since this delivery began, or is being buried.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Leased {
        member: MemberId,
        deadline_ms: u64,
    },
    Waiting {
        due_ms: u64,
    },
    /// delivered too often: it is being moved elsewhere, and is delivered to nobody; it holds up nothing
    Dying,
    Acked,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    lane: u64,
    /// deliveries that failed by this message's own doing, as far as can be told
    failures: u32,
    /// was delivered at least once since this delivery began
    given: bool,
    /// 0 goes out first
    rank: u8,
}

/// Shared messages that are ready.
#[derive(Debug, Default)]
struct Pool {
    by_rank: BTreeSet<(u8, u64)>,
    /// the same by age, with their ranks, where there are any
    by_age: Option<BTreeMap<u64, u8>>,
    taken: u64,
}

impl Pool {
    fn insert(&mut self, rank: u8, offset: u64) {
        self.by_rank.insert((rank, offset));
        if let Some(by_age) = &mut self.by_age {
            by_age.insert(offset, rank);
        }
    }

    fn remove(&mut self, rank: u8, offset: u64) {
        self.by_rank.remove(&(rank, offset));
        if let Some(by_age) = &mut self.by_age {
            by_age.remove(&offset);
        }
    }

    /// The next to go out.
    fn take(&mut self) -> Option<u64> {
        self.taken += 1;
        let by_age = self.by_age.as_ref().filter(|_| self.taken.is_multiple_of(OLDEST_EVERY));
        let oldest = by_age.and_then(BTreeMap::first_key_value).map(|(offset, rank)| (*rank, *offset));
        let (rank, offset) = oldest.or_else(|| self.by_rank.first().copied())?;
        self.remove(rank, offset);
        Some(offset)
    }
}

/// Messages that keep their order among each other.
#[derive(Debug, Default)]
struct Lane {
    ready: BTreeSet<u64>,
    waiting: BTreeSet<u64>,
    leased: u32,
    /// who has its leased messages
    holder: MemberId,
    /// its ticket in its member's queue; 0 for none
    queued: u64,
}

#[derive(Debug)]
struct Member {
    name: String,
    credit: u64,
    /// takes nothing now: it does not read what it was sent
    paused: bool,
    leased: u64,
    leased_max: u64,
    /// lanes with something for it, each with the ticket it was queued under: of an older ticket it is there no more
    lanes: VecDeque<(u64, u64)>,
}

impl Member {
    fn room(&self) -> u64 {
        if self.paused { 0 } else { self.credit.min(self.leased_max.saturating_sub(self.leased)) }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Delivery {
    policy: Policy,
    cursor: Cursor,
    /// offset of the window's first slot
    base: u64,
    window: VecDeque<Slot>,
    members: BTreeMap<MemberId, Member>,
    lanes: HashMap<u64, Lane>,
    /// tickets given to lanes
    tickets: u64,
    pool: Pool,
    due: BTreeSet<(u64, u64)>,
    /// the member that got a shared message last
    turn: MemberId,
    leased: u64,
    ready: u64,
    /// no lease runs out before
    expires_ms: u64,
    /// messages that came back since they were last asked for
    failed: BTreeMap<u64, u32>,
    /// messages to be buried, not yet asked for
    dying: Vec<u64>,
}

impl Delivery {
    /// Begins at a cursor.
    pub fn new(policy: Policy, cursor: Cursor) -> Self {
        Self {
            policy,
            base: cursor.position(),
            cursor,
            window: VecDeque::new(),
            members: BTreeMap::new(),
            lanes: HashMap::new(),
            tickets: 0,
            pool: Pool { by_age: policy.priorities.then(BTreeMap::new), ..Pool::default() },
            due: BTreeSet::new(),
            turn: 0,
            leased: 0,
            ready: 0,
            expires_ms: u64::MAX,
            failed: BTreeMap::new(),
            dying: Vec::new(),
        }
    }

    /// The cursor, with all acks taken here.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// The next offset to [`Self::feed`].
    pub fn next(&self) -> u64 {
        self.base + self.window.len() as u64
    }

    /// Messages leased now.
    pub fn leased(&self) -> u64 {
        self.leased
    }

    /// Whether anything could be given out, were there a member for it.
    pub fn has_ready(&self) -> bool {
        self.ready > 0
    }

    /// How many more messages are wanted now: what members have credit for and what is not ready yet.
    pub fn wants(&self) -> u64 {
        let credit: u64 = match self.policy.mode {
            Mode::Failover | Mode::Exclusive => self.active().map_or(0, |m| self.members[&m].room()),
            Mode::Shared | Mode::KeyShared => self.members.values().map(Member::room).fold(0, u64::saturating_add),
        };
        let room = self.policy.leased_max.saturating_sub(self.leased);
        // a key whose member is slow must not hold up the others for ever, nor grow the window without bound
        let window = self.policy.leased_max.saturating_mul(2).max(WINDOW_MIN).saturating_sub(self.window.len() as u64);
        if self.policy.priorities && credit > 0 && room > 0 {
            return PRIORITY_AHEAD.saturating_sub(self.ready).min(window);
        }
        // of several keys, what is ready may be one's that is held up or whose member takes nothing: others go on
        let ready = if self.policy.mode == Mode::KeyShared { 0 } else { self.ready };
        credit.min(room).saturating_sub(ready).min(window)
    }

    fn active(&self) -> Option<MemberId> {
        self.members.first_key_value().map(|(id, _)| *id)
    }

    /// Lets a member in.
    pub fn attach(&mut self, id: MemberId, name: &str) -> Result<(), Held> {
        if self.policy.mode == Mode::Exclusive
            && let Some(other) = self.members.values().find(|m| m.name != name)
        {
            return Err(Held { holder: other.name.clone() });
        }
        if self.policy.mode == Mode::Exclusive {
            // the same member again: its old stream has ended, and nothing says that its connection was lost
            let before: Vec<MemberId> = self.members.keys().copied().collect();
            before.into_iter().for_each(|old| self.leave(old));
        }
        let name = name.to_owned();
        let leased_max = self.policy.leased_by_member_max;
        let member = Member { name, credit: 0, paused: false, leased: 0, leased_max, lanes: VecDeque::new() };
        self.members.insert(id, member);
        self.requeue_all();
        Ok(())
    }

    /// Whether a member is (still) in.
    pub fn is_attached(&self, id: MemberId) -> bool {
        self.members.contains_key(&id)
    }

    /// Removes a member whose connection was lost. What it held is ready for others at once, and counts as a failed delivery:
    /// it may be what the member failed at. Of a lane that can be the first message only.
    pub fn detach(&mut self, id: MemberId) {
        self.remove(id, Return::Failed { delay_ms: Some(0) });
    }

    /// Removes a member that ended its stream by itself. What it held is ready for others at once; no failed delivery is counted.
    pub fn leave(&mut self, id: MemberId) {
        self.remove(id, Return::Uncounted);
    }

    fn remove(&mut self, id: MemberId, how: Return) {
        if self.members.remove(&id).is_none() {
            return;
        }
        let held = |_, slot: &Slot| matches!(slot.state, State::Leased { member, .. } if member == id).then_some(how);
        self.take_leases(0..self.window.len(), held, 0);
        self.requeue_all();
    }

    /// Takes back leases: those among `slots` for which `chosen` says how. In the ordered modes what is leased behind one of them in its
    /// lane returns too, uncounted. One pass over the window, however many leases are taken.
    fn take_leases(
        &mut self,
        slots: std::ops::Range<usize>,
        chosen: impl Fn(u64, &Slot) -> Option<Return>,
        now_ms: u64,
    ) {
        let mut lanes = BTreeSet::new();
        for at in slots.start..self.window.len() {
            if at >= slots.end && lanes.is_empty() {
                break;
            }
            let slot = self.window[at];
            if !matches!(slot.state, State::Leased { .. }) {
                continue;
            }
            if lanes.contains(&slot.lane) {
                self.requeue(at, 0);
                continue;
            }
            let how = if at < slots.end { chosen(self.base + at as u64, &slot) } else { None };
            match how {
                None => continue,
                Some(Return::Uncounted) => self.requeue(at, 0),
                Some(Return::Failed { delay_ms }) => {
                    let wait = delay_ms.unwrap_or_else(|| self.backoff_ms(slot.failures));
                    self.unlease(at, if wait == 0 { 0 } else { now_ms.saturating_add(wait.min(WAIT_MS_MAX)) });
                }
            }
            if !self.is_shared() {
                lanes.insert(slot.lane);
            }
        }
        lanes.into_iter().for_each(|lane| self.after_change(lane));
    }

    /// A member is ready for so many more messages.
    pub fn credit(&mut self, id: MemberId, messages: u64) {
        if let Some(member) = self.members.get_mut(&id) {
            member.credit = member.credit.saturating_add(messages);
        }
    }

    /// Takes back all credit a member has left.
    pub fn revoke_credit(&mut self, id: MemberId) {
        if let Some(member) = self.members.get_mut(&id) {
            member.credit = 0;
        }
    }

    /// A member that does not read what it was sent gets nothing more for now.
    pub fn pause(&mut self, id: MemberId, paused: bool) {
        if let Some(member) = self.members.get_mut(&id) {
            member.paused = paused;
        }
    }

    fn slot(&self, offset: u64) -> Option<&Slot> {
        self.window.get(usize::try_from(offset.checked_sub(self.base)?).ok()?)
    }

    /// How a message stands with those who do something about it beside an ack.
    pub fn standing(&self, offset: u64) -> Standing {
        if self.cursor.is_acked(offset) {
            return Standing::Acked;
        }
        match self.slot(offset) {
            Some(slot) if slot.given && slot.state != State::Dying => Standing::Given,
            _ => Standing::Other,
        }
    }

    /// Messages a member holds.
    pub fn leased_by(&self, id: MemberId) -> u64 {
        self.members.get(&id).map_or(0, |m| m.leased)
    }

    /// Takes the message at [`Self::next`] into the window. `key_hash` tells keys apart, in [`Mode::KeyShared`]; `priority` (0 to
    /// [`PRIORITY_MAX`]) is looked at where the policy says so.
    pub fn feed(&mut self, key_hash: u64, priority: u8) {
        let offset = self.next();
        let lane = match self.policy.mode {
            Mode::Exclusive | Mode::Failover => 0,
            Mode::Shared => offset,
            Mode::KeyShared => key_hash,
        };
        let rank = if self.policy.priorities { PRIORITY_MAX - priority.min(PRIORITY_MAX) } else { 0 };
        if self.cursor.is_acked(offset) {
            self.window.push_back(Slot { state: State::Acked, lane, failures: 0, given: false, rank });
            self.trim();
            return;
        }
        let failures = self.cursor.deliveries(offset);
        if self.is_too_many(failures) {
            // an earlier leader found it so, and did not get to move it
            self.window.push_back(Slot { state: State::Dying, lane, failures, given: false, rank });
            self.dying.push(offset);
            return;
        }
        self.window.push_back(Slot { state: State::Ready, lane, failures, given: false, rank });
        self.put_ready(offset);
        self.queue(lane);
    }

    fn is_shared(&self) -> bool {
        self.policy.mode == Mode::Shared
    }

    /// A message whose slot says that it is ready is so.
    fn put_ready(&mut self, offset: u64) {
        let Slot { lane, rank, .. } = self.window[(offset - self.base) as usize];
        self.ready += 1;
        if self.is_shared() {
            self.pool.insert(rank, offset);
        } else {
            self.lanes.entry(lane).or_default().ready.insert(offset);
        }
    }

    /// Passes over the message at [`Self::next`]: nobody wants it (a filter, say). It counts as acked; returned for the log.
    pub fn feed_past(&mut self) -> Option<OffsetRange> {
        let offset = self.next();
        let range = OffsetRange::one(offset);
        let known = self.cursor.is_acked(offset);
        self.cursor.ack(range);
        self.window.push_back(Slot { state: State::Acked, lane: 0, failures: 0, given: false, rank: 0 });
        self.trim();
        (!known).then_some(range)
    }

    fn is_too_many(&self, failures: u32) -> bool {
        self.policy.deliveries_max > 0 && failures >= self.policy.deliveries_max
    }

    /// Messages that came back since this was last asked, with their deliveries, for the log.
    pub fn take_failed(&mut self) -> Vec<Failed> {
        let failed = std::mem::take(&mut self.failed);
        failed.into_iter().map(|(offset, deliveries)| Failed { offset, deliveries }).collect()
    }

    /// Messages that were delivered too often, each told once: they are to be put elsewhere and then [`Self::bury`]'d.
    pub fn take_dying(&mut self) -> Vec<Failed> {
        let dying = std::mem::take(&mut self.dying);
        let deliveries = |offset: u64| self.window.get((offset - self.base) as usize).map_or(0, |s| s.failures);
        dying
            .into_iter()
            .filter(|o| *o >= self.base)
            .map(|offset| Failed { offset, deliveries: deliveries(offset) })
            .collect()
    }

    /// Whether a message waits to be buried.
    pub fn is_dying(&self, offset: u64) -> bool {
        self.slot(offset).is_some_and(|slot| slot.state == State::Dying)
    }

    /// A dying message was put elsewhere: it counts as acked; returned for the log.
    pub fn bury(&mut self, offset: u64) -> Option<OffsetRange> {
        let at = usize::try_from(offset.checked_sub(self.base)?).ok()?;
        let slot = *self.window.get(at).filter(|s| s.state == State::Dying)?;
        let range = OffsetRange::one(offset);
        self.release(offset, &slot);
        self.window[at].state = State::Acked;
        self.cursor.ack(range);
        self.after_change(slot.lane);
        self.trim();
        Some(range)
    }

    /// Releases messages that no handler saw: they return to their places and do not count as failed deliveries. In the ordered modes
    /// what was leased behind them in their lane returns too.
    pub fn take_back(&mut self, ranges: &[OffsetRange]) {
        let ranges = ranges.iter().map(|range| (*range, Return::Uncounted)).collect();
        self.give_back(ranges, 0);
    }

    /// Passes over everything below `start`, given out or not: retention took it. It counts as acked; what was passed over is
    /// returned, for the log.
    pub fn pass_to(&mut self, start: u64) -> Option<OffsetRange> {
        let range = OffsetRange { start: self.base, end: start };
        if range.start >= range.end {
            return None;
        }
        let mut touched = BTreeSet::new();
        while self.base < start {
            let Some(slot) = self.window.front().copied() else {
                self.base = start; // however far: nothing is held for it
                break;
            };
            self.release(self.base, &slot);
            touched.insert(slot.lane);
            self.window.pop_front();
            self.base += 1;
        }
        self.cursor.ack(range);
        touched.into_iter().for_each(|lane| self.after_change(lane));
        self.trim();
        Some(range)
    }

    /// Puts a lane into the queue of the member that may have its next message.
    fn queue(&mut self, id: u64) {
        let Some(lane) = self.lanes.get(&id) else { return };
        let first = lane.ready.first();
        // what waits holds up what follows it
        let held_up = lane.waiting.first().is_some_and(|w| first.is_some_and(|f| w < f));
        if lane.queued > 0 || first.is_none() || held_up {
            return;
        }
        let holder = (lane.leased > 0).then_some(lane.holder);
        let Some(member) = self.member_for(id) else { return };
        if holder.is_some_and(|h| h != member) {
            return; // it moves to its new member once the old one is done
        }
        self.tickets += 1;
        self.lanes.get_mut(&id).expect("just seen").queued = self.tickets;
        let member = self.members.get_mut(&member).expect("chosen among them");
        member.lanes.push_back((id, self.tickets));
        // old tickets go once they are the most: no queue is searched for one lane
        if member.lanes.len() > 2 * self.lanes.len() + STALE_TICKETS_MAX {
            let lanes = &self.lanes;
            member.lanes.retain(|(id, ticket)| lanes.get(id).is_some_and(|lane| lane.queued == *ticket));
        }
    }

    /// The member a lane belongs to now.
    fn member_for(&self, lane: u64) -> Option<MemberId> {
        match self.policy.mode {
            Mode::Exclusive | Mode::Failover => self.active(),
            // the key's highest bidder: members that come and go move only their own share (rendezvous hashing)
            Mode::KeyShared => self.members.keys().copied().max_by_key(|m| mix(lane ^ mix(*m))),
            Mode::Shared => None, // there are no lanes
        }
    }

    fn requeue_all(&mut self) {
        self.members.values_mut().for_each(|m| m.lanes.clear());
        let mut ids: Vec<(u64, u64)> =
            self.lanes.iter().filter_map(|(id, l)| l.ready.first().map(|first| (*first, *id))).collect();
        self.lanes.values_mut().for_each(|l| l.queued = 0);
        ids.sort_unstable();
        ids.into_iter().for_each(|(_, id)| self.queue(id));
    }

    /// Messages to give out now, at most `max`.
    pub fn grants(&mut self, now_ms: u64, max: usize) -> Vec<Grant> {
        if self.is_shared() {
            return self.share(now_ms, max);
        }
        let mut out = Vec::new();
        let ids: Vec<MemberId> = self.members_in_turn().map(|(id, _)| *id).collect();
        for id in ids {
            while out.len() < max && self.leased < self.policy.leased_max {
                let Some(member) = self.members.get_mut(&id).filter(|m| m.room() > 0) else { break };
                let Some((lane, ticket)) = member.lanes.pop_front() else { break };
                if self.lanes.get(&lane).is_none_or(|l| l.queued != ticket) {
                    continue;
                }
                if let Some(grant) = self.grant(id, lane, now_ms) {
                    out.push(grant);
                    self.turn = id;
                }
            }
        }
        out
    }

    /// All members, beginning after the one that got the last message: a rate lets a few through at a time, and all are to have
    /// their share.
    fn members_in_turn(&self) -> impl Iterator<Item = (&MemberId, &Member)> {
        self.members.range(self.turn + 1..).chain(self.members.range(..=self.turn))
    }

    /// One message a round to each member that has room.
    fn share(&mut self, now_ms: u64, max: usize) -> Vec<Grant> {
        let mut out = Vec::new();
        let room = |(id, m): (&MemberId, &Member)| (m.room() > 0).then_some((*id, m.room()));
        let mut hungry: VecDeque<(MemberId, u64)> = self.members_in_turn().filter_map(room).collect();
        while out.len() < max && self.leased < self.policy.leased_max {
            let Some((id, room)) = hungry.pop_front() else { break };
            let Some(offset) = self.pool.take() else { break };
            out.push(self.lease(id, offset, now_ms));
            self.turn = id;
            if room > 1 {
                hungry.push_back((id, room - 1));
            }
        }
        out
    }

    fn grant(&mut self, id: MemberId, lane_id: u64, now_ms: u64) -> Option<Grant> {
        let lane = self.lanes.get_mut(&lane_id)?;
        lane.queued = 0;
        let offset = lane.ready.pop_first()?;
        lane.leased += 1;
        lane.holder = id;
        let grant = self.lease(id, offset, now_ms);
        self.queue(lane_id);
        Some(grant)
    }

    /// A message that is out of its lane or the pool goes to a member.
    fn lease(&mut self, id: MemberId, offset: u64, now_ms: u64) -> Grant {
        let deadline_ms = now_ms.saturating_add(self.policy.ack_deadline_ms.min(WAIT_MS_MAX));
        self.expires_ms = self.expires_ms.min(deadline_ms);
        let slot = &mut self.window[(offset - self.base) as usize];
        slot.state = State::Leased { member: id, deadline_ms };
        slot.given = true;
        let delivery = slot.failures.saturating_add(1);
        let member = self.members.get_mut(&id).expect("granted to a member");
        member.credit -= 1;
        member.leased += 1;
        self.leased += 1;
        self.ready -= 1;
        Grant { member: id, offset, delivery }
    }

    /// A delivery failed: takes the slot back from its member, to be ready at `due_ms` (0: at once), or to be buried.
    fn unlease(&mut self, at: usize, due_ms: u64) {
        let slot = self.window[at];
        if !matches!(slot.state, State::Leased { .. }) {
            return;
        }
        let offset = self.base + at as u64;
        let failures = slot.failures.saturating_add(1);
        self.window[at].failures = failures;
        self.failed.insert(offset, failures);
        self.requeue(at, due_ms);
        if self.is_too_many(failures) {
            let returned = self.window[at];
            self.release(offset, &returned);
            self.window[at].state = State::Dying;
            self.dying.push(offset);
        }
    }

    fn requeue(&mut self, at: usize, due_ms: u64) {
        let State::Leased { member, .. } = self.window[at].state else { return };
        let (offset, lane_id) = (self.base + at as u64, self.window[at].lane);
        if let Some(lane) = self.lanes.get_mut(&lane_id) {
            lane.leased -= 1;
            if due_ms > 0 {
                lane.waiting.insert(offset);
            }
        }
        if due_ms == 0 {
            self.window[at].state = State::Ready;
            self.put_ready(offset);
        } else {
            self.window[at].state = State::Waiting { due_ms };
            self.due.insert((due_ms, offset));
        }
        self.leased -= 1;
        if let Some(member) = self.members.get_mut(&member) {
            member.leased -= 1;
        }
    }

    /// Offsets of a range that stand in the window.
    fn within(&self, range: OffsetRange) -> std::ops::Range<usize> {
        let at = |offset: u64| offset.clamp(self.base, self.next()) - self.base;
        at(range.start) as usize..at(range.end.max(range.start)) as usize
    }

    /// Takes a message out of its lane or the pool and all counts.
    fn release(&mut self, offset: u64, slot: &Slot) {
        let mut lane = self.lanes.get_mut(&slot.lane);
        match slot.state {
            State::Leased { member, .. } => {
                if let Some(lane) = lane {
                    lane.leased -= 1;
                }
                self.leased -= 1;
                if let Some(member) = self.members.get_mut(&member) {
                    member.leased -= 1;
                }
            }
            State::Ready => {
                match lane {
                    Some(lane) => drop(lane.ready.remove(&offset)),
                    None => self.pool.remove(slot.rank, offset),
                }
                self.ready -= 1;
            }
            State::Waiting { .. } | State::Dying => {
                if let Some(lane) = &mut lane {
                    lane.waiting.remove(&offset);
                }
                if let State::Waiting { due_ms } = slot.state {
                    self.due.remove(&(due_ms, offset));
                }
            }
            State::Acked => {}
        }
    }

    /// Messages are done with. Those never delivered are left out; what was acked is returned, for the log.
    pub fn ack(&mut self, range: OffsetRange) -> Vec<OffsetRange> {
        let mut acked: Vec<OffsetRange> = Vec::new();
        let mut touched = BTreeSet::new();
        for at in self.within(range) {
            let slot = self.window[at];
            let offset = self.base + at as u64;
            // what is dying is not the members' any more
            if matches!(slot.state, State::Acked | State::Dying) || !slot.given {
                continue;
            }
            self.release(offset, &slot);
            self.window[at].state = State::Acked;
            touched.insert(slot.lane);
            match acked.last_mut().filter(|last| last.end == offset) {
                Some(last) => last.end += 1,
                None => acked.push(OffsetRange::one(offset)),
            }
        }
        acked.iter().for_each(|r| self.cursor.ack(*r));
        touched.into_iter().for_each(|lane| self.after_change(lane));
        self.trim();
        acked
    }

    /// Messages are not done with: each returns as its range says, in an overlap as one of them does. In the ordered modes what was
    /// leased behind them in their lane returns too, after them.
    pub fn give_back(&mut self, ranges: Vec<(OffsetRange, Return)>, now_ms: u64) {
        let ranges = disjoint(ranges);
        let (Some((first, _)), Some((last, _))) = (ranges.first(), ranges.last()) else { return };
        let slots = self.within(OffsetRange { start: first.start, end: last.end });
        let chosen = |offset, _: &Slot| {
            let at = ranges.partition_point(|(range, _)| range.end <= offset);
            ranges.get(at).filter(|(range, _)| range.start <= offset).map(|(_, how)| *how)
        };
        self.take_leases(slots, chosen, now_ms);
    }

    fn backoff_ms(&self, failures: u32) -> u64 {
        let doubled = self.policy.backoff_min_ms.saturating_mul(1 << failures.min(30));
        doubled.min(self.policy.backoff_max_ms)
    }

    /// Members need longer: the deadlines of leased messages move.
    pub fn extend(&mut self, range: OffsetRange, deadline_in_ms: u64, now_ms: u64) {
        for at in self.within(range) {
            if let State::Leased { deadline_ms, .. } = &mut self.window[at].state {
                *deadline_ms = now_ms.saturating_add(deadline_in_ms.min(WAIT_MS_MAX));
                self.expires_ms = self.expires_ms.min(*deadline_ms);
            }
        }
    }

    fn after_change(&mut self, lane_id: u64) {
        let Some(lane) = self.lanes.get(&lane_id) else { return };
        if lane.ready.is_empty() && lane.waiting.is_empty() && lane.leased == 0 {
            self.lanes.remove(&lane_id);
        } else {
            // it may be in the queue of one that may not have it any more
            self.lanes.get_mut(&lane_id).expect("just seen").queued = 0;
            self.queue(lane_id);
        }
    }

    /// Lets time pass: what waited becomes ready, leases run out.
    pub fn tick(&mut self, now_ms: u64) {
        while let Some(&(due, offset)) = self.due.first().filter(|(due, _)| *due <= now_ms) {
            self.due.remove(&(due, offset));
            let slot = &mut self.window[(offset - self.base) as usize];
            slot.state = State::Ready;
            let lane_id = slot.lane;
            if let Some(lane) = self.lanes.get_mut(&lane_id) {
                lane.waiting.remove(&offset);
            }
            self.put_ready(offset);
            self.after_change(lane_id);
        }
        if self.leased == 0 || now_ms < self.expires_ms {
            return;
        }
        let late = |_, slot: &Slot| {
            let late = matches!(slot.state, State::Leased { deadline_ms, .. } if deadline_ms <= now_ms);
            late.then_some(Return::Failed { delay_ms: None })
        };
        self.take_leases(0..self.window.len(), late, now_ms);
        let deadline = |s: &Slot| if let State::Leased { deadline_ms, .. } = s.state { deadline_ms } else { u64::MAX };
        self.expires_ms = self.window.iter().map(deadline).min().unwrap_or(u64::MAX);
    }

    fn trim(&mut self) {
        while self.window.front().is_some_and(|s| s.state == State::Acked) {
            self.window.pop_front();
            self.base += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> OffsetRange {
        OffsetRange { start, end }
    }

    fn nack(d: &mut Delivery, range: OffsetRange, delay_ms: Option<u64>, now_ms: u64) {
        d.give_back(vec![(range, Return::Failed { delay_ms })], now_ms);
    }

    fn plain(mode: Mode) -> Policy {
        Policy { mode, ack_deadline_ms: 100, ..Default::default() }
    }

    fn begin(mode: Mode) -> Delivery {
        Delivery::new(plain(mode), Cursor::at(0))
    }

    fn offsets(grants: &[Grant], member: MemberId) -> Vec<u64> {
        grants.iter().filter(|g| g.member == member).map(|g| g.offset).collect()
    }

    #[test]
    fn exclusive_refuses_a_second_member_and_takes_the_first_one_back() {
        let mut d = begin(Mode::Exclusive);
        d.attach(1, "a").unwrap();
        assert_eq!(d.attach(2, "b"), Err(Held { holder: "a".into() }));
        d.credit(1, 10);
        (0..3).for_each(|_| d.feed(0, 0));
        assert_eq!(offsets(&d.grants(0, 100), 1), [0, 1, 2]);
        d.attach(3, "a").unwrap();
        d.credit(3, 10);
        assert_eq!(offsets(&d.grants(0, 100), 3), [0, 1, 2], "a new stream begins at the cursor");
        assert!(!d.is_attached(1));
    }

    #[test]
    fn failover_hands_what_was_unacked_to_the_next_in_order() {
        let mut d = begin(Mode::Failover);
        d.attach(1, "a").unwrap();
        d.attach(2, "b").unwrap();
        d.credit(1, 10);
        d.credit(2, 10);
        (0..4).for_each(|_| d.feed(0, 0));
        assert_eq!(offsets(&d.grants(0, 100), 1), [0, 1, 2, 3]);
        d.ack(range(0, 2));
        d.detach(1);
        let again = d.grants(5, 100);
        assert_eq!(offsets(&again, 2), [2, 3]);
        assert_eq!(again[0].delivery, 2);
    }

    #[test]
    fn shared_spreads_by_credit_and_redelivers_what_was_not_acked_in_time() {
        let mut d = begin(Mode::Shared);
        d.attach(1, "a").unwrap();
        d.attach(2, "b").unwrap();
        d.credit(1, 5);
        d.credit(2, 1);
        (0..6).for_each(|_| d.feed(0, 0));
        let grants = d.grants(0, 100);
        assert_eq!((offsets(&grants, 1).len(), offsets(&grants, 2).len()), (5, 1));
        d.ack(range(0, 5));
        d.tick(100);
        d.credit(2, 1);
        d.credit(1, 1);
        let again = d.grants(100, 100);
        assert_eq!(again.len(), 1);
        assert_eq!((again[0].offset, again[0].delivery), (5, 2));
    }

    #[test]
    fn urgent_messages_go_first_and_a_member_holds_no_more_than_it_may() {
        let policy = Policy { priorities: true, leased_by_member_max: 2, ..plain(Mode::Shared) };
        let mut d = Delivery::new(policy, Cursor::at(0));
        d.attach(1, "a").unwrap();
        d.credit(1, 10);
        assert_eq!(d.wants(), PRIORITY_AHEAD, "there must be something to choose from");
        [0, 5, 9, 200, 5].into_iter().for_each(|priority| d.feed(0, priority));
        assert_eq!(offsets(&d.grants(0, 100), 1), [2, 3], "9 is the highest there is; of two the older");
        assert!(d.grants(0, 100).is_empty() && d.wants() == 0);
        d.ack(range(2, 4));
        assert_eq!(offsets(&d.grants(0, 100), 1), [1, 4]);
        nack(&mut d, range(1, 2), None, 0);
        assert_eq!(offsets(&d.grants(0, 100), 1), [1], "one that came back keeps its place");
        assert_eq!((d.standing(2), d.standing(1), d.standing(0)), (Standing::Acked, Standing::Given, Standing::Other));
    }

    #[test]
    fn a_nack_holds_up_what_follows_in_its_lane_and_no_other() {
        let mut d = begin(Mode::KeyShared);
        d.attach(1, "a").unwrap();
        d.credit(1, 100);
        [7, 8, 7, 8].into_iter().for_each(|key| d.feed(key, 0));
        assert_eq!(d.grants(0, 100).len(), 4);
        nack(&mut d, range(0, 1), Some(50), 0);
        d.ack(range(1, 2));
        d.ack(range(3, 4));
        assert_eq!(d.grants(10, 100), [], "offset 2 has the key of 0, and waits behind it");
        d.tick(50);
        assert_eq!(offsets(&d.grants(50, 100), 1), [0, 2]);
    }

    #[test]
    fn an_extended_deadline_holds() {
        let mut d = begin(Mode::Shared);
        d.attach(1, "a").unwrap();
        d.credit(1, 2);
        (0..2).for_each(|_| d.feed(0, 0));
        d.grants(0, 100);
        d.extend(range(1, 2), 500, 50);
        d.tick(200);
        d.credit(1, 2);
        assert_eq!(offsets(&d.grants(200, 100), 1), [0]);
    }

    #[test]
    fn redeliveries_back_off_to_a_bound() {
        let policy = Policy { mode: Mode::Shared, backoff_min_ms: 10, backoff_max_ms: 35, ..Default::default() };
        let mut d = Delivery::new(policy, Cursor::at(0));
        d.attach(1, "a").unwrap();
        d.credit(1, 100);
        d.feed(0, 0);
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..5 {
            let begun = now;
            while d.grants(now, 1).is_empty() {
                now += 1;
                d.tick(now);
            }
            waits.push(now - begun);
            nack(&mut d, range(0, 1), None, now);
        }
        assert_eq!(waits, [0, 10, 20, 35, 35]);
    }

    #[test]
    fn what_retention_took_is_passed_over_in_whatever_state_it_is_and_however_much_it_is() {
        for mode in [Mode::Exclusive, Mode::Shared, Mode::KeyShared] {
            let mut d = begin(mode);
            d.attach(1, "a").unwrap();
            d.credit(1, 3);
            (0..6).for_each(|at| d.feed(at % 2, 0));
            assert_eq!(d.grants(0, 100).len(), 3);
            nack(&mut d, range(1, 2), Some(1_000), 0);
            assert_eq!(d.pass_to(4), Some(range(0, 4)));
            assert_eq!((d.leased(), d.cursor().position(), d.next()), (0, 4, 6));
            d.tick(2_000);
            d.credit(1, 10);
            assert_eq!(offsets(&d.grants(2_000, 100), 1), [4, 5]);
            assert_eq!(d.pass_to(1 << 40), Some(range(4, 1 << 40)));
            assert_eq!((d.next(), d.leased()), (1 << 40, 0));
            assert_eq!(d.pass_to(7), None);
        }
    }

    #[test]
    fn one_keys_member_that_takes_nothing_does_not_hold_up_the_others() {
        let mut d = begin(Mode::KeyShared);
        d.attach(1, "a").unwrap();
        d.attach(2, "b").unwrap();
        d.credit(1, 5); // the other one gives no credit
        let mut given = 0;
        for key in 0..200 {
            if d.wants() > 0 {
                d.feed(key, 0);
            }
            for g in d.grants(0, 100) {
                given += 1;
                d.ack(range(g.offset, g.offset + 1));
                d.credit(1, 1);
            }
        }
        assert!(given > 50, "{given}");
    }

    #[test]
    fn times_beyond_all_bounds_are_cut() {
        let mut d = begin(Mode::Shared);
        d.attach(1, "a").unwrap();
        d.credit(1, 10);
        (0..2).for_each(|_| d.feed(0, 0));
        d.grants(5, 100);
        d.extend(range(0, 1), u64::MAX, 5);
        nack(&mut d, range(1, 2), Some(u64::MAX), 5);
        d.tick(6 + WAIT_MS_MAX);
        d.tick(7 + WAIT_MS_MAX);
        assert_eq!(d.grants(8 + WAIT_MS_MAX, 100).len(), 2);
    }

    #[test]
    fn acks_of_what_was_never_delivered_count_for_nothing() {
        let mut d = begin(Mode::Shared);
        d.attach(1, "a").unwrap();
        d.credit(1, 1);
        (0..3).for_each(|_| d.feed(0, 0));
        d.grants(0, 100);
        assert_eq!(d.ack(range(0, 100)), [range(0, 1)]);
        assert_eq!(d.cursor().position(), 1);
    }

    #[test]
    fn a_message_delivered_too_often_is_buried_and_its_lane_goes_on_meanwhile() {
        let policy = Policy { mode: Mode::KeyShared, deliveries_max: 2, ..Default::default() };
        let mut d = Delivery::new(policy, Cursor::at(0));
        d.attach(1, "a").unwrap();
        d.credit(1, 100);
        [7, 8, 7].into_iter().for_each(|key| d.feed(key, 0));
        for delivery in 1..=2 {
            assert_eq!(d.grants(0, 100).iter().filter(|g| g.offset == 0).map(|g| g.delivery).sum::<u32>(), delivery);
            assert!(d.take_dying().is_empty());
            nack(&mut d, range(0, 1), None, 0);
            assert!(d.take_failed().contains(&Failed { offset: 0, deliveries: delivery }));
        }
        assert_eq!(d.take_dying(), [Failed { offset: 0, deliveries: 2 }]);
        assert_eq!(d.take_dying(), [], "told once");
        assert_eq!(d.ack(range(0, 1)), [], "too late");
        d.ack(range(1, 2));
        d.tick(1_000_000);
        assert_eq!(offsets(&d.grants(1_000_000, 100), 1), [2], "what follows it waits for no other topic");
        assert_eq!(d.bury(0), Some(range(0, 1)));
        assert_eq!(d.cursor().position(), 2);
        // a new leader begins with what was counted
        let mut cursor = Cursor::at(0);
        cursor.fail(Failed { offset: 0, deliveries: 2 });
        cursor.fail(Failed { offset: 1, deliveries: 1 });
        let mut d = Delivery::new(policy, cursor);
        d.attach(1, "a").unwrap();
        d.credit(1, 100);
        [7, 8].into_iter().for_each(|key| d.feed(key, 0));
        assert_eq!(d.take_dying(), [Failed { offset: 0, deliveries: 2 }]);
        assert_eq!(d.grants(0, 100), [Grant { member: 1, offset: 1, delivery: 2 }]);
    }

    #[test]
    fn what_never_reached_its_member_was_not_delivered_and_what_a_filter_leaves_out_is_passed_over() {
        let policy = Policy { mode: Mode::Shared, deliveries_max: 1, ..Default::default() };
        let mut d = Delivery::new(policy, Cursor::at(0));
        d.attach(1, "a").unwrap();
        d.credit(1, 100);
        assert_eq!(d.feed_past(), Some(range(0, 1)));
        d.feed(0, 0);
        assert_eq!(d.feed_past(), Some(range(2, 3)));
        assert_eq!(offsets(&d.grants(0, 100), 1), [1]);
        d.take_back(&[range(1, 2)]);
        assert_eq!((d.take_failed(), d.take_dying()), (vec![], vec![]));
        assert_eq!(d.grants(0, 100), [Grant { member: 1, offset: 1, delivery: 1 }]);
        d.detach(1);
        assert_eq!(d.take_dying(), [Failed { offset: 1, deliveries: 1 }]);
        assert_eq!(d.bury(1), Some(range(1, 2)));
        assert_eq!((d.cursor().position(), d.leased(), d.next()), (3, 0, 3));
    }

    #[test]
    fn a_member_that_leaves_by_itself_fails_at_nothing_and_one_that_is_lost_at_the_first_of_each_lane() {
        for (mode, lost) in [(Mode::Exclusive, 1), (Mode::Failover, 1), (Mode::Shared, 4), (Mode::KeyShared, 2)] {
            let mut d = Delivery::new(Policy { deliveries_max: 1, ..plain(mode) }, Cursor::at(0));
            for (id, leave) in [(1, true), (2, false)] {
                d.attach(id, "a").unwrap();
                d.credit(id, 10);
                [7, 8, 7, 8].into_iter().filter(|_| id == 1).for_each(|key| d.feed(key, 0));
                let grants = d.grants(0, 100);
                assert_eq!(offsets(&grants, id), [0, 1, 2, 3], "{mode:?}: all is in its place");
                assert!(grants.iter().all(|g| g.delivery == 1), "{mode:?}");
                if leave {
                    d.leave(id)
                } else {
                    d.detach(id)
                }
                assert_eq!(d.take_dying().len(), if leave { 0 } else { lost }, "{mode:?}");
            }
        }
    }

    #[test]
    fn what_is_released_keeps_its_place_and_takes_back_what_is_leased_behind_it() {
        let mut d = Delivery::new(Policy { deliveries_max: 1, ..plain(Mode::KeyShared) }, Cursor::at(0));
        d.attach(1, "a").unwrap();
        d.credit(1, 4);
        [7, 8, 7, 8].into_iter().for_each(|key| d.feed(key, 0));
        assert_eq!(d.grants(0, 100).len(), 4);
        d.take_back(&[range(0, 1)]);
        assert_eq!(d.leased(), 2, "offset 2 has the key of 0");
        d.credit(1, 4);
        assert_eq!(offsets(&d.grants(0, 100), 1), [0, 2]);
        assert_eq!((d.take_failed(), d.take_dying()), (vec![], vec![]));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Attach(u64),
        Detach(u64),
        Leave(u64),
        Release(u64, u64),
        Credit(u64, u64),
        Feed(u64),
        Grant,
        Ack(u64, u64),
        Nack(u64, u64),
        Extend(u64, u64),
        Pass(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            1 => (1u64..6).prop_map(Op::Attach),
            1 => (1u64..6).prop_map(Op::Detach),
            1 => (1u64..6).prop_map(Op::Leave),
            1 => (0u64..30, 1u64..4).prop_map(|(at, n)| Op::Release(at, n)),
            3 => (1u64..6, 1u64..5).prop_map(|(m, n)| Op::Credit(m, n)),
            4 => (0u64..4).prop_map(Op::Feed),
            4 => Just(Op::Grant),
            4 => (0u64..30, 1u64..4).prop_map(|(at, n)| Op::Ack(at, n)),
            2 => (0u64..30, 0u64..80).prop_map(|(at, delay)| Op::Nack(at, delay)),
            1 => (0u64..30, 1u64..200).prop_map(|(at, by)| Op::Extend(at, by)),
            2 => (1u64..120).prop_map(Op::Pass),
        ]
    }

    /// Failed deliveries of each message that is held.
    fn failures(d: &Delivery, count: usize) -> Vec<u32> {
        (0..count as u64).map(|offset| d.slot(offset).map_or(0, |slot| slot.failures)).collect()
    }

    /// Runs operations beside a plain model: who holds what, in what order keys were delivered.
    fn check_against_model(policy: Policy, ops: Vec<Op>) -> Result<(), TestCaseError> {
        let (mode, each_max) = (policy.mode, policy.leased_by_member_max);
        let mut d = Delivery::new(policy, Cursor::at(0));
        let (mut now, mut keys) = (1u64, Vec::new());
        let mut held: BTreeMap<u64, (u64, u64)> = BTreeMap::new(); // offset → (member, deadline)
        let mut acked: BTreeSet<u64> = BTreeSet::new();
        let mut delivered: BTreeSet<u64> = BTreeSet::new();
        let mut members: BTreeSet<u64> = BTreeSet::new();
        let mut gone: BTreeSet<u64> = BTreeSet::new();
        let ordered = mode != Mode::Shared;
        for op in ops {
            match op {
                Op::Attach(id) if !gone.contains(&id) && !members.contains(&id) => {
                    if d.attach(id, &format!("m{id}")).is_ok() {
                        members.insert(id);
                    } else {
                        prop_assert!(mode == Mode::Exclusive && !members.is_empty());
                    }
                }
                Op::Attach(_) => {}
                Op::Detach(id) | Op::Leave(id) => {
                    let counted = failures(&d, keys.len());
                    if matches!(op, Op::Leave(_)) {
                        d.leave(id);
                        prop_assert_eq!(failures(&d, keys.len()), counted, "a clean end counts nothing");
                    } else {
                        d.detach(id);
                    }
                    if members.remove(&id) {
                        gone.insert(id);
                    }
                    held.retain(|_, (m, _)| *m != id);
                }
                Op::Credit(id, n) => d.credit(id, n),
                Op::Feed(key) => {
                    keys.push(key);
                    d.feed(key, key as u8);
                }
                Op::Grant => {
                    for g in d.grants(now, 1_000) {
                        prop_assert!(members.contains(&g.member));
                        prop_assert!(!acked.contains(&g.offset), "acked {} delivered again", g.offset);
                        prop_assert!(!held.contains_key(&g.offset), "two holders of {}", g.offset);
                        let same = |o: &u64| mode != Mode::KeyShared || keys[*o as usize] == keys[g.offset as usize];
                        if ordered {
                            let open = (0..g.offset).filter(|o| !acked.contains(o) && same(o));
                            for before in open {
                                let holder = held.get(&before).map(|(m, _)| *m);
                                prop_assert_eq!(holder, Some(g.member), "{} given out before {}", g.offset, before);
                            }
                            let behind = held.keys().any(|o| *o > g.offset && same(o));
                            prop_assert!(!behind, "{} given out behind a later one of its lane", g.offset);
                        }
                        held.insert(g.offset, (g.member, now + 100));
                        let holds = held.values().filter(|(m, _)| *m == g.member).count() as u64;
                        prop_assert!(holds <= each_max, "member {} holds {holds}", g.member);
                        delivered.insert(g.offset);
                    }
                }
                Op::Ack(at, n) => {
                    for r in d.ack(range(at, at + n)) {
                        for offset in r.start..r.end {
                            prop_assert!(delivered.contains(&offset));
                            acked.insert(offset);
                            held.remove(&offset);
                        }
                    }
                }
                Op::Nack(at, delay) => {
                    let was = held.contains_key(&at);
                    nack(&mut d, range(at, at + 1), Some(delay), now);
                    if was {
                        held.remove(&at);
                        if ordered {
                            let same = |o: &u64| mode != Mode::KeyShared || keys[*o as usize] == keys[at as usize];
                            held.retain(|o, _| *o < at || !same(o));
                        }
                    }
                }
                Op::Release(at, n) => {
                    let counted = failures(&d, keys.len());
                    d.take_back(&[range(at, at + n)]);
                    prop_assert_eq!(failures(&d, keys.len()), counted, "a release counts nothing");
                    let freed: Vec<u64> = held.range(at..at + n).map(|(o, _)| *o).collect();
                    for offset in freed {
                        let same = |o: &u64| mode != Mode::KeyShared || keys[*o as usize] == keys[offset as usize];
                        held.retain(|o, _| *o != offset && (!ordered || *o < offset || !same(o)));
                    }
                }
                Op::Extend(at, by) => {
                    d.extend(range(at, at + 1), by, now);
                    if let Some((_, deadline)) = held.get_mut(&at) {
                        *deadline = now + by;
                    }
                }
                Op::Pass(ms) => {
                    now += ms;
                    d.tick(now);
                    let late: Vec<u64> = held.iter().filter(|(_, (_, at))| *at <= now).map(|(o, _)| *o).collect();
                    for offset in late {
                        if ordered {
                            let same = |o: &u64| mode != Mode::KeyShared || keys[*o as usize] == keys[offset as usize];
                            held.retain(|o, _| *o < offset || !same(o));
                        }
                        held.remove(&offset);
                    }
                }
            }
            prop_assert_eq!(d.leased(), held.len() as u64);
            let position = (0..).find(|o| !acked.contains(o)).unwrap();
            prop_assert_eq!(d.cursor().position(), position.min(keys.len() as u64));
        }
        // nothing is lost: a last member with credit for all gets all that is not acked
        members.iter().for_each(|m| d.detach(*m));
        d.attach(99, "last").unwrap();
        d.credit(99, 10_000);
        let mut rest = BTreeSet::new();
        for _ in 0..100 {
            now += 1_000;
            d.tick(now);
            for g in d.grants(now, 1_000) {
                rest.insert(g.offset);
                d.ack(range(g.offset, g.offset + 1));
            }
        }
        let missing: Vec<u64> = (0..keys.len() as u64).filter(|o| !acked.contains(o) && !rest.contains(o)).collect();
        prop_assert!(missing.is_empty(), "never delivered: {missing:?}");
        prop_assert_eq!(d.cursor().position(), keys.len() as u64);
        Ok(())
    }

    proptest! {
        #[test]
        fn disjoint_ranges_hold_the_same_offsets_once(list in proptest::collection::vec((0u64..40, 0u64..40), 0..20)) {
            let ranges: Vec<_> = list.iter().map(|(start, end)| (range(*start, *end), ())).collect();
            let offsets = |ranges: &[(OffsetRange, ())]| -> Vec<u64> { ranges.iter().flat_map(|(r, ())| r.start..r.end).collect() };
            let wanted: BTreeSet<u64> = offsets(&ranges).into_iter().collect();
            prop_assert_eq!(offsets(&disjoint(ranges)), wanted.into_iter().collect::<Vec<_>>());
        }
    }

    /// Each call of a member used to search the window, or another queue, once for each message.
    #[test]
    fn what_one_call_does_costs_steps_by_the_window_not_by_its_square() {
        let many = 60_000;
        let mut d = Delivery::new(plain(Mode::KeyShared), Cursor::at(0));
        d.attach(1, "a").unwrap();
        d.credit(1, many);
        (0..2 * many).for_each(|at| d.feed(at % many, 0));
        for _ in 0..2 {
            assert_eq!(d.grants(0, many as usize).len(), many as usize);
            nack(&mut d, range(0, u64::MAX), Some(0), 0);
            d.credit(1, many);
        }
        assert_eq!(d.grants(0, many as usize).len(), many as usize);
        d.tick(1_000);
        d.credit(1, many);
        assert_eq!(d.grants(1_000, many as usize).len(), many as usize);
        assert_eq!(d.ack(range(0, u64::MAX)), [range(0, many)]);
        d.credit(1, many);
        assert_eq!(offsets(&d.grants(1_000, many as usize), 1).len(), many as usize);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn each_mode_keeps_its_promises(
            ops in proptest::collection::vec(op(), 0..120),
            mode in 0usize..4,
            priorities: bool,
            each_max in prop_oneof![Just(u64::MAX), 1u64..4],
        ) {
            let mode = [Mode::Exclusive, Mode::Failover, Mode::Shared, Mode::KeyShared][mode];
            let priorities = priorities && mode == Mode::Shared;
            check_against_model(Policy { priorities, leased_by_member_max: each_max, ..plain(mode) }, ops)?;
        }

        /// However many urgent messages come: the nth oldest that is ready goes out within [`OLDEST_EVERY`] times n others.
        #[test]
        fn what_is_not_urgent_does_not_starve(waiting in 1u64..40, priorities in proptest::collection::vec(0u8..10, 40)) {
            let mut d = Delivery::new(Policy { priorities: true, ..plain(Mode::Shared) }, Cursor::at(0));
            d.attach(1, "a").unwrap();
            d.credit(1, 100_000);
            (0..waiting).for_each(|at| d.feed(0, priorities[at as usize]));
            let mut out = Vec::new();
            while out.len() < (OLDEST_EVERY * waiting) as usize {
                d.feed(0, PRIORITY_MAX); // more urgent ones than are taken
                d.feed(0, PRIORITY_MAX);
                out.extend(d.grants(0, 1).iter().map(|g| g.offset));
            }
            for offset in 0..waiting {
                let at = out.iter().position(|o| *o == offset);
                let most = OLDEST_EVERY * (offset + 1);
                prop_assert!(at.is_some_and(|at| (at as u64) < most), "{offset} went out as {at:?}, not before {most}");
            }
        }
    }
}
