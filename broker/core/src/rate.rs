//! A token bucket: how fast a subscription may be delivered, or a follower filled. Pure; time is given.

/// Tokens that come at a rate and gather up to a burst. Taking more than there are leaves a debt, which is waited out.
#[derive(Clone, Debug)]
pub struct Bucket {
    per_second: u64,
    burst: u64,
    /// thousandths of tokens, negative for a debt
    level: i64,
    at_ms: u64,
}

impl Bucket {
    /// Begins full. A rate of 0 is no limit.
    pub fn new(per_second: u64, burst: u64, now_ms: u64) -> Self {
        let burst = burst.max(1);
        Self { per_second, burst, level: thousands(burst), at_ms: now_ms }
    }

    /// Whole tokens there are now.
    pub fn available(&mut self, now_ms: u64) -> u64 {
        if self.per_second == 0 {
            return u64::MAX;
        }
        let elapsed = now_ms.saturating_sub(self.at_ms);
        self.at_ms = self.at_ms.max(now_ms);
        self.level = self.level.saturating_add(elapsed.saturating_mul(self.per_second).min(i64::MAX as u64) as i64);
        self.level = self.level.min(thousands(self.burst));
        (self.level / 1_000).max(0) as u64
    }

    /// Takes tokens, also more than there are.
    pub fn take(&mut self, tokens: u64) {
        if self.per_second > 0 {
            self.level = self.level.saturating_sub(thousands(tokens));
        }
    }

    /// Gives tokens beside those that come with time. They pay a debt; what does not fit into the burst is lost.
    pub fn give(&mut self, tokens: u64) {
        self.level = self.level.saturating_add(thousands(tokens)).min(thousands(self.burst));
    }

    /// How long until there is one again, ms; `None` where there is no limit.
    pub fn wait_ms(&self) -> Option<u64> {
        (self.per_second > 0)
            .then(|| 1_000i64.saturating_sub(self.level).max(0) as u64)
            .map(|lack| lack.div_ceil(self.per_second))
    }
}

fn thousands(tokens: u64) -> i64 {
    tokens.saturating_mul(1_000).min(i64::MAX as u64) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_debt_is_waited_out() {
        let mut bucket = Bucket::new(10, 5, 0);
        assert_eq!(bucket.available(0), 5);
        bucket.take(8);
        assert_eq!((bucket.available(300), bucket.wait_ms()), (0, Some(100)));
        assert_eq!(bucket.available(400), 1);
        assert_eq!(bucket.available(1_000_000), 5, "no more than the burst gathers");
        assert_eq!(Bucket::new(0, 0, 0).available(0), u64::MAX);
    }

    proptest! {
        #[test]
        fn over_any_time_no_more_goes_out_than_burst_and_rate_allow(
            rate in 1u64..5_000, burst in 1u64..500,
            steps in proptest::collection::vec((0u64..2_000, 1u64..600, 0u64..100), 1..80)
        ) {
            let mut bucket = Bucket::new(rate, burst, 0);
            let (mut now, mut taken, mut given) = (0, 0, 0);
            for (pause, wanted, gift) in steps {
                now += pause;
                bucket.give(gift);
                given += gift;
                let tokens = bucket.available(now).min(wanted);
                bucket.take(tokens);
                taken += tokens;
                prop_assert!(taken <= burst + rate * now / 1_000 + given, "{taken} by {now} ms with {given} given");
            }
        }

        #[test]
        fn what_is_given_pays_debts(debt in 0u64..1_000, given in 0u64..2_000) {
            let mut bucket = Bucket::new(10, 500, 0);
            bucket.take(500 + debt);
            bucket.give(given);
            prop_assert_eq!(bucket.available(0), given.saturating_sub(debt).min(500));
        }
    }
}
