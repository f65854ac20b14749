//! The file of the records, opened anew after its disk failed.
//!
//! After an error of the disk the library refuses everything until the file is opened again. A disk that was full for a minute
//! must not need a restart, so the next call opens the file again: what was committed is there, what was under way is not.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use redb::{ReadTransaction, ReadableDatabase, WriteTransaction};

use crate::status::SnapshotError;

/// How long another process may hold the records before we give up: it may be on its way out.
const WAIT_FOR_RECORDS: Duration = Duration::from_secs(4);

type Result<T> = std::result::Result<T, SnapshotError>;

/// The records' file.
#[derive(Debug)]
pub(super) struct Database {
    path: PathBuf,
    /// Absent after a failure.
    open: RwLock<Option<redb::Database>>,
}

impl Database {
    /// Opens or creates the file.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_path_buf(), open: RwLock::new(Some(open(path)?)) })
    }

    /// Looks at one moment of the records.
    pub(super) fn read<T>(&self, act: impl FnOnce(&ReadTransaction) -> Result<T>) -> Result<T> {
        self.with(|db| act(&db.begin_read()?))
    }

    /// Changes the records; without an answer from `act` nothing is changed.
    pub(super) fn write<T>(&self, act: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        self.with(|db| {
            let txn = db.begin_write()?;
            // Without a commit the transaction is undone when dropped.
            let answer = act(&txn)?;
            txn.commit()?;
            Ok(answer)
        })
    }

    fn with<T>(&self, act: impl FnOnce(&redb::Database) -> Result<T>) -> Result<T> {
        let mut held = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            drop(held);
            let mut closed = self.open.write().unwrap_or_else(PoisonError::into_inner);
            if closed.is_none() {
                *closed = Some(open(&self.path)?);
                tracing::info!(path = %self.path.display(), "the records are open again");
            }
            drop(closed);
            held = self.open.read().unwrap_or_else(PoisonError::into_inner);
        }
        let Some(db) = held.as_ref() else {
            return Err(SnapshotError::Unavailable(
                "the disk of the snapshot records fails again and again".to_owned(),
            ));
        };
        let answer = act(db);
        let failed = matches!(&answer, Err(SnapshotError::Records(error))
            if matches!(**error, redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::LockPoisoned(_)));
        drop(held);
        if failed {
            *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        answer
    }
}

fn open(path: &Path) -> Result<redb::Database> {
    let begun = Instant::now();
    loop {
        match redb::Database::create(path) {
            Ok(db) => return Ok(db),
            Err(redb::DatabaseError::DatabaseAlreadyOpen) if begun.elapsed() < WAIT_FOR_RECORDS => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(SnapshotError::FailedPrecondition(format!(
                    "another snapshotter uses {}: stop it or choose another --root",
                    path.display()
                )));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
