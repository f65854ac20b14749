//! Paths inside a tree, and where they lead when some of their directories are symbolic links.
//!
//! A name in a layer never leaves the root: `..` stops there, and links are followed inside the tree only. The rule for
//! links is that of the program which unpacks layers elsewhere: all links of a path are replaced by their text at once,
//! `..` is then taken away as text, and this is repeated until no link is left.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use nydus_rafs::{NodeId, NodeKind, Tree};

/// A path as its components, from the root.
pub(crate) type Parts = Vec<OsString>;

/// The most links that one path may lead through.
const LINKS: usize = 255;

/// Why a path leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Links that lead to each other.
    #[error("its path leads through more than 255 symbolic links")]
    TooManyLinks,
    /// Something on the way is no directory.
    #[error("its path leads through something that is not a directory")]
    NotADirectory,
}

/// Splits a path as written into components: no empty ones, no `.`, and `..` taken away as text, never above the root.
pub(crate) fn clean(path: &[u8]) -> Parts {
    let mut parts = Parts::new();
    push_clean(&mut parts, path);
    parts
}

fn push_clean(parts: &mut Parts, path: &[u8]) {
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(OsString::from_vec(part.to_vec())),
        }
    }
}

/// Returns the path that `parts` lead to once all links, the last one too, are followed. What does not exist is kept
/// as written.
pub(crate) fn resolve(tree: &Tree, parts: Parts) -> Result<Parts, PathError> {
    let mut parts = parts;
    let mut walked = 0;
    loop {
        let before = walked;
        let mut out = Parts::new();
        for part in &parts {
            out.push(part.clone());
            match find(tree, &out) {
                Found::Node(id) => {
                    if let NodeKind::Symlink(target) = &tree.node(id).kind {
                        walked += 1;
                        if walked > LINKS {
                            return Err(PathError::TooManyLinks);
                        }
                        out.pop();
                        let target = target.as_bytes();
                        if target.starts_with(b"/") {
                            out.clear();
                        }
                        push_clean(&mut out, target);
                    }
                }
                Found::Nothing | Found::BehindLink | Found::Whiteout => {}
                Found::NotADirectory => return Err(PathError::NotADirectory),
            }
        }
        parts = out;
        if walked == before {
            return Ok(parts);
        }
    }
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// This node.
    Node(NodeId),
    /// Nothing.
    Nothing,
    /// A whiteout.
    Whiteout,
    /// Something on the way is a link.
    BehindLink,
    /// Something on the way is neither a directory nor a link.
    NotADirectory,
}

/// Returns what is at a path, without following links.
pub(crate) fn find(tree: &Tree, parts: &[OsString]) -> Found {
    let mut id = Tree::ROOT;
    for (at, part) in parts.iter().enumerate() {
        match &tree.node(id).kind {
            NodeKind::Directory(children) => match children.get(part) {
                Some(&child) => id = child,
                // A whiteout is a device there: found itself, and no way to what would be below.
                None if children.contains_key(&whiteout_of(part)) => {
                    return if at + 1 == parts.len() { Found::Whiteout } else { Found::NotADirectory };
                }
                None => return Found::Nothing,
            },
            NodeKind::Symlink(_) => return Found::BehindLink,
            _ => return Found::NotADirectory,
        }
    }
    Found::Node(id)
}

/// The prefix of the name of a whiteout.
pub(crate) const WHITEOUT: &[u8] = b".wh.";

/// The name of the entry that makes its directory opaque.
pub(crate) const OPAQUE: &[u8] = b".wh..wh..opq";

/// Returns the name of the whiteout that removes `name`.
pub(crate) fn whiteout_of(name: &OsStr) -> OsString {
    OsString::from_vec([WHITEOUT, name.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nydus_rafs::{Node, Stat};

    use super::*;

    fn text(parts: &Parts) -> String {
        parts.iter().map(|part| format!("/{}", part.display())).collect()
    }

    #[test]
    fn names_stay_below_the_root() {
        for (path, wanted) in
            [("../a", "/a"), ("/a/../../b", "/b"), ("./a//b/.", "/a/b"), ("..", ""), ("", ""), ("a/../b/c", "/b/c")]
        {
            assert_eq!(text(&clean(path.as_bytes())), wanted, "{path}");
        }
    }

    #[test]
    fn links_are_followed_inside_the_root() {
        let mut tree = Tree::new(Stat::default());
        for (name, target) in [("abs", "/etc"), ("up", "../../x"), ("loop", "loop"), ("twice", "abs/sub")] {
            let kind = NodeKind::Symlink(target.into());
            let id = tree.add(Node { stat: Stat::default(), xattrs: BTreeMap::new(), kind, implied: false });
            let NodeKind::Directory(children) = &mut tree.node_mut(Tree::ROOT).kind else { unreachable!() };
            children.insert(name.into(), id);
        }
        let resolved = |path: &str| resolve(&tree, clean(path.as_bytes())).map(|parts| text(&parts));
        assert_eq!(resolved("abs/f"), Ok("/etc/f".into()));
        assert_eq!(resolved("up/f"), Ok("/x/f".into()));
        assert_eq!(resolved("twice/f"), Ok("/etc/sub/f".into()));
        assert_eq!(resolved("loop/f"), Err(PathError::TooManyLinks));
    }
}
