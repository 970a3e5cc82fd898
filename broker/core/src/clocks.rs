//! Offsets between the clocks of brokers. A record's time is the time of the leader's clock, so a broker whose clock is far from the
//! others' must not lead: offset-by-time, retention and schedules would follow it. Pure; times are given.

use crate::ids::BrokerId;
use std::collections::{BTreeMap, VecDeque};

/// Samples kept of each broker. The one that was least delayed on its way is right, so their maximum counts.
const SAMPLES_MAX: usize = 16;

/// What this broker knows of the clocks of others.
#[derive(Default)]
pub struct Clocks(BTreeMap<BrokerId, VecDeque<i64>>);

impl Clocks {
    /// Takes a broker's time, which has just arrived, beside this one's.
    pub fn hear(&mut self, broker: BrokerId, theirs_ms: u64, mine_ms: u64) {
        let samples = self.0.entry(broker).or_default();
        if samples.len() == SAMPLES_MAX {
            samples.pop_front();
        }
        samples.push_back(difference(theirs_ms, mine_ms));
    }

    /// Forgets a broker: its next process has another clock.
    pub fn forget(&mut self, broker: BrokerId) {
        self.0.remove(&broker);
    }

    /// By how much a broker's clock is ahead of this one's, ms.
    pub fn offset_ms(&self, broker: BrokerId) -> Option<i64> {
        self.0.get(&broker)?.iter().copied().max()
    }

    /// All offsets known.
    pub fn offsets(&self) -> impl Iterator<Item = (BrokerId, i64)> + '_ {
        self.0.keys().filter_map(|b| Some((*b, self.offset_ms(*b)?)))
    }
}

fn difference(theirs_ms: u64, mine_ms: u64) -> i64 {
    let far = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    if theirs_ms >= mine_ms { far(theirs_ms - mine_ms) } else { -far(mine_ms - theirs_ms) }
}

/// By how much the median of all clocks is ahead of this broker's own, ms, given the offsets of the others. Of two that are in the
/// middle the one nearer to its own counts; none where they are more than `within_ms` apart: half of the brokers are as right as the
/// other half.
pub fn median_ms(others: impl IntoIterator<Item = i64>, within_ms: u64) -> Option<i64> {
    let mut all: Vec<i64> = others.into_iter().chain([0]).collect();
    all.sort_unstable();
    let (low, high) = (all[(all.len() - 1) / 2], all[all.len() / 2]);
    if low.abs_diff(high) > within_ms {
        return None;
    }
    if low <= 0 && high >= 0 {
        return Some(if low.saturating_neg() < high { low } else { high });
    }
    Some(if low > 0 { low } else { high })
}

/// How many clocks are at most `within_ms` from this broker's own, its own among them, given the offsets of the others.
pub fn agreeing(others: &[i64], within_ms: u64) -> usize {
    1 + others.iter().filter(|offset| offset.unsigned_abs() <= within_ms).count()
}

/// A time by this broker's clock, moved by the median.
pub fn moved_ms(mine_ms: u64, by_ms: i64) -> u64 {
    mine_ms.saturating_add_signed(by_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_clock_that_most_agree_with_is_right() {
        let day = 86_400_000;
        let median = |others: &[i64]| median_ms(others.iter().copied(), 10_000);
        assert_eq!(median(&[]), Some(0));
        assert_eq!(median(&[-day, -day + 3]), Some(-day + 3), "this one is ahead");
        assert_eq!(median(&[day, 2]), Some(2), "another is");
        assert_eq!(median(&[day]), None, "of two nobody can tell");
        assert_eq!(median(&[-day]), None);
        assert_eq!(median(&[3]), Some(0));
        assert_eq!(median(&[day, day, 1]), None);
        assert_eq!(median(&[i64::MIN, i64::MIN]), Some(i64::MIN));
        assert_eq!(median(&[i64::MIN, i64::MAX, i64::MAX]), None);
    }

    #[test]
    fn clocks_agree_that_are_near_to_this_one() {
        assert_eq!(agreeing(&[], 10), 1);
        assert_eq!(agreeing(&[3, -86_400_000], 10), 2);
        assert_eq!(agreeing(&[86_400_000, 86_400_000], 10), 1, "this one is wrong");
        assert_eq!(agreeing(&[i64::MIN, i64::MAX], u64::MAX), 3);
    }

    #[test]
    fn a_late_sample_is_no_offset() {
        let mut clocks = Clocks::default();
        for delay in [1, 700, 3] {
            clocks.hear(BrokerId(2), 10_000, 10_000 + delay);
        }
        assert_eq!(clocks.offset_ms(BrokerId(2)), Some(-1));
        clocks.hear(BrokerId(3), u64::MAX, 0);
        assert_eq!(clocks.offset_ms(BrokerId(3)), Some(i64::MAX));
        clocks.forget(BrokerId(3));
        assert_eq!(clocks.offsets().collect::<Vec<_>>(), [(BrokerId(2), -1)]);
    }

    proptest! {
        #[test]
        fn with_a_minority_of_wrong_clocks_the_median_is_a_right_one(
            right in proptest::collection::vec(-500i64..500, 2..6), wrong in proptest::collection::vec(any::<i64>(), 0..2)
        ) {
            let median = median_ms(right.iter().copied().chain(wrong), 10_000);
            prop_assert!(median.is_some_and(|m| (-500..500).contains(&m)), "{median:?}");
        }
    }
}
