//! Processes of a benchmark: started on free ports in a folder of the run's own, measured, and ended with it.

use anyhow::{Context as _, bail, ensure};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// No step of a benchmark takes longer.
const STEP_MAX: Duration = Duration::from_secs(600);

/// A folder for one system's run, with what was started in it.
pub(crate) struct Stage {
    folder: tempfile::TempDir,
    running: Vec<(String, Child)>,
}

impl Stage {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, running: Vec::new() })
    }

    /// A folder in it, made.
    pub(crate) fn folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// A file in it.
    pub(crate) fn file(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Starts a server; what it prints goes to a file of its name.
    pub(crate) fn start(&mut self, name: &str, command: &mut Command) -> anyhow::Result<()> {
        let log = File::create(self.folder.path().join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{name} does not start"))?;
        self.running.push((name.to_owned(), child));
        Ok(())
    }

    /// Its process.
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.running.iter().find(|(n, _)| n == name).map(|(_, c)| c.id())
    }

    /// What a server has printed.
    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Waits until a server takes connections.
    pub(crate) fn until_open(&mut self, name: &str, at: SocketAddr) -> anyhow::Result<()> {
        let begun = Instant::now();
        while TcpStream::connect(at).is_err() {
            let ended = self.running.iter_mut().find(|(n, _)| n == name).and_then(|(_, c)| c.try_wait().ok().flatten());
            let late = begun.elapsed() > Duration::from_secs(90);
            ensure!(ended.is_none() && !late, "{name} does not listen on {at} ({ended:?}):\n{}", self.log(name));
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Processor time of all servers, seconds.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.running.iter().map(|(_, c)| cpu_seconds(c.id())).sum()
    }

    /// As [`handed`], of all servers.
    pub(crate) fn handed(&self) -> (f64, f64) {
        self.running.iter().map(|(_, c)| handed(c.id())).fold((0.0, 0.0), |sum, next| (sum.0 + next.0, sum.1 + next.1))
    }

    /// The largest resident memory of the servers and of what they started, MiB.
    pub(crate) fn memory_mib(&self) -> f64 {
        let all: Vec<u32> = self.running.iter().map(|(_, c)| c.id()).flat_map(family).collect();
        all.into_iter().map(|pid| status_kib(pid, "VmHWM:") / 1024.0).fold(0.0, f64::max)
    }
}

/// Processor time a process and those it started have used, seconds.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let ticks = |pid: u32| -> Option<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // behind the name, which may hold anything: the state, and ten numbers more
        let rest: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(rest.get(11)?.parse::<f64>().ok()? + rest.get(12)?.parse::<f64>().ok()?)
    };
    family(pid).into_iter().filter_map(ticks).sum::<f64>() / 100.0
}

/// What a process and those it started have handed to the kernel, to files and sockets: bytes, and in how many calls.
fn handed(pid: u32) -> (f64, f64) {
    let of = |pid: u32| {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let number = |name: &str| io.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<f64>().ok());
        (number("wchar:").unwrap_or(0.0), number("syscw:").unwrap_or(0.0))
    };
    family(pid).into_iter().map(of).fold((0.0, 0.0), |sum, next| (sum.0 + next.0, sum.1 + next.1))
}

/// What a page of loopback says.
pub(crate) fn page(at: &str, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(at).with_context(|| format!("{at} is not reached"))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut out = String::new();
    stream.read_to_string(&mut out)?;
    Ok(out)
}

/// Resident memory of a process now, MiB.
pub(crate) fn resident_mib(pid: u32) -> f64 {
    status_kib(pid, "VmRSS:") / 1024.0
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            for pid in family(child.id()).into_iter().rev() {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
            }
            let _ = child.wait();
        }
    }
}

/// A process and those it started.
fn family(pid: u32) -> Vec<u32> {
    // each thread has its own
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|c| c.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    std::iter::once(pid).chain(children.into_iter().flat_map(family)).collect()
}

