//! Structured logs on standard error, their level changeable at run time.

use std::sync::OnceLock;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging at `info`, or as `WEIR_LOG` says. Once a process; later calls change nothing.
pub fn start() {
    let filter = EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let (layer, handle) = reload::Layer::new(filter);
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    if tracing_subscriber::registry().with(layer).with(format).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// Changes the filter.
pub fn set_filter(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| e.to_string())?;
    let handle = FILTER.get().ok_or("logging was not started by this program")?;
    handle.reload(filter).map_err(|e| e.to_string())
}
