//! Publishers of a partition are slowed while one of its replicas is far behind and does not gain: live traffic has the disk, the
//! processor and the network first, and at full load nothing is left to catch up with. They lose at most [`SHARE_MAX`] percent of
//! what they had. Pure; asked once a second.

use std::collections::VecDeque;

/// Publishers lose at most this share, percent.
pub const SHARE_MAX: u64 = 30;
/// Each step of it, percent.
const STEP: u64 = 10;
/// A replica that lacks less than this is left to itself, bytes.
pub const BEHIND_BYTES_MIN: u64 = 64 << 20;
/// Seconds over which a replica must gain.
const WINDOW: usize = 5;
/// It gains if within the window it gets nearer by this part of what it lacks: then it is there in a few minutes.
const GAIN_PART: u64 = 50;
/// Once publishers are slowed, a replica is near when it lacks less than this part of the least lag.
const NEAR_PART: u64 = 64;
/// Below this rate publishers are not what keeps a replica behind, bytes a second.
const RATE_MIN: u64 = 1 << 20;

/// One partition's pace, at its leader.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// what the slowest replica lacked in each of the last seconds
    behind: VecDeque<u64>,
    /// bytes published in each of the last seconds
    rates: VecDeque<u64>,
    /// what was published in a second before publishers were slowed
    base: u64,
    total: Option<u64>,
    share: u64,
}

impl Pace {
    /// A second has passed. `total` counts all bytes that were ever published; the replica that is furthest behind, of those that run,
    /// lacks `behind` bytes, and one that lacks fewer than `least` is left to itself.
    pub fn second(&mut self, total: u64, behind: u64, least: u64) {
        let published = total.saturating_sub(self.total.replace(total).unwrap_or(total));
        self.rates.push_back(published);
        if self.rates.len() > WINDOW {
            self.rates.pop_front();
        }
        // once publishers are slowed, they are until the replica has nearly everything
        let near = if self.share > 0 { least / NEAR_PART } else { least };
        if behind < near {
            self.behind.clear();
            self.share = self.share.saturating_sub(STEP);
            return;
        }
        self.behind.push_back(behind);
        if self.behind.len() <= WINDOW {
            return;
        }
        let before = self.behind.pop_front().unwrap_or(behind);
        if before.saturating_sub(behind) >= before / GAIN_PART {
            return;
        }
        let rate = self.rates.iter().copied().max().unwrap_or(0);
        if self.share == 0 && rate < RATE_MIN.min(least) {
            return;
        }
        if self.share == 0 {
            self.base = rate;
        }
        self.share = (self.share + STEP).min(SHARE_MAX);
        self.behind.clear(); // what comes of it is seen after another window
    }

    /// Percent by which publishers are slowed.
    pub fn share(&self) -> u64 {
        self.share
    }

    /// What may be published in a second, bytes; `None` for no limit.
    pub fn limit(&self) -> Option<u64> {
        (self.share > 0).then(|| (self.base / 100).saturating_mul(100 - self.share).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        /// A machine that does `capacity` in a second gives live traffic what it wants, and the replica the rest.
        #[test]
        fn a_replica_catches_up_under_any_load_and_publishers_keep_seven_tenths(
            capacity in 20u64..400, wanted_percent in 50u64..400, lag in 100u64..4_000
        ) {
            let capacity = capacity * MIB;
            let wanted = capacity * wanted_percent / 100;
            let (mut pace, mut total, mut behind, mut least) = (Pace::default(), 0, lag * MIB, u64::MAX);
            let full = wanted.min(capacity);
            for second in 0.. {
                prop_assert!(second < 2_000, "{behind} bytes behind, {pace:?}");
                let published = full.min(pace.limit().unwrap_or(u64::MAX));
                least = least.min(published);
                behind = (behind + published).saturating_sub(capacity);
                total += published;
                pace.second(total, behind, BEHIND_BYTES_MIN);
                if behind < MIB && pace.share() == 0 {
                    break;
                }
            }
            prop_assert!(least + 100 >= full * (100 - SHARE_MAX) / 100, "{least} of {full}");
        }
    }

    #[test]
    fn nobody_is_slowed_for_a_replica_that_gains_or_where_little_is_published() {
        let (mut gains, mut idle) = (Pace::default(), Pace::default());
        for second in 0..60 {
            gains.second(second * 100 * MIB, (3_000 - second * 20) * MIB, BEHIND_BYTES_MIN);
            idle.second(second * 1_000, 3_000 * MIB, BEHIND_BYTES_MIN);
            assert_eq!((gains.limit(), idle.limit()), (None, None));
        }
    }
}
