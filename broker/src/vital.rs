//! Threads and tasks that a broker cannot live without: the process ends with one of them, with its own exit code. A broker that
//! lives on without its core, its disk or a listener answers its probes and does nothing.

use crate::output;
use std::fmt::Display;
use std::future::Future;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Exit code after a failed write or sync, and after a panic; EX_IOERR of sysexits.h.
pub const FAILED: i32 = 74;

/// RocksDB waits at a process's end for its background work: no longer than this.
const EXIT_WITHIN: Duration = Duration::from_secs(1);

/// Ends the process with a code, at once.
pub fn exit(code: i32) -> ! {
    std::thread::spawn(|| {
        std::thread::sleep(EXIT_WITHIN);
        std::process::abort();
    });
    std::process::exit(code);
}

/// No retry and no further acknowledgement: nothing a disk reports after a failed sync can be believed.
pub fn die(why: &str) -> ! {
    output::note(format_args!("weir-broker: {why}; ending so that nothing unsynced is acknowledged"));
    exit(FAILED)
}

/// Ends the process if the scope that holds it is left by a panic.
pub struct EndOnPanic(pub &'static str);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            die(&format!("{} panicked", self.0));
        }
    }
}

/// Spawns a task whose panic ends the process.
pub fn spawn(name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(async move {
        let _end = EndOnPanic(name);
        task.await;
    })
}

/// Spawns a server. The process also ends where it returns: nobody would be accepted any more.
pub fn serve<E: Display>(
    name: &'static str,
    server: impl Future<Output = Result<(), E>> + Send + 'static,
) -> JoinHandle<()> {
    spawn(name, async move {
        match server.await {
            Ok(()) => die(&format!("{name} ended")),
            Err(error) => die(&format!("{name} ended: {error}")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use clap::Parser as _;
    use std::process::Command;
    use std::time::Instant;

    /// Names what panics in [`victim`], in the process that a test starts from its own program.
    const VICTIM: &str = "WEIR_TEST_VICTIM";

    /// Runs a broker in which something panics; the process is to end although nobody calls it any more.
    #[tokio::test(flavor = "multi_thread")]
    async fn victim() {
        let Ok(victim) = std::env::var(VICTIM) else { return };
        let data = tempfile::tempdir().unwrap();
        let mut arguments = vec!["weir-broker".to_owned(), format!("--data={}", data.path().display())];
        arguments.extend(["client", "peer", "admin", "metrics"].map(|l| format!("--{l}-listen=127.0.0.1:0")));
        let running = crate::start(Config::parse_from(arguments)).await.unwrap();
        running.ready().await;
        match victim.as_str() {
            "caller" | "thread" => running.panic_core(victim == "thread"),
            "task" => drop(spawn("a task", async { panic!("as a fault would") })),
            "server" => drop(serve("a server", async { Err::<(), _>("its listener is closed") })),
            "disk" => drop(std::thread::spawn(|| {
                let _end = EndOnPanic("the disk's thread");
                panic!("as a fault would");
            })),
            other => panic!("{other}"),
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
        std::process::exit(0);
    }

    #[test]
    fn the_process_ends_with_each_thread_and_task_it_cannot_live_without() {
        for name in ["caller", "thread", "task", "server", "disk"] {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "vital::tests::victim", "--nocapture"]).env(VICTIM, name);
            let begun = Instant::now();
            let status = child.stdout(std::process::Stdio::null()).status().unwrap();
            assert_eq!(status.code(), Some(FAILED), "{name}, after {:?}", begun.elapsed());
        }
    }
}
