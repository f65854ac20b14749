//! The directories of snapshots: made before a record is committed, removed after it is gone.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::{Inner, Owner, Result};
use crate::labels::Layer;
use crate::meta::{Kind, Record};
use crate::mounts::Chain;
use crate::status::SnapshotError;

impl Inner {
    /// Makes the directories of a snapshot whose record is about to be committed.
    ///
    /// They are not synced: on ext4 that would wait for everything that was unpacked just now. After a power cut
    /// [`Inner::restore_directories`] makes them anew.
    pub(super) fn make_directories(&self, id: u64, writable: bool, owner: Option<Owner>) -> Result<()> {
        let top = self.layout.snapshot(id);
        // Left by a transaction that was never committed: nobody knows it.
        remove_tree(&top)?;
        make_directory(&top, 0o700)?;
        let upper = self.layout.upper(id);
        make_directory(&upper, 0o755)?;
        if writable {
            make_directory(&self.layout.work(id), 0o711)?;
        }
        if let Some((user, group)) = owner {
            std::os::unix::fs::lchown(&upper, Some(user), Some(group))
                .map_err(SnapshotError::io("giving away", &upper))?;
        }
        Ok(())
    }

    /// Makes the directories of a snapshot anew whose record reached the disk when they did not. What a container wrote there
    /// was not on the disk either.
    pub(super) fn restore_directories(
        &self,
        record: &Record,
        layer: &Layer,
        chain: &Chain,
        served: Option<Owner>,
    ) -> Result<()> {
        let writable = record.kind == Kind::Active;
        if self.layout.upper(record.id).is_dir() && (!writable || self.layout.work(record.id).is_dir()) {
            return Ok(());
        }
        tracing::warn!(
            id = record.id,
            "the directories of a snapshot are gone, as after a power cut, and are made anew"
        );
        self.make_directories(record.id, writable, self.root_owner(layer, chain, served)?)
    }

    /// Removes a snapshot's directory: out of the way first, so that half a directory is never taken for one.
    pub(super) fn discard(&self, id: u64) -> Result<()> {
        let top = self.layout.snapshot(id);
        let doomed = self.layout.snapshots().join(format!("rm-{id}"));
        remove_tree(&doomed)?;
        match fs::rename(&top, &doomed) {
            Ok(()) => remove_tree(&doomed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(SnapshotError::io("removing", &top)(error)),
        }
    }

    pub(super) fn discard_or_warn(&self, id: u64) {
        if let Err(error) = self.discard(id) {
            tracing::warn!(id, error = error.full_text(), "a removed snapshot is still on disk");
        }
    }

    /// Removes directories without a record.
    pub(super) fn sweep(&self) -> Result<()> {
        let snapshots = self.layout.snapshots();
        let mut doomed = Vec::new();
        let mut failed = None;
        self.meta.frozen(|frozen| {
            match orphans(&snapshots, &frozen.records) {
                Ok(found) => doomed = found,
                Err(error) => failed = Some(error),
            }
            Vec::new()
        })?;
        if let Some(error) = failed {
            return Err(SnapshotError::io("reading", &snapshots)(error));
        }
        for path in doomed {
            if let Err(error) = remove_tree(&path) {
                tracing::warn!(path = %path.display(), error = error.full_text(), "an unused directory is still there");
            }
        }
        Ok(())
    }
}

/// Renames directories that no record names, so that no new snapshot meets them, and tells the new names.
fn orphans(snapshots: &Path, records: &[Record]) -> io::Result<Vec<PathBuf>> {
    let known: HashSet<u64> = records.iter().map(|record| record.id).collect();
    let mut found = Vec::new();
    for entry in fs::read_dir(snapshots)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match number {
            Some(id) if known.contains(&id) => {}
            Some(id) => {
                let doomed = snapshots.join(format!("rm-{id}"));
                if doomed.exists() {
                    found.push(entry.path());
                } else {
                    match fs::rename(entry.path(), &doomed) {
                        Ok(()) => found.push(doomed),
                        // A removal beside us, whose record went first, was quicker.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            None if name.to_str().is_some_and(|name| name.starts_with("rm-")) => found.push(entry.path()),
            // Not ours: left alone.
            None => {}
        }
    }
    Ok(found)
}

/// Makes a directory with exactly this mode, whatever the umask.
pub(super) fn make_directory(path: &Path, mode: u32) -> Result<()> {
    fs::create_dir(path).map_err(SnapshotError::io("creating", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(SnapshotError::io("setting the mode of", path))
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SnapshotError::io("removing", path)(error)),
        _ => Ok(()),
    }
}
