//! The metadata group: what the cluster is. [`state`] holds it and applies commands; [`placement`] says where replicas go;
//! [`plan`] says what the metadata leader should do next.

pub mod command;
pub mod placement;
pub mod plan;
pub mod state;
