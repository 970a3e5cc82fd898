//! Names of internal objects: the topics and subscriptions that brokers keep for themselves. They are in a namespace of their own, in
//! which no client may create, change, delete, subscribe or publish. Each name is made of the id of the object it belongs to, so that
//! its length does not depend on that object's name, and an object that is re-created under the same name never meets what its
//! namesake left.

/// Namespace of all internal objects.
pub const INTERNAL_NAMESPACE: &str = "weir-system";

/// Bytes of each part of a name.
pub const PART_BYTES_MAX: usize = 253;

/// Returns true if a text can be one part of a name. Entry points have a narrower rule; any other text could not be listed.
pub fn is_part(part: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    (1..=PART_BYTES_MAX).contains(&part.len()) && part.bytes().all(letter)
}

/// Returns true if a text can be a full name.
pub fn is_full(name: &str) -> bool {
    name.split_once('/').is_some_and(|(namespace, name)| is_part(namespace) && is_part(name))
}

/// Returns true if a full name, `namespace/name`, is that of an internal object.
pub fn is_internal(full_name: &str) -> bool {
    full_name.split_once('/').is_some_and(|(namespace, _)| namespace == INTERNAL_NAMESPACE)
}

/// Topic, and subscription with its position, that hold the scheduled messages of a topic.
pub fn scheduled(topic_id: u64) -> String {
    format!("{INTERNAL_NAMESPACE}/scheduled-{topic_id}")
}

/// Subscription that remembers which dead letters of a subscription were redriven.
pub fn redrive(subscription_id: u64) -> String {
    format!("{INTERNAL_NAMESPACE}/redrive-{subscription_id}")
}

/// Subscription that holds a snapshot of another one. `snapshot` is its name among the snapshots of that subscription.
pub fn snapshot(subscription_id: u64, snapshot: &str) -> String {
    format!("{INTERNAL_NAMESPACE}/snapshot-{subscription_id}-{snapshot}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern;

    #[test]
    fn internal_names_are_short_and_match_no_pattern_of_another_namespace() {
        for name in [scheduled(u64::MAX), redrive(7), snapshot(7, "before-upgrade")] {
            assert!(is_internal(&name) && name.len() < 64, "{name}");
            for words in ["#", "*", "#.#"] {
                assert!(!pattern::matches_topic(&format!("default/{words}"), &name), "{words} {name}");
            }
        }
        for user in
            ["default/jobs.scheduled", "default/mail.redrive", "weir-systems/x", "weir/weir-system", "weir-system"]
        {
            assert!(!is_internal(user), "{user}");
        }
    }
}
