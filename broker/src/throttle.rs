//! The declared rate of a subscription on this broker: all its partitions led here share one allowance, and brokers have
//! their parts of it by the partitions they lead.

use crate::shared::Shared;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::index::Metadata;
use weir_core::meta::state::SubscriptionSpec;
use weir_core::rate::Bucket;

struct Allowance {
    begun: Instant,
    /// rates and burst that the buckets were made for
    made_for: (u64, u64, u64),
    messages: Bucket,
    bytes: Bucket,
}

/// What a subscription may deliver from this broker.
#[derive(Clone)]
pub struct Throttle(Arc<Mutex<Allowance>>);

/// The throttles of a broker.
#[derive(Clone, Default)]
pub struct Throttles(Arc<Mutex<HashMap<SubscriptionId, Weak<Mutex<Allowance>>>>>);

impl Throttles {
    /// The one of a subscription, which all its partitions here share.
    pub fn of(&self, subscription: SubscriptionId) -> Throttle {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, t| t.strong_count() > 0);
        if let Some(found) = all.get(&subscription).and_then(Weak::upgrade) {
            return Throttle(found);
        }
        let unlimited = Allowance {
            begun: Instant::now(),
            made_for: (0, 0, 0),
            messages: Bucket::new(0, 1, 0),
            bytes: Bucket::new(0, 1, 0),
        };
        let made = Arc::new(Mutex::new(unlimited));
        all.insert(subscription, Arc::downgrade(&made));
        Throttle(made)
    }
}

/// `whole` by the part of a topic's partitions that this broker leads; at least 1 of what is limited at all.
fn part(whole: u64, led: u64, of: u64) -> u64 {
    if whole == 0 { 0 } else { (whole.saturating_mul(led) / of.max(1)).max(1) }
}

impl Throttle {
    /// Goes by the spec, and by what this broker leads now.
    pub fn adjust(&self, spec: &SubscriptionSpec, meta: &Metadata, shared: &Shared) {
        let (mut led, mut of) = (0, 0);
        let limited = spec.messages_per_second > 0 || spec.bytes_per_second > 0 || spec.burst_messages > 0;
        // each hub asks often, and this looks at all that it reads
        let topics = limited.then(|| meta.topics_of(spec));
        for group in topics.into_iter().flatten().flat_map(|t| &t.groups) {
            of += 1;
            led += u64::from(shared.leads(GroupId(*group)));
        }
        let messages = part(spec.messages_per_second, led, of);
        let bytes = part(spec.bytes_per_second, led, of);
        let burst = if spec.burst_messages == 0 { messages / 10 } else { part(spec.burst_messages, led, of) };
        let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if allowance.made_for != (messages, bytes, burst) {
            allowance.made_for = (messages, bytes, burst);
            let now_ms = allowance.begun.elapsed().as_millis() as u64;
            allowance.messages = Bucket::new(messages, burst, now_ms);
            allowance.bytes = Bucket::new(bytes, bytes / 10, now_ms);
            // a change of leaders must not give out a burst each time
            allowance.messages.take(burst.max(1));
            allowance.bytes.take((bytes / 10).max(1));
        }
    }

    /// Messages that may go now.
    pub fn available(&self) -> usize {
        let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = allowance.begun.elapsed().as_millis() as u64;
        let messages = allowance.messages.available(now_ms);
        if allowance.bytes.available(now_ms) == 0 { 0 } else { messages.min(usize::MAX as u64) as usize }
    }

    /// These went.
    pub fn take(&self, messages: u64, bytes: u64) {
        let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        allowance.messages.take(messages);
        allowance.bytes.take(bytes);
    }

    /// How long until something may go again, ms.
    pub fn wait_ms(&self) -> u64 {
        let allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = [allowance.messages.wait_ms(), allowance.bytes.wait_ms()];
        waits.into_iter().flatten().max().unwrap_or(0).clamp(1, 1_000)
    }
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn brokers_have_their_parts_and_never_nothing() {
        assert_eq!([part(1_000, 2, 6), part(1_000, 6, 6), part(1, 1, 6), part(0, 1, 6)], [333, 1_000, 1, 0]);
    }
}
