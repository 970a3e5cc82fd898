//! Structured logs on standard error, their level changeable at run time.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging at `info`, or as `WEIR_LOG` says. Once a process; later calls change nothing.
pub fn start() {
    let filter = EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let (layer, handle) = reload::Layer::new(filter);
    // where standard error cannot be written, neither can that be said, and `eprintln!` would panic
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    // no colours in a file; for a terminal NO_COLOR switches them off
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let format = format.with_target(false).with_ansi(colours);
    if tracing_subscriber::registry().with(layer).with(format).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// Changes the filter.
pub fn set_filter(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| e.to_string())?;
    let handle = FILTER.get().ok_or("logging was not started by this program")?;
    handle.reload(filter).map_err(|e| e.to_string())
}

/// What may come with every message is logged once in this time for each subject.
const SELDOM_EVERY: Duration = Duration::from_secs(60);
/// Subjects remembered.
const SUBJECTS_MAX: usize = 4_096;

/// Keeps a log readable where what is logged may come with every message: metrics count each, the log says it once a minute for each
/// subject, with how many were left out.
#[derive(Default)]
pub struct Seldom(Mutex<HashMap<Subject, (Instant, u64)>>);

/// What is logged, and about whom.
type Subject = (&'static str, String);

impl Seldom {
    /// How often `what` was left out about a subject since it was logged; `None` where it is to be left out now.
    pub fn now(&self, what: &'static str, subject: &str) -> Option<u64> {
        self.at(what, subject, Instant::now())
    }

    fn at(&self, what: &'static str, subject: &str, now: Instant) -> Option<u64> {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |at: Instant| now.saturating_duration_since(at) < SELDOM_EVERY;
        let key = (what, subject.to_owned());
        match logged.get_mut(&key) {
            Some((at, left_out)) if is_recent(*at) => {
                *left_out += 1;
                return None;
            }
            Some((at, left_out)) => {
                *at = now;
                return Some(std::mem::take(left_out));
            }
            None => {}
        }
        if logged.len() >= SUBJECTS_MAX {
            logged.retain(|_, (at, _)| is_recent(*at));
        }
        if logged.len() >= SUBJECTS_MAX {
            return None; // more subjects in a minute than anybody reads
        }
        logged.insert(key, (now, 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_often_is_logged_once_a_minute_for_each_subject_with_what_was_left_out() {
        let (seldom, begun) = (Seldom::default(), Instant::now());
        let at = |s: u64| begun + Duration::from_secs(s);
        assert_eq!(seldom.at("a", "x", at(0)), Some(0));
        for s in 1..60 {
            assert_eq!(seldom.at("a", "x", at(s)), None);
        }
        assert_eq!((seldom.at("a", "y", at(59)), seldom.at("b", "x", at(59))), (Some(0), Some(0)), "of their own");
        assert_eq!(seldom.at("a", "x", at(60)), Some(59));
        assert_eq!(seldom.at("a", "x", at(120)), Some(0));
    }

    #[test]
    fn no_more_subjects_are_remembered_than_a_log_is_good_for() {
        let (seldom, begun) = (Seldom::default(), Instant::now());
        let logged = (0..2 * SUBJECTS_MAX).filter(|n| seldom.at("a", &n.to_string(), begun).is_some()).count();
        assert_eq!((logged, seldom.0.lock().unwrap().len()), (SUBJECTS_MAX, SUBJECTS_MAX));
        assert_eq!(seldom.at("a", "new", begun + SELDOM_EVERY), Some(0));
        assert_eq!(seldom.0.lock().unwrap().len(), 1);
    }
}
