//! The records: which snapshots exist, and which images are mounted.
//!
//! ```text
//! snapshots  key or name        -> Record (JSON)
//! names      number             -> key or name; the number also names the directory
//! children   (parent, child) by number -> ()
//! instances  bootstrap's number -> Instance (JSON)
//! garbage    id of a blob       -> (); no longer wanted by the snapshot or image that wanted it
//! counters   "next"             -> the next number
//! ```
//!
//! Every call is one transaction, durable when it returns. Numbers are never used twice, except those of a transaction that
//! was never committed: whoever makes a directory for a fresh number may therefore find one, and it is rubbish.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::plan::Ancestor;
use crate::status::SnapshotError;
use crate::usage::Usage;

mod database;
mod record;

use database::Database;
pub use record::{Frozen, Instance, Kind, Record, Stage};

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const NAMES: TableDefinition<'_, u64, &str> = TableDefinition::new("names");
const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
const INSTANCES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("instances");
const GARBAGE: TableDefinition<'_, &str, ()> = TableDefinition::new("garbage");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

type Result<T> = std::result::Result<T, SnapshotError>;

/// The records of one root.
#[derive(Debug)]
pub struct Meta {
    db: Database,
}

impl Meta {
    /// Opens or creates the records.
    ///
    /// # Errors
    /// When another process keeps them open for more than four seconds, or they cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = Self { db: Database::open(path)? };
        meta.write(|txn| {
            // Opening creates: later readers need not care whether a table exists.
            txn.open_table(SNAPSHOTS)?;
            txn.open_table(NAMES)?;
            txn.open_table(CHILDREN)?;
            txn.open_table(INSTANCES)?;
            txn.open_table(GARBAGE)?;
            txn.open_table(COUNTERS)?;
            Ok(())
        })?;
        Ok(meta)
    }

    /// Records a new view or active snapshot. `make` is told its number and runs before the record is durable; if it fails there
    /// is no record.
    ///
    /// # Errors
    /// `NotFound` or `InvalidArgument` for the parent, `AlreadyExists` for the key, or what `make` gave.
    pub fn create(
        &self,
        key: &str,
        parent: &str,
        kind: Kind,
        labels: &Labels,
        make: impl FnOnce(u64) -> Result<()>,
    ) -> Result<Record> {
        self.write(|txn| {
            let parent_id = committed_parent(txn, parent)?;
            if exists(txn, key)? {
                return Err(SnapshotError::AlreadyExists(key.to_owned()));
            }
            let id = next_id(txn)?;
            let now = now();
            let record = Record {
                id,
                kind,
                parent: parent.to_owned(),
                labels: labels.clone(),
                created: now,
                updated: now,
                usage: None,
            };
            put(txn, key, &record)?;
            link(txn, parent_id, id)?;
            make(id)?;
            Ok(record)
        })
    }

    /// Records a layer that needs no download as committed, under `target` if that is free. Removes the active snapshot
    /// `leftover` if there is one, and tells its number.
    ///
    /// A name that is taken by a layer with the same parent and target is that layer. With another parent it is not what
    /// containerd will look for, so the new record gets a name of its own; containerd takes any name it finds.
    ///
    /// # Errors
    /// As [`Meta::create`], except that a taken name is no error.
    pub fn supply(
        &self,
        target: &str,
        leftover: &str,
        parent: &str,
        labels: &Labels,
        make: impl FnOnce(u64) -> Result<()>,
    ) -> Result<Option<u64>> {
        self.write(|txn| {
            let parent_id = committed_parent(txn, parent)?;
            let removed = match get(txn, leftover)? {
                Some(record) if record.kind == Kind::Active => {
                    delete(txn, leftover, &record)?;
                    Some(record.id)
                }
                _ => None,
            };
            let fits = |found: &Record| {
                found.kind == Kind::Committed
                    && found.parent == parent
                    && found.labels.get(labels::TARGET).map(String::as_str) == Some(target)
            };
            let mut name = target.to_owned();
            if let Some(found) = get(txn, &name)? {
                if fits(&found) {
                    return Ok(removed);
                }
                name = format!("{target}@{}", parent_id.unwrap_or_default());
                match get(txn, &name)? {
                    Some(found) if fits(&found) => return Ok(removed),
                    Some(_) => return Err(SnapshotError::AlreadyExists(name)),
                    None => {}
                }
            }
            let id = next_id(txn)?;
            let now = now();
            let record = Record {
                id,
                kind: Kind::Committed,
                parent: parent.to_owned(),
                labels: labels.clone(),
                created: now,
                updated: now,
                usage: (labels::content(labels) == labels::Content::Data).then(Usage::default),
            };
            put(txn, &name, &record)?;
            link(txn, parent_id, id)?;
            make(id)?;
            Ok(removed)
        })
    }

    /// Turns the active snapshot `key` into the committed snapshot `name` with exactly these labels.
    ///
    /// # Errors
    /// `AlreadyExists` for the name, `NotFound` for the key, `FailedPrecondition` when it is a view or committed.
    pub fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<Record> {
        self.write(|txn| {
            if exists(txn, name)? {
                return Err(SnapshotError::AlreadyExists(name.to_owned()));
            }
            let mut record = get(txn, key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
            if record.kind != Kind::Active {
                return Err(SnapshotError::FailedPrecondition(format!("snapshot {key:?} is not active")));
            }
            let now = now();
            record.kind = Kind::Committed;
            record.labels = labels.clone();
            record.created = now;
            record.updated = now;
            txn.open_table(SNAPSHOTS)?.remove(key)?;
            put(txn, name, &record)?;
            Ok(record)
        })
    }

    /// Removes a snapshot's record.
    ///
    /// # Errors
    /// `NotFound`, or `FailedPrecondition` while another snapshot is based on it.
    pub fn remove(&self, key: &str) -> Result<Record> {
        self.write(|txn| {
            let record = get(txn, key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
            let based = txn.open_table(CHILDREN)?.range((record.id, 0)..=(record.id, u64::MAX))?.next().is_some();
            if based {
                return Err(SnapshotError::FailedPrecondition(format!("cannot remove snapshot {key:?} with child")));
            }
            delete(txn, key, &record)?;
            if let Some(blob) = labels::data_blob(&record.labels) {
                txn.open_table(GARBAGE)?.insert(blob.as_str(), ())?;
            }
            Ok(record)
        })
    }

    /// Changes labels: all of them for no field or the field `labels`, one of them for `labels.KEY`. An empty value removes
    /// a label, as in containerd. The mark of a layer that is read by its table of contents stays: containerd does not know it.
    ///
    /// # Errors
    /// `NotFound`, or `InvalidArgument` for a field that cannot change.
    pub fn update(&self, key: &str, wanted: &Labels, fields: &[String]) -> Result<Record> {
        self.write(|txn| {
            let mut record = get(txn, key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
            let mark = record.labels.remove_entry(labels::STARGZ_LAYER);
            if fields.is_empty() {
                record.labels = wanted.clone();
            }
            for field in fields {
                if field == "labels" {
                    record.labels = wanted.clone();
                } else if let Some(label) = field.strip_prefix("labels.") {
                    record.labels.insert(label.to_owned(), wanted.get(label).cloned().unwrap_or_default());
                } else {
                    return Err(SnapshotError::InvalidArgument(format!(
                        "cannot update {field:?} field on snapshot {key:?}"
                    )));
                }
            }
            record.labels.remove(labels::STARGZ_LAYER);
            record.labels.extend(mark);
            record.labels.retain(|_, value| !value.is_empty());
            // The clock may stand still or go back; the time of a change must not.
            record.updated = now().max(record.updated + 1);
            put(txn, key, &record)?;
            Ok(record)
        })
    }

    /// Remembers what a committed snapshot uses, if it still exists.
    ///
    /// # Errors
    /// When the records cannot be written.
    pub fn measured(&self, id: u64, usage: Usage) -> Result<()> {
        self.write(|txn| {
            let Some(name) = txn.open_table(NAMES)?.get(id)?.map(|name| name.value().to_owned()) else { return Ok(()) };
            let Some(mut record) = get(txn, &name)? else { return Ok(()) };
            if record.kind == Kind::Committed {
                record.usage = Some(usage);
                put(txn, &name, &record)?;
            }
            Ok(())
        })
    }

    /// The record of a key or name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stat(&self, key: &str) -> Result<Record> {
        self.db.read(|txn| {
            let table = txn.open_table(SNAPSHOTS)?;
            let found = table.get(key)?.map(|value| decode(key, value.value())).transpose()?;
            found.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))
        })
    }

    /// Every snapshot, by key.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn list(&self) -> Result<Vec<(String, Record)>> {
        self.db.read(|txn| {
            let table = txn.open_table(SNAPSHOTS)?;
            let mut all = Vec::new();
            for row in table.iter()? {
                let (key, value) = row?;
                all.push((key.value().to_owned(), decode(key.value(), value.value())?));
            }
            Ok(all)
        })
    }

    /// The ancestors of a snapshot whose parent is `parent`, from the uppermost down, with their records.
    ///
    /// # Errors
    /// `NotFound` for a missing parent, `InvalidArgument` for one that is not committed.
    pub fn ancestors(&self, parent: &str) -> Result<Vec<(Ancestor, Record)>> {
        self.db.read(|txn| {
            let table = txn.open_table(SNAPSHOTS)?;
            let mut chain = Vec::new();
            let mut name = parent.to_owned();
            while !name.is_empty() {
                let record: Record = match table.get(name.as_str())? {
                    Some(value) => decode(&name, value.value())?,
                    None => return Err(SnapshotError::NotFound(name)),
                };
                if record.kind != Kind::Committed {
                    return Err(SnapshotError::InvalidArgument(format!("parent {name:?} is not a committed snapshot")));
                }
                // Only the kind of layer matters here; a mapping of owners on an ancestor is long done with.
                let content = labels::content(&record.labels);
                name = record.parent.clone();
                chain.push((Ancestor { id: record.id, content }, record));
            }
            Ok(chain)
        })
    }

    /// Records an image as intended or live; an image whose snapshot is gone is not recorded.
    ///
    /// # Errors
    /// `NotFound` when the bootstrap snapshot does not exist any more.
    pub fn set_instance(&self, instance: &Instance) -> Result<()> {
        self.write(|txn| {
            if txn.open_table(NAMES)?.get(instance.id)?.is_none() {
                return Err(SnapshotError::NotFound(instance.id.to_string()));
            }
            let bytes = encode("an instance", instance)?;
            txn.open_table(INSTANCES)?.insert(instance.id, bytes.as_slice())?;
            Ok(())
        })
    }

    /// Forgets an image; its blobs are no longer wanted by it.
    ///
    /// # Errors
    /// When the records cannot be written.
    pub fn forget_instance(&self, id: u64) -> Result<()> {
        self.write(|txn| {
            let mut instances = txn.open_table(INSTANCES)?;
            let gone: Option<Instance> =
                instances.remove(id)?.map(|value| decode("an instance", value.value())).transpose()?;
            let mut garbage = txn.open_table(GARBAGE)?;
            for blob in gone.and_then(|instance| instance.blobs).into_iter().flatten() {
                garbage.insert(blob.as_str(), ())?;
            }
            Ok(())
        })
    }

    /// The record with this number, if it is committed or otherwise there.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn by_id(&self, id: u64) -> Result<Option<Record>> {
        self.db.read(|txn| {
            let Some(name) = txn.open_table(NAMES)?.get(id)?.map(|name| name.value().to_owned()) else {
                return Ok(None);
            };
            txn.open_table(SNAPSHOTS)?.get(name.as_str())?.map(|value| decode(&name, value.value())).transpose()
        })
    }

    /// One image.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn instance(&self, id: u64) -> Result<Option<Instance>> {
        self.db.read(|txn| {
            let table = txn.open_table(INSTANCES)?;
            table.get(id)?.map(|value| decode("an instance", value.value())).transpose()
        })
    }

    /// Every image.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn instances(&self) -> Result<Vec<Instance>> {
        self.db.read(|txn| {
            let table = txn.open_table(INSTANCES)?;
            table.iter()?.map(|row| decode("an instance", row?.1.value())).collect()
        })
    }

    /// Runs `act` while nobody can record a new snapshot or image. Blobs that `act` returns are garbage no longer.
    ///
    /// # Errors
    /// When the records cannot be read or written.
    pub fn frozen(&self, act: impl FnOnce(&Frozen) -> Vec<String>) -> Result<()> {
        self.write(|txn| {
            let mut frozen = Frozen::default();
            for row in txn.open_table(SNAPSHOTS)?.iter()? {
                let (key, value) = row?;
                frozen.records.push(decode(key.value(), value.value())?);
            }
            for row in txn.open_table(INSTANCES)?.iter()? {
                frozen.instances.push(decode("an instance", row?.1.value())?);
            }
            let mut garbage = txn.open_table(GARBAGE)?;
            for row in garbage.iter()? {
                frozen.garbage.push(row?.0.value().to_owned());
            }
            for blob in act(&frozen) {
                garbage.remove(blob.as_str())?;
            }
            Ok(())
        })
    }

    fn write<T>(&self, act: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        self.db.write(act)
    }
}

