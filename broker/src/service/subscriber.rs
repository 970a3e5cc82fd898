//! Streams and calls of subscribers; what they say goes to the [`crate::hub`] of their subscription and partition.

use super::{Context, Found, any_name, bounds, check_id, full_name, log};
use crate::answer::{self, Answer};
use crate::declare;
use crate::hub::{Command, Outcome, SeekTo, ToPublish};
use crate::outbox::Published;
use crate::outlet;
use crate::status::Failure;
use futures::{Stream, StreamExt as _};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Request, Response, Status, Streaming};
use weir_core::cursor::{Cursor, OffsetRange};
use weir_core::group::Machine;
use weir_core::ids::{GroupId, SubscriptionId};
use weir_core::meta::state::{MetaState, Subscription, SubscriptionSpec};
use weir_core::pattern;
use weir_proto::v1;
use weir_proto::v1::subscriber_server::Subscriber;

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
    /// Id of the topic that a request's offsets are of; 0 for any.
    pub(crate) topic_id: u64,
    /// Id of the subscription that delivered them; 0 for any.
    pub(crate) subscription_id: u64,
}

fn resolve(context: &Context, place: Place<'_>) -> Result<Resolved, Failure> {
    let Place { subscription, topic, partition, topic_id, subscription_id } = place;
    let meta = context.shared.meta();
    let found = context.subscription(&meta, subscription)?;
    let name = found.name.clone();
    let rule = "it has a position of its own, and delivers again what the earlier one had delivered";
    check_id(("subscription", &name), found.id, subscription_id, ("SUBSCRIPTION_RECREATED", rule))?;
    let topic = match topic {
        "" if pattern::is_pattern(&found.spec.topic) => {
            let text = format!("{name} reads all topics of {}: say which one", found.spec.topic);
            return Err(Failure::invalid("TOPIC", text));
        }
        "" => found.spec.topic.clone(),
        topic => full_name(topic)?,
    };
    let Found { group, topic, .. } = context.find(&topic, partition)?.of_topic(topic_id)?;
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
    /// A subscription that clients may read, by name; of internal ones that is the position of a redrive.
    fn subscription<'a>(&self, meta: &'a MetaState, name: &str) -> Result<&'a Subscription, Failure> {
        let name = any_name(name)?;
        let missing = || self.missing("NO_SUBSCRIPTION", format!("subscription {name} does not exist"));
        let found = meta.subscriptions.get(&name);
        if found.is_none_or(|s| s.redrive_of == 0) {
            full_name(&name)?;
        }
        found.ok_or_else(missing)
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

    /// Id of the topic that a subscription reads, of `topic` where it reads several; 0 where there is no such topic.
    fn topic_id(&self, subscription: &str, topic: &str) -> Result<u64, Failure> {
        let meta = self.shared.meta();
        let name =
            if topic.is_empty() { &self.subscription(&meta, subscription)?.spec.topic } else { &full_name(topic)? };
        Ok(meta.topics.get(name).map_or(0, |t| t.id))
    }

    /// Partitions of a subscription's topics that this broker leads.
    fn led_partitions(&self, name: &str) -> Result<Vec<(String, u32, u64)>, Failure> {
        let meta = self.shared.meta();
        let found = self.subscription(&meta, name)?;
        let (mut led, mut elsewhere) = (Vec::new(), None);
        for topic in meta.topics_of(&found.spec) {
            for (partition, group) in (0..).zip(topic.groups.iter().map(|g| GroupId(*g))) {
                if self.shared.leads(group) {
                    led.push((topic.name.clone(), partition, topic.id));
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
        declare::part(snapshot).map_err(|f| self.rejected(f))?;
        let meta = self.shared.meta();
        let missing = || {
            let text = format!("{subscription} has no snapshot {snapshot}; see `weir subscription snapshots`");
            self.missing("NO_SNAPSHOT", text)
        };
        let found = meta.snapshot(subscription, snapshot).ok_or_else(missing)?;
        let seek = |answer| Command::Seek { to: SeekTo::Snapshot(SubscriptionId(found.id)), answer };
        self.ask_hub(place, seek).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::SeekResponse { offset: None }))
    }
}

/// Ends a membership when it is dropped: as lost, unless its member left by itself.
pub(crate) struct Attached {
    /// The dispatcher.
    pub(crate) hub: mpsc::Sender<Command>,
    /// Its number.
    pub(crate) member: u64,
    /// Whether the member left by itself.
    pub(crate) clean: bool,
    /// Counts open streams.
    pub(crate) context: Context,
}

impl Attached {
    /// Of a member that was just let in.
    pub(crate) fn new(context: Context, hub: mpsc::Sender<Command>, member: u64) -> Self {
        context.metrics.open_streams.inc();
        Self { hub, member, clean: false, context }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.context.metrics.open_streams.dec();
        // where the queue is full, the hub sees by itself that nobody listens
        let _ = self.hub.try_send(Command::Detach { member: self.member, clean: self.clean });
    }
}

