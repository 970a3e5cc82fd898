//! An API server with etcd alone, on loopback: enough for what definitions say, and up in seconds.

use anyhow::{Context as _, ensure};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig, NamedAuthInfo, NamedCluster, NamedContext};
use kube::{Client, Config};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long it may take until it is ready.
const START_MAX: Duration = Duration::from_secs(90);

/// It ends with this, and its folder goes.
pub struct ApiServer {
    /// A client that may do everything.
    pub client: Client,
    /// A file for `kubectl`.
    pub kubeconfig: PathBuf,
    home: PathBuf,
    children: Vec<Child>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

fn free_port() -> std::io::Result<u16> {
    std::net::TcpListener::bind("127.0.0.1:0")?.local_addr().map(|a| a.port())
}

fn start(home: &Path, program: &Path, arguments: &[String]) -> anyhow::Result<Child> {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let log = File::create(home.join(format!("{name}.log")))?;
    let mut command = Command::new(program);
    command.current_dir(home).args(arguments).stdout(Stdio::null()).stderr(log);
    command.spawn().with_context(|| name)
}

fn kubeconfig(port: u16) -> Kubeconfig {
    let cluster = kube::config::Cluster {
        server: Some(format!("https://127.0.0.1:{port}")),
        insecure_skip_tls_verify: Some(true),
        ..Default::default()
    };
    let user = AuthInfo { token: Some("alone".to_owned().into()), ..Default::default() };
    let context = kube::config::Context { cluster: "alone".into(), user: Some("admin".into()), ..Default::default() };
    Kubeconfig {
        clusters: vec![NamedCluster { name: "alone".into(), cluster: Some(cluster), ..Default::default() }],
        auth_infos: vec![NamedAuthInfo { name: "admin".into(), auth_info: Some(user), ..Default::default() }],
        contexts: vec![NamedContext { name: "alone".into(), context: Some(context), ..Default::default() }],
        current_context: Some("alone".into()),
        ..Default::default()
    }
}

impl ApiServer {
    /// Starts one from the folder of programs that `e2e/cluster/build.sh` filled; `home` is made, and is this one's own.
    pub async fn start(programs: &Path, home: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&home)?;
        let key = home.join("sa.key");
        let made = Command::new("openssl").args(["genrsa", "-out"]).arg(&key).output().context("openssl")?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        std::fs::write(home.join("tokens.csv"), "alone,admin,admin,\"system:masters\"\n")?;
        let (clients, peers, port) = (free_port()?, free_port()?, free_port()?);
        let etcd_url = format!("http://127.0.0.1:{clients}");
        let peer_url = format!("http://127.0.0.1:{peers}");
        let etcd = [
            "--data-dir=etcd".to_owned(),
            "--unsafe-no-fsync=true".to_owned(),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=default={peer_url}"),
        ];
        let api = [
            format!("--etcd-servers={etcd_url}"),
            format!("--secure-port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--cert-dir=certs".to_owned(),
            "--service-account-key-file=sa.key".to_owned(),
            "--service-account-signing-key-file=sa.key".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--token-auth-file=tokens.csv".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
        ];
        let kubeconfig_file = home.join("kubeconfig");
        let configuration = kubeconfig(port);
        std::fs::write(&kubeconfig_file, serde_yaml_ng::to_string(&configuration)?)?;
        let config = Config::from_custom_kubeconfig(configuration, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        let mut this = Self { client, kubeconfig: kubeconfig_file, home, children: Vec::new() };
        this.children.push(start(&this.home, Path::new("etcd"), &etcd)?);
        this.children.push(start(&this.home, &programs.join("kube-apiserver"), &api)?);
        let ready = async {
            while this.client.apiserver_version().await.is_err() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let waited = tokio::time::timeout(START_MAX, ready).await;
        if waited.is_err() {
            let log = std::fs::read_to_string(this.home.join("kube-apiserver.log")).unwrap_or_default();
            let end: Vec<&str> = log.lines().rev().take(15).collect();
            anyhow::bail!("the API server is not ready after {START_MAX:?}:\n{}", end.join("\n"));
        }
        Ok(this)
    }
}
