//! Answers of the Metadata service as pages, none of which is larger than what every client takes. A page continues behind the last name
//! of the one before it, so that a broker keeps nothing between two pages.

use crate::answer::PREFIX_BYTES;
use crate::budget::ANSWER_BYTES_MAX;
use crate::status::Failure;
use prost::Message;
use std::ops::Bound::{Excluded, Unbounded};
use weir_core::meta::state as core;
use weir_proto::limits::PAGE_TOKEN_BYTES_MAX;
use weir_proto::v1;

fn wrong(token: &str) -> Failure {
    let shown: String = token.chars().take(60).collect();
    Failure::invalid("PAGE_TOKEN", format!("'{shown}' is not the token of a page; begin again without one"))
}

/// Refuses a token that no page has, before it is read.
fn bounded(token: &str) -> Result<&str, Failure> {
    let bytes = token.len();
    let text =
        || format!("a page's token has {PAGE_TOKEN_BYTES_MAX} bytes at most, not {bytes}; begin again without one");
    if bytes <= PAGE_TOKEN_BYTES_MAX { Ok(token) } else { Err(Failure::invalid("PAGE_TOKEN", text())) }
}

/// Bytes of an element of a list at most, from the bytes of its content: with a tag, and a length of at most five bytes.
fn element_bytes(content: usize) -> usize {
    6 + content
}

/// What is left of a page.
pub(super) struct Room {
    bytes: usize,
    is_empty: bool,
}

impl Room {
    /// Of a page of at most `bytes_max` bytes on the wire that has the fields of `head` as well.
    pub(super) fn beside(head: &impl Message, bytes_max: usize) -> Self {
        let taken = PREFIX_BYTES + element_bytes(PAGE_TOKEN_BYTES_MAX) + head.encoded_len();
        Self { bytes: bytes_max.saturating_sub(taken), is_empty: true }
    }

    /// Takes the room of an element if there is enough. There is always enough for the first one.
    pub(super) fn take(&mut self, element: &impl Message) -> bool {
        let bytes = element_bytes(element.encoded_len());
        let fits = bytes <= self.bytes || self.is_empty;
        if fits {
            *self = Self { bytes: self.bytes.saturating_sub(bytes), is_empty: false };
        }
        fits
    }

    /// As [`Room::take`]; a subscription for which an empty page has not enough room loses the topics that are too many. Gives the last
    /// topic that it has then.
    fn take_divided(&mut self, subscription: &mut v1::Subscription) -> (bool, Option<String>) {
        let mut last = None;
        if self.is_empty && element_bytes(subscription.encoded_len()) > self.bytes {
            let mut topics = std::mem::take(&mut subscription.topics);
            let mut left = self.bytes.saturating_sub(element_bytes(subscription.encoded_len()));
            let fits = |topic: &&String| {
                let bytes = element_bytes(topic.len());
                let fits = bytes <= left;
                left = left.saturating_sub(bytes);
                fits
            };
            let kept = topics.iter().take_while(fits).count().max(1);
            last = topics.get(kept).and_then(|_| topics.get(kept - 1)).cloned();
            topics.truncate(kept);
            subscription.topics = topics;
        }
        (self.take(subscription), last)
    }
}

/// What the pages before have: topics by name, then subscriptions by name.
#[derive(Debug, PartialEq)]
pub(super) enum Behind {
    Nothing,
    /// The topics up to this one.
    Topic(String),
    /// All topics, and the subscriptions up to this one; where that is divided, its topics up to this one.
    Subscription(String, Option<String>),
}

impl Behind {
    pub(super) fn parse(token: &str) -> Result<Self, Failure> {
        match *bounded(token)?.split(' ').collect::<Vec<_>>().as_slice() {
            [""] => Ok(Self::Nothing),
            ["topic", name] => Ok(Self::Topic(name.to_owned())),
            ["subscription", name] => Ok(Self::Subscription(name.to_owned(), None)),
            ["subscription", name, topic] => Ok(Self::Subscription(name.to_owned(), Some(topic.to_owned()))),
            _ => Err(wrong(token)),
        }
    }

