//! Manifests as files: several documents, `kind: List`, and errors that name file, line and field.

use crate::{Subscription, Topic, ValidatedSubscription, ValidatedTopic};
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a folder of manifests declares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// Topics.
    pub topics: Vec<ValidatedTopic>,
    /// Subscriptions.
    pub subscriptions: Vec<ValidatedSubscription>,
    /// Where each stands, file and line, by kind and name: `topic default/orders`.
    pub origins: BTreeMap<String, (PathBuf, usize)>,
}

impl Declared {
    /// Takes up a resource; one that was declared before is an error.
    fn claim(&mut self, what: String, file: &Path, line: usize) -> Result<(), String> {
        if let Some((before, at)) = self.origins.get(&what) {
            return Err(format!("{what} is declared in {}:{at} already", before.display()));
        }
        self.origins.insert(what, (file.to_owned(), line));
        Ok(())
    }
}

/// One thing wrong in one file; the rest of the file and the others still count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {message}", file.display())]
pub struct ManifestError {
    /// The file.
    pub file: PathBuf,
    /// Counted from 1.
    pub line: usize,
    /// Field and cause.
    pub message: String,
}

/// Reads all `.yaml`, `.yml` and `.json` files of a folder, in the order of their names.
pub fn read_folder(folder: &Path) -> std::io::Result<(Declared, Vec<ManifestError>)> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)?.filter_map(|e| Some(e.ok()?.path())).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json"));
    files.sort();
    let (mut declared, mut errors) = Default::default();
    for file in files {
        read_text(&file, &std::fs::read_to_string(&file)?, &mut declared, &mut errors);
    }
    Ok((declared, errors))
}

/// Reads one file's text.
pub fn read_text(file: &Path, text: &str, declared: &mut Declared, errors: &mut Vec<ManifestError>) {
    let mut start = 0;
    let mut document = String::new();
    // YAML knows more line breaks than editors count
    let last = text.lines().count().max(1);
    for (at, line) in text.lines().chain(["---"]).enumerate() {
        if line.trim_end() != "---" {
            document.push_str(line);
            document.push('\n');
            continue;
        }
        let mut fail = |line: usize, message: String| {
            errors.push(ManifestError { file: file.to_owned(), line: line.min(last), message });
        };
        read_document(file, &document, start, declared, &mut fail);
        document.clear();
        start = at + 1;
    }
}

fn read_document(file: &Path, text: &str, start: usize, declared: &mut Declared, fail: &mut dyn FnMut(usize, String)) {
    let value: Value = match serde_yaml_ng::from_str(text) {
        Ok(Value::Null) => return,
        Ok(value) => value,
        Err(error) => return fail(start + line_of(&error), error.to_string()),
    };
    if value.get("kind").and_then(Value::as_str) == Some("List") {
        let begins = items(text);
        let list = value.get("items").and_then(Value::as_sequence).into_iter().flatten();
        for (at, item) in list.enumerate() {
            let first = begins.get(at).copied().unwrap_or(0);
            let lines = begins.get(at + 1).map_or(usize::MAX, |next| next - first);
            // its own lines, for finding fields in; what it says was read with the rest
            let text: String = text.lines().skip(first).take(lines).flat_map(|l| [l, "\n"]).collect();
            let begin = start + first;
            read_object(file, begin, item, &text, declared, &mut |line, message| fail(begin + line, message));
        }
        return;
    }
    read_object(file, start, &value, text, declared, &mut |line, message| fail(start + line, message));
}

/// Lines, counted from 0, at which the items of a list in block style begin.
fn items(text: &str) -> Vec<usize> {
    let indent = |l: &str| l.len() - l.trim_start().len();
    let all = || text.lines().enumerate().skip_while(|(_, l)| !l.starts_with("items:")).skip(1);
    let dashed = |l: &str| l.trim_start().starts_with("- ") || l.trim() == "-";
    let Some(depth) = all().find(|(_, l)| dashed(l)).map(|(_, l)| indent(l)) else { return Vec::new() };
    all().filter(|(_, l)| dashed(l) && indent(l) == depth).map(|(at, _)| at).collect()
}

