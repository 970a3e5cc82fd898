//! Filters of subscriptions: CEL over what a message carries beside its value. Compiled once, patterns included; what evaluating one may
//! cost is known before, and bounded.

mod cost;

use crate::status::Failure;
use cel::{Context, Env, IdedExpr, Value};
use cost::{Linear, MATCH};
use regex::Regex;
use std::collections::HashMap;
use std::sync::Arc;
use weir_proto::records::Record;

/// Longest expression, bytes. An expression has no loops: its length bounds what it costs.
pub const FILTER_BYTES_MAX: usize = 2_048;
/// Brackets within brackets.
const DEPTH_MAX: usize = 32;
/// Most that evaluating one message may cost, in steps of about a nanosecond (at most 1.3, measured: group `filters` of `make bench`). One
/// that could cost more is not evaluated, and delivered.
pub const WORK_MAX: u64 = 100_000_000;
/// What costs less is evaluated beside other tasks; the rest on a thread of its own.
const WORK_INLINE_MAX: u64 = 20_000;

/// A compiled filter.
pub struct Filter {
    expression: IdedExpr,
    patterns: Arc<[Regex]>,
    work: Linear,
    env: Arc<Env>,
    /// which of them the expression asks for
    key: bool,
    headers: bool,
}

/// What a filter makes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is wanted.
    Wanted,
    /// It is not. An expression that cannot be evaluated (it asks for a header that is not there) wants nothing.
    Unwanted,
    /// To evaluate it could cost too much: it is delivered, since nobody knows that it is not wanted.
    TooCostly,
}

impl Filter {
    /// Compiles an expression; `None` for an empty one. The failure names the column, or what is not taken.
    pub fn compile(text: &str) -> Result<Option<Self>, Failure> {
        if text.trim().is_empty() {
            return Ok(None);
        }
        if text.len() > FILTER_BYTES_MAX {
            return Err(Failure::invalid("FILTER", format!("the filter is longer than {FILTER_BYTES_MAX} bytes")));
        }
        let mut depth: usize = 0;
        for (column, c) in text.chars().enumerate() {
            match c {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > DEPTH_MAX {
                let message = format!("filter, column {}: more than {DEPTH_MAX} brackets within brackets", column + 1);
                return Err(Failure::invalid("FILTER", message));
            }
        }
        let wrong = |column: isize, what: &str| Failure::invalid("FILTER", format!("filter, column {column}: {what}"));
        let env = Env::stdlib().with_optional_support(false);
        let program = env.compile(text).map_err(|errors| match errors.errors.first() {
            Some(first) => wrong(first.pos.1, &first.msg),
            None => wrong(1, "is not an expression"),
        })?;
        let mut expression = program.expression().clone();
        let checked = cost::check(&mut expression)?;
        const KNOWN: [&str; 4] = ["key", "headers", "timestamp", "size"];
        let asked = program.references();
        if let Some(unknown) = asked.variables().into_iter().find(|v| !KNOWN.contains(v)) {
            let column = text.find(unknown).map_or(1, |at| text[..at].chars().count() + 1);
            let message = format!("there is no `{unknown}`; a filter sees {}", KNOWN.join(", "));
            return Err(wrong(column as isize, &message));
        }
        let (key, headers) = (asked.has_variable("key"), asked.has_variable("headers"));
        let patterns = checked.patterns.into();
        Ok(Some(Self { expression, patterns, work: checked.work, env: Arc::new(env), key, headers }))
    }

    /// Bytes of a message's text that the expression sees.
    fn text_bytes(&self, record: &Record) -> usize {
        let key = record.key.as_ref().filter(|_| self.key).map_or(0, |key| key.len());
        let headers = record.headers.iter().filter(|_| self.headers);
        key + headers.map(|(name, value)| name.len() + value.as_ref().map_or(0, |v| v.len()) + 64).sum::<usize>()
    }

    /// Most that evaluating a message may cost, in steps of about a nanosecond.
    pub fn work(&self, record: &Record) -> u64 {
        self.work.of(self.text_bytes(record))
    }

    /// Whether a message is better evaluated where it holds up nobody else.
    pub fn is_costly(&self, record: &Record) -> bool {
        self.work(record) > WORK_INLINE_MAX
    }

    /// An evaluator, for as many messages as there are to be evaluated in one go.
    pub fn evaluator(&self) -> Evaluator<'_> {
        let mut context = Context::with_env(self.env.clone());
        let patterns = self.patterns.clone();
        let is_match = move |text: Arc<String>, at: i64| -> bool {
            usize::try_from(at).ok().and_then(|at| patterns.get(at)).is_some_and(|pattern| pattern.is_match(&text))
        };
        // (the only failure is a name that is taken, and this one cannot be)
        let _ = context.add_function(MATCH, is_match);
        Evaluator { filter: self, context }
    }

