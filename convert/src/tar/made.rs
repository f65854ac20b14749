//! Tars for tests, block by block.

use super::BLOCK;

/// A tar in the making.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) bytes: Vec<u8>,
}

/// A header and what follows it.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) ids: (u32, u32),
    pub(crate) mtime: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) device: (u32, u32),
    pub(crate) magic: [u8; 8],
    pub(crate) body: Vec<u8>,
    pub(crate) records: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(crate) fn item(name: impl AsRef<[u8]>, kind: u8) -> Item {
    Item {
        name: name.as_ref().to_vec(),
        kind,
        mode: 0o644,
        ids: (0, 0),
        mtime: 0,
        link: Vec::new(),
        device: (0, 0),
        magic: *b"ustar\x0000",
        body: Vec::new(),
        records: Vec::new(),
    }
}

impl Item {
    pub(crate) fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn link(mut self, link: impl AsRef<[u8]>) -> Self {
        self.link = link.as_ref().to_vec();
        self
    }

    pub(crate) fn record(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.records.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn magic(mut self, magic: &[u8; 8]) -> Self {
        self.magic = *magic;
        self
    }

    /// Returns the header block, its checksum right.
    pub(crate) fn header(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..self.name.len()].copy_from_slice(&self.name);
        block[100..108].copy_from_slice(format!("{:07o}\0", self.mode).as_bytes());
        block[108..116].copy_from_slice(format!("{:07o}\0", self.ids.0).as_bytes());
        block[116..124].copy_from_slice(format!("{:07o}\0", self.ids.1).as_bytes());
        block[124..136].copy_from_slice(format!("{:011o}\0", self.body.len()).as_bytes());
        block[136..148].copy_from_slice(format!("{:011o}\0", self.mtime).as_bytes());
        block[156] = self.kind;
        block[157..157 + self.link.len()].copy_from_slice(&self.link);
        block[257..265].copy_from_slice(&self.magic);
        if matches!(self.kind, b'3' | b'4') {
            block[329..337].copy_from_slice(format!("{:07o}\0", self.device.0).as_bytes());
            block[337..345].copy_from_slice(format!("{:07o}\0", self.device.1).as_bytes());
        }
        sealed(block)
    }
}

/// Sets the checksum of a header.
pub(crate) fn sealed(mut block: [u8; BLOCK]) -> [u8; BLOCK] {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Returns a pax record, its own length included.
pub(crate) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

impl Made {
    pub(crate) fn of(items: impl IntoIterator<Item = Item>) -> Vec<u8> {
        let mut made = Self::default();
        for item in items {
            made.push(&item);
        }
        made.end()
    }

    pub(crate) fn push(&mut self, item: &Item) {
        if !item.records.is_empty() {
            let body: Vec<u8> = item.records.iter().flat_map(|(key, value)| record(key, value)).collect();
            self.push(&Item { records: Vec::new(), ..self::item("PaxHeaders/x", b'x').body(body) });
        }
        self.bytes.extend_from_slice(&item.header());
        self.data(&item.body);
    }

    pub(crate) fn data(&mut self, body: &[u8]) {
        self.bytes.extend_from_slice(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}
