//! Messages between brokers: one stream for each direction of each pair, all groups together; and their wire form.
//! Peers' bytes are read by prost only (see deny.toml on rust-protobuf).

use crate::node_loop::PeerSender;
use crate::shared::Shared;
use crate::vouched::Vouched;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt as _;
use weir_core::eraftpb::{Entry, EntryType, Message, MessageType};
use weir_core::ids::{BrokerId, GroupId, ReplicaId};
use weir_core::incarnation::{Answer, Incarnation, Query};
use weir_core::node::{Asleep, Effects, Envelope, LeaderInfo, PeerMessage, Pulse};
use weir_proto::v1;
use weir_proto::v1::peer_client::PeerClient;

/// Reason in a peer's refusal: the metadata there has removed or replaced this broker for good.
pub const REMOVED: &str = "REMOVED";
/// Queued to one peer, bytes; what is beyond them is dropped, and Raft sends again.
const QUEUED_BYTES_MAX: usize = 64 << 20;
/// First pause before a broker is connected to again.
const WAIT_MIN: Duration = Duration::from_millis(50);
/// A stream that lasted this long had the right address.
const WORKED_AFTER: Duration = Duration::from_secs(5);
/// A frame is closed once it holds this much, bytes.
const FRAME_BYTES: usize = 2 << 20;
/// What a message takes beside its entries' data, bytes.
const MESSAGE_BYTES: usize = 256;

/// A client for a peer's (or any broker's) gRPC address, with windows that let it be fast.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(Duration::from_secs(1))
        .tcp_nodelay(true)
        .initial_stream_window_size(weir_proto::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(weir_proto::CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(2)))
}

/// Connects to a peer.
pub async fn connect(address: &str) -> Result<PeerClient<Channel>, tonic::transport::Error> {
    Ok(client(endpoint(address)?.connect().await?))
}

/// A peer's client over a connection.
pub fn client(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel)
        .max_decoding_message_size(weir_proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX)
}

/// Streams to all peers, opened when there is something to say.
pub struct Peers {
    shared: Arc<Shared>,
    runtime: Handle,
    cluster_id: String,
    vouched: Arc<Vouched>,
    streams: HashMap<BrokerId, Stream>,
    removed: Arc<dyn Fn() + Send + Sync>,
    rolled_back: Arc<dyn Fn() + Send + Sync>,
}

impl Peers {
    /// Of a broker that has its identity.
    pub fn new(shared: Arc<Shared>, runtime: Handle, cluster_id: String, vouched: Arc<Vouched>) -> Self {
        let nothing: Arc<dyn Fn() + Send + Sync> = Arc::new(|| {});
        let streams = HashMap::new();
        Self { shared, runtime, cluster_id, vouched, streams, removed: nothing.clone(), rolled_back: nothing }
    }

    /// What to do once a peer says that this broker is no member any more.
    pub fn on_removal(&mut self, run: impl Fn() + Send + Sync + 'static) {
        self.removed = Arc::new(run);
    }

    /// What to do once this broker's data, which was rolled back, is to be set aside.
    pub fn on_rollback(&mut self, run: impl Fn() + Send + Sync + 'static) {
        self.rolled_back = Arc::new(run);
    }

    fn queue(&mut self, to: BrokerId, frame: v1::PeerFrame) {
        if to == self.shared.broker {
            return;
        }
        let stream = self.streams.entry(to).or_insert_with(|| {
            let (frames, receiver) = mpsc::unbounded_channel();
            let queued = Arc::<AtomicUsize>::default();
            let link = Link {
                shared: self.shared.clone(),
                to,
                vouched: self.vouched.clone(),
                hello: v1::PeerHello {
                    cluster_id: self.cluster_id.clone(),
                    broker_id: self.shared.broker.0,
                    to_broker_id: to.0,
                    incarnation: 0,
                },
                removed: self.removed.clone(),
            };
            self.runtime.spawn(link.run(Queue { frames: receiver, queued: queued.clone() }));
            Stream { frames, queued }
        });
        let bytes = weight(&frame);
        if stream.frames.is_closed() {
            self.streams.remove(&to); // also where it ended with its queue full
        } else if stream.queued.load(Ordering::Relaxed) + bytes <= QUEUED_BYTES_MAX {
            stream.queued.fetch_add(bytes, Ordering::Relaxed);
            let _ = stream.frames.send((frame, bytes)); // should it end just now, the next frame finds it closed
        }
    }
}

