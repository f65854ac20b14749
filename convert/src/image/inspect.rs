//! `nydus-image inspect`: looking around in a bootstrap, at a prompt or one question at a time.
//!
//! Words and forms are those that scripts expect: tables and the prefetch list as JSON, files as text.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nydus_rafs::{Bootstrap, FormatError, Ino, Kind, NodeId, NodeKind, Tree};
use serde_json::{Value, json};

/// What can be asked.
pub const HELP: &str = "
    stats:              How many inodes there are
    ls:                 Files of the current directory
    cd DIR:             Change the current directory
    stat FILE_NAME:     Attributes of a file of the current directory
    blobs:              The blobs
    prefetch:           What is fetched first
    chunk OFFSET:       Chunks stored at this place of their blob, and the files that hold them
    icheck INODE:       The path of an inode
    exit:               Leave
";

/// A question that is none.
#[derive(Debug, thiserror::Error)]
pub enum Unclear {
    /// Not a command.
    #[error("Unsupported command: {0}")]
    Command(String),
    /// A command that makes no sense alone.
    #[error("{0} is not supported in inspect request mode")]
    Request(String),
    /// An argument is missing or wrong.
    #[error("{0}")]
    Argument(String),
}

/// A bootstrap, and where in it one is.
#[derive(Debug)]
pub struct Inspector {
    image: Bootstrap<Vec<u8>>,
    here: PathBuf,
}

impl Inspector {
    /// Begins at the root.
    pub fn new(image: Bootstrap<Vec<u8>>) -> Self {
        Self { image, here: PathBuf::from("/") }
    }

    /// Answers one question: text first, then JSON; `null` where the answer is text.
    ///
    /// # Errors
    ///
    /// [`Unclear`] if it is none, and whatever is wrong with the bootstrap.
    pub fn request(&mut self, line: &str) -> anyhow::Result<String> {
        if matches!(line.trim(), "help" | "exit" | "q" | "") {
            return Err(Unclear::Request(line.trim().to_owned()).into());
        }
        let (mut text, value) = self.answer(line)?;
        write!(text, "{value}")?;
        Ok(text)
    }

    /// Asks for questions until there are no more, or one is to leave.
    ///
    /// # Errors
    ///
    /// If `input` cannot be read or `out` not written.
    pub fn converse(&mut self, input: impl BufRead, out: &mut impl Write) -> io::Result<()> {
        let mut lines = input.lines();
        loop {
            write!(out, "Inspecting RAFS :> ")?;
            out.flush()?;
            let Some(line) = lines.next().transpose()? else { return Ok(()) };
            match line.trim() {
                "exit" | "q" => return Ok(()),
                "" => {}
                "help" => write!(out, "{HELP}")?,
                line => match self.answer(line) {
                    Ok((text, Value::Null)) => write!(out, "{text}")?,
                    Ok((text, value)) => writeln!(out, "{text}{value:#}")?,
                    Err(error) => writeln!(out, "{error:#}")?,
                },
            }
        }
    }

    fn answer(&mut self, line: &str) -> anyhow::Result<(String, Value)> {
        let (command, argument) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let argument = argument.trim();
        let number = || {
            argument
                .parse::<u64>()
                .map_err(|_| Unclear::Argument(format!("{command} wants a number, not `{argument}`")))
        };
        match command {
            "stats" => Ok((String::new(), json!({ "inodes_count": self.image.inode_count() }))),
            "blobs" => Ok((String::new(), self.blobs())),
            "prefetch" => Ok((String::new(), self.prefetch()?)),
            "ls" => Ok((self.list()?, Value::Null)),
            "cd" => {
                let to = self.resolve(argument);
                if self.image.attr(self.find(&to)?)?.kind != Kind::Directory {
                    return Err(Unclear::Argument(format!("{} is not a directory", to.display())).into());
                }
                self.here = to;
                Ok((String::new(), Value::Null))
            }
            "stat" => Ok((self.stat(argument)?, Value::Null)),
            "chunk" => Ok((self.chunk(number()?)?, Value::Null)),
            "icheck" => {
                let ino = Ino(number()?);
                let paths: Vec<_> = self.paths()?.into_iter().filter(|(_, found)| *found == ino).collect();
                if paths.is_empty() {
                    bail!("there is no inode {}", ino.0);
                }
                Ok((paths.iter().map(|(path, _)| format!("{}\n", path.display())).collect(), Value::Null))
            }
            other => Err(Unclear::Command(other.to_owned()).into()),
        }
    }

