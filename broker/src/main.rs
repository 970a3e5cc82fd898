//! `weir-broker`: one broker of a cluster.

use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use weir_broker::config::Config;

fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    weir_broker::logging::start();
    let runtime = weir_broker::runtime()?;
    runtime.block_on(runtime.spawn(run(config)))?
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let running = tokio::select! {
        running = weir_broker::start(config) => running?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: leadership moves first");
    running.stop().await;
    Ok(())
}
