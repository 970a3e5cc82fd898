//! Push: for services without a client, a partition's leader POSTs a subscription's messages to an endpoint, as CloudEvents 1.0 in
//! binary content mode (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md>). To its hub each
//! of the requests under way is a member with credit for one message; so order, back-off, dead letters and rates are the hub's.
//!
//! An answer of 2xx is an ack. An endpoint that takes no connection, or says 429, 502, 503 or 504, is waited for with the message in hand:
//! that is no failed delivery. Any other answer is, none in time, and a connection that breaks once the message was sent: it may be
//! the message that breaks the endpoint.

use crate::hub::Command;
use crate::outlet;
use crate::service::Context;
use crate::service::subscriber::{Attached, Place};
use crate::status::Failure;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Request, StatusCode, Uri};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::state::Push;
use weir_proto::v1;

/// Between two looks at what is to be pushed from here.
const LOOK: Duration = Duration::from_millis(250);
/// Wait after a first failure; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest wait between two requests to an endpoint that fails.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Longest wait an endpoint may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);
/// An endpoint that takes no connection by then is away. An answer may take its time besides.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Headers of a message that go along; one with more is refused.
const HEADERS_MAX: usize = 256;

type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Refuses what is not an endpoint.
pub fn check_endpoint(endpoint: &str) -> Result<(), Failure> {
    let wrong = |why: &str| Failure::invalid("ENDPOINT", format!("push endpoint '{endpoint}': {why}"));
    let uri: Uri = endpoint.parse().map_err(|_| wrong("is not a URL"))?;
    match uri.scheme_str() {
        Some("http" | "https") if uri.host().is_some_and(|h| !h.is_empty()) => Ok(()),
        Some("http" | "https") => Err(wrong("names no host")),
        _ => Err(wrong("begins with http:// or https://")),
    }
}

fn client() -> Http {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT_MAX));
    let https = match HttpsConnectorBuilder::new().with_native_roots() {
        Ok(builder) => builder.https_or_http().enable_http1().wrap_connector(http),
        Err(error) => {
            tracing::warn!(%error, "no certificates of authorities here: https endpoints cannot be pushed to");
            let none = rustls::ClientConfig::builder().with_root_certificates(rustls::RootCertStore::empty());
            HttpsConnectorBuilder::new()
                .with_tls_config(none.with_no_client_auth())
                .https_or_http()
                .enable_http1()
                .wrap_connector(http)
        }
    };
    Client::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(30)).build(https)
}

struct Pusher {
    push: Push,
    requests: JoinSet<()>,
}

