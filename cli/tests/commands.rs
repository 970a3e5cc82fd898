//! The command line as people and scripts use it, against an embedded broker fed by a folder of manifests.

mod lines;

use lines::{COMMANDS, PATH};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WEIR: &str = env!("CARGO_BIN_EXE_weir");

struct Served {
    child: Child,
    server: String,
    said: Value,
}

impl Served {
    fn start(data: &Path, manifests: &Path) -> Self {
        let mut serve = Command::new(WEIR);
        serve
            .args(["serve", "--listen", "127.0.0.1:0", "-o", "json", "--data"])
            .arg(data)
            .arg("--manifests")
            .arg(manifests);
        let mut child = serve.env("WEIR_LOG", "warn").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        let server = said["brokers"][0]["client"].as_str().unwrap().to_owned();
        Self { child, server, said }
    }

    /// Exit code, standard output, standard error.
    fn run(&self, args: &[&str], input: impl AsRef<[u8]>) -> (i32, String, String) {
        let mut command = Command::new(WEIR);
        command.args(args).env("WEIR_SERVER", &self.server);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_ref()).unwrap();
        let out = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
    }

    fn good(&self, args: &[&str], input: impl AsRef<[u8]>) -> String {
        let (code, out, err) = self.run(args, input);
        assert_eq!(code, 0, "weir {args:?}: {err}");
        out
    }

    fn json(&self, args: &[&str]) -> Value {
        let out = self.good(args, "");
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("weir {args:?}: {e}: {out}"))
    }

    /// Ends it; what it said on standard error.
    fn stop(mut self) -> String {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        self.child.wait().unwrap();
        said
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(what: &str, ask: impl Fn() -> bool) {
    let begun = Instant::now();
    while !ask() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

const ORDERS: &str = "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: orders}\nspec: {partitions: 1, retention: {time: 1h}}\n";
const MAIL: &str = "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {name: mail}\nspec: {topic: orders, start: earliest}\n";

#[test]
fn every_command_does_what_it_says_and_scripts_can_read_it() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(manifests.path().join("a.yaml"), format!("{ORDERS}---\n{MAIL}")).unwrap();
    let served = Served::start(data.path(), manifests.path());
    assert_eq!(served.said["brokers"][0]["id"], 1);
    until("the manifests are applied", || served.run(&["subscription", "describe", "mail", "-o", "json"], "").0 == 0);
    // in
    let file = data.path().join("cat.png");
    std::fs::write(&file, "picture\nof two lines").unwrap();
    served.good(
        &["publish", "orders", "--key", "alice", "--header", "kind=greeting", "--header", "lang=en"],
        "hello\nagain\n",
    );
    served.good(&["publish", "orders", "--file", file.to_str().unwrap()], "");
    let out = served.good(&["publish", "orders", "--delay", "1h", "-o", "json"], "later\n");
    let later: Value = serde_json::from_str(&out).unwrap();
    let offset = later["offset"].to_string();
    let (_, _, said) = served.run(&["topic", "unschedule", "orders", "0", &offset, "--topic-id", "999999"], "");
    assert!(said.contains("re-created"), "of another topic of that name: {said}");
    let id = later["topicId"].to_string();
    served.good(&["topic", "apply", "-f", "-"], &ORDERS.replace("orders", "plain"));
    let (code, _, said) = served.run(&["topic", "unschedule", "plain", "0", "0"], "");
    assert!(code == 1 && said.contains("of default/plain: none ever was"), "{said}");
    assert!(
        served.good(&["topic", "unschedule", "orders", "0", &offset, "--topic-id", &id], "").contains("taken back")
    );
    for (partition, offset, reason, says) in [
        ("0", "0", "NOT_SCHEDULED", "it was published, or cancelled, before"),
        (
            "0",
            "7",
            "NEVER_SCHEDULED",
            "at offset 7 of partition 0 of default/orders: those that were have the offsets 0 to 0",
        ),
        ("0", "18446744073709551615", "NEVER_SCHEDULED", "have the offsets 0 to 0"),
        ("1", "0", "NO_PARTITION", "there is no partition 1"),
    ] {
        let (code, _, said) = served.run(&["topic", "unschedule", "orders", partition, offset, "-o", "json"], "");
        let error: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((code, &error["error"]["reason"]), (1, &reason.into()), "{error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
    }
    let (code, _, said) = served.run(&["topic", "unschedule", "nope", "0", "0"], "");
    assert!(code == 1 && said.ends_with("topic nope does not exist\n"), "{said}");
    // out
    let read = |args: &[&str]| served.good(&[&["consume"], args].concat(), "");
    let first = read(&["--topic", "orders", "--from", "earliest", "--max", "1", "-o", "json"]);
    let first: Value = serde_json::from_str(&first).unwrap();
    assert_eq!((&first["key"], &first["value"], &first["offset"]), (&"alice".into(), &"hello".into(), &0.into()));
    let headers = serde_json::json!([{"name": "kind", "value": "greeting"}, {"name": "lang", "value": "en"}]);
    assert_eq!(first["headers"], headers);
    assert_eq!(read(&["--topic", "orders", "--from", "1", "--max", "1", "-o", "raw"]), "again\n");
    assert_eq!(read(&["--topic", "orders", "--from", "1000000000001", "--max", "1", "-o", "raw"]), "hello\n");
    assert_eq!(read(&["--subscription", "mail", "--max", "3", "-o", "raw"]), "hello\nagain\npicture\nof two lines\n");
    // what there is
    assert!(served.good(&["topic", "list"], "").contains("default/orders"));
    let topic = served.json(&["topic", "describe", "orders", "-o", "json"]);
    assert_eq!((&topic["partitions"], &topic["assignment"][0]["highWatermark"]), (&1.into(), &3.into()));
    assert!(served.good(&["subscription", "list"], "").contains("default/mail"));
    until("the acks are in", || served.json(&["subscription", "describe", "mail", "-o", "json"])["backlog"] == 0);
    let status = served.json(&["cluster", "status", "-o", "json"]);
    assert_eq!((&status["leaderless"], &status["brokers"][0]["name"]), (&0.into(), &"weir-0".into()));
    assert!(served.good(&["cluster", "status"], "").contains("weir-0"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(served.good(&["completions", shell], "").contains("weir"), "{shell}");
    }
    // measured
    for args in [
        vec!["bench", "produce", "--topic", "orders", "--records", "500", "--producers", "2", "--compression", "lz4"],
        vec!["bench", "produce", "--topic", "orders", "--records", "50", "--rate", "1000", "--size", "10"],
        vec!["bench", "consume", "--topic", "orders", "--records", "500"],
        vec!["bench", "latency", "--topic", "orders", "--records", "20", "--rate", "200"],
    ] {
        let found = served.json(&[args.as_slice(), &["-o", "json"]].concat());
        for field in ["records", "bytes", "seconds", "records_per_second", "megabytes_per_second"] {
            assert!(found[field].as_f64().is_some_and(|n| n > 0.0), "{args:?}: {found}");
        }
        for field in ["p50", "p99", "p999", "max"] {
            assert!(found["latency_us"][field].is_u64(), "{args:?}: {found}");
        }
    }
    assert!(served.good(&["topic", "delete", "orders"], "").contains("deleted"));
    // what is wrong: with a code, and with what to do
    assert_eq!(served.run(&["publish", "nowhere"], "x\n").0, 1);
    assert_eq!(
        served.run(&["bench", "produce", "--topic", "t", "--producers", "0"], "").0,
        2,
        "not a right command line"
    );
    let (code, _, said) = served.run(&["--server", "127.0.0.1:1", "topic", "list"], "");
    assert!(code != 0 && said.contains("127.0.0.1:1"), "{said}");
}

#[test]
fn manifests_are_read_again_when_they_change_and_what_is_wrong_with_one_leaves_the_others_alone() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let write = |name: &str, text: &str| std::fs::write(manifests.path().join(name), text).unwrap();
    write("a.yaml", ORDERS);
    let served = Served::start(data.path(), manifests.path());
    let retention = || served.json(&["topic", "describe", "orders", "-o", "json"])["retentionMs"].as_u64();
    until("applied", || served.run(&["topic", "describe", "orders"], "").0 == 0);
    assert_eq!(retention(), Some(3_600_000));
    // there and back again
    write("a.yaml", &ORDERS.replace("1h", "2h"));
    until("changed", || retention() == Some(7_200_000));
    write("a.yaml", ORDERS);
    until("changed back", || retention() == Some(3_600_000));
    // partitions cannot shrink, a filter is none, a field is unknown, and a syntax error; what is right beside them is applied
    write("a.yaml", &ORDERS.replace("partitions: 1", "partitions: 3"));
    until("grown", || served.json(&["topic", "describe", "orders", "-o", "json"])["partitions"] == 3);
    write("a.yaml", ORDERS);
    write(
        "b.yaml",
        &format!("{}---\n{}", MAIL.replace("mail", "bad").replace("start:", "filter: 'key =', start:"), MAIL),
    );
    write("c.yaml", &ORDERS.replace("orders", "other").replace("partitions", "partitons"));
    write("d.yaml", "kind: [\n");
    until("the rest is applied", || served.run(&["subscription", "describe", "mail"], "").0 == 0);
    std::thread::sleep(Duration::from_secs(3)); // told once, not with each look
    let said = served.stop();
    for wrong in [
        "a.yaml:2: topic default/orders: default/orders has 3 partitions; they cannot shrink to 1",
        "b.yaml:2: subscription default/bad: filter, column",
        "c.yaml:4: ",
        "d.yaml:",
    ] {
        assert_eq!(said.matches(wrong).count(), 1, "{wrong}\n{said}");
    }
}

#[test]
fn a_subscription_is_described_with_its_mode_filter_routing_keys_rate_deadlines_and_dead_letters() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let spec = "{topic: orders, mode: shared, priorities: true, filter: 'size > 3', routingKeys: ['*.paid.#', b], ackDeadline: 90s, \
        rate: {messagesPerSecond: 1000, bytesPerSecond: 1Mi, burst: 7}, redelivery: {minBackoff: 100ms, maxBackoff: 5m}, \
        maxInFlight: 500, maxInFlightPerConsumer: 10, deadLetter: {maxDeliveries: 5, topic: dead}, \
        push: {endpoint: 'http://127.0.0.1:1/x', concurrency: 3, timeout: 2s}}";
    let plain = MAIL.replace("mail", "plain");
    let mail = MAIL.replace("{topic: orders, start: earliest}", spec);
    served.good(&["topic", "apply", "-f", "-"], &format!("{ORDERS}---\n{mail}---\n{plain}"));
    let json = served.json(&["subscription", "describe", "mail", "-o", "json"]);
    let right = serde_json::json!({"mode": "shared", "priorities": true, "filter": "size > 3", "routingKeys": ["*.paid.#", "b"],
        "messagesPerSecond": 1000, "bytesPerSecond": 1048576, "burst": 7, "ackDeadlineMs": 90000, "minBackoffMs": 100,
        "maxBackoffMs": 300000, "maxInFlight": 500, "maxInFlightPerConsumer": 10, "maxDeliveries": 5,
        "deadLetterTopic": "default/dead", "deadLetterTopicExists": false, "pushEndpoint": "http://127.0.0.1:1/x",
        "pushConcurrency": 3, "pushTimeoutMs": 2000});
    assert!(has(&json, &right), "{json}");
    let text = served.good(&["subscription", "describe", "mail"], "");
    for line in [
        "  mode         shared, by priority",
        "  filter       size > 3",
        "  routing keys *.paid.#, b",
        "  rate         1000 messages/s, 1.00 MiB/s, bursts of 7 messages",
        "  ack deadline 1m 30s",
        "  redelivery   after 100ms, after 5m at most",
        "  in flight    at most 500 in each partition, at most 10 of each consumer",
        "  dead letters after 5 failed deliveries, moved to default/dead",
        "  push         http://127.0.0.1:1/x, 3 at a time in each partition, answered within 2s",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    let json = served.json(&["subscription", "describe", "plain", "-o", "json"]);
    let right = serde_json::json!({"mode": "exclusive", "filter": null, "routingKeys": [], "messagesPerSecond": null,
        "ackDeadlineMs": 30000, "maxDeliveries": null, "pushEndpoint": null});
    assert!(has(&json, &right), "{json}");
    let text = served.good(&["subscription", "describe", "plain"], "");
    assert!(
        text.contains("  mode         exclusive\n") && !text.contains("filter") && !text.contains("dead letters"),
        "{text}"
    );
}

#[test]
fn lines_that_are_published_are_any_bytes_up_to_the_line_feed() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    served.good(&["topic", "apply", "-f", "-"], ORDERS);
    served.good(&["publish", "orders"], b"one\r\n\xff\xfe\0\r\n\n\r\nno line feed");
    let read = ["consume", "--topic", "orders", "--from", "earliest", "--max", "5", "-o", "json"];
    let printed = served.good(&read, "");
    let printed: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let values: Vec<&Value> = printed.iter().map(|message| &message["value"]).collect();
    assert_eq!(values, [&"one\r".into(), &Value::Null, &"".into(), &"\r".into(), &"no line feed".into()]);
    assert_eq!(printed[1]["valueBase64"], "//4ADQ==");
    assert_eq!(printed[0].get("valueBase64"), None);
}

#[test]
fn manifests_come_from_a_file_a_folder_or_standard_input_and_one_broker_takes_the_example() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/orders.yaml");
    let (code, applied, said) = served.run(&["topic", "apply", "-f", example], "");
    assert_eq!((code, applied.matches(" applied").count()), (0, 3), "{applied} {said}");
    assert!(said.contains("default/orders gets replicas: 1"), "what it is not as declared is said: {said}");
    let topic = served.json(&["topic", "describe", "orders", "-o", "json"]);
    assert_eq!((&topic["partitions"], &topic["replicas"]), (&6.into(), &1.into()));
    // a folder: what is wrong with one of its files is named, and the others are applied
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str| ORDERS.replace("orders", name);
    std::fs::write(folder.path().join("a.yaml"), named("a")).unwrap();
    std::fs::write(folder.path().join("b.yaml"), b"# na\xefve\n").unwrap();
    std::fs::write(folder.path().join("c.yml"), named("c")).unwrap();
    std::fs::write(folder.path().join("notes.txt"), "no manifest").unwrap();
    let path = folder.path().to_str().unwrap();
    let (code, applied, said) = served.run(&["topic", "apply", "-f", path, "-f", "-"], named("d"));
    assert_eq!(applied, "topic default/a applied\ntopic default/c applied\ntopic default/d applied\n");
    assert_eq!(code, 1);
    assert!(said.contains("b.yaml:1: is not UTF-8: it has the byte 0xef") && !said.contains("notes.txt"), "{said}");
    let (code, _, said) = served.run(&["topic", "apply", "-f", "-"], "kind: [\n");
    assert!(code == 1 && said.contains("standard input:"), "{said}");
    let empty = tempfile::tempdir().unwrap();
    for path in [empty.path().to_str().unwrap(), "-"] {
        let (code, _, said) = served.run(&["topic", "apply", "-f", path], "");
        assert!(code == 1 && said.contains("there is no Topic and no Subscription"), "{path}: {said}");
    }
    let (code, _, said) = served.run(&["topic", "apply", "-f", "/nowhere/at all"], "");
    assert!(code == 1 && said.contains("/nowhere/at all: cannot be read: No such file"), "{said}");
}