/// What a frame takes in memory, bytes.
fn weight(frame: &v1::PeerFrame) -> usize {
    let data = |m: &v1::RaftMessage| m.entries.iter().map(|e| e.data.len()).sum::<usize>() + m.checkpoint.len();
    let answer = frame.incarnation_answer.as_ref().map_or(0, |a| (a.members.len() + a.rolled_back.len()) / 16);
    let messages = frame.raft.len() + frame.asleep.len() + frame.leaders.len() + answer;
    frame.raft.iter().map(data).sum::<usize>() + (messages + 1) * MESSAGE_BYTES
}

/// The way to one peer.
struct Stream {
    /// with the weight of each
    frames: mpsc::UnboundedSender<(v1::PeerFrame, usize)>,
    queued: Arc<AtomicUsize>,
}

/// Its other end.
struct Queue {
    frames: mpsc::UnboundedReceiver<(v1::PeerFrame, usize)>,
    /// bytes in it
    queued: Arc<AtomicUsize>,
}

impl Queue {
    /// What is to be sent next, as one frame: while a peer takes nothing, what is small gathers instead of being dropped. Messages keep
    /// their order; that a group sleeps is said after them, which at most keeps it awake.
    async fn next(&mut self) -> Option<v1::PeerFrame> {
        let (mut frame, mut bytes) = self.frames.recv().await?;
        while bytes < FRAME_BYTES
            && let Ok((more, of_more)) = self.frames.try_recv()
        {
            bytes += of_more;
            frame.raft.extend(more.raft);
            frame.asleep.extend(more.asleep);
            frame.leaders.extend(more.leaders);
            if more.disk != v1::DiskState::Unspecified as i32 {
                frame.disk = more.disk;
            }
            frame.pulse = more.pulse.or(frame.pulse);
            frame.incarnation_query = more.incarnation_query.or(frame.incarnation_query);
            frame.incarnation_answer = more.incarnation_answer.or(frame.incarnation_answer);
        }
        self.queued.fetch_sub(bytes, Ordering::Relaxed);
        Some(frame)
    }

