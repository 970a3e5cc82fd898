//! The paths every message takes may not become dearer unseen: instructions, which callgrind counts, are the same on a busy machine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use weir_bench::PATHS;

const PROGRAM: &str = env!("CARGO_BIN_EXE_weir-bench-paths");
/// How often a path is taken in the shorter of two runs; what both have in common is its preparation.
const TIMES: u64 = 40;
/// What a path may take beyond what is recorded, percent: hash tables are seeded by chance, and processors differ in what is copied how.
const SLACK: u64 = 5;

/// Instructions of a run of a path so many times.
fn count(path: &str, times: u64, folder: &Path) -> u64 {
    let out = folder.join(format!("{path}-{times}"));
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--error-exitcode=9"]).arg(format!("--callgrind-out-file={}", out.display()));
    let ran = valgrind.args([PROGRAM, path, &times.to_string()]).output();
    let ran = ran.unwrap_or_else(|e| panic!("valgrind does not start ({e}); please install the package valgrind"));
    assert!(ran.status.success(), "{path}: {}", String::from_utf8_lossy(&ran.stderr));
    let profile = std::fs::read_to_string(&out).unwrap();
    let summary = profile.lines().find_map(|l| l.strip_prefix("summary: ").or(l.strip_prefix("totals: ")));
    summary.expect("callgrind says its sum").trim().parse().unwrap()
}

#[test]
fn no_path_takes_more_instructions_than_are_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let file = Path::new("instructions.txt"); // tests run in their package's folder
    let each = |path: &str| (count(path, 2 * TIMES, folder.path()) - count(path, TIMES, folder.path())) / TIMES;
    let found: BTreeMap<&str, u64> = PATHS.iter().map(|p| (p.name, each(p.name))).collect();
    if std::env::var_os("WEIR_BLESS").is_some() {
        let lines: String = found.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
        return std::fs::write(file, lines).unwrap();
    }
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let recorded: BTreeMap<&str, u64> =
        text.lines().filter_map(|l| l.split_once(' ')).map(|(name, count)| (name, count.parse().unwrap())).collect();
    for (name, count) in &found {
        println!("{name}: {count} instructions, {:?} recorded", recorded.get(name));
    }
    let dearer =
        |(name, count): &(&&str, &u64)| recorded.get(*name).is_none_or(|most| **count > most * (100 + SLACK) / 100);
    let dearer: Vec<_> = found.iter().filter(dearer).collect();
    assert!(dearer.is_empty(), "dearer than recorded: {dearer:?}; if that is meant, record it: make generate");
}
