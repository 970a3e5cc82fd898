//! What the end-to-end tests use: a Kubernetes (of their own, or the one of $KUBECONFIG), Helm, and Jobs that publish and check.
//! Black box: only resources, `kubectl`'s verbs, and the `weir` of the image.

pub mod alone;
pub mod faults;
pub mod invalid;
pub mod volumes;

use anyhow::{Context as _, bail};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use weir_crds::{StreamCluster, Subscription, Topic};

/// Where Weir is installed.
pub const NAMESPACE: &str = "weir";

/// The repository's folder: where it is now, not where this was compiled.
pub fn repository() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").expect("run by cargo");
    Path::new(&here).parent().expect("a workspace").to_owned()
}

/// The chart's folder.
pub fn chart() -> PathBuf {
    repository().join("charts/weir")
}

/// Applies the documents of a manifest, of Weir's kinds, in a namespace; fields nobody knows are refused.
pub async fn apply(client: &Client, namespace: &str, yaml: &str) -> Result<(), kube::Error> {
    let parameters = PatchParams::apply("weir-e2e").force().validation_strict();
    for document in yaml.split("\n---").filter(|d| d.lines().any(|l| !l.is_empty() && !l.starts_with('#'))) {
        let value: Value = serde_yaml_ng::from_str(document).expect("a manifest of this test's own");
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let resource = match value["kind"].as_str() {
            Some("Topic") => ApiResource::erase::<Topic>(&()),
            Some("Subscription") => ApiResource::erase::<Subscription>(&()),
            Some("StreamCluster") => ApiResource::erase::<StreamCluster>(&()),
            other => panic!("kind {other:?}"),
        };
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
        api.patch(&name, &parameters, &Patch::Apply(&value)).await?;
    }
    Ok(())
}

/// A Kubernetes to test on.
pub struct Kubernetes {
    /// Its API.
    pub client: Client,
    /// The folder of the cluster that `make e2e` brought up; none on a cluster of the user's.
    pub home: Option<PathBuf>,
    helm: PathBuf,
    image: String,
}

impl Kubernetes {
    /// Connects to $KUBECONFIG; in a cluster of `make e2e`'s, volumes are looked after too.
    pub async fn connect() -> anyhow::Result<Self> {
        let client = Client::try_default().await.context("is KUBECONFIG set? `make e2e` sets it")?;
        let home = std::env::var_os("WEIR_E2E_HOME").map(PathBuf::from);
        let helm = std::env::var_os("HELM").map_or_else(|| PathBuf::from("helm"), PathBuf::from);
        let image = std::env::var("WEIR_IMAGE").unwrap_or_else(|_| "weir:e2e".to_owned());
        let this = Self { client, home, helm, image };
        if let Some(home) = &this.home {
            volumes::make_class(&this.client).await?;
            tokio::spawn(volumes::look_after(this.client.clone(), home.clone()));
        }
        Ok(this)
    }

    /// An API in the namespace of Weir.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Runs helm; an error holds what it said.
    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let said = Command::new(&self.helm).args(arguments).output().context("helm")?;
        if !said.status.success() {
            bail!("helm {}: {}", arguments.join(" "), String::from_utf8_lossy(&said.stderr));
        }
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    /// Installs the chart, or upgrades it, with values beside those every test needs.
    pub fn install(&self, values: &[&str]) -> anyhow::Result<()> {
        let chart = chart();
        let (repository, tag) = self.image.rsplit_once(':').context("WEIR_IMAGE is NAME:TAG")?;
        let image = [
            format!("image.repository={repository}"),
            format!("image.tag={tag}"),
            "image.pullPolicy=IfNotPresent".to_owned(),
            "cluster.storage.size=1Gi".to_owned(),
            "cluster.brokers=null".to_owned(), // scaled by kubectl
        ];
        let chart = chart.to_string_lossy();
        let mut arguments = vec!["upgrade", "--install", "weir", &chart, "-n", NAMESPACE, "--create-namespace"];
        for value in image.iter().map(String::as_str).chain(values.iter().copied()) {
            arguments.extend(["--set", value]);
        }
        self.helm(&arguments).map(drop)
    }

    /// Applies the documents of a manifest in the namespace of Weir.
    pub async fn apply(&self, yaml: &str) -> Result<(), kube::Error> {
        apply(&self.client, NAMESPACE, yaml).await
    }

