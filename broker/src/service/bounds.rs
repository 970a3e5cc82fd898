//! Bounds of what requests hold: an empty request, an empty range and a number out of bounds are refused, not read as something else.

use crate::budget::ANSWER_BYTES_MAX;
use crate::service::any_name;
use crate::status::Failure;
use std::collections::HashSet;
use weir_proto::limits::{DELAY_MS_MAX, MEMBER_CHARS_MAX, TOPICS_ASKED_MAX, WAIT_MS_MAX};
use weir_proto::v1;

/// Messages of one Pull.
pub const MESSAGES_MAX: u32 = 1_000;
/// Messages of one Pull that does not say how many.
const MESSAGES_DEFAULT: u32 = 100;
/// Ranges of messages in one request, of all kinds together: acks, nacks, longer deadlines and unreadable batches.
const RANGES_MAX: usize = 100_000;
/// Bytes of one answer to a Fetch that does not say how many.
const FETCH_BYTES_DEFAULT: u32 = 1 << 20;
/// Producer ids given at one time.
const PRODUCER_IDS_MAX: u32 = 1_000;

/// Messages wanted by a Pull.
pub fn messages(wanted: Option<u32>) -> Result<u32, Failure> {
    match wanted {
        Some(0) => Err(Failure::invalid("MESSAGES_MAX", "messages_max must be 1 or more; leave it out for 100")),
        wanted => Ok(wanted.unwrap_or(MESSAGES_DEFAULT).min(MESSAGES_MAX)),
    }
}

/// Bytes wanted by a Fetch.
pub fn fetch_bytes(wanted: Option<u32>) -> Result<usize, Failure> {
    match wanted {
        Some(0) => Err(Failure::invalid("BYTES_MAX", "bytes_max must be 1 or more; leave it out for 1 MiB")),
        wanted => Ok((wanted.unwrap_or(FETCH_BYTES_DEFAULT) as usize).min(ANSWER_BYTES_MAX)),
    }
}

/// Full names of the topics that a listing is asked for.
pub fn topics(wanted: &[String]) -> Result<HashSet<String>, Failure> {
    if wanted.len() > TOPICS_ASKED_MAX {
        let text = format!("{} topics, one request names {TOPICS_ASKED_MAX}: ask in parts, or for all", wanted.len());
        return Err(Failure::invalid("TOPICS", text));
    }
    wanted.iter().map(|t| any_name(t)).collect()
}

/// The name of a subscription's member.
pub fn member(name: &str) -> Result<&str, Failure> {
    let chars = name.chars().count();
    let text = || format!("member has {chars} characters, at most {MEMBER_CHARS_MAX} are taken");
    if chars <= MEMBER_CHARS_MAX { Ok(name) } else { Err(Failure::invalid("MEMBER", text())) }
}

/// Producer ids wanted.
pub fn producer_ids(count: u32) -> Result<u32, Failure> {
    let wrong = || Failure::invalid("COUNT", format!("count must be 1 to {PRODUCER_IDS_MAX}, not {count}"));
    (1..=PRODUCER_IDS_MAX).contains(&count).then_some(count).ok_or_else(wrong)
}

/// When a message is to be delivered, ms since the epoch.
pub fn deliver_at(at_ms: u64, now_ms: u64) -> Result<u64, Failure> {
    let latest = now_ms.saturating_add(DELAY_MS_MAX);
    let text = || format!("deliver_at_ms is {at_ms}, more than ten years from now: times are ms since the epoch");
    if at_ms <= latest { Ok(at_ms) } else { Err(Failure::invalid("DELIVER_AT", text())) }
}

fn range(start: u64, end: u64) -> Result<(), Failure> {
    let text = || format!("offsets {start} to {end} are none: a range holds its start, and ends before its end");
    if start < end { Ok(()) } else { Err(Failure::invalid("OFFSETS", text())) }
}

/// Refuses more ranges than one request takes.
fn number_of_ranges(ranges: usize) -> Result<(), Failure> {
    if ranges <= RANGES_MAX {
        return Ok(());
    }
    let text = format!(
        "{ranges} ranges of messages, one request takes {RANGES_MAX}: send several, and join ranges that touch"
    );
    Err(Failure::invalid("RANGES", text))
}

/// A request of a stream whose partition is open.
pub fn pull(request: &v1::PullRequest) -> Result<(), Failure> {
    let v1::PullRequest { open, credit_messages: _, acks, nacks, extensions, unreadable } = request;
    if open.is_some() {
        let text = "the stream has its partition: only the first request holds an open; use another stream for another \
                    partition or member";
        return Err(Failure::invalid("OPEN", text));
    }
    number_of_ranges(acks.len() + nacks.len() + extensions.len() + unreadable.len())?;
    unreadable.iter().try_for_each(|r| range(r.start, r.end))?;
    settlement(acks, nacks, extensions)
}

