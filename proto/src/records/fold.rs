//! Compression of a batch's records, with kept libraries, bounded on the way back.

use super::Compression;
use bytes::Bytes;
use std::io::{Read, Write as _};

/// As snappy-java begins a stream: <https://github.com/xerial/snappy-java#compatibility-notes>.
const SNAPPY_HEADER: &[u8; 16] = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
/// Its blocks.
const SNAPPY_BLOCK_BYTES: usize = 32 << 10;

/// Appends `plain`, compressed, to `out`.
pub(super) fn fold(mut out: Vec<u8>, codec: Compression, plain: &[u8]) -> anyhow::Result<Vec<u8>> {
    match codec {
        Compression::None => out.extend_from_slice(plain),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::default());
            encoder.write_all(plain)?;
            out = encoder.finish()?;
        }
        Compression::Snappy => {
            out.extend_from_slice(SNAPPY_HEADER);
            for block in plain.chunks(SNAPPY_BLOCK_BYTES) {
                let folded = snap::raw::Encoder::new().compress_vec(block)?;
                out.extend((folded.len() as u32).to_be_bytes());
                out.extend(folded);
            }
        }
        Compression::Lz4 => {
            let mut builder = lz4::EncoderBuilder::new();
            let mut encoder = builder.level(4).block_mode(lz4::BlockMode::Independent).build(out)?;
            encoder.write_all(plain)?;
            let (folded, result) = encoder.finish();
            result?;
            out = folded;
        }
        Compression::Zstd => {
            let mut encoder = zstd::stream::write::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL)?;
            encoder.write_all(plain)?;
            out = encoder.finish()?;
        }
    }
    Ok(out)
}

/// Decompresses what the codec of a batch's attributes says, to at most `max` bytes: a stranger's batch may unfold to a thousand
/// times its size.
pub(super) fn unfold(bytes: &Bytes, codec: u8, max: usize) -> anyhow::Result<Bytes> {
    let take = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        reader.take(max as u64 + 1).read_to_end(&mut out)?;
        anyhow::ensure!(out.len() <= max, "the batch unfolds to more than {max} bytes");
        Ok(Bytes::from(out))
    };
    match codec {
        1 => take(&mut flate2::read::MultiGzDecoder::new(&bytes[..])),
        2 => unfold_snappy(bytes, max),
        3 => take(&mut lz4::Decoder::new(&bytes[..])?),
        4 => take(&mut zstd::stream::read::Decoder::with_buffer(&bytes[..])?),
        _ => anyhow::bail!("compression codec {codec} is unknown"),
    }
}

/// A header and blocks with their length before them, as Kafka's clients frame it; or one block alone.
fn unfold_snappy(bytes: &Bytes, max: usize) -> anyhow::Result<Bytes> {
    let mut out = Vec::new();
    let mut block = |data: &[u8]| {
        let length = snap::raw::decompress_len(data)?;
        anyhow::ensure!(out.len() + length <= max, "the batch unfolds to more than {max} bytes");
        // a block of so many bytes cannot unfold to more: <https://github.com/google/snappy/blob/main/format_description.txt>
        anyhow::ensure!(length / 32 <= data.len(), "a block of {} bytes says it unfolds to {length}", data.len());
        out.extend(snap::raw::Decoder::new().decompress_vec(data)?);
        Ok(())
    };
    if !bytes.starts_with(&SNAPPY_HEADER[..8]) {
        block(bytes)?;
        return Ok(out.into());
    }
    let mut rest = bytes.get(SNAPPY_HEADER.len()..).unwrap_or_default();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        anyhow::ensure!(length <= after.len(), "a block of {length} bytes, {} are left", after.len());
        let (data, next) = after.split_at(length);
        block(data)?;
        rest = next;
    }
    Ok(out.into())
}
