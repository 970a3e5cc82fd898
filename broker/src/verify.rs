//! `weir-broker verify`: reads the folder of a stopped broker without changing it, and reports for each partition what is there, what
//! is damaged, and what helps: a restart, a rebuild from other brokers, or a file that is put back.

use crate::aside;
use crate::{outln, output};
use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use prost::Message as _;
use rustix::fs::FlockOperation;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use weir_core::entry::{Context, Kind};
use weir_core::ids::{BrokerId, GroupId, META_GROUP};
use weir_core::meta::command::Command;
use weir_core::meta::state::MetaState;
use weir_core::storage::{Store as _, StoreError, StoredGroup};
use weir_store::rocks::RocksStore;
use weir_store::{blobs, synced, torn};

/// Damaged entries of a partition that are listed; all are counted.
const LISTED_MAX: usize = 16;
/// Reads of a partition that may fail one after the other for a reason that may pass, each of which may take seconds.
const FAILED_READS_MAX: usize = 8;
/// Entries are read in pieces of this size.
const PIECE_BYTES: u64 = 4 << 20;

/// Reads the folder of a stopped broker without changing it, and says per partition what is there, what is damaged and what helps.
#[derive(Parser, Clone, Debug)]
pub struct Verify {
    /// The broker's folder, as given to --data.
    pub data: PathBuf,
    /// How the report is written.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For reading.
    Text,
    /// One JSON object.
    Json,
}

/// What helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remedy {
    /// All is whole.
    None,
    /// Reading failed for a reason that may pass: the next start opens it again.
    Restart,
    /// A start rebuilds it from the other replicas, while a majority of them lives. Where the store does not open, nothing here says
    /// whether there are others; a lone broker needs the damaged file from a copy.
    Rebuild,
    /// No other replica has it: the damaged file is to be put back from a copy.
    Restore,
}

/// A partition's replica.
#[derive(Clone, Debug, Serialize)]
pub struct Partition {
    /// Raft group.
    pub group: u64,
    /// `namespace/topic/partition`, as far as the metadata can be read.
    pub name: Option<String>,
    /// This replica's id.
    pub replica: u64,
    /// Whether it was found damaged before, while others had all of it.
    pub quarantined: bool,
    /// Replicas at other brokers.
    pub other_replicas: usize,
    /// First offset.
    pub start_offset: u64,
    /// One past the last offset.
    pub end_offset: u64,
    /// Entries of the log.
    pub entries: u64,
    /// Entries that cannot be read.
    pub unreadable: u64,
    /// The first of the errors.
    pub errors: Vec<String>,
    /// What helps.
    pub remedy: Remedy,
}

/// What a folder holds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The folder.
    pub data: PathBuf,
    /// Damage of the store as a whole.
    pub store: Vec<String>,
    /// Damaged files.
    pub files: Vec<String>,
    /// Bytes at the end of the write-ahead log that were never synced.
    pub torn_bytes: u64,
    /// The partitions that can be found.
    pub partitions: Vec<Partition>,
    /// What helps as a whole.
    pub remedy: Remedy,
}

/// Reads a folder. An error means that a broker runs on it, or that there is none.
pub fn verify(data: &Path) -> anyhow::Result<Report> {
    let path = aside::database(data);
    if !path.is_dir() {
        bail!("{} is not the folder of a broker: it has no {}", data.display(), path.display());
    }
    let _lock = lock(&path)?;
    let mut report = Report {
        data: data.to_owned(),
        store: RocksStore::noted_damage(&path).into_iter().map(|what| format!("found while it ran: {what}")).collect(),
        files: Vec::new(),
        torn_bytes: torn::find(&path).unwrap_or_default().torn_bytes,
        partitions: Vec::new(),
        remedy: Remedy::None,
    };
    report.files.extend(torn::damaged_log(&path).map(|file| file.display().to_string()));
    match blobs::flaws(&path) {
        Ok(flaws) => report.files.extend(flaws.iter().map(|f| format!("{} at byte {}", f.file.display(), f.at))),
        Err(error) => report.store.push(error.to_string()),
    }
    let mut remedy = Remedy::None;
    match RocksStore::open_for_reading(&path) {
        Ok(store) => {
            if let Some(error) = synced::read(&path).and_then(|mark| store.lost_since(mark)) {
                report.store.push(error.to_string());
            }
            remedy = read(&store, &mut report);
        }
        Err(error) => {
            remedy = remedy.max(remedy_of(&error, !aside::cluster(data).is_empty()));
            report.store.push(error.to_string());
        }
    }
    if !report.store.is_empty() && remedy < Remedy::Rebuild {
        remedy =
            if report.partitions.iter().any(|p| p.other_replicas == 0) { Remedy::Restore } else { Remedy::Rebuild };
    }
    report.remedy = remedy;
    Ok(report)
}