#[tonic::async_trait]
impl Subscriber for Context {
    type StreamingPullStream = Pin<Box<dyn Stream<Item = Result<v1::PullResponse, Status>> + Send>>;

    async fn streaming_pull(
        &self,
        request: Request<Streaming<v1::PullRequest>>,
    ) -> Result<Response<Self::StreamingPullStream>, Status> {
        let answers = self.answers(&request);
        let mut requests = request.into_inner();
        let unopened = |text| self.rejected(Failure::invalid("OPEN", text));
        let mut first = requests.message().await?.ok_or_else(|| unopened("a stream begins with an open"))?;
        let open = first.open.take().ok_or_else(|| unopened("the first request holds an open"))?;
        bounds::member(&open.member).map_err(|f| self.rejected(f))?;
        bounds::pull(&first).map_err(|f| self.rejected(f))?;
        let inlet = std::sync::Mutex::new(None);
        let attach = |answer| {
            let (out, opened) = outlet::open(answers.clone());
            *inlet.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(opened);
            Command::Attach { name: open.member.clone(), messages: open.messages, out, answer }
        };
        let place = Place {
            subscription: &open.subscription,
            topic: &open.topic,
            partition: open.partition,
            topic_id: open.topic_id,
            subscription_id: open.subscription_id,
        };
        let attached = self.ask_a_hub(place, attach).await;
        let (member, hub) = attached.map_err(|f| self.rejected(f))?;
        let inlet = inlet.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut attached = Attached::new(self.clone(), hub.clone(), member);
        let (refuse, refused) = oneshot::channel();
        tokio::spawn(async move {
            let mut next = first;
            loop {
                if let Err(failure) = bounds::pull(&next) {
                    return drop(refuse.send(Status::from(attached.context.rejected(failure))));
                }
                if hub.send(Command::Say(member, next)).await.is_err() {
                    return;
                }
                next = tokio::select! {
                    request = requests.message() => match request {
                        Ok(Some(request)) => request,
                        // the end of its requests is how a member leaves
                        ended => {
                            attached.clean = ended.is_ok();
                            let _ = hub.send(Command::Detach { member, clean: attached.clean }).await;
                            return;
                        }
                    },
                    () = hub.closed() => return,
                };
            }
        });
        // ends with the delivery, or with why a request was refused
        let answers = futures::stream::iter(inlet.into_iter().map(outlet::Inlet::into_answers)).flatten();
        let answers = answers.map(Some).chain(futures::stream::iter([None]));
        let refused =
            futures::stream::once(refused).filter_map(|why| std::future::ready(why.ok().map(|why| Some(Err(why)))));
        let answers =
            futures::stream::select(answers, refused).take_while(|answer| std::future::ready(answer.is_some()));
        let answers = answers.filter_map(std::future::ready);
        Ok(answer::stream(Box::pin(futures::stream::empty()), answers))
    }

