//! How much a compressed batch unfolds to, read off the form it is compressed in: nothing is decompressed for it. Snappy's blocks and
//! gzip's trailer say it exactly; of LZ4 and Zstandard, where the frame does not say it, the blocks bound it.

use super::fold::{SNAPPY_HEADER, SNAPPY_RATIO_MAX, snappy_blocks};

/// Bytes that something unfolds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfolded {
    /// So many, or it cannot be decoded.
    Exactly(usize),
    /// No more than these.
    AtMost(usize),
}

impl Unfolded {
    /// The bound.
    pub fn bytes_max(self) -> usize {
        match self {
            Self::Exactly(bytes) | Self::AtMost(bytes) => bytes,
        }
    }
}

/// The most that LZ4 makes of one byte: a length is counted in bytes of 255.
const LZ4_RATIO_MAX: usize = 255;
/// Largest block of Zstandard.
const ZSTD_BLOCK_BYTES: usize = 128 << 10;

/// Of `bytes` as the codec of a batch's attributes says; `None` where they are nothing of the kind.
pub(super) fn of(bytes: &[u8], codec: u8) -> Option<Unfolded> {
    match codec {
        0 => Some(Unfolded::Exactly(bytes.len())),
        1 => gzip(bytes),
        2 => snappy(bytes),
        3 => lz4(bytes),
        4 => zstd(bytes),
        _ => None,
    }
}

fn little(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |n, b| (n << 8) | usize::from(*b))
}

/// The trailer holds the length modulo 2^32 (RFC 1952). One of 4 GiB or more looks smaller, and then cannot be decoded.
fn gzip(bytes: &[u8]) -> Option<Unfolded> {
    let rest = bytes.strip_prefix(&[0x1f, 0x8b, 8])?;
    rest.get(7..)?.last_chunk::<4>().map(|length| Unfolded::Exactly(little(length)))
}

fn snappy(bytes: &[u8]) -> Option<Unfolded> {
    if !bytes.starts_with(&SNAPPY_HEADER[..8]) {
        return snappy_block(bytes).map(Unfolded::Exactly);
    }
    let mut sum: usize = 0;
    for block in snappy_blocks(bytes) {
        sum = sum.saturating_add(snappy_block(block.ok()?)?);
    }
    Some(Unfolded::Exactly(sum))
}

/// A block that says more than its bytes can hold is none.
fn snappy_block(bytes: &[u8]) -> Option<usize> {
    snap::raw::decompress_len(bytes).ok().filter(|length| length / SNAPPY_RATIO_MAX <= bytes.len())
}

/// <https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md>
fn lz4(bytes: &[u8]) -> Option<Unfolded> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    if *magic != [0x04, 0x22, 0x4d, 0x18] {
        return None;
    }
    let (&[flags, block], _) = rest.split_first_chunk::<2>()?;
    let block_max = match (block >> 4) & 7 {
        4 => 64 << 10,
        5 => 256 << 10,
        6 => 1 << 20,
        7 => 4 << 20,
        _ => return None,
    };
    let (says_size, names_dictionary, block_checksums) = (flags & 8 != 0, flags & 1 != 0, flags & 16 != 0);
    if says_size {
        return Some(Unfolded::Exactly(little(rest.get(2..10)?)));
    }
    let mut at = 4 + 2 + if names_dictionary { 4 } else { 0 } + 1;
    let mut sum: usize = 0;
    loop {
        let size = little(bytes.get(at..at + 4)?);
        at += 4;
        let (plain, size) = (size >> 31 == 1, size & 0x7fff_ffff);
        if size == 0 {
            return Some(Unfolded::AtMost(sum));
        }
        let unfolded = if plain { size } else { block_max.min(size.saturating_mul(LZ4_RATIO_MAX)) };
        sum = sum.saturating_add(unfolded);
        at = at.checked_add(size + if block_checksums { 4 } else { 0 })?;
        if at > bytes.len() {
            return None;
        }
    }
}

/// RFC 8878, 3.1
fn zstd(bytes: &[u8]) -> Option<Unfolded> {
    let (mut at, mut sum, mut exact) = (0, 0usize, true);
    while at < bytes.len() {
        let magic = little(bytes.get(at..at + 4)?);
        at += 4;
        if (0x184d_2a50..=0x184d_2a5f).contains(&magic) {
            at = at.checked_add(4 + little(bytes.get(at..at + 4)?))?; // a frame to be skipped
            continue;
        }
        if magic != 0xfd2f_b528 {
            return None;
        }
        let descriptor = *bytes.get(at)?;
        let single = descriptor & 0x20 != 0;
        at += 1 + usize::from(!single) + [0, 1, 2, 4][usize::from(descriptor & 3)];
        let size_bytes = [usize::from(single), 2, 4, 8][usize::from(descriptor >> 6)];
        let said = little(bytes.get(at..at + size_bytes)?).saturating_add(if size_bytes == 2 { 256 } else { 0 });
        at += size_bytes;
        let mut blocks: usize = 0;
        loop {
            let header = little(bytes.get(at..at + 3)?);
            at += 3;
            let (last, kind, size) = (header & 1 == 1, (header >> 1) & 3, header >> 3);
            let (taken, unfolded) = match kind {
                0 => (size, size),
                1 => (1, size),
                2 => (size, ZSTD_BLOCK_BYTES),
                _ => return None,
            };
            at = at.checked_add(taken).filter(|at| *at <= bytes.len())?;
            blocks = blocks.saturating_add(unfolded);
            if last {
                break;
            }
        }
        at += if descriptor & 4 != 0 { 4 } else { 0 };
        exact &= size_bytes > 0;
        sum = sum.saturating_add(if size_bytes > 0 { said } else { blocks });
    }
    Some(if exact { Unfolded::Exactly(sum) } else { Unfolded::AtMost(sum) })
}