/// The lock that a running broker holds; taken for as long as the folder is read, without writing to its file.
fn lock(path: &Path) -> anyhow::Result<Option<std::fs::File>> {
    let Ok(file) = std::fs::File::open(path.join("LOCK")) else { return Ok(None) };
    if rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockShared).is_err() {
        bail!("a broker runs on {}: stop it first", path.display());
    }
    Ok(Some(file))
}

fn remedy_of(error: &StoreError, others: bool) -> Remedy {
    match error.is_damage() {
        false => Remedy::Restart,
        true if others => Remedy::Rebuild,
        true => Remedy::Restore,
    }
}

/// Reads all groups; what helps as a whole.
fn read(store: &RocksStore, report: &mut Report) -> Remedy {
    let held = match store.load() {
        Ok(held) => held,
        Err(error) => {
            report.store.push(error.to_string());
            return remedy_of(&error, true);
        }
    };
    let meta = held.iter().find(|g| g.group == META_GROUP).map(|g| metadata(store, g)).unwrap_or_default();
    let topics = meta.topics.iter().flat_map(|(topic, t)| t.groups.iter().enumerate().map(move |g| (topic, g)));
    let names: BTreeMap<u64, String> = topics.map(|(topic, (at, group))| (*group, format!("{topic}/{at}"))).collect();
    report.partitions = held.iter().filter(|g| !g.destroyed).map(|g| partition(store, g, &meta, &names)).collect();
    report.partitions.iter().map(|p| p.remedy).max().unwrap_or(Remedy::None)
}

/// The metadata as this replica of it has it, as far as it can be read.
fn metadata(store: &RocksStore, stored: &StoredGroup) -> MetaState {
    let Some(newest) = stored.checkpoints.last() else { return MetaState::default() };
    let Ok(mut meta) = MetaState::decode(newest.state.clone()) else { return MetaState::default() };
    let mut next = newest.index + 1;
    while next <= stored.hard.commit {
        let Ok(entries) = store.entries(META_GROUP, next, stored.hard.commit + 1, PIECE_BYTES) else { break };
        next += entries.len() as u64;
        for entry in entries.iter().filter(|e| Context::of(e).is_some_and(|c| c.kind == Kind::Meta)) {
            if let Ok(command) = Command::decode(entry.data.clone()) {
                let _ = meta.apply(&command);
            }
        }
    }
    meta
}

fn partition(store: &RocksStore, stored: &StoredGroup, meta: &MetaState, names: &BTreeMap<u64, String>) -> Partition {
    let id = stored.group;
    let others = match meta.assignment(id) {
        Some(assignment) => {
            let here = assignment.broker_of(stored.replica).unwrap_or(BrokerId(0));
            assignment.replicas.iter().filter(|r| r.broker != here.0).count()
        }
        None => stored.checkpoints.last().map_or(0, |c| c.voters.iter().filter(|v| **v != stored.replica.0).count()),
    };
    let oldest = stored.checkpoints.first();
    let first = oldest.map_or(1, |c| c.index + 1);
    let start_offset = oldest.map_or(0, |c| c.next_offset);
    let mut found = Partition {
        group: id.0,
        name: if id == META_GROUP { Some("metadata".to_owned()) } else { names.get(&id.0).cloned() },
        replica: stored.replica.0,
        quarantined: stored.quarantined,
        other_replicas: others,
        start_offset,
        end_offset: store.end_offset(id).unwrap_or(0).max(start_offset),
        entries: (stored.last_index + 1).saturating_sub(first),
        unreadable: 0,
        errors: Vec::new(),
        remedy: if stored.quarantined { Remedy::Rebuild } else { Remedy::None },
    };
    read_log(store, id, first, stored.last_index, &mut found);
    found
}

