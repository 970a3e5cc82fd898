//! Values of arguments: each is checked where it is read, and the refusal says what would be right.

use bytes::Bytes;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStringExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use weir_client::consumer::From;
use weir_crds::duration;
use weir_proto::limits::DELAY_MS_MAX;
use weir_proto::names;

/// Bytes of one message that is read from a file or a line: the largest batch that any topic takes.
pub(crate) const MESSAGE_BYTES_MAX: u64 = weir_proto::limits::BATCH_BYTES.max;
/// Times from here on are ms since the epoch, offsets are smaller.
const TIME_MS_MIN: u64 = 1_000_000_000_000;
/// Longest time for which a benchmark's batch waits.
const LINGER_MAX: Duration = Duration::from_secs(60);

/// A name with or without its namespace.
pub(crate) fn name(text: &str) -> Result<String, String> {
    names::full_name(text).map(|_| text.to_owned())
}

/// The name of a snapshot or of a broker.
pub(crate) fn part(text: &str) -> Result<String, String> {
    if names::is_part(text) { Ok(text.to_owned()) } else { Err(names::refusal(text)) }
}

/// A whole number within bounds.
pub(crate) fn number<T: TryFrom<u64>>(
    bounds: RangeInclusive<u64>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let within = text.parse().ok().filter(|n| bounds.contains(n)).and_then(|n| T::try_from(n).ok());
        within.ok_or_else(|| format!("use a whole number from {} to {}", bounds.start(), bounds.end()))
    }
}

/// An offset.
pub(crate) fn whole(text: &str) -> Result<u64, String> {
    number(0..=u64::MAX)(text)
}

/// A partition.
pub(crate) fn partition(text: &str) -> Result<u32, String> {
    number(0..=u32::MAX.into())(text).map_err(|right| format!("partitions are numbered from 0: {right}"))
}

/// How many, at least one.
pub(crate) fn count(text: &str) -> Result<u64, String> {
    number(1..=u64::MAX)(text)
}

/// How long to wait before a delivery.
pub(crate) fn delay(text: &str) -> Result<Duration, String> {
    match duration::millis(text)? {
        ms if ms <= DELAY_MS_MAX => Ok(Duration::from_millis(ms)),
        _ => Err("use at most 3650d, ten years".to_owned()),
    }
}

/// How long a benchmark's batch waits, down to microseconds.
pub(crate) fn linger(text: &str) -> Result<Duration, String> {
    let read = humantime::parse_duration(text).ok().filter(|d| *d <= LINGER_MAX);
    read.ok_or_else(|| "use a duration such as 500us or 5ms, 60s at most".to_owned())
}

/// Bytes of a benchmark's record.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let read = text.parse().ok().filter(|bytes| *bytes as u64 <= MESSAGE_BYTES_MAX);
    read.ok_or_else(|| format!("use a number of bytes from 0 to {MESSAGE_BYTES_MAX}"))
}

/// Where to read from.
pub(crate) fn from(text: &str) -> Result<From, String> {
    past(text, "no message has it yet; use latest for those that are published from now on")
}

/// Where to move a position.
pub(crate) fn to(text: &str) -> Result<From, String> {
    past(text, "it would pass over every message there is; use latest if that is meant")
}

/// A place that is not in the future, by this machine's clock.
fn past(text: &str, why: &str) -> Result<From, String> {
    let now = SystemTime::now();
    let now_ms = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    match place(text)? {
        From::Time(ms) if ms > now_ms => {
            let now = humantime::format_rfc3339_seconds(now);
            Err(format!("this is a time to come (here it is {now}, or {now_ms} ms): {why}"))
        }
        place => Ok(place),
    }
}

/// A place in a partition.
fn place(text: &str) -> Result<From, String> {
    match (text, text.parse::<u64>()) {
        ("earliest", _) => Ok(From::Earliest),
        ("latest", _) => Ok(From::Latest),
        (_, Ok(n)) if n >= TIME_MS_MIN => Ok(From::Time(n)),
        (_, Ok(n)) => Ok(From::Offset(n)),
        _ => match humantime::parse_rfc3339(text).map(|t| t.duration_since(UNIX_EPOCH)) {
            Ok(Ok(time)) => Ok(From::Time(time.as_millis() as u64)),
            _ => Err("use earliest, latest, an offset, a time such as 2026-01-31T08:00:00Z, or one in ms".to_owned()),
        },
    }
}

/// A header; the value may be any bytes.
pub(crate) type Header = (String, Option<Bytes>);

/// Reads a header, `name=value`.
pub(crate) fn header(text: OsString) -> Result<Header, String> {
    let bytes = text.into_vec();
    let at = bytes.iter().position(|b| *b == b'=').filter(|at| *at > 0);
    let at = at.ok_or_else(|| "use name=value".to_owned())?;
    let name = std::str::from_utf8(&bytes[..at]);
    let name = name.map_err(|_| "the name must be UTF-8, the value may be any bytes".to_owned())?.to_owned();
    Ok((name, Some(Bytes::copy_from_slice(&bytes[at + 1..]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_or_refused_with_the_right_form() {
        assert_eq!(delay("1h30m"), Ok(Duration::from_secs(5_400)));
        for bad in ["292277026596y", "99999999999999999999w", "3651d", "-1s", "", "soon", "1month"] {
            assert!(delay(bad).is_err(), "{bad}");
        }
        assert_eq!(from("1970-01-01T00:00:00Z"), Ok(From::Time(0)));
        assert_eq!((from("0"), from("1000000000000")), (Ok(From::Offset(0)), Ok(From::Time(TIME_MS_MIN))));
        for bad in ["-1", "", "18446744073709551616", "1969-12-31T23:59:59Z", "noon", "\0"] {
            assert!(from(bad).unwrap_err().starts_with("use earliest, latest"), "{bad}");
        }
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let now_ms = crate::data::now_ms() as u64;
        for read in [from, to] {
            assert!(matches!(read(&now), Ok(From::Time(_))) && read(&now_ms.to_string()) == Ok(From::Time(now_ms)));
            let hour = (now_ms + 3_600_000).to_string();
            for future in ["9999-12-31T23:59:59Z", &hour, "18446744073709551615"] {
                let refused = read(future).unwrap_err();
                assert!(refused.starts_with("this is a time to come (here it is 2") && refused.contains("use latest"));
            }
        }
        assert!(count("0").is_err() && count("-1").is_err() && count("18446744073709551615").is_ok());
        assert!(linger("500us").is_ok() && linger("584554531y").is_err() && linger("").is_err());
        assert!(name("shop/orders").is_ok() && name("").is_err() && name("a/b/c").is_err() && part("a/b").is_err());
        assert_eq!(header("k=v=w".into()).unwrap(), ("k".to_owned(), Some("v=w".into())));
        assert_eq!(header(OsString::from_vec(b"k=\xff".to_vec())).unwrap().1.unwrap(), &b"\xff"[..]);
        for bad in ["", "=v", "k"] {
            assert!(header(bad.into()).unwrap_err().contains("use name=value"), "{bad}");
        }
    }
}
