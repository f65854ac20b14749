//! One layer: the entries of a tar put one after the other into a tree.
//!
//! The tree is what the directory would be into which containerd unpacks this layer alone, whiteouts included, because
//! an image must show the same files whichever snapshotter serves it. That is why a name whose directories
//! are links lands behind the links, why a later entry replaces an earlier one of the same name, why `..` stops
//! at the root, and why an entry that containerd cannot unpack is refused here too, by name and position.
//!
//! Whiteouts stay in the tree as empty files named `.wh.*`; [`crate::overlay`] acts on them. Directories that the tar does not
//! list but needs are *implied*: they are in the tree with mode 0755 and remembered in [`Layer::implied`], for they
//! take the attributes of the same directory in the layers below.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use nydus_rafs::tree::ChunkList;
use nydus_rafs::{Bootstrap, FormatError, Node, NodeId, NodeKind, Stat, Tree};

use crate::path::{self, Found, OPAQUE, Parts, PathError, WHITEOUT};
use crate::tar::{Entry, EntryKind, TarError};

pub(crate) mod acl;
pub mod estargz;
pub mod reference;
pub mod stream;

/// Marks an implied directory in the bootstrap of a single layer, so that a later merge can tell.
pub(crate) const IMPLIED_XATTR: &str = "trusted.nydus.implied";

/// How strict the rules are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// The lowest layer of an image: a whiteout removes what the layer itself brought so far.
    Lowest,
    /// A layer with others below.
    Upper,
    /// A tar on its own: everything that can be kept is kept, attributes that containerd drops too.
    Alone,
}

/// Returns what a directory is that nobody lists, where it is made in another. As the kernel has it, that one's group is handed
/// down if its set-group-ID bit is set, and so is its default access control list; the bit itself is not, for containerd
/// sets the permissions.
pub(crate) fn made_in(parent: &Node) -> Node {
    let gid = if parent.stat.permissions & 0o2000 != 0 { parent.stat.gid } else { 0 };
    let stat = Stat { permissions: 0o755, gid, ..Stat::default() };
    let mut xattrs = acl::inherited(&parent.xattrs, true);
    acl::set_permissions(&mut xattrs, stat.permissions);
    Node { stat, xattrs, kind: NodeKind::Directory(BTreeMap::new()), implied: true }
}

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It is not a readable tar.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// One of its entries has no place.
    #[error("entry `{name}` at byte {at} cannot be unpacked")]
    Entry {
        /// The entry's name.
        name: String,
        /// Position of its header in the uncompressed archive.
        at: u64,
        /// What is wrong.
        #[source]
        why: Refusal,
    },
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its path leads nowhere.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A component of its name is too long.
    #[error("a part of its name is longer than 255 bytes")]
    NameTooLong,
    /// A name with a NUL byte.
    #[error("its name holds a NUL byte")]
    NameWithNul,
    /// The target of a symbolic link is empty or too long.
    #[error("the target of a symbolic link has 1 to 4,095 bytes")]
    Target,
    /// A hard link to something that is not in this layer.
    #[error("it is a hard link to `{0}`, which this layer does not hold")]
    NoTarget(String),
    /// A hard link to a directory.
    #[error("it is a hard link to a directory")]
    DirectoryLink,
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("it is a whiteout without a usable name")]
    Whiteout,
    /// A whiteout of what the same layer brings, or a second one.
    #[error("it is a whiteout of what this layer itself brings, or has a whiteout for already")]
    WhiteoutOfOwn,
    /// An extended attribute that no Linux file system takes.
    #[error(
        "it has an extended attribute without a name, with one of more than 255 bytes or a value of more than 65,535"
    )]
    Xattr,
    /// A type that containerd does not unpack.
    #[error("it has type `{0}`, which containerd does not unpack; write the archive in pax format without it")]
    Kind(char),
    /// A directory whose time cannot be set at the end.
    #[error("it is a directory that a later entry takes away again")]
    Lost,
}

/// How much of an implied directory comes from below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implied {
    /// Everything.
    All,
    /// Extended attributes only: the layer listed the directory after something in it.
    Xattrs,
}

/// Which entries of a layer are whiteouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// Names that begin with `.wh.`.
    Oci,
    /// Character devices 0:0 and the attribute `trusted.overlay.opaque`.
    Overlayfs,
    /// None: every entry is kept.
    None,
    /// Those of an unpacked tar in an overlay mount: the tar's are names, but the mount hides such devices as well.
    Unpacked,
}

