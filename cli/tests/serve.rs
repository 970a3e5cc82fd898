//! `weir serve` beside others: its brokers end with it, and a folder, port or address that cannot be right is one clear error.

mod cluster;

use cluster::runs;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WEIR: &str = env!("CARGO_BIN_EXE_weir");

/// What takes moments takes no longer, also beside a compiler.
const PATIENCE: Duration = Duration::from_secs(120);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn serve(data: &Path, more: &[&str]) -> Command {
    let mut serve = Command::new(WEIR);
    serve.args(["serve", "-o", "json"]).args(more).env("WEIR_LOG", "warn");
    if !more.contains(&"--data") {
        serve.arg("--data").arg(data);
    }
    serve.stdout(Stdio::piped()).stderr(Stdio::piped());
    serve
}

/// One that serves; killed with its brokers at the end.
struct Serving {
    child: Child,
    said: Value,
}

impl Serving {
    fn start(data: &Path, more: &[&str]) -> Self {
        let mut child = serve(data, more).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, said: serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}")) }
    }

    fn all(&self, field: &str) -> Vec<String> {
        let brokers = self.said["brokers"].as_array().unwrap().iter();
        brokers.map(|b| b[field].as_str().map_or_else(|| b[field].to_string(), str::to_owned)).collect()
    }

    fn weir(&self, args: &[&str]) -> (bool, String) {
        let out = Command::new(WEIR).args(args).env("WEIR_SERVER", self.all("client").join(",")).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // none of its brokers holds the folder any more once this is over
        let pids = self.all("pid");
        until("the brokers end", || !pids.iter().any(|pid| runs(pid)));
    }
}

/// Where three brokers, and their metrics, can listen now.
fn free_ports() -> (String, String) {
    let port = cluster::free_port();
    (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", port + 40))
}

/// Exit code and standard error of one that must not serve.
fn refused(mut command: Command) -> (i32, String) {
    let mut child = command.spawn().unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("it has not ended");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (mut said, mut out) = (String::new(), String::new());
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(out, "", "nothing serves: {said}");
    assert!(!said.contains("panicked"), "{said}");
    (status.code().unwrap_or(-1), said)
}

#[test]
fn brokers_end_with_the_process_that_started_them_also_where_it_is_killed() {
    let data = tempfile::tempdir().unwrap();
    let (listen, metrics) = free_ports();
    let arguments = ["--brokers", "3", "--listen", &listen, "--metrics-listen", &metrics];
    let mut first = Serving::start(data.path(), &arguments);
    let pids = first.all("pid");
    assert_eq!(pids.len(), 3);
    assert!(pids.iter().all(|pid| runs(pid)));
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    until("its brokers end with it", || !pids.iter().any(|pid| runs(pid)));
    // the same folder again: those it names run, and answer
    let second = Serving::start(data.path(), &arguments);
    assert!(second.all("pid").iter().all(|pid| runs(pid)), "{}", second.said);
    let (done, said) = second.weir(&["cluster", "status"]);
    assert!(done && said.contains("weir-2"), "{said}");
}

/// The metadata names the addresses that brokers had before, and only a leader can change it.
#[test]
fn brokers_that_are_started_again_at_other_addresses_find_each_other_and_have_what_was_published() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = |name: &str, text: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let topic = "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: t}\nspec: {partitions: 3, replicas: 3}\n";
    let (topic, one, two) = (file("t.yaml", topic), file("one", "first words"), file("two", "second words"));
    let arguments = ["--brokers", "3", "--listen", "127.0.0.1:0"];
    let good = |serving: &Serving, args: &[&str]| {
        let mut result = String::new();
        // another broker may be asked than the one before, and hear of the topic a moment later
        until(&format!("{args:?}"), || {
            let (done, said) = serving.weir(args);
            assert!(done || said.contains("does not exist"), "{args:?}: {said}");
            result = said;
            done
        });
        result
    };
    let first = Serving::start(data.path(), &arguments);
    good(&first, &["topic", "apply", "-f", &topic]);
    good(&first, &["publish", "t", "--key", "k", "--file", &one]);
    let (clients, peers) = (first.all("client"), first.all("peer"));
    drop(first);
    // somebody else has their ports by now, and says nothing
    let _taken: Vec<TcpListener> = peers.iter().map(|peer| TcpListener::bind(peer).unwrap()).collect();
    let second = Serving::start(data.path(), &arguments);
    assert!(second.all("peer").iter().all(|peer| !peers.contains(peer)), "{}", second.said);
    let status = good(&second, &["cluster", "status", "-o", "json"]);
    assert!(
        second.all("client").iter().all(|client| status.contains(client)),
        "clients are told where they are: {status}"
    );
    assert!(!clients.iter().any(|client| status.contains(client)), "{status}");
    good(&second, &["publish", "t", "--key", "k", "--file", &two]);
    let read = good(&second, &["consume", "--topic", "t", "--from", "earliest", "--max", "2"]);
    assert!(read.contains("first words") && read.contains("second words"), "{read}");
}

