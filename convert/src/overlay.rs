//! Layers to one tree: what an overlay mount of the unpacked layers shows.
//!
//! Layers are laid one on the other from the lowest up. A whiteout takes a name away, an opaque directory hides what
//! lies below it, a directory on a directory brings its own attributes and adds its entries, and anything else
//! replaces. Two things follow the programs that do this for real rather than the OCI text: an opaque *root* hides
//! nothing (the kernel merges the roots of all layers), and the root itself is 0755 and owned by root (its
//! entry in a layer is not unpacked).
//!
//! A file that had several names in its layer keeps their count when an upper layer hides some of them: an overlay mount
//! shows the count of the file below.
//!
//! Implied directories take the attributes of the same directory in the nearest layer below that has one, except
//! `trusted.*`; where that layer has a link there, of what the link leads to in that layer. Where no layer has one, they
//! belong to root, or to the group of a directory above that hands its group down.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use nydus_rafs::{Node, NodeId, NodeKind, Stat, Tree};

use crate::layer::{BodyId, Implied, Layer, Whiteouts, acl, made_in};
use crate::path::{self, Found, OPAQUE, Parts, PathError, WHITEOUT};

/// The tree of an image, with the origin of each regular file's bytes.
#[derive(Debug)]
pub struct Merged {
    /// The files. Chunk references name blobs by the position of their layer; those of the dictionary follow the layers.
    pub tree: Tree,
    /// Which body of which layer a regular file with data holds.
    pub bodies: HashMap<NodeId, (usize, BodyId)>,
}

/// Layers that cannot be laid on one another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "layer {layer} (counted from 0) needs the directory `{path}` without listing it, and it cannot be looked up in layer {below}"
)]
pub struct MergeError {
    /// The upper layer.
    pub layer: usize,
    /// The directory.
    pub path: String,
    /// The layer in which something that is no directory is in the way.
    pub below: usize,
    /// What is in the way.
    #[source]
    pub source: PathError,
}

/// Lays `layers`, lowest first, one on the other.
///
/// # Errors
///
/// If a directory that a layer does not list leads, in a layer below, through something that is none: containerd stops
/// there as well. Listing the directory in its layer helps.
pub fn merge(mut layers: Vec<Layer>) -> Result<Merged, MergeError> {
    if let Some(lowest) = layers.first_mut() {
        drop_whiteouts(lowest);
    }
    for at in 1..layers.len() {
        let (below, rest) = layers.split_at_mut(at);
        inherit(below, &mut rest[0], at)?;
    }
    let mut links = HashMap::new();
    let count = layers.len();
    let mut layers = layers.into_iter();
    let mut merged = match layers.next() {
        Some(lowest) => adopt(lowest, count, &mut links),
        None => Merged { tree: Tree::new(Stat { permissions: 0o755, ..Stat::default() }), bodies: HashMap::new() },
    };
    for (index, mut layer) in (1..).zip(layers) {
        let Stat { mtime, mtime_nsec, .. } = layer.tree.node(Tree::ROOT).stat;
        if (mtime, mtime_nsec) != (0, 0) {
            let stat = &mut merged.tree.node_mut(Tree::ROOT).stat;
            (stat.mtime, stat.mtime_nsec) = (mtime, mtime_nsec);
        }
        let names = count_names(&layer.tree);
        let mut laying = Laying {
            merged: &mut merged,
            layer: &mut layer,
            index,
            count,
            names: &names,
            moved: HashMap::new(),
            links: &mut links,
        };
        laying.lay(Tree::ROOT, Tree::ROOT, true);
    }
    let names = count_names(&merged.tree);
    for (id, links) in links {
        merged.tree.node_mut(id).stat.hidden_links = links.saturating_sub(names[id.0]);
    }
    Ok(merged)
}

