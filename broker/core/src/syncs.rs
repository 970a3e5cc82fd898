//! How long syncs take here and elsewhere. A leader whose disk is an order of magnitude slower than its followers' makes every publish
//! wait for it, although a majority has the record without it; it gives leadership away, and gets none while it is slow. Where all
//! disks are slow alike, nothing moves. Pure; times are given.

use crate::ids::BrokerId;
use std::collections::{BTreeMap, VecDeque};

/// Syncs that ended longer ago do not count, ms.
const WINDOW_MS: u64 = 1_500;
/// Syncs kept.
const SAMPLES_MAX: usize = 128;
/// A disk that is faster than this is not slow, whatever the others are, ms.
const SLOW_MS_MIN: u32 = 50;
/// A disk becomes slow when its syncs take this many times as long as the others',
const SLOW_FACTOR: u32 = 10;
/// and stays slow as long as they take this many times as long.
const STAYS_SLOW_FACTOR: u32 = 4;
/// For this long it must be so before leadership moves, ms.
const SLOW_FOR_MS: u64 = 1_500;
/// After this time without a sign of slowness it is over, ms.
const OVER_AFTER_MS: u64 = 60_000;
/// What another broker said longer ago than this does not count, ms.
const HEARD_MS_MAX: u64 = 3_000;

#[derive(Clone, Copy)]
struct Other {
    median_ms: u32,
    slow: bool,
    at_ms: u64,
}

/// See the module.
#[derive(Default)]
pub struct Syncs {
    /// rounds that are being synced, and since when
    under_way: VecDeque<(u64, u64)>,
    /// when each of the last ones ended, and how long it took
    done: VecDeque<(u64, u32)>,
    others: BTreeMap<BrokerId, Other>,
    /// since when this disk is slow beyond doubt
    since_ms: Option<u64>,
    /// when there was last a sign of it
    seen_ms: u64,
    slow: bool,
}

fn median(mut list: Vec<u32>) -> Option<u32> {
    list.sort_unstable();
    list.get(list.len() / 2).copied()
}

impl Syncs {
    /// A round was given to the disk, which syncs it.
    pub fn begun(&mut self, round: u64, now_ms: u64) {
        self.under_way.push_back((round, now_ms));
    }

    /// All rounds up to this one are synced.
    pub fn ended(&mut self, round: u64, now_ms: u64) {
        while let Some((_, since)) = self.under_way.front().copied().filter(|(number, _)| *number <= round) {
            self.under_way.pop_front();
            if self.done.len() == SAMPLES_MAX {
                self.done.pop_front();
            }
            let took = now_ms.saturating_sub(since).min(u64::from(u32::MAX));
            self.done.push_back((now_ms, took as u32));
        }
    }

    /// Median of the last syncs, ms; `None` where too little was synced lately to tell.
    pub fn median_ms(&self, now_ms: u64) -> Option<u32> {
        let lately = self.done.iter().filter(|(at, _)| now_ms.saturating_sub(*at) <= WINDOW_MS);
        let mut list: Vec<u32> = lately.map(|(_, took)| *took).collect();
        // one that does not end at all
        let waits = self.under_way.front().map_or(0, |(_, since)| now_ms.saturating_sub(*since));
        if waits >= WINDOW_MS {
            return Some(waits.min(u64::from(u32::MAX)) as u32);
        }
        if waits >= u64::from(SLOW_MS_MIN) {
            list.push(waits as u32);
        }
        if list.len() < 2 { None } else { median(list) }
    }

    /// What another broker says of its syncs; 0 where it does not know.
    pub fn hear(&mut self, broker: BrokerId, median_ms: u32, slow: bool, now_ms: u64) {
        self.others.insert(broker, Other { median_ms, slow, at_ms: now_ms });
    }

    /// Whether another broker said that its disk is slow.
    pub fn is_slow_at(&self, broker: BrokerId) -> bool {
        self.others.get(&broker).is_some_and(|o| o.slow)
    }