#[test]
fn the_line_that_says_it_serves_comes_when_the_cluster_answers() {
    let (data, file) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let serving = Serving::start(data.path(), &["--brokers", "3", "--listen", "127.0.0.1:0"]);
    assert!(serving.all("id").iter().all(|id| id != "0"), "{}", serving.said);
    std::fs::write(file.path(), "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: t}\nspec: {}\n").unwrap();
    let (done, said) = serving.weir(&["topic", "apply", "-f", file.path().to_str().unwrap()]);
    assert!(done && said.contains("topic default/t applied"), "{said}");
}

/// Linux gives any of these to a connection, also to one that is to reach a broker that is being started again on that port.
#[test]
fn free_ports_are_none_that_connections_are_given() {
    let data = tempfile::tempdir().unwrap();
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let range: Vec<u16> = range.split_whitespace().map(|port| port.parse().unwrap()).collect();
    if range[0] <= 10_000 {
        println!("connections are given all ports here: not tested");
        return;
    }
    let serving = Serving::start(data.path(), &["--brokers", "3", "--listen", "127.0.0.1:0"]);
    for at in ["client", "peer", "admin", "metrics"].iter().flat_map(|listener| serving.all(listener)) {
        let port: u16 = at.rsplit(':').next().unwrap().parse().unwrap();
        assert!(!(range[0]..=range[1]).contains(&port), "{at}");
    }
}

#[test]
fn a_folder_or_port_in_use_is_one_error_that_names_it_and_the_argument_that_changes_it() {
    let (data, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let serving = Serving::start(data.path(), &["--brokers", "3", "--listen", "127.0.0.1:0"]);
    let (code, said) = refused(serve(data.path(), &["--brokers", "3", "--listen", "127.0.0.1:0"]));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(data.path().to_str().unwrap()) && said.contains("--data"), "{said}");
    assert_eq!(said.lines().count(), 1, "one error: {said}");
    for brokers in ["1", "3"] {
        let taken = serving.all("client")[0].clone();
        let (code, said) = refused(serve(other.path(), &["--brokers", brokers, "--listen", &taken]));
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(&format!("cannot listen on {taken} for clients of weir-0")), "{said}");
        assert!(said.contains("--listen") && said.lines().count() == 1, "one error: {said}");
        // the second broker's metrics, say, of one that listens elsewhere
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = held.local_addr().unwrap().to_string();
        let arguments = ["--brokers", brokers, "--listen", "127.0.0.1:0", "--metrics-listen", &taken];
        let (code, said) = refused(serve(other.path(), &arguments));
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(&taken) && said.contains("--metrics-listen"), "{said}");
    }
    // the one that serves is not disturbed
    let (done, said) = serving.weir(&["cluster", "status"]);
    assert!(done, "{said}");
}

