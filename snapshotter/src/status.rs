//! Why a snapshot call failed, and what containerd is told.
//!
//! containerd branches on the gRPC code alone: `NotFound`, `AlreadyExists`, `FailedPrecondition` and `Unimplemented` each
//! change what it does next, everything else is a failure with a text. So the variants below are the codes, and this file
//! is the only place that knows the mapping.

use std::path::{Path, PathBuf};

use tonic::{Code, Status};

/// Why a call on the snapshots could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The key, name or parent is unknown.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// The key or name is taken, or the layer is here already.
    #[error("snapshot {0:?} already exists")]
    AlreadyExists(String),
    /// The snapshot is not in a state that allows this.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request makes no sense, whatever the state.
    #[error("{0}")]
    InvalidArgument(String),
    /// It may work later.
    #[error("{0}")]
    Unavailable(String),
    /// It will not work with this program.
    #[error("{0}")]
    Unimplemented(String),
    /// An image that cannot be given out.
    #[error("{0}")]
    Image(String),
    /// A file system operation failed.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done, as "creating".
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The records could not be read or written.
    #[error("accessing the snapshot records, metadata.redb below the root")]
    Records(#[source] Box<redb::Error>),
    /// A record does not hold what this program writes.
    #[error("reading the record of {what}")]
    BadRecord {
        /// Whose record.
        what: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A task of this program ended early.
    #[error("a task ended before its answer: {0}")]
    Task(String),
}

impl SnapshotError {
    /// An operation on `path` that failed.
    pub fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { doing, path, source }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::FailedPrecondition(_) => Code::FailedPrecondition,
            Self::InvalidArgument(_) => Code::InvalidArgument,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::Image(_) | Self::Io { .. } | Self::Records(_) | Self::BadRecord { .. } | Self::Task(_) => {
                Code::Unknown
            }
        }
    }

    /// The text with every cause, on one line.
    pub fn full_text(&self) -> String {
        full_text(self)
    }
}

/// The text of an error with every cause, on one line.
pub fn full_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        Status::new(error.code(), error.full_text())
    }
}

impl<E: Into<redb::Error>> From<E> for SnapshotError {
    fn from(error: E) -> Self {
        Self::Records(Box::new(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_is_told_the_codes_it_branches_on() {
        let table = [
            (SnapshotError::NotFound("a".into()), Code::NotFound),
            (SnapshotError::AlreadyExists("a".into()), Code::AlreadyExists),
            (SnapshotError::FailedPrecondition("a".into()), Code::FailedPrecondition),
            (SnapshotError::InvalidArgument("a".into()), Code::InvalidArgument),
            (SnapshotError::Unavailable("a".into()), Code::Unavailable),
            (SnapshotError::Unimplemented("a".into()), Code::Unimplemented),
            (SnapshotError::Image("a".into()), Code::Unknown),
        ];
        for (error, code) in table {
            assert_eq!(Status::from(error).code(), code);
        }
    }

    #[test]
    fn the_text_names_the_path_and_the_cause() {
        let error = SnapshotError::io("creating", "/x/y")(std::io::Error::from_raw_os_error(28));
        assert_eq!(Status::from(error).message(), "creating /x/y: No space left on device (os error 28)");
    }
}
