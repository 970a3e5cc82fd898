//! The core's storage trait over RocksDB ([`rocks`]) and over memory ([`mem`]). [`keys`] documents every key and value.

pub mod blobs;
mod direct;
pub mod keys;
pub mod mem;
mod removal;
pub mod rocks;
pub mod room;
pub mod synced;
pub mod torn;
