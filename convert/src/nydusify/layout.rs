//! An OCI layout on disk: a directory, or a tar of one as `docker save` and `ctr images export` write it.
//!
//! `oci-layout` says what it is, `index.json` which images it holds, `blobs/sha256/…` are manifests, configurations and
//! layers alike. Archives of old dockers have neither: their `manifest.json` names a configuration and bare tars, from
//! which a manifest is made here.
//!
//! A tar is read once, to know where its members begin; after that they are read where they lie. A compressed one is
//! unpacked to the work directory first, since nothing in it can be found otherwise.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use nydus_backend::registry::{Manifest, Reference};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::layer::stream::Packing;
use crate::oci::{Descriptor, Index, names};
use crate::tar::{Archive, BLOCK, EntryKind, TarError};

mod write;

use write::Writing;

/// The name of an image as containerd writes it.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// The tag of an image.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The largest document that is read: an index, a manifest or a configuration.
const MAX_DOCUMENT: u64 = 16 << 20;
/// How much is read at once.
const PIECE: u64 = 256 << 10;

/// Why a layout cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file cannot be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An archive is no tar.
    #[error("reading the archive {}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: TarError,
    },
    /// Something is not in it.
    #[error("{} does not hold {what}", path.display())]
    Missing {
        /// The layout.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// A document in it makes no sense.
    #[error("{what} of {} cannot be understood: {why}", path.display())]
    Document {
        /// The layout.
        path: PathBuf,
        /// Which document.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Several images, and nothing tells which is meant.
    #[error("{} holds several images ({}); name one of them with --source", path.display(), names.join(", "))]
    Several {
        /// The layout.
        path: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// The thread that read or wrote is gone.
    #[error("the program is ending")]
    Stopped,
}

/// Bytes within a file.
#[derive(Debug, Clone)]
pub(super) struct Span {
    file: Arc<File>,
    path: PathBuf,
    range: Range<u64>,
}

impl Span {
    fn read_at(&self, at: u64, len: u64) -> Result<Bytes, LayoutError> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, self.range.start + at).map_err(|source| LayoutError::File {
            what: "reading",
            path: self.path.clone(),
            source,
        })?;
        Ok(bytes.into())
    }

    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Returns the same bytes, but none from byte `end` on.
    pub(super) fn up_to(mut self, end: u64) -> Self {
        self.range.end = self.range.end.min(self.range.start.saturating_add(end));
        self
    }

    /// Reads some bytes from byte `at` on; none at the end.
    pub(super) fn piece(&self, at: u64) -> Result<Bytes, LayoutError> {
        self.read_at(at, self.len().saturating_sub(at).min(PIECE))
    }

    /// Reads all bytes from byte `at` on.
    pub(super) fn read(&self, at: u64, limit: u64) -> Result<Bytes, LayoutError> {
        let len = self.len().saturating_sub(at);
        if len > limit {
            let why = format!("it has {len} bytes, and {limit} is the limit");
            return Err(LayoutError::Document { path: self.path.clone(), what: "a document".into(), why });
        }
        self.read_at(at, len)
    }
}

/// Where the members of an archive begin, and other names for them.
#[derive(Debug)]
struct Members {
    file: Arc<File>,
    spans: HashMap<String, Range<u64>>,
    /// Symbolic links among them, and digests that are not in a member's name.
    aliases: HashMap<String, String>,
}

impl Members {
    fn span(&self, name: &str) -> Option<&Range<u64>> {
        let mut name = name;
        // A link to a link is possible, a circle of them too.
        for _ in 0..8 {
            match (self.spans.get(name), self.aliases.get(name)) {
                (Some(span), _) => return Some(span),
                (None, Some(alias)) => name = alias,
                (None, None) => return None,
            }
        }
        None
    }
}

#[derive(Debug)]
enum State {
    /// Each blob is a file of its own.
    Directory,
    Archive(Members),
    Writing(Writing),
}

/// An OCI layout.
#[derive(Debug)]
pub struct Layout {
    path: PathBuf,
    /// The image that is meant, when reading.
    root: Option<Root>,
    state: Mutex<State>,
}

/// The document that an image begins with.
#[derive(Debug)]
struct Root {
    media_type: String,
    digest: String,
    /// Its bytes, where no member holds them.
    made: Option<Bytes>,
}

