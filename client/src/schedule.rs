//! Messages that are published later, and taking them back.

use crate::transport::Transport;
use crate::{Client, Error};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use weir_proto::records::{self, Record};
use weir_proto::v1;
use weir_proto::v1::publisher_client::PublisherClient;

/// A call is tried for this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// A scheduled message: what is needed to take it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// The topic it is scheduled for.
    pub topic: String,
    /// Partition.
    pub partition: u32,
    /// Its place among what is scheduled there.
    pub offset: u64,
    /// Id of the topic when it was scheduled; 0 where it is not known. A topic that was re-created since has nothing of it.
    pub topic_id: u64,
}

fn message(record: Record, at: SystemTime) -> v1::Message {
    // before the epoch is long past, as the epoch is
    let ms = at.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
    v1::Message { deliver_at_ms: Some(ms), ..record.into() }
}

fn publisher(client: &Client, address: &str) -> Result<PublisherClient<Transport>, tonic::Status> {
    let channel = client.channel(address).map_err(|e| tonic::Status::internal(e.to_string()))?;
    Ok(PublisherClient::new(channel).max_encoding_message_size(weir_proto::MESSAGE_BYTES_MAX))
}

/// Has records published to a topic, each at its time or (where that is past) at once. Those of one key keep their order where their
/// times do. Stored when this returns, once, whatever fails under way. Should it end with an error they may be stored all the same.
pub async fn schedule(client: &Client, topic: &str, list: Vec<(Record, SystemTime)>) -> Result<Vec<Scheduled>, Error> {
    let cluster = client.connect(ANSWER_WITHIN).await?;
    let found = cluster.topic(topic).ok_or_else(|| Error::no_topic(topic))?;
    let (partitions, topic_id) = (found.partitions.len() as u32, found.id);
    let mut calls: std::collections::BTreeMap<u32, Vec<(usize, v1::Message)>> = Default::default();
    for (at, (record, when)) in list.into_iter().enumerate() {
        let partition = record.key.as_ref().map_or(0, |key| records::partition_of(key, partitions));
        calls.entry(partition).or_default().push((at, message(record, when)));
    }
    // a producer of this call's own: what is sent again is known to be there
    let id = client
        .anywhere(|address| async move {
            let mut publisher = publisher(client, &address)?;
            Ok(publisher.allocate_producer_ids(v1::AllocateProducerIdsRequest { count: 1 }).await?.into_inner())
        })
        .await?
        .first_id;
    let producer = Some(v1::ProducerStamp { id, sequence: 0 });
    let mut out = Vec::new();
    for (partition, messages) in calls {
        let (places, messages): (Vec<usize>, Vec<v1::Message>) = messages.into_iter().unzip();
        let (topic_name, partition_wanted) = (topic.to_owned(), Some(partition));
        let request =
            v1::PublishRequest { topic: topic_name, partition: partition_wanted, messages, producer, topic_id };
        // any broker takes it and passes it on
        let answer = client
            .anywhere(|address| {
                let request = request.clone();
                async move { Ok(publisher(client, &address)?.publish(request).await?.into_inner()) }
            })
            .await?;
        for (at, place) in places.into_iter().enumerate() {
            let offset = answer.base_offset + at as u64;
            out.push((place, Scheduled { topic: topic.to_owned(), partition, offset, topic_id }));
        }
    }
    out.sort_by_key(|(place, _)| *place);
    Ok(out.into_iter().map(|(_, scheduled)| scheduled).collect())
}

/// Takes a scheduled message back. Refused with NOT_FOUND where it was published, or cancelled, before (`NOT_SCHEDULED`), and where none
/// was ever scheduled at this offset (`NEVER_SCHEDULED`).
pub async fn cancel(client: &Client, scheduled: &Scheduled) -> Result<(), Error> {
    let Scheduled { topic, partition, offset, topic_id } = scheduled.clone();
    let request = v1::CancelScheduledRequest { topic: topic.clone(), partition, offset, topic_id };
    let call = |address: String| {
        let request = request.clone();
        async move { Ok(publisher(client, &address)?.cancel_scheduled(request).await?.into_inner()) }
    };
    let cluster = client.refresh().await?;
    let partitions = cluster.topic(&topic).map(|t| t.partitions.len() as u64);
    let partitions = partitions.ok_or_else(|| Error::no_topic(&topic))?;
    if u64::from(partition) >= partitions {
        let text = format!("topic {topic} has {partitions} partitions, there is no partition {partition}");
        return Err(Error::missing("NO_PARTITION", text));
    }
    let full = crate::full_name(&topic);
    let held = cluster
        .metadata
        .topics
        .iter()
        .find(|t| t.scheduled_for == full)
        .filter(|t| t.partitions.len() > partition as usize);
    // where there is no such log, a broker says why
    let Some(held) = held.map(|t| t.name.clone()) else { return client.anywhere(call).await.map(drop) };
    client.at_leader(&held, partition, ANSWER_WITHIN, call).await.map(drop)
}