    /// As [`Evaluator::verdict`], of one message.
    pub fn verdict(&self, record: &Record) -> Verdict {
        self.evaluator().verdict(record)
    }
}

/// See [`Filter::evaluator`].
pub struct Evaluator<'a> {
    filter: &'a Filter,
    context: Context<'static, 'static>,
}

impl Evaluator<'_> {
    /// Whether a message is wanted.
    pub fn verdict(&mut self, record: &Record) -> Verdict {
        if self.filter.work(record) > WORK_MAX {
            return Verdict::TooCostly;
        }
        let context = &mut self.context;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let of_text = |bytes: &[u8]| Value::from(text(bytes));
        if self.filter.key {
            context.add_variable_from_value("key", record.key.as_deref().map(text).unwrap_or_default());
        }
        if self.filter.headers {
            let value = |value: &Option<bytes::Bytes>| value.as_deref().map_or(Value::Null, of_text);
            let headers: HashMap<String, Value> =
                record.headers.iter().map(|(name, v)| (name.clone(), value(v))).collect();
            context.add_variable_from_value("headers", headers);
        }
        let at = chrono::DateTime::from_timestamp_millis(record.timestamp_ms).unwrap_or_default();
        context.add_variable_from_value("timestamp", Value::Timestamp(at.fixed_offset()));
        let size = record.value.as_ref().map_or(0, |v| v.len() as i64);
        context.add_variable_from_value("size", size);
        match Value::resolve(&self.filter.expression, context) {
            Ok(Value::Bool(true)) => Verdict::Wanted,
            _ => Verdict::Unwanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> Record {
        Record {
            key: Some("alice".into()),
            value: Some("hello".into()),
            headers: vec![
                ("kind".into(), Some("login".into())),
                ("region".into(), Some("eu-west".into())),
                ("kind".into(), Some("signup".into())),
                ("empty".into(), None),
            ],
            timestamp_ms: 1_700_000_000_000,
        }
    }

    #[test]
    fn expressions_see_key_headers_time_and_size() {
        let cases = [
            ("key == 'alice'", true),
            ("key.startsWith('b')", false),
            ("headers.kind == 'signup' && size < 10", true),
            ("headers['region'].matches('^eu-')", true),
            ("'kind' in headers", true),
            ("'empty' in headers && headers.empty == null", true),
            ("headers.empty == ''", false),
            ("headers.missing == 'x'", false),
            ("has(headers.missing) || size == 5", true),
            ("timestamp > timestamp('2023-01-01T00:00:00Z')", true),
            ("timestamp > timestamp('2024-01-01T00:00:00Z')", false),
            ("size", false),
            ("headers.kind in ['login', 'signup']", true),
        ];
        for (text, wanted) in cases {
            let filter = Filter::compile(text).unwrap_or_else(|f| panic!("{text}: {}", f.message)).unwrap();
            let verdict = if wanted { Verdict::Wanted } else { Verdict::Unwanted };
            assert_eq!(filter.verdict(&record()), verdict, "{text}");
        }
        assert!(Filter::compile(" ").unwrap().is_none());
    }

    #[test]
    fn what_is_no_expression_is_refused_with_its_column() {
        let refused = |text: &str| Filter::compile(text).err().unwrap_or_else(|| panic!("{text} was taken")).message;
        assert_eq!(
            refused("key == 'a' && nope == 1"),
            "filter, column 15: there is no `nope`; a filter sees key, headers, timestamp, size"
        );
        let said = refused("key == ");
        assert!(said.starts_with("filter, column "), "{said}");
        for nested in
            ["[0, 0].all(a, [0, 0].all(b, true))", "size > 0 && {'a': [1].map(x, x)} != {}", "headers.exists(h, true)"]
        {
            assert!(refused(nested).contains("no loops"), "{nested}");
        }
        assert!(refused(&"(".repeat(2_000)).contains("brackets"));
        assert!(refused(&format!("key == '{}'", "x".repeat(3_000))).contains("longer"));
    }

    /// Each of these was compiled again for every message, on the threads that all share.
    #[test]
    fn a_pattern_is_a_literal_compiled_once_and_its_size_is_bounded() {
        let refused = |text: &str| Filter::compile(text).err().unwrap_or_else(|| panic!("{text} was taken")).message;
        let large = refused(r"key.matches('(\\w{100}){10}')");
        assert!(large.contains("KiB"), "{large}");
        for text in
            ["key.matches(key)", "key.matches(headers.pattern)", "matches('a', 'a' + key)", "key.matches('a' + 'b')"]
        {
            assert!(refused(text).contains("literal"), "{text}");
        }
        assert!(refused("key.matches('(')").contains("is none"));
        assert!(refused("key.matches('a', 'b')").contains("a text and a pattern"));
        let many = vec!["key.matches('a')"; 17].join(" || ");
        assert!(refused(&many).contains("patterns"));
        for text in
            [r"key.matches('^al\\w+$')", "matches(key, 'lic')", "headers.kind.matches('^sign') && key.matches('e$')"]
        {
            let filter = Filter::compile(text).unwrap_or_else(|f| panic!("{text}: {}", f.message)).unwrap();
            assert_eq!(filter.verdict(&record()), Verdict::Wanted, "{text}");
        }
    }

    #[test]
    fn only_functions_whose_cost_is_known_are_taken() {
        for text in [
            "type(key) == type(key)",
            "[1].sortBy(x, x)",
            "key.replace('a', 'b') == ''",
            "optional.of(key) == key",
            "max(1, size) > 0",
        ] {
            assert!(Filter::compile(text).is_err(), "{text} was taken");
        }
        let deep = "-".repeat(1_500) + "1 == 1";
        let _ = Filter::compile(&deep); // (which of them is taken does not matter: none may end the process)
        let chain = vec!["size"; 400].join("+") + " > 0";
        assert!(Filter::compile(&chain).err().unwrap().message.contains("within operations"));
    }

    /// The bound that is known before holds for what evaluation really takes, for the most expensive filters that are taken.
    #[test]
    fn texts_that_grow_cost_what_is_estimated_and_no_more_is_evaluated() {
        let twice = |text: &str, times: usize| (0..times).fold(text.to_owned(), |text, _| format!("({text} + {text})"));
        let grows = format!("{} == ''", twice("key", 7));
        let filter = Filter::compile(&grows).unwrap().unwrap();
        let with_key = |bytes: usize| Record { key: Some(vec![b'a'; bytes].into()), ..Default::default() };
        assert_eq!(filter.verdict(&with_key(1_000)), Verdict::Unwanted);
        assert!(
            filter.is_costly(&with_key(1_000))
                && !Filter::compile("key == 'a'").unwrap().unwrap().is_costly(&with_key(1_000))
        );
        assert_eq!(filter.verdict(&with_key(1 << 20)), Verdict::TooCostly, "it would copy more than 800 MiB");
        let scans = Filter::compile(r"key.matches('^(a|aa|[ab]c?)*b$')").unwrap().unwrap();
        assert_eq!(scans.verdict(&with_key(64 << 10)), Verdict::Unwanted);
        assert!(scans.is_costly(&with_key(64 << 10)));
    }

    proptest! {
        #[test]
        fn no_text_brings_the_compiler_down(text in "[a-z0-9 .()\\[\\]'\"&|!?:<>=+*/%{},\\\\-]{0,80}") {
            if let Ok(Some(filter)) = Filter::compile(&text) {
                filter.verdict(&record());
            }
        }
    }
}