#[test]
fn the_manifest_in_the_readme_works_as_it_is() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let block = page.split("\n```").find(|block| block.contains("\nkind: Subscription\n")).unwrap();
    let (code, applied, said) = served.run(&["subscription", "apply", "-f", "-", "-o", "json"], block);
    assert_eq!(code, 0, "{said}");
    assert!(applied.contains("default/recommendation") && !said.contains("does not exist"), "{applied} {said}");
    let begun = || served.json(&["subscription", "describe", "recommendation", "-o", "json"])["partitions"].clone();
    until("it begins in all partitions", || begun().as_array().is_some_and(|list| list.len() == 6));
    served.good(&["publish", "signups", "--header", "region=us"], "not for it\n");
    served.good(&["publish", "signups", "--header", "region=eu"], "alice\n");
    assert_eq!(served.good(&["consume", "--subscription", "recommendation", "--max", "1", "-o", "raw"], ""), "alice\n");
}

#[test]
fn a_broker_that_cannot_be_spared_is_not_drained_and_the_refusal_says_why() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let refused = |args: &[&str]| {
        let (code, _, said) = served.run(args, "");
        assert_eq!(code, 1, "weir {args:?}: {said}");
        said
    };
    let said = refused(&["cluster", "drain", "1"]);
    assert!(said.contains("no other broker is active") && said.contains("weir cluster add"), "{said}");
    assert_eq!(served.json(&["cluster", "status", "-o", "json"])["brokers"][0]["phase"], "active");
    assert!(served.good(&["cluster", "add", "weir-0"], "").contains("has joined"));
    assert!(served.good(&["cluster", "drain", "1", "--cancel"], "").contains("stays"));
    // one that has not joined is not counted, and goes at once
    assert!(served.good(&["cluster", "add", "weir-1"], "").contains("may join"));
    assert!(refused(&["cluster", "drain", "1"]).contains("no other broker is active"));
    let status = served.json(&["cluster", "status", "-o", "json"]);
    let id = status["brokers"].as_array().unwrap().iter().find(|b| b["name"] == "weir-1").unwrap()["id"].to_string();
    assert!(served.good(&["cluster", "drain", &id], "").contains("removed"));
}