/// Makes the lowest layer the tree on which the others are laid: nothing of it is moved, for it often is most of the image.
/// `links` gets the files of several names, with their number.
fn adopt(lowest: Layer, count: usize, links: &mut HashMap<NodeId, u32>) -> Merged {
    let Layer { mut tree, bodies: places, .. } = lowest;
    let names = count_names(&tree);
    let mut bodies = HashMap::with_capacity(places.len());
    let root = tree.node_mut(Tree::ROOT);
    let Stat { mtime, mtime_nsec, .. } = root.stat;
    root.stat = Stat { permissions: 0o755, mtime, mtime_nsec, ..Stat::default() };
    root.xattrs.clear();
    for id in crate::bootstrap::nodes(&tree) {
        let node = tree.node_mut(id);
        node.implied = id == Tree::ROOT;
        node.xattrs = visible(std::mem::take(&mut node.xattrs));
        renumber(&mut node.kind, 0, count);
        if !matches!(node.kind, NodeKind::Directory(_)) && names[id.0] > 1 {
            links.insert(id, names[id.0]);
        }
        if let Some(&body) = places.get(&id) {
            bodies.insert(id, (0, body));
        }
    }
    Merged { tree, bodies }
}

/// Has the chunks of a file name blobs as [`Merged`] does: those of layer `index` of `count` layers.
fn renumber(kind: &mut NodeKind, index: usize, count: usize) {
    if let NodeKind::Regular { chunks, .. } = kind {
        for chunk in chunks {
            let blob = chunk.blob.checked_sub(1).map_or(index, |known| count + usize::from(known));
            chunk.blob = u16::try_from(blob).unwrap_or(u16::MAX);
        }
    }
}

/// Takes whiteouts out of the lowest layer: where nothing lies below, unpacking leaves nothing of them.
fn drop_whiteouts(layer: &mut Layer) {
    let (tree, whiteouts) = (&mut layer.tree, layer.whiteouts);
    for dir in crate::bootstrap::nodes(tree) {
        let Some(children) = tree.children(dir) else { continue };
        let hiding = children.iter().filter(|&(name, &id)| hidden(name, tree.node(id), whiteouts).is_some());
        let names: Vec<OsString> = hiding.map(|(name, _)| name.clone()).collect();
        if let NodeKind::Directory(children) = &mut tree.node_mut(dir).kind {
            children.retain(|name, _| !names.contains(name));
        }
    }
}

/// Returns how many names each node has, by its number.
fn count_names(tree: &Tree) -> Vec<u32> {
    let mut names = vec![0; tree.len()];
    let mut open = vec![Tree::ROOT];
    while let Some(dir) = open.pop() {
        for &child in tree.children(dir).into_iter().flat_map(BTreeMap::values) {
            names[child.0] += 1;
            if let NodeKind::Directory(_) = tree.node(child).kind {
                open.push(child);
            }
        }
    }
    names
}

/// Gives the implied directories of `layer` what they take from the layers below, lowest first.
fn inherit(below: &[Layer], layer: &mut Layer, number: usize) -> Result<(), MergeError> {
    if layer.implied.is_empty() {
        return Ok(());
    }
    let mut places = Vec::new();
    collect_implied(layer, (Tree::ROOT, Tree::ROOT), &mut Parts::new(), &mut places);
    for Place { id, parent, how, parts } in places {
        let mut found = Looked::Unknown;
        for (at, lower) in below.iter().enumerate().rev() {
            found = look(lower, &parts).map_err(|source| MergeError {
                layer: number,
                path: parts.iter().map(|part| format!("/{}", part.display())).collect(),
                below: at,
                source,
            })?;
            if !matches!(found, Looked::Unknown) {
                break;
            }
        }
        let Looked::Directory(stat, xattrs) = found else {
            if how == Implied::All && layer.implied.get(&parent) == Some(&Implied::All) {
                let made = made_in(layer.tree.node(parent));
                let node = layer.tree.node_mut(id);
                (node.stat, node.xattrs) = (made.stat, made.xattrs);
            }
            continue;
        };
        let node = layer.tree.node_mut(id);
        match how {
            Implied::All => {
                node.stat = stat;
                node.xattrs.extend(xattrs);
                hand_down(&mut layer.tree, id);
            }
            Implied::Xattrs => {
                for (name, value) in xattrs {
                    node.xattrs.entry(name).or_insert(value);
                }
            }
        }
    }
    Ok(())
}