fn read_object(
    file: &Path,
    start: usize,
    value: &Value,
    text: &str,
    declared: &mut Declared,
    fail: &mut dyn FnMut(usize, String),
) {
    let field = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    let (api, kind) = (field("apiVersion"), field("kind"));
    let kind_line = line_with(text, "kind:");
    if api != "weir.dev/v1alpha1" {
        return fail(line_with(text, "apiVersion:"), format!("apiVersion: '{api}' is not weir.dev/v1alpha1"));
    }
    match kind {
        "Topic" => {
            if let Some(topic) = parse::<Topic>(value, text, fail) {
                match topic.validate() {
                    Ok(topic) => match declared.claim(format!("topic {}", topic.name), file, start + kind_line) {
                        Ok(()) => declared.topics.push(topic),
                        Err(message) => fail(kind_line, message),
                    },
                    Err(e) => fail(line_of_field(text, e.field), e.to_string()),
                }
            }
        }
        "Subscription" => {
            if let Some(subscription) = parse::<Subscription>(value, text, fail) {
                match subscription.validate() {
                    Ok(read) => match declared.claim(format!("subscription {}", read.name), file, start + kind_line) {
                        Ok(()) => declared.subscriptions.push(read),
                        Err(message) => fail(kind_line, message),
                    },
                    Err(e) => fail(line_of_field(text, e.field), e.to_string()),
                }
            }
        }
        "StreamCluster" => {} // what runs it is the cluster
        other => fail(kind_line, format!("kind: '{other}' is not Topic, Subscription, StreamCluster or List")),
    }
}

fn parse<T: DeserializeOwned>(value: &Value, text: &str, fail: &mut dyn FnMut(usize, String)) -> Option<T> {
    let wrong = match serde_yaml_ng::from_value(value.clone()) {
        Ok(read) => return Some(read),
        Err(wrong) => wrong,
    };
    // read from its own text the error has a place; an item of a list has none of its own, but for the name it complains of
    let placed = serde_yaml_ng::from_str::<T>(text).err().filter(|e| e.to_string().contains(&wrong.to_string()));
    let message = wrong.to_string();
    let named = message.split('`').nth(1).map_or(1, |field| line_with(text, &format!("{field}:")));
    let line = placed.as_ref().map_or(named, line_of);
    fail(line, placed.map_or(message, |e| e.to_string()));
    None
}

fn line_of(error: &serde_yaml_ng::Error) -> usize {
    error.location().map_or(1, |l| l.line())
}

fn line_with(text: &str, start: &str) -> usize {
    line_from(text, 0, start).map_or(1, |at| at + 1)
}

/// The line, from `first` on, that has a field, whether in block style or within braces.
fn line_from(text: &str, first: usize, field: &str) -> Option<usize> {
    let has = |l: &str| l.match_indices(field).any(|(at, _)| at == 0 || l[..at].ends_with([' ', '{', ',', '-']));
    text.lines().enumerate().skip(first).find(|(_, l)| has(l)).map(|(at, _)| at)
}

