//! `nydus-image unpack`: the files of an image in a tar.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nydus_backend::Config;
use nydus_rafs::{Attr, Bootstrap, Ino, Kind};

use super::contents::Contents;
use crate::layer::IMPLIED_XATTR;
use crate::tar::write::{self, Header};

/// Writes the files of `image` into a pax tar at `output`, which may be a pipe.
///
/// The root has no entry, sockets have none for a tar cannot hold them, and names of one file are hard links to the first.
///
/// # Errors
///
/// If the image or a blob is damaged or missing, or the tar cannot be written.
pub fn unpack(image: Bootstrap<Vec<u8>>, backend: &Config, output: &Path) -> anyhow::Result<()> {
    let contents = Contents::open(image, backend)?;
    let file = super::output::open_stream(output)?;
    let mut unpacking = Unpacking { contents, out: BufWriter::with_capacity(256 << 10, file), names: HashMap::new() };
    let root = unpacking.contents.image.root();
    unpacking.directory(root)?;
    let context = || format!("writing {}", output.display());
    write::end(&mut unpacking.out).with_context(context)?;
    unpacking.out.flush().with_context(context)
}

struct Unpacking {
    contents: Contents,
    out: BufWriter<File>,
    /// First name of files with several.
    names: HashMap<Ino, PathBuf>,
}

impl Unpacking {
    /// Writes all below a directory, each directory with all in it before what comes after it.
    fn directory(&mut self, root: Ino) -> anyhow::Result<()> {
        let mut open = self.children(root, Path::new(""))?;
        while let Some((ino, path)) = open.pop() {
            let attr = self.contents.image.attr(ino)?;
            self.entry(attr, &path).with_context(|| format!("unpacking /{}", path.display()))?;
            if attr.kind == Kind::Directory {
                open.extend(self.children(ino, &path)?);
            }
        }
        Ok(())
    }

    /// Returns the entries of a directory, the last name first.
    fn children(&self, dir: Ino, path: &Path) -> anyhow::Result<Vec<(Ino, PathBuf)>> {
        let mut children = Vec::new();
        for entry in self.contents.image.entries(dir, 0)? {
            let entry = entry?;
            if entry.name != "." && entry.name != ".." {
                children.push((entry.ino, path.join(entry.name)));
            }
        }
        children.reverse();
        Ok(children)
    }

    fn entry(&mut self, attr: Attr, path: &Path) -> anyhow::Result<()> {
        let image = &self.contents.image;
        let mut name = path.as_os_str().as_bytes().to_vec();
        let mut xattrs = image.xattrs(attr.ino)?;
        // A note to whoever merges layers, not a part of the files.
        xattrs.retain(|(name, _)| name != IMPLIED_XATTR);
        let mut header = Header {
            mode: u32::from(attr.permissions),
            uid: attr.uid.unwrap_or(0),
            gid: attr.gid.unwrap_or(0),
            mtime: (attr.mtime, attr.mtime_nsec),
            xattrs: xattrs.iter().map(|(name, value)| (name.as_bytes(), &value[..])).collect(),
            ..Header::default()
        };
        let first =
            if attr.nlink > 1 && attr.kind != Kind::Directory { self.names.get(&attr.ino).cloned() } else { None };
        let target: OsString;
        if let Some(first) = &first {
            (header.kind, header.link) = (b'1', first.as_os_str().as_bytes());
            header.name = &name;
            return Ok(header.write(&mut self.out)?);
        }
        match attr.kind {
            Kind::Directory => {
                name.push(b'/');
                header.kind = b'5';
            }
            Kind::Regular => (header.kind, header.size) = (b'0', attr.size),
            Kind::Symlink => {
                target = image.readlink(attr.ino)?;
                (header.kind, header.link) = (b'2', target.as_bytes());
            }
            Kind::CharDevice | Kind::BlockDevice => {
                header.kind = if attr.kind == Kind::CharDevice { b'3' } else { b'4' };
                header.device = (attr.rdev >> 8 & 0xfff, attr.rdev & 0xff | attr.rdev >> 12 & 0xf_ff00);
            }
            Kind::Fifo => header.kind = b'6',
            Kind::Socket => {
                tracing::warn!(path = %path.display(), "left out: a tar holds no sockets");
                return Ok(());
            }
        }
        header.name = &name;
        header.write(&mut self.out)?;
        if attr.kind == Kind::Regular {
            self.contents.copy(attr.ino, &mut self.out)?;
            write::pad(&mut self.out, attr.size)?;
        }
        if attr.nlink > 1 {
            self.names.insert(attr.ino, path.to_owned());
        }
        Ok(())
    }
}
