//! Bounds of the numbers and texts that users write: one table for resource definitions, the command line and brokers. A value
//! outside of its bounds is refused where it enters, with the text that is made here. What a
//! reader asks for (messages, bytes, time to wait) is an upper bound, of which a broker may give less; weir.proto says how much at most.

use crate::v1;

/// How a number is written for a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// As it is.
    Count,
    /// Bytes, as Kubernetes writes quantities.
    Bytes,
    /// A duration in ms.
    Millis,
}

/// Bounds of one field, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The field in the protocol.
    pub wire: &'static str,
    /// The field in a resource, as a path.
    pub path: &'static str,
    /// The refusal's stable reason.
    pub reason: &'static str,
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// How its values are written.
    pub unit: Unit,
}

const SECOND_MS: u64 = 1_000;
const DAY_MS: u64 = 86_400 * SECOND_MS;
const TIB: u64 = 1 << 40;

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident = $wire:literal, $path:literal, $reason:literal, $min:expr, $max:expr, $unit:ident;)*) => {
        $($(#[$doc])* pub const $name: Limit =
            Limit { wire: $wire, path: $path, reason: $reason, min: $min, max: $max, unit: Unit::$unit };)*
        /// All of them.
        pub const ALL: &[Limit] = &[$($name),*];
    };
}

limits! {
    /// Partitions of one topic.
    PARTITIONS = "partitions", "spec.partitions", "PARTITIONS", 1, 10_000, Count;
    /// Copies of each partition.
    REPLICAS = "replicas", "spec.replicas", "REPLICAS", 1, 7, Count;
    /// Age up to which records are kept: a hundred years of 365 days.
    RETENTION = "retention_ms", "spec.retention.time", "RETENTION", SECOND_MS, 36_500 * DAY_MS, Millis;
    /// Size up to which a partition is kept.
    RETENTION_BYTES = "retention_bytes", "spec.retention.bytes", "RETENTION", 1, 1_024 * TIB, Bytes;
    /// Largest batch a topic may take: it fits every message on the way. A batch's header alone has 61 bytes.
    BATCH_BYTES = "message_bytes_max", "spec.maxMessageBytes", "MESSAGE_BYTES", 64, 32 << 20, Bytes;
    /// How long a consumer may hold a message unacknowledged.
    ACK_DEADLINE = "ack_deadline_ms", "spec.ackDeadline", "ACK_DEADLINE", 1, DAY_MS, Millis;
    /// Wait before the first redelivery.
    BACKOFF_MIN = "backoff_min_ms", "spec.redelivery.minBackoff", "BACKOFF", 0, DAY_MS, Millis;
    /// Longest wait before a redelivery.
    BACKOFF_MAX = "backoff_max_ms", "spec.redelivery.maxBackoff", "BACKOFF", 1, DAY_MS, Millis;
    /// Messages held at one time in a partition.
    IN_FLIGHT = "in_flight_max", "spec.maxInFlight", "IN_FLIGHT", 1, 1_000_000, Count;
    /// The same for one consumer.
    IN_FLIGHT_MEMBER = "in_flight_member_max", "spec.maxInFlightPerConsumer", "IN_FLIGHT", 1, 1_000_000, Count;
    /// Deliveries that may fail before a message is a dead letter.
    DELIVERIES = "deliveries_max", "spec.deadLetter.maxDeliveries", "DELIVERIES", 1, 1_000, Count;
    /// Messages delivered each second.
    MESSAGE_RATE = "messages_per_second", "spec.rate.messagesPerSecond", "RATE", 1, 1_000_000_000, Count;
    /// Bytes delivered each second.
    BYTE_RATE = "bytes_per_second", "spec.rate.bytesPerSecond", "RATE", 1, TIB, Bytes;
    /// Messages delivered at once after a pause.
    BURST = "burst_messages", "spec.rate.burst", "RATE", 1, 1_000_000_000, Count;
    /// Requests under way to a push endpoint.
    PUSH_CONCURRENCY = "push.concurrency", "spec.push.concurrency", "PUSH", 1, 100, Count;
    /// How long a push endpoint may take to answer.
    PUSH_TIMEOUT = "push.timeout_ms", "spec.push.timeout", "PUSH", 1, 600 * SECOND_MS, Millis;
    /// Start of a subscription, ms since the epoch: up to the end of the year 9999.
    START = "start_ms", "spec.startTime", "START", 0, 253_402_300_799_999, Count;
    /// Characters of a filter.
    FILTER = "filter", "spec.filter", "FILTER", 1, 2_048, Count;
    /// Patterns of routing keys.
    ROUTING_KEYS = "routing_keys", "spec.routingKeys", "ROUTING_KEYS", 0, 32, Count;
    /// Characters of a push endpoint.
    ENDPOINT = "push.endpoint", "spec.push.endpoint", "ENDPOINT", 1, 2_048, Count;
    /// Characters of a log filter.
    LOG_FILTER = "filter", "spec.logLevel", "FILTER", 1, 200, Count;
}

