//! Tars written block by block, so that they can hold what no sane archiver writes.

/// One entry: its header, the extension headers before it and the bytes after it.
#[derive(Debug, Clone)]
pub struct Entry {
    kind: u8,
    name: Vec<u8>,
    link: Vec<u8>,
    mode: u32,
    owner: (u32, u32),
    time: u64,
    device: Option<(u32, u32)>,
    body: Vec<u8>,
    size: Option<u64>,
    magic: [u8; 8],
    pax: Vec<u8>,
    patches: Vec<(usize, Vec<u8>)>,
}

/// The time of entries that are given none.
const TIME: u64 = 1_500_000_000;

impl Entry {
    /// An entry of type `kind`, mode 0644.
    pub fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        Self {
            kind,
            name: name.as_ref().to_vec(),
            link: Vec::new(),
            mode: 0o644,
            owner: (0, 0),
            time: TIME,
            device: Some((0, 0)),
            body: Vec::new(),
            size: None,
            magic: *b"ustar\x0000",
            pax: Vec::new(),
            patches: Vec::new(),
        }
    }

    /// Sets the permissions.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Sets owner and group.
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// Sets the modification time.
    pub fn time(mut self, time: u64) -> Self {
        self.time = time;
        self
    }

    /// Sets the device numbers; `None` leaves the fields blank.
    pub fn device(mut self, device: Option<(u32, u32)>) -> Self {
        self.device = device;
        self
    }

    /// Sets what the header says of the size, whatever follows.
    pub fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Sets the bytes that follow.
    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    /// Sets the link target.
    pub fn to(mut self, target: impl AsRef<[u8]>) -> Self {
        self.link = target.as_ref().to_vec();
        self
    }

    /// Writes the header as before POSIX: without magic and device numbers.
    pub fn v7(mut self) -> Self {
        (self.magic, self.device) = ([0; 8], None);
        self
    }

    /// Writes the header as GNU does.
    pub fn gnu(mut self) -> Self {
        self.magic = *b"ustar  \0";
        self
    }

    /// Adds a pax record.
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.extend(record(key, value.as_ref()));
        self
    }

    /// Overwrites bytes of the header; the checksum is made to fit.
    pub fn patch(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Self {
        self.patches.push((at, bytes.as_ref().to_vec()));
        self
    }

    fn write(&self, out: &mut Vec<u8>) {
        if !self.pax.is_empty() {
            Self::new(b'x', "PaxHeaders/x").body(&self.pax).write(out);
        }
        let (name, link) = (&self.name, &self.link);
        if name.len() > 100 && !self.pax.windows(5).any(|part| part == b"path=") {
            Self::new(b'L', "././@LongLink").gnu().body([name, &b"\0"[..]].concat()).write(out);
        }
        if link.len() > 100 && !self.pax.windows(9).any(|part| part == b"linkpath=") {
            Self::new(b'K', "././@LongLink").gnu().body([link, &b"\0"[..]].concat()).write(out);
        }
        let mut block = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &name[..name.len().min(100)]);
        put(100, format!("{:07o}\0", self.mode).as_bytes());
        put(108, format!("{:07o}\0", self.owner.0).as_bytes());
        put(116, format!("{:07o}\0", self.owner.1).as_bytes());
        put(124, format!("{:011o}\0", self.size.unwrap_or(self.body.len() as u64)).as_bytes());
        put(136, format!("{:011o}\0", self.time).as_bytes());
        put(148, b"        ");
        put(156, &[self.kind]);
        put(157, &link[..link.len().min(100)]);
        put(257, &self.magic);
        if let Some((major, minor)) = self.device {
            put(329, format!("{major:07o}\0").as_bytes());
            put(337, format!("{minor:07o}\0").as_bytes());
        }
        for (at, bytes) in &self.patches {
            put(*at, bytes);
        }
        let sum: u32 = block.iter().copied().map(u32::from).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend(block);
        out.extend(&self.body);
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

/// A pax record: its length in decimal, counting itself, then `key=value` and a newline.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

/// A regular file.
pub fn file(name: impl AsRef<[u8]>, body: impl AsRef<[u8]>) -> Entry {
    Entry::new(b'0', name).body(body)
}

/// A directory.
pub fn dir(name: impl AsRef<[u8]>) -> Entry {
    Entry::new(b'5', name).mode(0o755)
}

/// A symbolic link.
pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Entry {
    Entry::new(b'2', name).mode(0o777).to(target)
}

/// A hard link.
pub fn hardlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Entry {
    Entry::new(b'1', name).to(target)
}

/// An empty file, as whiteouts are.
pub fn gone(name: impl AsRef<[u8]>) -> Entry {
    file(name, "")
}

/// Writes a tar of `entries` without the blocks that end it.
pub fn unended(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    entries.iter().for_each(|entry| entry.write(&mut out));
    out
}

/// Writes a tar of `entries`.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out = unended(entries);
    out.resize(out.len() + 1024, 0);
    out
}
