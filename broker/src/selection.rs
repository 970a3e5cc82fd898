//! Which messages of a topic a subscription wants: those that are not meant for another one, whose routing key matches, and that meet the
//! filter. Judged some at a time, so that others have their turn.

use crate::dead_letter::ONLY_FOR;
use crate::filter::{Evaluator, Filter, Verdict};
use crate::metrics::Metrics;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use weir_core::pattern;
use weir_proto::records::Record;

/// Header with the words that patterns of routing keys match.
const ROUTING_KEY: &str = "weir-routing-key";
/// Messages judged between two looks at the time.
const BETWEEN: usize = 16;

/// See the module.
pub struct Selection {
    /// Full name of the subscription.
    pub subscription: Bytes,
    /// Its filter.
    pub filter: Option<Filter>,
    /// Its patterns of routing keys.
    pub routing_keys: Vec<String>,
    /// Its topic, for messages to people.
    pub topic: String,
    /// Counts what is delivered unfiltered.
    pub metrics: Arc<Metrics>,
}

/// Why judging stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// All are judged, or enough are wanted.
    Done,
    /// The time is over.
    Time,
    /// The next one is costly.
    Costly,
}

/// How much is judged.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Until so many are wanted.
    pub wanted: u64,
    /// For about so long.
    pub time: Duration,
    /// Also those that are costly.
    pub costly: bool,
}

impl Selection {
    fn is_wanted(&self, evaluator: &mut Option<Evaluator<'_>>, record: &Record) -> bool {
        let routed = || {
            let key = record.header(ROUTING_KEY).map_or(Default::default(), |k| String::from_utf8_lossy(k));
            self.routing_keys.iter().any(|p| pattern::matches(p, &key))
        };
        record.header(ONLY_FOR).is_none_or(|name| *name == self.subscription)
            && (self.routing_keys.is_empty() || routed())
            && evaluator.as_mut().is_none_or(|e| match e.verdict(record) {
                Verdict::Wanted => true,
                Verdict::Unwanted => false,
                Verdict::TooCostly => {
                    let subscription = String::from_utf8_lossy(&self.subscription);
                    self.metrics.unfiltered.with_label_values(&[&*subscription]).inc();
                    tracing::debug!(
                        topic = self.topic,
                        %subscription,
                        "a message is delivered unfiltered: evaluating it would cost too much"
                    );
                    true
                }
            })
    }

    /// Judges the records behind those judged already.
    pub fn judge(&self, records: &[Record], judged: &mut Vec<bool>, limit: Limit) -> Stopped {
        let begun = Instant::now();
        let mut evaluator = self.filter.as_ref().map(Filter::evaluator);
        let mut wanted = 0;
        for (at, record) in records.iter().enumerate().skip(judged.len()) {
            if wanted >= limit.wanted {
                return Stopped::Done;
            }
            let costly = self.filter.as_ref().is_some_and(|f| f.is_costly(record));
            if costly && !limit.costly {
                return Stopped::Costly;
            }
            if (costly || at % BETWEEN == 0) && begun.elapsed() > limit.time {
                return Stopped::Time;
            }
            let is_wanted = self.is_wanted(&mut evaluator, record);
            wanted += u64::from(is_wanted);
            judged.push(is_wanted);
        }
        Stopped::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(filter: &str) -> Selection {
        let filter = Filter::compile(filter).unwrap_or_else(|f| panic!("{}", f.message));
        let metrics = Arc::new(Metrics::new("/".into()));
        let (topic, routing_keys) = (String::new(), vec!["a.*".into()]);
        Selection { subscription: "default/s".into(), filter, routing_keys, topic, metrics }
    }

    fn record(key: &str, headers: &[(&str, &str)]) -> Record {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), Some(Bytes::copy_from_slice(v.as_bytes()))));
        Record { key: Some(Bytes::copy_from_slice(key.as_bytes())), headers: headers.collect(), ..Default::default() }
    }

    #[test]
    fn messages_are_judged_in_order_as_far_as_is_allowed() {
        let selection = selection("key.contains('x')");
        let routed = ("weir-routing-key", "a.b");
        let large = "x".repeat(1 << 20);
        let records = [
            record("x", &[routed]),
            record("x", &[]),
            record("y", &[routed]),
            record("x", &[routed, ("weir-only-for", "default/other")]),
            record("x", &[routed, ("weir-only-for", "default/s")]),
            record("x", &[routed]),
            record(&large, &[routed]),
        ];
        let mut judged = Vec::new();
        let mut limit = Limit { wanted: 2, time: Duration::from_secs(60), costly: false };
        assert_eq!(selection.judge(&records, &mut judged, limit), Stopped::Done);
        assert_eq!(judged, [true, false, false, false, true]);
        assert_eq!(selection.judge(&records, &mut judged, limit), Stopped::Costly);
        assert_eq!(judged.len(), 6, "the costly one is left to another thread");
        limit = Limit { costly: true, ..limit };
        assert_eq!(selection.judge(&records, &mut judged, limit), Stopped::Done);
        assert_eq!(judged[5..], [true, true]);
        let unfiltered = |selection: &Selection| selection.metrics.unfiltered.with_label_values(&["default/s"]).get();
        assert_eq!(unfiltered(&selection), 0, "each was evaluated");
        let many = vec![record("y", &[routed]); 100];
        let mut judged = Vec::new();
        let no_time = Limit { time: Duration::ZERO, ..limit };
        assert_eq!(selection.judge(&many, &mut judged, no_time), Stopped::Time);
        assert!(judged.len() < many.len());
        // what would copy more than 800 MiB is not evaluated: it is delivered, and counted
        let copied = (0..7).fold("key".to_owned(), |text, _| format!("({text} + {text})"));
        let selection = self::selection(&format!("{copied} == ''"));
        let mut judged = Vec::new();
        assert_eq!(selection.judge(&records, &mut judged, Limit { wanted: 100, ..limit }), Stopped::Done);
        assert_eq!(judged, [false, false, false, false, false, false, true]);
        assert_eq!(unfiltered(&selection), 1);
    }
}
