//! Compression of a batch's records, with kept libraries, bounded on the way back.

use super::Compression;
use bytes::Bytes;
use std::io::{Read, Write as _};

/// As snappy-java begins a stream: <https://github.com/xerial/snappy-java#compatibility-notes>.
pub(super) const SNAPPY_HEADER: &[u8; 16] = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
/// The most that Snappy makes of one byte: <https://github.com/google/snappy/blob/main/format_description.txt>
pub(super) const SNAPPY_RATIO_MAX: usize = 32;
/// Largest window that is made while bytes are counted: a frame that wants more unfolds to more.
const WINDOW_LOG_MAX: u32 = 25;
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
    // as large as it will be: a buffer that grows is in memory twice
    let most = super::unfolded::of(bytes, codec).map_or(max, |u| u.bytes_max().min(max));
    let mut out = Vec::with_capacity(if codec == 1 || codec == 3 { most + 1 } else { 0 });
    let mut take = |reader: &mut dyn Read| {
        reader.take(max as u64 + 1).read_to_end(&mut out)?;
        anyhow::ensure!(out.len() <= max, "the batch unfolds to more than {max} bytes");
        Ok(Bytes::from(std::mem::take(&mut out)))
    };
    match codec {
        1 => {
            let mut decoder = flate2::bufread::GzDecoder::new(&bytes[..]);
            let out = take(&mut decoder)?;
            // what it unfolds to is read off the end of the last: no producer is known that writes several
            anyhow::ensure!(decoder.into_inner().is_empty(), "the batch has more than one gzip member");
            Ok(out)
        }
        2 => unfold_snappy(bytes, max),
        3 => take(&mut lz4::Decoder::new(&bytes[..])?),
        4 => {
            // in one go: the output is the window, and no other is made however large the frame says it is
            let mut out = zstd::bulk::decompress(bytes, most).map_err(|e| match e.to_string() {
                said if said.contains("too small") => anyhow::anyhow!("the batch unfolds to more than {max} bytes"),
                said => anyhow::anyhow!("{said}"),
            })?;
            if out.capacity() > 2 * out.len() {
                out.shrink_to_fit();
            }
            Ok(out.into())
        }
        _ => anyhow::bail!("compression codec {codec} is unknown"),
    }
}

/// A header and blocks with their length before them, as Kafka's clients frame it; or one block alone.
fn unfold_snappy(bytes: &Bytes, max: usize) -> anyhow::Result<Bytes> {
    let mut out = Vec::new();
    let mut block = |data: &[u8]| {
        let length = snap::raw::decompress_len(data)?;
        anyhow::ensure!(out.len() + length <= max, "the batch unfolds to more than {max} bytes");
        anyhow::ensure!(
            length / SNAPPY_RATIO_MAX <= data.len(),
            "a block of {} bytes says it unfolds to {length}",
            data.len()
        );
        out.extend(snap::raw::Decoder::new().decompress_vec(data)?);
        Ok(())
    };
    if !bytes.starts_with(&SNAPPY_HEADER[..8]) {
        block(bytes)?;
        return Ok(out.into());
    }
    for data in snappy_blocks(bytes) {
        block(data?)?;
    }
    Ok(out.into())
}

/// The blocks behind the header.
pub(super) fn snappy_blocks(bytes: &[u8]) -> impl Iterator<Item = anyhow::Result<&[u8]>> {
    let mut rest = bytes.get(SNAPPY_HEADER.len()..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let Some((data, next)) = after.split_at_checked(length) else {
            let left = after.len();
            rest = &[];
            return Some(Err(anyhow::anyhow!("a block of {length} bytes, {left} are left")));
        };
        rest = next;
        Some(Ok(data))
    })
}

/// Whether something unfolds to more than `max` bytes: counted, and not kept. What cannot be decoded does not.
pub(super) fn is_more_than(bytes: &[u8], codec: u8, max: usize) -> bool {
    let count = |reader: &mut dyn Read| std::io::copy(&mut reader.take(max as u64 + 1), &mut std::io::sink());
    let counted = match codec {
        3 => lz4::Decoder::new(bytes).and_then(|mut reader| count(&mut reader)),
        4 => zstd::stream::read::Decoder::with_buffer(bytes).and_then(|mut reader| {
            reader.window_log_max(WINDOW_LOG_MAX)?;
            count(&mut reader)
        }),
        _ => Ok(0),
    };
    counted.is_ok_and(|count| count > max as u64)
}
