//! Output of commands: results on standard output, whose errors end the command, and notes on standard error, whose errors do not.
//! `println!` and `eprintln!` panic where they cannot write.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write as _};
use thiserror::Error;

/// Exit code of a command whose output nobody reads any more: what a shell reports of a program that SIGPIPE ended.
pub const UNREAD: u8 = 141;

/// Standard output cannot be written.
#[derive(Debug, Error)]
#[error("cannot write output")]
pub struct Unwritten(#[from] io::Error);

impl Unwritten {
    /// Returns true if the reader of the output has closed it, such as `head -1`.
    pub fn is_unread(&self) -> bool {
        self.0.kind() == ErrorKind::BrokenPipe
    }
}

/// Writes to standard output.
pub fn write(bytes: &[u8]) -> Result<(), Unwritten> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// Writes a line to standard output; [`outln!`](crate::outln) formats it.
pub fn line(text: impl Display) -> Result<(), Unwritten> {
    write(format!("{text}\n").as_bytes())
}

/// Writes a line to standard error. Where that fails, nobody can be told.
pub fn note(text: impl Display) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// Writes a formatted line to standard output.
#[macro_export]
macro_rules! outln {
    ($($argument:tt)*) => { $crate::output::line(format_args!($($argument)*)) };
}
