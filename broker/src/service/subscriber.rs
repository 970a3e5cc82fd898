//! Delivery of exclusive subscriptions: one member at a time holds a partition, gets its batches in order from the cursor on,
//! and acks move the cursor, which is replicated with the partition. After a failover what was unacked comes again.

use super::{Context, Found, full_name, log};
use crate::node_loop::{Event, ReplyTo};
use crate::status::Failure;
use futures::Stream;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use weir_core::cursor::{Cursor, CursorUpdate, OffsetRange};
use weir_core::entry::Control;
use weir_core::group::Machine;
use weir_core::ids::GroupId;
use weir_core::node::Reply;
use weir_proto::v1;
use weir_proto::v1::subscriber_server::Subscriber;

/// Bytes of one delivery.
const DELIVERY_BYTES: usize = 1 << 20;

/// Who holds which partition of which subscription, on this process's brokers: (broker, group, subscription) → (member, session).
type Holders = HashMap<(u64, GroupId, u64), (String, u64)>;
static HOLDERS: LazyLock<Mutex<Holders>> = LazyLock::new(Mutex::default);
static SESSIONS: AtomicU64 = AtomicU64::new(1);

struct Resolved {
    topic: String,
    group: GroupId,
    subscription: u64,
    ack_deadline: Duration,
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
    let ack_deadline = Duration::from_millis(found.spec.ack_deadline_ms);
    Ok(Resolved { topic, group, subscription: found.id, ack_deadline })
}

