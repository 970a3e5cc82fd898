//! Manifests as files: several documents, `kind: List`, and errors that name file, line and field.

use crate::wording::{self, Wrong};
use crate::{Subscription, Topic, ValidatedSubscription, ValidatedTopic};
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a folder of manifests declares.
#[derive(Clone, Debug, Default, PartialEq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file.
    pub file: PathBuf,
    /// Counted from 1; 0 where it is the file as a whole.
    pub line: usize,
    /// Field and cause.
    pub message: String,
}

impl std::fmt::Display for ManifestError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { file, line, message } = self;
        match line {
            0 => write!(f, "{}: {message}", file.display()),
            line => write!(f, "{}:{line}: {message}", file.display()),
        }
    }
}

impl std::error::Error for ManifestError {}

/// Bytes of one file of manifests.
pub const FILE_BYTES_MAX: u64 = 16 << 20;

/// Reads all `.yaml`, `.yml` and `.json` files of a folder, in the order of their names. One that cannot be read is an error of
/// its own, and the others are read. Fails where the folder itself cannot be read.
pub fn read_folder(folder: &Path, declared: &mut Declared, errors: &mut Vec<ManifestError>) -> std::io::Result<()> {
    let entries: Vec<PathBuf> = std::fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
    let named = |f: &PathBuf| f.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
    let mut files: Vec<PathBuf> = entries.into_iter().filter(named).collect();
    files.sort();
    for file in files {
        // a pipe or a device may never end, and a folder is none of ours
        match std::fs::metadata(&file) {
            Ok(found) if found.is_file() => read_file(&file, declared, errors),
            Ok(_) => errors.push(unread(&file, "is not a file; manifests are files in the folder itself")),
            Err(error) => errors.push(unread(&file, &reason(&file, &error))),
        }
    }
    Ok(())
}

/// Reads one file.
pub fn read_file(file: &Path, declared: &mut Declared, errors: &mut Vec<ManifestError>) {
    match std::fs::File::open(file) {
        Ok(open) => read_from(file, open, declared, errors),
        Err(error) => errors.push(unread(file, &reason(file, &error))),
    }
}

/// Reads what comes from elsewhere, standard input say, under a name.
pub fn read_from(file: &Path, from: impl Read, declared: &mut Declared, errors: &mut Vec<ManifestError>) {
    let mut bytes = Vec::new();
    if let Err(error) = from.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes) {
        return errors.push(unread(file, &reason(file, &error)));
    }
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return errors.push(unread(file, "is larger than 16 MiB, more than a file of manifests may be"));
    }
    match String::from_utf8(bytes) {
        Ok(text) => read_text(file, &text, declared, errors),
        Err(wrong) => {
            let at = wrong.utf8_error().valid_up_to();
            let byte = wrong.as_bytes()[at];
            let line = wrong.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
            let message = format!("is not UTF-8: it has the byte 0x{byte:02x}; save the file as UTF-8");
            errors.push(ManifestError { file: file.to_owned(), line, message });
        }
    }
}

fn unread(file: &Path, message: &str) -> ManifestError {
    ManifestError { file: file.to_owned(), line: 0, message: message.to_owned() }
}

fn reason(file: &Path, error: &std::io::Error) -> String {
    match std::fs::read_link(file) {
        Ok(target) => format!("cannot be read: it is a link to {}: {error}", target.display()),
        Err(_) => format!("cannot be read: {error}"),
    }
}

/// Where a line ends a document: the mark, and what the line holds behind it, which begins the next one.
fn separator(line: &str) -> Option<&str> {
    let behind = line.strip_prefix("---").or_else(|| line.strip_prefix("..."))?;
    (behind.is_empty() || behind.starts_with([' ', '\t'])).then_some(behind)
}

/// Reads one file's text.
pub fn read_text(file: &Path, text: &str, declared: &mut Declared, errors: &mut Vec<ManifestError>) {
    let mut start = 0;
    let mut document = String::new();
    // YAML knows more line breaks than editors count
    let last = text.lines().count().max(1);
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (at, line) in text.lines().chain(["---"]).enumerate() {
        let Some(behind) = separator(line) else {
            // a directive stands before a document, and says nothing that is needed here
            let directive = line.starts_with('%') && document.trim().is_empty();
            document.push_str(if directive { "" } else { line });
            document.push('\n');
            continue;
        };
        let mut fail = |line: usize, message: String| {
            errors.push(ManifestError { file: file.to_owned(), line: line.min(last), message });
        };
        read_document(file, &document, start, declared, &mut fail);
        document.clear();
        document.push_str(behind.trim_start()); // a tab cannot begin a line
        document.push('\n');
        start = at;
    }
}

