//! What is done to the cluster that `make e2e` brought up. Its script carries out files put into `commands/`.

use anyhow::{Context as _, ensure};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Has the cluster's script do something, and waits until it has.
pub async fn command(home: &Path, name: &str) -> anyhow::Result<()> {
    let file = home.join("commands").join(name);
    std::fs::write(&file, "")?;
    let begun = Instant::now();
    while file.exists() {
        ensure!(begun.elapsed() < Duration::from_secs(60), "{name} was not carried out");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// SIGKILL for every process of this program in a pod's container, as its node sees them.
pub fn kill_in_pod(pod_uid: &str, program: &str) -> anyhow::Result<()> {
    let mut killed = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let path = entry.path();
        let Ok(cgroups) = std::fs::read_to_string(path.join("cgroup")) else { continue };
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let first = line.split(|b| *b == 0).next().unwrap_or_default();
        if cgroups.contains(pod_uid) && first.ends_with(program.as_bytes()) {
            let pid = entry.file_name();
            let done = Command::new("kill").arg("-KILL").arg(&pid).status().context("kill")?;
            ensure!(done.success(), "kill {pid:?}");
            killed += 1;
        }
    }
    ensure!(killed > 0, "no {program} was found in pod {pod_uid}");
    Ok(())
}
