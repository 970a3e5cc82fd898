//! Records in and out of Kafka's record batch v2, by the crate `kafka-protocol`. For clients, and for the broker where a plain
//! message comes or must go.

use bytes::{Bytes, BytesMut};
use kafka_protocol::indexmap::IndexMap;
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::{
    Compression as Codec, Record as Raw, RecordBatchDecoder, RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};
use std::io::Read;

/// Uncompressed bytes one batch may unfold to; more is taken for a compression bomb.
pub const UNFOLDED_BYTES_MAX: usize = 256 << 20;

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Key; `None` for none.
    pub key: Option<Bytes>,
    /// Value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// Headers in order; no name stands twice.
    pub headers: Vec<(String, Bytes)>,
    /// ms since the epoch.
    pub timestamp_ms: i64,
}

/// How records are compressed in a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// Snappy.
    Snappy,
    /// LZ4 frames.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// Who writes a batch: producer id, its epoch, and the sequence of the batch's first record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Producer id.
    pub id: i64,
    /// Epoch.
    pub epoch: i16,
    /// Sequence of the first record.
    pub sequence: i32,
}

/// Makes one batch. `records` holds at least one.
pub fn encode(records: &[Record], compression: Compression, stamp: Option<Stamp>) -> Result<Bytes, String> {
    if let Some(name) = records.iter().find_map(repeated_header) {
        return Err(format!("header {name} stands twice in a record"));
    }
    let Stamp { id, epoch, sequence } = stamp.unwrap_or(Stamp { id: -1, epoch: -1, sequence: -1 });
    let raw = |(at, r): (usize, &Record)| Raw {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: 0,
        producer_id: id,
        producer_epoch: epoch,
        timestamp_type: TimestampType::Creation,
        offset: at as i64,
        sequence: sequence.wrapping_add(at as i32),
        timestamp: r.timestamp_ms,
        key: r.key.clone(),
        value: r.value.clone(),
        headers: headers_to_raw(&r.headers),
    };
    let raw: Vec<Raw> = records.iter().enumerate().map(raw).collect();
    let compression = match compression {
        Compression::None => Codec::None,
        Compression::Gzip => Codec::Gzip,
        Compression::Snappy => Codec::Snappy,
        Compression::Lz4 => Codec::Lz4,
        Compression::Zstd => Codec::Zstd,
    };
    let mut out = BytesMut::new();
    let options = RecordEncodeOptions { version: 2, compression };
    RecordBatchEncoder::encode(&mut out, &raw, &options).map_err(|e| e.to_string())?;
    Ok(out.freeze())
}

/// The name of a header that stands twice in a record, which has no place in a batch.
pub fn repeated_header(record: &Record) -> Option<&str> {
    let names = || record.headers.iter().map(|(name, _)| name.as_str());
    names().enumerate().find(|(at, name)| names().take(*at).any(|n| n == *name)).map(|(_, name)| name)
}

fn headers_to_raw(headers: &[(String, Bytes)]) -> IndexMap<StrBytes, Option<Bytes>> {
    headers.iter().map(|(name, value)| (StrBytes::from_string(name.clone()), Some(value.clone()))).collect()
}

/// The records of one batch, in order.
pub fn decode(batch: &Bytes) -> Result<Vec<Record>, String> {
    let unfold = |bytes: &mut Bytes, codec| unfold(bytes, codec, UNFOLDED_BYTES_MAX);
    let set = RecordBatchDecoder::decode_with_custom_compression(&mut batch.clone(), Some(unfold));
    let set = set.map_err(|e| e.to_string())?;
    let record = |r: Raw| Record {
        key: r.key,
        value: r.value,
        headers: r.headers.into_iter().map(|(n, v)| (n.to_string(), v.unwrap_or_default())).collect(),
        timestamp_ms: r.timestamp,
    };
    Ok(set.records.into_iter().map(record).collect())
}

/// Decompresses, to at most `max` bytes: a stranger's batch may unfold to a thousand times its size.
fn unfold(bytes: &mut Bytes, codec: Codec, max: usize) -> anyhow::Result<Bytes> {
    let take = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        reader.take(max as u64 + 1).read_to_end(&mut out)?;
        anyhow::ensure!(out.len() <= max, "the batch unfolds to more than {max} bytes");
        Ok(Bytes::from(out))
    };
    match codec {
        Codec::None => Ok(bytes.clone()),
        Codec::Gzip => take(&mut flate2::read::MultiGzDecoder::new(&bytes[..])),
        Codec::Lz4 => take(&mut lz4::Decoder::new(&bytes[..])?),
        Codec::Zstd => take(&mut zstd::stream::read::Decoder::with_buffer(&bytes[..])?),
        Codec::Snappy => unfold_snappy(bytes, max),
    }
}