/// What `docker save` writes into `manifest.json`, one for each image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Returns the name of a blob's file.
fn blob_name(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

impl Layout {
    /// Opens a layout to read the image that `name` names, or the only one that it holds.
    ///
    /// # Errors
    ///
    /// [`LayoutError`].
    pub fn open(path: &Path, name: &Reference, work_dir: &Path) -> Result<Self, LayoutError> {
        let file = |source| LayoutError::File { what: "opening", path: path.to_owned(), source };
        let state = if std::fs::metadata(path).map_err(file)?.is_dir() {
            State::Directory
        } else {
            State::Archive(members(path, work_dir)?)
        };
        let mut layout = Self { path: path.to_owned(), root: None, state: Mutex::new(state) };
        layout.root = Some(match layout.member("index.json") {
            Ok(span) => layout.choose(layout.document("index.json", &span)?, name)?,
            Err(LayoutError::Missing { .. }) => layout.saved(name)?,
            Err(error) => return Err(error),
        });
        Ok(layout)
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What it guards is whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a blob.
    pub(super) fn blob(&self, digest: &str) -> Result<Span, LayoutError> {
        self.member(&blob_name(digest))
    }

    fn member(&self, name: &str) -> Result<Span, LayoutError> {
        let missing = || LayoutError::Missing { path: self.path.clone(), what: format!("`{name}`") };
        match &*self.state() {
            State::Archive(members) => {
                let range = members.span(name).cloned().ok_or_else(missing)?;
                Ok(Span { file: Arc::clone(&members.file), path: self.path.clone(), range })
            }
            State::Writing(writing) => writing.span(name).ok_or_else(missing),
            State::Directory => {
                let path = self.path.join(name);
                let failed = |source: io::Error| match source.kind() {
                    io::ErrorKind::NotFound => missing(),
                    _ => LayoutError::File { what: "opening", path: path.clone(), source },
                };
                let file = File::open(&path).map_err(failed)?;
                let len = file.metadata().map_err(failed)?.len();
                Ok(Span { file: Arc::new(file), path, range: 0..len })
            }
        }
    }

    fn document<T: serde::de::DeserializeOwned>(&self, what: &str, span: &Span) -> Result<T, LayoutError> {
        serde_json::from_slice(&span.read(0, MAX_DOCUMENT)?).map_err(|error| self.odd(what, error.to_string()))
    }

    fn odd(&self, what: &str, why: String) -> LayoutError {
        LayoutError::Document { path: self.path.clone(), what: what.to_owned(), why }
    }

    /// Picks an image of `index.json`.
    fn choose(&self, index: Index, name: &Reference) -> Result<Root, LayoutError> {
        let whole = name.to_string();
        let named = |entry: &Descriptor| {
            entry.annotations.get(IMAGE_NAME).is_some_and(|found| *found == whole)
                || entry
                    .annotations
                    .get(REF_NAME)
                    .is_some_and(|found| *found == whole || Some(found.as_str()) == name.tag())
        };
        let label = |entry: &Descriptor| {
            let text = entry.annotations.get(IMAGE_NAME).or_else(|| entry.annotations.get(REF_NAME));
            text.unwrap_or(&entry.digest).clone()
        };
        let named: Vec<_> = index.manifests.iter().filter(|entry| named(entry)).collect();
        let root =
            |one: &Descriptor| Root { media_type: one.media_type.clone(), digest: one.digest.clone(), made: None };
        match (named.as_slice(), index.manifests.as_slice()) {
            ([one], _) => Ok(root(one)),
            (_, [one]) => Ok(root(one)),
            (_, []) => Err(LayoutError::Missing { path: self.path.clone(), what: "any image".into() }),
            (_, all) => Err(LayoutError::Several { path: self.path.clone(), names: all.iter().map(label).collect() }),
        }
    }

    /// Makes a manifest of what an old docker saved.
    fn saved(&self, name: &Reference) -> Result<Root, LayoutError> {
        let span = self.member("manifest.json").map_err(|_| LayoutError::Missing {
            path: self.path.clone(),
            what: "`index.json` or `manifest.json`, so it is not an OCI layout".into(),
        })?;
        let images: Vec<Saved> = self.document("manifest.json", &span)?;
        let whole = name.to_string();
        let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
        let named = images.iter().find(|image| tags(image).iter().any(|tag| whole.ends_with(tag.as_str())));
        let image = match (named, images.as_slice()) {
            (Some(image), _) | (None, [image]) => image,
            (None, []) => return Err(LayoutError::Missing { path: self.path.clone(), what: "any image".into() }),
            (None, all) => {
                return Err(LayoutError::Several {
                    path: self.path.clone(),
                    names: all.iter().flat_map(tags).collect(),
                });
            }
        };
        let config = self.member(&image.config)?.read(0, MAX_DOCUMENT)?;
        let parsed: serde_json::Value =
            serde_json::from_slice(&config).map_err(|error| self.odd(&image.config, error.to_string()))?;
        let diff_ids = parsed.pointer("/rootfs/diff_ids").and_then(serde_json::Value::as_array);
        let diff_ids: Vec<&str> = diff_ids.into_iter().flatten().filter_map(serde_json::Value::as_str).collect();
        if diff_ids.len() != image.layers.len() {
            let why = format!("it names {} layers, and its configuration {}", image.layers.len(), diff_ids.len());
            return Err(self.odd("manifest.json", why));
        }
        let digest = |bytes: &[u8]| format!("sha256:{}", hex::encode(Sha256::digest(bytes)));
        let config_digest = digest(&config);
        let mut layers = Vec::new();
        let mut aliases = vec![(blob_name(&config_digest), image.config.clone())];
        for (layer, diff_id) in image.layers.iter().zip(diff_ids) {
            // They are bare tars, so their digest is the one of the tar.
            layers.push(serde_json::json!({
                "mediaType": names::DOCKER_LAYER, "digest": diff_id, "size": self.member(layer)?.len(),
            }));
            aliases.push((blob_name(diff_id), layer.clone()));
        }
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": names::DOCKER_MANIFEST, "layers": layers,
            "config": {"mediaType": names::DOCKER_CONFIG, "digest": config_digest, "size": config.len()},
        });
        if let State::Archive(members) = &mut *self.state() {
            members.aliases.extend(aliases);
        }
        let bytes = manifest.to_string();
        let digest = digest(bytes.as_bytes());
        Ok(Root { media_type: names::DOCKER_MANIFEST.to_owned(), digest, made: Some(bytes.into()) })
    }

    /// Reads a manifest or index: the image's own for a tag, else the one of that digest.
    pub(super) fn manifest(&self, target: &str) -> Result<Manifest, LayoutError> {
        let by_digest = target.contains(':');
        let root = self.root.as_ref();
        let bytes = match root.filter(|root| !by_digest || root.digest == target) {
            Some(Root { made: Some(bytes), .. }) => bytes.clone(),
            Some(root) => self.blob(&root.digest)?.read(0, MAX_DOCUMENT)?,
            None => self.blob(target)?.read(0, MAX_DOCUMENT)?,
        };
        let stated = root.filter(|_| !by_digest).map_or("", |root| root.media_type.as_str());
        let manifest = Manifest::of(stated, bytes)
            .ok_or_else(|| self.odd(target, "it is neither a manifest nor an index".to_owned()))?;
        let wanted = if by_digest { Some(target) } else { root.map(|root| root.digest.as_str()) };
        match wanted.filter(|wanted| *wanted != manifest.digest) {
            Some(wanted) => Err(self.odd(wanted, format!("it has the digest {}", manifest.digest))),
            None => Ok(manifest),
        }
    }
}

