//! One line for every command, with arguments that are right where there is a topic `orders` with messages, one of them scheduled, a
//! subscription `mail` of it with a dead-letter topic and a snapshot `before`, and one broker. In this order each of them succeeds.

/// Stands for a file of manifests, or a folder of data.
pub(crate) const PATH: &str = "PATH";

/// The lines.
pub(crate) const COMMANDS: &[&[&str]] = &[
    &["serve", "--listen", "127.0.0.1:0", "--data", PATH],
    &["topic", "list"],
    &["topic", "describe", "orders"],
    &["topic", "apply", "--file", PATH],
    &["topic", "unschedule", "orders", "0", "0"],
    &["subscription", "list"],
    &["subscription", "describe", "mail"],
    &["subscription", "apply", "--file", PATH],
    &["subscription", "snapshot", "mail", "after"],
    &["subscription", "snapshots", "mail"],
    &["subscription", "seek", "mail", "--to", "earliest"],
    &["subscription", "redrive", "mail"],
    &["cluster", "status"],
    &["cluster", "add", "weir-1"],
    &["cluster", "drain", "1", "--cancel"],
    &["publish", "orders", "--output", "json"],
    &["consume", "--topic", "orders", "--from", "earliest"],
    &["bench", "produce", "--topic", "orders", "--records", "1"],
    &["bench", "consume", "--topic", "orders", "--records", "1"],
    &["bench", "latency", "--topic", "orders", "--records", "1"],
    &["bench", "share", "--subscription", "mail", "--members", "1", "--records", "1"],
    &["bench", "verify", "--topic", "orders", "--seconds", "1", "--keys", "1"],
    &["completions", "bash"],
    &["subscription", "delete", "mail"],
    &["topic", "delete", "orders"],
];