/// The line of `spec.deadLetter.topic`: each part is looked for behind the one before it.
fn line_of_field(text: &str, path: &str) -> usize {
    let mut at = 0;
    for part in path.split('.') {
        at = line_from(text, at, &format!("{part}:")).unwrap_or(at);
    }
    at + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Declared, Vec<String>) {
        let (mut declared, mut errors) = Default::default();
        read_text(Path::new("a.yaml"), text, &mut declared, &mut errors);
        (declared, errors.iter().map(ToString::to_string).collect())
    }

    const GOOD: &str = "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata:\n  name: orders\nspec:\n  partitions: 6\n  retention:\n    time: 7d\n    bytes: 10Gi\n";

    #[test]
    fn documents_and_lists_are_read() {
        let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: weir.dev/v1alpha1\n  kind: Subscription\n  metadata: {name: mail, namespace: shop}\n  spec: {topic: orders, start: earliest}\n";
        let (declared, errors) = read(&format!("{GOOD}---\n{list}"));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(declared.topics[0].retention_ms, 7 * 86_400_000);
        assert_eq!(declared.topics[0].replicas, 3);
        assert_eq!(declared.subscriptions[0].topic, "shop/orders");
    }

    #[test]
    fn errors_name_line_and_field_and_leave_the_rest() {
        let unknown = GOOD.replace("partitions: 6", "partitons: 6");
        let (declared, errors) = read(&format!("{GOOD}---\n{unknown}"));
        assert_eq!(declared.topics.len(), 1);
        assert!(errors[0].starts_with("a.yaml:16: ") && errors[0].contains("partitons"), "{errors:?}");
        let (_, errors) = read(&GOOD.replace("10Gi", "lots"));
        assert!(errors[0].starts_with("a.yaml:9: spec.retention.bytes: 'lots'"), "{errors:?}");
        let (_, errors) = read(&GOOD.replace("kind: Topic", "kind: Queue"));
        assert!(errors[0].starts_with("a.yaml:2: kind: 'Queue'"), "{errors:?}");
        let (_, errors) = read("kind: [\n");
        assert!(errors[0].starts_with("a.yaml:"), "{errors:?}");
        let (declared, errors) = read(&format!("{GOOD}---\n{GOOD}"));
        assert_eq!(
            (declared.topics.len(), errors),
            (1, vec!["a.yaml:12: topic default/orders is declared in a.yaml:2 already".to_owned()])
        );
        let (_, errors) = read(&GOOD.replace("partitions: 6", "partitions: 0"));
        assert!(errors[0].starts_with("a.yaml:6: spec.partitions: must be 1"), "{errors:?}");
    }

    #[test]
    fn errors_within_lists_and_braces_name_their_line_and_what_kubernetes_refuses_is_refused() {
        let list = "apiVersion: v1\nkind: List\nitems:\n  - apiVersion: weir.dev/v1alpha1\n    kind: Topic\n    metadata: {name: a}\n    spec: {partitions: 1}\n  - apiVersion: weir.dev/v1alpha1\n    kind: Subscription\n    metadata: {name: s}\n    spec:\n      topic: a\n      deadLetter:\n        maxDeliveries: 3\n        topic: a\n";
        let (declared, errors) = read(list);
        assert_eq!(declared.topics.len(), 1);
        assert_eq!(errors, ["a.yaml:15: spec.deadLetter.topic: a topic cannot take its own dead letters"]);
        let (_, errors) = read(&list.replace("partitions: 1}", "partitons: 1}"));
        assert!(errors[0].starts_with("a.yaml:7: ") && errors[0].contains("partitons"), "{errors:?}");
        for (field, bad) in [
            ("spec.maxInFlight", "maxInFlight: 0"),
            ("spec.deadLetter.maxDeliveries", "deadLetter: {maxDeliveries: 0}"),
            ("spec.rate.messagesPerSecond", "rate: {messagesPerSecond: 0}"),
            ("spec.rate.burst", "rate: {burst: 0}"),
            ("spec.filter", "filter: \"\""),
        ] {
            let text = format!(
                "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: s}}\nspec:\n  topic: a\n  {bad}\n"
            );
            let (_, errors) = read(&text);
            assert!(errors.len() == 1 && errors[0].starts_with(&format!("a.yaml:6: {field}: ")), "{errors:?}");
        }
        let (_, errors) = read(&GOOD.replace("name: orders", "name: Orders_1"));
        assert!(errors[0].starts_with("a.yaml:4: metadata.name: "), "{errors:?}");
    }
}