#[test]
fn a_seek_that_one_partition_cannot_follow_moves_none_and_names_it() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let two = ORDERS.replace("partitions: 1", "partitions: 3");
    served.good(&["subscription", "apply", "-f", "-"], &format!("{two}---\n{MAIL}"));
    for key in ["a", "b", "c", "d", "e"] {
        served.good(&["publish", "orders", "--key", key], "one\n");
    }
    let positions = || -> Vec<u64> {
        let json = served.json(&["subscription", "describe", "mail", "-o", "json"]);
        json["partitions"].as_array().unwrap().iter().map(|p| p["position"].as_u64().unwrap()).collect()
    };
    let most = served.json(&["topic", "describe", "orders", "-o", "json"])["assignment"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["highWatermark"].as_u64().unwrap())
        .max()
        .unwrap();
    let (code, _, said) = served.run(&["subscription", "seek", "mail", "--to", &most.to_string(), "-o", "json"], "");
    let error: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &error["error"]["reason"]), (1, &"OFFSET".into()), "{error}");
    let text = error["error"]["message"].as_str().unwrap();
    assert!(text.contains("of the log of partition ") && text.ends_with("; no partition was moved"), "{text}");
    assert_eq!(positions(), [0, 0, 0]);
    let (code, _, said) = served.run(&["subscription", "seek", "mail", "--to", "2999-01-01T00:00:00Z"], "");
    assert!(code == 2 && said.contains("--to") && said.contains("is a time to come"), "{said}");
    let (code, _, said) = served.run(&["consume", "--topic", "orders", "--from", "99"], "");
    assert!(code == 1 && said.contains("outside of the log of partition "), "{said}");
    assert_eq!(positions(), [0, 0, 0]);
    served.good(&["subscription", "seek", "mail", "--to", "latest"], "");
    assert_eq!(positions().iter().sum::<u64>(), 5);
}

