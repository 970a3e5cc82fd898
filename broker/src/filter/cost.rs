//! What an expression may cost at most, by the bytes of text that a message gives it. The unit is about a nanosecond of work: a byte that is
//! looked at or copied, or a node that is evaluated. Found once, when a filter is compiled; functions that are not known
//! here are refused.

use crate::status::Failure;
use cel::IdedExpr;
use cel::common::ast::{EntryExpr, Expr, LiteralValue};
use regex::{Regex, RegexBuilder};

/// Nodes within nodes.
const DEPTH_MAX: usize = 128;
/// Patterns in one filter.
const PATTERNS_MAX: usize = 16;
/// Bytes of one compiled pattern.
const PATTERN_BYTES_MAX: usize = 64 << 10;
/// Bytes of a compiled pattern for each step that a byte of text may cost.
const PATTERN_BYTES_A_STEP: u64 = 16;
/// Memory that matching may use beside a compiled pattern, bytes.
const MATCHING_BYTES_MAX: usize = 256 << 10;
/// The longest number as a text, a time or a duration.
const SCALAR_BYTES: u64 = 400;

/// A cost or a size: so much, and so much for each byte of text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Linear {
    fixed: u64,
    per_byte: u64,
}

impl Linear {
    const fn fixed(fixed: u64) -> Self {
        Self { fixed, per_byte: 0 }
    }

    fn and(self, other: Self) -> Self {
        let fixed = self.fixed.saturating_add(other.fixed);
        Self { fixed, per_byte: self.per_byte.saturating_add(other.per_byte) }
    }

    fn or(self, other: Self) -> Self {
        Self { fixed: self.fixed.max(other.fixed), per_byte: self.per_byte.max(other.per_byte) }
    }

    fn times(self, by: u64) -> Self {
        Self { fixed: self.fixed.saturating_mul(by), per_byte: self.per_byte.saturating_mul(by) }
    }

    /// For a text of this many bytes.
    pub(super) fn of(self, bytes: usize) -> u64 {
        self.fixed.saturating_add(self.per_byte.saturating_mul(bytes as u64))
    }
}

/// What is known of a value before there is a message.
#[derive(Clone, Copy, Default)]
struct Estimate {
    /// bytes of the value
    size: Linear,
    /// cost of evaluating it
    work: Linear,
}

/// An expression that was looked through, with its patterns compiled.
#[derive(Default)]
pub(super) struct Checked {
    /// The patterns; a call of `matches` was rewritten to [`MATCH`] with a place in this list.
    pub(super) patterns: Vec<Regex>,
    /// What it costs.
    pub(super) work: Linear,
}

/// The function that a call of `matches` with a literal pattern becomes. It has no name that an expression could spell.
pub(super) const MATCH: &str = "@match";

/// Looks through an expression and rewrites it; the failure says what is not taken.
pub(super) fn check(expression: &mut IdedExpr) -> Result<Checked, Failure> {
    let mut checked = Checked::default();
    checked.work = checked.estimate(expression, 0)?.work;
    Ok(checked)
}

fn refused(what: &str) -> Failure {
    Failure::invalid("FILTER", format!("filter: {what}"))
}

impl Checked {
    fn estimate(&mut self, e: &mut IdedExpr, depth: usize) -> Result<Estimate, Failure> {
        if depth > DEPTH_MAX {
            return Err(refused(&format!("more than {DEPTH_MAX} operations within operations")));
        }
        let node = Linear::fixed(20);
        let scalar = Linear::fixed(16);
        match &mut e.expr {
            Expr::Comprehension(_) => Err(refused(
                "all, exists, exists_one, map and filter are not taken: a filter has no loops, so that its cost is bounded",
            )),
            Expr::Struct(_) | Expr::Unspecified => Err(refused("messages of other types are not taken")),
            Expr::Ident(name) => {
                let size = match name.as_str() {
                    "key" | "headers" => Linear { fixed: 64, per_byte: 1 },
                    _ => scalar,
                };
                Ok(Estimate { size, work: node })
            }
            Expr::Literal(literal) => {
                let size = match literal {
                    LiteralValue::String(text) => Linear::fixed(text.inner().len() as u64),
                    LiteralValue::Bytes(bytes) => Linear::fixed(bytes.inner().len() as u64),
                    _ => scalar,
                };
                Ok(Estimate { size, work: node })
            }
            Expr::Select(select) => {
                let of = self.estimate(&mut select.operand, depth + 1)?;
                Ok(Estimate { size: of.size, work: of.work.and(node) })
            }
            Expr::List(list) => self.all(list.elements.iter_mut(), depth),
            Expr::Map(map) => {
                let mut parts = Vec::new();
                for entry in &mut map.entries {
                    match &mut entry.expr {
                        EntryExpr::MapEntry(entry) => parts.extend([&mut entry.key, &mut entry.value]),
                        EntryExpr::StructField(field) => parts.push(&mut field.value),
                    }
                }
                self.all(parts.into_iter(), depth)
            }
            Expr::Call(call) => {
                if call.func_name == "matches" {
                    return self.matches(call, depth);
                }
                let mut args = Vec::new();
                for arg in call.target.iter_mut().map(|target| &mut **target).chain(call.args.iter_mut()) {
                    args.push(self.estimate(arg, depth + 1)?);
                }
                called(&call.func_name, &args)
            }
        }
    }

