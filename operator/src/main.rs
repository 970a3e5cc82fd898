//! `weir-operator`: looks after StreamClusters, Topics and Subscriptions of a Kubernetes cluster.

use anyhow::Context as _;
use clap::Parser;
use kube::Api;
use kube::runtime::events::{Recorder, Reporter};
use kube_lease_manager::LeaseManagerBuilder;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use weir_operator::context::{Context, MANAGER, Settings};
use weir_operator::health::{self, Health};
use weir_operator::{fence, serve};

/// Looks after StreamClusters, Topics and Subscriptions. Run two; one of them leads.
#[derive(Parser)]
#[command(name = "weir-operator", version)]
struct Options {
    /// The brokers' image where a StreamCluster names none.
    #[arg(long, env = "WEIR_BROKER_IMAGE", default_value = "weir:latest")]
    image: String,
    /// Its pull policy.
    #[arg(long, env = "WEIR_BROKER_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    image_pull_policy: String,
    /// Namespace of the Lease that says which replica leads.
    #[arg(long, env = "WEIR_NAMESPACE", default_value = "default")]
    namespace: String,
    /// This replica, in the Lease.
    #[arg(long, env = "WEIR_POD_NAME", default_value = "weir-operator")]
    name: String,
    /// The Kubernetes cluster's DNS domain.
    #[arg(long, env = "WEIR_DOMAIN", default_value = "cluster.local")]
    domain: String,
    /// Whether the platform chooses the users that pods run as, as OpenShift does; `auto` asks it.
    #[arg(long, env = "WEIR_OPENSHIFT", default_value = "auto")]
    openshift: OpenShift,
    /// Ends the operator's pods of this Deployment and takes all finalizers off, before it is uninstalled; nothing else.
    #[arg(long)]
    retire: Option<String>,
    /// Where metrics and health are served (HTTP).
    #[arg(long, env = "WEIR_METRICS_LISTEN", default_value = "0.0.0.0:9464")]
    metrics_listen: SocketAddr,
}

/// Whether pods run under users that the platform chooses.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum OpenShift {
    Auto,
    True,
    False,
}

impl OpenShift {
    async fn is(self, client: &kube::Client) -> Result<bool, kube::Error> {
        match self {
            Self::Auto => {
                let groups = client.list_api_groups().await?.groups;
                Ok(groups.iter().any(|group| group.name == "security.openshift.io"))
            }
            other => Ok(other == Self::True),
        }
    }
}

/// The lease's own task gives it back within this time, once nobody leads by it.
const RELEASE: Duration = Duration::from_secs(1);

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let client = kube::Client::try_default().await.context("no way to a Kubernetes API server was found")?;
    if let Some(deployment) = &options.retire {
        return weir_operator::retire::retire(client, &options.namespace, deployment).await;
    }
    let listener = tokio::net::TcpListener::bind(options.metrics_listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", options.metrics_listen))?;
    let health = Arc::<Health>::default();
    tokio::spawn(serve::health(listener, health.clone(), serve::REQUEST_WITHIN));
    tokio::spawn(health::look(client.clone(), health.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    tokio::pin!(stop);
    loop {
        let mut term = Box::pin(lead(&client, &options, &health));
        tokio::select! {
            () = &mut stop => {
                drop(term);
                tokio::time::sleep(RELEASE).await;
                return Ok(());
            }
            why = &mut term => tracing::warn!("{why}; waiting to lead again"),
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Waits for the lease and runs the controllers while this replica holds it; says why it ended.
async fn lead(client: &kube::Client, options: &Options, health: &Arc<Health>) -> String {
    let manager = LeaseManagerBuilder::new(client.clone(), MANAGER)
        .with_namespace(options.namespace.clone())
        .with_identity(options.name.clone())
        .with_duration(fence::LEASE_SECONDS)
        .with_grace(fence::GRACE_SECONDS)
        .build()
        .await;
    let manager = match manager {
        Ok(manager) => manager,
        Err(error) => return format!("the lease cannot be read: {error}"),
    };
    // once the receiver is dropped the task gives the lease back
    let (mut leads, _task) = manager.watch().await;
    if leads.wait_for(|l| *l).await.is_err() {
        return "the lease manager ended".to_owned();
    }
    let arbitrary_user = match options.openshift.is(client).await {
        Ok(is) => is,
        Err(error) => return format!("the API groups cannot be read: {error}"),
    };
    tracing::info!(name = options.name, "leading");
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(options.name.clone()) };
    let context = Arc::new(Context {
        client: client.clone(),
        brokers: Default::default(),
        clusters: OnceLock::new(),
        recorder: Recorder::new(client.clone(), reporter),
        settings: Settings {
            image: options.image.clone(),
            image_pull_policy: options.image_pull_policy.clone(),
            domain: options.domain.clone(),
            namespace: options.namespace.clone(),
            arbitrary_user,
        },
    });
    let leases = Api::namespaced(client.clone(), &options.namespace);
    // what this one began it must not go on with once another may lead: dropping the controllers ends it
    tokio::select! {
        () = serve::controllers(context, health.clone()) => "the controllers ended".to_owned(),
        lost = leads.wait_for(|l| !*l) => {
            drop(lost);
            "the lease was lost".to_owned()
        }
        () = fence::lost(leases, MANAGER, &options.name) => "the lease was not renewed in time".to_owned(),
    }
}