/// Gives what a layer made in a directory the access control lists that the directory took from below.
fn hand_down(tree: &mut Tree, dir: NodeId) {
    let lists = |directory| acl::inherited(&tree.node(dir).xattrs, directory);
    let (for_files, for_directories) = (lists(false), lists(true));
    if for_files.is_empty() {
        return;
    }
    for child in tree.children(dir).into_iter().flat_map(BTreeMap::values).copied().collect::<Vec<_>>() {
        let node = tree.node_mut(child);
        let directory = matches!(node.kind, NodeKind::Directory(_));
        if matches!(node.kind, NodeKind::Symlink(_)) {
            continue;
        }
        for (name, list) in if directory { &for_directories } else { &for_files } {
            node.xattrs.entry(name.clone()).or_insert_with(|| list.clone());
        }
        acl::set_permissions(&mut node.xattrs, node.stat.permissions);
        if directory {
            hand_down(tree, child);
        }
    }
}

/// An implied directory.
struct Place {
    id: NodeId,
    parent: NodeId,
    how: Implied,
    parts: Parts,
}

/// Collects the implied directories from `dir` down, which lies in `parent`: each after those above it.
fn collect_implied(layer: &Layer, (parent, dir): (NodeId, NodeId), parts: &mut Parts, places: &mut Vec<Place>) {
    if let Some(&how) = layer.implied.get(&dir) {
        places.push(Place { id: dir, parent, how, parts: parts.clone() });
    }
    let NodeKind::Directory(children) = &layer.tree.node(dir).kind else { return };
    for (name, &id) in children {
        if let NodeKind::Directory(_) = layer.tree.node(id).kind {
            parts.push(name.clone());
            collect_implied(layer, (dir, id), parts, places);
            parts.pop();
        }
    }
}

/// What a layer has at a path.
enum Looked {
    /// Nothing.
    Unknown,
    /// Something that is no directory, and so nothing to take attributes from.
    Replaced,
    /// A directory.
    Directory(Stat, BTreeMap<OsString, Vec<u8>>),
}

fn look(lower: &Layer, parts: &Parts) -> Result<Looked, PathError> {
    let parts = path::resolve(&lower.tree, parts.clone())?;
    let id = match path::find(&lower.tree, &parts) {
        Found::Node(id) => id,
        Found::Nothing | Found::BehindLink => return Ok(Looked::Unknown),
        Found::Whiteout => return Ok(Looked::Replaced),
        Found::NotADirectory => return Err(PathError::NotADirectory),
    };
    let node = lower.tree.node(id);
    let NodeKind::Directory(_) = node.kind else { return Ok(Looked::Replaced) };
    let kept = node.xattrs.iter().filter(|(name, _)| !name.as_bytes().starts_with(b"trusted."));
    Ok(Looked::Directory(node.stat.clone(), kept.map(|(name, value)| (name.clone(), value.clone())).collect()))
}

struct Laying<'m> {
    merged: &'m mut Merged,
    layer: &'m mut Layer,
    index: usize,
    /// How many layers there are.
    count: usize,
    /// How many names each node of the layer has in it.
    names: &'m [u32],
    /// Where the nodes of the layer went, so that hard links stay together.
    moved: HashMap<NodeId, NodeId>,
    /// The same count for the nodes of the merged tree, where it is more than one.
    links: &'m mut HashMap<NodeId, u32>,
}