    async fn pull(
        &self,
        request: Request<v1::PullMessagesRequest>,
    ) -> Result<Response<v1::PullMessagesResponse>, Status> {
        let answers = self.answers(&request);
        let request = request.into_inner();
        let max = bounds::messages(request.messages_max).map_err(|f| self.rejected(f))?;
        bounds::member(&request.member).map_err(|f| self.rejected(f))?;
        let until = Instant::now() + Duration::from_millis(request.wait_ms.into()).min(WAIT_MAX);
        let partitions = match request.partition {
            Some(partition) => {
                let topic_id = self.topic_id(&request.subscription, &request.topic).map_err(|f| self.rejected(f))?;
                vec![(request.topic.clone(), partition, topic_id)]
            }
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
            for (topic, partition, topic_id) in partitions.iter().cycle().skip(first).take(partitions.len()) {
                // with one partition the hub waits; with several each is asked in turn
                let wait = if partitions.len() == 1 { until.duration_since(Instant::now()) } else { Duration::ZERO };
                let name = &request.member;
                let pull = |answer| Command::Pull {
                    name: name.clone(),
                    max: max.into(),
                    wait,
                    answers: answers.clone(),
                    answer,
                };
                let place = Place {
                    subscription: &request.subscription,
                    topic,
                    partition: *partition,
                    topic_id: *topic_id,
                    subscription_id: 0,
                };
                let pulled = self.ask_a_hub(place, pull).await;
                let ((mut messages, held), hub) = pulled.map_err(|f| self.rejected(f))?;
                messages.iter_mut().for_each(|m| m.topic_id = *topic_id);
                if let Some(held) = held {
                    let ranges = messages.iter().map(|m| OffsetRange::one(m.offset)).collect();
                    let release = move |handed_out: bool| {
                        if !handed_out {
                            let _ = hub.try_send(Command::Release(ranges));
                        }
                    };
                    let answer = Answer::new(&v1::PullMessagesResponse { messages }, held).on_end(release);
                    return Ok(answer::once(Default::default(), answer));
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
        let v1::AcknowledgeRequest { subscription, partition, offsets, topic, topic_id, subscription_id } =
            request.into_inner();
        bounds::settlement_call(&offsets, &[], &[]).map_err(|f| self.rejected(f))?;
        let place = Place { subscription: &subscription, topic: &topic, partition, topic_id, subscription_id };
        let acknowledge = |answer| Command::Acknowledge { ranges: offsets.clone(), answer };
        let acknowledged = self.ask_hub(place, acknowledge).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::AcknowledgeResponse { acknowledged }))
    }

    async fn acknowledge_with_publish(
        &self,
        request: Request<v1::AcknowledgeWithPublishRequest>,
    ) -> Result<Response<v1::AcknowledgeWithPublishResponse>, Status> {
        let request = request.into_inner();
        let what = if request.give_back {
            if !request.to.is_empty() || !request.messages.is_empty() {
                let text = "a dead letter that is given back needs neither a topic nor messages: it names its own";
                return Err(Failure::invalid("MESSAGES", text).into());
            }
            ToPublish::GiveBack
        } else {
            if request.messages.is_empty() {
                return Err(Failure::invalid("MESSAGES", "at least one message is published").into());
            }
            if request.messages.iter().any(|m| m.deliver_at_ms.is_some()) {
                let text = "what is published with an acknowledgement is published at once: leave deliver_at_ms out";
                return Err(Failure::invalid("DELAY", text).into());
            }
            let records = request.messages.into_iter().map(super::publisher::record).collect();
            ToPublish::Result { to: full_name(&request.to)?, records }
        };
        let place = Place {
            subscription: &request.subscription,
            topic: &request.topic,
            partition: request.partition,
            topic_id: request.topic_id,
            subscription_id: request.subscription_id,
        };
        let publish = |answer| Command::AcknowledgeWithPublish { offset: request.offset, what: what.clone(), answer };
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
        let v1::NackRequest { subscription, partition, offsets, topic, topic_id, subscription_id } =
            request.into_inner();
        bounds::settlement_call(&[], &offsets, &[]).map_err(|f| self.rejected(f))?;
        let place = Place { subscription: &subscription, topic: &topic, partition, topic_id, subscription_id };
        let hub = self.hub(place).await.map_err(|f| self.rejected(f))?;
        let _ = hub.send(Command::Adjust { nacks: offsets, extensions: Vec::new() }).await;
        Ok(Response::new(v1::NackResponse {}))
    }

    async fn extend_deadline(
        &self,
        request: Request<v1::ExtendDeadlineRequest>,
    ) -> Result<Response<v1::ExtendDeadlineResponse>, Status> {
        let v1::ExtendDeadlineRequest { subscription, partition, offsets, topic, topic_id, subscription_id } =
            request.into_inner();
        bounds::settlement_call(&[], &[], &offsets).map_err(|f| self.rejected(f))?;
        let place = Place { subscription: &subscription, topic: &topic, partition, topic_id, subscription_id };
        let hub = self.hub(place).await.map_err(|f| self.rejected(f))?;
        let _ = hub.send(Command::Adjust { nacks: Vec::new(), extensions: offsets }).await;
        Ok(Response::new(v1::ExtendDeadlineResponse {}))
    }

    async fn seek(&self, request: Request<v1::SeekRequest>) -> Result<Response<v1::SeekResponse>, Status> {
        use v1::seek_request::To;
        let request = request.into_inner();
        let place = Place {
            subscription: &request.subscription,
            topic: &request.topic,
            partition: request.partition,
            topic_id: request.topic_id,
            subscription_id: request.subscription_id,
        };
        let nowhere = || {
            let text = "to must say where: offset, time_ms, earliest, latest or snapshot";
            Failure::invalid("TO", text)
        };
        let to = request.to.filter(|to| !matches!(to, To::Earliest(false) | To::Latest(false)));
        let to = to.ok_or_else(|| self.rejected(nowhere()))?;
        let Resolved { group, name, .. } = resolve(self, place)?;
        let mut partition = self.led_partition(group).await?;
        let offset = match to {
            To::Snapshot(snapshot) => return self.seek_to_snapshot(place, &name, &snapshot).await,
            To::Offset(offset) => offset,
            To::TimeMs(time) => partition.offset_at(time).map_err(Failure::from)?,
            To::Earliest(_) => partition.tail.start_offset(),
            To::Latest(_) => partition.tail.high_watermark(),
        };
        log::check_range(self, &mut partition, offset).await?;
        // through the hub: no ack of before may stand behind the seek
        let seek = |answer| Command::Seek { to: SeekTo::Offset(offset), answer };
        self.ask_hub(place, seek).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::SeekResponse { offset: Some(offset) }))
    }
}
