//! What clients saw, held against what was promised: an offline pass over a history, used alike by the simulation, by the tests over
//! processes and by `weir bench verify`. It knows nothing of how Weir works, and imports nothing.
//!
//! A publish without an answer may or may not be there; only [`Event::Refused`] says that it is not.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use std::fmt::{self, Debug, Display};

/// A record's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Partition.
    pub partition: u32,
    /// Offset in it.
    pub offset: u64,
}

/// A message that a consumer of a subscription holds, or held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lease {
    /// The subscription.
    pub subscription: u64,
    /// The message.
    pub at: Place,
}

/// What one client saw. `V` names a record: each is offered once, by one producer.
#[derive(Clone, Debug)]
pub enum Event<V> {
    /// A producer begins to publish a record, after those it offered before.
    Offered { producer: u64, value: V },
    /// It was told that the record is stored.
    Acked { value: V, at: Place },
    /// It was told that the record is not stored and never will be.
    Refused { value: V },
    /// A reader saw a record.
    Read { at: Place, value: V },
    /// A subscription's position was seen: all before it is acknowledged.
    Position { subscription: u64, partition: u32, offset: u64 },
    /// Somebody moved it on purpose.
    Sought { subscription: u64, partition: u32, offset: u64 },
    /// A member was given a message to hold until `until_ms`, on one clock for all.
    Leased { lease: Lease, member: u64, now_ms: u64, until_ms: u64 },
    /// It gave the message back, or acknowledged it.
    Released { lease: Lease, member: u64 },
}

/// All that clients saw, in the order of one observer: what one saw before another began stands before it.
#[derive(Clone, Debug)]
pub struct History<V>(Vec<Event<V>>);

impl<V> Default for History<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// A partition's log as one replica, or one reader, has it in the end. Several of one partition must agree.
#[derive(Clone, Debug)]
pub struct Log<V> {
    /// Whose, for the report.
    pub of: String,
    /// Partition.
    pub partition: u32,
    /// Records below it are gone by retention, and not missed.
    pub start: u64,
    /// Offset and record, in order; offsets of records that are nobody's concern may be left out.
    pub records: Vec<(u64, V)>,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<V> {
    /// Acknowledged, and not where it was said to be.
    Lost { value: V, at: Place },
    /// Stored more than once.
    Duplicated { value: V, places: Vec<Place> },
    /// A producer's later record stands before an earlier one.
    Reordered { producer: u64, earlier: V, later: V },
    /// Two values at one offset.
    Diverging { at: Place, one: V, other: V },
    /// Read, and not there in the end.
    Vanished { value: V, at: Place },
    /// Refused, and there in the end.
    Undead { value: V, at: Place },
    /// There in the end, and offered by nobody.
    Invented { value: V, at: Place },
    /// A subscription's position went back by itself.
    WentBack { subscription: u64, partition: u32, from: u64, to: u64 },
    /// A message held by two members at one time.
    HeldTwice { lease: Lease, members: (u64, u64) },
}

impl<V> Verdict<V> {
    /// Its kind, one word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "lost",
            Self::Duplicated { .. } => "duplicated",
            Self::Reordered { .. } => "reordered",
            Self::Diverging { .. } => "diverging",
            Self::Vanished { .. } => "vanished",
            Self::Undead { .. } => "undead",
            Self::Invented { .. } => "invented",
            Self::WentBack { .. } => "went-back",
            Self::HeldTwice { .. } => "held-twice",
        }
    }
}

/// Verdicts that are shown; all are counted.
const SHOWN_MAX: usize = 5;

/// The broken promises of a history; none is what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report<V>(pub Vec<Verdict<V>>);

impl<V: Debug> Report<V> {
    /// How many of a kind.
    pub fn count(&self, kind: &str) -> usize {
        self.0.iter().filter(|v| v.kind() == kind).count()
    }

    /// Panics with what is wrong. For tests.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.0.is_empty(), "{self}");
    }
}

impl<V: Debug> Display for Report<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        self.0.iter().for_each(|v| *kinds.entry(v.kind()).or_default() += 1);
        let counts: Vec<String> = kinds.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        write!(f, "{}", if counts.is_empty() { "nothing wrong".to_owned() } else { counts.join(", ") })?;
        self.0.iter().take(SHOWN_MAX).try_for_each(|v| write!(f, "\n  {v:?}"))
    }
}

impl<V: Clone + Ord + Debug> History<V> {
    /// Adds what was seen next.
    pub fn push(&mut self, event: Event<V>) {
        self.0.push(event);
    }

