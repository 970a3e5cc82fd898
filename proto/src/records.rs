//! Records in and out of Kafka's record batch v2 (<https://kafka.apache.org/documentation/#recordbatch>). For clients, and for the
//! broker where a plain message comes or must go. What is read was written by a stranger: nothing is allocated on its word.

mod fold;
mod message;
mod unfolded;

use bytes::Bytes;

/// Bytes the records of one batch may have once they are decompressed: as many as a batch that is not compressed may have, so that what is
/// taken can be delivered. Refused when it is published ([`unfolded`]), and not decoded where it came to be stored all the same.
pub const UNFOLDED_BYTES_MAX: usize = 32 << 20;
/// The same for readers: brokers add headers to a message that they move, such as a dead letter.
pub const READ_BYTES_MAX: usize = UNFOLDED_BYTES_MAX + (64 << 10);
/// Headers of all records of one batch; an empty one is two bytes in a batch and 56 in memory.
pub const HEADERS_MAX: u64 = 1_000_000;
/// Bytes of a batch before its records.
const HEADER_BYTES: usize = 61;
/// The least a record takes: its length, and six fields of a byte.
const RECORD_BYTES_MIN: usize = 7;

pub use unfolded::Unfolded;

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Key; `None` for none.
    pub key: Option<Bytes>,
    /// Value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// Headers in order. Names may repeat, and a header may have no value.
    pub headers: Vec<(String, Option<Bytes>)>,
    /// ms since the epoch.
    pub timestamp_ms: i64,
}

impl Record {
    /// The value of the last header of a name, as Kafka's `lastHeader` chooses it; `None` where that one has no value.
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        self.headers.iter().rfind(|(n, _)| n == name).and_then(|(_, value)| value.as_ref())
    }

    /// Replaces all headers of a name by one, which is placed last.
    pub fn set_header(&mut self, name: &str, value: impl Into<Bytes>) {
        self.headers.retain(|(n, _)| n != name);
        self.headers.push((name.to_owned(), Some(value.into())));
    }
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

impl Compression {
    /// How the records of a batch are compressed, by its attributes; `None` where the batch is cut off or its codec is unknown.
    pub fn of_batch(batch: &[u8]) -> Option<Self> {
        [Self::None, Self::Gzip, Self::Snappy, Self::Lz4, Self::Zstd].get(usize::from(batch.get(22)? & 0b111)).copied()
    }
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

/// Makes one batch. `records` holds at least one, and all of them together at most [`HEADERS_MAX`] headers.
pub fn encode(records: &[Record], compression: Compression, stamp: Option<Stamp>) -> Result<Bytes, String> {
    let headers: u64 = records.iter().map(|record| record.headers.len() as u64).sum();
    if headers > HEADERS_MAX {
        return Err(format!("the messages have {headers} headers, at most {HEADERS_MAX} together are taken"));
    }
    let mut builder = Builder::new(compression, records.iter().map(size_hint).sum());
    records.iter().for_each(|record| builder.push(record));
    builder.finish(stamp)
}

/// A batch in the making, which takes records as they come.
#[derive(Debug)]
pub struct Builder {
    compression: Compression,
    /// the header, all of it set at the end, and the records
    out: Vec<u8>,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
}

impl Builder {
    /// One that has room for this many bytes of records before it must grow.
    pub fn new(compression: Compression, bytes: usize) -> Self {
        let mut out = Vec::with_capacity(HEADER_BYTES + bytes);
        out.resize(HEADER_BYTES, 0);
        Self { compression, out, count: 0, base_timestamp: 0, max_timestamp: 0 }
    }

    /// Adds a record.
    pub fn push(&mut self, record: &Record) {
        let time = record.timestamp_ms;
        if self.count == 0 {
            (self.base_timestamp, self.max_timestamp) = (time, time);
        }
        self.max_timestamp = self.max_timestamp.max(time);
        put_record(&mut self.out, record, i64::from(self.count), time.wrapping_sub(self.base_timestamp));
        self.count += 1;
    }

