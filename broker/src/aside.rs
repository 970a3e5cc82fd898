//! Data that must not be used as it is: of a broker that was removed from its cluster, or found damaged as a whole. It is set aside,
//! never repaired and never deleted by itself, and the broker begins with an empty disk. Which cluster it belonged to is kept in
//! a file of its own, so that an empty disk begun in this way joins that cluster or waits, and never forms another.
//!
//! A damaged store is set aside only while the other replicas of everything in it are a majority and live. A broker whose store nobody
//! can replace serves what can be read, or ends with an error that says what is missing. Each start decides anew.

use crate::metrics::Metrics;
use crate::output;
use crate::vital;
use anyhow::Context as _;
use futures::future::BoxFuture;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;
use weir_core::storage::StoreError;
use weir_store::rocks::RocksStore;
use weir_store::{synced, torn};

/// Ends the process in this way when it is to be started again; EX_TEMPFAIL of sysexits.h.
pub const START_AGAIN: i32 = 75;

/// Between two questions whether other brokers can replace a store that was found damaged while it runs.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// The folder of a broker's database.
pub fn database(data: &Path) -> PathBuf {
    data.join("db")
}

/// The cluster this folder's broker belongs to, as far as was ever known; empty otherwise.
pub fn cluster(data: &Path) -> String {
    std::fs::read_to_string(data.join("cluster")).map(|s| s.trim().to_owned()).unwrap_or_default()
}

fn write_synced(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, format!("{text}\n"))?;
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Keeps which cluster this folder's broker belongs to.
pub fn remember(data: &Path, cluster_id: &str) -> std::io::Result<()> {
    if cluster(data) == cluster_id { Ok(()) } else { write_synced(&data.join("cluster"), cluster_id) }
}

/// Why data was set aside, for as long as the broker has not joined again; empty where none was.
pub fn why(data: &Path) -> String {
    std::fs::read_to_string(data.join("aside")).map(|s| s.trim().to_owned()).unwrap_or_default()
}

/// The broker has joined: the others know why its data was set aside.
pub fn has_joined(data: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(data.join("aside")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Members of the cluster know that this broker's data must not be used, and `why`: a new start begins without it.
pub fn leave(data: &Path, broker: u64, why: &str) -> ! {
    output::note(format_args!(
        "weir-broker: broker {broker} {why}; its data is set aside, and it may join again under a new id"
    ));
    if let Err(error) = write_synced(&data.join("removed"), &format!("broker {broker} {why}")) {
        output::note(format_args!("weir-broker: {}: {error}", data.display()));
    }
    vital::exit(START_AGAIN)
}

/// Asks whether other brokers can replace all that this broker's store holds.
pub type CanReplace = Arc<dyn Fn() -> BoxFuture<'static, bool> + Send + Sync>;

/// An opened store.
pub struct Opened {
    /// The store.
    pub store: Arc<RocksStore>,
    /// The damaged one was set aside for it: this one is empty.
    pub rebuilt: bool,
}

/// Opens the store of a folder; that of a broker that was removed is set aside first. A damaged one is set aside if the other brokers
/// `can_replace` it; one whose log lacks synced writes is opened as it is if `accepted` names the last of those.
pub async fn open(data: &Path, accepted: Option<u64>, can_replace: CanReplace) -> anyhow::Result<Opened> {
    let path = database(data);
    if let Ok(why) = std::fs::read_to_string(data.join("removed")) {
        set_aside(data, why.trim())?;
        std::fs::remove_file(data.join("removed"))?;
    }
    let open = |accepted| {
        let path = path.clone();
        tokio::task::spawn_blocking(move || RocksStore::open_accepting(&path, accepted))
    };
    let damage = match RocksStore::noted_damage(&path) {
        Some(what) => Err(StoreError::Corrupt(what)),
        None => open(accepted).await?,
    };
    let cannot = || format!("cannot open the data in {}", data.display());
    let error = match damage {
        Ok(store) => return Ok(Opened { store: Arc::new(store), rebuilt: false }),
        Err(error) if !error.is_damage() => return Err(error).with_context(cannot),
        Err(error) => error,
    };
    if can_replace().await {
        tracing::error!(%error, "this broker's store is damaged: it is set aside, and rebuilt from the other brokers");
        set_aside(data, &format!("its store was damaged: {error}"))?;
        let store = Arc::new(open(None).await?.with_context(cannot)?);
        return Ok(Opened { store, rebuilt: true });
    }
    // a store that opens in spite of its damage serves what can be read
    let store = match open(accepted).await? {
        Ok(store) => store,
        Err(error) => return Err(error).with_context(|| remedy(data)),
    };
    if accepted.is_some() {
        tracing::error!("the loss of acknowledged records was accepted: the log is used as far as it can be read");
    }
    Ok(Opened { store: Arc::new(store), rebuilt: false })
}

/// What is wrong with a folder that does not open, and what helps.
fn remedy(data: &Path) -> String {
    let path = database(data);
    let log = torn::damaged_log(&path).map_or(String::new(), |file| format!(" (damaged: {})", file.display()));
    let accept = synced::read(&path).map_or(String::new(), |mark| {
        format!(
            ", start once with --accept-loss {} to go on with what is left and without the records that are lost",
            mark.sequence
        )
    });
    format!(
        "the data in {} is damaged{log}, and no majority of other brokers can replace it. Start again once they answer, put the damaged \
         file back from a copy (`weir-broker verify {}` names it){accept}, or move the folder away to begin with nothing",
        data.display(),
        data.display()
    )
}

/// Watches for damage of the store as a whole while the broker runs. Once the others can replace it, the process ends: the next start
/// sets the store aside. Until then it serves what can be read.
pub async fn watch(store: Weak<RocksStore>, metrics: Arc<Metrics>, can_replace: CanReplace) {
    let mut reported = false;
    while let Some(store) = store.upgrade() {
        if let Some(what) = store.damage() {
            if !reported {
                reported = true;
                metrics.store_damaged(what);
            }
            if can_replace().await {
                output::note(format_args!(
                    "weir-broker: the store is damaged ({what}); starting again to rebuild it from the other brokers"
                ));
                vital::exit(START_AGAIN);
            }
        }
        drop(store);
        tokio::time::sleep(ASK_EVERY).await;
    }
}

fn set_aside(data: &Path, why: &str) -> anyhow::Result<()> {
    let path = database(data);
    if !path.exists() {
        return Ok(());
    }
    write_synced(&data.join("aside"), &why.replace('\n', " "))?;
    let free = (1..).map(|n| data.join(format!("db.aside-{n}"))).find(|p| !p.exists());
    let aside = free.context("no name is free")?;
    std::fs::rename(&path, &aside).with_context(|| format!("cannot move {} aside", path.display()))?;
    tracing::warn!(at = %aside.display(), "data set aside; delete it when nobody needs to look into it");
    Ok(())
}