/// The brokers of a `weir serve` that was killed hold its ports for some moments yet; whoever starts it again need not know that.
#[test]
fn a_folder_and_ports_that_become_free_in_a_moment_are_waited_for() {
    let data = tempfile::tempdir().unwrap();
    let (listen, metrics) = free_ports();
    let folder = std::fs::File::open(data.path()).unwrap();
    folder.try_lock().unwrap();
    let port = TcpListener::bind(&listen).unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drop(folder);
        std::thread::sleep(Duration::from_millis(400));
        drop(port);
    });
    let serving = Serving::start(data.path(), &["--listen", &listen, "--metrics-listen", &metrics]);
    holder.join().unwrap();
    assert_eq!(serving.all("client"), [listen]);
}

#[test]
fn addresses_that_cannot_be_right_are_refused_with_what_would_be() {
    let data = tempfile::tempdir().unwrap();
    for (arguments, remedy) in [
        (&["--listen", "127.0.0.1:65535"][..], "ports end at 65535"),
        (&["--listen", "127.0.0.1:65520", "--brokers", "3"], "ports end at 65535"),
        (&["--metrics-listen", "127.0.0.1:65535", "--listen", "127.0.0.1:0", "--brokers", "2"], "ports end at 65535"),
        (&["--listen", "127.0.0.1:9462"], "overlap"),
        (&["--listen", "0.0.0.0:0"], "--advertise-host"),
        (&["--listen", "[::]:0", "--brokers", "3"], "--advertise-host"),
        (&["--listen", "0.0.0.0:0", "--advertise-host", "0.0.0.0"], "names no machine"),
        (&["--listen", "0.0.0.0:0", "--advertise-host", "laptop:7420"], "a host without a port"),
        (&["--listen", "7420"], "use host:port"),
        (&["--listen", "127.0.0.1:70000"], "0 to 65535"),
        (&["--brokers", "0"], "1..=9"),
        (&["--brokers", "-1"], "1..=9"),
        (&["--brokers", "3", "--socket", "s"], "cannot be used with"),
    ] {
        let (code, said) = refused(serve(data.path(), arguments));
        assert_eq!(code, 2, "{arguments:?}: {said}");
        assert!(said.contains(remedy), "{arguments:?}: {said}");
    }
    for (arguments, remedy) in [
        (&["--manifests", "/nowhere/at/all"][..], "--manifests"),
        (&["--data", "/dev/null/x"], "/dev/null/x"),
        (&["--data", ""], "--data"),
    ] {
        let (code, said) = refused(serve(data.path(), arguments));
        assert!(code > 0 && said.contains(remedy), "{arguments:?}: {said}");
    }
}

#[test]
fn clients_are_told_an_address_that_reaches_the_broker() {
    let data = tempfile::tempdir().unwrap();
    for brokers in ["1", "3"] {
        let arguments = ["--brokers", brokers, "--listen", "0.0.0.0:0", "--advertise-host", "localhost"];
        let serving = Serving::start(&data.path().join(brokers), &arguments);
        assert!(serving.all("client").iter().all(|at| at.starts_with("localhost:")), "{}", serving.said);
        let (done, said) = serving.weir(&["cluster", "status", "-o", "json"]);
        let status: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        assert!(done && status["brokers"][0]["client"].as_str().unwrap().starts_with("localhost:"), "{said}");
    }
    let named = Serving::start(&data.path().join("named"), &["--listen", "localhost:0"]);
    assert!(named.weir(&["cluster", "status"]).0, "{}", named.said);
}

#[test]
fn a_folder_of_one_broker_is_not_served_as_that_of_several() {
    let data = tempfile::tempdir().unwrap();
    let several = data.path().join("several");
    drop(Serving::start(&data.path().join("one"), &["--listen", "127.0.0.1:0"]));
    drop(Serving::start(&several, &["--listen", "127.0.0.1:0", "--brokers", "3"]));
    let (code, said) = refused(serve(&data.path().join("one"), &["--listen", "127.0.0.1:0", "--brokers", "3"]));
    assert!(code == 1 && said.contains("holds the data of one broker"), "{said}");
    let (code, said) = refused(serve(&several, &["--listen", "127.0.0.1:0"]));
    assert!(code == 1 && said.contains("holds the data of several brokers"), "{said}");
}