    /// Records in it.
    pub fn count(&self) -> u32 {
        self.count as u32
    }

    /// Bytes of the batch so far, before compression.
    pub fn bytes(&self) -> usize {
        self.out.len()
    }

    /// The batch; at least one record is in it.
    pub fn finish(self, stamp: Option<Stamp>) -> Result<Bytes, String> {
        let Self { compression, mut out, count, base_timestamp, max_timestamp } = self;
        if compression != Compression::None {
            let header = out[..HEADER_BYTES].to_vec();
            out = fold::fold(header, compression, &out[HEADER_BYTES..]).map_err(|e| e.to_string())?;
        }
        let Stamp { id, epoch, sequence } = stamp.unwrap_or(Stamp { id: -1, epoch: -1, sequence: -1 });
        // the base offset and the leader epoch are the broker's
        out[27..35].copy_from_slice(&base_timestamp.to_be_bytes());
        out[35..43].copy_from_slice(&max_timestamp.to_be_bytes());
        out[43..51].copy_from_slice(&id.to_be_bytes());
        out[51..53].copy_from_slice(&epoch.to_be_bytes());
        out[53..57].copy_from_slice(&sequence.to_be_bytes());
        close(out, compression, count)
    }
}

/// A batch of records that are encoded and compressed already, or of any bytes in their place: they are not looked at. It has no producer,
/// and its times are those of the epoch. `count` is what its header says, 1 or more.
pub fn of_encoded(records: &[u8], compression: Compression, count: i32) -> Result<Bytes, String> {
    let mut out = vec![0; HEADER_BYTES];
    out[43..57].fill(0xff); // no producer
    out.extend_from_slice(records);
    close(out, compression, count)
}

fn close(mut out: Vec<u8>, compression: Compression, count: i32) -> Result<Bytes, String> {
    let length = i32::try_from(out.len() - 12).map_err(|_| "a batch beyond 2 GiB".to_owned())?;
    out[8..12].copy_from_slice(&length.to_be_bytes());
    out[16] = 2; // magic
    out[21..23].copy_from_slice(&(compression as i16).to_be_bytes());
    out[23..27].copy_from_slice(&(count - 1).to_be_bytes());
    out[57..61].copy_from_slice(&count.to_be_bytes());
    seal(&mut out);
    Ok(out.into())
}

/// Writes the checksum of a batch that was changed. `batch` has at least a header, 61 bytes.
pub fn seal(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// At least what a record takes in a batch.
fn size_hint(record: &Record) -> usize {
    let part = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let headers: usize = record.headers.iter().map(|(name, value)| name.len() + part(value) + 10).sum();
    part(&record.key) + part(&record.value) + headers + 24
}

/// At most the bytes that a record takes in a batch, beside the batch's header and before compression.
pub fn encoded_bytes_max(record: &Record) -> usize {
    body_bytes(record, i64::from(i32::MAX), i64::MIN) + varint_bytes(i64::MIN)
}

/// At most the bytes of one batch of these records, before compression.
pub fn batch_bytes_max(records: &[Record]) -> usize {
    HEADER_BYTES + records.iter().map(encoded_bytes_max).sum::<usize>()
}

/// Bytes of a record after its length.
fn body_bytes(record: &Record, offset: i64, time: i64) -> usize {
    let part_bytes = |p: &Option<Bytes>| p.as_ref().map_or(1, |b| varint_bytes(b.len() as i64) + b.len());
    let header_bytes =
        |(name, value): &(String, Option<Bytes>)| varint_bytes(name.len() as i64) + name.len() + part_bytes(value);
    let headers: usize = record.headers.iter().map(header_bytes).sum();
    1 + varint_bytes(time)
        + varint_bytes(offset)
        + part_bytes(&record.key)
        + part_bytes(&record.value)
        + varint_bytes(record.headers.len() as i64)
        + headers
}

fn put_record(out: &mut Vec<u8>, record: &Record, offset: i64, time: i64) {
    let count = record.headers.len() as i64;
    put_varint(out, body_bytes(record, offset, time) as i64);
    out.push(0); // attributes
    put_varint(out, time);
    put_varint(out, offset);
    put_part(out, record.key.as_deref());
    put_part(out, record.value.as_deref());
    put_varint(out, count);
    for (name, value) in &record.headers {
        put_part(out, Some(name.as_bytes()));
        put_part(out, value.as_deref());
    }
}

fn put_part(out: &mut Vec<u8>, part: Option<&[u8]>) {
    put_varint(out, part.map_or(-1, |p| p.len() as i64));
    out.extend_from_slice(part.unwrap_or_default());
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// Bytes of a number as a zigzag varint.
fn varint_bytes(value: i64) -> usize {
    (70 - (zigzag(value) | 1).leading_zeros() as usize) / 7
}

fn put_varint(out: &mut Vec<u8>, value: i64) {
    let mut rest = zigzag(value);
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// The records of one batch, in order. The values are parts of the batch, or of what it unfolds to.
/// A batch is decoded as a whole or not at all: one record that is malformed or cut off, or a header whose name is not UTF-8, makes all
/// of it unreadable. Keys and values are any bytes.
pub fn decode(batch: &Bytes) -> Result<Vec<Record>, String> {
    decode_as(batch, |_, record| record)
}

/// As [`decode`], each record made into something else, with its place in the batch.
pub fn decode_as<T>(batch: &Bytes, make: impl FnMut(usize, Record) -> T) -> Result<Vec<T>, String> {
    decode_all(batch, READ_BYTES_MAX, HEADERS_MAX, make).map_err(|error| error.to_string())
}

/// As [`decode`], of a batch that unfolds to at most so many bytes and has at most so many headers.
pub fn decode_within(batch: &Bytes, unfolded_max: usize, headers_max: u64) -> Result<Vec<Record>, Undecodable> {
    decode_all(batch, unfolded_max.min(READ_BYTES_MAX), headers_max.min(HEADERS_MAX), |_, record| record)
}

/// Why a batch's records cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// It has more headers than were allowed.
    Headers,
    /// Anything else.
    Malformed(String),
}

impl std::fmt::Display for Undecodable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Headers => f.write_str("the batch has too many headers"),
            Self::Malformed(why) => f.write_str(why),
        }
    }
}

