//! What the reader of YAML says of a value, in the words of manifests: the field, what is right with its bounds, and what is there.

use serde_yaml_ng::Value;
use weir_proto::limits::{self, Limit, Unit};

/// Characters of a value that an error repeats.
const SHOWN_MAX: usize = 60;
/// Characters of an error.
const ERROR_MAX: usize = 500;

/// A value that cannot be what it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    /// Path of the field whose line shows it; empty for the whole.
    pub(crate) at: String,
    /// The field, what is right, and what is there.
    pub(crate) message: String,
}

/// A value, for an error.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => format!("the number {value}"),
        Value::String(text) => quoted(text),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Tagged(tagged) => shown(&tagged.value),
    }
}

fn quoted(text: &str) -> String {
    in_quotes(&text.chars().take(SHOWN_MAX + 1).flat_map(char::escape_debug).collect::<String>())
}

/// As [`quoted`], of what is escaped already.
fn in_quotes(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((at, _)) => format!("'{}…'", &text[..at]),
        None => format!("'{text}'"),
    }
}

fn cut(message: &str) -> String {
    match message.char_indices().nth(ERROR_MAX) {
        Some((at, _)) => format!("{}…", &message[..at]),
        None => message.to_owned(),
    }
}

/// An error of a document that is no YAML: without its place, which is named beside it; of others the lines are counted in the file,
/// where `start` are before the document.
pub(crate) fn of_syntax(error: &str, start: usize) -> String {
    let mut parts = error.split(" at line ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for (at, part) in parts.enumerate() {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        let line: usize = part[..end].parse().unwrap_or(1);
        let behind = match at {
            0 => part[end..].trim_start_matches(" column ").trim_start_matches(|c: char| c.is_ascii_digit()),
            _ => &format!(" at line {}{}", start + line, &part[end..]),
        };
        out.push_str(behind);
    }
    if type_of(out.split_once(": ").map_or("", |(_, wrong)| wrong)).is_some() {
        of_value(&out).message
    } else {
        cut(&out)
    }
}

/// The error of a value that is no resource of its kind.
pub(crate) fn of_value(error: &str) -> Wrong {
    // of a text that nobody has seen
    let error = error.rfind(" at line ").map_or(error, |at| &error[..at]);
    let (path, wrong) = match error.split_once(": ") {
        Some((path, wrong)) if !path.contains([' ', '`']) => (path, wrong),
        _ => ("", error),
    };
    let below = |field: &str| if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
    let name = |text: &str| text.split('`').next().unwrap_or_default().to_owned();
    let Wrong { at, message } = if let Some(field) = wrong.strip_prefix("missing field `").map(name) {
        let field = below(&field);
        let right = limit_of(&field).map_or(String::new(), |limit| format!("; it is {}", number_or_text(limit)));
        Wrong { at: path.to_owned(), message: format!("{field}: is missing{right}") }
    } else if let Some(field) = wrong.strip_prefix("unknown field `").map(name) {
        let shown: String = field.chars().take(SHOWN_MAX).collect();
        let message = format!("{}: is no field; use {}", below(&shown), alternatives(wrong, &field));
        Wrong { at: below(&field), message }
    } else if let Some(variant) = wrong.strip_prefix("unknown variant `").map(name) {
        let message = format!("{path}: must be {}, not {}", alternatives(wrong, &variant), quoted(&variant));
        Wrong { at: path.to_owned(), message }
    } else if let Some((found, expected)) = type_of(wrong) {
        Wrong { at: path.to_owned(), message: of_type(path, found, expected) }
    } else {
        Wrong { at: path.to_owned(), message: error.to_owned() }
    };
    Wrong { at, message: cut(&message) }
}

/// What there is and what is expected.
fn type_of(wrong: &str) -> Option<(&str, &str)> {
    let wrong = wrong.strip_prefix("invalid type: ").or_else(|| wrong.strip_prefix("invalid value: "))?;
    // what there is may hold anything
    wrong.rsplit_once(", expected ")
}

fn of_type(path: &str, found: &str, expected: &str) -> String {
    let number = found.strip_prefix("integer `").or_else(|| found.strip_prefix("floating point `"));
    let number = number.and_then(|rest| rest.split('`').next());
    let is_text = expected.contains("string");
    let is = match (number, found) {
        (Some(number), _) if is_text || !is_number(expected) => format!("the number {number}"),
        (Some(number), _) => number.to_owned(),
        (None, "sequence") => "a list".to_owned(),
        (None, "map") => "a mapping".to_owned(),
        (None, "unit value" | "Option value" | "null") => "nothing".to_owned(),
        (None, found) => match found.strip_prefix("string \"") {
            Some(text) => in_quotes(text.strip_suffix('"').unwrap_or(text)),
            None => found.replace("boolean ", "").replace('`', ""),
        },
    };
    let limit = limit_of(path);
    let right = match expected {
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a string" => match limit {
            Some(limit) => number_or_text(limit),
            None => "text".to_owned(),
        },
        _ if is_number(expected) => limit.map_or("a whole number".to_owned(), number_or_text),
        _ if expected.starts_with("struct ") || matches!(expected, "a map" | "a mapping" | "ObjectMeta") => {
            "a mapping of fields".to_owned()
        }
        other => other.to_owned(),
    };
    let remedy = if is_text && limit.is_none() && (number.is_some() || found.starts_with("boolean")) {
        ": put it in quotes"
    } else {
        ""
    };
    let field = if path.is_empty() { String::new() } else { format!("{path}: ") };
    format!("{field}must be {right}, not {is}{remedy}")
}

fn is_number(expected: &str) -> bool {
    // (a number of more than 64 bits is no value at all)
    matches!(expected, "u8" | "u16" | "u32" | "u64" | "usize" | "i32" | "i64" | "f64" | "any YAML value")
}

fn limit_of(path: &str) -> Option<&'static Limit> {
    limits::ALL.iter().find(|limit| limit.path == path)
}

/// What a field with bounds takes.
fn number_or_text(limit: &Limit) -> String {
    let bounds = limit.bounds();
    match limit.unit {
        Unit::Bytes => format!("a size from {bounds} such as '1Mi', as text"),
        Unit::Millis => format!("a duration from {bounds} such as '30s', as text"),
        Unit::Count if *limit == limits::START => "a time in UTC such as '2026-01-31T08:00:00Z', as text".to_owned(),
        Unit::Count if *limit == limits::FILTER || *limit == limits::ENDPOINT => format!("text of {bounds} characters"),
        Unit::Count => format!("a whole number from {bounds}"),
    }
}

/// The names between backticks behind the wrong one, as a list of people.
fn alternatives(wrong: &str, name: &str) -> String {
    let behind = wrong.split_once(name).map_or("", |(_, behind)| behind);
    let names: Vec<&str> = behind.split('`').skip(1).collect();
    let names: Vec<&str> = names.iter().copied().skip(1).step_by(2).collect();
    match names.as_slice() {
        [] => "none: it has no fields".to_owned(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}