    fn token(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Topic(name) => format!("topic {name}"),
            Self::Subscription(name, None) => format!("subscription {name}"),
            Self::Subscription(name, Some(topic)) => format!("subscription {name} {topic}"),
        }
    }
}

/// The page behind others: `head`, and topics and subscriptions of `meta` in the form that `topic` (for those that are wanted) and
/// `subscription` give them.
pub(super) fn fill(
    head: v1::GetMetadataResponse,
    meta: &core::MetaState,
    behind: Behind,
    topic: impl Fn(&core::Topic) -> Option<v1::Topic>,
    subscription: impl Fn(&core::Subscription) -> v1::Subscription,
) -> v1::GetMetadataResponse {
    let mut room = Room::beside(&head, ANSWER_BYTES_MAX);
    let (mut page, mut done) = (head, behind);
    let topics_from = match &done {
        Behind::Nothing => Some(Unbounded),
        Behind::Topic(name) => Some(Excluded(name.clone())),
        Behind::Subscription(..) => None,
    };
    let topics = topics_from.into_iter().flat_map(|from| meta.topics.range((from, Unbounded)));
    for next in topics.filter_map(|(_, next)| topic(next)) {
        if !room.take(&next) {
            page.next_page_token = done.token();
            return page;
        }
        done = Behind::Topic(next.name.clone());
        page.topics.push(next);
    }
    let (rest, subscriptions_from) = match &done {
        Behind::Subscription(name, after) => (after.as_ref().map(|after| (name, after)), Excluded(name.clone())),
        Behind::Nothing | Behind::Topic(_) => (None, Unbounded),
    };
    let rest = rest.and_then(|(name, after)| {
        let mut divided = subscription(meta.subscriptions.get(name)?);
        divided.topics.retain(|topic| topic > after);
        (!divided.topics.is_empty()).then_some(divided)
    });
    let others = meta.subscriptions.range((subscriptions_from, Unbounded)).map(|(_, s)| subscription(s));
    for mut next in rest.into_iter().chain(others) {
        let (fits, last) = room.take_divided(&mut next);
        if fits {
            done = Behind::Subscription(next.name.clone(), last.clone());
            page.subscriptions.push(next);
        }
        if !fits || last.is_some() {
            page.next_page_token = done.token();
            return page;
        }
    }
    page
}

/// Where a page of statuses begins: behind this subscription of this group, by ids.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Place {
    pub(super) group: u64,
    pub(super) subscription: u64,
}

impl Place {
    pub(super) fn parse(token: &str) -> Result<Self, Failure> {
        if token.is_empty() {
            return Ok(Self::default());
        }
        let numbers = bounded(token)?.split_once(' ').and_then(|(g, s)| Some((g.parse().ok()?, s.parse().ok()?)));
        let (group, subscription) = numbers.ok_or_else(|| wrong(token))?;
        Ok(Self { group, subscription })
    }