/// A layer's tree.
#[derive(Debug)]
pub struct Layer {
    /// The files, whiteouts among them.
    pub tree: Tree,
    /// Which of them are whiteouts.
    pub whiteouts: Whiteouts,
    /// Directories that the layer needs and does not (or not first) list.
    pub implied: BTreeMap<NodeId, Implied>,
    /// Regular files in the order in which their bodies came.
    pub bodies: HashMap<NodeId, BodyId>,
}

impl Layer {
    /// Takes the tree of a layer's or image's own bootstrap; its files refer to blobs by their place in the image.
    ///
    /// # Errors
    ///
    /// If the bootstrap is damaged.
    pub fn of_image<B: AsRef<[u8]>>(image: &Bootstrap<B>) -> Result<Self, FormatError> {
        let mut layer = Self {
            tree: Tree::read(image)?,
            whiteouts: Whiteouts::Unpacked,
            implied: BTreeMap::new(),
            bodies: HashMap::new(),
        };
        for id in crate::bootstrap::nodes(&layer.tree) {
            let node = layer.tree.node_mut(id);
            if node.xattrs.remove(OsStr::new(IMPLIED_XATTR)).is_some() && matches!(node.kind, NodeKind::Directory(_)) {
                layer.implied.insert(id, Implied::All);
            }
        }
        Ok(layer)
    }

    /// Marks implied directories, for the layer's own bootstrap.
    pub fn mark_implied(&mut self) {
        for (&id, &how) in &self.implied {
            if how == Implied::All {
                self.tree.node_mut(id).xattrs.insert(IMPLIED_XATTR.into(), Vec::new());
            }
        }
    }

    /// Takes the marks away again.
    pub fn unmark_implied(&mut self) {
        for &id in self.implied.keys() {
            self.tree.node_mut(id).xattrs.remove(OsStr::new(IMPLIED_XATTR));
        }
    }
}

/// The number of a file body in its layer, counted from 0 in the order of the tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BodyId(pub usize);

/// A layer in the making.
#[derive(Debug)]
pub struct LayerBuilder {
    layer: Layer,
    rules: Rules,
    /// The directories that were listed: their times are set at the very end, on whatever has the name then.
    listed: Vec<Listed>,
}

/// The header of a directory.
#[derive(Debug)]
struct Listed {
    path: Vec<u8>,
    at: u64,
    mtime: (i64, u32),
}

impl LayerBuilder {
    /// Begins with an empty root directory, mode 0755, owned by root.
    pub fn new(rules: Rules) -> Self {
        let tree = Tree::new(Stat { permissions: 0o755, ..Stat::default() });
        Self {
            layer: Layer { tree, whiteouts: Whiteouts::Unpacked, implied: BTreeMap::new(), bodies: HashMap::new() },
            rules,
            listed: Vec::new(),
        }
    }

    /// Returns the layer.
    ///
    /// # Errors
    ///
    /// If a directory that was listed is gone again: its time cannot be set then, and containerd stops there.
    pub fn finish(mut self) -> Result<Layer, LayerError> {
        for Listed { path, at, mtime } in std::mem::take(&mut self.listed) {
            self.set_time(&path, mtime).map_err(|why| LayerError::Entry {
                name: String::from_utf8_lossy(&path).into_owned(),
                at,
                why,
            })?;
        }
        Ok(self.layer)
    }

    fn set_time(&mut self, path: &[u8], mtime: (i64, u32)) -> Result<(), Refusal> {
        let parts = path::resolve(&self.layer.tree, path::clean(path))?;
        match path::find(&self.layer.tree, &parts) {
            Found::Node(id) => {
                let stat = &mut self.layer.tree.node_mut(id).stat;
                (stat.mtime, stat.mtime_nsec) = mtime;
                Ok(())
            }
            Found::Whiteout => Ok(()),
            Found::Nothing | Found::BehindLink | Found::NotADirectory => Err(Refusal::Lost),
        }
    }

    /// Returns whether the body of `entry` is part of the image; a whiteout's is not.
    pub fn wants_body(entry: &Entry) -> bool {
        let base = entry.path.rsplit(|&byte| byte == b'/').find(|part| !part.is_empty()).unwrap_or_default();
        entry.kind == EntryKind::Regular && entry.size > 0 && !base.starts_with(WHITEOUT)
    }

