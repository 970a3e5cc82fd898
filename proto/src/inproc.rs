//! Brokers of this process, by name: what `inproc:NAME` reaches. Calls go straight to their services, without a socket or HTTP/2.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tonic::service::Routes;

static BROKERS: Mutex<BTreeMap<String, Routes>> = Mutex::new(BTreeMap::new());

fn brokers() -> MutexGuard<'static, BTreeMap<String, Routes>> {
    BROKERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A broker's place among those of this process; dropped, it is reached no more.
#[derive(Debug)]
pub struct Place(String);

impl Drop for Place {
    fn drop(&mut self) {
        brokers().remove(&self.0);
    }
}

/// Lets this process reach a broker's services under `name`; `None` where another has that name.
pub fn register(name: &str, services: Routes) -> Option<Place> {
    let mut all = brokers();
    if all.contains_key(name) {
        return None;
    }
    all.insert(name.to_owned(), services.prepare());
    Some(Place(name.to_owned()))
}

/// The services of a broker of this process.
pub fn find(name: &str) -> Option<Routes> {
    brokers().get(name).cloned()
}
