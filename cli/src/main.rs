//! `weir`: the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 141 nobody reads the output any more.

#![deny(clippy::print_stdout, clippy::print_stderr)] // see `weir_broker::output`

mod admin;
mod args;
mod bench;
mod data;
mod redrive;
mod serve;
mod verify;

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use serde_json::json;
use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;
use weir_broker::output::{self, Unwritten};
use weir_client::Client;

/// Gives back what is not used any more; see ARCHITECTURE.md.
#[global_allocator]
static MEMORY: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Event streaming for Kubernetes, and on a laptop.
#[derive(Parser)]
#[command(
    name = "weir",
    version,
    subcommand_required = true,
    arg_required_else_help = true,
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
    /// For programs: one JSON value, or one a line; errors and notes too (docs/cli.md).
    Json,
    /// Values alone.
    Raw,
}

impl Output {
    /// Prints what a command did: a sentence for people, an object for programs.
    pub(crate) fn done(self, text: impl Display, json: serde_json::Value) -> Result<(), Unwritten> {
        if self == Self::Json { output::line(json) } else { output::line(text) }
    }

    /// Says beside the result what is worth knowing.
    pub(crate) fn note(self, text: impl Display) {
        match self {
            Self::Json => output::note(json!({"note": text.to_string()})),
            Self::Text | Self::Raw => output::note(format_args!("weir: {text}")),
        }
    }
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
}

fn main() -> ExitCode {
    let mut arguments: Vec<std::ffi::OsString> = std::env::args_os().collect();
    // how `weir serve` starts the brokers it runs as processes: no command for users
    if arguments.get(1).is_some_and(|first| first == serve::BROKER) {
        arguments.remove(1);
        return report(serve::broker(arguments), Output::Text);
    }
    let output = if asks_for_json(&arguments) { Output::Json } else { Output::Text };
    report(execute(arguments), output)
}

/// Returns true if `-o json` is among arguments of which others may be wrong.
fn asks_for_json(arguments: &[std::ffi::OsString]) -> bool {
    let options = arguments.iter().map(|a| a.to_string_lossy()).take_while(|a| a != "--");
    let line = options.collect::<Vec<_>>().join(" ") + " ";
    ["-o ", "-o", "-o=", "--output ", "--output="].iter().any(|flag| line.contains(&format!(" {flag}json ")))
}

fn execute(arguments: Vec<std::ffi::OsString>) -> anyhow::Result<()> {
    let cli = Cli::try_parse_from(arguments)?;
    let few = matches!(cli.command, Command::Serve(_) | Command::Bench(_));
    let reads_lines = matches!(cli.command, Command::Publish(_));
    let runtime = if few { weir_broker::runtime()? } else { tokio::runtime::Runtime::new()? };
    // on a worker: what it wakes stays on that worker's processor
    let done = runtime.block_on(runtime.spawn(run(cli)));
    if reads_lines {
        runtime.shutdown_background(); // a read of standard input that still waits ends with the process
    }
    done?
}

fn report(done: anyhow::Result<()>, output: Output) -> ExitCode {
    let Err(error) = done else { return ExitCode::SUCCESS };
    if error.downcast_ref().is_some_and(Unwritten::is_unread) {
        return ExitCode::from(output::UNREAD);
    }
    let usage = error.downcast_ref::<clap::Error>();
    if let Some(help) = usage.filter(|usage| !usage.use_stderr()) {
        return report(help.print().map_err(|e| Unwritten::from(e).into()), output);
    }
    match (output, usage) {
        (Output::Json, _) => {
            let error = json!({"reason": reason(&error), "message": message(&error)});
            output::note(json!({"error": error}));
        }
        (Output::Text | Output::Raw, Some(usage)) => drop(usage.print()),
        (Output::Text | Output::Raw, None) => output::note(format_args!("weir: {error:#}")),
    }
    if usage.is_some() { ExitCode::from(WRONG_USAGE) } else { ExitCode::FAILURE }
}

/// What programs compare: the brokers' reason, or that of this program.
fn reason(error: &anyhow::Error) -> &str {
    use weir_client::Error;
    match error.downcast_ref() {
        Some(Error::Refused { reason, .. }) if !reason.is_empty() => reason,
        Some(Error::Deadline { .. }) => "DEADLINE",
        Some(Error::Address(_)) => "ADDRESS",
        Some(Error::WrongPort { .. }) => "WRONG_PORT",
        _ if error.is::<clap::Error>() => "USAGE",
        _ if error.is::<Unwritten>() => "OUTPUT",
        _ => "FAILED",
    }
}

