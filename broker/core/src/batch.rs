//! Kafka's record batch, format v2 (magic 2): a borrowed view of the 61-byte header, its validation and checksum.
//! Source: <https://kafka.apache.org/documentation/#recordbatch>. Records are not decoded here.
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | base offset (outside the checksum) |
//! | 8..12 | batch length, counted from byte 12 |
//! | 12..16 | partition leader epoch (outside the checksum) |
//! | 16 | magic, 2 |
//! | 17..21 | CRC-32C of bytes 21.. |
//! | 21..23 | attributes: 0–2 compression, 3 timestamp type, 4 transactional, 5 control |
//! | 23..27 | last offset delta |
//! | 27..35, 35..43 | base and largest timestamp, ms since the epoch |
//! | 43..51, 51..53, 53..57 | producer id, producer epoch, base sequence |
//! | 57..61 | record count |

use thiserror::Error;

/// Bytes of a batch's header.
pub const HEADER_BYTES: usize = 61;
/// Records a batch may hold; a bound on what a decoder has to expect.
pub const RECORDS_MAX: i32 = 1_000_000;

/// Why a batch was refused. Nothing of it was stored.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum BatchError {
    /// Shorter than a header.
    #[error("the batch has {0} bytes, a header alone has 61")]
    Truncated(usize),
    /// The length field disagrees with the bytes that came.
    #[error("the batch says it has {said} bytes after its length field, {found} came")]
    Length { said: i32, found: usize },
    /// Only magic 2 is taken.
    #[error("record batch magic {0} is not supported; send format v2")]
    Magic(i8),
    /// CRC-32C differs.
    #[error("the batch's CRC-32C is {said:#010x}, its bytes give {found:#010x}")]
    Checksum { said: u32, found: u32 },
    /// The record count is out of bounds.
    #[error("the batch says it has {0} records; a batch takes 1 to {max}: send several", max = RECORDS_MAX)]
    Records(i32),
    /// The record count disagrees with the last offset delta, which is one less.
    #[error("the batch says it has {count} records and a last offset delta of {last_delta}; it must be one less")]
    Count { count: i32, last_delta: i32 },
    /// More records than there are bytes for.
    #[error("the batch says it has {count} records, and {bytes} bytes of them came; a record takes 7 or more")]
    Missing { count: i32, bytes: usize },
    /// A codec that does not exist.
    #[error("compression codec {0} is unknown; use none, gzip, snappy, lz4 or zstd")]
    Codec(u8),
    /// Flags only a broker may set.
    #[error("attributes {0:#06x} hold flags a publisher may not set")]
    Attributes(i16),
    /// Producer fields that disagree with each other.
    #[error("producer id {id}, epoch {epoch}, sequence {sequence} do not go together")]
    Producer { id: i64, epoch: i16, sequence: i32 },
}

/// A batch's header, read and checked once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Number of records, 1 or more.
    pub count: u32,
    /// Compression codec: 0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd.
    pub codec: u8,
    /// Largest record timestamp, ms since the epoch, as the publisher said.
    pub max_timestamp_ms: i64,
    /// Producer id, or `None` where the publisher does not ask for idempotence.
    pub producer: Option<ProducerStamp>,
}

/// Who wrote a batch and as which of its writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerStamp {
    /// Producer id, given by the metadata group.
    pub id: u64,
    /// Epoch of that id; a higher one fences a lower one.
    pub epoch: u16,
    /// Sequence of the batch's first record, 0 ..= i32::MAX, then 0 again.
    pub sequence: i32,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

impl BatchHeader {
    /// Reads and checks a batch as it came from a publisher: lengths, magic, checksum, counts, codec, producer fields.
    pub fn validate(bytes: &[u8]) -> Result<Self, BatchError> {
        let header = Self::check_shape(bytes)?;
        let said = u32::from_be_bytes(array(bytes, 17));
        let found = crc32c::crc32c(&bytes[21..]);
        if said != found {
            return Err(BatchError::Checksum { said, found });
        }
        Ok(header)
    }

    /// As [`Self::validate`], without the pass over the bytes for the checksum: for batches out of our own log,
    /// whose entries carry a checksum of their own.
    pub fn check_shape(bytes: &[u8]) -> Result<Self, BatchError> {
        if bytes.len() < HEADER_BYTES {
            return Err(BatchError::Truncated(bytes.len()));
        }
        let said = i32::from_be_bytes(array(bytes, 8));
        if usize::try_from(said).ok() != Some(bytes.len() - 12) {
            return Err(BatchError::Length { said, found: bytes.len() - 12 });
        }
        let magic = bytes[16] as i8;
        if magic != 2 {
            return Err(BatchError::Magic(magic));
        }
        let attributes = i16::from_be_bytes(array(bytes, 21));
        if attributes & !0b1111 != 0 {
            return Err(BatchError::Attributes(attributes));
        }
        let codec = (attributes & 0b111) as u8;
        if codec > 4 {
            return Err(BatchError::Codec(codec));
        }
        let last_delta = i32::from_be_bytes(array(bytes, 23));
        let count = i32::from_be_bytes(array(bytes, 57));
        // a record takes at least 7 bytes uncompressed
        let bytes_left = bytes.len() - HEADER_BYTES;
        if !(1..=RECORDS_MAX).contains(&count) {
            return Err(BatchError::Records(count));
        }
        if last_delta != count - 1 {
            return Err(BatchError::Count { count, last_delta });
        }
        if codec == 0 && count as usize * 7 > bytes_left {
            return Err(BatchError::Missing { count, bytes: bytes_left });
        }
        Ok(Self {
            count: count as u32,
            codec,
            max_timestamp_ms: i64::from_be_bytes(array(bytes, 35)),
            producer: Self::producer(bytes)?,
        })
    }