    /// Puts an entry into the tree; `body` is the number of its body if [`Self::wants_body`].
    pub fn add(&mut self, entry: Entry, body: Option<BodyId>) -> Result<(), LayerError> {
        let at = entry.at;
        let name = entry.path.clone();
        let refused = |why| LayerError::Entry { name: String::from_utf8_lossy(&name).into_owned(), at, why };
        self.place(entry, body).map_err(refused)
    }

    fn place(&mut self, entry: Entry, body: Option<BodyId>) -> Result<(), Refusal> {
        if entry.path.contains(&0) {
            return Err(Refusal::NameWithNul);
        }
        let mut parts = path::clean(&entry.path);
        let Some(base) = parts.pop() else {
            if self.rules == Rules::Alone && entry.kind == EntryKind::Directory {
                let stat = self.stat(&entry);
                let xattrs = self.xattrs(&entry)?;
                let root = self.layer.tree.node_mut(Tree::ROOT);
                root.stat = stat;
                root.implied = false;
                root.xattrs.extend(xattrs);
            }
            return Ok(());
        };
        if base.len() > 255 || parts.iter().any(|part| part.len() > 255) {
            return Err(Refusal::NameTooLong);
        }
        let dir = self.ensure_directory(path::resolve(&self.layer.tree, parts)?)?;
        let by_name = self.rules != Rules::Alone || entry.kind != EntryKind::Directory;
        if base.as_bytes().starts_with(WHITEOUT) && by_name {
            return self.whiteout(dir, base, &entry);
        }
        self.create(dir, base, entry, body)
    }