/// Longest wait for a scheduled delivery, counted from now.
pub const DELAY_MS_MAX: u64 = 3_650 * DAY_MS;
/// Longest delay or deadline that a consumer may ask for.
pub const WAIT_MS_MAX: u64 = DAY_MS;
/// Characters of a resource's uid; Kubernetes writes 36.
pub const OWNER_UID_CHARS_MAX: usize = 128;
/// Characters of a failure domain; a label's value has 63.
pub const RACK_CHARS_MAX: usize = 255;
/// Characters of a subscription member's name.
pub const MEMBER_CHARS_MAX: usize = 255;
/// Bytes of a page token: two full names and a word.
pub const PAGE_TOKEN_BYTES_MAX: usize = 1_200;
/// Topics that one request names.
pub const TOPICS_ASKED_MAX: usize = 100_000;

/// A field that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfBounds {
    /// Which field.
    pub limit: Limit,
    /// What would be right.
    pub message: String,
}

impl Limit {
    /// The value, or the refusal that names the bounds.
    pub fn check(&self, value: u64) -> Result<u64, OutOfBounds> {
        if (self.min..=self.max).contains(&value) {
            return Ok(value);
        }
        Err(self.refuse(format!("must be {}, not {}", self.bounds(), self.text(value))))
    }

    /// A refusal of this field.
    pub fn refuse(&self, message: impl Into<String>) -> OutOfBounds {
        OutOfBounds { limit: *self, message: message.into() }
    }

    /// The bounds as a user writes them, such as `1s to 36500d`.
    pub fn bounds(&self) -> String {
        format!("{} to {}", self.text(self.min), self.text(self.max))
    }

    fn text(&self, value: u64) -> String {
        match self.unit {
            Unit::Count => value.to_string(),
            Unit::Bytes => in_units(value, &[("Ti", TIB), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)], ""),
            Unit::Millis => in_units(value, &[("d", DAY_MS), ("h", 3_600_000), ("m", 60_000), ("s", SECOND_MS)], "ms"),
        }
    }

    fn check_set(&self, value: Option<impl Into<u64>>) -> Result<(), OutOfBounds> {
        value.map_or(Ok(()), |value| self.check(value.into()).map(drop))
    }

    /// Checks the number of characters of a text.
    pub fn check_chars(&self, text: &str) -> Result<(), OutOfBounds> {
        let chars = text.chars().count() as u64;
        self.check(chars)
            .map(drop)
            .map_err(|_| self.refuse(format!("must have {} characters, not {chars}", self.bounds())))
    }
}

/// A number in the largest unit of which it is a multiple.
fn in_units(value: u64, units: &[(&str, u64)], smallest: &str) -> String {
    let unit = units.iter().find(|(_, size)| value > 0 && value.is_multiple_of(*size));
    unit.map_or_else(|| format!("{value}{smallest}"), |(name, size)| format!("{}{name}", value / size))
}

