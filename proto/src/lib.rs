//! The wire contract, package `weir.v1`: generated from `proto/weir/v1/weir.proto` by `make generate` and committed.

#[allow(clippy::all, missing_docs, unreachable_pub)]
#[rustfmt::skip]
#[path = "gen/weir.v1.rs"]
pub mod v1;

pub mod inproc;
pub mod limits;
pub mod names;
pub mod pages;
pub mod records;

/// Whether a subscription's `topic` is a pattern of topics.
pub fn is_pattern(topic: &str) -> bool {
    topic.contains(['*', '#'])
}

/// Names of brokers whose volumes were rolled back to older copies; of one that is not known, its id.
pub fn rolled_back(metadata: &v1::GetMetadataResponse) -> Vec<String> {
    let named =
        |id: &u64| metadata.brokers.iter().find(|b| b.id == *id).map_or_else(|| id.to_string(), |b| b.name.clone());
    metadata.rolled_back_brokers.iter().map(named).collect()
}

/// For the reflection service: the contract as an encoded `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptor.bin");

/// HTTP/2 stream window, bytes: with the default one a stream moves a tenth of what it could.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 connection window, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// HTTP/2 frame, bytes.
pub const FRAME_BYTES: u32 = 1 << 20;
/// Largest gRPC message, bytes, set at every end.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
