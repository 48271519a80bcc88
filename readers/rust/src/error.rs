//! What can go wrong: a file that cannot be read, and a file that breaks a rule.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// The way in which a reader refuses a file (section 1 of the format).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The bytes break a rule.
    Malformed,
    /// The bytes are well-formed and were changed after they were written.
    Digest,
    /// The file is made for a newer reader.
    Unsupported,
}

/// A file that breaks a rule of the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The rule's id, such as `"R9"`.
    pub rule: &'static str,
    pub kind: Kind,
    /// What is wrong, and where.
    pub message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.message)
    }
}

/// Why a state could not be read.
#[derive(Debug)]
pub enum Error {
    Io { path: PathBuf, source: io::Error },
    Refused(Refused),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { path, source } => write!(f, "{}: {}", path.display(), source),
            Error::Refused(refused) => refused.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        Error::Refused(refused)
    }
}

pub(crate) fn malformed(rule: &'static str, message: impl Into<String>) -> Refused {
    Refused { rule, kind: Kind::Malformed, message: message.into() }
}

/// Return an error of a rule unless the condition holds.
pub(crate) fn check(condition: bool, rule: &'static str, message: impl FnOnce() -> String) -> Result<(), Refused> {
    if condition {
        Ok(())
    } else {
        Err(malformed(rule, message()))
    }
}
