//! The metadata group: what the cluster is. [`state`] holds it and applies commands; [`index`] says which subscriptions read which
//! topics; `check` says what no command may be; [`placement`] says where replicas go; [`plan`] says what the metadata leader should do next.

mod check;
pub mod command;
pub mod index;
pub mod names;
pub mod placement;
pub mod plan;
pub mod state;
