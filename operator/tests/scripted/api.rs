//! An API server in memory: objects by path, what was asked, and how the operator's view of it may fail.

use http::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use weir_operator::{subscription, topic};

/// Objects by path.
pub(crate) type Objects = BTreeMap<String, Value>;

/// Views kept, to be read again.
const VIEWS_MAX: usize = 6;

#[derive(Default)]
struct State {
    objects: Objects,
    version: u64,
    /// writes that changed something, the brokers' too
    changes: usize,
    /// (method, path) of all requests but those about events
    requests: Vec<(Method, String)>,
    /// (reason, note) of all events
    events: Vec<(String, String)>,
    /// after the change of this number the operator has ended: its answer is lost, and nothing else is answered
    ends_at: Option<usize>,
    ended: bool,
    /// how things stood some looks ago, newest first; reads are answered from one of them
    views: VecDeque<Objects>,
    behind: usize,
    /// what happens when this path is read next
    when_read: Option<(String, Change)>,
}

type Change = Box<dyn FnOnce(&mut Objects) + Send>;

/// The server, shared by a client and a test.
#[derive(Clone, Default)]
pub(crate) struct Server(Arc<Mutex<State>>);

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

fn answer(status: StatusCode, body: &Value) -> Response<Body> {
    Response::builder().status(status).body(Body::from(body.to_string().into_bytes())).unwrap()
}

fn refused(status: StatusCode, reason: &str) -> Response<Body> {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason, "reason": reason,
        "code": status.as_u16()});
    answer(status, &body)
}

impl State {
    fn gone(&self) -> Response<Body> {
        refused(StatusCode::INTERNAL_SERVER_ERROR, "the operator ended here")
    }

    fn changed(&mut self) {
        self.changes += 1;
        self.ended |= self.ends_at == Some(self.changes);
    }

