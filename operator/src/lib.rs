//! The operator: turns StreamCluster, Topic and Subscription resources into brokers and what they hold.
//! Each kind is a folder, read as: dereference, validate, plan, apply, status. Deciding and building are pure.

pub mod apply;
pub mod brokers;
pub mod cluster;
pub mod conditions;
pub mod context;
pub mod fence;
pub mod health;
pub mod locate;
pub mod retire;
pub mod serve;
pub mod subscription;
pub mod topic;
pub mod waiting;
