//! Manifests as files: several documents, `kind: List`, and errors that name file, line and field.

use crate::{Subscription, Topic, ValidatedSubscription, ValidatedTopic};
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;
use std::path::{Path, PathBuf};

/// What a folder of manifests declares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// Topics.
    pub topics: Vec<ValidatedTopic>,
    /// Subscriptions.
    pub subscriptions: Vec<ValidatedSubscription>,
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
    for (at, line) in text.lines().chain(["---"]).enumerate() {
        if line.trim_end() != "---" {
            document.push_str(line);
            document.push('\n');
            continue;
        }
        let mut fail =
            |line: usize, message: String| errors.push(ManifestError { file: file.to_owned(), line, message });
        read_document(&document, start, declared, &mut fail);
        document.clear();
        start = at + 1;
    }
}

fn read_document(text: &str, start: usize, declared: &mut Declared, fail: &mut dyn FnMut(usize, String)) {
    let value: Value = match serde_yaml_ng::from_str(text) {
        Ok(Value::Null) => return,
        Ok(value) => value,
        Err(error) => return fail(start + line_of(&error), error.to_string()),
    };
    if value.get("kind").and_then(Value::as_str) == Some("List") {
        for item in value.get("items").and_then(Value::as_sequence).into_iter().flatten() {
            let text = serde_yaml_ng::to_string(item).unwrap_or_default();
            read_object(item, &text, declared, &mut |_, message| fail(start + 1, format!("in the list: {message}")));
        }
        return;
    }
    read_object(&value, text, declared, &mut |line, message| fail(start + line, message));
}

fn read_object(value: &Value, text: &str, declared: &mut Declared, fail: &mut dyn FnMut(usize, String)) {
    let field = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    let (api, kind) = (field("apiVersion"), field("kind"));
    let kind_line = line_with(text, "kind:");
    if api != "weir.dev/v1alpha1" {
        return fail(line_with(text, "apiVersion:"), format!("apiVersion: '{api}' is not weir.dev/v1alpha1"));
    }
    match kind {
        "Topic" => {
            if let Some(topic) = parse::<Topic>(text, fail) {
                match topic.validate() {
                    Ok(topic) => declared.topics.push(topic),
                    Err(e) => fail(line_of_field(text, e.field), e.to_string()),
                }
            }
        }
        "Subscription" => {
            if let Some(subscription) = parse::<Subscription>(text, fail) {
                match subscription.validate() {
                    Ok(subscription) => declared.subscriptions.push(subscription),
                    Err(e) => fail(line_of_field(text, e.field), e.to_string()),
                }
            }
        }
        "StreamCluster" => {} // what runs it is the cluster
        other => fail(kind_line, format!("kind: '{other}' is not Topic, Subscription, StreamCluster or List")),
    }
}

fn parse<T: DeserializeOwned>(text: &str, fail: &mut dyn FnMut(usize, String)) -> Option<T> {
    serde_yaml_ng::from_str(text).map_err(|e| fail(line_of(&e), e.to_string())).ok()
}

fn line_of(error: &serde_yaml_ng::Error) -> usize {
    error.location().map_or(1, |l| l.line())
}

fn line_with(text: &str, start: &str) -> usize {
    text.lines().position(|l| l.trim_start().starts_with(start)).map_or(1, |at| at + 1)
}

fn line_of_field(text: &str, path: &str) -> usize {
    line_with(text, &format!("{}:", path.rsplit('.').next().unwrap_or(path)))
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
        let (_, errors) = read(&GOOD.replace("partitions: 6", "partitions: 0"));
        assert!(errors[0].starts_with("a.yaml:6: spec.partitions: must be 1"), "{errors:?}");
    }
}