    fn handle(&mut self, method: &Method, path: &str, body: &[u8]) -> Response<Body> {
        if path.contains("/events") {
            let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
            let posted: Value = serde_json::from_slice(body).unwrap();
            self.events.push((text(&posted, "reason"), text(&posted, "note")));
            let event = json!({"metadata": {"name": "e"}, "reportingController": "", "eventTime": null});
            return answer(StatusCode::CREATED, &event);
        }
        self.requests.push((method.clone(), path.to_owned()));
        if self.ended {
            return self.gone();
        }
        if let Some((_, change)) = self.when_read.take_if(|(at, _)| *method == Method::GET && at == path) {
            change(&mut self.objects);
        }
        let answered = match *method {
            Method::GET => self.read(path),
            Method::PATCH => self.patch(path, body),
            Method::DELETE => self.delete(path, body),
            _ => refused(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
        };
        if self.ended { self.gone() } else { answered }
    }

    fn read(&self, path: &str) -> Response<Body> {
        let seen = self.behind.checked_sub(1).and_then(|at| self.views.get(at)).unwrap_or(&self.objects);
        if let Some(found) = seen.get(path) {
            return answer(StatusCode::OK, found);
        }
        // the last part of a collection's path is a plural, and no object here is called like that
        if path.rsplit('/').next().is_some_and(|last| last.ends_with('s') && !last.contains('-')) {
            let within = format!("{path}/");
            let items: Vec<&Value> = seen.iter().filter(|(p, _)| p.starts_with(&within)).map(|(_, o)| o).collect();
            let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items});
            return answer(StatusCode::OK, &list);
        }
        refused(StatusCode::NOT_FOUND, "NotFound")
    }

    fn patch(&mut self, path: &str, body: &[u8]) -> Response<Body> {
        let (object, subresource) = match path.strip_suffix("/status") {
            Some(object) => (object, true),
            None => (path, false),
        };
        let patch: Value = serde_json::from_slice(body).unwrap();
        let fresh = !self.objects.contains_key(object);
        if fresh && (subresource || patch.is_array()) {
            return refused(StatusCode::NOT_FOUND, "NotFound");
        }
        let uid = format!("uid-{}", self.version + 1);
        let new = || json!({"metadata": {"uid": uid, "generation": 1, "resourceVersion": "0"}});
        let before = self.objects.get(object).cloned().unwrap_or_else(new);
        let mut after = before.clone();
        if let Value::Array(operations) = &patch {
            // a finalizer's JSON patch
            let finalizer = if object.contains("/topics/") { topic::FINALIZER } else { subscription::FINALIZER };
            for operation in operations.iter().filter(|o| o["op"] != "test") {
                let add = operation["op"] == "add";
                after["metadata"]["finalizers"] = if add { json!([finalizer]) } else { json!([]) };
            }
        } else if subresource {
            after["status"] = patch["status"].clone();
        } else {
            merge(&mut after, &patch);
            if !fresh && after["spec"] != before["spec"] {
                after["metadata"]["generation"] = json!(before["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
            }
        }
        if fresh || after != before {
            self.version += 1;
            after["metadata"]["resourceVersion"] = json!(self.version.to_string());
            let meta = &after["metadata"];
            let over = meta["deletionTimestamp"].is_string() && meta["finalizers"] == json!([]);
            if over {
                self.objects.remove(object);
            } else {
                self.objects.insert(object.to_owned(), after.clone());
            }
            self.changed();
        }
        answer(if fresh { StatusCode::CREATED } else { StatusCode::OK }, &after)
    }

    fn delete(&mut self, path: &str, body: &[u8]) -> Response<Body> {
        let Some(found) = self.objects.get(path).cloned() else {
            return refused(StatusCode::NOT_FOUND, "NotFound");
        };
        let options: Value = serde_json::from_slice(body).unwrap_or_default();
        let (wanted, is) = (&options["preconditions"], &found["metadata"]);
        assert!(wanted["uid"].is_string() && wanted["resourceVersion"].is_string(), "{path} is deleted blindly");
        if wanted["uid"] != is["uid"] || wanted["resourceVersion"] != is["resourceVersion"] {
            return refused(StatusCode::CONFLICT, "Conflict");
        }
        self.objects.remove(path);
        self.changed();
        answer(StatusCode::OK, &found)
    }
}

impl Server {
    /// One that holds these.
    pub(crate) fn with(objects: &[(&str, Value)]) -> Self {
        let server = Self::default();
        server.state().objects = objects.iter().map(|(path, o)| ((*path).to_owned(), o.clone())).collect();
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A client of it.
    pub(crate) fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await.unwrap();
                Ok::<_, Infallible>(server.state().handle(&parts.method, parts.uri.path(), &body))
            }
        });
        Client::new(service, "shop")
    }

    /// An object as it is.
    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.state().objects.get(path).cloned()
    }

    /// An object as the operator sees it.
    pub(crate) fn seen(&self, path: &str) -> Option<Value> {
        let state = self.state();
        let seen = state.behind.checked_sub(1).and_then(|at| state.views.get(at)).unwrap_or(&state.objects);
        seen.get(path).cloned()
    }

    /// Everything.
    pub(crate) fn objects(&self) -> Objects {
        self.state().objects.clone()
    }

    /// What people and other controllers change.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Objects) -> T) -> T {
        change(&mut self.state().objects)
    }

    /// What others change when the operator reads a path next.
    pub(crate) fn when_read(&self, path: &str, change: impl FnOnce(&mut Objects) + Send + 'static) {
        self.state().when_read = Some((path.to_owned(), Box::new(change)));
    }

    /// Somebody's change of a spec.
    pub(crate) fn change_spec(&self, path: &str, field: &str, value: Value) {
        self.change(|objects| {
            let object = objects.get_mut(path).unwrap();
            object["spec"][field] = value;
            object["metadata"]["generation"] = json!(object["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
        });
    }

    /// A version that none had before.
    pub(crate) fn next_version(&self) -> String {
        self.state().version += 1;
        self.state().version.to_string()
    }

    /// Requests since this was last asked.
    pub(crate) fn take_requests(&self) -> Vec<(Method, String)> {
        std::mem::take(&mut self.state().requests)
    }

    /// Notes of the events of a reason.
    pub(crate) fn notes(&self, reason: &str) -> Vec<String> {
        let state = self.state();
        state.events.iter().filter(|(r, _)| r == reason).map(|(_, note)| note.clone()).collect()
    }

    /// Writes that changed something.
    pub(crate) fn changes(&self) -> usize {
        self.state().changes
    }

    /// The operator ends right after this change, counted from the beginning, and does not learn that it was made.
    pub(crate) fn end_at(&self, change: usize) {
        self.state().ends_at = Some(change);
    }

    /// Another operator begins where one has ended.
    pub(crate) fn begin_again(&self) {
        let mut state = self.state();
        if state.ended {
            (state.ended, state.ends_at) = (false, None);
        }
    }

    /// Something was changed beside the API server; true where the operator has ended before or by it.
    pub(crate) fn changes_elsewhere(&self) -> bool {
        let mut state = self.state();
        state.changed();
        state.ended
    }

    /// True where nothing the operator says arrives.
    pub(crate) fn has_ended(&self) -> bool {
        self.state().ended
    }

    /// Keeps how things stand now, to be read later.
    pub(crate) fn keep_view(&self) {
        let mut state = self.state();
        let now = state.objects.clone();
        state.views.push_front(now);
        state.views.truncate(VIEWS_MAX);
    }

    /// Reads are answered as of so many kept views ago; 0: as it is.
    pub(crate) fn read_behind(&self, views: usize) {
        self.state().behind = views;
    }
}
