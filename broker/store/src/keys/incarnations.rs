//! Column family `meta`: the newest incarnations of brokers that are known here, this broker's own among them.
//!
//! | key | value |
//! |---|---|
//! | `incarnation/` ‖ broker u64 | CRC-32C u32 of key and rest ‖ incarnation u64 |

use super::state::{seal, unseal};
use super::u64_at;
use weir_core::ids::BrokerId;
use weir_core::incarnation::Incarnation;

/// Begins all keys of this kind.
pub const PREFIX: &[u8] = b"incarnation/";

/// Key of a broker's incarnation.
pub fn key(broker: BrokerId) -> Vec<u8> {
    [PREFIX, &broker.0.to_be_bytes()].concat()
}

/// Value of a broker's incarnation.
pub fn encode(broker: BrokerId, incarnation: Incarnation) -> Vec<u8> {
    seal(&key(broker), &incarnation.0.to_be_bytes())
}

/// Reads a row; `None` where damaged.
pub fn decode(key: &[u8], value: &[u8]) -> Option<(BrokerId, Incarnation)> {
    let incarnation = Incarnation(u64_at(unseal(key, value)?, 0)?);
    Some((BrokerId(u64_at(key, PREFIX.len())?), incarnation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_on_disk_are_these_and_those_of_another_broker_are_damage() {
        let (broker, incarnation) = (BrokerId(3), Incarnation(1 << 32));
        let value = encode(broker, incarnation);
        assert_eq!(value[4..], [0, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(decode(&key(broker), &value), Some((broker, incarnation)));
        assert_eq!(decode(&key(BrokerId(4)), &value), None);
        assert_eq!(decode(&key(broker), &value[..8]), None);
    }
}