impl From<String> for Undecodable {
    fn from(why: String) -> Self {
        Self::Malformed(why)
    }
}

/// Records that a batch says it has.
pub fn count(batch: &Bytes) -> usize {
    let number = batch.get(57..61).map(|b| i32::from_be_bytes(b.try_into().expect("four bytes")));
    number.and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

fn folded(batch: &Bytes) -> Option<(&[u8], u8)> {
    Some((batch.get(HEADER_BYTES..)?, batch.get(22)? & 0b111))
}

/// How much a batch unfolds to, by what its compressed form says; `None` where that says nothing, as it cannot be decoded.
pub fn unfolded(batch: &Bytes) -> Option<Unfolded> {
    let (bytes, codec) = folded(batch)?;
    unfolded::of(bytes, codec)
}

/// Memory that unfolding a batch takes at most, bytes: none where it is not compressed, since its records are parts of it.
pub fn unfolding_bytes_max(batch: &Bytes) -> usize {
    let compressed = folded(batch).is_some_and(|(_, codec)| codec != 0);
    let most = unfolded(batch).map_or(0, Unfolded::bytes_max);
    if compressed { most.min(READ_BYTES_MAX) } else { 0 }
}

/// Whether a batch unfolds to more than it may. Decompresses it where its form does not say; nothing is kept of it.
pub fn unfolds_to_too_much(batch: &Bytes) -> bool {
    let Some((bytes, codec)) = folded(batch) else { return false };
    match unfolded::of(bytes, codec) {
        None => false,
        Some(Unfolded::Exactly(bytes)) => bytes > UNFOLDED_BYTES_MAX,
        Some(Unfolded::AtMost(most)) => {
            most > UNFOLDED_BYTES_MAX && fold::is_more_than(bytes, codec, UNFOLDED_BYTES_MAX)
        }
    }
}

fn decode_all<T>(
    batch: &Bytes,
    unfolded_max: usize,
    headers_max: u64,
    mut make: impl FnMut(usize, Record) -> T,
) -> Result<Vec<T>, Undecodable> {
    let number = |at: usize| batch.get(at..at + 4).map(|b| i32::from_be_bytes(b.try_into().expect("four bytes")));
    let (Some(count), Some(&magic)) = (number(57), batch.get(16)) else {
        return Err(format!("the batch has {} bytes, a header alone has {HEADER_BYTES}", batch.len()).into());
    };
    if magic != 2 {
        return Err(format!("record batch magic {magic} is not supported").into());
    }
    if number(17) != Some(crc32c::crc32c(&batch[21..]) as i32) {
        return Err("the batch's CRC-32C differs".to_owned().into());
    }
    let base_timestamp = i64::from_be_bytes(batch[27..35].try_into().expect("eight bytes"));
    let folded = batch.slice(HEADER_BYTES..);
    let records = match batch[22] & 0b111 {
        0 => folded,
        codec => fold::unfold(&folded, codec, unfolded_max).map_err(|e| e.to_string())?,
    };
    let count = usize::try_from(count).map_err(|_| format!("the batch says it has {count} records"))?;
    let mut out = Vec::with_capacity(count.min(records.len() / RECORD_BYTES_MIN));
    let mut reader = Reader { bytes: &records, at: 0, end: records.len(), headers_left: headers_max, is_full: false };
    for at in 0..count {
        match reader.record(base_timestamp) {
            Some(record) => out.push(make(at, record)),
            None if reader.is_full => return Err(Undecodable::Headers),
            None => return Err(format!("record {at} of {count} is malformed or cut off").into()),
        }
    }
    Ok(out)
}

/// Reads records one after the other.
struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
    /// of the record, or of all between two records
    end: usize,
    headers_left: u64,
    /// a record had more headers than were left
    is_full: bool,
}

