//! Filters of subscriptions: CEL, compiled once, over what a message carries beside its value.

use crate::status::Failure;
use cel::common::ast::{EntryExpr, Expr};
use cel::{Context, Env, IdedExpr, Program, Value};
use std::collections::HashMap;
use std::sync::Arc;
use weir_proto::records::Record;

/// Longest expression, bytes. An expression has no loops: its length bounds what it costs.
pub const FILTER_BYTES_MAX: usize = 2_048;
/// Brackets within brackets.
const DEPTH_MAX: usize = 32;

fn has_loop(e: &IdedExpr) -> bool {
    let entry = |e: &EntryExpr| match e {
        EntryExpr::StructField(field) => has_loop(&field.value),
        EntryExpr::MapEntry(entry) => has_loop(&entry.key) || has_loop(&entry.value),
    };
    match &e.expr {
        Expr::Comprehension(_) => true,
        Expr::Call(call) => call.target.iter().any(|t| has_loop(t)) || call.args.iter().any(has_loop),
        Expr::List(list) => list.elements.iter().any(has_loop),
        Expr::Map(map) => map.entries.iter().any(|e| entry(&e.expr)),
        Expr::Struct(fields) => fields.entries.iter().any(|e| entry(&e.expr)),
        Expr::Select(select) => has_loop(&select.operand),
        Expr::Ident(_) | Expr::Literal(_) | Expr::Unspecified => false,
    }
}

/// A compiled filter.
pub struct Filter {
    program: Program,
    env: Arc<Env>,
}

impl Filter {
    /// Compiles an expression; `None` for an empty one. The failure names the column.
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
        let program = Program::compile(text).map_err(|errors| match errors.errors.first() {
            Some(first) => wrong(first.pos.1, &first.msg),
            None => wrong(1, "is not an expression"),
        })?;
        if has_loop(program.expression()) {
            let message = "filter: all, exists, exists_one, map and filter are not taken: a filter has no loops, so that its cost is bounded";
            return Err(Failure::invalid("FILTER", message));
        }
        const KNOWN: [&str; 4] = ["key", "headers", "timestamp", "size"];
        let asked = program.references();
        if let Some(unknown) = asked.variables().into_iter().find(|v| !KNOWN.contains(v)) {
            let column = text.find(unknown).map_or(1, |at| text[..at].chars().count() + 1);
            let message = format!("there is no `{unknown}`; a filter sees {}", KNOWN.join(", "));
            return Err(wrong(column as isize, &message));
        }
        Ok(Some(Self { program, env: Arc::new(Env::stdlib()) }))
    }

    /// Whether a message is wanted. An expression that cannot be evaluated (it asks for a header that is not there) does not want it.
    pub fn admits(&self, record: &Record) -> bool {
        let mut context = Context::with_env(self.env.clone());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let headers: HashMap<String, Value> =
            record.headers.iter().map(|(name, value)| (name.clone(), text(value).into())).collect();
        context.add_variable_from_value("key", record.key.as_deref().map(text).unwrap_or_default());
        context.add_variable_from_value("headers", headers);
        let at = chrono::DateTime::from_timestamp_millis(record.timestamp_ms).unwrap_or_default();
        context.add_variable_from_value("timestamp", Value::Timestamp(at.fixed_offset()));
        let size = record.value.as_ref().map_or(0, |v| v.len() as i64);
        context.add_variable_from_value("size", size);
        matches!(self.program.execute(&context), Ok(Value::Bool(true)))
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
            headers: vec![("kind".into(), "signup".into()), ("region".into(), "eu-west".into())],
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
            ("headers.missing == 'x'", false),
            ("has(headers.missing) || size == 5", true),
            ("timestamp > timestamp('2023-01-01T00:00:00Z')", true),
            ("timestamp > timestamp('2024-01-01T00:00:00Z')", false),
            ("size", false),
            ("headers.kind in ['login', 'signup']", true),
        ];
        for (text, wanted) in cases {
            let filter = Filter::compile(text).unwrap_or_else(|f| panic!("{text}: {}", f.message)).unwrap();
            assert_eq!(filter.admits(&record()), wanted, "{text}");
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

    proptest! {
        #[test]
        fn no_text_brings_the_compiler_down(text in "[a-z0-9 .()\\[\\]'\"&|!?:<>=+*/%{},\\\\-]{0,80}") {
            if let Ok(Some(filter)) = Filter::compile(&text) {
                filter.admits(&record());
            }
        }
    }
}