/// Checks all numbers of a topic's spec.
pub fn check_topic(spec: &v1::TopicSpec) -> Result<(), OutOfBounds> {
    PARTITIONS.check(spec.partitions.into())?;
    REPLICAS.check(spec.replicas.into())?;
    RETENTION.check_set(spec.retention_ms)?;
    RETENTION_BYTES.check_set(spec.retention_bytes)?;
    BATCH_BYTES.check_set(spec.message_bytes_max)
}

/// Checks all numbers and lengths of a subscription's spec, and those that exclude each other.
pub fn check_subscription(spec: &v1::SubscriptionSpec) -> Result<(), OutOfBounds> {
    START.check_set(spec.start_ms)?;
    ACK_DEADLINE.check_set(spec.ack_deadline_ms)?;
    BACKOFF_MIN.check(spec.backoff_min_ms)?;
    BACKOFF_MAX.check_set(spec.backoff_max_ms)?;
    if let Some(most) = spec.backoff_max_ms.filter(|most| *most < spec.backoff_min_ms) {
        let text = |ms| BACKOFF_MIN.text(ms);
        let message = format!("is {}, more than the longest wait of {}", text(spec.backoff_min_ms), text(most));
        return Err(BACKOFF_MIN.refuse(message));
    }
    IN_FLIGHT.check_set(spec.in_flight_max)?;
    IN_FLIGHT_MEMBER.check_set(spec.in_flight_member_max)?;
    DELIVERIES.check_set(spec.deliveries_max)?;
    MESSAGE_RATE.check_set(spec.messages_per_second)?;
    BYTE_RATE.check_set(spec.bytes_per_second)?;
    BURST.check_set(spec.burst_messages)?;
    if !spec.filter.is_empty() {
        FILTER.check_chars(&spec.filter)?;
    }
    ROUTING_KEYS.check(spec.routing_keys.len() as u64)?;
    let Some(push) = &spec.push else { return Ok(()) };
    ENDPOINT.check_chars(&push.endpoint)?;
    PUSH_CONCURRENCY.check_set(push.concurrency)?;
    PUSH_TIMEOUT.check_set(push.timeout_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_written_as_users_write_them() {
        assert_eq!(RETENTION.bounds(), "1s to 36500d");
        assert_eq!(BATCH_BYTES.bounds(), "64 to 32Mi");
        assert_eq!(PUSH_TIMEOUT.bounds(), "1ms to 10m");
        assert_eq!(RETENTION.check(384).unwrap_err().message, "must be 1s to 36500d, not 384ms");
        assert_eq!(BACKOFF_MAX.check(0).unwrap_err().message, "must be 1ms to 1d, not 0ms");
        assert_eq!(
            RETENTION_BYTES.check(u64::MAX).unwrap_err().message,
            "must be 1 to 1024Ti, not 18446744073709551615"
        );
    }

    #[test]
    fn both_ends_are_taken_and_the_values_beside_them_refused() {
        for limit in ALL {
            assert!(limit.min <= limit.max, "{limit:?}");
            assert!(limit.check(limit.min).is_ok() && limit.check(limit.max).is_ok(), "{limit:?}");
            assert!(limit.check(limit.max + 1).is_err(), "{limit:?}");
            assert!(limit.min == 0 || limit.check(limit.min - 1).is_err(), "{limit:?}");
        }
    }

    #[test]
    fn waits_that_exclude_each_other_are_refused() {
        let spec = v1::SubscriptionSpec { backoff_min_ms: 300_000, backoff_max_ms: Some(1_000), ..Default::default() };
        let refused = check_subscription(&spec).unwrap_err();
        assert_eq!(
            (refused.limit.path, refused.message.as_str()),
            ("spec.redelivery.minBackoff", "is 5m, more than the longest wait of 1s",)
        );
        assert!(check_subscription(&v1::SubscriptionSpec { backoff_max_ms: None, ..spec }).is_ok());
    }
}
