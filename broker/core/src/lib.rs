//! The pure core of a Weir broker: no clock, no randomness, no IO, no async. What goes in is messages, requests and time;
//! what comes out is [`node::Effects`]. The broker's shell runs it on a thread, the simulation runs many of it in one.

pub mod batch;
pub mod clocks;
pub mod cursor;
pub mod delivery;
mod duties;
pub mod entry;
pub mod group;
pub mod ids;
pub mod incarnation;
pub mod log;
pub mod membership;
pub mod meta;
pub mod node;
pub mod observe;
pub mod pace;
pub mod partition;
pub mod pattern;
pub mod producer;
pub mod rate;
pub mod retention;
pub mod schedule;
mod sleep;
pub mod storage;
pub mod syncs;
pub mod tail;

pub use raft::eraftpb;