/// A command whose standard input stays open.
struct Open {
    child: Child,
    input: std::process::ChildStdin,
}

impl Open {
    fn start(served: &Served, args: &[&str]) -> Self {
        let mut command = Command::new(WEIR);
        command.args(args).env("WEIR_SERVER", &served.server);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        Self { child, input }
    }

    /// Waits until it ends by itself; exit code and standard error.
    fn ends(mut self, what: &str) -> (i32, String) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > Duration::from_secs(20) {
                let _ = self.child.kill();
                panic!("{what}: it waits for standard input");
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        drop(self.input);
        (status.code().unwrap(), said)
    }
}

#[test]
fn a_publish_that_fails_ends_though_standard_input_stays_open() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let small = ORDERS.replace("spec: {", "spec: {maxMessageBytes: '200', ");
    served.good(&["topic", "apply", "-f", "-"], &small);
    let long = "x".repeat(1_000);
    for (args, line, says) in [
        (
            &["publish", "orders"][..],
            long.as_str(),
            "line 1 was not published; 0 other messages were published to orders",
        ),
        (&["publish", "orders", "-o", "json"], &long, "line 1 was not published"),
        (&["publish", "orders", "--delay", "1h"], &long, "0 messages were scheduled"),
        (&["publish", "nowhere"], "", "topic nowhere does not exist"),
        (&["publish", "nowhere", "--delay", "1h"], "", "topic nowhere does not exist"),
    ] {
        let mut open = Open::start(&served, args);
        let _ = open.input.write_all(format!("{line}\n").as_bytes()); // it may have ended before
        let (code, said) = open.ends(&format!("weir {args:?}"));
        assert!(code == 1 && said.contains(says), "weir {args:?}: {code} {said}");
    }
    // and what was read is scheduled, whatever comes later
    let mut open = Open::start(&served, &["publish", "orders", "--delay", "1h", "-o", "json"]);
    for offset in 0..2 {
        open.input.write_all(b"later\n").unwrap();
        let status = || served.run(&["topic", "unschedule", "orders", "0", &offset.to_string()], "").0;
        until("a line is scheduled while standard input stays open", || status() == 0);
    }
    drop(open.input);
    assert!(open.child.wait().unwrap().success());
}

