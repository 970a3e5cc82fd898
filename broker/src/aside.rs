//! Data that must not be used as it is: of a broker that was removed from its cluster, or found damaged as a whole. It is set aside,
//! never repaired and never deleted by itself, and the broker begins with an empty disk. Which cluster it belonged to is kept in
//! a file of its own, so that an empty disk begun in this way joins that cluster or waits, and never forms another.

use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weir_core::storage::StoreError;
use weir_store::rocks::RocksStore;

/// Ends the process in this way when it is to be started again; EX_TEMPFAIL of sysexits.h.
pub const START_AGAIN: i32 = 75;

fn database(data: &Path) -> PathBuf {
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

/// A member of the cluster said that this broker is none any more: its data is of no use, and a new start begins without it.
pub fn leave(data: &Path, broker: u64) -> ! {
    eprintln!(
        "weir-broker: broker {broker} was removed from the cluster; its data is set aside, and it may join again under a new id"
    );
    if let Err(error) = write_synced(&data.join("removed"), &broker.to_string()) {
        eprintln!("weir-broker: {}: {error}", data.display());
    }
    std::process::exit(START_AGAIN);
}

/// Opens the store of a folder; that of a broker that was removed is set aside first. One whose files are damaged is left alone,
/// unless `others_live`: a member of its cluster answers, that may have what it held.
pub fn open(data: &Path, others_live: bool) -> anyhow::Result<Arc<RocksStore>> {
    let path = database(data);
    if std::fs::read_to_string(data.join("removed")).is_ok() {
        set_aside(data)?;
        std::fs::remove_file(data.join("removed"))?;
    }
    let cannot = || format!("cannot open the data in {}", data.display());
    match RocksStore::open(&path) {
        Ok(store) => Ok(Arc::new(store)),
        Err(error @ StoreError::Corrupt(_)) if others_live => {
            tracing::error!(%error, "this broker's store is damaged: it is set aside, and rebuilt from the others");
            set_aside(data)?;
            Ok(Arc::new(RocksStore::open(&path).with_context(cannot)?))
        }
        Err(error @ StoreError::Corrupt(_)) => Err(error).with_context(|| {
            format!(
                "the data in {} is damaged, and no other broker of its cluster answers to have it from: start again once one does, \
                 restore the folder from a copy, or move it away to begin with nothing",
                data.display()
            )
        }),
        Err(error) => Err(error).with_context(cannot),
    }
}

fn set_aside(data: &Path) -> anyhow::Result<()> {
    let path = database(data);
    if !path.exists() {
        return Ok(());
    }
    let free = (1..).map(|n| data.join(format!("db.aside-{n}"))).find(|p| !p.exists());
    let aside = free.context("no name is free")?;
    std::fs::rename(&path, &aside).with_context(|| format!("cannot move {} aside", path.display()))?;
    tracing::warn!(at = %aside.display(), "data set aside; delete it when nobody needs to look into it");
    Ok(())
}
