//! A small image with a little of everything: hard links, whiteouts, an opaque directory, a FIFO, set-uid,
//! xattrs, long and non-UTF-8 names, and a shell to look at them with.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::image::Layer;
use crate::needs::program;

/// Size of `/data/random`, which spans several chunks of 1 MiB.
pub const RANDOM_BYTES: usize = (3 << 20) + 1234;

/// Checks what the layers must have made of the tree, and prints a line that ends in `checked`.
pub const CHECK: &str = "set -e; test ! -e /etc/deleted; test ! -e /opaque/old; test \"$(cat /opaque/new)\" = new; \
test \"$(cat /etc/replaced)\" = third; test -p /data/fifo; test -u /bin/suid; \
test \"$(cat /data/link)\" = \"$(cat /data/text)\"; test -d /replaced-by-dir; \
n=$(find /data/small -type f | wc -l); test $n = 200; cat /data/small/* >/dev/null; echo \"$n files checked\"";

/// The bytes of `/data/random`: not compressible, the same every time.
pub fn random() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(RANDOM_BYTES + 8);
    while bytes.len() < RANDOM_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(RANDOM_BYTES);
    bytes
}

/// Makes the three layers as uncompressed tars.
pub fn tars() -> Result<Vec<Vec<u8>>> {
    let busybox = std::fs::read(program("busybox").context("busybox-static is not installed")?)?;

    let mut one = Tar::default();
    for dir in ["bin", "etc", "proc", "sys", "dev", "opaque", "usr", "usr/bin"] {
        one.dir(dir, 0o755)?;
    }
    one.dir("tmp", 0o1777)?;
    one.file("bin/busybox", 0o755, &busybox)?;
    for applet in
        ["sh", "cat", "test", "[", "find", "wc", "sha256sum", "sleep", "ls", "echo", "true", "stat", "cut", "dd"]
    {
        one.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    one.hard_link("bin/hard", "bin/busybox")?;
    one.file("bin/suid", 0o4755, b"#!/bin/sh\n")?;
    one.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n")?;
    one.file("etc/deleted", 0o644, b"gone\n")?;
    one.file("etc/replaced", 0o644, b"first\n")?;
    one.file("opaque/old", 0o644, b"old\n")?;
    one.file("replaced-by-dir", 0o644, b"a file at first\n")?;

    let mut two = Tar::default();
    two.dir("data", 0o755)?;
    two.dir("data/small", 0o750)?;
    for i in 0..200_usize {
        two.file(&format!("data/small/f{i:03}"), 0o644, format!("{i}\n").repeat(i * 7).as_bytes())?;
    }
    two.file("data/random", 0o644, &random())?;
    two.file("data/zeros", 0o644, &vec![0; 2 << 20])?;
    two.file("data/empty", 0o600, b"")?;
    two.xattr("user.note", b"hello\nworld")?;
    two.file("data/text", 0o644, b"some text\n")?;
    two.hard_link("data/link", "data/text")?;
    two.symlink("data/dangling", "/no/such/place")?;
    two.special("data/fifo", tar::EntryType::Fifo, 0, 0)?;
    two.special("data/null", tar::EntryType::Char, 1, 3)?;
    two.file(&format!("data/{}", "long".repeat(60)), 0o644, b"a long name\n")?;
    two.bytes(b"data/not-utf8-\xff\xfe", 0o644, b"bytes\n")?;

    let mut three = Tar::default();
    three.file("etc/.wh.deleted", 0o644, b"")?;
    three.file("etc/replaced", 0o600, b"third\n")?;
    three.dir("opaque", 0o711)?;
    three.file("opaque/.wh..wh..opq", 0o644, b"")?;
    three.file("opaque/new", 0o644, b"new\n")?;
    three.dir("replaced-by-dir", 0o755)?;
    three.file("replaced-by-dir/inner", 0o644, b"inner\n")?;
    // No entries for the directories above: containerd makes or keeps them.
    three.file("var/lib/implied/file", 0o644, b"implied\n")?;
    [one, two, three].into_iter().map(Tar::finish).collect()
}

/// Makes the three layers.
pub fn layers() -> Result<Vec<Layer>> {
    tars()?.iter().map(|tar| Layer::new(tar)).collect()
}

/// Makes a layer of files below `/noise` that cannot be compressed.
pub fn noise(name: &str, bytes: &[u8], file: usize) -> Result<Layer> {
    let mut tar = Tar::default();
    tar.dir("noise", 0o755)?;
    for (number, part) in bytes.chunks(file).enumerate() {
        tar.file(&format!("noise/{name}-{number}"), 0o644, part)?;
    }
    Layer::stored(&tar.finish()?)
}

/// A tar under construction, with whole-second times that differ between entries.
#[derive(Default)]
struct Tar {
    builder: Option<tar::Builder<Vec<u8>>>,
    entries: u64,
}

impl Tar {
    fn builder(&mut self) -> &mut tar::Builder<Vec<u8>> {
        self.entries += 1;
        self.builder.get_or_insert_with(|| tar::Builder::new(Vec::new()))
    }

    fn header(&self, kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_mtime(1_700_000_000 + self.entries);
        header
    }

    fn file(&mut self, path: &str, mode: u32, body: &[u8]) -> Result<()> {
        self.bytes(path.as_bytes(), mode, body)
    }

    fn bytes(&mut self, path: &[u8], mode: u32, body: &[u8]) -> Result<()> {
        let mut header = self.header(tar::EntryType::Regular, mode, body.len());
        Ok(self.builder().append_data(&mut header, Path::new(OsStr::from_bytes(path)), body)?)
    }

    fn dir(&mut self, path: &str, mode: u32) -> Result<()> {
        let mut header = self.header(tar::EntryType::Directory, mode, 0);
        Ok(self.builder().append_data(&mut header, format!("{path}/"), std::io::empty())?)
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = self.header(tar::EntryType::Symlink, 0o777, 0);
        Ok(self.builder().append_link(&mut header, path, target)?)
    }

    fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        // A hard link's header carries the attributes of the file; containerd gives them to the inode again.
        let mut header = self.header(tar::EntryType::Link, 0o755, 0);
        if target == "data/text" {
            header.set_mode(0o644);
        }
        Ok(self.builder().append_link(&mut header, path, target)?)
    }

    fn special(&mut self, path: &str, kind: tar::EntryType, major: u32, minor: u32) -> Result<()> {
        let mut header = self.header(kind, 0o666, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        Ok(self.builder().append_data(&mut header, path, std::io::empty())?)
    }

    /// Gives the next entry an extended attribute.
    fn xattr(&mut self, name: &str, value: &[u8]) -> Result<()> {
        let key = format!("SCHILY.xattr.{name}");
        Ok(self.builder().append_pax_extensions([(key.as_str(), value)])?)
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        Ok(self.builder.take().context("a layer has entries")?.into_inner()?)
    }
}