#[test]
fn a_port_that_is_not_for_clients_is_named_with_what_answers_there_and_the_right_one() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let port = |kind: &str| served.said["brokers"][0][kind].as_str().unwrap().to_owned();
    let web = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = web.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in web.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let right = "; use the port for clients, 7420 unless it was chosen otherwise";
    for (server, what) in [
        (
            port("peer"),
            "a gRPC server without weir.v1.Metadata answers there, such as a broker's port for peers (7421)",
        ),
        (port("metrics"), "a web server answers there, such as a broker's port for metrics (9464)"),
        (other, "a web server answers there, such as a broker's port for metrics (9464)"),
    ] {
        let (code, _, said) = served.run(&["--server", &server, "topic", "list", "-o", "json"], "");
        let error: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((code, &error["error"]["reason"]), (1, &"WRONG_PORT".into()), "{error}");
        assert_eq!(error["error"]["message"], format!("{server} serves no clients: {what}{right}"));
    }
    let tls = format!("https://{}", port("client"));
    let (_, _, said) = served.run(&["--server", &tls, "topic", "list"], "");
    assert!(said.contains("brokers speak no TLS"), "{said}");
    // administrators are told where clients are served
    served.good(&["--server", &port("admin"), "topic", "apply", "-f", "-"], ORDERS);
    served.good(&["--server", &port("admin"), "publish", "orders"], "one\n");
    let read = ["--server", &port("admin"), "consume", "--topic", "orders", "--from", "0", "--max", "1", "-o", "raw"];
    assert_eq!(served.good(&read, ""), "one\n");
}