/// Finds the members of an archive.
fn members(path: &Path, work_dir: &Path) -> Result<Members, LayoutError> {
    let failed = |what: &'static str| move |source| LayoutError::File { what, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed("opening"))?;
    let mut start = [0; BLOCK];
    let len = file.read_at(&mut start, 0).map_err(failed("reading"))?;
    let packing = Packing::of(&start[..len]);
    if packing != Packing::Plain {
        let mut plain = tempfile::tempfile_in(work_dir).map_err(|source| LayoutError::File {
            what: "making a file in the work directory",
            path: work_dir.to_owned(),
            source,
        })?;
        let mut reader = packing.open(BufReader::with_capacity(256 << 10, file)).map_err(failed("opening"))?;
        io::copy(&mut reader, &mut plain).map_err(failed("unpacking to the work directory"))?;
        drop(reader);
        file = plain;
    }
    let file = Arc::new(file);
    let mut archive = Archive::new(BufReader::with_capacity(256 << 10, Whole { file: Arc::clone(&file), at: 0 }));
    let mut members = Members { file, spans: HashMap::new(), aliases: HashMap::new() };
    let name = |parts: &[u8]| {
        let parts = crate::path::clean(parts);
        parts.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/")
    };
    let read = |source| LayoutError::Archive { path: path.to_owned(), source };
    while let Some(entry) = archive.next_entry().map_err(read)? {
        let at = archive.position();
        match entry.kind {
            EntryKind::Regular => drop(members.spans.insert(name(&entry.path), at..at + entry.size)),
            EntryKind::HardLink => drop(members.aliases.insert(name(&entry.path), name(&entry.link))),
            EntryKind::Symlink => {
                let beside = [entry.path.as_slice(), b"/../", entry.link.as_slice()].concat();
                members.aliases.insert(name(&entry.path), name(&beside));
            }
            _ => {}
        }
    }
    Ok(members)
}

/// Reads a file from a position of its own.
struct Whole {
    file: Arc<File>,
    at: u64,
}

impl io::Read for Whole {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read_at(into, self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}
