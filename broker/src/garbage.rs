//! Room that retention freed between payloads that are kept: RocksDB gives it back only by moving those. It is done when it is worth
//! it, and where there is room to do it.

use crate::node_loop::NodeHandle;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;
use weir_store::rocks::RocksStore;
use weir_store::room;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// The same where there is little room.
const LOOK_EVERY_LOW: Duration = Duration::from_secs(5);
/// Garbage up to this is left alone on a large disk, bytes; a 16th of a small one.
const GARBAGE_BYTES: u64 = 1 << 30;

/// Looks every minute, or more often where there is little room, as long as the node runs.
pub async fn collect(node: NodeHandle, store: Weak<RocksStore>, data: PathBuf) {
    let mut left = 0;
    while let Some(kept) = node.ask(|node| node.kept_bytes()).await {
        let Some(store) = store.upgrade() else { return };
        let (free, whole) = room::of(&data).unwrap_or_default();
        let held = store.blob_bytes();
        // compaction would fail at a damaged file, and writes after it
        let whole_store = store.damage().is_none();
        if whole_store && is_worth(held, kept, left, whole) && has_room(free, kept, whole) {
            move_payloads(&store).await;
            left = store.blob_bytes();
            tracing::info!(held, left, kept, "moved payloads to give room back that retention had freed");
        }
        drop(store);
        let is_low = free < 2 * room::reserve_of(whole);
        tokio::time::sleep(if is_low { LOOK_EVERY_LOW } else { LOOK_EVERY }).await;
    }
}

/// Payloads are moved once for every time as much was removed; not again where that freed nothing.
fn is_worth(held: u64, kept: u64, left: u64, whole: u64) -> bool {
    held > 2 * kept + GARBAGE_BYTES.min(whole / 16) && held > left + left / 2
}

/// Whether what is kept can be written once more. Where little is kept, a full disk has room for that: tables that are not compacted yet
/// may hold all payloads of a topic that was deleted.
fn has_room(free: u64, kept: u64, whole: u64) -> bool {
    free > kept + room::reserve_of(whole) || free / 4 > kept
}

async fn move_payloads(store: &Arc<RocksStore>) {
    let (done, moved) = tokio::sync::oneshot::channel();
    let store = store.clone();
    // a thread of its own: the runtime does not wait for it when the process ends
    let run = move || drop(done.send(store.collect_garbage()));
    if std::thread::Builder::new().name("weir-garbage".into()).spawn(run).is_ok()
        && let Ok(Err(error)) = moved.await
    {
        tracing::warn!(%error, "cannot give room back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_moved_when_as_much_is_garbage_and_not_again_where_it_did_not_help() {
        let gib = 1 << 30;
        assert!(!is_worth(20 * gib, 10 * gib, 0, 100 * gib));
        assert!(is_worth(22 * gib, 10 * gib, 0, 100 * gib));
        assert!(!is_worth(22 * gib, 10 * gib, 20 * gib, 100 * gib), "the last time it left as much");
        assert!(is_worth(gib / 4, gib / 16, 0, gib), "a small disk");
        let mib = 1 << 20;
        assert!(has_room(8 * mib, 1_000, 512 * mib), "a full disk of which nothing is kept");
        assert!(!has_room(8 * mib, 4 * mib, 512 * mib) && has_room(200 * mib, 60 * mib, 512 * mib));
    }
}
