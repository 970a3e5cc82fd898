//! Streams and calls of subscribers; what they say goes to the [`crate::hub`] of their subscription and partition.

use super::{Context, Found, full_name, log};
use crate::hub::{Command, Outcome, SeekTo};
use crate::outbox::Published;
use crate::status::Failure;
use futures::Stream;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use weir_core::cursor::Cursor;
use weir_core::group::Machine;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::command::TakeSnapshot;
use weir_core::meta::state::{MetaState, Subscription, SubscriptionSpec};
use weir_core::pattern;
use weir_proto::v1;
use weir_proto::v1::subscriber_server::Subscriber;

/// Responses a stream's task may be ahead of its client.
const UNREAD_MAX: usize = 16;
/// Messages of one call.
const MESSAGES_MAX: u32 = 1_000;
/// Longest wait of a call.
const WAIT_MAX: Duration = Duration::from_secs(30);

struct Resolved {
    name: String,
    topic: String,
    group: GroupId,
    subscription: SubscriptionId,
    spec: SubscriptionSpec,
}

/// Where a partition is of: a subscription, and the topic where it reads several.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) subscription: &'a str,
    pub(crate) topic: &'a str,
    pub(crate) partition: u32,
}

fn resolve(context: &Context, place: Place<'_>) -> Result<Resolved, Failure> {
    let Place { subscription, topic, partition } = place;
    let meta = context.shared.meta();
    let found = context.subscription(&meta, subscription)?;
    let name = found.name.clone();
    let topic = match topic {
        "" if pattern::is_pattern(&found.spec.topic) => {
            let text = format!("{name} reads all topics of {}: say which one", found.spec.topic);
            return Err(Failure::invalid("TOPIC", text));
        }
        "" => found.spec.topic.clone(),
        topic => full_name(topic)?,
    };
    let Found { group, topic, .. } = context.find(&topic, partition)?;
    if !meta.topics.get(&topic).is_some_and(|t| found.spec.reads(t)) {
        return Err(Failure::invalid("TOPIC", format!("{name} reads {}, not {topic}", found.spec.topic)));
    }
    if !context.shared.leads(group) {
        return Err(context.not_leader(group));
    }
    Ok(Resolved { name, topic, group, subscription: SubscriptionId(found.id), spec: found.spec.clone() })
}

/// The cursor as applied here, in a term that this broker leads; a new subscription gets its own within moments.
pub(crate) async fn cursor(
    context: &Context,
    group: GroupId,
    subscription: SubscriptionId,
) -> Result<(u64, Cursor), Failure> {
    // everything an earlier hub wrote stands below the log's end as it is now
    let mut upto = None;
    for _ in 0..200 {
        let read = move |node: &mut weir_core::node::Node| {
            let group = node.group(group).filter(|g| g.is_leader())?;
            let Machine::Partition(state) = group.machine() else { return None };
            let wanted = upto.filter(|(term, _)| *term == group.term()).map_or(group.last_index(), |(_, index)| index);
            let applied = group.applied() >= wanted;
            Some(((group.term(), wanted), applied.then(|| state.cursors.get(subscription.0).cloned())))
        };
        let seen = context.node.ask(read).await.ok_or_else(Failure::stopping)?;
        upto = seen.as_ref().map(|(at, _)| *at);
        match seen.map(|((term, _), cursor)| (term, cursor.flatten())) {
            None if !context.shared.leads(group) => return Err(context.not_leader(group)),
            Some((term, Some(cursor))) => return Ok((term, cursor)),
            None | Some((_, None)) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    Err(Failure::new(Code::Unavailable, "NO_CURSOR", "the subscription has no position yet; try again"))
}

impl Context {
    /// A subscription by name.
    fn subscription<'a>(&self, meta: &'a MetaState, name: &str) -> Result<&'a Subscription, Failure> {
        let name = full_name(name)?;
        let missing = || self.missing("NO_SUBSCRIPTION", format!("subscription {name} does not exist"));
        meta.subscriptions.get(&name).ok_or_else(missing)
    }

    /// The hub of a subscription in a partition led here, started where it does not run.
    pub(crate) async fn hub(&self, place: Place<'_>) -> Result<mpsc::Sender<Command>, Failure> {
        // (of a hub that is found, the task may end at any time: a send then fails)
        let Resolved { name, topic, group, subscription, spec } = resolve(self, place)?;
        if let Some(hub) = self.hubs.find((group, subscription)) {
            return Ok(hub);
        }
        let cursor = cursor(self, group, subscription).await?;
        self.hubs.find_or_start(self, (group, subscription), &name, &topic, spec, cursor)
    }

    /// Asks a hub and waits for its answer. One that ends at that moment answers nothing: it is asked again, anew.
    async fn ask_hub<T, F>(&self, place: Place<'_>, command: F) -> Result<T, Failure>
    where
        F: Fn(oneshot::Sender<Result<T, Failure>>) -> Command,
    {
        self.ask_a_hub(place, command).await.map(|(answer, _)| answer)
    }

    /// As [`Self::ask_hub`], with the hub that answered.
    pub(crate) async fn ask_a_hub<T, F>(
        &self,
        place: Place<'_>,
        command: F,
    ) -> Result<(T, mpsc::Sender<Command>), Failure>
    where
        F: Fn(oneshot::Sender<Result<T, Failure>>) -> Command,
    {
        for _ in 0..3 {
            let hub = self.hub(place).await?;
            let (answer, wait) = oneshot::channel();
            if hub.send(command(answer)).await.is_ok()
                && let Ok(answer) = wait.await
            {
                match answer {
                    Err(failure) if failure.reason == "AGAIN" => continue,
                    other => return other.map(|answer| (answer, hub)),
                }
            }
        }
        Err(Failure::new(Code::Unavailable, "BUSY", "the delivery begins anew; try again"))
    }

    /// Partitions of a subscription's topics that this broker leads.
    fn led_partitions(&self, name: &str) -> Result<Vec<(String, u32)>, Failure> {
        let meta = self.shared.meta();
        let found = self.subscription(&meta, name)?;
        let (mut led, mut elsewhere) = (Vec::new(), None);
        for topic in meta.topics_of(&found.spec) {
            for (partition, group) in (0..).zip(topic.groups.iter().map(|g| GroupId(*g))) {
                if self.shared.leads(group) {
                    led.push((topic.name.clone(), partition));
                } else {
                    elsewhere.get_or_insert(group);
                }
            }
        }
        match elsewhere {
            Some(group) if led.is_empty() => Err(self.not_leader(group)),
            _ => Ok(led),
        }
    }
}

impl Context {
    async fn seek_to_snapshot(
        &self,
        place: Place<'_>,
        subscription: &str,
        snapshot: &str,
    ) -> Result<Response<v1::SeekResponse>, Status> {
        let meta = self.shared.meta();
        let missing = || {
            let text = format!("{subscription} has no snapshot {snapshot}; see `weir subscription snapshots`");
            self.missing("NO_SNAPSHOT", text)
        };
        let wanted = TakeSnapshot { subscription: subscription.to_owned(), name: snapshot.to_owned() };
        let found = meta.subscriptions.get(&wanted.full_name()).ok_or_else(missing)?;
        let seek = |answer| Command::Seek { to: SeekTo::Snapshot(SubscriptionId(found.id)), answer };
        let offset = self.ask_hub(place, seek).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::SeekResponse { offset }))
    }
}