/// Snappy as Kafka's clients frame it (<https://github.com/xerial/snappy-java#compatibility-notes>): a header of 16 bytes, then
/// blocks with their length before them; or one block alone.
fn unfold_snappy(bytes: &Bytes, max: usize) -> anyhow::Result<Bytes> {
    const MAGIC: &[u8] = b"\x82SNAPPY\0";
    const HEADER_BYTES: usize = 16;
    let mut out = Vec::new();
    let mut block = |data: &[u8]| {
        let length = snap::raw::decompress_len(data)?;
        anyhow::ensure!(out.len() + length <= max, "the batch unfolds to more than {max} bytes");
        out.extend(snap::raw::Decoder::new().decompress_vec(data)?);
        Ok(())
    };
    if !bytes.starts_with(MAGIC) {
        block(bytes)?;
        return Ok(out.into());
    }
    let mut rest = bytes.get(HEADER_BYTES..).unwrap_or_default();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        anyhow::ensure!(length <= after.len(), "a block of {length} bytes, {} are left", after.len());
        let (data, next) = after.split_at(length);
        block(data)?;
        rest = next;
    }
    Ok(out.into())
}

/// FNV-1a, 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>).
pub fn hash_of(key: &[u8]) -> u64 {
    key.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// The partition of a key among `partitions`: [`hash_of`] it, modulo their number.
pub fn partition_of(key: &[u8], partitions: u32) -> u32 {
    let hash = hash_of(key);
    ((hash ^ (hash >> 32)) % u64::from(partitions.max(1))) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use weir_core::batch::{BatchHeader, ProducerStamp};

    fn any_record() -> impl Strategy<Value = Record> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..50).prop_map(Bytes::from);
        let headers = proptest::collection::btree_map("[a-z]{1,8}", bytes(), 0..3);
        (proptest::option::of(bytes()), proptest::option::of(bytes()), headers, 0i64..1 << 45).prop_map(
            |(key, value, headers, timestamp_ms)| Record {
                key,
                value,
                headers: headers.into_iter().collect(),
                timestamp_ms,
            },
        )
    }

    #[test]
    fn a_header_that_stands_twice_is_refused_and_not_lost() {
        let headers = vec![("a".into(), "1".into()), ("b".into(), "2".into()), ("a".into(), "3".into())];
        let record = Record { headers, ..Default::default() };
        assert_eq!(encode(&[record], Compression::None, None), Err("header a stands twice in a record".to_owned()));
    }

    proptest! {
        #[test]
        fn records_survive_every_codec_and_the_broker_accepts_the_batch(
            records in proptest::collection::vec(any_record(), 1..20), codec in 0usize..5, sequence in proptest::option::of(0i32..1000),
        ) {
            use Compression::*;
            let compression = [None, Gzip, Snappy, Lz4, Zstd][codec];
            let stamp = sequence.map(|sequence| Stamp { id: 9, epoch: 1, sequence });
            let batch = encode(&records, compression, stamp).unwrap();
            let header = BatchHeader::validate(&batch).unwrap();
            prop_assert_eq!(header.count as usize, records.len());
            prop_assert_eq!(header.codec as usize, codec);
            prop_assert_eq!(header.producer, sequence.map(|sequence| ProducerStamp { id: 9, epoch: 1, sequence }));
            prop_assert_eq!(decode(&batch).unwrap(), records);
        }

        #[test]
        fn garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(BatchHeader::validate(&bytes).is_err());
        }
    }

    #[test]
    fn a_batch_that_unfolds_beyond_its_bound_is_refused() {
        let zeros = Record { value: Some(vec![0; 1 << 20].into()), ..Default::default() };
        for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
            let batch = encode(&vec![zeros.clone(); 4], codec, None).unwrap();
            assert!(batch.len() < 1 << 20, "{codec:?} made {} bytes", batch.len());
            assert_eq!(decode(&batch).unwrap().len(), 4);
            let folded = batch.slice(61..);
            let codec = match codec {
                Compression::Gzip => Codec::Gzip,
                Compression::Snappy => Codec::Snappy,
                Compression::Lz4 => Codec::Lz4,
                _ => Codec::Zstd,
            };
            let error = unfold(&mut folded.clone(), codec, 1 << 20).unwrap_err();
            assert!(error.to_string().contains("unfolds to more"), "{codec:?}: {error}");
        }
    }
}