impl Reader<'_> {
    fn record(&mut self, base_timestamp: i64) -> Option<Record> {
        let length = self.length()??;
        let end = std::mem::replace(&mut self.end, self.at + length);
        self.at += 1; // attributes
        let timestamp_ms = base_timestamp.wrapping_add(self.varint()?);
        self.varint()?; // offset, which its place says as well
        let (key, value) = (self.part()?, self.part()?);
        let count = u64::try_from(self.varint()?).ok()?;
        // (each takes two bytes: more than there are is no matter of room)
        self.is_full = count > self.headers_left && count <= (self.end - self.at) as u64 / 2;
        self.headers_left = self.headers_left.checked_sub(count)?;
        let mut headers = Vec::new();
        for _ in 0..count {
            let name = String::from_utf8(self.part()??.into()).ok()?;
            headers.push((name, self.part()?));
        }
        // what else a record may hold one day is passed over
        self.at = std::mem::replace(&mut self.end, end);
        Some(Record { key, value, headers, timestamp_ms })
    }

    /// A part with its length before it, `None` within for a length of -1.
    fn part(&mut self) -> Option<Option<Bytes>> {
        let Some(length) = self.length()? else { return Some(None) };
        let from = self.at;
        self.at += length;
        Some(Some(self.bytes.slice(from..self.at)))
    }

    /// A length as is left, `None` within for -1.
    fn length(&mut self) -> Option<Option<usize>> {
        match self.varint()? {
            -1 => Some(None),
            length => usize::try_from(length).ok().filter(|l| *l <= self.end - self.at).map(Some),
        }
    }

    fn varint(&mut self) -> Option<i64> {
        let mut value = 0u64;
        for (at, byte) in self.bytes.get(self.at..self.end)?.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte & 0x80 == 0 {
                self.at += at + 1;
                return Some((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        None
    }
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
        let headers = proptest::collection::vec(("[a-c]{0,2}|\\PC{0,4}", proptest::option::of(bytes())), 0..4);
        (proptest::option::of(bytes()), proptest::option::of(bytes()), headers, 0i64..1 << 45)
            .prop_map(|(key, value, headers, timestamp_ms)| Record { key, value, headers, timestamp_ms })
    }

    #[test]
    fn the_last_header_of_a_name_counts_also_where_it_has_no_value() {
        let header = |name: &str, value: Option<&'static str>| (name.to_owned(), value.map(Bytes::from));
        let headers = vec![header("a", Some("1")), header("b", Some("2")), header("a", Some("3"))];
        let mut record = Record { headers, ..Default::default() };
        assert_eq!(record.header("a").unwrap(), "3");
        record.headers.push(header("a", None));
        assert_eq!((record.header("a"), record.header("c")), (None, None));
        record.set_header("a", "4");
        assert_eq!(record.headers, [header("b", Some("2")), header("a", Some("4"))]);
    }

    use kafka_protocol::records as kafka;

    fn as_kafka_reads(record: &Record, at: usize, stamp: Option<Stamp>) -> kafka::Record {
        let stamp = stamp.unwrap_or(Stamp { id: -1, epoch: -1, sequence: -1 });
        let text = |name: &String| kafka_protocol::protocol::StrBytes::from_string(name.clone());
        kafka::Record {
            transactional: false,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: 0,
            producer_id: stamp.id,
            producer_epoch: stamp.epoch,
            timestamp_type: kafka::TimestampType::Creation,
            offset: at as i64,
            sequence: stamp.sequence.wrapping_add(at as i32),
            timestamp: record.timestamp_ms,
            key: record.key.clone(),
            value: record.value.clone(),
            headers: record.headers.iter().map(|(name, value)| (text(name), value.clone())).collect(),
        }
    }

    /// A batch of one uncompressed record of these bytes.
    fn batch_of(record: &[u8]) -> Bytes {
        of_encoded(record, Compression::None, 1).unwrap()
    }

    /// The crate `kafka-protocol` reserved memory for as many headers as a record said it has, and the process was aborted.
    #[test]
    fn a_record_of_two_billion_headers_is_refused_before_there_is_memory_for_them() {
        let mut record = vec![0, 0, 0, 1, 1];
        put_varint(&mut record, i64::from(i32::MAX));
        let mut bytes = Vec::new();
        put_varint(&mut bytes, record.len() as i64);
        bytes.extend(record);
        assert_eq!(decode(&batch_of(&bytes)), Err("record 0 of 1 is malformed or cut off".to_owned()));
    }

    /// Found by a reviewer: two bytes in the batch, 56 in memory, and nothing of it left after compression.
    #[test]
    fn a_batch_of_too_many_empty_headers_is_refused() {
        let headers = HEADERS_MAX + 1;
        let mut record = vec![0, 0, 0, 1, 1];
        put_varint(&mut record, headers as i64);
        record.extend(vec![0; 2 * headers as usize]);
        let mut bytes = Vec::new();
        put_varint(&mut bytes, record.len() as i64);
        bytes.extend(record);
        assert!(decode(&batch_of(&bytes)).is_err());
    }

    #[test]
    fn numbers_take_the_bytes_they_are_counted_with() {
        for value in (0..64)
            .flat_map(|bit| [1i64 << bit, (1i64 << bit).wrapping_neg(), (1i64 << bit).wrapping_sub(1)])
            .chain([0])
        {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out.len(), varint_bytes(value), "{value}");
            let bytes = out.into();
            let mut reader = Reader { bytes: &bytes, at: 0, end: bytes.len(), headers_left: 0, is_full: false };
            assert_eq!((reader.varint(), reader.at), (Some(value), reader.end));
        }
    }

    proptest! {
        #[test]
        fn kafkas_own_reader_and_writer_agree_with_ours(
            mut records in proptest::collection::vec(any_record(), 1..20), codec in 0usize..5, sequence in proptest::option::of(0i32..1000),
        ) {
            use Compression::*;
            // that crate keeps headers in a map: repeated names are tested below
            for record in &mut records {
                let mut names = std::collections::BTreeSet::new();
                record.headers.retain(|(name, _)| names.insert(name.clone()));
            }
            let stamp = sequence.map(|sequence| Stamp { id: 9, epoch: 1, sequence });
            let theirs: Vec<kafka::Record> = records.iter().enumerate().map(|(at, r)| as_kafka_reads(r, at, stamp)).collect();
            let batch = encode(&records, [None, Gzip, Snappy, Lz4, Zstd][codec], stamp).unwrap();
            prop_assert_eq!(&kafka::RecordBatchDecoder::decode(&mut batch.clone()).unwrap().records, &theirs);
            let compression = [kafka::Compression::None, kafka::Compression::Gzip, kafka::Compression::Snappy,
                kafka::Compression::Lz4, kafka::Compression::Zstd][codec];
            let mut written = bytes::BytesMut::new();
            let options = kafka::RecordEncodeOptions { version: 2, compression };
            kafka::RecordBatchEncoder::encode(&mut written, &theirs, &options).unwrap();
            prop_assert_eq!(decode(&written.freeze()).unwrap(), records);
        }

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
            let most = batch_bytes_max(&records);
            prop_assert!(compression != None || (batch.len()..batch.len() + 32 * records.len()).contains(&most));
            prop_assert_eq!(header.codec as usize, codec);
            prop_assert_eq!(header.producer, sequence.map(|sequence| ProducerStamp { id: 9, epoch: 1, sequence }));
            prop_assert_eq!(decode(&batch).unwrap(), records);
        }

        #[test]
        fn no_bytes_bring_down_what_reads_how_much_they_unfold_to(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..80), codec in 0u8..8, known: bool,
        ) {
            let magics: [&[u8]; 8] = [&[], &[0x1f, 0x8b], &fold::SNAPPY_HEADER[..], &[4, 0x22, 0x4d, 0x18], &[0x28, 0xb5, 0x2f, 0xfd], &[], &[], &[]];
            if known {
                bytes.splice(0..0, magics[codec as usize].iter().copied());
            }
            let mut batch = vec![0; HEADER_BYTES];
            batch[22] = codec;
            batch.extend(bytes);
            let batch = Bytes::from(batch);
            unfolds_to_too_much(&batch);
            prop_assert!(unfolding_bytes_max(&batch) <= READ_BYTES_MAX);
        }

        #[test]
        fn garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(BatchHeader::validate(&bytes).is_err());
        }
    }

    #[test]
    fn what_a_batch_unfolds_to_is_known_before_it_is_decompressed() {
        let zeros = |mib: usize| Record { value: Some(vec![0; mib << 20].into()), ..Default::default() };
        let noise: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
        let noise = Record { value: Some(noise.into()), ..Default::default() };
        for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
            for (record, too_much) in [(zeros(0), false), (zeros(31), false), (noise.clone(), false), (zeros(33), true)]
            {
                let batch = encode(std::slice::from_ref(&record), codec, None).unwrap();
                let plain = encode(&[record], Compression::None, None).unwrap().len() - HEADER_BYTES;
                match unfolded(&batch).unwrap() {
                    Unfolded::Exactly(bytes) => assert_eq!(bytes, plain, "{codec:?}"),
                    Unfolded::AtMost(most) => {
                        assert!(most >= plain && most <= plain + (256 << 10), "{codec:?} {most} {plain}")
                    }
                }
                assert_eq!(unfolds_to_too_much(&batch), too_much, "{codec:?} {plain}");
                assert_eq!(decode(&batch).is_err(), too_much, "{codec:?} {plain}: publish and delivery agree");
                assert!(is_within(&batch), "{codec:?} {plain}");
            }
        }
    }

    /// Decoding within what is said beforehand is enough.
    fn is_within(batch: &Bytes) -> bool {
        decode(batch).is_err() || decode_within(batch, unfolding_bytes_max(batch), HEADERS_MAX).is_ok()
    }

    /// Its trailer says 1 KiB: nobody decompresses more than that.
    #[test]
    fn a_batch_that_lies_about_what_it_unfolds_to_cannot_be_decoded() {
        let record = Record { value: Some(vec![0; 20 << 20].into()), ..Default::default() };
        let mut batch = encode(&[record], Compression::Gzip, None).unwrap().to_vec();
        let end = batch.len();
        batch[end - 4..].copy_from_slice(&1024u32.to_le_bytes());
        seal(&mut batch);
        let batch = Bytes::from(batch);
        assert_eq!(unfolding_bytes_max(&batch), 1024);
        assert!(decode_within(&batch, unfolding_bytes_max(&batch), HEADERS_MAX).is_err() && decode(&batch).is_err());
    }

    /// Found by a reviewer: the dead letter of such a message was stored, and nobody could read it.
    #[test]
    fn a_message_of_the_largest_size_can_be_read_with_the_headers_that_brokers_add() {
        for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
            let value = vec![0; UNFOLDED_BYTES_MAX - 20];
            let mut record = Record { value: Some(value.into()), ..Default::default() };
            assert!(!unfolds_to_too_much(&encode(&[record.clone()], codec, None).unwrap()));
            record.set_header("weir-dead-topic", "x".repeat(507));
            let moved = encode(&[record], codec, None).unwrap();
            assert!(decode(&moved).is_ok() && is_within(&moved), "{codec:?}");
            assert!(decode_within(&moved, unfolding_bytes_max(&moved), HEADERS_MAX).is_ok(), "{codec:?}");
        }
    }

    /// Found by a reviewer: only the last member was measured, and only some readers read more than that.
    #[test]
    fn a_batch_of_two_gzip_members_cannot_be_decoded_by_any_reader() {
        let record = |bytes| Record { value: Some(vec![0; bytes].into()), ..Default::default() };
        let member = |bytes| encode(&[record(bytes)], Compression::Gzip, None).unwrap();
        let both = [&member(33 << 20)[..], &member(10)[HEADER_BYTES..]].concat();
        let batch = of_encoded(&both[HEADER_BYTES..], Compression::Gzip, 2).unwrap();
        assert!(decode(&batch).is_err() && is_within(&batch));
        let two = [&member(10)[..], &member(10)[HEADER_BYTES..]].concat();
        let batch = of_encoded(&two[HEADER_BYTES..], Compression::Gzip, 2).unwrap();
        assert_eq!(decode(&batch), Err("the batch has more than one gzip member".to_owned()));
        let whole = of_encoded(&member(10)[HEADER_BYTES..], Compression::Gzip, 1).unwrap();
        assert_eq!(decode(&whole).unwrap().len(), 1);
    }

    #[test]
    fn more_headers_than_any_reader_takes_are_not_encoded() {
        let with = |headers| Record { headers: vec![(String::new(), None); headers as usize], ..Default::default() };
        let half = HEADERS_MAX / 2;
        assert!(decode(&encode(&[with(half), with(half)], Compression::None, None).unwrap()).is_ok());
        assert!(encode(&[with(half), with(half + 1)], Compression::None, None).is_err());
    }

    #[test]
    fn a_batch_with_more_headers_than_are_allowed_says_so() {
        let headers = vec![("a".to_owned(), None); 10];
        let batch = encode(&[Record { headers, ..Default::default() }], Compression::None, None).unwrap();
        assert_eq!(decode_within(&batch, 0, 9), Err(Undecodable::Headers));
        assert!(decode_within(&batch, 0, 10).is_ok());
    }

    #[test]
    fn a_batch_that_unfolds_beyond_its_bound_is_refused() {
        let zeros = Record { value: Some(vec![0; 1 << 20].into()), ..Default::default() };
        for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
            let batch = encode(&vec![zeros.clone(); 4], codec, None).unwrap();
            assert!(batch.len() < 1 << 20, "{codec:?} made {} bytes", batch.len());
            assert_eq!(decode(&batch).unwrap().len(), 4);
            let error = fold::unfold(&batch.slice(HEADER_BYTES..), codec as u8, 1 << 20).unwrap_err();
            assert!(error.to_string().contains("unfolds to more"), "{codec:?}: {error}");
        }
    }
}
