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
    assert!(served.good(&["topic", "unschedule", "orders", "0", &offset], "").contains("taken back"));
    assert_ne!(served.run(&["topic", "unschedule", "orders", "0", &offset], "").0, 0, "only once");
    // out
    let read = |args: &[&str]| served.good(&[&["consume"], args].concat(), "");
    let first = read(&["--topic", "orders", "--from", "earliest", "--max", "1", "-o", "json"]);
    let first: Value = serde_json::from_str(&first).unwrap();
    assert_eq!((&first["key"], &first["value"], &first["offset"]), (&"alice".into(), &"hello".into(), &0.into()));
    assert_eq!(first["headers"], serde_json::json!({"kind": "greeting", "lang": "en"}));
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
fn where_nobody_reads_the_output_it_ends_without_a_word() {
    let mut weir = Command::new(WEIR);
    weir.args(["completions", "bash"]).stdin(Stdio::null()).stderr(Stdio::piped());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader); // as `weir completions bash | true` may
    let out = weir.stdout(writer).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((out.status.code(), String::from_utf8(out.stderr).unwrap()), (Some(141), String::new()));
}
