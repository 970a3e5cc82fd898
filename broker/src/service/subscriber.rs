//! Streams and calls of subscribers; what they say goes to the [`crate::hub`] of their subscription and partition.

use super::{Context, Found, full_name, log};
use crate::hub::Command;
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
use weir_core::meta::state::SubscriptionSpec;
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

fn resolve(context: &Context, name: &str, partition: u32) -> Result<Resolved, Failure> {
    let name = full_name(name)?;
    let meta = context.shared.meta();
    let missing = || Failure::new(Code::NotFound, "NO_SUBSCRIPTION", format!("subscription {name} does not exist"));
    let found = meta.subscriptions.get(&name).ok_or_else(missing)?;
    let Found { group, topic, .. } = context.find(&found.spec.topic, partition)?;
    if !context.shared.leads(group) {
        return Err(context.not_leader(group));
    }
    Ok(Resolved { name, topic, group, subscription: SubscriptionId(found.id), spec: found.spec.clone() })
}

/// The cursor as applied here; a new subscription gets its own within moments.
pub(crate) async fn cursor(context: &Context, group: GroupId, subscription: SubscriptionId) -> Result<Cursor, Failure> {
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
        match seen.map(|(_, cursor)| cursor.flatten()) {
            None if !context.shared.leads(group) => return Err(context.not_leader(group)),
            Some(Some(cursor)) => return Ok(cursor),
            None | Some(None) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    Err(Failure::new(Code::Unavailable, "NO_CURSOR", "the subscription has no position yet; try again"))
}

impl Context {
    /// The hub of a subscription in a partition led here, started where it does not run.
    async fn hub(&self, name: &str, partition: u32) -> Result<mpsc::Sender<Command>, Failure> {
        // (of a hub that is found, the task may end at any time: a send then fails)
        let Resolved { name, topic, group, subscription, spec } = resolve(self, name, partition)?;
        if let Some(hub) = self.hubs.find((group, subscription)) {
            return Ok(hub);
        }
        let cursor = cursor(self, group, subscription).await?;
        self.hubs.find_or_start(self, (group, subscription), &name, &topic, spec, cursor)
    }

    /// Asks a hub and waits for its answer. One that ends at that moment answers nothing: it is asked again, anew.
    async fn ask_hub<T, F>(&self, name: &str, partition: u32, command: F) -> Result<T, Failure>
    where
        F: Fn(oneshot::Sender<Result<T, Failure>>) -> Command,
    {
        self.ask_a_hub(name, partition, command).await.map(|(answer, _)| answer)
    }

    /// As [`Self::ask_hub`], with the hub that answered.
    async fn ask_a_hub<T, F>(
        &self,
        name: &str,
        partition: u32,
        command: F,
    ) -> Result<(T, mpsc::Sender<Command>), Failure>
    where
        F: Fn(oneshot::Sender<Result<T, Failure>>) -> Command,
    {
        for _ in 0..3 {
            let hub = self.hub(name, partition).await?;
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

    /// Partitions of a subscription's topic that this broker leads.
    fn led_partitions(&self, name: &str) -> Result<Vec<u32>, Failure> {
        let name = full_name(name)?;
        let meta = self.shared.meta();
        let missing = || Failure::new(Code::NotFound, "NO_SUBSCRIPTION", format!("subscription {name} does not exist"));
        let found = meta.subscriptions.get(&name).ok_or_else(missing)?;
        let topic = meta.topics.get(&found.spec.topic);
        let groups = topic.map_or(&[][..], |t| &t.groups);
        let led: Vec<u32> =
            (0..).zip(groups).filter(|(_, g)| self.shared.leads(GroupId(**g))).map(|(p, _)| p).collect();
        match (led.is_empty(), groups.first()) {
            (true, Some(first)) => Err(self.not_leader(GroupId(*first))),
            _ => Ok(led),
        }
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
        let attached = self.ask_a_hub(&open.subscription, open.partition, attach).await;
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
            Some(partition) => vec![partition],
            None => self.led_partitions(&request.subscription).map_err(|f| self.rejected(f))?,
        };
        loop {
            // not always the same one first: its backlog would starve the others
            self.turn.fetch_add(1, Ordering::Relaxed);
            let first = self.turn.load(Ordering::Relaxed) % partitions.len();
            for partition in partitions.iter().cycle().skip(first).take(partitions.len()) {
                // with one partition the hub waits; with several each is asked in turn
                let wait = if partitions.len() == 1 { until.duration_since(Instant::now()) } else { Duration::ZERO };
                let pull = |answer| Command::Pull { name: request.member.clone(), max: max.into(), wait, answer };
                let pulled = self.ask_hub(&request.subscription, *partition, pull).await;
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
        let v1::AcknowledgeRequest { subscription, partition, offsets } = request.into_inner();
        let acknowledge = |answer| Command::Acknowledge { ranges: offsets.clone(), answer };
        let acknowledged = self.ask_hub(&subscription, partition, acknowledge).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::AcknowledgeResponse { acknowledged }))
    }

    async fn nack(&self, request: Request<v1::NackRequest>) -> Result<Response<v1::NackResponse>, Status> {
        let v1::NackRequest { subscription, partition, offsets } = request.into_inner();
        let hub = self.hub(&subscription, partition).await.map_err(|f| self.rejected(f))?;
        let _ = hub.send(Command::Adjust { nacks: offsets, extensions: Vec::new() }).await;
        Ok(Response::new(v1::NackResponse {}))
    }

    async fn extend_deadline(
        &self,
        request: Request<v1::ExtendDeadlineRequest>,
    ) -> Result<Response<v1::ExtendDeadlineResponse>, Status> {
        let v1::ExtendDeadlineRequest { subscription, partition, offsets } = request.into_inner();
        let hub = self.hub(&subscription, partition).await.map_err(|f| self.rejected(f))?;
        let _ = hub.send(Command::Adjust { nacks: Vec::new(), extensions: offsets }).await;
        Ok(Response::new(v1::ExtendDeadlineResponse {}))
    }

    async fn seek(&self, request: Request<v1::SeekRequest>) -> Result<Response<v1::SeekResponse>, Status> {
        use v1::seek_request::To;
        let request = request.into_inner();
        let Resolved { group, .. } = resolve(self, &request.subscription, request.partition)?;
        let partition = self.led_partition(group)?;
        let offset = match request.to {
            Some(To::Offset(offset)) => offset,
            Some(To::TimeMs(time)) => partition.offset_at(time).map_err(Failure::from)?,
            Some(To::Earliest(_)) => partition.tail.start_offset(),
            Some(To::Latest(_)) | None => partition.tail.high_watermark(),
        };
        log::check_range(&partition, offset)?;
        // through the hub: no ack of before may stand behind the seek
        let seek = |answer| Command::Seek { offset, answer };
        self.ask_hub(&request.subscription, request.partition, seek).await.map_err(|f| self.rejected(f))?;
        Ok(Response::new(v1::SeekResponse { offset }))
    }
}
