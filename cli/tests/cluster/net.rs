//! Brokers in network namespaces of their own around one router, in whose namespace the test runs: links between them are cut,
//! lossy or slow. Needs root; everything made here ends with the test.

use super::WEIR;
use std::process::{Child, Command, Stdio};

/// Says to the test that it runs within the router's namespace already.
const INSIDE: &str = "WEIR_TEST_NAMESPACE";

fn run(args: &[&str]) -> bool {
    Command::new(args[0])
        .args(&args[1..])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

fn must(args: &[&str]) {
    let output = Command::new(args[0]).args(&args[1..]).output().unwrap_or_else(|e| panic!("{}: {e}", args[0]));
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a test of this program again within a namespace made for it; `true` there, where the test is to go on.
pub(crate) fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let _turn = super::TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let namespace = format!("weir-{}-{test}", std::process::id());
    if !run(&["iptables", "--version"]) || !run(&["ip", "netns", "add", &namespace]) {
        println!("network namespaces cannot be made here (root with iproute2 and iptables can): not tested");
        return false;
    }
    let mut again = Command::new("ip");
    again.args(["netns", "exec", &namespace]).arg(std::env::current_exe().unwrap());
    let status = again.args(["--exact", test, "--nocapture"]).env(INSIDE, &namespace).status();
    run(&["ip", "netns", "del", &namespace]);
    assert!(status.unwrap().success(), "see above");
    false
}

/// Brokers `weir-0`.. and the links between them.
pub(crate) struct Net {
    router: String,
    count: usize,
    brokers: Vec<Child>,
    data: tempfile::TempDir,
}

impl Net {
    /// Within the namespace that [`inside`] made: so many brokers, each behind a link of its own.
    pub(crate) fn start(count: usize) -> Self {
        let router = std::env::var(INSIDE).expect("inside");
        must(&["ip", "link", "set", "lo", "up"]);
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let mut net = Self { router, count, brokers: Vec::new(), data: tempfile::tempdir().unwrap() };
        for at in 0..count {
            let (namespace, link, gate) = (net.namespace(at), format!("b{at}"), format!("10.77.{at}.1"));
            must(&["ip", "netns", "add", &namespace]);
            must(&["ip", "link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &namespace]);
            must(&["ip", "addr", "add", &format!("{gate}/24"), "dev", &link]);
            must(&["ip", "link", "set", &link, "up"]);
            let within = ["ip", "-n", &namespace];
            must(&[&within[..], &["addr", "add", &format!("{}/24", Self::host(at)), "dev", "eth0"]].concat());
            must(&[&within[..], &["link", "set", "eth0", "up"]].concat());
            must(&[&within[..], &["link", "set", "lo", "up"]].concat());
            must(&[&within[..], &["route", "add", "default", "via", &gate]].concat());
        }
        let peers: Vec<String> = (0..count).map(|at| format!("weir-{at}={}:7421", Self::host(at))).collect();
        for at in 0..count {
            let broker = net.broker(at, &peers.join(",")).spawn().unwrap();
            net.brokers.push(broker);
        }
        net
    }

    fn broker(&self, at: usize, peers: &str) -> Command {
        let mut broker = Command::new("ip");
        broker.args(["netns", "exec", &self.namespace(at), WEIR, "__broker", "--name", &format!("weir-{at}")]);
        broker.arg("--data").arg(self.data.path().join(format!("weir-{at}")));
        for (listener, port) in [("client", 7420), ("peer", 7421), ("admin", 7422), ("metrics", 9464)] {
            broker.args([format!("--{listener}-listen"), format!("{}:{port}", Self::host(at))]);
        }
        broker.args(["--peers", peers]).env("WEIR_LOG", "error");
        broker
    }

    fn namespace(&self, at: usize) -> String {
        format!("{}-{at}", self.router)
    }

    fn host(at: usize) -> String {
        format!("10.77.{at}.2")
    }

    /// Where a broker serves clients.
    pub(crate) fn client_address(at: usize) -> String {
        format!("{}:7420", Self::host(at))
    }

    /// Where all do, for a client.
    pub(crate) fn servers(&self) -> String {
        (0..self.brokers.len()).map(Self::client_address).collect::<Vec<_>>().join(",")
    }

    /// Nothing sent by the one reaches the other any more; the other way is left as it is.
    pub(crate) fn cut_one_way(&self, from: usize, to: usize) {
        must(&["iptables", "-A", "FORWARD", "-s", &Self::host(from), "-d", &Self::host(to), "-j", "DROP"]);
    }

    pub(crate) fn cut(&self, one: usize, other: usize) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Between brokers, such a part of all packets is lost.
    pub(crate) fn lose(&self, part: f64) {
        must(&[
            "iptables",
            "-A",
            "FORWARD",
            "-m",
            "statistic",
            "--mode",
            "random",
            "--probability",
            &part.to_string(),
            "-j",
            "DROP",
        ]);
    }

    /// All links carry so much, and delay what is more by up to so many ms.
    pub(crate) fn slow(&self, mbit: u32, queue_ms: u32) {
        for at in 0..self.brokers.len() {
            let (rate, latency) = (format!("{mbit}mbit"), format!("{queue_ms}ms"));
            let link = format!("b{at}");
            must(&[
                "tc", "qdisc", "add", "dev", &link, "root", "tbf", "rate", &rate, "burst", "64kb", "latency", &latency,
            ]);
        }
    }

    /// Everything reaches everybody again, at once.
    pub(crate) fn heal(&self) {
        must(&["iptables", "-F", "FORWARD"]);
        for at in 0..self.brokers.len() {
            run(&["tc", "qdisc", "del", "dev", &format!("b{at}"), "root"]);
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for broker in &mut self.brokers {
            let _ = broker.kill();
            let _ = broker.wait();
        }
        for at in 0..self.count {
            run(&["ip", "netns", "del", &self.namespace(at)]);
        }
    }
}
