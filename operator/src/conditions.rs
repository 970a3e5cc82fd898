//! Conditions of a resource's status, the way Kubernetes asks for them: a time changes only with the status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Kinds of all conditions that this operator writes.
pub const KINDS: [&str; 5] = ["Ready", "Progressing", "Degraded", "VolumesRolledBack", "DeadLetterTopicMissing"];

/// One condition to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// One of [`KINDS`].
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// For programs, CamelCase.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Said {
    /// A condition.
    pub fn new(kind: &'static str, holds: bool, reason: &'static str, message: impl Into<String>) -> Self {
        debug_assert!(KINDS.contains(&kind), "{kind} would be taken for somebody else's");
        Self { kind, holds, reason, message: message.into() }
    }
}

/// The conditions a status should have: those said, with the times of `before` where nothing changed.
pub fn merge(before: &[Condition], said: Vec<Said>, generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let merged = said.into_iter().map(|s| {
        let status = if s.holds { "True" } else { "False" };
        let old = before.iter().find(|c| c.type_ == s.kind && c.status == status);
        Condition {
            type_: s.kind.to_owned(),
            status: status.to_owned(),
            reason: s.reason.to_owned(),
            message: s.message,
            observed_generation: generation,
            last_transition_time: old.map_or(Time(now), |c| c.last_transition_time.clone()),
        }
    });
    merged.collect()
}

/// As [`merge`], where not everything is known now: what is not said stays as it was.
pub fn merge_known(before: &[Condition], said: Vec<Said>, generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let mut merged = merge(before, said, generation, now);
    let kept: Vec<_> = before.iter().filter(|c| !merged.iter().any(|m| m.type_ == c.type_)).cloned().collect();
    merged.extend(kept);
    merged
}

/// Of a status, the conditions that are this operator's: others write theirs into the same list.
pub fn own(conditions: &[Condition]) -> Vec<Condition> {
    conditions.iter().filter(|c| KINDS.contains(&c.type_.as_str())).cloned().collect()
}

/// Whether two lists say the same, but for the times of changes.
pub fn alike(some: &[Condition], others: &[Condition]) -> bool {
    let said = |c: &Condition| (c.type_.clone(), c.status.clone(), c.reason.clone(), c.message.clone());
    some.iter().map(said).eq(others.iter().map(said))
}

/// Between two writes of figures that change with the traffic, where nothing else of a status has changed, s. With thousands of
/// resources each write costs the API server, and whoever watches it, more than the figures are worth; metrics have them at once.
pub const FIGURES_EVERY_SECONDS: i64 = 300;

/// Returns true if figures that were measured at `before` are old enough to be written again.
pub fn figures_are_due(before: Option<&Time>, now: Timestamp) -> bool {
    before.is_none_or(|at| {
        let age = now.as_second() - at.0.as_second();
        !(0..FIGURES_EVERY_SECONDS).contains(&age) // also where a clock was ahead
    })
}

/// Whether a condition holds.
pub fn holds(conditions: &[Condition], kind: &str) -> bool {
    conditions.iter().any(|c| c.type_ == kind && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_due_every_five_minutes_and_where_their_time_cannot_be_right() {
        let at = |s: i64| Time(Timestamp::from_second(s).unwrap());
        let now = at(10_000).0;
        assert!(figures_are_due(None, now) && figures_are_due(Some(&at(9_700)), now));
        assert!(figures_are_due(Some(&at(10_001)), now), "a clock was ahead");
        assert!(!figures_are_due(Some(&at(9_701)), now) && !figures_are_due(Some(&at(10_000)), now));
    }

    #[test]
    fn a_time_moves_only_when_the_status_does() {
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        let ready = |holds, reason| vec![Said::new("Ready", holds, reason, "")];
        let first = merge(&[], ready(true, "A"), Some(1), at(100));
        let second = merge(&first, ready(true, "B"), Some(2), at(200));
        assert_eq!(second[0].last_transition_time.0, at(100));
        let third = merge(&second, ready(false, "B"), Some(2), at(300));
        assert_eq!((third[0].last_transition_time.0, third[0].status.as_str()), (at(300), "False"));
    }
}