/// Keeps requests under way for each partition led here of each subscription that is pushed.
pub async fn tend(context: Context) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut http = None;
    let mut pushers: HashMap<(GroupId, SubscriptionId), Pusher> = HashMap::new();
    loop {
        let meta = context.shared.meta();
        let mut wanted = HashMap::new();
        for subscription in meta.subscriptions.values().filter(|s| s.snapshot_of == 0) {
            let Some(push) = &subscription.spec.push else { continue };
            for topic in meta.topics_of(&subscription.spec) {
                for (partition, group) in (0..).zip(topic.groups.iter().map(|g| GroupId(*g))) {
                    if context.shared.leads(group) {
                        let key = (group, SubscriptionId(subscription.id));
                        wanted.insert(key, (push, subscription, topic, partition));
                    }
                }
            }
        }
        // a request's task ends only by a fault of ours: all of them begin anew
        pushers.retain(|_, pusher| pusher.requests.try_join_next().is_none());
        pushers.retain(|key, pusher| wanted.get(key).is_some_and(|(push, ..)| **push == pusher.push));
        for (key, (push, subscription, topic, partition)) in wanted {
            if pushers.contains_key(&key) {
                continue;
            }
            let http = http.get_or_insert_with(client);
            let mut requests = JoinSet::new();
            for number in 0..push.concurrency {
                let member = Member {
                    context: context.clone(),
                    http: http.clone(),
                    push: push.clone(),
                    subscription: subscription.name.clone(),
                    topic: topic.name.clone(),
                    partition,
                    ack_deadline_ms: subscription.spec.ack_deadline_ms,
                    name: format!("push-{number}"),
                };
                requests.spawn(member.run());
            }
            pushers.insert(key, Pusher { push: push.clone(), requests });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What became of one request.
enum Answer {
    Taken,
    /// not now: the same again, after so long where the endpoint says so
    Later(Option<Duration>, String),
    /// this message failed
    Refused(Option<Duration>, String),
}

struct Member {
    context: Context,
    http: Http,
    push: Push,
    subscription: String,
    topic: String,
    partition: u32,
    ack_deadline_ms: u64,
    name: String,
}

impl Member {
    async fn run(self) {
        loop {
            let opened = Mutex::new(None);
            let attach = |answer| {
                let (out, inlet) = outlet::open(self.context.budget.answers(Default::default()));
                *opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(inlet);
                Command::Attach { name: self.name.clone(), messages: true, out, answer }
            };
            let place = Place {
                subscription: &self.subscription,
                topic: &self.topic,
                partition: self.partition,
                topic_id: 0,
                subscription_id: 0,
            };
            let attached = self.context.ask_a_hub(place, attach).await;
            let inlet = opened.into_inner().unwrap_or_else(PoisonError::into_inner);
            match (attached, inlet) {
                (Ok((member, hub)), Some(mut inlet)) => {
                    // a request that is ended by this broker is no failure of its message
                    let mut attached = Attached::new(self.context.clone(), hub.clone(), member);
                    attached.clean = true;
                    let one = v1::PullRequest { credit_messages: 1, ..Default::default() };
                    let _ = hub.send(Command::Say(member, one)).await;
                    while let Some(Ok(response)) = inlet.recv().await {
                        for message in response.messages {
                            self.deliver(&hub, member, message).await;
                        }
                    }
                }
                (Ok(_), None) => {}
                (Err(failure), _) => {
                    tracing::debug!(subscription = self.subscription, why = failure.message, "no delivery")
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// POSTs a message until its fate is known, and tells the hub.
    async fn deliver(&self, hub: &mpsc::Sender<Command>, member: u64, message: v1::ReceivedMessage) {
        let (start, end) = (message.offset, message.offset + 1);
        let mut pause = PAUSE_MIN;
        // a hub that has ended begins anew, and delivers the message again
        while !hub.is_closed() {
            // the lease lasts as long as the request may
            self.hold(hub, member, start, self.answer_max().as_millis() as u64).await;
            let mut said = v1::PullRequest { credit_messages: 1, ..Default::default() };
            let (outcome, wait) = match self.post(&message).await {
                Answer::Taken => {
                    said.acks.push(v1::OffsetRange { start, end });
                    ("taken", None)
                }
                Answer::Refused(after, why) => {
                    self.note(&message, &why);
                    let delay_ms = after.map(|d| d.as_millis() as u64);
                    said.nacks.push(v1::Nacked { start, end, delay_ms, uncounted: false });
                    ("refused", Some(PAUSE_MIN))
                }
                Answer::Later(after, why) => {
                    self.note(&message, &why);
                    self.context.metrics.pushed.with_label_values(&[&self.subscription, "later"]).inc();
                    self.wait_holding(hub, member, start, after.map_or(pause, |a| a.max(pause))).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                    continue;
                }
            };
            self.context.metrics.pushed.with_label_values(&[&self.subscription, outcome]).inc();
            let _ = hub.send(Command::Say(member, said)).await;
            if let Some(wait) = wait {
                tokio::time::sleep(wait).await;
            }
            return;
        }
    }

    /// Keeps a lease for so long, and an ack deadline beyond.
    async fn hold(&self, hub: &mpsc::Sender<Command>, member: u64, offset: u64, for_ms: u64) {
        let deadline_ms = for_ms + self.ack_deadline_ms;
        let extensions = vec![v1::Extension { start: offset, end: offset + 1, deadline_ms }];
        let _ = hub.send(Command::Say(member, v1::PullRequest { extensions, ..Default::default() })).await;
    }

    /// Waits, and keeps the lease meanwhile.
    async fn wait_holding(&self, hub: &mpsc::Sender<Command>, member: u64, offset: u64, wait: Duration) {
        let end = Instant::now() + wait;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || hub.is_closed() {
                return;
            }
            let part = left.min(Duration::from_millis(self.ack_deadline_ms / 2).max(LOOK));
            self.hold(hub, member, offset, part.as_millis() as u64).await;
            tokio::time::sleep(part).await;
        }
    }

    fn note(&self, message: &v1::ReceivedMessage, why: &str) {
        let Some(left_out) = self.context.metrics.seldom.now("push", &self.subscription) else { return };
        tracing::info!(
            subscription = self.subscription,
            topic = self.topic,
            partition = self.partition,
            offset = message.offset,
            delivery = message.delivery,
            why,
            left_out,
            "a push was not taken"
        );
    }

    fn answer_max(&self) -> Duration {
        CONNECT_MAX + Duration::from_millis(self.push.timeout_ms)
    }

    async fn post(&self, message: &v1::ReceivedMessage) -> Answer {
        let request = match to_request(&self.push.endpoint, &self.topic, message) {
            Ok(request) => request,
            Err(why) => return Answer::Refused(None, why),
        };
        let answered = tokio::time::timeout(self.answer_max(), self.http.request(request));
        let response = match answered.await {
            Err(_) => return Answer::Refused(None, format!("no answer within {} ms", self.push.timeout_ms)),
            Ok(Err(error)) => {
                let mut why = error.to_string();
                let mut source = std::error::Error::source(&error);
                while let Some(cause) = source {
                    let _ = write!(why, ": {cause}");
                    source = cause.source();
                }
                return if error.is_connect() { Answer::Later(None, why) } else { Answer::Refused(None, why) };
            }
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        let after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.trim().parse().ok());
        let after = after.map(|seconds: u64| Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
        match status {
            s if s.is_success() => Answer::Taken,
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Answer::Later(after, format!("the endpoint says {status}")),
            // none at all is by the subscription's back-off
            _ => Answer::Refused(after.filter(|a| !a.is_zero()), format!("the endpoint says {status}")),
        }
    }
}

/// An attribute's value as a header has it: what is not printable ASCII, and space, quote and percent, as %XX of its UTF-8.
fn encoded(value: &str) -> HeaderValue {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if (0x21..=0x7e).contains(&byte) && byte != b'"' && byte != b'%' {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    HeaderValue::try_from(out).expect("printable ASCII")
}

/// A message as a CloudEvent. Its headers `ce_…` (as the Kafka binding has them) are the event's attributes, `content-type` the type of
/// its data; others go along as `x-weir-…`.
pub fn to_request(endpoint: &str, topic: &str, message: &v1::ReceivedMessage) -> Result<Request<Full<Bytes>>, String> {
    let empty = v1::Message::default();
    let body = message.message.as_ref().unwrap_or(&empty);
    if body.headers.len() > HEADERS_MAX {
        return Err(format!("it has {} headers, at most {HEADERS_MAX} can be pushed", body.headers.len()));
    }
    let mut request =
        Request::post(endpoint).body(Full::new(body.value.clone().unwrap_or_default())).map_err(|e| e.to_string())?;
    let headers = request.headers_mut();
    let at = chrono::DateTime::from_timestamp_millis(body.timestamp_ms.unwrap_or(0)).unwrap_or_default();
    let place = format!("{topic}/{}/{}", message.partition, message.offset);
    headers.insert("ce-specversion", HeaderValue::from_static("1.0"));
    headers.insert("ce-id", encoded(&place));
    headers.insert("ce-source", encoded(&format!("/topics/{topic}")));
    headers.insert("ce-type", HeaderValue::from_static("dev.weir.message"));
    headers.insert("ce-time", encoded(&at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)));
    if let Ok(key) = std::str::from_utf8(body.key.as_deref().unwrap_or_default())
        && !key.is_empty()
    {
        headers.insert("ce-subject", encoded(key));
        headers.insert("ce-partitionkey", encoded(key));
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    for v1::Header { name, value } in &body.headers {
        // HTTP has no header without a value
        let bytes = value.as_deref().unwrap_or_default();
        let value = encoded(&String::from_utf8_lossy(bytes));
        let lower = name.to_ascii_lowercase();
        if let Some(attribute) = lower.strip_prefix("ce_") {
            // an attribute has one value: the last
            if let Ok(name) = HeaderName::try_from(format!("ce-{attribute}")) {
                headers.insert(name, value);
            }
        } else if lower == "content-type" {
            // a media type is a header's value as it is
            if let Ok(kind) = HeaderValue::from_bytes(bytes) {
                headers.insert(CONTENT_TYPE, kind);
            }
        } else if let Ok(name) = HeaderName::try_from(format!("x-weir-{lower}")) {
            headers.append(name, value);
        }
    }
    headers.insert("x-weir-topic", encoded(topic));
    headers.insert("x-weir-partition", message.partition.into());
    headers.insert("x-weir-offset", message.offset.into());
    headers.insert("x-weir-delivery", message.delivery.into());
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_urls() {
        for good in ["http://mail.shop.svc/events", "https://example.org:8443/a?b=c"] {
            assert!(check_endpoint(good).is_ok(), "{good}");
        }
        for bad in ["", "mail", "ftp://x/y", "http://", "/events", "http:// x"] {
            assert!(check_endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_message_becomes_a_cloud_event() {
        let headers = [
            ("ce_type", "com.example.signup"),
            ("content-type", "application/json; charset=utf-8"),
            ("Region", "Zürich 1"),
            ("bad name", "x"),
            ("region", "Bern"),
            ("ce_type", "com.example.login"),
        ];
        let message = v1::ReceivedMessage {
            partition: 3,
            offset: 42,
            delivery: 2,
            message: Some(v1::Message {
                key: Some("alice \"a\"".into()),
                value: Some("{}".into()),
                headers: headers.map(|(n, v)| v1::Header { name: n.to_owned(), value: Some(v.into()) }).into(),
                timestamp_ms: Some(1_700_000_000_123),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = to_request("http://h/x", "shop/people", &message).unwrap();
        let get = |name: &str| request.headers().get(name).map(|v| v.to_str().unwrap());
        assert_eq!(get("ce-specversion"), Some("1.0"));
        assert_eq!(get("ce-id"), Some("shop/people/3/42"));
        assert_eq!(get("ce-source"), Some("/topics/shop/people"));
        assert_eq!(get("ce-type"), Some("com.example.login"), "the last one of a name counts");
        assert_eq!(get("ce-time"), Some("2023-11-14T22:13:20.123Z"));
        assert_eq!(get("ce-subject"), Some("alice%20%22a%22"));
        assert_eq!(get("content-type"), Some("application/json; charset=utf-8"));
        assert_eq!(request.headers().get_all("x-weir-region").iter().collect::<Vec<_>>(), ["Z%C3%BCrich%201", "Bern"]);
        assert_eq!(get("x-weir-delivery"), Some("2"));
        assert_eq!(request.headers().keys().filter(|k| k.as_str().contains("bad")).count(), 0);
    }

    #[test]
    fn a_message_with_very_many_headers_is_refused() {
        let headers = (0..30_000).map(|n| v1::Header { name: format!("h{n}"), value: Some("v".into()) }).collect();
        let message = Some(v1::Message { headers, ..Default::default() });
        let message = v1::ReceivedMessage { message, ..Default::default() };
        assert!(to_request("http://h/x", "t", &message).unwrap_err().contains("30000 headers"));
    }
}
