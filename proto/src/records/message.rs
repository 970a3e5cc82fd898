//! A record as the wire's plain message, and back.

use super::Record;
use crate::v1;

impl From<v1::Message> for Record {
    fn from(message: v1::Message) -> Self {
        let v1::Message { key, value, headers, timestamp_ms, deliver_at_ms: _ } = message;
        let headers = headers.into_iter().map(|h| (h.name, h.value)).collect();
        Self { key, value, headers, timestamp_ms: timestamp_ms.unwrap_or(0) }
    }
}

impl From<Record> for v1::Message {
    fn from(record: Record) -> Self {
        let Record { key, value, headers, timestamp_ms } = record;
        let headers = headers.into_iter().map(|(name, value)| v1::Header { name, value }).collect();
        Self { key, value, headers, timestamp_ms: Some(timestamp_ms), deliver_at_ms: None }
    }
}
