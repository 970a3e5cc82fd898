//! Conditions of a resource's status, the way Kubernetes asks for them: a time changes only with the status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// One condition to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// `Ready`, `Progressing` or `Degraded`.
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

/// Whether a condition holds.
pub fn holds(conditions: &[Condition], kind: &str) -> bool {
    conditions.iter().any(|c| c.type_ == kind && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

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