    /// The default cluster.
    pub async fn cluster(&self) -> anyhow::Result<StreamCluster> {
        Ok(self.api::<StreamCluster>().get("default").await?)
    }

    /// Merges into the default cluster's spec.
    pub async fn change_cluster(&self, spec: Value) -> anyhow::Result<()> {
        let patch = Patch::Merge(json!({"spec": spec}));
        self.api::<StreamCluster>().patch("default", &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// `kubectl scale`.
    pub async fn scale(&self, brokers: i32) -> anyhow::Result<()> {
        let patch = Patch::Merge(json!({"spec": {"replicas": brokers}}));
        self.api::<StreamCluster>().patch_scale("default", &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Waits until the cluster has so many brokers, all ready, and nothing is under way.
    pub async fn settled(&self, brokers: i32, within: Duration) -> anyhow::Result<Duration> {
        self.until(&format!("{brokers} brokers settled"), within, async || {
            let cluster = self.cluster().await.ok()?;
            let status = cluster.status.as_ref()?;
            let is =
                |kind: &str, status_: &str| status.conditions.iter().any(|c| c.type_ == kind && c.status == status_);
            let active = status.members.iter().filter(|m| m.phase == "active").count() as i32;
            let whole = status.observed_generation == cluster.metadata.generation
                && (status.brokers, status.ready_brokers) == (Some(brokers), Some(brokers))
                && (active, status.members.len() as i32) == (brokers, brokers)
                && is("Ready", "True")
                && is("Progressing", "False")
                && is("Degraded", "False");
            whole.then_some(())
        })
        .await
    }

    /// Asks again and again; says how long it took, or what the cluster looked like when time was up.
    pub async fn until<T>(
        &self,
        what: &str,
        within: Duration,
        ask: impl AsyncFn() -> Option<T>,
    ) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < within {
            if ask().await.is_some() {
                return Ok(begun.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        let status = self.cluster().await.ok().and_then(|c| c.status);
        bail!("{what}: not within {within:?}; the cluster says {}", serde_json::to_string_pretty(&status)?)
    }

    /// Waits until a topic of the default namespace of these tests takes records.
    pub async fn topic_ready(&self, name: &str) -> anyhow::Result<Duration> {
        self.until(&format!("topic {name} ready"), Duration::from_secs(60), async || {
            let topic = self.api::<Topic>().get(name).await.ok()?;
            let conditions = topic.status?.conditions;
            conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True").then_some(())
        })
        .await
    }

    /// The broker pods.
    pub async fn brokers(&self) -> anyhow::Result<Vec<Pod>> {
        let selector = ListParams::default().labels("app.kubernetes.io/name=weir-broker");
        Ok(self.api::<Pod>().list(&selector).await?.items)
    }

    /// Starts `weir ARGUMENTS` as a Job, on node 0 of a cluster of our own, which no test takes away.
    pub async fn start(&self, name: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let node = self.home.as_ref().map(|_| json!({"kubernetes.io/hostname": "node-0"}));
        let job: Job = serde_json::from_value(json!({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"backoffLimit": 0, "template": {"spec": {
                "restartPolicy": "Never",
                "nodeSelector": node,
                "automountServiceAccountToken": false,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "weir", "image": self.image, "imagePullPolicy": "IfNotPresent",
                    "command": ["/usr/local/bin/weir"], "args": arguments,
                    "env": [{"name": "WEIR_SERVER", "value": format!("default.{NAMESPACE}.svc:7420")}],
                    "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
                }],
            }}},
        }))?;
        self.api::<Job>().create(&PostParams::default(), &job).await?;
        let pods = self.api::<Pod>();
        // after the API server was away its clients come back with waits of up to a minute, one after the other
        self.until(&format!("job {name} started"), Duration::from_secs(240), async || {
            let list = pods.list(&ListParams::default().labels(&format!("job-name={name}"))).await.ok()?;
            let phase = list.items.first()?.status.as_ref()?.phase.clone()?;
            (phase != "Pending").then_some(())
        })
        .await?;
        Ok(())
    }

    /// Waits for a Job's end; what it printed, and whether it succeeded.
    pub async fn finish(&self, name: &str, within: Duration) -> anyhow::Result<(bool, String)> {
        let pods = self.api::<Pod>();
        let find = async || {
            let list = pods.list(&ListParams::default().labels(&format!("job-name={name}"))).await.ok()?;
            let pod = list.items.into_iter().next()?;
            let phase = pod.status.as_ref()?.phase.clone()?;
            matches!(phase.as_str(), "Succeeded" | "Failed").then_some((pod.name_any(), phase))
        };
        self.until(&format!("job {name} done"), within, find).await?;
        let (pod, phase) = find().await.context("the pod went away")?;
        let log = pods.logs(&pod, &LogParams::default()).await?;
        self.api::<Job>().delete(name, &DeleteParams::background()).await?;
        Ok((phase == "Succeeded", log))
    }

    /// Waits for a `bench verify`, prints what it found, and fails where a promise was broken or a publish failed.
    pub async fn verified(&self, what: &str, job: &str, within: Duration) -> anyhow::Result<Value> {
        let (succeeded, log) = self.finish(job, within).await?;
        let line = log.lines().rev().find(|l| l.starts_with('{'));
        let found: Value = serde_json::from_str(line.with_context(|| format!("{what}: no verdict in {log:?}"))?)?;
        println!(
            "{what}: {} acknowledged, {} failed, {} lost, {} twice, {} out of order, longest pause {} ms",
            found["acknowledged"],
            found["failed"],
            found["lost"],
            found["twice"],
            found["out_of_order"],
            found["longest_pause_ms"]
        );
        if !succeeded || found["failed"] != 0 || found["acknowledged"].as_u64().unwrap_or(0) == 0 {
            bail!("{what}: {log}");
        }
        Ok(found)
    }

    /// Deletes the operator's pods, one after the other, without mercy, until what is returned is dropped.
    pub fn kill_operators(&self, every: Duration) -> impl Drop + use<> {
        struct Stop(tokio::task::JoinHandle<()>);
        impl Drop for Stop {
            fn drop(&mut self) {
                self.0.abort();
            }
        }
        let pods = self.api::<Pod>();
        Stop(tokio::spawn(async move {
            let selector = ListParams::default().labels("app.kubernetes.io/name=weir-operator");
            let at_once = DeleteParams::default().grace_period(0);
            for turn in 0.. {
                tokio::time::sleep(every).await;
                let Ok(list) = pods.list(&selector).await else { continue };
                if let Some(pod) = list.items.get(turn % list.items.len().max(1)) {
                    let _ = pods.delete(&pod.name_any(), &at_once).await;
                }
            }
        }))
    }

    /// Resident memory of the operator's pods, MiB, as their metrics say.
    pub async fn operators_mib(&self) -> anyhow::Result<String> {
        let selector = ListParams::default().labels("app.kubernetes.io/name=weir-operator");
        let mut out = Vec::new();
        for pod in self.api::<Pod>().list(&selector).await? {
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}:9464/proxy/metrics", pod.name_any());
            let text = self.client.request_text(http::Request::get(path).body(Vec::new())?).await?;
            let line = text.lines().find(|l| l.starts_with("process_resident_memory_bytes "));
            let bytes: f64 =
                line.and_then(|l| l.split(' ').nth(1)?.parse().ok()).context("no memory in its metrics")?;
            out.push(format!("{:.0}", bytes / f64::from(1 << 20)));
        }
        Ok(out.join(" and "))
    }

    /// Deletes a namespace, and waits until that has finished.
    pub async fn delete_namespace(&self, name: &str, within: Duration) -> anyhow::Result<Duration> {
        let api: Api<Namespace> = Api::all(self.client.clone());
        api.delete(name, &DeleteParams::default()).await?;
        let gone = async || api.get_opt(name).await.is_ok_and(|n| n.is_none()).then_some(());
        self.until(&format!("deleting the namespace {name} finishes"), within, gone).await
    }

    /// Makes a namespace.
    pub async fn namespace(&self, name: &str) -> anyhow::Result<()> {
        let api: Api<Namespace> = Api::all(self.client.clone());
        // what Weir makes keeps to the strictest of the Pod Security Standards
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        api.patch(name, &PatchParams::apply("weir-e2e").force(), &Patch::Apply(object)).await?;
        Ok(())
    }
}
