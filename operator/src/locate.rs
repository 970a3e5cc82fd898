//! Which cluster a Topic or Subscription belongs to, and whether it may use it.

use crate::cluster::names::Names;
use crate::conditions;
use crate::context::Context;
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;
use weir_crds::{ClusterRef, StreamCluster};

/// Deletes a Topic or Subscription without asking its cluster, where that is gone for good.
pub const FORCE_DELETE: &str = "weir.dev/force-delete";

/// The reason of a resource that is not any more what was looked at: the next look sees what it is now.
pub const OUTDATED: &str = "Outdated";

/// A cluster that may be asked.
pub struct Located {
    /// Its resource.
    pub cluster: Arc<StreamCluster>,
    /// Its Admin service, `host:port`.
    pub address: String,
}

/// Why a resource cannot be served now, as a condition says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    /// For programs.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Whom to tell that a resource in `namespace` is deleted: the Admin service of its cluster, whether or not the namespace may still
/// use it; nobody, where the cluster is gone.
pub fn locate_to_delete(
    context: &Context,
    namespace: &str,
    wanted: Option<&ClusterRef>,
) -> Result<Option<String>, Blocked> {
    let name = wanted.map_or("default", |r| &r.name);
    let home = wanted.and_then(|r| r.namespace.as_deref()).unwrap_or(namespace);
    match locate(context, namespace, wanted) {
        Ok(located) => Ok(Some(located.address)),
        Err(Blocked { reason: "ClusterNotFound", .. }) => Ok(None),
        Err(Blocked { reason: "NamespaceNotAllowed", .. }) => {
            Ok(Some(Names::new(home, name).admin_address(&context.settings.domain)))
        }
        Err(waiting) => Err(waiting),
    }
}

/// What a deletion that cannot be carried out now says.
pub fn waits_to_be_deleted(why: &str) -> String {
    format!("{why}; it is deleted once that is over, or at once with the annotation {FORCE_DELETE}")
}

/// Asks whether a resource still is what was looked at. What an operator watches may be behind: a topic deleted meanwhile, with nobody
/// left to delete it again, must not come back among the brokers, nor a spec of before replace what is newer.
pub async fn check_current<K>(context: &Context, object: &K) -> Result<(), Blocked>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let outdated = |message: String| Blocked { reason: OUTDATED, message };
    let api: Api<K> = Api::namespaced(context.client.clone(), &object.namespace().unwrap_or_default());
    let now = api.get_metadata_opt(&object.name_any()).await.map_err(|e| outdated(e.to_string()))?;
    let is = |m: &kube::core::ObjectMeta| {
        (m.uid.clone(), m.generation, m.deletion_timestamp.is_some())
            == (object.uid(), object.meta().generation, object.meta().deletion_timestamp.is_some())
    };
    match now {
        Some(now) if is(&now.metadata) => Ok(()),
        _ => Err(outdated("it was changed meanwhile".to_owned())),
    }
}

/// The cluster of a resource in `namespace`.
pub fn locate(context: &Context, namespace: &str, wanted: Option<&ClusterRef>) -> Result<Located, Blocked> {
    let name = wanted.map_or("default", |r| &r.name);
    let home = wanted.and_then(|r| r.namespace.as_deref()).unwrap_or(namespace);
    let cluster = context.cluster(home, name).ok_or_else(|| Blocked {
        reason: "ClusterNotFound",
        message: format!("there is no StreamCluster {home}/{name}; make one, or name another in spec.clusterRef"),
    })?;
    if cluster.metadata.deletion_timestamp.is_some() {
        let message = format!("StreamCluster {home}/{name} is being deleted");
        return Err(Blocked { reason: "ClusterNotFound", message });
    }
    check_admitted(&cluster, home, namespace)?;
    let ready = cluster.status.as_ref().is_some_and(|s| conditions::holds(&s.conditions, "Ready"));
    if !ready {
        let message = format!("StreamCluster {home}/{name} is not ready yet");
        return Err(Blocked { reason: "ClusterNotReady", message });
    }
    let address = Names::new(home, name).admin_address(&context.settings.domain);
    Ok(Located { cluster, address })
}

fn check_admitted(cluster: &StreamCluster, home: &str, namespace: &str) -> Result<(), Blocked> {
    let allowed = &cluster.spec.allowed_namespaces;
    if home == namespace || allowed.iter().any(|a| a == "*" || a == namespace) {
        return Ok(());
    }
    let name = cluster.metadata.name.as_deref().unwrap_or_default();
    let message = format!("StreamCluster {home}/{name} does not allow namespace {namespace} in spec.allowedNamespaces");
    Err(Blocked { reason: "NamespaceNotAllowed", message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_crds::StreamClusterSpec;

    #[test]
    fn a_namespace_must_be_allowed() {
        let cluster = |list: &[&str]| {
            let allowed_namespaces = list.iter().map(|s| (*s).to_owned()).collect();
            StreamCluster::new("default", StreamClusterSpec { allowed_namespaces, ..Default::default() })
        };
        assert!(check_admitted(&cluster(&[]), "weir", "weir").is_ok());
        assert!(check_admitted(&cluster(&["shop"]), "weir", "shop").is_ok());
        assert!(check_admitted(&cluster(&["*"]), "weir", "shop").is_ok());
        let refused = check_admitted(&cluster(&["shop"]), "weir", "bank").unwrap_err();
        assert_eq!(refused.reason, "NamespaceNotAllowed");
    }
}
