//! Which checkpoint the log of a partition may be cut at. Pure.

use crate::log::CheckpointInfo;
use crate::meta::state::TopicSpec;

/// Index of the newest checkpoint before which everything may go, if any: old enough or too much, and
/// never past `keep_from`, the smallest position of a subscription. Nothing is old where the time is not known.
pub fn cut<'a>(
    checkpoints: impl DoubleEndedIterator<Item = &'a CheckpointInfo>,
    spec: &TopicSpec,
    log_bytes: u64,
    now_ms: Option<u64>,
    keep_from: Option<u64>,
) -> Option<u64> {
    let age_ms = |c: &CheckpointInfo| now_ms?.checked_sub(c.append_time_ms);
    let expired = |c: &CheckpointInfo| spec.retention_ms > 0 && age_ms(c).is_some_and(|age| age >= spec.retention_ms);
    let behind = |c: &CheckpointInfo| log_bytes.saturating_sub(c.log_bytes);
    let too_much = |c: &CheckpointInfo| spec.retention_bytes > 0 && behind(c) >= spec.retention_bytes;
    // what was scheduled is of no use once it is published, and that is known by the position of its schedule
    let published = !spec.schedule_for.is_empty() && keep_from.is_some();
    let read = |c: &CheckpointInfo| keep_from.is_none_or(|from| c.next_offset <= from);
    checkpoints.rev().find(|c| (expired(c) || too_much(c) || published) && read(c)).map(|c| c.index)
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
        assert_eq!(cut(points().iter(), &by_time, 6000, Some(240_000), None), Some(30));
        assert_eq!(cut(points().iter(), &by_time, 6000, Some(240_000), Some(250)), Some(20));
        assert_eq!(cut(points().iter(), &by_time, 6000, Some(240_000), Some(99)), None);
        assert_eq!(cut(points().iter(), &by_time, 6000, None, None), None, "nobody knows how late it is");
        let by_size = TopicSpec { retention_bytes: 2000, ..Default::default() };
        assert_eq!(cut(points().iter(), &by_size, 6000, None, None), Some(40));
        assert_eq!(cut(points().iter(), &TopicSpec::default(), 6000, Some(u64::MAX / 2), None), None);
    }

    #[test]
    fn what_is_scheduled_is_kept_until_it_is_published_and_no_longer() {
        let scheduled = TopicSpec { schedule_for: "default/t".into(), ..Default::default() };
        assert_eq!(cut(points().iter(), &scheduled, 6000, Some(0), None), None, "nobody says yet what is published");
        assert_eq!(cut(points().iter(), &scheduled, 6000, Some(0), Some(0)), None);
        assert_eq!(cut(points().iter(), &scheduled, 6000, Some(0), Some(399)), Some(30));
    }

    #[test]
    fn a_retention_beyond_all_time_and_all_disks_keeps_everything() {
        for retention_ms in [u64::MAX, u64::MAX - 60_000, i64::MAX as u64] {
            let spec = TopicSpec { retention_ms, retention_bytes: u64::MAX, ..Default::default() };
            assert_eq!(cut(points().iter(), &spec, 6000, Some(240_000), None), None, "{retention_ms} ms");
        }
        // a log that is shorter than its checkpoints say, and a clock before their times
        let spec = TopicSpec { retention_ms: 1, retention_bytes: 1, ..Default::default() };
        assert_eq!(cut(points().iter(), &spec, 500, Some(1), None), None);
    }
}