fn committed_parent(txn: &WriteTransaction, parent: &str) -> Result<Option<u64>> {
    if parent.is_empty() {
        return Ok(None);
    }
    let record = get(txn, parent)?.ok_or_else(|| SnapshotError::NotFound(parent.to_owned()))?;
    if record.kind != Kind::Committed {
        return Err(SnapshotError::InvalidArgument(format!("parent {parent:?} is not a committed snapshot")));
    }
    Ok(Some(record.id))
}

fn exists(txn: &WriteTransaction, key: &str) -> Result<bool> {
    Ok(txn.open_table(SNAPSHOTS)?.get(key)?.is_some())
}

fn get(txn: &WriteTransaction, key: &str) -> Result<Option<Record>> {
    let table = txn.open_table(SNAPSHOTS)?;
    table.get(key)?.map(|value| decode(key, value.value())).transpose()
}

fn put(txn: &WriteTransaction, key: &str, record: &Record) -> Result<()> {
    let bytes = encode(key, record)?;
    txn.open_table(SNAPSHOTS)?.insert(key, bytes.as_slice())?;
    txn.open_table(NAMES)?.insert(record.id, key)?;
    Ok(())
}

fn delete(txn: &WriteTransaction, key: &str, record: &Record) -> Result<()> {
    txn.open_table(SNAPSHOTS)?.remove(key)?;
    txn.open_table(NAMES)?.remove(record.id)?;
    if let Some(parent) = (!record.parent.is_empty()).then(|| get(txn, &record.parent)).transpose()?.flatten() {
        txn.open_table(CHILDREN)?.remove((parent.id, record.id))?;
    }
    Ok(())
}

fn link(txn: &WriteTransaction, parent: Option<u64>, child: u64) -> Result<()> {
    if let Some(parent) = parent {
        txn.open_table(CHILDREN)?.insert((parent, child), ())?;
    }
    Ok(())
}

fn next_id(txn: &WriteTransaction) -> Result<u64> {
    let mut counters = txn.open_table(COUNTERS)?;
    let id = counters.get("next")?.map_or(1, |value| value.value());
    counters.insert("next", id + 1)?;
    Ok(id)
}

fn encode<T: Serialize>(what: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|source| SnapshotError::BadRecord { what: what.to_owned(), source })
}

fn decode<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| SnapshotError::BadRecord { what: what.to_owned(), source })
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX - 1)
}

#[cfg(test)]
mod tests;
