//! A producer whose broker says nothing that counts, and brokers that do not know a change yet, which play their parts.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_stream::wrappers::{IntervalStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Error, Record};
use weir_proto::v1;

/// What takes moments takes no longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Version of the metadata with the last change.
const CHANGED: u64 = 5;

/// What both brokers know.
struct Cluster {
    addresses: [String; 2],
    /// the first was given a batch: from then on the second leads
    given: AtomicBool,
    /// answers until they know the last change
    behind: AtomicU32,
}

#[derive(Clone)]
struct Broker {
    id: u64,
    cluster: Arc<Cluster>,
}

#[tonic::async_trait]
impl v1::metadata_server::Metadata for Broker {
    async fn get(&self, _: Request<v1::GetMetadataRequest>) -> Result<Response<v1::GetMetadataResponse>, Status> {
        let broker = |(id, address): (u64, &String)| v1::Broker {
            id,
            name: format!("b-{id}"),
            client_address: address.clone(),
            ..Default::default()
        };
        let leader = if self.cluster.given.load(Ordering::SeqCst) { 2 } else { 1 };
        let partitions = vec![v1::Partition { group: 5, leader, replicas: vec![1, 2], ..Default::default() }];
        let topic = v1::Topic { name: "default/t".into(), id: 4, partitions, ..Default::default() };
        let count = |left: u32| left.checked_sub(1);
        let is_behind = self.cluster.behind.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count).is_ok();
        Ok(Response::new(v1::GetMetadataResponse {
            version: if is_behind { CHANGED - 1 } else { CHANGED },
            brokers: (1..).zip(&self.cluster.addresses).map(broker).collect(),
            topics: vec![topic],
            answered_by: self.id,
            ..Default::default()
        }))
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        Err(Status::unimplemented("not asked"))
    }
}

type Acks = Pin<Box<dyn Stream<Item = Result<v1::PublishAck, Status>> + Send>>;

#[tonic::async_trait]
impl v1::publisher_server::Publisher for Broker {
    type PublishStreamStream = Acks;

    async fn publish_stream(
        &self,
        request: Request<Streaming<v1::PublishBatch>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let batches = request.into_inner();
        if self.id == 2 {
            let ack = |batch: Result<v1::PublishBatch, Status>| {
                let outcome = Some(v1::publish_ack::Outcome::BaseOffset(7));
                Ok(v1::PublishAck { id: batch?.id, outcome })
            };
            return Ok(Response::new(Box::pin(batches.map(ack))));
        }
        let cluster = self.cluster.clone();
        let taken = batches.filter_map(move |_| {
            cluster.given.store(true, Ordering::SeqCst);
            None
        });
        // answers to what nobody sent, now and then: it is not taken for dead
        let beats = IntervalStream::new(tokio::time::interval(Duration::from_secs(1)));
        let beats = beats.map(|_| Ok(v1::PublishAck { id: u64::MAX, outcome: None }));
        Ok(Response::new(Box::pin(taken.merge(beats))))
    }

    async fn allocate_producer_ids(
        &self,
        _: Request<v1::AllocateProducerIdsRequest>,
    ) -> Result<Response<v1::AllocateProducerIdsResponse>, Status> {
        Ok(Response::new(v1::AllocateProducerIdsResponse { first_id: 1 }))
    }

    async fn publish(&self, _: Request<v1::PublishRequest>) -> Result<Response<v1::PublishResponse>, Status> {
        Err(Status::unimplemented("not asked"))
    }

    async fn cancel_scheduled(
        &self,
        _: Request<v1::CancelScheduledRequest>,
    ) -> Result<Response<v1::CancelScheduledResponse>, Status> {
        Err(Status::unimplemented("not asked"))
    }
}

/// Two brokers whose first answers, so many, lack the last change, and a client.
async fn start(behind: u32) -> (Arc<Cluster>, Client) {
    let listeners = [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap()];
    let addresses = listeners.each_ref().map(|l| l.local_addr().unwrap().to_string());
    let server = addresses.join(",");
    let cluster = Arc::new(Cluster { addresses, given: AtomicBool::new(false), behind: behind.into() });
    for (id, listener) in (1..).zip(listeners) {
        let broker = Broker { id, cluster: cluster.clone() };
        let serving = tonic::transport::Server::builder()
            .add_service(v1::metadata_server::MetadataServer::new(broker.clone()))
            .add_service(v1::publisher_server::PublisherServer::new(broker))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serving);
    }
    (cluster, Client::new(&server).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_leaves_a_broker_that_answers_nothing_where_another_leads() {
    let (cluster, client) = start(0).await;
    client.connect(PATIENCE).await.unwrap();
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    let receipt = producer.send(Record { value: Some("value".into()), ..Default::default() }).await.unwrap();
    let position = tokio::time::timeout(PATIENCE, receipt).await.unwrap().unwrap();
    assert_eq!(position.offset, 7);
    assert!(cluster.given.load(Ordering::SeqCst), "the first broker was never asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_waits_for_metadata_that_contain_its_change() {
    let (cluster, client) = start(6).await;
    assert_eq!(client.refresh_to(CHANGED, PATIENCE).await.unwrap().metadata.version, CHANGED);
    let left = cluster.behind.load(Ordering::SeqCst);
    assert_eq!(left, 0, "a broker that was behind was believed");
    let never = client.refresh_to(CHANGED + 1, Duration::ZERO).await;
    assert!(matches!(&never, Err(Error::Deadline { last, .. }) if last.contains("not 6 yet")), "{never:?}");
}
