//! The page and its picture.

use crate::costs::{Costs, Row};
use crate::goals::{Bound, GOALS, WRITTEN_TWICE};
use crate::{Figures, System};
use anyhow::Context as _;
use plotters::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

/// Median, smallest and largest of a figure's runs.
pub(crate) fn spread(mut values: Vec<f64>) -> Option<(f64, f64, f64)> {
    values.sort_by(f64::total_cmp);
    Some((*values.get(values.len() / 2)?, *values.first()?, *values.last()?))
}

fn written(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

type Runs = BTreeMap<&'static str, Vec<Figures>>;

fn all_of(runs: &Runs, system: &str, figure: &str) -> Vec<f64> {
    runs.get(system).into_iter().flatten().filter_map(|f| f.get(figure)).collect()
}

/// Writes `benchmarks.md` and `benchmarks.svg` into a folder.
pub(crate) fn write(
    folder: &Path,
    systems: &[&System],
    runs: &Runs,
    costs: Option<&Costs>,
    machine: &str,
) -> anyhow::Result<()> {
    let rounds = runs.values().map(Vec::len).max().unwrap_or(0);
    let names: BTreeSet<&str> = runs.values().flatten().flat_map(Figures::names).collect();
    let mut page = format!(
        "# Beside others\nMade by `make bench-peers` on {machine}: {rounds} rounds, all systems in turns in each, load and servers on the \
         same machine. Median (smallest to largest). Higher is better, but for µs, ms and MiB.\n\n![throughput](benchmarks.svg)\n\n| |"
    );
    systems.iter().for_each(|s| _ = write!(page, " {} |", s.name));
    page += "\n|---|";
    systems.iter().for_each(|_| page += "---|");
    for name in &names {
        _ = write!(page, "\n| {name} |");
        for system in systems {
            let cell = spread(all_of(runs, system.name, name)).map_or(String::new(), |(median, least, most)| {
                format!("{} ({} to {})", written(median), written(least), written(most))
            });
            _ = write!(page, " {cell} |");
        }
    }
    page += "\n\n*three*: published to three brokers, records a second. *one*: to one broker. *read*: read back from the beginning. \
             *latency three*: one record of 100 bytes in flight, until it is acknowledged. *to consumer*: through one broker until a \
             consumer has it. *at 10,000/s*: three brokers, 1 KiB, from when each was due, while \
             retention deletes, memtables are flushed and a broker whose disk was lost is filled again. *leader killed*: the longest wait \
             for an acknowledgement. *memory*: the most that any one server's process ever held.\n\n## Settings\n";
    systems.iter().for_each(|s| _ = writeln!(page, "- {}: {}.", s.name, s.settings));
    page += "\n## Where others are ahead\n";
    let mut behind = String::new();
    for name in &names {
        let lower = ["µs", "ms", "MiB"].iter().any(|unit| name.ends_with(unit));
        let median = |system: &str| spread(all_of(runs, system, name)).map(|s| s.0);
        let Some(ours) = median("Weir") else { continue };
        for system in systems.iter().filter(|s| s.name != "Weir") {
            let Some(theirs) = median(system.name) else { continue };
            if if lower { theirs < ours } else { theirs > ours } {
                _ = writeln!(behind, "- {name}: {} {} to {}.", system.name, written(theirs), written(ours));
            }
        }
    }
    page += if behind.is_empty() { "In none of these.\n" } else { &behind };
    page += &goals(runs, costs);
    if let Some(costs) = costs {
        page += "\n## What work costs\nOne broker, measured once each; but for what is varied, 6 partitions, one producer, records of 100 bytes. \
                 Processor time is that of client and broker. What the broker hands to the kernel is what it writes to files (the \
                 write-ahead log, later the blob files) and to sockets.\n\n\
                 | | records/s | processor time a record, µs | bytes handed to the kernel for each of a value | calls for that, for 1,000 records \
                 | syncs for 1,000 records |\n|---|---|---|---|---|---|\n";
        for Row { what, rate, cpu_us, handed, calls, syncs } in &costs.rows {
            let rate = written(*rate);
            _ = writeln!(page, "| {what} | {rate} | {cpu_us:.2} | {handed:.2} | {calls:.1} | {syncs:.2} |");
        }
        page += BENDS;
        _ = writeln!(page, "\nTowards a payload that is written once: {}.", WRITTEN_TWICE);
        page += "\nFlame graphs: [profile.md](profile.md).\n";
    }
    std::fs::write(folder.join("benchmarks.md"), page)?;
    let drawn = names.iter().copied().filter(|n| ["three", "one", "read"].iter().any(|p| n.starts_with(p)));
    draw(&folder.join("benchmarks.svg"), systems, runs, &drawn.collect::<Vec<_>>())
}

/// How the table of costs is read.
const BENDS: &str = "\nRecords a second times processor time a record is how much of the two processors was used. Where that is much less than two, \
    something else is the bound: from 1 KiB on the disk, which takes each byte twice, so that bytes a second stay the same; with one \
    partition, that its batches follow one another through one task of the client and one of the broker; with a short backlog or few \
    records, the start. Where it is near two and a record takes longer (1,000 partitions, 100 producers), batches are smaller, as calls \
    and syncs show, and each is an entry of its own; the streams of a thousand partitions are opened within the run.\n";

/// Each goal with what was measured, and where that is not enough with the reason.
fn goals(runs: &Runs, costs: Option<&Costs>) -> String {
    let mut out = "\n## Goals\n| | to reach | measured | |\n|---|---|---|---|\n".to_owned();
    let median = |system: &str, figure: &str| {
        let once = costs.filter(|_| system == "Weir").and_then(|c| c.figures.get(figure));
        spread(all_of(runs, system, figure)).map(|s| s.0).or(once)
    };
    for goal in GOALS {
        let Some(measured) = median("Weir", goal.figure) else { continue };
        let (wanted, reached) = match goal.bound {
            Bound::AtLeast(least) => (format!("≥ {}", written(least)), measured >= least),
            Bound::AtMost(most) => (format!("≤ {}", written(most)), measured <= most),
            Bound::Times(times, other) => {
                let Some(theirs) = median(other, goal.figure) else { continue };
                let text = format!("≥ {times} times {other}'s {}", written(theirs));
                (text, measured >= times * theirs)
            }
        };
        let (figure, verdict) = (goal.figure, if reached { "reached" } else { goal.note });
        _ = writeln!(out, "| {figure} | {wanted} | {} | {verdict} |", written(measured));
    }
    out
}

/// Bars in groups: one group a figure, each as a part of its largest.
fn draw(file: &Path, systems: &[&System], runs: &Runs, names: &[&str]) -> anyhow::Result<()> {
    let height = 40 + names.len() as i32 * (systems.len() as i32 * 18 + 24);
    let area = SVGBackend::new(file, (900, height.max(100) as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let text = |size| ("sans-serif", size).into_font();
    let mut y = 20;
    for name in names {
        let medians: Vec<Option<f64>> =
            systems.iter().map(|s| spread(all_of(runs, s.name, name)).map(|s| s.0)).collect();
        let most = medians.iter().flatten().copied().fold(0.0, f64::max);
        area.draw(&Text::new(format!("{name}, records/s"), (20, y), text(15)))?;
        y += 20;
        for (at, (system, median)) in systems.iter().zip(&medians).enumerate() {
            let Some(median) = median else { continue };
            let end = 130 + (median / most * 620.0) as i32;
            area.draw(&Rectangle::new([(130, y), (end, y + 14)], Palette99::pick(at).filled()))?;
            area.draw(&Text::new(system.name, (20, y + 1), text(13)))?;
            area.draw(&Text::new(written(*median), (end + 6, y + 1), text(13)))?;
            y += 18;
        }
        y += 4;
    }
    area.present().context("the picture cannot be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!([written(7.4), written(1_000.0), written(1_234_567.0)], ["7", "1,000", "1,234,567"]);
        assert_eq!(spread(vec![3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
    }
}