    /// Records acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        self.0.iter().filter(|e| matches!(e, Event::Acked { .. })).count()
    }

    /// Checks it against the logs as they are in the end; there is at least one of each partition that was published to.
    pub fn check(&self, logs: &[Log<V>]) -> Report<V> {
        let mut out = Vec::new();
        let fin = Final::of(logs, &mut out);
        self.check_values(&fin, &mut out);
        self.check_order(&fin, &mut out);
        self.check_positions(&mut out);
        self.check_leases(&mut out);
        Report(out)
    }

    /// Each value told of is the one that stands there, and those refused stand nowhere.
    fn check_values(&self, fin: &Final<V>, out: &mut Vec<Verdict<V>>) {
        let mut offered: BTreeSet<&V> = BTreeSet::new();
        let mut told: BTreeMap<Place, &V> = BTreeMap::new();
        for event in &self.0 {
            let (value, at, acked) = match event {
                Event::Offered { value, .. } => {
                    offered.insert(value);
                    continue;
                }
                Event::Refused { value } => {
                    let places = fin.places.get(value).into_iter().flatten();
                    out.extend(places.map(|at| Verdict::Undead { value: value.clone(), at: *at }));
                    continue;
                }
                Event::Acked { value, at } => (value, *at, true),
                Event::Read { at, value } => (value, *at, false),
                _ => continue,
            };
            match told.entry(at) {
                Entry::Vacant(entry) => drop(entry.insert(value)),
                Entry::Occupied(entry) if *entry.get() != value => {
                    let (one, other) = ((*entry.get()).clone(), value.clone());
                    out.push(Verdict::Diverging { at, one, other });
                }
                Entry::Occupied(_) => {}
            }
            let kept = fin.starts.get(&at.partition).is_none_or(|start| at.offset >= *start);
            if kept && fin.values.get(&at) != Some(value) {
                let value = value.clone();
                out.push(if acked { Verdict::Lost { value, at } } else { Verdict::Vanished { value, at } });
            }
        }
        let invented = fin.values.iter().filter(|(_, v)| !offered.contains(v));
        out.extend(invented.map(|(at, value)| Verdict::Invented { value: value.clone(), at: *at }));
    }

    fn check_order(&self, fin: &Final<V>, out: &mut Vec<Verdict<V>>) {
        // of each producer and partition: the record that stands furthest so far
        let mut last: BTreeMap<(u64, u32), (u64, &V)> = BTreeMap::new();
        for event in &self.0 {
            let Event::Offered { producer, value } = event else { continue };
            for at in fin.places.get(value).into_iter().flatten() {
                let before = last.entry((*producer, at.partition)).or_insert((at.offset, value));
                if at.offset < before.0 {
                    let (earlier, later) = (before.1.clone(), value.clone());
                    out.push(Verdict::Reordered { producer: *producer, earlier, later });
                } else {
                    *before = (at.offset, value);
                }
            }
        }
    }

    fn check_positions(&self, out: &mut Vec<Verdict<V>>) {
        let mut positions: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for event in &self.0 {
            match *event {
                Event::Position { subscription, partition, offset } => {
                    let before = positions.insert((subscription, partition), offset).unwrap_or(offset);
                    if offset < before {
                        out.push(Verdict::WentBack { subscription, partition, from: before, to: offset });
                    }
                }
                Event::Sought { subscription, partition, offset } => {
                    positions.insert((subscription, partition), offset);
                }
                _ => {}
            }
        }
    }

    fn check_leases(&self, out: &mut Vec<Verdict<V>>) {
        let mut held: BTreeMap<Lease, (u64, u64)> = BTreeMap::new();
        for event in &self.0 {
            match *event {
                Event::Leased { lease, member, now_ms, until_ms } => {
                    let before = held.insert(lease, (member, until_ms));
                    if let Some((other, _)) = before.filter(|(other, until)| *other != member && *until > now_ms) {
                        out.push(Verdict::HeldTwice { lease, members: (other, member) });
                    }
                }
                Event::Released { lease, member } if held.get(&lease).is_some_and(|(holder, _)| *holder == member) => {
                    held.remove(&lease);
                }
                _ => {}
            }
        }
    }
}

/// What stands where in the end.
struct Final<V> {
    values: BTreeMap<Place, V>,
    places: BTreeMap<V, Vec<Place>>,
    /// the highest start of each partition: what any replica has dropped
    starts: BTreeMap<u32, u64>,
}

impl<V: Clone + Ord + Debug> Final<V> {
    fn of(logs: &[Log<V>], out: &mut Vec<Verdict<V>>) -> Self {
        let mut this = Self { values: BTreeMap::new(), places: BTreeMap::new(), starts: BTreeMap::new() };
        for log in logs {
            let start = this.starts.entry(log.partition).or_default();
            *start = log.start.max(*start);
            for (offset, value) in &log.records {
                let at = Place { partition: log.partition, offset: *offset };
                match this.values.entry(at) {
                    Entry::Vacant(entry) => {
                        entry.insert(value.clone());
                        this.places.entry(value.clone()).or_default().push(at);
                    }
                    Entry::Occupied(entry) if entry.get() != value => {
                        let (one, other) = (entry.get().clone(), value.clone());
                        out.push(Verdict::Diverging { at, one, other });
                    }
                    Entry::Occupied(_) => {}
                }
            }
        }
        let twice = this.places.iter().filter(|(_, places)| places.len() > 1);
        out.extend(twice.map(|(v, places)| Verdict::Duplicated { value: v.clone(), places: places.clone() }));
        this
    }
}