/// The row of docs/cli.md that says what a command prints.
fn documented(command: &str) -> String {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md")).unwrap();
    let row = page.lines().find(|l| l.split('|').nth(1).is_some_and(|c| c.contains(&format!("`{command}`"))));
    row.unwrap_or_else(|| panic!("docs/cli.md has no row of {command}")).to_owned()
}

/// The names of all fields of a JSON value, but for those that a user chooses.
fn fields<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => object.iter().for_each(|(name, value)| {
            found.push(name);
            fields(value, found);
        }),
        Value::Array(list) => list.iter().for_each(|value| fields(value, found)),
        _ => {}
    }
}

#[test]
fn with_o_json_every_command_prints_the_fields_that_are_documented_and_errors_are_json_too() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    let file = data.path().join("a.yaml");
    std::fs::write(
        &file,
        format!("{ORDERS}---\n{}", MAIL.replace("start:", "deadLetter: {maxDeliveries: 5, topic: dead}, start:")),
    )
    .unwrap();
    let (file, wrong) = (file.to_str().unwrap().to_owned(), data.path().join("b.yaml"));
    std::fs::write(&wrong, ORDERS.replace("orders", "dead").replace("partitions: 1", "partitions: many")).unwrap();
    let wrong = wrong.to_str().unwrap();
    // of each command, what it prints as it should
    let lines: [(&str, &str, &[&str]); 24] = [
        (
            "topic apply",
            r#"{"applied": [{"kind": "topic", "name": "default/orders"}, {"kind": "subscription", "name": "default/mail"}]}"#,
            &["-f", &file],
        ),
        ("subscription apply", r#"{"applied": [{"kind": "topic", "name": "default/orders"}]}"#, &["-f", &file]),
        ("publish", r#"{"partition": 0, "offset": 0}"#, &["orders"]),
        ("publish", r#"{"partition": 0, "offset": 0, "scheduled": true}"#, &["orders", "--delay", "1h"]),
        (
            "topic unschedule",
            r#"{"topic": "default/orders", "partition": 0, "offset": 0, "takenBack": true}"#,
            &["orders", "0", "0"],
        ),
        (
            "consume",
            r#"{"topic": "default/orders", "offset": 0, "value": "a message"}"#,
            &["--topic", "orders", "--from", "0", "--max", "1"],
        ),
        ("topic list", r#"[{"name": "default/orders"}]"#, &[]),
        ("topic describe", r#"{"name": "default/orders", "partitions": 1}"#, &["orders"]),
        ("subscription list", r#"[{"name": "default/mail", "topic": "default/orders"}]"#, &[]),
        (
            "subscription describe",
            r#"{"name": "default/mail", "backlog": 1, "deadLetterTopicExists": false}"#,
            &["mail"],
        ),
        (
            "subscription snapshot",
            r#"{"subscription": "default/mail", "snapshot": "a", "taken": true}"#,
            &["mail", "a"],
        ),
        ("subscription snapshots", r#"[{"name": "a", "holds": 1}]"#, &["mail"]),
        (
            "subscription snapshot",
            r#"{"subscription": "default/mail", "snapshot": "a", "deleted": true}"#,
            &["mail", "a", "--delete"],
        ),
        ("subscription seek", r#"{"name": "default/mail", "moved": true}"#, &["mail", "--to", "earliest"]),
        ("topic apply", r#"{"applied": [{"kind": "topic", "name": "default/dead"}], "wrong": []}"#, &["-f", "-"]),
        ("subscription redrive", r#"{"name": "default/mail", "putBack": 0, "left": []}"#, &["mail"]),
        ("cluster status", r#"{"leaderless": 0, "brokers": [{"name": "weir-0", "phase": "active"}]}"#, &[]),
        ("cluster add", r#"{"id": 1, "name": "weir-0", "phase": "active"}"#, &["weir-0"]),
        ("cluster drain", r#"{"id": 1, "phase": "active"}"#, &["1", "--cancel"]),
        ("bench", r#"{"records": 5}"#, &["produce", "--topic", "orders", "--records", "5"]),
        ("bench verify", r#"{"lost": 0, "twice": 0}"#, &["--topic", "orders", "--seconds", "1", "--keys", "1"]),
        ("subscription delete", r#"{"name": "default/mail", "deleted": true}"#, &["mail"]),
        ("topic delete", r#"{"name": "default/orders", "deleted": true}"#, &["orders"]),
        ("topic list", r#"[{"name": "default/dead"}]"#, &[]),
    ];
    for (command, expected, more) in lines {
        let words: Vec<&str> = command.split(' ').chain(more.iter().copied()).chain(["-o", "json"]).collect();
        let input = if more.contains(&"-") { ORDERS.replace("orders", "dead") } else { "a message\n".to_owned() };
        let out = served.good(&words, &input);
        let printed: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("weir {words:?}: {e}: {out}"));
        assert!(has(&printed, &serde_json::from_str(expected).unwrap()), "weir {words:?}: {printed}");
        let (mut found, documented) = (Vec::new(), documented(command));
        // one topic is documented by the list of all
        let documented =
            if command == "topic describe" { documented + &self::documented("topic list") } else { documented };
        fields(&printed, &mut found);
        let unknown = found.iter().find(|field| !documented.contains(&format!("`{field}`")));
        assert_eq!(unknown, None, "weir {command}, docs/cli.md");
    }
    for (args, code, reason, says) in [
        (&["topic", "describe", "nowhere"][..], 1, "NO_TOPIC", "topic nowhere does not exist"),
        (&["subscription", "describe", "nothing"], 1, "NO_SUBSCRIPTION", "does not exist"),
        (&["topic", "delete", "nowhere"], 1, "NOT_FOUND", "does not exist"),
        (&["cluster", "drain", "1"], 1, "TOO_FEW_BROKERS", "no other broker is active"),
        (
            &["topic", "apply", "-f", wrong],
            1,
            "FAILED",
            "b.yaml:4: spec.partitions: must be a whole number from 1 to 10000, not 'many'",
        ),
        (&["cluster", "drain", "0"], 2, "USAGE", "invalid value '0' for '<ID>'"),
        (&["topic", "frobnicate"], 2, "USAGE", "unrecognized subcommand"),
        (&["--server", "127.0.0.1:1", "topic", "list"], 1, "DEADLINE", "no broker was reached"),
        (&["serve", "--listen", "0.0.0.0:1", "--data", "x"], 2, "USAGE", "--advertise-host"),
    ] {
        let (ended, _, said) = served.run(&[args, &["--output=json"]].concat(), "");
        let error: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("weir {args:?}: {e}: {said}"));
        assert_eq!((ended, error["error"]["reason"].as_str()), (code, Some(reason)), "weir {args:?}: {error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "weir {args:?}: {error}");
    }
}

/// Returns true if a value has all that another one has.
fn has(value: &Value, part: &Value) -> bool {
    match (value, part) {
        (Value::Object(value), Value::Object(part)) => {
            part.iter().all(|(name, part)| value.get(name).is_some_and(|v| has(v, part)))
        }
        (Value::Array(value), Value::Array(part)) => part.iter().all(|part| value.iter().any(|v| has(v, part))),
        _ => value == part,
    }
}

/// Exit code and standard error of a command whose standard output is this file.
fn writes_to(server: &str, args: &[&str], path: &str) -> (i32, String) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let mut command = Command::new(WEIR);
    command.args(args).env("WEIR_SERVER", server).env("WEIR_LOG", "warn");
    command.stdin(Stdio::piped()).stdout(file).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a message\n").unwrap();
    let out = child.wait_with_output().unwrap();
    (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn output_that_cannot_be_written_is_an_error_of_every_command() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = manifests.path().join("a.yaml");
    let dead = ORDERS.replace("orders", "dead");
    let mail = MAIL.replace("start:", "deadLetter: {maxDeliveries: 5, topic: dead}, start:");
    std::fs::write(&file, format!("{ORDERS}---\n{dead}---\n{mail}")).unwrap();
    let file = file.to_str().unwrap();
    let served = Served::start(data.path(), manifests.path());
    until("the manifests are applied", || served.run(&["subscription", "describe", "mail"], "").0 == 0);
    served.good(&["publish", "orders"], "one\ntwo\nthree\n");
    served.good(&["subscription", "snapshot", "mail", "before"], "");
    served.good(&["publish", "orders", "--delay", "1h"], "later\n");
    let (one, three) = (data.path().join("one"), data.path().join("three"));
    let with_path = |line: &&[&str]| -> Vec<String> {
        let path = if line[0] == "serve" { one.to_str().unwrap() } else { file };
        line.iter().map(|word| word.replace(PATH, path)).collect()
    };
    let three = ["serve", "--brokers", "3", "--listen", "127.0.0.1:0", "--data", three.to_str().unwrap()];
    let more: [&[&str]; 5] =
        [&["--help"], &["topic", "apply", "--help"], &["--version"], &three, &["consume", "--subscription", "mail"]];
    for line in more.iter().chain(COMMANDS).map(with_path) {
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let (code, said) = writes_to(&served.server, &line, "/dev/full");
        let right = "cannot write output: No space left on device (os error 28)";
        assert!(said.matches(right).count() == 1, "weir {line:?}: {said:?}");
        assert_eq!(code, 1, "weir {line:?}");
    }
    // nor does a command fail since nothing can be said beside its output
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(WEIR);
    command.args(["publish", "dead", "--file", file]).env("WEIR_SERVER", &served.server).stderr(full);
    assert!(command.status().unwrap().success());
}

#[test]
fn where_nobody_reads_the_output_it_ends_without_a_word() {
    let (data, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::start(data.path(), manifests.path());
    for args in [&["completions", "bash"][..], &["--help"], &["cluster", "status"], &["topic", "list", "-o", "json"]] {
        let mut weir = Command::new(WEIR);
        weir.args(args).env("WEIR_SERVER", &served.server).stdin(Stdio::null()).stderr(Stdio::piped());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader); // as `weir completions bash | true` may
        let out = weir.stdout(writer).spawn().unwrap().wait_with_output().unwrap();
        let ended = (out.status.code(), String::from_utf8(out.stderr).unwrap());
        assert_eq!(ended, (Some(141), String::new()), "weir {args:?}");
    }
}
