//! `weir-broker`: one broker of a cluster, and the check of a stopped one's folder.

#![deny(clippy::print_stdout, clippy::print_stderr)] // see `weir_broker::output`

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use weir_broker::config::Config;
use weir_broker::output;
use weir_broker::output::Unwritten;
use weir_broker::verify::{self, Verify};

/// Gives back what is not used any more; see ARCHITECTURE.md.
#[global_allocator]
static MEMORY: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// One broker of a Weir cluster.
#[derive(Parser)]
#[command(
    name = "weir-broker",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = weir_broker::config::EXAMPLE
)]
struct Program {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: Option<Config>,
}

#[derive(Subcommand)]
enum Command {
    Verify(Verify),
}

fn main() -> anyhow::Result<ExitCode> {
    let program = Program::parse();
    if let Some(Command::Verify(what)) = program.command {
        return match verify::run(&what) {
            Ok(whole) => Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
            Err(error) if error.downcast_ref().is_some_and(Unwritten::is_unread) => Ok(ExitCode::from(output::UNREAD)),
            Err(error) => Err(error),
        };
    }
    // also reports what is missing of it
    let config = program.config.unwrap_or_else(Config::parse);
    weir_broker::logging::start();
    let runtime = weir_broker::runtime()?;
    runtime.block_on(runtime.spawn(run(config)))??;
    Ok(ExitCode::SUCCESS)
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