    /// Whether this broker's disk is slow.
    pub fn is_slow(&self) -> bool {
        self.slow
    }

    /// Compares this disk with the others; true where the verdict changed.
    pub fn compare(&mut self, now_ms: u64) -> bool {
        let heard = self.others.values().filter(|o| o.median_ms > 0 && now_ms.saturating_sub(o.at_ms) <= HEARD_MS_MAX);
        let others = median(heard.map(|o| o.median_ms).collect());
        let before = self.slow;
        let beyond = |factor: u32| match (self.median_ms(now_ms), others) {
            (Some(mine), Some(others)) => mine >= SLOW_MS_MIN.max(others.saturating_mul(factor)),
            _ => false,
        };
        if beyond(if self.slow { STAYS_SLOW_FACTOR } else { SLOW_FACTOR }) {
            let since = *self.since_ms.get_or_insert(now_ms);
            self.seen_ms = now_ms;
            self.slow |= now_ms.saturating_sub(since) >= SLOW_FOR_MS;
        } else {
            self.since_ms = None;
            self.slow &= now_ms.saturating_sub(self.seen_ms) < OVER_AFTER_MS;
        }
        before != self.slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs for `ms` with syncs that take `mine` and are one after the other, beside two brokers whose syncs take `others`.
    fn pass(syncs: &mut Syncs, from: u64, ms: u64, mine: u64, others: u32) -> Vec<u64> {
        let mut changes = Vec::new();
        let (mut round, mut due) = (from, from + mine);
        syncs.begun(round, from);
        for now in from..from + ms {
            if now == due {
                syncs.ended(round, now);
                (round, due) = (now, now + mine);
                syncs.begun(round, now);
            }
            if now % 100 == 0 {
                [2, 3].into_iter().for_each(|b| syncs.hear(BrokerId(b), others, false, now));
            }
            if now % 200 == 0 && syncs.compare(now) {
                changes.push(now - from);
            }
        }
        syncs.ended(round, from + ms);
        changes
    }

    #[test]
    fn a_disk_ten_times_slower_than_the_others_is_noticed_within_four_seconds_and_for_as_long_as_it_lasts() {
        let mut syncs = Syncs::default();
        assert_eq!(pass(&mut syncs, 1_000, 10_000, 2, 2), []);
        let noticed = pass(&mut syncs, 11_000, 100_000, 500, 2);
        assert!(matches!(noticed[..], [at] if at <= 4_000), "{noticed:?}");
        assert!(syncs.is_slow());
        let over = pass(&mut syncs, 111_000, 100_000, 2, 2);
        assert!(matches!(over[..], [at] if (55_000..65_000).contains(&at)), "{over:?}");
    }

    #[test]
    fn disks_that_are_slow_alike_or_fast_enough_or_slow_for_a_moment_move_nothing() {
        let mut syncs = Syncs::default();
        assert_eq!(pass(&mut syncs, 1_000, 20_000, 500, 400), [], "alike");
        assert_eq!(pass(&mut syncs, 21_000, 20_000, 40, 1), [], "fast enough");
        assert_eq!(pass(&mut syncs, 41_000, 1_200, 600, 1), [], "for a moment");
        assert_eq!(pass(&mut syncs, 42_200, 20_000, 2, 1), []);
        let mut alone = Syncs::default();
        for now in 0..100 {
            alone.begun(now, now * 700);
            alone.ended(now, now * 700 + 600);
            assert!(!alone.compare(now * 700 + 600), "nothing to compare with");
        }
    }

    #[test]
    fn a_sync_that_does_not_end_is_a_slow_one() {
        let mut syncs = Syncs::default();
        pass(&mut syncs, 1_000, 5_000, 2, 2);
        let noticed = pass(&mut syncs, 6_000, 10_000, 60_000, 2);
        assert!(matches!(noticed[..], [at] if at <= 4_000), "{noticed:?}");
    }
}