/// Tells the hub when its stream is over, however it ends.
struct Attached {
    hub: mpsc::Sender<Command>,
    member: u64,
    context: Context,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.context.metrics.open_streams.dec();
        let (hub, member) = (self.hub.clone(), self.member);
        // where the queue is full, the hub sees by itself that nobody listens
        let _ = hub.try_send(Command::Detach(member));
    }
}

#[tonic::async_trait]
impl Subscriber for Context {
    type StreamingPullStream = Pin<Box<dyn Stream<Item = Result<v1::PullResponse, Status>> + Send>>;

    async fn streaming_pull(
        &self,
        request: Request<Streaming<v1::PullRequest>>,
    ) -> Result<Response<Self::StreamingPullStream>, Status> {
        let mut requests = request.into_inner();
        let first =
            requests.message().await?.ok_or_else(|| Failure::invalid("OPEN", "a stream begins with an open"))?;
        let open = first.open.clone().ok_or_else(|| Failure::invalid("OPEN", "the first request holds an open"))?;
        let (out, responses) = mpsc::channel(UNREAD_MAX);
        let attach =
            |answer| Command::Attach { name: open.member.clone(), messages: open.messages, out: out.clone(), answer };
        let place = Place { subscription: &open.subscription, topic: &open.topic, partition: open.partition };
        let attached = self.ask_a_hub(place, attach).await;
        let (member, hub) = attached.map_err(|f| self.rejected(f))?;
        self.metrics.open_streams.inc();
        let attached = Attached { hub: hub.clone(), member, context: self.clone() };
        drop(out);
        tokio::spawn(async move {
            let _attached = attached;
            let mut next = Some(v1::PullRequest { open: None, ..first });
            while let Some(request) = next {
                if hub.send(Command::Say(member, request)).await.is_err() {
                    return;
                }
                next = tokio::select! {
                    request = requests.message() => request.ok().flatten(),
                    () = hub.closed() => None,
                };
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn pull(
        &self,
        request: Request<v1::PullMessagesRequest>,
    ) -> Result<Response<v1::PullMessagesResponse>, Status> {
        let request = request.into_inner();
        let max = if request.messages_max == 0 { 100 } else { request.messages_max.min(MESSAGES_MAX) };
        let until = Instant::now() + Duration::from_millis(request.wait_ms.into()).min(WAIT_MAX);
        let partitions = match request.partition {
            Some(partition) => vec![(request.topic.clone(), partition)],
            None => self.led_partitions(&request.subscription).map_err(|f| self.rejected(f))?,
        };
        if partitions.is_empty() {
            tokio::time::sleep(until.duration_since(Instant::now())).await; // a pattern that no topic has yet
            return Ok(Response::new(v1::PullMessagesResponse::default()));
        }
        loop {
            // not always the same one first: its backlog would starve the others
            self.turn.fetch_add(1, Ordering::Relaxed);
            let first = self.turn.load(Ordering::Relaxed) % partitions.len();
            for (topic, partition) in partitions.iter().cycle().skip(first).take(partitions.len()) {
                // with one partition the hub waits; with several each is asked in turn
                let wait = if partitions.len() == 1 { until.duration_since(Instant::now()) } else { Duration::ZERO };
                let pull = |answer| Command::Pull { name: request.member.clone(), max: max.into(), wait, answer };
                let place = Place { subscription: &request.subscription, topic, partition: *partition };
                let pulled = self.ask_hub(place, pull).await;
                let messages = pulled.map_err(|f| self.rejected(f))?;
                if !messages.is_empty() {
                    return Ok(Response::new(v1::PullMessagesResponse { messages }));
                }
            }
            if Instant::now() >= until {
                return Ok(Response::new(v1::PullMessagesResponse::default()));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn acknowledge(
        &self,
        request: Request<v1::AcknowledgeRequest>,
    ) -> Result<Response<v1::AcknowledgeResponse>, Status> {
        let v1::AcknowledgeRequest { subscription, partition, offsets, topic } = request.into_inner();
        let place = Place { subscription: &subscription, topic: &topic, partition };
        let acknowledge = |answer| Command::Acknowledge { ranges: offsets.clone(), answer };
        let acknowledged = self.ask_hub(place, acknowledge).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::AcknowledgeResponse { acknowledged }))
    }

    async fn acknowledge_with_publish(
        &self,
        request: Request<v1::AcknowledgeWithPublishRequest>,
    ) -> Result<Response<v1::AcknowledgeWithPublishResponse>, Status> {
        let request = request.into_inner();
        let to = full_name(&request.to)?;
        if request.messages.is_empty() {
            return Err(Failure::invalid("MESSAGES", "at least one message is published").into());
        }
        let records: Vec<_> = request.messages.into_iter().map(super::publisher::record).collect();
        let place = Place { subscription: &request.subscription, topic: &request.topic, partition: request.partition };
        let publish = |answer| Command::AcknowledgeWithPublish {
            offset: request.offset,
            to: to.clone(),
            records: records.clone(),
            answer,
        };
        let outcome = self.ask_hub(place, publish).await.map_err(|f| self.rejected(f))?;
        let response = match outcome {
            Outcome::Published(Published { partition, base_offset }) => {
                v1::AcknowledgeWithPublishResponse { partition, base_offset, already: false }
            }
            Outcome::Already => v1::AcknowledgeWithPublishResponse { already: true, ..Default::default() },
        };
        Ok(Response::new(response))
    }

    async fn nack(&self, request: Request<v1::NackRequest>) -> Result<Response<v1::NackResponse>, Status> {
        let v1::NackRequest { subscription, partition, offsets, topic } = request.into_inner();
        let hub = self
            .hub(Place { subscription: &subscription, topic: &topic, partition })
            .await
            .map_err(|f| self.rejected(f))?;
        let _ = hub.send(Command::Adjust { nacks: offsets, extensions: Vec::new() }).await;
        Ok(Response::new(v1::NackResponse {}))
    }

    async fn extend_deadline(
        &self,
        request: Request<v1::ExtendDeadlineRequest>,
    ) -> Result<Response<v1::ExtendDeadlineResponse>, Status> {
        let v1::ExtendDeadlineRequest { subscription, partition, offsets, topic } = request.into_inner();
        let hub = self
            .hub(Place { subscription: &subscription, topic: &topic, partition })
            .await
            .map_err(|f| self.rejected(f))?;
        let _ = hub.send(Command::Adjust { nacks: Vec::new(), extensions: offsets }).await;
        Ok(Response::new(v1::ExtendDeadlineResponse {}))
    }

    async fn seek(&self, request: Request<v1::SeekRequest>) -> Result<Response<v1::SeekResponse>, Status> {
        use v1::seek_request::To;
        let request = request.into_inner();
        let place = Place { subscription: &request.subscription, topic: &request.topic, partition: request.partition };
        let Resolved { group, name, .. } = resolve(self, place)?;
        let mut partition = self.led_partition(group).await?;
        if let Some(To::Snapshot(snapshot)) = &request.to {
            return self.seek_to_snapshot(place, &name, snapshot).await;
        }
        let offset = match request.to {
            Some(To::Offset(offset)) => offset,
            Some(To::TimeMs(time)) => partition.offset_at(time).map_err(Failure::from)?,
            Some(To::Earliest(_)) => partition.tail.start_offset(),
            Some(To::Latest(_) | To::Snapshot(_)) | None => partition.tail.high_watermark(),
        };
        log::check_range(self, &mut partition, offset).await?;
        // through the hub: no ack of before may stand behind the seek
        let seek = |answer| Command::Seek { to: SeekTo::Offset(offset), answer };
        self.ask_hub(place, seek).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::SeekResponse { offset }))
    }
}