    /// Returns a path from the root; `..` goes up.
    fn resolve(&self, to: &str) -> PathBuf {
        let mut path = if to.starts_with('/') { PathBuf::from("/") } else { self.here.clone() };
        for part in to.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(path.pop()),
                part => path.push(part),
            }
        }
        path
    }

    fn find(&self, path: &Path) -> anyhow::Result<Ino> {
        let mut ino = self.image.root();
        for part in path.iter().skip(1) {
            let found = self.image.lookup(ino, part).with_context(|| format!("looking up {}", path.display()))?;
            ino = found.with_context(|| format!("there is no {}", path.display()))?;
        }
        Ok(ino)
    }

    fn blobs(&self) -> Value {
        let blobs = self.image.blobs().iter().map(|blob| {
            json!({
                "blob_id": blob.id.as_str(),
                "readahead_offset": 0,
                "readahead_size": blob.prefetch_size,
                "decompressed_size": blob.plain_size,
                "compressed_size": blob.stored_size,
            })
        });
        Value::Array(blobs.collect())
    }

    fn prefetch(&self) -> anyhow::Result<Value> {
        let paths = self.paths()?;
        let mut found = Vec::new();
        for ino in self.image.prefetch()? {
            let slash =
                if self.image.attr(ino)?.kind == Kind::Directory && ino != self.image.root() { "/" } else { "" };
            let of_ino = paths.iter().filter(|(_, other)| *other == ino);
            let names: Vec<String> = of_ino.map(|(path, _)| format!("{}{slash}", path.display())).collect();
            found.push(json!({ "inode": ino.0, "path": names }));
        }
        Ok(Value::Array(found))
    }

    fn list(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        for entry in self.image.entries(self.find(&self.here)?, 0)? {
            let entry = entry?;
            if entry.name == "." || entry.name == ".." {
                continue;
            }
            let kind = match entry.kind {
                Kind::Regular => '-',
                Kind::Directory => 'd',
                Kind::Symlink => 'l',
                Kind::CharDevice => 'c',
                Kind::BlockDevice => 'b',
                Kind::Fifo => 'p',
                Kind::Socket => 's',
            };
            writeln!(text, "{kind}    {:<7}  {:?}", entry.ino.0, entry.name)?;
        }
        Ok(text)
    }

    fn stat(&self, name: &str) -> anyhow::Result<String> {
        if name.is_empty() {
            return Err(Unclear::Argument("stat wants the name of a file".to_owned()).into());
        }
        let path = self.resolve(name);
        let (ino, parent) = (self.find(&path)?, self.find(path.parent().unwrap_or(Path::new("/")))?);
        let attr = self.image.attr(ino)?;
        let mode = attr.kind.mode() | u32::from(attr.permissions);
        let name = path.file_name().unwrap_or(OsStr::new("/"));
        let mut text = format!(
            "\nInode Number:       {}\nName:               {name:?}\nSize:               {}\nParent:             {}\n",
            ino.0, attr.size, parent.0
        );
        writeln!(
            text,
            "Mode:               {mode:#X}\nPermissions:        {mode:o}\nNlink:              {}",
            attr.nlink
        )?;
        writeln!(text, "UID:                {}\nGID:                {}", attr.uid.unwrap_or(0), attr.gid.unwrap_or(0))?;
        writeln!(text, "Mtime:              {}\nMtimeNsec:          {}", attr.mtime, attr.mtime_nsec)?;
        writeln!(text, "Blocks:             {}", attr.size.div_ceil(512))?;
        if attr.kind == Kind::Symlink {
            writeln!(text, "Symlink:            {:?}", self.image.readlink(ino)?)?;
        }
        for (name, value) in self.image.xattrs(ino)? {
            writeln!(text, "Xattr:              {name:?} {}", hex::encode(value))?;
        }
        if attr.kind == Kind::Regular {
            for extent in self.image.extents(ino, 0..u64::MAX)? {
                let extent = extent?;
                writeln!(
                    text,
                    "Chunk:              blob {}, index {}, file {:?}, plain {:?}",
                    extent.blob, extent.chunk.0, extent.file, extent.plain
                )?;
            }
        }
        Ok(text)
    }

    fn chunk(&self, offset: u64) -> anyhow::Result<String> {
        let mut text = String::new();
        let paths = self.paths()?;
        for (number, info) in (0..).zip(self.image.blobs()) {
            for chunk in self.image.chunks(number)?.all().iter().filter(|chunk| chunk.stored.start == offset) {
                writeln!(
                    text,
                    "blob {} index {} digest {} stored {:?} plain {:?}",
                    info.id,
                    chunk.index.0,
                    chunk.digest.map_or_else(|| "none".to_owned(), |digest| digest.to_string()),
                    chunk.stored,
                    chunk.plain
                )?;
                for (path, ino) in
                    paths.iter().filter(|(_, ino)| self.image.attr(*ino).is_ok_and(|attr| attr.kind == Kind::Regular))
                {
                    let mut extents = self.image.extents(*ino, 0..u64::MAX)?;
                    if extents
                        .any(|extent| extent.is_ok_and(|extent| extent.blob == number && extent.chunk == chunk.index))
                    {
                        writeln!(text, "    {}", path.display())?;
                    }
                }
            }
        }
        Ok(text)
    }

    /// Returns all paths with their inodes, in the order of directories.
    fn paths(&self) -> Result<Vec<(PathBuf, Ino)>, FormatError> {
        let reading = nydus_rafs::tree::Reading::of(&self.image)?;
        let inos: std::collections::HashMap<NodeId, Ino> = reading.nodes.iter().map(|(&ino, &id)| (id, ino)).collect();
        let mut paths = Vec::new();
        let mut open = vec![(Tree::ROOT, PathBuf::from("/"))];
        while let Some((id, path)) = open.pop() {
            if let NodeKind::Directory(children) = &reading.tree.node(id).kind {
                open.extend(children.iter().rev().map(|(name, &child)| (child, path.join(name))));
            }
            paths.push((path, inos[&id]));
        }
        Ok(paths)
    }
}

