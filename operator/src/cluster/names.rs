//! Names of what a StreamCluster owns. In one place, so that no two parts disagree.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::collections::BTreeMap;

/// Clients.
pub const CLIENT_PORT: i32 = 7420;
/// Peers.
pub const PEER_PORT: i32 = 7421;
/// Administrators: the operator.
pub const ADMIN_PORT: i32 = 7422;
/// Metrics and health.
pub const METRICS_PORT: i32 = 9464;
/// Label with the cluster's name on everything it owns.
pub const CLUSTER_LABEL: &str = "weir.dev/cluster";

/// The names that go with one StreamCluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Its namespace.
    pub namespace: String,
    /// Its name, and that of its StatefulSet's pods' prefix and of the Service for clients.
    pub name: String,
}

impl Names {
    /// Of a cluster.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// The StatefulSet; its pods are `NAME-broker-N`.
    pub fn stateful_set(&self) -> String {
        format!("{}-broker", self.name)
    }

    /// The headless Service that gives each broker its name.
    pub fn headless(&self) -> String {
        format!("{}-brokers", self.name)
    }

    /// The Service of the Admin port.
    pub fn admin(&self) -> String {
        format!("{}-admin", self.name)
    }

    /// The Service for clients.
    pub fn client(&self) -> String {
        self.name.clone()
    }

    /// The ConfigMap, the ServiceAccount, and the PodDisruptionBudget.
    pub fn config(&self) -> String {
        format!("{}-broker", self.name)
    }

    /// The pod, and so the broker, of an ordinal.
    pub fn broker(&self, ordinal: i32) -> String {
        format!("{}-{ordinal}", self.stateful_set())
    }

    /// The ordinal of a broker of this name; `None` where it is none of ours.
    pub fn ordinal(&self, broker: &str) -> Option<i32> {
        let digits = broker.strip_prefix(&self.stateful_set())?.strip_prefix('-')?;
        let ordinal: i32 = digits.parse().ok().filter(|o| *o >= 0)?;
        (self.broker(ordinal) == broker).then_some(ordinal)
    }

    /// The volume claim of an ordinal.
    pub fn claim(&self, ordinal: i32) -> String {
        format!("data-{}", self.broker(ordinal))
    }

    /// Where a broker is reached by the others.
    pub fn broker_host(&self, broker: &str, domain: &str) -> String {
        format!("{broker}.{}.{}.svc.{domain}", self.headless(), self.namespace)
    }

    /// The Admin service, `host:port`.
    pub fn admin_address(&self, domain: &str) -> String {
        format!("{}.{}.svc.{domain}:{ADMIN_PORT}", self.admin(), self.namespace)
    }

    /// Where clients publish and subscribe, `host:port`.
    pub fn client_address(&self) -> String {
        format!("{}.{}.svc:{CLIENT_PORT}", self.client(), self.namespace)
    }

    /// Labels that select the broker pods.
    pub fn selector(&self) -> BTreeMap<String, String> {
        let pairs = [("app.kubernetes.io/name", "weir-broker"), (CLUSTER_LABEL, &self.name)];
        pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    /// The selector as the scale subresource wants it.
    pub fn selector_text(&self) -> String {
        self.selector().iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
    }

    /// The selector as objects want it.
    pub fn label_selector(&self) -> LabelSelector {
        LabelSelector { match_labels: Some(self.selector()), ..Default::default() }
    }

    /// Labels of everything owned.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.selector();
        labels.insert("app.kubernetes.io/managed-by".to_owned(), crate::context::MANAGER.to_owned());
        labels.insert("app.kubernetes.io/part-of".to_owned(), "weir".to_owned());
        labels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinals_are_read_back_from_names_and_others_are_not_ours() {
        let names = Names::new("shop", "default");
        assert_eq!(names.ordinal(&names.broker(12)), Some(12));
        for other in ["default-broker-", "default-broker--1", "default-broker-01", "default-2", "other-broker-1"] {
            assert_eq!(names.ordinal(other), None, "{other}");
        }
    }
}
