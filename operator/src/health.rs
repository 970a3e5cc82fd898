//! Whether this replica could act: the API server answers it, and while it leads, it has seen all resources. Also what it has done:
//! how long reconciliations take, how many resources of each kind are ready, and how many wait.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Client;
use prometheus::{HistogramOpts, HistogramVec, IntGauge, IntGaugeVec, Opts, Registry};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two requests to the API server, and the longest one may take.
const LOOK: Duration = Duration::from_secs(5);
/// The API server counts as reached for this long after it answered: two looks may fail.
const REACHED_FOR: Duration = Duration::from_secs(20);

/// Numbers of resources of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    /// Those that are ready.
    pub ready: i64,
    /// Those that are not.
    pub others: i64,
    /// Those of either that wait for a reconciliation.
    pub waiting: i64,
}

/// Counts the resources of a kind.
pub type Counted = Box<dyn Fn() -> Count + Send>;

/// See the module.
pub struct Health {
    /// the API server answered last
    reached: Mutex<Option<Instant>>,
    leads: AtomicBool,
    has_seen_all: AtomicBool,
    counts: Mutex<Vec<(&'static str, Counted)>>,
    registry: Registry,
    /// How long reconciliations take, by kind and outcome.
    pub reconcile_seconds: HistogramVec,
    /// Reconciliations under way, by kind.
    pub running: IntGaugeVec,
    leader: IntGauge,
    ready: IntGauge,
    resources: IntGaugeVec,
    waiting: IntGaugeVec,
}

impl Default for Health {
    fn default() -> Self {
        let registry = Registry::new();
        let process = prometheus::process_collector::ProcessCollector::for_self();
        registry.register(Box::new(process)).expect("registered once");
        let buckets = prometheus::exponential_buckets(0.005, 2.0, 13).expect("right buckets");
        let options = HistogramOpts::new("weir_operator_reconcile_seconds", "Duration of reconciliations");
        let reconcile_seconds =
            HistogramVec::new(options.buckets(buckets), &["kind", "outcome"]).expect("a right name");
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            IntGaugeVec::new(Opts::new(name, help), labels).expect("a right name")
        };
        let running = gauges("weir_operator_reconciles_running", "Reconciliations under way", &["kind"]);
        let resources =
            gauges("weir_operator_resources", "Resources, by kind and Ready, at the leader", &["kind", "ready"]);
        let waiting = gauges(
            "weir_operator_resources_waiting",
            "Resources whose newest state no reconciliation has begun with, at the leader",
            &["kind"],
        );
        let leader = IntGauge::new("weir_operator_leader", "1 at the replica that leads").expect("a right name");
        let ready = IntGauge::new("weir_operator_ready", "1 while /readyz succeeds").expect("a right name");
        registry.register(Box::new(reconcile_seconds.clone())).expect("registered once");
        registry.register(Box::new(running.clone())).expect("registered once");
        registry.register(Box::new(resources.clone())).expect("registered once");
        registry.register(Box::new(waiting.clone())).expect("registered once");
        registry.register(Box::new(leader.clone())).expect("registered once");
        registry.register(Box::new(ready.clone())).expect("registered once");
        Self {
            reached: Mutex::default(),
            leads: AtomicBool::default(),
            has_seen_all: AtomicBool::default(),
            counts: Mutex::default(),
            registry,
            reconcile_seconds,
            running,
            leader,
            ready,
            resources,
            waiting,
        }
    }
}

/// Leadership, until this is dropped.
pub struct Leading<'a>(&'a Health);

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        self.0.leads.store(false, Ordering::Relaxed);
        self.0.has_seen_all.store(false, Ordering::Relaxed);
        self.0.counts.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.0.leader.set(0);
    }
}

impl Health {
    /// This replica leads until the result is dropped; `counts` say how many resources of each kind there are.
    pub fn lead(&self, counts: Vec<(&'static str, Counted)>) -> Leading<'_> {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = counts;
        self.leads.store(true, Ordering::Relaxed);
        self.leader.set(1);
        Leading(self)
    }

    /// The leading replica knows all resources of all kinds.
    pub fn has_seen_all(&self) {
        self.has_seen_all.store(true, Ordering::Relaxed);
    }

    /// The API server has answered.
    pub fn has_reached(&self, now: Instant) {
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Why this replica could not act now. One that does not lead is ready to.
    pub fn why_not_ready(&self, now: Instant) -> Option<&'static str> {
        let reached = *self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if reached.is_none_or(|at| now.saturating_duration_since(at) > REACHED_FOR) {
            return Some("the API server does not answer");
        }
        let knows = !self.leads.load(Ordering::Relaxed) || self.has_seen_all.load(Ordering::Relaxed);
        (!knows).then_some("the resources have not all been read yet")
    }

    /// All metrics, as Prometheus reads them.
    pub fn metrics(&self) -> String {
        self.ready.set(i64::from(self.why_not_ready(Instant::now()).is_none()));
        self.resources.reset();
        self.waiting.reset();
        for (kind, count) in &*self.counts.lock().unwrap_or_else(PoisonError::into_inner) {
            let Count { ready, others, waiting } = count();
            self.resources.with_label_values(&[*kind, "true"]).set(ready);
            self.resources.with_label_values(&[*kind, "false"]).set(others);
            self.waiting.with_label_values(&[kind]).set(waiting);
        }
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// Counts resources by whether they are ready; `waiting` of them wait.
pub fn by_ready<'a>(conditions: impl Iterator<Item = &'a [Condition]>, waiting: i64) -> Count {
    conditions.fold(Count { waiting, ..Count::default() }, |count, list| {
        match crate::conditions::holds(list, "Ready") {
            true => Count { ready: count.ready + 1, ..count },
            false => Count { others: count.others + 1, ..count },
        }
    })
}

/// Asks the API server, again and again, whether it is there.
pub async fn look(client: Client, health: std::sync::Arc<Health>) {
    loop {
        if matches!(tokio::time::timeout(LOOK, client.apiserver_version()).await, Ok(Ok(_))) {
            health.has_reached(Instant::now());
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_ready_while_the_api_server_answers_and_once_it_knows_all_resources() {
        let (health, begun) = (Health::default(), Instant::now());
        let at = |s: u64| begun + Duration::from_secs(s);
        assert_eq!(health.why_not_ready(at(0)), Some("the API server does not answer"));
        health.has_reached(at(0));
        assert_eq!(health.why_not_ready(at(20)), None, "it does not lead, and could");
        assert!(health.why_not_ready(at(21)).is_some());
        health.has_reached(at(30));
        {
            let _leading = health.lead(vec![("Topic", Box::new(|| Count { ready: 3, others: 2, waiting: 1 }))]);
            assert_eq!(health.why_not_ready(at(30)), Some("the resources have not all been read yet"));
            health.has_seen_all();
            assert_eq!(health.why_not_ready(at(30)), None);
            let text = health.metrics();
            for line in [
                "weir_operator_leader 1",
                "weir_operator_resources{kind=\"Topic\",ready=\"true\"} 3",
                "weir_operator_resources{kind=\"Topic\",ready=\"false\"} 2",
                "weir_operator_resources_waiting{kind=\"Topic\"} 1",
            ] {
                assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
            }
        }
        assert_eq!(health.why_not_ready(at(30)), None, "another leads");
        let text = health.metrics();
        assert!(text.contains("weir_operator_leader 0") && !text.contains("kind=\"Topic\""), "{text}");
    }
}
