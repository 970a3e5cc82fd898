//! Resources that wait for a reconciliation. kube-runtime does not show the queue of a controller. A resource whose newest state, as it was
//! watched, is not the one that a reconciliation has begun with is in that queue, and is counted here. Repeated and failed reconciliations
//! that are due later, and those that another object's change asked for, are not counted.

use kube::runtime::reflector::Store;
use kube::{Resource, ResourceExt as _};
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// Of each resource of one kind, by uid, the resource version that the last reconciliation began with.
#[derive(Default)]
pub struct Begun(Mutex<HashMap<String, String>>);

impl Begun {
    /// A reconciliation begins with this state of a resource. `store` says which resources are not to be forgotten.
    pub fn begin<K>(&self, object: &K, store: &Store<K>)
    where
        K: Resource + Clone + 'static,
        K::DynamicType: Eq + Hash + Clone,
    {
        let (Some(uid), Some(version)) = (object.uid(), object.resource_version()) else { return };
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        begun.insert(uid, version);
        if begun.len() > 2 * store.len() + 16 {
            let present: HashSet<String> = store.state().iter().filter_map(|object| object.uid()).collect();
            begun.retain(|uid, _| present.contains(uid));
        }
    }

    /// How many resources of a store wait.
    pub fn waiting<K>(&self, store: &Store<K>) -> i64
    where
        K: Resource + Clone + 'static,
        K::DynamicType: Eq + Hash + Clone,
    {
        let begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |object: &K| object.uid().and_then(|uid| begun.get(&uid).cloned()) != object.resource_version();
        store.state().iter().filter(|object| waits(object)).count() as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::runtime::{reflector, watcher::Event};
    use weir_crds::Topic;

    fn topic(uid: usize, version: &str) -> Topic {
        let mut topic = Topic::new(&format!("t{uid}"), Default::default());
        topic.metadata.uid = Some(uid.to_string());
        topic.metadata.resource_version = Some(version.to_owned());
        topic
    }

    #[test]
    fn a_resource_waits_from_its_change_until_a_reconciliation_begins_with_it() {
        let (store, mut seen) = reflector::store::<Topic>();
        let begun = Begun::default();
        assert_eq!(begun.waiting(&store), 0);
        for uid in 0..3 {
            seen.apply_watcher_event(&Event::Apply(topic(uid, "1")));
        }
        assert_eq!(begun.waiting(&store), 3);
        begun.begin(&topic(0, "1"), &store);
        assert_eq!(begun.waiting(&store), 2);
        seen.apply_watcher_event(&Event::Apply(topic(0, "2")));
        assert_eq!(begun.waiting(&store), 3, "it changed after that");
        for (uid, version) in [(0, "2"), (1, "1"), (2, "1")] {
            begun.begin(&topic(uid, version), &store);
        }
        assert_eq!(begun.waiting(&store), 0);
    }

    #[test]
    fn resources_that_are_gone_are_forgotten() {
        let (store, mut seen) = reflector::store::<Topic>();
        let begun = Begun::default();
        seen.apply_watcher_event(&Event::Apply(topic(0, "1")));
        for uid in 1..1_000 {
            seen.apply_watcher_event(&Event::Apply(topic(uid, "1")));
            begun.begin(&topic(uid, "1"), &store);
            seen.apply_watcher_event(&Event::Delete(topic(uid, "1")));
        }
        assert!(begun.0.lock().unwrap().len() < 30);
        assert_eq!(begun.waiting(&store), 1);
    }
}
