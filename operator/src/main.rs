//! `weir-operator`: looks after StreamClusters, Topics and Subscriptions of a Kubernetes cluster.

use anyhow::Context as _;
use clap::Parser;
use kube::runtime::events::{Recorder, Reporter};
use kube_lease_manager::LeaseManagerBuilder;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use tokio::signal::unix::{SignalKind, signal};
use weir_operator::context::{Context, MANAGER, Settings};
use weir_operator::serve;

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
    /// Ends the operator's pods of this Deployment and takes all finalizers off, before it is uninstalled; nothing else.
    #[arg(long)]
    retire: Option<String>,
    /// Where metrics and health are served (HTTP).
    #[arg(long, env = "WEIR_METRICS_LISTEN", default_value = "0.0.0.0:9464")]
    metrics_listen: SocketAddr,
}

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
    tokio::spawn(serve::health(listener));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let manager = LeaseManagerBuilder::new(client.clone(), MANAGER)
        .with_namespace(options.namespace.clone())
        .with_identity(options.name.clone())
        .with_duration(15)
        .with_grace(5)
        .build()
        .await?;
    let (mut leads, lease) = manager.watch().await;
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(options.name.clone()) };
    let settings =
        Settings { image: options.image, image_pull_policy: options.image_pull_policy, domain: options.domain };
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    tokio::pin!(stop);
    tokio::select! {
        () = &mut stop => return Ok(()),
        leading = leads.wait_for(|l| *l) => drop(leading.context("the lease manager ended")?),
    }
    tracing::info!(name = options.name, "leading");
    let context = Arc::new(Context {
        client: client.clone(),
        brokers: Default::default(),
        clusters: OnceLock::new(),
        recorder: Recorder::new(client, reporter),
        settings,
    });
    let ended = tokio::select! {
        () = &mut stop => Ok(()),
        () = serve::controllers(context) => Err(anyhow::anyhow!("the controllers ended")),
        // another replica may lead already: what this one began, it must not go on with
        lost = leads.wait_for(|l| !*l) => {
            drop(lost);
            Err(anyhow::anyhow!("the lease was lost; starting again as a follower"))
        }
    };
    drop(leads); // gives the lease back
    let _ = tokio::time::timeout(std::time::Duration::from_secs(3), lease).await;
    ended
}
