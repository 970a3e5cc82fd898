//! What is due when, of messages that lie in a log until then: the earliest of them in memory, the rest where it is. Pure.

use std::collections::BTreeSet;

/// The earliest messages of a log, by when they are due.
#[derive(Debug)]
pub struct Schedule {
    /// (due, offset)
    due: BTreeSet<(u64, u64)>,
    max: usize,
    /// of those due from here on, not all are in memory
    beyond_ms: u64,
}

impl Schedule {
    /// Holds at most `max`.
    pub fn new(max: usize) -> Self {
        Self { due: BTreeSet::new(), max: max.max(1), beyond_ms: u64::MAX }
    }

    /// Takes up a message that was read in the log; one that is due later than what there is room for is left there.
    pub fn add(&mut self, due_ms: u64, offset: u64) {
        if due_ms >= self.beyond_ms {
            return;
        }
        self.due.insert((due_ms, offset));
        if self.due.len() > self.max
            && let Some((latest, _)) = self.due.pop_last()
        {
            self.beyond_ms = latest;
            // of one moment all or none: which of them were left out is not known any more
            while self.due.last().is_some_and(|(due, _)| *due == latest) {
                self.due.pop_last();
            }
            if self.due.is_empty() {
                // more at one moment than there is room for: as many of them as there is
                self.beyond_ms = latest.saturating_add(1);
                self.due.insert((latest, offset));
            }
        }
    }

    /// Messages due by now, the earliest first; they are no longer held.
    pub fn take_due(&mut self, now_ms: u64, max: usize) -> Vec<u64> {
        let mut out = Vec::new();
        while out.len() < max
            && let Some(&(due, offset)) = self.due.first().filter(|(due, _)| *due <= now_ms)
        {
            self.due.remove(&(due, offset));
            out.push(offset);
        }
        out
    }

    /// When the next one held is due.
    pub fn next_due_ms(&self) -> Option<u64> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Forgets a message that is due at a known time.
    pub fn forget(&mut self, due_ms: u64, offset: u64) {
        self.due.remove(&(due_ms, offset));
    }

    /// Forgets a message; whether it was held.
    pub fn remove(&mut self, offset: u64) -> bool {
        let before = self.due.len();
        self.due.retain(|(_, o)| *o != offset);
        self.due.len() < before
    }

    /// Whether all that was held is gone and more lies in the log: it is to be read again from the position on.
    pub fn is_exhausted(&self) -> bool {
        self.due.is_empty() && self.beyond_ms < u64::MAX
    }

    /// The log is read again from the position on.
    pub fn begin_again(&mut self) {
        self.due.clear();
        self.beyond_ms = u64::MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Beside a log in a vector: each message once, none before it is due, none left over, no more in memory than allowed.
        #[test]
        fn all_are_taken_once_when_they_are_due(
            dues in proptest::collection::vec(0u64..60, 0..200), max in 1usize..30, take in 1usize..40
        ) {
            let mut schedule = Schedule::new(max);
            let mut taken: BTreeSet<u64> = BTreeSet::new();
            let mut read = 0;
            for now in 0..2_000u64 {
                if schedule.is_exhausted() {
                    schedule.begin_again();
                    read = 0;
                }
                // the log grows as time passes
                let end = dues.len().min(now as usize * 5);
                for (offset, due) in dues.iter().enumerate().take(end).skip(read) {
                    if !taken.contains(&(offset as u64)) {
                        schedule.add(*due, offset as u64);
                    }
                }
                read = end;
                prop_assert!(schedule.due.len() <= max);
                for offset in schedule.take_due(now, take) {
                    prop_assert!(dues[offset as usize] <= now);
                    prop_assert!(taken.insert(offset), "{offset} twice");
                }
            }
            prop_assert_eq!(taken.len(), dues.len());
        }
    }

    #[test]
    fn what_was_cancelled_is_not_taken() {
        let mut schedule = Schedule::new(10);
        schedule.add(5, 1);
        schedule.add(5, 2);
        assert!(schedule.remove(1) && !schedule.remove(1));
        assert_eq!((schedule.next_due_ms(), schedule.take_due(9, 10)), (Some(5), vec![2]));
    }
}