#[cfg(test)]
mod tests {
    use nydus_rafs::write::{Options, write};
    use nydus_rafs::{Node, Stat};

    use super::*;

    fn inspector() -> Inspector {
        let mut tree = Tree::new(Stat::default());
        let node = |kind| Node { stat: Stat::default(), xattrs: Default::default(), kind, implied: false };
        let link = tree.add(node(NodeKind::Symlink("to".into())));
        let dir = tree.add(node(NodeKind::Directory([("link".into(), link)].into())));
        tree.node_mut(Tree::ROOT).kind = NodeKind::Directory([("dir".into(), dir)].into());
        let image = write::<nydus_rafs::ChunkTable>(&tree, &[], &[], &Options::default()).unwrap();
        Inspector::new(Bootstrap::open(image).unwrap())
    }

    #[test]
    fn requests_are_answered_as_scripts_expect() {
        let ask = |line: &str| inspector().request(line);
        assert_eq!(ask("stats").unwrap(), r#"{"inodes_count":3}"#);
        assert_eq!(ask("blobs").unwrap(), "[]");
        assert_eq!(ask("prefetch").unwrap(), "[]");
        assert_eq!(ask("icheck 128").unwrap(), "/\nnull");
        let listed = ask("ls").unwrap();
        assert!(listed.starts_with("d    ") && listed.ends_with("\"dir\"\nnull"), "{listed}");
        assert!(ask("stat dir/link").unwrap().contains("Symlink:            \"to\""));
        for wrong in ["help", "bogus", "stat", "stat nothing", "chunk x", "icheck 5", "cd dir/link"] {
            assert!(ask(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_conversation_walks_through_the_tree_until_it_ends() {
        let mut said = Vec::new();
        inspector().converse(&b"cd dir\nls\nbogus\ncd ..\nls\nq\nls\n"[..], &mut said).unwrap();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(said.matches("Inspecting RAFS :> ").count(), 6);
        assert!(said.contains("\"link\"") && said.contains("\"dir\"") && said.contains("Unsupported command: bogus"));
    }
}