fn read_document(file: &Path, text: &str, start: usize, declared: &mut Declared, fail: &mut dyn FnMut(usize, String)) {
    let value: Value = match serde_yaml_ng::from_str(text) {
        Ok(Value::Null) => return,
        Ok(value) => value,
        Err(error) => return fail(start + line_of(&error), wording::of_syntax(&error.to_string(), start)),
    };
    if value.get("kind").and_then(Value::as_str) == Some("List") {
        let begins = items(text);
        let Some(list) = value.get("items").and_then(Value::as_sequence) else {
            let line = line_from(text, 0, "items").map_or_else(|| line_with(text, "kind"), |at| at + 1);
            return fail(start + line, "items: a List has a list of resources here, `items: []` at least".to_owned());
        };
        for (at, item) in list.iter().enumerate() {
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
    let kind_line = line_with(text, "kind");
    let kind = match kind_of(value) {
        Ok(kind) => kind,
        Err((field, message)) => return fail(line_with(text, field), message),
    };
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
        _ => {} // a StreamCluster: what runs it is the cluster
    }
}

/// What every resource begins with.
const API_VERSION: &str = "weir.dev/v1alpha1";
/// Kinds of resources.
const KINDS: [&str; 3] = ["Topic", "Subscription", "StreamCluster"];

/// The kind of a resource, or the field that is wrong and what would be right.
fn kind_of(value: &Value) -> Result<&str, (&'static str, String)> {
    if !value.is_mapping() {
        let text = "is no resource: one has the fields apiVersion, kind, metadata and spec".to_owned();
        return Err(("", format!("{} {text}", wording::shown(value))));
    }
    let field = |name: &str| value.get(name).filter(|value| !value.is_null());
    let kinds = "Topic, Subscription, StreamCluster or List";
    let (api, kind) = (field("apiVersion"), field("kind"));
    match api {
        None => {
            let kind = if kind.is_none() { format!(", and kind too, which is {kinds}") } else { String::new() };
            return Err(("apiVersion", format!("apiVersion is missing: write `apiVersion: {API_VERSION}`{kind}")));
        }
        Some(api) if api.as_str() != Some(API_VERSION) => {
            let text = format!("apiVersion: must be {API_VERSION}, not {}", wording::shown(api));
            return Err(("apiVersion", text));
        }
        Some(_) => {}
    }
    let kind = kind.ok_or_else(|| ("kind", format!("kind is missing: write {kinds}")))?;
    let known = kind.as_str().filter(|kind| KINDS.contains(kind));
    known.ok_or_else(|| ("kind", format!("kind: must be {kinds}, not {}", wording::shown(kind))))
}

fn parse<T: DeserializeOwned>(value: &Value, text: &str, fail: &mut dyn FnMut(usize, String)) -> Option<T> {
    let wrong = match serde_yaml_ng::from_value(value.clone()) {
        Ok(read) => return Some(read),
        Err(wrong) => wrong,
    };
    // read from text the error names the field it is about; the text of a list's item, or of JSON, is not a document by itself
    let written = serde_yaml_ng::to_string(value).ok();
    let named = written.and_then(|text| serde_yaml_ng::from_str::<T>(&text).err());
    let Wrong { at, message } = match named {
        Some(named) => wording::of_value(&named.to_string()),
        None => {
            let path = not_text::<T>(value, &wrong.to_string()).map_or(String::new(), |path| path + ": ");
            wording::of_value(&format!("{path}{wrong}"))
        }
    };
    fail(line_of_field(text, &at), message);
    None
}

/// Values of a manifest that are tried.
const TRIED_MAX: usize = 200;

/// The field that should be text and is a number, say: with text in its place the error is another one. (Read from text, a number
/// is taken for text, and nothing is wrong.)
fn not_text<T: DeserializeOwned>(value: &Value, wrong: &str) -> Option<String> {
    let mut paths = Vec::new();
    collect(value, "", &mut paths);
    let mended = |path: &String| {
        let mut copy = value.clone();
        if let Some(place) = path.split('.').try_fold(&mut copy, |at, key| at.get_mut(key)) {
            *place = Value::String(String::new());
        }
        // another field's error, and not that this one must not be text
        let other = serde_yaml_ng::from_value::<T>(copy).err().map(|e| e.to_string());
        other.is_none_or(|other| other != wrong && !other.contains("string \"\""))
    };
    paths.into_iter().take(TRIED_MAX).find(mended)
}

/// The paths of all values below mappings that are neither text nor nested.
fn collect(value: &Value, path: &str, out: &mut Vec<String>) {
    for (key, inner) in value.as_mapping().into_iter().flatten() {
        let Some(key) = key.as_str() else { continue };
        let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        match inner {
            Value::Mapping(_) => collect(inner, &path, out),
            Value::Number(_) | Value::Bool(_) => out.push(path),
            _ => {}
        }
    }
}

fn line_of(error: &serde_yaml_ng::Error) -> usize {
    error.location().map_or(1, |l| l.line())
}

fn line_with(text: &str, field: &str) -> usize {
    line_from(text, 0, field).unwrap_or_else(|| first_line(text)) + 1
}

/// The first line that holds something, counted from 0.
fn first_line(text: &str) -> usize {
    let holds = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    text.lines().position(holds).unwrap_or(0)
}

/// The line, from `first` on, that has a field, whether in block style or within braces, in quotes or not.
fn line_from(text: &str, first: usize, field: &str) -> Option<usize> {
    if field.is_empty() {
        return None;
    }
    let begins = |before: &str| before.is_empty() || before.ends_with([' ', '\t', '{', ',', '-', '"', '\'']);
    let ends = |behind: &str| behind.trim_start_matches(['"', '\'']).trim_start().starts_with(':');
    let has = |l: &str| l.match_indices(field).any(|(at, _)| begins(&l[..at]) && ends(&l[at + field.len()..]));
    text.lines().enumerate().skip(first).find(|(_, l)| has(l)).map(|(at, _)| at)
}

/// The line of `spec.deadLetter.topic`: each part is looked for behind the one before it.
fn line_of_field(text: &str, path: &str) -> usize {
    let mut at = first_line(text);
    for part in path.split('.').map(|part| part.split('[').next().unwrap_or(part)).filter(|part| !part.is_empty()) {
        at = line_from(text, at, part).unwrap_or(at);
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
        assert_eq!(declared.topics[0].spec.retention_ms, Some(7 * 86_400_000));
        assert_eq!(declared.topics[0].spec.replicas, 3);
        assert_eq!(declared.subscriptions[0].spec.topic, "shop/orders");
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
        assert_eq!(errors, ["a.yaml:2: kind: must be Topic, Subscription, StreamCluster or List, not 'Queue'"]);
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

    #[test]
    fn a_folder_is_read_past_what_cannot_be_read_and_each_of_that_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("good.yaml"), GOOD).expect("written");
        std::fs::write(at("notes.txt"), "none of ours").expect("written");
        std::fs::write(at("latin.yaml"), b"# caf\xc3\xa9\n# caf\xe9\nkind: Topic\n").expect("written");
        std::fs::create_dir(at("x.yaml")).expect("made");
        std::os::unix::fs::symlink("/nowhere/at/all.yaml", at("dangling.yml")).expect("made");
        std::os::unix::fs::symlink("/dev/zero", at("endless.json")).expect("made");
        let (mut declared, mut errors): (Declared, Vec<ManifestError>) = Default::default();
        read_folder(folder.path(), &mut declared, &mut errors).expect("the folder can be read");
        assert_eq!(declared.topics.len(), 1);
        let errors: Vec<String> =
            errors.iter().map(|e| e.to_string().replace(&format!("{}/", folder.path().display()), "")).collect();
        assert_eq!(errors.len(), 4, "{errors:?}");
        assert!(
            errors[0].starts_with("dangling.yml: cannot be read: it is a link to /nowhere/at/all.yaml: "),
            "{errors:?}"
        );
        assert!(errors[1].starts_with("endless.json: is not a file"), "{errors:?}");
        assert!(errors[2].starts_with("latin.yaml:2: is not UTF-8: it has the byte 0xe9"), "{errors:?}");
        assert!(errors[3].starts_with("x.yaml: is not a file"), "{errors:?}");
        assert!(read_folder(&at("nowhere"), &mut Declared::default(), &mut Vec::new()).is_err());
    }

    #[test]
    fn marks_with_comments_byte_order_marks_and_directives_are_taken() {
        let other = GOOD.replace("orders", "other");
        for text in [
            format!("\u{feff}{GOOD}"),
            format!("\u{feff}---\n{GOOD}"),
            format!("%YAML 1.2\n--- # the first\n{GOOD}...\n"),
            format!("# a comment\n{GOOD}--- # the second\r\n{other}"),
            format!("{GOOD}---\t\n{other}"),
            format!("{GOOD}...\n---   \n{other}"),
            GOOD.replace('\n', "\r\n"),
        ] {
            let (declared, errors) = read(&text);
            assert_eq!(errors, Vec::<String>::new(), "{text}");
            assert_eq!(declared.topics.len(), 1 + usize::from(text.contains("other")), "{text}");
        }
        // behind a comment lines are counted as before
        let (_, errors) = read(&format!("--- # one\n{}", GOOD.replace("6", "0")));
        assert!(errors[0].starts_with("a.yaml:7: spec.partitions: "), "{errors:?}");
        let (declared, _) = read(&format!("--- # one\n{GOOD}"));
        assert_eq!(declared.origins["topic default/orders"].1, 3);
        // four dashes are no mark
        assert_eq!(read("----\n").1.len(), 1);
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_line_and_field_in_every_style() {
        let wrong = |text: &str, at: &str| {
            let (_, errors) = read(text);
            assert!(errors.len() == 1 && errors[0].starts_with(at), "{errors:?} does not begin with {at}");
        };
        let partitions = "spec.partitions: must be a whole number from 1 to 10000, not";
        wrong(&GOOD.replace("6", "many"), &format!("a.yaml:6: {partitions} 'many'"));
        wrong(&GOOD.replace("6", r#""a\tb\"c""#), &format!(r#"a.yaml:6: {partitions} 'a\tb\"c'"#));
        wrong(&GOOD.replace("6", "-1"), &format!("a.yaml:6: {partitions} -1"));
        wrong(&GOOD.replace("6", "1.5"), &format!("a.yaml:6: {partitions} 1.5"));
        wrong(&GOOD.replace("6", "true"), &format!("a.yaml:6: {partitions} true"));
        wrong(&GOOD.replace("6", "{a: b}"), &format!("a.yaml:6: {partitions} a mapping"));
        wrong(&GOOD.replace("6", "99999999999999999999"), &format!("a.yaml:6: {partitions} 99999999999999999999"));
        let time =
            "a.yaml:8: spec.retention.time: must be a duration from 1s to 36500d such as '30s', as text, not a list";
        wrong(&GOOD.replace("7d", "[7d]"), time);
        wrong(
            &GOOD.replace("name: orders", "name: 5"),
            "a.yaml:4: metadata.name: must be text, not the number 5: put it in quotes",
        );
        wrong(
            &GOOD.replace("\n  name: orders", " orders"),
            "a.yaml:3: metadata: must be a mapping of fields, not 'orders'",
        );
        let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: weir.dev/v1alpha1\n  kind: Topic\n  metadata: {name: a}\n  spec:\n    partitions: many\n";
        wrong(list, &format!("a.yaml:8: {partitions} 'many'"));
        let json = "{\n  \"apiVersion\": \"weir.dev/v1alpha1\",\n  \"kind\": \"Topic\",\n  \"metadata\": {\"name\": \"a\"},\n  \"spec\": {\n    \"partitions\" : 0\n  }\n}\n";
        wrong(json, "a.yaml:6: spec.partitions: must be 1 to 10000, not 0");
        wrong(&json.replace(": 0", ": \"many\""), &format!("a.yaml:6: {partitions} 'many'"));
        wrong(
            &json.replace("partitions", "partitons"),
            "a.yaml:6: spec.partitons: is no field; use partitions, replicas, retention, ",
        );
        wrong("apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: a}\n", "a.yaml:1: spec: is missing");
    }

    #[test]
    fn numbers_out_of_bounds_are_refused_with_the_bounds() {
        let refused = |from: &str, to: &str, at: &str| {
            let (declared, errors) = read(&GOOD.replace(from, to));
            assert!(declared.topics.is_empty() && errors.len() == 1 && errors[0].starts_with(at), "{errors:?}: {at}");
        };
        let time = "a.yaml:8: spec.retention.time: must be 1s to 36500d, not ";
        for long in ["9223372036854775807s", "18446744073709552s", "0s", "36501d", "5215w"] {
            refused("7d", long, &format!("{time}{long}"));
        }
        refused("7d", "1month", "a.yaml:8: spec.retention.time: '1month' is not a duration such as 30s, 1h30m or 7d");
        let size =
            "a.yaml:9: spec.retention.bytes: must be a size from 1 to 1024Ti such as '1Mi', as text, not the number 0";
        refused("10Gi", "0", size);
        refused("10Gi", "'0'", "a.yaml:9: spec.retention.bytes: must be 1 to 1024Ti, not 0");
        refused("10Gi", "99999999999Ti", "a.yaml:9: spec.retention.bytes: must be 1 to 1024Ti, not 99999999999Ti");
        let subscription = |spec: &str| {
            let text = format!(
                "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: s}}\nspec:\n  topic: a\n  {spec}\n"
            );
            read(&text).1.join("\n")
        };
        for (spec, wrong) in [
            ("ackDeadline: 0s", "spec.ackDeadline: must be 1ms to 1d, not 0s"),
            ("ackDeadline: 2d", "spec.ackDeadline: must be 1ms to 1d, not 2d"),
            ("redelivery: {maxBackoff: 0s}", "spec.redelivery.maxBackoff: must be 1ms to 1d, not 0s"),
            (
                "redelivery: {minBackoff: 5m, maxBackoff: 1m}",
                "spec.redelivery.minBackoff: is 5m, more than the longest wait of 1m",
            ),
            ("redelivery: {minBackoff: 1y}", "spec.redelivery.minBackoff: '1y' is not a duration"),
            ("push: {endpoint: 'http://a', timeout: 1h}", "spec.push.timeout: must be 1ms to 10m, not 1h"),
            ("push: {endpoint: 'http://a', concurrency: 101}", "spec.push.concurrency: must be 1 to 100, not 101"),
            (
                "rate: {bytesPerSecond: 0}",
                "spec.rate.bytesPerSecond: must be a size from 1 to 1Ti such as '1Mi', as text, not the number 0",
            ),
            ("rate: {burst: many}", "spec.rate.burst: must be a whole number from 1 to 1000000000, not 'many'"),
            ("maxInFlight: -1", "spec.maxInFlight: must be a whole number from 1 to 1000000, not -1"),
            ("mode: queue", "spec.mode: must be exclusive, failover, shared or keyShared, not 'queue'"),
            ("mode: 5", "spec.mode: must be exclusive, failover, shared or keyShared, not "),
            ("priorities: yes please", "spec.priorities: must be true or false, not 'yes please'"),
            ("routingKeys: '#'", "spec.routingKeys: must be a list, not '#'"),
            ("routingKeys: [{a: b}]", "spec.routingKeys[0]: must be text, not a mapping"),
            (
                "startTime: 5",
                "spec.startTime: must be a time in UTC such as '2026-01-31T08:00:00Z', as text, not the number 5",
            ),
            ("filter: 5", "spec.filter: must be text of 1 to 2048 characters, not the number 5"),
            (
                "deadLetter: {topic: b}",
                "spec.deadLetter.maxDeliveries: is missing; it is a whole number from 1 to 1000",
            ),
            ("deadLetter: 5", "spec.deadLetter: must be a mapping of fields, not the number 5"),
            ("rate: {}\n  topics: b", "spec.topics: is no field; use topic, mode, start, "),
            ("rate: {bytesPerSecond: '0'}", "spec.rate.bytesPerSecond: must be 1 to 1Ti, not 0"),
            (
                "startTime: 1969-12-31T23:59:59Z",
                "spec.startTime: '1969-12-31T23:59:59Z' is not a time in UTC from 1970",
            ),
            ("startTime: yesterday", "spec.startTime: 'yesterday' is not a time in UTC from 1970"),
        ] {
            assert_eq!(
                subscription(spec).split_once(": ").map_or("", |(_, text)| text).find(wrong),
                Some(0),
                "{spec}: {}",
                subscription(spec)
            );
        }
        assert_eq!(subscription("redelivery: {minBackoff: 0s}"), "");
        assert_eq!(subscription("startTime: 1970-01-01T00:00:00Z"), "");
        let epoch = "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {name: s}\nspec: {topic: a, startTime: 1970-01-01T00:00:00Z}\n";
        assert_eq!(read(epoch).0.subscriptions[0].spec.start_ms, Some(0), "a time like others");
    }

    #[test]
    fn what_is_no_resource_is_named_with_its_line_and_what_would_be_right() {
        let wrong = |text: &str, error: &str| assert_eq!(read(text).1, [error], "{text}");
        let without = |field: &str| GOOD.lines().filter(|l| !l.starts_with(field)).flat_map(|l| [l, "\n"]).collect();
        let no_api: String = without("apiVersion");
        let no_kind: String = without("kind");
        let kinds = "Topic, Subscription, StreamCluster or List";
        wrong(&no_api, "a.yaml:1: apiVersion is missing: write `apiVersion: weir.dev/v1alpha1`");
        wrong(&no_kind, &format!("a.yaml:1: kind is missing: write {kinds}"));
        wrong(
            &format!("{GOOD}---\n\n# mail\n{}", no_kind.replace("orders", "b")),
            &format!("a.yaml:13: kind is missing: write {kinds}"),
        );
        wrong(
            "metadata: {name: a}\n",
            &format!(
                "a.yaml:1: apiVersion is missing: write `apiVersion: weir.dev/v1alpha1`, and kind too, which is {kinds}"
            ),
        );
        wrong(&GOOD.replace("v1alpha1", "v1"), "a.yaml:1: apiVersion: must be weir.dev/v1alpha1, not 'weir.dev/v1'");
        wrong(
            &GOOD.replace("weir.dev/v1alpha1", "1"),
            "a.yaml:1: apiVersion: must be weir.dev/v1alpha1, not the number 1",
        );
        wrong(&GOOD.replace("Topic", "topic"), &format!("a.yaml:2: kind: must be {kinds}, not 'topic'"));
        wrong(&GOOD.replace("Topic", "[Topic]"), &format!("a.yaml:2: kind: must be {kinds}, not a list"));
        for (text, what) in [("hello\n", "'hello'"), ("- a\n- b\n", "a list"), ("5\n", "the number 5")] {
            let right = "is no resource: one has the fields apiVersion, kind, metadata and spec";
            wrong(text, &format!("a.yaml:1: {what} {right}"));
        }
        let list = "apiVersion: v1\nkind: List\n";
        let right = "items: a List has a list of resources here, `items: []` at least";
        wrong(list, &format!("a.yaml:2: {right}"));
        wrong(&format!("{list}items: {{}}\n"), &format!("a.yaml:3: {right}"));
        assert_eq!(read(&format!("{list}items: []\n")).1, Vec::<String>::new());
        wrong(
            &format!("{list}items:\n- kind: Topic\n  metadata: {{name: a}}\n"),
            "a.yaml:4: apiVersion is missing: write `apiVersion: weir.dev/v1alpha1`",
        );
    }

    #[test]
    fn errors_of_syntax_name_the_lines_of_the_file_and_none_is_longer_than_a_page() {
        let (_, errors) = read(&format!("{GOOD}---\nkind: [\n"));
        assert_eq!(errors, ["a.yaml:11: did not find expected node content, while parsing a flow node"]);
        let (_, errors) = read(&format!("{GOOD}---\na: [1\n\nb: 2\n"));
        let said = "did not find expected ',' or ']', while parsing a flow sequence at line 11 column 4";
        assert_eq!(errors, [format!("a.yaml:13: {said}")]);
        let long = "x".repeat(100_000);
        for text in [
            GOOD.replace("6", &long),
            GOOD.replace("Topic", &long),
            GOOD.replace("v1alpha1", &long),
            GOOD.replace("partitions", &long),
            GOOD.replace("7d", &long),
            GOOD.replace("orders", &long),
            long.clone(),
        ] {
            let (_, errors) = read(&text);
            assert!(errors.len() == 1 && errors[0].chars().count() < 600, "{} characters", errors[0].len());
        }
    }

    #[test]
    fn every_manifest_in_the_documents_is_right() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let mut found = 0;
        for page in
            ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/cli.md", "docs/guarantees.md", "docs/runbook.md"]
        {
            let text = std::fs::read_to_string(root.join(page)).expect("a page");
            // every second part is within a fence
            for block in text.split("\n```").skip(1).step_by(2) {
                let block = block.split_once('\n').map_or("", |(_, block)| block);
                if block.lines().any(|line| line.starts_with("kind: ")) {
                    found += 1;
                    assert_eq!(read(block).1, Vec::<String>::new(), "{page}: {block}");
                }
            }
        }
        assert!(found > 0, "no page shows a manifest");
    }
}
