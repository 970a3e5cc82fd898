//! Which checkpoint the log of a partition may be cut at. Pure.

use crate::log::CheckpointInfo;
use crate::meta::state::TopicSpec;

/// Index of the newest checkpoint before which everything may go, if any: old enough or too much, and
/// never past `keep_from`, the smallest position of a subscription.
pub fn cut<'a>(
    checkpoints: impl DoubleEndedIterator<Item = &'a CheckpointInfo>,
    spec: &TopicSpec,
    log_bytes: u64,
    now_ms: u64,
    keep_from: Option<u64>,
) -> Option<u64> {
    let expired = |c: &CheckpointInfo| spec.retention_ms > 0 && c.append_time_ms + spec.retention_ms <= now_ms;
    let too_much = |c: &CheckpointInfo| spec.retention_bytes > 0 && log_bytes - c.log_bytes >= spec.retention_bytes;
    let read = |c: &CheckpointInfo| keep_from.is_none_or(|from| c.next_offset <= from);
    checkpoints.rev().find(|c| (expired(c) || too_much(c)) && read(c)).map(|c| c.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points() -> Vec<CheckpointInfo> {
        let point = |i: u64| CheckpointInfo {
            index: i * 10,
            next_offset: i * 100,
            log_bytes: i * 1000,
            append_time_ms: i * 60_000,
        };
        (1..=5).map(point).collect()
    }

    #[test]
    fn cuts_by_time_and_by_size_and_never_past_a_subscription() {
        let by_time = TopicSpec { retention_ms: 60_000, ..Default::default() };
        assert_eq!(cut(points().iter(), &by_time, 6000, 240_000, None), Some(30));
        assert_eq!(cut(points().iter(), &by_time, 6000, 240_000, Some(250)), Some(20));
        assert_eq!(cut(points().iter(), &by_time, 6000, 240_000, Some(99)), None);
        let by_size = TopicSpec { retention_bytes: 2000, ..Default::default() };
        assert_eq!(cut(points().iter(), &by_size, 6000, 0, None), Some(40));
        assert_eq!(cut(points().iter(), &TopicSpec::default(), 6000, u64::MAX / 2, None), None);
    }
}