    fn producer(bytes: &[u8]) -> Result<Option<ProducerStamp>, BatchError> {
        let id = i64::from_be_bytes(array(bytes, 43));
        let epoch = i16::from_be_bytes(array(bytes, 51));
        let sequence = i32::from_be_bytes(array(bytes, 53));
        if id == -1 {
            return Ok(None);
        }
        if id < 0 || epoch < 0 || sequence < 0 {
            return Err(BatchError::Producer { id, epoch, sequence });
        }
        Ok(Some(ProducerStamp { id: id as u64, epoch: epoch as u16, sequence }))
    }
}

/// Writes the base offset and leader epoch into a batch's first bytes, for a reader that wants plain Kafka bytes.
/// Both lie outside the checksum.
pub fn stamp(batch: &mut [u8], base_offset: u64, leader_epoch: u32) {
    batch[0..8].copy_from_slice(&base_offset.to_be_bytes());
    batch[12..16].copy_from_slice(&leader_epoch.to_be_bytes());
}

/// Makes a batch of zero-filled uncompressed bytes with a right header, for tests and simulations
/// that need no decodable records: `body` stands where the records would.
pub fn synthetic(count: u32, producer: Option<ProducerStamp>, body: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; HEADER_BYTES];
    let pad = (count as usize * 7).saturating_sub(body.len());
    out.extend_from_slice(body);
    out.resize(out.len() + pad, 0);
    let length = (out.len() - 12) as i32;
    out[8..12].copy_from_slice(&length.to_be_bytes());
    out[16] = 2;
    out[23..27].copy_from_slice(&(count as i32 - 1).to_be_bytes());
    let (id, epoch, sequence) = producer.map_or((-1, -1, -1), |p| (p.id as i64, p.epoch as i16, p.sequence));
    out[43..51].copy_from_slice(&id.to_be_bytes());
    out[51..53].copy_from_slice(&epoch.to_be_bytes());
    out[53..57].copy_from_slice(&sequence.to_be_bytes());
    out[57..61].copy_from_slice(&(count as i32).to_be_bytes());
    let crc = crc32c::crc32c(&out[21..]);
    out[17..21].copy_from_slice(&crc.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_batch_is_taken_and_its_fields_read() {
        let stamp = ProducerStamp { id: 7, epoch: 2, sequence: 40 };
        let header = BatchHeader::validate(&synthetic(3, Some(stamp), b"abc")).unwrap();
        assert_eq!((header.count, header.codec, header.producer), (3, 0, Some(stamp)));
    }

    #[test]
    fn every_flipped_bit_inside_the_checksum_is_refused() {
        let good = synthetic(2, None, b"hello records");
        for at in 16..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(BatchHeader::validate(&bad).is_err(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn the_stamp_leaves_the_checksum_right() {
        let mut batch = synthetic(1, None, b"x");
        stamp(&mut batch, 99, 4);
        assert!(BatchHeader::validate(&batch).is_ok());
        assert_eq!(&batch[0..8], &99u64.to_be_bytes());
    }

    #[test]
    fn bad_counts_lengths_codecs_and_truncations_are_named() {
        let good = synthetic(2, None, b"hello records!!");
        assert_eq!(BatchHeader::validate(&good[..10]), Err(BatchError::Truncated(10)));
        assert!(matches!(BatchHeader::validate(&good[..70]), Err(BatchError::Length { .. })));
        let mut bad = good.clone();
        for count in [i32::MAX, RECORDS_MAX + 1, 0, -1] {
            bad[57..61].copy_from_slice(&count.to_be_bytes());
            let refused = BatchHeader::check_shape(&bad).unwrap_err();
            assert_eq!(refused, BatchError::Records(count));
            assert!(refused.to_string().contains("takes 1 to 1000000"), "{refused}");
        }
        bad[57..61].copy_from_slice(&3i32.to_be_bytes());
        assert_eq!(BatchHeader::check_shape(&bad), Err(BatchError::Count { count: 3, last_delta: 1 }));
        bad[23..27].copy_from_slice(&2i32.to_be_bytes());
        assert_eq!(BatchHeader::check_shape(&bad), Err(BatchError::Missing { count: 3, bytes: 15 }));
        let mut bad = good.clone();
        bad[22] = 6;
        assert_eq!(BatchHeader::validate(&bad), Err(BatchError::Codec(6)));
        let mut bad = good;
        bad[22] = 0x20;
        assert_eq!(BatchHeader::validate(&bad), Err(BatchError::Attributes(0x20)));
    }
}