/// Reads every entry of a log.
fn read_log(store: &RocksStore, id: GroupId, first: u64, last: u64, found: &mut Partition) {
    let (mut next, mut failed) = (first, 0);
    while next <= last {
        let error = match store.entries(id, next, last + 1, PIECE_BYTES) {
            Ok(entries) => {
                next += entries.len() as u64;
                continue;
            }
            Err(error) => error,
        };
        // entries before the damaged one are whole: they were read on the way to it
        let at = match &error {
            StoreError::Damaged { index, .. } => (*index).max(next),
            _ => first_unreadable(store, id, next, last),
        };
        found.unreadable += 1;
        if found.errors.len() < LISTED_MAX {
            found.errors.push(error.to_string());
        }
        found.remedy = found.remedy.max(remedy_of(&error, found.other_replicas > 0));
        failed += usize::from(!error.is_damage());
        if failed >= FAILED_READS_MAX {
            found.unreadable += last - at;
            return;
        }
        next = at + 1;
    }
}

/// The first index from `low` on that cannot be read: an error of the store as a whole does not name it.
fn first_unreadable(store: &RocksStore, id: GroupId, low: u64, last: u64) -> u64 {
    (low..=last).find(|index| store.entries(id, *index, index + 1, 0).is_err()).unwrap_or(last)
}

impl Report {
    /// Whether nothing is damaged: also no file that holds nothing of use.
    fn is_whole(&self) -> bool {
        self.remedy == Remedy::None && self.files.is_empty()
    }

    /// For reading.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        for p in &self.partitions {
            let name = p.name.clone().unwrap_or_else(|| format!("group {}", p.group));
            let state = match p.remedy {
                Remedy::None => "whole",
                Remedy::Restart => "could not be read: a restart opens it again",
                Remedy::Rebuild => "damaged: a start rebuilds it from its other replicas",
                Remedy::Restore => "damaged, and there is no other replica: put the damaged file back from a copy",
            };
            let Partition { start_offset, end_offset, entries, unreadable, other_replicas, .. } = p;
            let _ = writeln!(
                out,
                "{name}: offsets {start_offset} to {end_offset}, {entries} entries, {unreadable} unreadable, \
                 {other_replicas} other replicas: {state}"
            );
            for error in &p.errors {
                let _ = writeln!(out, "  {error}");
            }
        }
        for file in &self.files {
            let _ = writeln!(out, "damaged file: {file}");
        }
        for what in &self.store {
            let _ = writeln!(out, "the store as a whole: {what}");
        }
        if self.torn_bytes > 0 {
            let _ = writeln!(out, "{} bytes at the end of the write-ahead log were never synced", self.torn_bytes);
        }
        let _ = writeln!(
            out,
            "{}: {}",
            self.data.display(),
            match self.remedy {
                Remedy::None if self.is_whole() => "all is whole",
                Remedy::None => "nothing that is in use is damaged",
                Remedy::Restart => "restart the broker; if it fails again, its disk is failing",
                Remedy::Rebuild =>
                    "start the broker while the other brokers run: it is rebuilt from them; without others, restore the damaged file \
                     from a copy (docs/runbook.md)",
                Remedy::Restore => "restore the damaged file, or go on without what it holds (docs/runbook.md)",
            }
        );
        out
    }
}

/// Runs the command; whether all is whole.
pub fn run(verify_what: &Verify) -> anyhow::Result<bool> {
    let report = verify(&verify_what.data)?;
    match verify_what.output {
        Output::Text => output::write(report.to_text().as_bytes())?,
        Output::Json => outln!("{}", serde_json::to_string(&report).context("the report as JSON")?)?,
    }
    Ok(report.is_whole())
}