impl Laying<'_> {
    /// Lays the entries of directory `upper` of the layer on directory `lower` of the merged tree.
    fn lay(&mut self, upper: NodeId, lower: NodeId, root: bool) {
        let NodeKind::Directory(entries) = &mut self.layer.tree.node_mut(upper).kind else { return };
        let entries = std::mem::take(entries);
        let whiteouts = self.layer.whiteouts;
        let opaque = whiteouts != Whiteouts::None && entries.contains_key(OsStr::from_bytes(OPAQUE));
        if !root && opaque {
            self.children(lower).clear();
        }
        for (name, &id) in &entries {
            if let Some(hidden) = hidden(name, self.layer.tree.node(id), whiteouts) {
                self.children(lower).remove(hidden);
            }
        }
        for (name, id) in entries {
            if hidden(&name, self.layer.tree.node(id), whiteouts).is_some() {
                continue;
            }
            let existing = self.children(lower).get(&name).copied();
            let is_dir = |node: &Node| matches!(node.kind, NodeKind::Directory(_));
            if is_dir(self.layer.tree.node(id)) {
                let target = match existing.filter(|&existing| is_dir(self.merged.tree.node(existing))) {
                    Some(existing) => existing,
                    None => {
                        let kind = NodeKind::Directory(BTreeMap::new());
                        let new = self.merged.tree.add(Node {
                            stat: Stat::default(),
                            xattrs: BTreeMap::new(),
                            kind,
                            implied: false,
                        });
                        self.children(lower).insert(name, new);
                        new
                    }
                };
                let from = self.layer.tree.node_mut(id);
                let (stat, xattrs) = (from.stat.clone(), std::mem::take(&mut from.xattrs));
                let node = self.merged.tree.node_mut(target);
                (node.stat, node.xattrs) = (stat, visible(xattrs));
                self.lay(id, target, false);
            } else {
                let new = self.carry(id);
                self.children(lower).insert(name, new);
            }
        }
    }

    /// Returns the merged tree's node for a file of the layer.
    fn carry(&mut self, id: NodeId) -> NodeId {
        if let Some(&new) = self.moved.get(&id) {
            return new;
        }
        let from = self.layer.tree.node_mut(id);
        let xattrs = visible(std::mem::take(&mut from.xattrs));
        let mut kind = std::mem::replace(&mut from.kind, NodeKind::Fifo);
        renumber(&mut kind, self.index, self.count);
        let new = self.merged.tree.add(Node { stat: from.stat.clone(), xattrs, kind, implied: false });
        if let Some(&body) = self.layer.bodies.get(&id) {
            self.merged.bodies.insert(new, (self.index, body));
        }
        if self.names[id.0] > 1 {
            self.links.insert(new, self.names[id.0]);
        }
        self.moved.insert(id, new);
        new
    }

    fn children(&mut self, dir: NodeId) -> &mut BTreeMap<OsString, NodeId> {
        match &mut self.merged.tree.node_mut(dir).kind {
            NodeKind::Directory(children) => children,
            _ => unreachable!("only directories are laid upon"),
        }
    }
}

/// Returns the name that an entry hides, if hiding is what it is for: an empty name if it only marks its directory.
fn hidden<'n>(name: &'n OsStr, node: &Node, whiteouts: Whiteouts) -> Option<&'n OsStr> {
    let by_device = matches!(whiteouts, Whiteouts::Overlayfs | Whiteouts::Unpacked);
    let by_name = matches!(whiteouts, Whiteouts::Oci | Whiteouts::Unpacked);
    match node.kind {
        NodeKind::Directory(_) => None,
        NodeKind::CharDevice(0) if by_device => Some(name),
        // Those who read overlayfs's own attribute put this name in its place.
        _ if name.as_bytes() == OPAQUE && whiteouts != Whiteouts::None => Some(OsStr::new("")),
        _ if by_name => name.as_bytes().strip_prefix(WHITEOUT).map(OsStr::from_bytes),
        _ => None,
    }
}

/// Takes away what an overlay mount does not show.
fn visible(mut xattrs: BTreeMap<OsString, Vec<u8>>) -> BTreeMap<OsString, Vec<u8>> {
    xattrs.retain(|name, _| !name.as_bytes().starts_with(b"trusted.overlay."));
    xattrs
}

#[cfg(test)]
mod tests;