    pub(super) fn token(self) -> String {
        format!("{} {}", self.group, self.subscription)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::wire_bytes;
    use std::cell::RefCell;
    use weir_core::meta::index::Metadata;

    fn topic(topic: &core::Topic) -> Option<v1::Topic> {
        let partition = |g: &u64| v1::Partition { group: *g, replicas: vec![1, 2, 3], ..Default::default() };
        let partitions = topic.groups.iter().map(partition).collect();
        Some(v1::Topic { name: topic.name.clone(), id: topic.id, partitions, ..Default::default() })
    }

    /// Thousands of topics, some subscriptions of one of them each, and two that read them all.
    fn metadata() -> Metadata {
        let mut meta = core::MetaState::default();
        for id in 0..20_000_u64 {
            let name = format!("default/{id:0>200}");
            let groups = (id * 10..id * 10 + 10).collect();
            meta.topics.insert(name.clone(), core::Topic { id, name, groups, ..Default::default() });
        }
        for id in 1..=3_000_u64 {
            let name = format!("default/s{id:0>100}");
            let (topic, topic_id) =
                if id == 700 || id == 701 { ("default/#".to_owned(), 0) } else { (format!("default/{id:0>200}"), id) };
            let spec = core::SubscriptionSpec { topic, filter: "x".repeat(2_000), ..Default::default() };
            meta.subscriptions
                .insert(name.clone(), core::Subscription { id, name, spec, topic_id, ..Default::default() });
        }
        meta.into()
    }

    #[test]
    fn pages_are_bounded_and_together_they_hold_everything_once() {
        let meta = metadata();
        let subscription = |s: &core::Subscription| {
            let topics = meta.topics_of(&s.spec).map(|t| t.name.clone()).collect();
            let spec = v1::SubscriptionSpec { filter: s.spec.filter.clone(), ..Default::default() };
            v1::Subscription { name: s.name.clone(), id: s.id, spec: Some(spec), topics, ..Default::default() }
        };
        let sizes = RefCell::new(Vec::new());
        let call = async |request: v1::GetMetadataRequest| {
            let head = v1::GetMetadataResponse { version: 7, ..Default::default() };
            let behind = Behind::parse(&request.page_token).unwrap();
            let page = fill(head, &meta, behind, topic, subscription);
            sizes.borrow_mut().push(wire_bytes(&page));
            Ok(page)
        };
        let whole = weir_proto::pages::metadata(Default::default(), call);
        let whole = futures::executor::block_on(whole).unwrap();
        let sizes = sizes.into_inner();
        assert!(sizes.iter().all(|bytes| *bytes <= ANSWER_BYTES_MAX), "{sizes:?}");
        let few = wire_bytes(&whole) / (ANSWER_BYTES_MAX / 2);
        assert!((5..=few).contains(&sizes.len()), "pages are full: {} of them", sizes.len());
        assert!(whole.topics.iter().map(|t| &t.name).eq(meta.topics.keys()));
        assert!(whole.subscriptions.iter().map(|s| &s.name).eq(meta.subscriptions.keys()));
        for s in &whole.subscriptions {
            assert_eq!(s, &subscription(&meta.subscriptions[&s.name]), "none of its topics is missing or there twice");
        }
        assert_eq!((whole.version, whole.next_page_token.as_str()), (7, ""));
    }

    #[test]
    fn a_token_says_where_the_page_before_ended_and_others_are_refused() {
        for behind in [
            Behind::Nothing,
            Behind::Topic("a/b".into()),
            Behind::Subscription("a/b".into(), None),
            Behind::Subscription("a/b".into(), Some("a/c".into())),
        ] {
            assert_eq!(Behind::parse(&behind.token()).unwrap(), behind);
        }
        let place = Place { group: 7, subscription: u64::MAX };
        assert_eq!(Place::parse(&place.token()).unwrap(), place);
        for bad in ["x", "topic", "topic a b", "subscription", "subscription a b c", "-1 2", "1", "1 2 3", " "] {
            assert_eq!(Behind::parse(bad).unwrap_err().reason, "PAGE_TOKEN", "{bad}");
            assert_eq!(Place::parse(bad).unwrap_err().reason, "PAGE_TOKEN", "{bad}");
        }
    }

    #[test]
    fn the_longest_token_is_taken_and_a_longer_one_refused() {
        let full = |letter: &str| format!("{0}/{0}", letter.repeat(weir_proto::names::CHARS_MAX));
        let longest = Behind::Subscription(full("s"), Some(full("t")));
        assert_eq!(Behind::parse(&longest.token()).unwrap(), longest);
        let long = "x".repeat(3 << 20);
        for bad in [format!("topic {long}"), format!("subscription {long}"), " ".repeat(3 << 20)] {
            let refused = Behind::parse(&bad).unwrap_err();
            assert_eq!((refused.code, refused.reason), (tonic::Code::InvalidArgument, "PAGE_TOKEN"));
            assert!(refused.message.contains("1200 bytes at most"), "{}", refused.message);
        }
        let zeros = "0".repeat(3 << 20);
        assert_eq!(Place::parse(&format!("{zeros}7 1")).unwrap_err().reason, "PAGE_TOKEN");
    }
}