/// The error with its causes; of a wrong argument without the usage of its command.
fn message(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    match error.downcast_ref::<clap::Error>() {
        Some(_) => text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").to_owned(),
        None => text,
    }
}

/// A wrong argument, with what would be right: the program ends as for others that clap finds.
fn usage(message: impl Display) -> anyhow::Error {
    Cli::command().error(clap::error::ErrorKind::ValueValidation, message).into()
}

/// Exit code after wrong usage.
const WRONG_USAGE: u8 = 2;

async fn run(cli: Cli) -> anyhow::Result<()> {
    let client = || -> anyhow::Result<Client> { Ok(Client::new(&cli.server)?) };
    match cli.command {
        Command::Serve(serve) => serve::run(serve, cli.output).await,
        Command::Topic(command) => admin::topic(&connected(client()?).await?, command, cli.output).await,
        Command::Subscription(command) => admin::subscription(&connected(client()?).await?, command, cli.output).await,
        Command::Cluster(command) => admin::cluster(&connected(client()?).await?, command, cli.output).await,
        Command::Publish(publish) => data::publish(&connected(client()?).await?, publish, cli.output).await,
        Command::Consume(consume) => data::consume(&connected(client()?).await?, consume, cli.output).await,
        Command::Bench(bench) => bench::run(&connected(client()?).await?, bench, cli.output).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "weir", &mut script);
            Ok(output::write(&script)?)
        }
    }
}

async fn connected(client: Client) -> anyhow::Result<Client> {
    use anyhow::Context as _;
    match client.connect(Duration::from_secs(5)).await {
        Ok(_) => Ok(client),
        Err(error @ weir_client::Error::WrongPort { .. }) => Err(error.into()),
        Err(error) => {
            Err(error).context("no broker was reached; is one running (`weir serve`), and is --server right?")
        }
    }
}

#[cfg(test)]
#[path = "../tests/lines/mod.rs"]
mod lines;

#[cfg(test)]
mod tests {
    use super::lines::COMMANDS;
    use super::*;
    use clap::Arg;
    use clap::error::ErrorKind as Refusal;
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt as _;

    /// Arguments that are numbers, durations, sizes or addresses: for them every value below is wrong.
    const MEASURED: &[&str] = &[
        "brokers",
        "listen",
        "metrics-listen",
        "partition",
        "offset",
        "topic-id",
        "to",
        "max",
        "id",
        "delay",
        "from",
        "records",
        "size",
        "rate",
        "producers",
        "linger",
        "members",
        "credit",
        "seconds",
        "keys",
    ];

    /// Arguments that are names: for them these are wrong too.
    const NAMES: &[&str] = &["name", "topic", "subscription", "snapshot", "to-snapshot"];

    fn commands(of: &clap::Command, path: &[String], out: &mut Vec<(Vec<String>, clap::Command)>) {
        let mut nested = of.get_subcommands().filter(|c| c.get_name() != "help").peekable();
        if nested.peek().is_none() {
            out.push((path.to_vec(), of.clone()));
        }
        for command in nested {
            commands(command, &[path, &[command.get_name().to_owned()]].concat(), out);
        }
    }

    /// The right arguments with one of them replaced.
    fn with(base: &[&str], depth: usize, arg: &Arg, at: usize, value: &OsStr) -> Vec<OsString> {
        let mut line: Vec<OsString> = ["weir"].iter().chain(base).map(OsString::from).collect();
        match arg.get_long() {
            Some(long) => {
                let flag = OsString::from(format!("--{long}"));
                if let Some(there) = line.iter().position(|a| *a == flag) {
                    line.drain(there..there + 2);
                }
                line.extend([flag, value.to_owned()]);
            }
            None => line[1 + depth + at] = value.to_owned(),
        }
        line
    }