    /// A list or map: all of its parts are evaluated and kept.
    fn all<'a>(&mut self, parts: impl Iterator<Item = &'a mut IdedExpr>, depth: usize) -> Result<Estimate, Failure> {
        let mut sum = Estimate { size: Linear::fixed(16), work: Linear::fixed(50) };
        for part in parts {
            let part = self.estimate(part, depth + 1)?;
            sum.size = sum.size.and(part.size).and(Linear::fixed(50));
            sum.work = sum.work.and(part.work).and(part.size).and(Linear::fixed(50));
        }
        Ok(sum)
    }

    /// `text.matches('pattern')`: compiled here, once.
    fn matches(&mut self, call: &mut cel::common::ast::CallExpr, depth: usize) -> Result<Estimate, Failure> {
        let mut args: Vec<IdedExpr> = call.target.take().map(|target| *target).into_iter().collect();
        args.append(&mut call.args);
        let Ok([mut text, pattern]) = <[IdedExpr; 2]>::try_from(args) else {
            return Err(refused("matches takes a text and a pattern"));
        };
        let Expr::Literal(LiteralValue::String(literal)) = &pattern.expr else {
            let text = "the pattern of matches is not a literal text: it is compiled once, before there is a message";
            return Err(refused(text));
        };
        if self.patterns.len() == PATTERNS_MAX {
            return Err(refused(&format!("more than {PATTERNS_MAX} patterns; join them with |")));
        }
        let (regex, bytes) = compiled(literal.inner())?;
        let at = self.patterns.len() as i64;
        self.patterns.push(regex);
        let of = self.estimate(&mut text, depth + 1)?;
        call.func_name = MATCH.to_owned();
        let place = Expr::Literal(LiteralValue::Int(cel::common::types::CelInt::from(at)));
        call.args = vec![text, IdedExpr { id: pattern.id, expr: place }];
        let steps = (bytes as u64 / PATTERN_BYTES_A_STEP).max(1);
        let work = of.work.and(of.size.times(steps)).and(Linear::fixed(200));
        Ok(Estimate { size: Linear::fixed(16), work })
    }
}

/// A pattern, and bytes that it takes at most.
fn compiled(pattern: &str) -> Result<(Regex, usize), Failure> {
    let mut bytes = 1 << 10;
    loop {
        let mut builder = RegexBuilder::new(pattern);
        match builder.size_limit(bytes).dfa_size_limit(MATCHING_BYTES_MAX).build() {
            Ok(regex) => return Ok((regex, bytes)),
            Err(regex::Error::CompiledTooBig(_)) if bytes < PATTERN_BYTES_MAX => bytes *= 2,
            Err(regex::Error::CompiledTooBig(_)) => {
                let text = format!(
                    "the pattern '{pattern}' takes more than {} KiB when it is compiled: repeat less, or write [0-9A-Za-z_] for \\w",
                    PATTERN_BYTES_MAX >> 10
                );
                return Err(refused(&text));
            }
            Err(error) => return Err(refused(&format!("the pattern '{pattern}' is none: {error}"))),
        }
    }
}

/// What a call of an operator or function costs beside its arguments.
fn called(name: &str, args: &[Estimate]) -> Result<Estimate, Failure> {
    let sum = |of: fn(&Estimate) -> Linear| args.iter().fold(Linear::default(), |sum, arg| sum.and(of(arg)));
    let (sizes, work) = (sum(|a| a.size), sum(|a| a.work).and(Linear::fixed(50)));
    let largest = args.iter().fold(Linear::default(), |most, arg| most.or(arg.size));
    let scalar = Linear::fixed(16);
    let (size, more) = match name {
        "_&&_" | "_||_" | "!_" | "_-_" | "_*_" | "_/_" | "_%_" | "-_" => (scalar, Linear::default()),
        "_?_:_" | "dyn" => (largest, Linear::default()),
        "_+_" => (sizes, sizes),
        "_==_" | "_!=_" | "_<_" | "_<=_" | "_>_" | "_>=_" | "@in" | "size" | "contains" | "startsWith" | "endsWith" => {
            (scalar, sizes)
        }
        "_[_]" => (largest, sizes),
        "string" | "bytes" => (sizes.and(Linear::fixed(SCALAR_BYTES)), sizes.and(Linear::fixed(SCALAR_BYTES))),
        "int" | "uint" | "double" | "bool" | "timestamp" | "duration" | "getFullYear" | "getMonth" | "getDate"
        | "getDayOfMonth" | "getDayOfWeek" | "getDayOfYear" | "getHours" | "getMinutes" | "getSeconds"
        | "getMilliseconds" => (scalar, sizes.and(Linear::fixed(500))),
        other => return Err(refused(&format!("the function {other} is not taken"))),
    };
    Ok(Estimate { size, work: work.and(more) })
}
