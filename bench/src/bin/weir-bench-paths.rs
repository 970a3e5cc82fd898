//! Does one path so many times and nothing else: what callgrind counts the instructions of.

use clap::Parser;

/// Takes one of the paths again and again.
#[derive(Parser)]
struct Args {
    /// The path's name.
    path: String,
    /// How often.
    times: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let names: Vec<&str> = weir_bench::PATHS.iter().map(|p| p.name).collect();
    let path = weir_bench::PATHS.iter().find(|p| p.name == args.path);
    let path =
        path.ok_or_else(|| anyhow::anyhow!("no path is called {}; there are {}", args.path, names.join(", ")))?;
    let mut step = (path.prepare)();
    (0..args.times).for_each(|_| step());
    Ok(())
}