    #[test]
    fn no_value_of_any_argument_is_taken_for_another_and_each_refusal_names_its_argument() {
        let mut found = Vec::new();
        commands(&Cli::command(), &[], &mut found);
        let (long, digits) = ("x".repeat(10_000), "9".repeat(400));
        let wrong = ["", "-1", "1.5", "18446744073709551616", "292277026596y", "\u{1f4a5}", "a b", &long, &digits];
        let wrong = wrong.map(OsStr::new).into_iter().chain([OsStr::from_bytes(b"\xff\xfe")]);
        let wrong: Vec<&OsStr> = wrong.collect();
        let mut seen = 0;
        for (path, command) in found {
            let words: Vec<&str> = path.iter().map(String::as_str).collect();
            let base = COMMANDS.iter().find(|c| c.starts_with(&words));
            let base = base.unwrap_or_else(|| panic!("{path:?} has no line in the table"));
            assert!(Cli::try_parse_from(["weir"].iter().chain(*base)).is_ok(), "{base:?}");
            let mut positionals = 0;
            for arg in command.get_arguments().filter(|a| a.get_action().takes_values()) {
                let at = positionals;
                positionals += usize::from(arg.is_positional());
                let name = arg.get_long().map_or_else(|| arg.get_id().to_string(), str::to_owned);
                for value in &wrong {
                    let line = with(base, words.len(), arg, at, value);
                    seen += 1;
                    let parsed = Cli::try_parse_from(&line);
                    let is_name = value.to_str().is_some_and(|v| weir_proto::names::full_name(v).is_ok());
                    let refused = MEASURED.contains(&name.as_str()) || NAMES.contains(&name.as_str()) && !is_name;
                    assert!(parsed.is_err() || !refused, "weir {path:?}: {name} takes {value:?}");
                    let Err(error) = parsed else { continue };
                    assert_eq!(error.exit_code(), 2, "{line:?}");
                    let text = error.to_string();
                    let named =
                        text.contains(&name) || text.to_lowercase().contains(&format!("<{}", name.replace('-', "_")));
                    for jargon in ["digit found", "parse", "too large to fit"] {
                        assert!(!text.contains(jargon), "{line:?}: {text}");
                    }
                    let hyphen = value.to_str() == Some("-1");
                    assert!(named || error.kind() == Refusal::InvalidUtf8 || hyphen, "{line:?}: {text}");
                    if MEASURED.contains(&name.as_str()) {
                        assert_ne!(error.kind(), Refusal::UnknownArgument, "{line:?}: {text}");
                    }
                }
            }
        }
        assert!(seen > 300, "{seen} lines were tried");
        let commands: std::collections::BTreeSet<&[&str]> = COMMANDS.iter().map(|c| &c[..c.len().min(2)]).collect();
        assert_eq!(commands.len(), COMMANDS.len(), "a command has two lines");
    }

    #[test]
    fn what_excludes_each_other_is_refused_and_nothing_is_missing_without_a_word() {
        for (line, remedy) in [
            (&["consume", "--subscription", "s", "--from", "earliest"][..], "--from"),
            (&["consume", "--subscription", "s", "--topic", "t"], "--topic"),
            (&["consume"], "--topic"),
            (&["consume", "--topic", "t", "--max", "0"], "from 1 to"),
            (&["publish"], "<TOPIC>"),
            (&["publish", "t", "--delay", "3651d"], "3650d"),
            (&["publish", "t", "--header", "x"], "use name=value"),
            (&["publish", "t", "--header", ""], "use name=value"),
            (&["serve", "--brokers", "10"], "from 1 to 9"),
            (&["serve", "--accept-loss", "soon"], "use a whole number"),
            (&["bench", "produce", "--topic", "t", "--producers", "many"], "from 1 to 10000"),
            (&["topic", "apply"], "--file"),
            (&["topic", "unschedule", "t"], "<PARTITION>"),
            (&["subscription", "seek", "s"], "--to"),
            (&["subscription", "seek", "s", "--to", "latest", "--to-snapshot", "a"], "--to-snapshot"),
            (&["subscription", "seek", "s", "--to", "2999-01-01T00:00:00Z"], "is a time to come"),
            (&["subscription", "seek", "s", "--to", "1700000000000000"], "is a time to come"),
            (&["consume", "--topic", "t", "--from", "2999-01-01T00:00:00Z"], "is a time to come"),
            (&["consume", "--topic", "t", "--from", "18446744073709551615"], "is a time to come"),
            (&["cluster", "add", ""], "is not a name"),
            (&["cluster", "drain", "0"], "from 1 to"),
            (&["serve", "--brokers", "2", "--socket", "x"], "--socket"),
            (&["bench", "produce", "--topic", "t", "--size", "99999999999"], "33554432"),
            (&["completions", "cmd"], "possible values"),
        ] {
            let error = Cli::try_parse_from(["weir"].iter().chain(line)).err();
            let error = error.unwrap_or_else(|| panic!("{line:?} is taken")).to_string();
            assert!(error.contains(remedy), "{line:?}: {error}");
        }
        let nothing = Cli::try_parse_from(["weir"]).err().unwrap();
        assert_eq!(nothing.kind(), Refusal::DisplayHelpOnMissingArgumentOrSubcommand);
        let help = nothing.to_string();
        assert!(help.contains("serve") && !help.contains(serve::BROKER), "{help}");
    }
}