/// The cursor as applied here; a new subscription gets its own within moments.
async fn cursor(context: &Context, group: GroupId, subscription: u64) -> Result<Cursor, Failure> {
    for _ in 0..100 {
        let read = move |node: &mut weir_core::node::Node| {
            let group = node.group(group).filter(|g| g.is_leader())?;
            let Machine::Partition(state) = group.machine() else { return None };
            Some(state.cursors.get(subscription).cloned())
        };
        match context.node.ask(read).await.ok_or_else(Failure::stopping)? {
            None => return Err(context.not_leader(group)),
            Some(Some(cursor)) => return Ok(cursor),
            Some(None) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    Err(Failure::new(Code::Unavailable, "NO_CURSOR", "the subscription has no position yet; try again"))
}

/// A session's place in [`HOLDERS`], given back when the session ends.
struct Hold {
    key: (u64, GroupId, u64),
    session: u64,
}

impl Hold {
    fn take(key: (u64, GroupId, u64), member: &str) -> Result<Self, Failure> {
        let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((holder, _)) = holders.get(&key).filter(|(holder, _)| holder != member) {
            let text = format!("the subscription is exclusive and held by {holder}");
            return Err(Failure::new(Code::FailedPrecondition, "EXCLUSIVE", text));
        }
        let session = SESSIONS.fetch_add(1, Ordering::Relaxed);
        holders.insert(key, (member.to_owned(), session));
        Ok(Self { key, session })
    }

    fn is_current(&self) -> bool {
        let holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        holders.get(&self.key).is_some_and(|(_, session)| *session == self.session)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        if holders.get(&self.key).is_some_and(|(_, session)| *session == self.session) {
            holders.remove(&self.key);
        }
    }
}

struct Session {
    context: Context,
    hold: Hold,
    topic: String,
    group: GroupId,
    subscription: u64,
    ack_deadline: Duration,
    /// acks as they came, replicated or not
    cursor: Cursor,
    /// next offset to deliver
    next: u64,
    credit: u64,
    /// acks not handed to the log yet, and the answer to those that are on their way
    unwritten: Vec<OffsetRange>,
    writing: Option<oneshot::Receiver<Reply>>,
    last_progress: Instant,
    out: mpsc::Sender<Result<v1::PullResponse, Status>>,
}

impl Session {
    async fn run(mut self, mut requests: Streaming<v1::PullRequest>) {
        self.context.metrics.open_streams.inc();
        let ended = self.serve(&mut requests).await;
        self.context.metrics.open_streams.dec();
        if let Err(failure) = ended {
            let _ = self.out.send(Err(failure.into())).await;
        }
    }

    async fn serve(&mut self, requests: &mut Streaming<v1::PullRequest>) -> Result<(), Failure> {
        let mut partition = self.context.led_partition(self.group)?;
        let mut watch = tokio::time::interval(Duration::from_millis(100));
        let out = self.out.clone();
        loop {
            let behind = self.credit > 0 && self.next < partition.tail.high_watermark();
            tokio::select! {
                biased;
                request = requests.message() => match request {
                    Ok(Some(request)) => self.take(request),
                    _ => return Ok(()),
                },
                reply = async { self.writing.as_mut().expect("guarded").await }, if self.writing.is_some() => {
                    self.writing = None;
                    if !matches!(reply, Ok(Reply::Done)) {
                        return Err(self.context.not_leader(self.group));
                    }
                    self.write_acks();
                }
                _ = watch.tick() => self.check()?,
                room = out.reserve(), if behind => {
                    let Ok(room) = room else { return Ok(()) };
                    let batches = partition.read(self.next, DELIVERY_BYTES).await?;
                    if let Some(response) = delivery(&mut self.next, &mut self.credit, batches, partition.tail.high_watermark()) {
                        self.context.metrics.delivered(&self.topic, &response.batches);
                        self.last_progress = Instant::now();
                        room.send(Ok(response));
                    } else if self.next < partition.tail.start_offset() {
                        self.next = partition.tail.start_offset(); // retention went past it
                    }
                }
                moved = partition.high_watermark.changed(), if !behind => {
                    if moved.is_err() {
                        return Err(self.context.not_leader(self.group));
                    }
                }
            }
        }
    }

    fn take(&mut self, request: v1::PullRequest) {
        self.credit += u64::from(request.credit_messages);
        for ack in request.acks {
            // only what was delivered can be acked
            let range = OffsetRange { start: ack.start, end: ack.end.min(self.next) };
            if range.start < range.end {
                self.cursor.ack(range);
                self.unwritten.push(range);
                self.last_progress = Instant::now();
            }
        }
        if let Some(first) = request.nacks.iter().map(|n| n.start).min() {
            self.next = self.next.min(first.max(self.cursor.position()));
        }
        self.write_acks();
    }

    /// One control entry at a time: acks that come meanwhile gather into the next.
    fn write_acks(&mut self) {
        if self.writing.is_some() || self.unwritten.is_empty() {
            return;
        }
        let acked = std::mem::take(&mut self.unwritten);
        let update = CursorUpdate { subscription: self.subscription, acked, ..Default::default() };
        let (to, reply) = oneshot::channel();
        let control = Control { cursors: vec![update] };
        self.context.node.send(Event::Control { group: self.group, control, to: ReplyTo::Call(to) });
        self.writing = Some(reply);
    }

    fn check(&mut self) -> Result<(), Failure> {
        if !self.context.shared.leads(self.group) {
            return Err(self.context.not_leader(self.group));
        }
        if !self.hold.is_current() {
            return Err(Failure::new(Code::Aborted, "REPLACED", "the member opened the partition again elsewhere"));
        }
        if self.cursor.position() < self.next && self.last_progress.elapsed() > self.ack_deadline {
            self.next = self.cursor.position();
            self.last_progress = Instant::now();
        }
        Ok(())
    }
}

fn delivery(
    next: &mut u64,
    credit: &mut u64,
    batches: Vec<weir_core::tail::LogBatch>,
    high_watermark: u64,
) -> Option<v1::PullResponse> {
    let from_offset = *next;
    let mut out = Vec::new();
    for batch in batches {
        if *credit == 0 {
            break;
        }
        // a batch is delivered whole, so the last one may go beyond the credit
        *credit = credit.saturating_sub(batch.end_offset() - from_offset.max(batch.base_offset));
        *next = batch.end_offset();
        out.push(log::to_wire(batch));
    }
    (!out.is_empty()).then_some(v1::PullResponse { batches: out, from_offset, high_watermark })
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
        let Resolved { topic, group, subscription, ack_deadline } =
            resolve(self, &open.subscription, open.partition).map_err(|f| self.rejected(f))?;
        let hold = Hold::take((self.shared.broker.0, group, subscription), &open.member)?;
        let cursor = cursor(self, group, subscription).await?;
        let (out, responses) = mpsc::channel(4);
        let mut session = Session {
            context: self.clone(),
            hold,
            topic,
            group,
            subscription,
            ack_deadline,
            next: cursor.position(),
            cursor,
            credit: 0,
            unwritten: Vec::new(),
            writing: None,
            last_progress: Instant::now(),
            out,
        };
        session.take(v1::PullRequest { open: None, ..first });
        tokio::spawn(session.run(requests));
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn seek(&self, request: Request<v1::SeekRequest>) -> Result<Response<v1::SeekResponse>, Status> {
        use v1::seek_request::To;
        let request = request.into_inner();
        let Resolved { group, subscription, .. } = resolve(self, &request.subscription, request.partition)?;
        let partition = self.led_partition(group)?;
        let offset = match request.to {
            Some(To::Offset(offset)) => offset,
            Some(To::TimeMs(time)) => partition.offset_at(time).map_err(Failure::from)?,
            Some(To::Earliest(_)) => partition.tail.start_offset(),
            Some(To::Latest(_)) | None => partition.tail.high_watermark(),
        };
        log::check_range(&partition, offset)?;
        let update = CursorUpdate { subscription, seek: Some(offset), ..Default::default() };
        let control = Control { cursors: vec![update] };
        match self.node.call(|to| Event::Control { group, control, to }).await.ok_or_else(Failure::stopping)? {
            Reply::Done => {}
            Reply::Refused(refusal) => return Err(self.failure(group, refusal).into()),
            other => return Err(Failure::new(Code::Internal, "REPLY", format!("unexpected reply {other:?}")).into()),
        }
        // who reads now starts again from there
        HOLDERS.lock().unwrap_or_else(PoisonError::into_inner).remove(&(self.shared.broker.0, group, subscription));
        Ok(Response::new(v1::SeekResponse { offset }))
    }
}