/// What a consumer says of messages: acks, nacks and extensions.
pub fn settlement(acks: &[v1::OffsetRange], nacks: &[v1::Nacked], extensions: &[v1::Extension]) -> Result<(), Failure> {
    number_of_ranges(acks.len() + nacks.len() + extensions.len())?;
    acks.iter().try_for_each(|a| range(a.start, a.end))?;
    for nack in nacks {
        range(nack.start, nack.end)?;
        if let Some(delay) = nack.delay_ms.filter(|delay| *delay > WAIT_MS_MAX) {
            let text = format!("delay_ms is {delay}; it is {WAIT_MS_MAX} at most, a day");
            return Err(Failure::invalid("DELAY", text));
        }
    }
    for extension in extensions {
        range(extension.start, extension.end)?;
        if !(1..=WAIT_MS_MAX).contains(&extension.deadline_ms) {
            let text = format!("deadline_ms must be 1 to {WAIT_MS_MAX}, a day, not {}", extension.deadline_ms);
            return Err(Failure::invalid("DEADLINE", text));
        }
    }
    Ok(())
}

/// As [`settlement`], for a call that holds nothing else.
pub fn settlement_call(
    acks: &[v1::OffsetRange],
    nacks: &[v1::Nacked],
    extensions: &[v1::Extension],
) -> Result<(), Failure> {
    if acks.is_empty() && nacks.is_empty() && extensions.is_empty() {
        return Err(Failure::invalid("EMPTY", "offsets holds at least one range"));
    }
    settlement(acks, nacks, extensions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_absent_has_its_default_and_a_zero_is_refused() {
        assert_eq!(
            (messages(None).ok(), messages(Some(7)).ok(), messages(Some(u32::MAX)).ok()),
            (Some(100), Some(7), Some(1_000))
        );
        assert_eq!((fetch_bytes(None).ok(), fetch_bytes(Some(u32::MAX)).ok()), (Some(1 << 20), Some(ANSWER_BYTES_MAX)));
        assert!(messages(Some(0)).is_err() && fetch_bytes(Some(0)).is_err());
        assert!(producer_ids(0).is_err() && producer_ids(1_001).is_err() && producer_ids(1_000).is_ok());
    }

    #[test]
    fn a_range_without_an_offset_is_refused() {
        let acks = |start, end| settlement_call(&[v1::OffsetRange { start, end }], &[], &[]);
        assert!(acks(5, 6).is_ok() && acks(0, u64::MAX).is_ok());
        assert!(acks(5, 0).is_err() && acks(5, 5).is_err(), "an end that was not set");
        assert!(settlement_call(&[], &[], &[]).is_err() && settlement(&[], &[], &[]).is_ok());
    }

    #[test]
    fn ranges_of_unreadable_batches_count_as_others_do() {
        let ranges = |count: usize| vec![v1::OffsetRange { start: 5, end: 6 }; count];
        let request = |acks, unreadable| pull(&v1::PullRequest { acks, unreadable, ..Default::default() });
        assert!(request(ranges(1), ranges(RANGES_MAX - 1)).is_ok());
        assert_eq!(request(ranges(1), ranges(RANGES_MAX)).unwrap_err().reason, "RANGES");
        assert_eq!(request(Vec::new(), ranges(RANGES_MAX + 1)).unwrap_err().reason, "RANGES");
        let empty = vec![v1::OffsetRange { start: 5, end: 5 }];
        assert_eq!(request(Vec::new(), empty).unwrap_err().reason, "OFFSETS");
    }

    #[test]
    fn a_stream_is_opened_once() {
        let request = v1::PullRequest { credit_messages: 1, ..Default::default() };
        assert!(pull(&request).is_ok());
        let again = pull(&v1::PullRequest { open: Some(v1::PullOpen::default()), ..request }).unwrap_err();
        assert_eq!((again.code, again.reason), (tonic::Code::InvalidArgument, "OPEN"));
    }

    #[test]
    fn names_and_their_number_are_bounded() {
        let long = "ü".repeat(MEMBER_CHARS_MAX);
        assert!(member("").is_ok() && member(&long).is_ok());
        assert_eq!(member(&format!("{long}x")).unwrap_err().reason, "MEMBER");
        let asked = |count: usize| topics(&vec!["t".to_owned(); count]);
        assert_eq!(asked(TOPICS_ASKED_MAX).unwrap().into_iter().collect::<Vec<_>>(), ["default/t"]);
        assert_eq!(asked(TOPICS_ASKED_MAX + 1).unwrap_err().reason, "TOPICS");
        assert_eq!(topics(&["../x".to_owned()]).unwrap_err().reason, "NAME");
    }

    #[test]
    fn delays_and_deadlines_are_a_day_at_most() {
        let nack = |delay_ms| settlement(&[], &[v1::Nacked { start: 0, end: 1, delay_ms, uncounted: false }], &[]);
        assert!(nack(None).is_ok() && nack(Some(0)).is_ok() && nack(Some(WAIT_MS_MAX)).is_ok());
        assert!(nack(Some(u64::MAX)).unwrap_err().message.contains("86400000 at most"));
        let extend = |deadline_ms| settlement(&[], &[], &[v1::Extension { start: 0, end: 1, deadline_ms }]);
        assert!(extend(1).is_ok() && extend(WAIT_MS_MAX).is_ok());
        assert!(extend(0).is_err() && extend(u64::MAX).is_err());
    }

    #[test]
    fn a_delivery_is_at_most_ten_years_away() {
        let now_ms = 1_700_000_000_000;
        assert!(deliver_at(0, now_ms).is_ok() && deliver_at(now_ms + DELAY_MS_MAX, now_ms).is_ok());
        // microseconds, say
        assert!(deliver_at(now_ms * 1_000, now_ms).is_err() && deliver_at(u64::MAX, u64::MAX - 1).is_ok());
    }
}
