//! Resources that the API server refuses by their definitions' rules, each with what it must say. They are applied over [`VALID`].

/// A manifest of a Topic.
pub fn topic(name: &str, spec: &str) -> String {
    format!("apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn subscription(name: &str, spec: &str) -> String {
    format!("apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn cluster(name: &str, spec: &str) -> String {
    format!("apiVersion: weir.dev/v1alpha1\nkind: StreamCluster\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

/// The topic that loads are published to.
pub const VALID: &str =
    "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: load}\nspec: {partitions: 6, replicas: 3}\n";

/// (manifest, part of the message). `default`, `load` and `mail` are there already.
pub fn cases() -> Vec<(String, &'static str)> {
    let elsewhere = "partitions: 6, replicas: 3, clusterRef: {name: other}";
    vec![
        (topic("bad", "replicas: 0"), "greater than or equal to 1"),
        (topic("bad", "replicas: 2"), "an even number survives no more failures"),
        (topic("bad", "partitions: 0"), "greater than or equal to 1"),
        (topic("bad", "partitions: 10001"), "less than or equal to 10000"),
        (topic("bad", "retention: {time: -1h}"), "spec.retention.time"),
        (topic("bad", "retention: {bytes: much}"), "spec.retention.bytes"),
        (topic("bad", "maxMessageBytes: 64Mi"), "maxMessageBytes is 64 to 32Mi"),
        (topic("bad", "maxMessageBytes: '0'"), "maxMessageBytes is 64 to 32Mi"),
        (topic("bad", "retention: {time: 0s}"), "spec.retention.time"),
        (topic("bad", "retention: {time: 1month}"), "spec.retention.time"),
        (topic("bad", "retention: {bytes: '0'}"), "retention.bytes is 1 to 1024Ti"),
        (topic("bad", "retention: {bytes: 99999999999Ti}"), "retention.bytes is 1 to 1024Ti"),
        (topic("bad", "durability: hope"), "Unsupported value"),
        (topic("bad", "deletionPolicy: Maybe"), "Unsupported value"),
        (topic("bad", "partitons: 3"), "partitons"),
        (topic("load", "partitions: 3, replicas: 3"), "partitions can grow, never shrink"),
        (topic("load", elsewhere), "clusterRef cannot change"),
        (cluster("default", "storage: {size: 1Mi}"), "storage can grow, never shrink"),
        (cluster("default", "topicDefaults: {replicas: 5}"), "topicDefaults.replicas cannot be more than brokers"),
        (cluster("default", "storage: {className: other}"), "className cannot change"),
        (cluster("other", "brokers: 0"), "greater than or equal to 1"),
        (cluster("other", "storage: {size: large}"), "spec.storage.size"),
        (cluster("other", "storage: {size: 1000Mi}"), "storage is 1Gi at least"),
        (subscription("bad", "mode: shared"), "spec.topic"),
        (subscription("bad", "topic: load, mode: fair"), "Unsupported value"),
        (subscription("bad", "topic: load, deadLetter: {maxDeliveries: 0}"), "greater than or equal to 1"),
        (subscription("bad", "topic: load, rate: {messagesPerSecond: 0}"), "greater than or equal to 1"),
        (subscription("bad", "topic: load, rate: {bytesPerSecond: '0'}"), "rate.bytesPerSecond is 1 to 1Ti"),
        (subscription("bad", "topic: load, ackDeadline: 0s"), "spec.ackDeadline"),
        (subscription("bad", "topic: load, redelivery: {maxBackoff: 0s}"), "spec.redelivery.maxBackoff"),
        (subscription("bad", "topic: load, filter: ''"), "spec.filter"),
        (subscription("mail", "topic: load"), "topic cannot change"),
    ]
}