fn status_kib(pid: u32, name: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok());
    line.unwrap_or(0.0)
}

/// A port of loopback that was free just now.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// An address of loopback.
pub(crate) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Runs a command to its end; what it printed.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<String> {
    let shown = format!("{command:?}");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let pid = child.as_mut().map(|c| c.id()).unwrap_or_default();
    let child = child.with_context(|| format!("{shown} does not start"))?;
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if is_done.recv_timeout(STEP_MAX).is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    });
    let Output { status, stdout, stderr } = child.wait_with_output()?;
    drop(done);
    let _ = guard.join();
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    if !status.success() {
        bail!("{shown} ended with {status}:\n{out}\n{err}");
    }
    Ok(format!("{out}{err}"))
}

/// The first number behind `after` in a text, thousands separated by commas or not.
pub(crate) fn number_after(text: &str, after: &str) -> Option<f64> {
    let from = text.rfind(after)? + after.len();
    let number = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
    let rest = text[from..].trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = rest.find(|c| !number(c)).unwrap_or(rest.len());
    rest[..end].replace(',', "").trim_end_matches('.').parse().ok()
}

/// The last number before `before` in a text.
pub(crate) fn number_before(text: &str, before: &str) -> Option<f64> {
    let at = text.find(before)?;
    let word = text[..at].split_whitespace().next_back()?;
    word.replace(',', "").trim_start_matches('(').parse().ok()
}

/// Java with all jars of a folder.
pub(crate) fn java(jars: &Path, heap: &str) -> Command {
    let mut command = Command::new("java");
    command.arg(heap).arg("-cp").arg(format!("{0}:{0}/*", jars.display()));
    command
}

/// Compiles a client of ours with a folder of jars, into that folder.
pub(crate) fn java_client(jars: &Path, name: &str, source: &str) -> anyhow::Result<()> {
    let file = jars.join(format!("{name}.java"));
    if std::fs::read_to_string(&file).is_ok_and(|there| there == source) && jars.join(format!("{name}.class")).exists()
    {
        return Ok(());
    }
    std::fs::write(&file, source)?;
    let mut compiler = Command::new("javac");
    compiler.arg("-cp").arg(format!("{}/*", jars.display())).arg("-d").arg(jars).arg(&file);
    run(&mut compiler)?;
    Ok(())
}

/// The number a client of ours prints at its end.
pub(crate) fn result_of(command: &mut Command) -> anyhow::Result<f64> {
    let text = run(command)?;
    number_after(&text, "result ").with_context(|| format!("no result in: {text}"))
}

/// Jars of Maven artifacts (`group:artifact:version`) with what they need, fetched once into `folder`.
pub(crate) fn jars(folder: &Path, artifacts: &[&str]) -> anyhow::Result<()> {
    if folder.join(".whole").exists() {
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    let dependency = |artifact: &&str| -> anyhow::Result<String> {
        let mut parts = artifact.split(':');
        let mut part = || parts.next().context("group:artifact:version");
        let (group, name, version) = (part()?, part()?, part()?);
        Ok(format!(
            "<dependency><groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version></dependency>"
        ))
    };
    let all: Vec<String> = artifacts.iter().map(dependency).collect::<anyhow::Result<_>>()?;
    let pom = format!(
        "<project xmlns=\"http://maven.apache.org/POM/4.0.0\"><modelVersion>4.0.0</modelVersion><groupId>weir</groupId>\
         <artifactId>bench</artifactId><version>1</version><packaging>pom</packaging><dependencies>{}</dependencies></project>",
        all.concat()
    );
    let file = folder.join("pom.xml");
    std::fs::write(&file, pom)?;
    let mut maven = Command::new("mvn");
    maven.arg("-q").arg("-f").arg(&file).arg("dependency:copy-dependencies");
    run(maven.arg(format!("-DoutputDirectory={}", folder.display())))?;
    std::fs::write(folder.join(".whole"), "")?;
    Ok(())
}