    fn clear(&mut self) {
        while let Ok((_, bytes)) = self.frames.try_recv() {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl PeerSender for Peers {
    fn send(&mut self, effects: &mut Effects) {
        let mut frames: HashMap<BrokerId, (v1::PeerFrame, usize)> = HashMap::new();
        for (to, envelope) in effects.messages.drain(..) {
            let message = to_wire(envelope);
            let bytes: usize = message.entries.iter().map(|e| e.data.len()).sum();
            let (frame, held) = frames.entry(to).or_default();
            frame.raft.push(message);
            *held += bytes;
            if *held > FRAME_BYTES {
                let full = std::mem::take(frame);
                *held = 0;
                self.queue(to, full);
            }
        }
        for (to, Asleep { group, term, index }) in effects.asleep.drain(..) {
            let asleep = v1::Asleep { group: group.0, term, index };
            frames.entry(to).or_default().0.asleep.push(asleep);
        }
        for (to, (frame, _)) in frames {
            if !frame.raft.is_empty() || !frame.asleep.is_empty() {
                self.queue(to, frame);
            }
        }
        for (to, message) in effects.direct.drain(..) {
            self.queue(to, direct_to_wire(message));
        }
        if effects.set_aside.take().is_some() {
            (self.rolled_back)();
        }
        let disk = effects.disk_full.map_or(v1::DiskState::Unspecified, |full| match full {
            true => v1::DiskState::Full,
            false => v1::DiskState::Room,
        });
        if !effects.announce.is_empty() || effects.disk_full.is_some() || effects.pulse.is_some() {
            let leaders: Vec<v1::LeaderInfo> = effects.announce.iter().map(info_to_wire).collect();
            let pulse = effects.pulse.take().map(pulse_to_wire);
            let frame = v1::PeerFrame { leaders, disk: disk.into(), pulse, ..Default::default() };
            let meta = self.shared.meta();
            for id in meta.brokers.keys() {
                self.queue(BrokerId(*id), frame.clone());
            }
        }
    }
}

struct Link {
    shared: Arc<Shared>,
    to: BrokerId,
    vouched: Arc<Vouched>,
    hello: v1::PeerHello,
    removed: Arc<dyn Fn() + Send + Sync>,
}

impl Link {
    /// Connects again and again; what could not be sent is dropped.
    async fn run(self, mut frames: Queue) {
        let mut wait = WAIT_MIN;
        let mut failed: usize = 0;
        loop {
            let meta = self.shared.meta();
            let member = meta.broker(self.to);
            // in turns: whoever answers at either must be the broker that is meant
            let configured = member.and_then(|b| self.vouched.configured(&b.name)).filter(|_| failed % 2 == 1);
            let named = configured.or_else(|| member.map(|b| b.peer_address.clone()));
            if named.is_none() && self.to.0 <= meta.last_id {
                return; // it was removed
            }
            let Some(address) = named.clone().or_else(|| self.vouched.address(self.to)) else { return };
            let begun = Instant::now();
            match self.exchange(&address, &mut frames).await {
                Ok(()) => return,
                Err(error) => {
                    if named.is_none() {
                        self.vouched.forget(self.to);
                    }
                    tracing::debug!(peer = %self.to, %address, %error, "peer stream");
                    let status = error.downcast_ref::<tonic::Status>();
                    if status.and_then(|s| s.get_details_error_info()).is_some_and(|i| i.reason == REMOVED) {
                        (self.removed)();
                    }
                }
            }
            if begun.elapsed() > WORKED_AFTER {
                (wait, failed) = (WAIT_MIN, 0); // this address was right
            } else {
                failed += 1;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(400));
            // what gathered meanwhile is old: Raft sends again
            frames.clear();
        }
    }

    async fn exchange(&self, address: &str, frames: &mut Queue) -> anyhow::Result<()> {
        let mut client = connect(address).await?;
        let (sender, receiver) = mpsc::channel(8);
        // before anything else of this stream: what is acknowledged over it can be missed later
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        let hello = v1::PeerHello { incarnation, ..self.hello.clone() };
        sender.send(v1::PeerFrame { hello: Some(hello), ..Default::default() }).await?;
        let mut call = std::pin::pin!(client.exchange(ReceiverStream::new(receiver)));
        loop {
            // the call first, also while a frame waits for room: it must have begun before anything can leave
            let frame = tokio::select! {
                biased;
                ended = &mut call => { ended?; anyhow::bail!("the peer ended the stream") }
                frame = frames.next() => frame,
            };
            let Some(mut frame) = frame else { return Ok(()) };
            if self.shared.incarnation.load(Ordering::Acquire) > 0 {
                frame.incarnation_query = None; // of before this broker took part: its data looks older there
            }
            tokio::select! {
                biased;
                ended = &mut call => { ended?; anyhow::bail!("the peer ended the stream") }
                sent = sender.send(frame) => sent?,
            }
        }
    }
}

fn pulse_to_wire(pulse: Pulse) -> v1::BrokerPulse {
    let Pulse { incarnation, log_ms, sync_ms, slow } = pulse;
    v1::BrokerPulse { incarnation: incarnation.0, log_ms, sync_ms, slow }
}

fn pulse_from_wire(pulse: v1::BrokerPulse) -> Pulse {
    let v1::BrokerPulse { incarnation, log_ms, sync_ms, slow } = pulse;
    Pulse { incarnation: Incarnation(incarnation), log_ms, sync_ms, slow }
}

fn direct_to_wire(message: PeerMessage) -> v1::PeerFrame {
    let mut frame = v1::PeerFrame::default();
    match message {
        PeerMessage::IncarnationQuery(Query { incarnation, nonce }) => {
            frame.incarnation_query = Some(v1::IncarnationQuery { incarnation: incarnation.0, nonce });
        }
        PeerMessage::IncarnationAnswer(a) => {
            frame.incarnation_answer = Some(v1::IncarnationAnswer {
                nonce: a.nonce,
                newest: a.newest.0,
                takes_part: a.takes_part,
                version: a.version,
                members: a.members.iter().map(|b| b.0).collect(),
                rebuild: a.rebuild,
                rolled_back: a.rolled_back.iter().map(|b| b.0).collect(),
                log_ms: a.log_ms,
            });
        }
        // everything else is sent to all, or by group
        _ => {}
    }
    frame
}

fn query_from_wire(query: v1::IncarnationQuery) -> Query {
    Query { incarnation: Incarnation(query.incarnation), nonce: query.nonce }
}

fn answer_from_wire(a: v1::IncarnationAnswer) -> Answer {
    let brokers = |list: Vec<u64>| list.into_iter().map(BrokerId).collect();
    Answer {
        nonce: a.nonce,
        newest: Incarnation(a.newest),
        takes_part: a.takes_part,
        version: a.version,
        members: brokers(a.members),
        rebuild: a.rebuild,
        rolled_back: brokers(a.rolled_back),
        log_ms: a.log_ms,
    }
}

fn info_to_wire(info: &LeaderInfo) -> v1::LeaderInfo {
    v1::LeaderInfo { group: info.group.0, term: info.term, settled_epoch: info.settled_epoch, damaged: info.damaged.0 }
}

/// A frame's messages, as the core takes them.
pub fn from_frame(frame: v1::PeerFrame) -> Vec<PeerMessage> {
    let disk = match frame.disk() {
        v1::DiskState::Unspecified => None,
        state => Some(PeerMessage::DiskFull(state == v1::DiskState::Full)),
    };
    let mut out = vec![PeerMessage::Alive];
    // the query first: once the sender takes part it reports a newer incarnation
    out.extend(frame.incarnation_query.map(|q| PeerMessage::IncarnationQuery(query_from_wire(q))));
    out.extend(frame.pulse.map(|p| PeerMessage::Pulse(pulse_from_wire(p))));
    out.extend(frame.incarnation_answer.map(|a| PeerMessage::IncarnationAnswer(answer_from_wire(a))));
    out.extend(frame.raft.into_iter().filter_map(from_wire).map(PeerMessage::Raft));
    if !frame.asleep.is_empty() {
        let asleep = |a: &v1::Asleep| Asleep { group: GroupId(a.group), term: a.term, index: a.index };
        out.push(PeerMessage::Asleep(frame.asleep.iter().map(asleep).collect()));
    }
    if !frame.leaders.is_empty() {
        let info = |l: &v1::LeaderInfo| LeaderInfo {
            group: GroupId(l.group),
            term: l.term,
            settled_epoch: l.settled_epoch,
            damaged: ReplicaId(l.damaged),
        };
        out.push(PeerMessage::Leaders(frame.leaders.iter().map(info).collect()));
    }
    out.extend(disk);
    out
}

fn to_wire(envelope: Envelope) -> v1::RaftMessage {
    let Envelope { group, message: mut m } = envelope;
    let entry = |e: Entry| v1::RaftEntry {
        kind: e.entry_type as u32,
        term: e.term,
        index: e.index,
        context: e.context,
        data: e.data,
    };
    v1::RaftMessage {
        group: group.0,
        kind: m.msg_type as u32,
        to: m.to,
        from: m.from,
        term: m.term,
        log_term: m.log_term,
        index: m.index,
        commit: m.commit,
        commit_term: m.commit_term,
        checkpoint: m.get_snapshot().data.clone(),
        request_snapshot: m.request_snapshot,
        reject: m.reject,
        reject_hint: m.reject_hint,
        context: m.context.clone(),
        priority: m.priority,
        entries: m.take_entries().into_iter().map(entry).collect(),
    }
}

fn from_wire(wire: v1::RaftMessage) -> Option<Envelope> {
    let mut m = Message {
        msg_type: message_type(wire.kind)?,
        to: wire.to,
        from: wire.from,
        term: wire.term,
        log_term: wire.log_term,
        index: wire.index,
        commit: wire.commit,
        commit_term: wire.commit_term,
        request_snapshot: wire.request_snapshot,
        reject: wire.reject,
        reject_hint: wire.reject_hint,
        context: wire.context,
        priority: wire.priority,
        ..Default::default()
    };
    if m.msg_type == MessageType::MsgSnapshot {
        let checkpoint: weir_core::storage::Checkpoint = prost::Message::decode(wire.checkpoint).ok()?;
        m.set_snapshot(weir_core::log::to_snapshot(&checkpoint));
    }
    let mut entries = Vec::with_capacity(wire.entries.len());
    for e in wire.entries {
        let entry_type = match e.kind {
            0 => EntryType::EntryNormal,
            2 => EntryType::EntryConfChangeV2,
            _ => return None,
        };
        entries.push(Entry {
            entry_type,
            term: e.term,
            index: e.index,
            context: e.context,
            data: e.data,
            ..Default::default()
        });
    }
    m.set_entries(entries.into());
    Some(Envelope { group: GroupId(wire.group), message: m })
}

/// Only the kinds one replica may send another; local ones from a peer would be a forgery.
fn message_type(kind: u32) -> Option<MessageType> {
    const FROM_PEERS: [MessageType; 11] = [
        MessageType::MsgAppend,
        MessageType::MsgAppendResponse,
        MessageType::MsgRequestVote,
        MessageType::MsgRequestVoteResponse,
        MessageType::MsgSnapshot,
        MessageType::MsgHeartbeat,
        MessageType::MsgHeartbeatResponse,
        MessageType::MsgTimeoutNow,
        MessageType::MsgRequestPreVote,
        MessageType::MsgRequestPreVoteResponse,
        MessageType::MsgTransferLeader,
    ];
    FROM_PEERS.into_iter().find(|t| *t as u32 == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_gathers_leaves_in_one_frame_in_order_and_is_counted() {
        let (sender, frames) = mpsc::unbounded_channel();
        let queued = Arc::<AtomicUsize>::default();
        let mut queue = Queue { frames, queued: queued.clone() };
        let frame = |index: u64, bytes: usize| {
            let entries = vec![v1::RaftEntry { data: vec![0; bytes].into(), ..Default::default() }];
            let raft = vec![v1::RaftMessage { index, entries, ..Default::default() }];
            v1::PeerFrame { raft, asleep: vec![v1::Asleep { index, ..Default::default() }], ..Default::default() }
        };
        let full = v1::PeerFrame { disk: v1::DiskState::Full.into(), ..Default::default() };
        for frame in [frame(1, 10), full, frame(2, FRAME_BYTES), frame(3, 10)] {
            let bytes = weight(&frame);
            queued.fetch_add(bytes, Ordering::Relaxed);
            sender.send((frame, bytes)).unwrap();
        }
        let first = queue.next().await.unwrap();
        let indexes = |f: &v1::PeerFrame| f.raft.iter().map(|m| m.index).collect::<Vec<_>>();
        assert_eq!((indexes(&first), first.asleep.len(), first.disk()), (vec![1, 2], 2, v1::DiskState::Full));
        assert_eq!(queued.load(Ordering::Relaxed), weight(&frame(3, 10)));
        queue.clear();
        assert_eq!(queued.load(Ordering::Relaxed), 0);
        drop(sender);
        assert!(queue.next().await.is_none());
    }

    #[test]
    fn what_brokers_say_of_incarnations_survives_the_wire() {
        let pulse = Pulse { incarnation: Incarnation(1 << 32 | 7), log_ms: 5, sync_ms: 3, slow: true };
        let query = Query { incarnation: Incarnation(9), nonce: 4 };
        let answer = Answer {
            nonce: 4,
            newest: Incarnation(8),
            takes_part: true,
            version: 3,
            members: vec![BrokerId(1), BrokerId(2)],
            rebuild: true,
            rolled_back: vec![BrokerId(2)],
            log_ms: 6,
        };
        let frame = v1::PeerFrame { pulse: Some(pulse_to_wire(pulse)), ..Default::default() };
        assert_eq!(from_frame(frame), [PeerMessage::Alive, PeerMessage::Pulse(pulse)]);
        for message in [PeerMessage::IncarnationQuery(query), PeerMessage::IncarnationAnswer(answer)] {
            assert_eq!(from_frame(direct_to_wire(message.clone())), [PeerMessage::Alive, message]);
        }
    }

    #[test]
    fn a_raft_message_survives_the_wire_and_local_kinds_are_refused() {
        let mut message = Message {
            msg_type: MessageType::MsgAppend,
            to: 2,
            from: 1,
            term: 3,
            index: 9,
            commit: 8,
            ..Default::default()
        };
        message.set_entries(vec![Entry { term: 3, index: 10, data: "batch".into(), ..Default::default() }].into());
        let envelope = Envelope { group: GroupId(5), message };
        assert_eq!(from_wire(to_wire(envelope.clone())), Some(envelope));
        assert_eq!(from_wire(v1::RaftMessage { kind: MessageType::MsgHup as u32, ..Default::default() }), None);
        assert_eq!(from_wire(v1::RaftMessage { kind: 900, ..Default::default() }), None);
    }
}
