//! `weir`: the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 141 nobody reads the output any more.

mod admin;
mod bench;
mod data;
mod redrive;
mod serve;
mod verify;

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use std::io::ErrorKind;
use std::time::Duration;
use weir_client::Client;

/// Event streaming for Kubernetes, and on a laptop.
#[derive(Parser)]
#[command(
    name = "weir",
    version,
    after_help = "Examples:
  weir serve --manifests examples --data /tmp/weir
  echo hello | weir publish orders --key alice
  weir consume --topic orders --from earliest --max 1
  weir bench produce --topic orders --records 1000000 --size 100"
)]
struct Cli {
    /// Brokers to begin with, host:port, separated by commas.
    #[arg(long, global = true, env = "WEIR_SERVER", default_value = "127.0.0.1:7420")]
    server: String,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs: one JSON value, or one a line.
    Json,
    /// Values alone.
    Raw,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a broker in this process, or several as processes, fed by a folder of manifests.
    Serve(serve::Serve),
    /// Topics.
    #[command(subcommand)]
    Topic(admin::Topic),
    /// Subscriptions.
    #[command(subcommand)]
    Subscription(admin::Subscription),
    /// The cluster.
    #[command(subcommand)]
    Cluster(admin::Cluster),
    /// Publishes lines of standard input, or a file as one message.
    Publish(data::Publish),
    /// Prints messages of a topic or a subscription.
    Consume(data::Consume),
    /// Measures.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Prints completions for a shell.
    #[command(after_help = "Example: weir completions bash > ~/.local/share/bash-completion/completions/weir")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    #[command(name = "__broker", hide = true)]
    Broker(Box<weir_broker::config::Config>),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let serves = matches!(cli.command, Command::Serve(_) | Command::Broker(_));
    if !serves {
        end_with_reader(); // who serves ends its brokers first
    }
    let few = serves || matches!(cli.command, Command::Bench(_));
    let runtime = if few { weir_broker::runtime() } else { tokio::runtime::Runtime::new() };
    // on a worker: what it wakes stays on that worker's processor
    let done = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(runtime.spawn(run(cli)))?);
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) if error.downcast_ref().is_some_and(|e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe) => {
            std::process::ExitCode::from(BROKEN_PIPE)
        }
        Err(error) => {
            eprintln!("weir: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// What a shell says of a program that SIGPIPE ended.
const BROKEN_PIPE: u8 = 141;

/// Where nobody reads the output any more (`weir topic list | head -1`), the program ends as others do, without a word.
fn end_with_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload_as_str().is_some_and(|why| why.contains("Broken pipe")) {
            std::process::exit(BROKEN_PIPE.into());
        }
        usual(panic);
    }));
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let client = || -> anyhow::Result<Client> { Ok(Client::new(&cli.server)?) };
    match cli.command {
        Command::Serve(serve) => serve::run(serve, cli.output).await,
        Command::Broker(config) => serve::run_broker(*config).await,
        Command::Topic(command) => admin::topic(&connected(client()?).await?, command, cli.output).await,
        Command::Subscription(command) => admin::subscription(&connected(client()?).await?, command, cli.output).await,
        Command::Cluster(command) => admin::cluster(&connected(client()?).await?, command, cli.output).await,
        Command::Publish(publish) => data::publish(&connected(client()?).await?, publish, cli.output).await,
        Command::Consume(consume) => data::consume(&connected(client()?).await?, consume, cli.output).await,
        Command::Bench(bench) => bench::run(&connected(client()?).await?, bench, cli.output).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "weir", &mut std::io::stdout());
            Ok(())
        }
    }
}

async fn connected(client: Client) -> anyhow::Result<Client> {
    use anyhow::Context as _;
    let reached = client.connect(Duration::from_secs(5)).await;
    reached.context("no broker was reached; is one running (`weir serve`), and is --server right?")?;
    Ok(client)
}
