//! The command line as people and scripts use it, against an embedded broker fed by a folder of manifests.

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
    fn run(&self, args: &[&str], input: &str) -> (i32, String, String) {
        let mut command = Command::new(WEIR);
        command.args(args).env("WEIR_SERVER", &self.server);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
    }

    fn good(&self, args: &[&str], input: &str) -> String {
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
        assert!(begun.elapsed() < Duration::from_secs(120), "{what}");
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
    assert!(
        served.good(&["topic", "unschedule", "orders", "0", &offset, "--topic-id", &id], "").contains("taken back")
    );
    assert_ne!(served.run(&["topic", "unschedule", "orders", "0", &offset], "").0, 0, "only once");
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
        (&["topic", "apply", "-f", wrong], 1, "FAILED", "b.yaml:4: spec.partitions"),
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
    std::fs::write(manifests.path().join("a.yaml"), format!("{ORDERS}---\n{MAIL}")).unwrap();
    let file = manifests.path().join("a.yaml");
    let file = file.to_str().unwrap();
    let served = Served::start(data.path(), manifests.path());
    until("the manifests are applied", || served.run(&["subscription", "describe", "mail"], "").0 == 0);
    served.good(&["publish", "orders"], "one\ntwo\nthree\n");
    served.good(&["subscription", "snapshot", "mail", "before"], "");
    let later = served.json(&["publish", "orders", "--delay", "1h", "-o", "json", "--file", file]);
    let (offset, one, three) = (later["offset"].to_string(), data.path().join("one"), data.path().join("three"));
    let lines: [&[&str]; 23] = [
        &["--help"],
        &["topic", "apply", "--help"],
        &["--version"],
        &["completions", "bash"],
        &["topic", "list"],
        &["topic", "describe", "orders"],
        &["topic", "apply", "-f", file],
        &["topic", "unschedule", "orders", "0", &offset],
        &["subscription", "list"],
        &["subscription", "describe", "mail"],
        &["subscription", "snapshot", "mail", "after"],
        &["subscription", "snapshots", "mail"],
        &["subscription", "seek", "mail", "--to", "earliest"],
        &["cluster", "status"],
        &["cluster", "add", "weir-1"],
        &["cluster", "drain", "1", "--cancel"],
        &["consume", "--topic", "orders", "--from", "earliest"],
        &["consume", "--subscription", "mail"],
        &["publish", "orders", "-o", "json"],
        &["bench", "latency", "--topic", "orders", "--records", "1"],
        &["bench", "verify", "--topic", "orders", "--seconds", "1", "--keys", "1"],
        &["serve", "--listen", "127.0.0.1:0", "--data", one.to_str().unwrap()],
        &["serve", "--brokers", "3", "--listen", "127.0.0.1:0", "--data", three.to_str().unwrap()],
    ];
    for args in lines {
        let (code, said) = writes_to(&served.server, args, "/dev/full");
        let right = "cannot write output: No space left on device (os error 28)";
        assert!(said.matches(right).count() == 1, "weir {args:?}: {said:?}");
        assert_eq!(code, 1, "weir {args:?}");
    }
    // nor does a command fail since nothing can be said beside its output
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(WEIR);
    command.args(["publish", "orders", "--file", file]).env("WEIR_SERVER", &served.server).stderr(full);
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