    fn create(&mut self, dir: NodeId, base: OsString, entry: Entry, body: Option<BodyId>) -> Result<(), Refusal> {
        if self.rules != Rules::Alone && matches!(entry.flag, b'7' | b'S') {
            return Err(Refusal::Kind(char::from(entry.flag)));
        }
        let xattrs = self.xattrs(&entry)?;
        let stat = self.stat(&entry);
        if self.rules != Rules::Alone && entry.kind == EntryKind::Directory {
            let mtime = (stat.mtime, stat.mtime_nsec);
            self.listed.push(Listed { path: entry.path.clone(), at: entry.at, mtime });
        }
        let existing = self.children(dir).get(&base).copied();
        if entry.kind == EntryKind::Directory
            && let Some(id) = existing
            && let NodeKind::Directory(_) = self.layer.tree.node(id).kind
        {
            if let Some(implied) = self.layer.implied.get_mut(&id) {
                *implied = Implied::Xattrs;
            }
            let node = self.layer.tree.node_mut(id);
            node.implied = false;
            node.xattrs.extend(xattrs);
            if self.rules != Rules::Alone {
                acl::set_permissions(&mut node.xattrs, stat.permissions);
            }
            node.stat = stat;
            return Ok(());
        }
        // What was there is gone before anything else happens, so a link to itself finds nothing.
        self.children_mut(dir).remove(&base);
        self.children_mut(dir).remove(&path::whiteout_of(&base));
        let number = device_number(entry.device);
        let kind = match entry.kind {
            EntryKind::Directory => NodeKind::Directory(BTreeMap::new()),
            EntryKind::Regular => NodeKind::Regular { size: entry.size, chunks: ChunkList::new() },
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > 4095 || entry.link.contains(&0) {
                    return Err(Refusal::Target);
                }
                NodeKind::Symlink(OsString::from_vec(entry.link))
            }
            EntryKind::CharDevice => NodeKind::CharDevice(number),
            EntryKind::BlockDevice => NodeKind::BlockDevice(number),
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::HardLink => {
                let id = match self.link_target(&entry.link)? {
                    Some(id) => id,
                    None => self.layer.tree.add(overlay_whiteout()),
                };
                let node = self.layer.tree.node_mut(id);
                let symlink = matches!(node.kind, NodeKind::Symlink(_));
                node.stat = Stat { permissions: if symlink { 0o777 } else { stat.permissions }, ..stat };
                // The change of owner that every header brings takes capabilities away.
                node.xattrs.remove(OsStr::new("security.capability"));
                node.xattrs.extend(xattrs);
                if self.rules != Rules::Alone {
                    acl::set_permissions(&mut node.xattrs, node.stat.permissions);
                }
                self.children_mut(dir).insert(base, id);
                return Ok(());
            }
        };
        let xattrs = match entry.kind {
            EntryKind::Symlink => xattrs,
            _ if self.rules == Rules::Alone => xattrs,
            kind => {
                let above = &self.layer.tree.node(dir).xattrs;
                let mut all = acl::inherited(above, kind == EntryKind::Directory);
                all.extend(xattrs);
                acl::set_permissions(&mut all, stat.permissions);
                all
            }
        };
        let id = self.layer.tree.add(Node { stat, xattrs, kind, implied: false });
        if let Some(body) = body {
            self.layer.bodies.insert(id, body);
        }
        self.children_mut(dir).insert(base, id);
        Ok(())
    }

    /// Returns what a hard link leads to; nothing if that is a whiteout, of which the link makes another.
    fn link_target(&self, link: &[u8]) -> Result<Option<NodeId>, Refusal> {
        let missing = || Refusal::NoTarget(String::from_utf8_lossy(link).into_owned());
        let (parent, base) = match link.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&link[..slash], &link[slash + 1..]),
            None => (&b""[..], link),
        };
        let mut parts = path::resolve(&self.layer.tree, path::clean(parent))?;
        match base {
            b"" | b"." | b".." => return Err(Refusal::DirectoryLink),
            base => parts.push(OsString::from_vec(base.to_vec())),
        }
        match path::find(&self.layer.tree, &parts) {
            Found::Node(id) if matches!(self.layer.tree.node(id).kind, NodeKind::Directory(_)) => {
                Err(Refusal::DirectoryLink)
            }
            // What stands for a whiteout in the tree is not there under that name.
            Found::Node(_) if self.rules != Rules::Alone && base.starts_with(WHITEOUT) => Err(missing()),
            Found::Node(id) => Ok(Some(id)),
            Found::Whiteout if self.rules != Rules::Alone => Ok(None),
            _ => Err(missing()),
        }
    }

    fn whiteout(&mut self, dir: NodeId, base: OsString, entry: &Entry) -> Result<(), Refusal> {
        let opaque = base.as_bytes() == OPAQUE;
        let hidden = OsStr::from_bytes(&base.as_bytes()[WHITEOUT.len()..]).to_owned();
        if !opaque && matches!(hidden.as_bytes(), b"" | b"." | b"..") {
            return Err(Refusal::Whiteout);
        }
        match self.rules {
            Rules::Lowest if opaque => {
                self.remove_implied(dir);
                return Ok(());
            }
            Rules::Lowest => {
                self.children_mut(dir).remove(&hidden);
                return Ok(());
            }
            Rules::Upper if !opaque => {
                let same_name = self.children(dir).get(&base).map(|&id| &self.layer.tree.node(id).kind);
                match same_name {
                    _ if self.children(dir).contains_key(&hidden) => return Err(Refusal::WhiteoutOfOwn),
                    None => {}
                    // A directory that only is named like one leaves no place for it.
                    Some(NodeKind::Directory(_)) => {
                        let id = self.layer.tree.add(overlay_whiteout());
                        self.children_mut(dir).insert(hidden, id);
                        return Ok(());
                    }
                    Some(_) => return Err(Refusal::WhiteoutOfOwn),
                }
            }
            Rules::Upper | Rules::Alone => {}
        }
        let stat = self.stat(entry);
        let kind = NodeKind::Regular { size: 0, chunks: ChunkList::new() };
        let id = self.layer.tree.add(Node { stat, xattrs: BTreeMap::new(), kind, implied: false });
        self.children_mut(dir).insert(base, id);
        Ok(())
    }

    /// Removes what the layer did not list from below an opaque directory of the lowest layer.
    fn remove_implied(&mut self, dir: NodeId) {
        let implied = &self.layer.implied;
        let is_implied = |id: &NodeId| implied.get(id) == Some(&Implied::All);
        let (gone, kept): (Vec<_>, Vec<_>) =
            self.children(dir).iter().map(|(name, &id)| (name.clone(), id)).partition(|(_, id)| is_implied(id));
        for (name, _) in gone {
            self.children_mut(dir).remove(&name);
        }
        for (_, id) in kept {
            if let NodeKind::Directory(_) = self.layer.tree.node(id).kind {
                self.remove_implied(id);
            }
        }
    }

    /// Returns the directory at `parts`, made with all above it if need be.
    fn ensure_directory(&mut self, parts: Parts) -> Result<NodeId, Refusal> {
        let mut dir = Tree::ROOT;
        for part in parts {
            let children = self.children(dir);
            dir = match children.get(&part) {
                Some(&id) => match self.layer.tree.node(id).kind {
                    NodeKind::Directory(_) => id,
                    _ => match part.as_bytes().strip_prefix(WHITEOUT) {
                        // A whiteout is not there under its own name, so a directory may be.
                        Some(hidden) if self.rules == Rules::Upper && part.as_bytes() != OPAQUE => {
                            let hidden = OsStr::from_bytes(hidden).to_owned();
                            let whiteout = self.layer.tree.add(overlay_whiteout());
                            self.children_mut(dir).insert(hidden, whiteout);
                            self.make_implied(dir, part)
                        }
                        _ => return Err(PathError::NotADirectory.into()),
                    },
                },
                None if children.contains_key(&path::whiteout_of(&part)) => {
                    return Err(PathError::NotADirectory.into());
                }
                None => self.make_implied(dir, part),
            };
        }
        Ok(dir)
    }

    fn make_implied(&mut self, dir: NodeId, name: OsString) -> NodeId {
        let id = self.layer.tree.add(made_in(self.layer.tree.node(dir)));
        self.layer.implied.insert(id, Implied::All);
        self.children_mut(dir).insert(name, id);
        id
    }

    fn children(&self, dir: NodeId) -> &BTreeMap<OsString, NodeId> {
        match &self.layer.tree.node(dir).kind {
            NodeKind::Directory(children) => children,
            _ => unreachable!("only directories are asked for children"),
        }
    }

    fn children_mut(&mut self, dir: NodeId) -> &mut BTreeMap<OsString, NodeId> {
        match &mut self.layer.tree.node_mut(dir).kind {
            NodeKind::Directory(children) => children,
            _ => unreachable!("only directories are asked for children"),
        }
    }

    fn stat(&self, entry: &Entry) -> Stat {
        // Times before 1970 or after 2262 are set to 1970 when a layer is unpacked.
        let (mtime, mtime_nsec) = match entry.mtime {
            0..9_223_372_036 => (entry.mtime, entry.mtime_nsec),
            _ => (0, 0),
        };
        // Owner -1 means "leave it": root made the file.
        let owner = |id: i64| {
            let low = u32::try_from(id & 0xffff_ffff).expect("32 bits");
            if low == u32::MAX && self.rules != Rules::Alone { 0 } else { low }
        };
        let permissions = if entry.kind == EntryKind::Symlink { 0o777 } else { entry.permissions };
        Stat { permissions, uid: owner(entry.uid), gid: owner(entry.gid), mtime, mtime_nsec, hidden_links: 0 }
    }

    /// Returns the attributes that are kept: those that a kernel would take, and `trusted.*` only for a tar on its own.
    fn xattrs(&self, entry: &Entry) -> Result<BTreeMap<OsString, Vec<u8>>, Refusal> {
        let mut kept = BTreeMap::new();
        for (name, value) in &entry.xattrs {
            let bytes = name.as_bytes();
            let nameless = matches!(bytes, b"" | b"user." | b"security.");
            if nameless || bytes.len() > 255 || value.len() > 65_535 {
                return Err(Refusal::Xattr);
            }
            let trusted = bytes.starts_with(b"trusted.");
            let known = bytes.starts_with(b"user.")
                || bytes.starts_with(b"security.")
                || bytes == b"system.posix_acl_access"
                || bytes == b"system.posix_acl_default";
            if known || trusted && self.rules == Rules::Alone {
                kept.insert(name.clone(), value.clone());
            } else if !trusted {
                tracing::warn!(entry = entry.name(), xattr = %name.display(), "extended attribute ignored: no Linux file system takes it");
            }
        }
        Ok(kept)
    }
}

/// A whiteout as overlayfs has it, under the hidden name itself.
fn overlay_whiteout() -> Node {
    Node { stat: Stat::default(), xattrs: BTreeMap::new(), kind: NodeKind::CharDevice(0), implied: false }
}

/// Returns the number of a device as `stat(2)` encodes it, low 32 bits.
fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

#[cfg(test)]
pub(crate) mod tests;
