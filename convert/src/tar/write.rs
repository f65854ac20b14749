//! Writing tars, in the pax format: what a header block has no room for goes into records before it.

use std::io::{self, Write};

use super::BLOCK;

/// What a header tells.
#[derive(Debug, Clone, Default)]
pub(crate) struct Header<'h> {
    /// The name, from the root and without a slash in front.
    pub(crate) name: &'h [u8],
    /// The type flag.
    pub(crate) kind: u8,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Bytes that follow.
    pub(crate) size: u64,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Target of a link.
    pub(crate) link: &'h [u8],
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    /// Extended attributes, full names.
    pub(crate) xattrs: Vec<(&'h [u8], &'h [u8])>,
}

impl Header<'_> {
    /// Writes the header, and before it the records that it needs.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let records = self.records();
        if !records.is_empty() {
            let before = Header { name: b"PaxHeaders/entry", kind: b'x', mode: 0o644, ..Header::default() };
            out.write_all(&Header { size: records.len() as u64, ..before }.block())?;
            out.write_all(&records)?;
            pad(out, records.len() as u64)?;
        }
        out.write_all(&self.block())
    }

    fn records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        let mut add = |needed: bool, key: &[u8], value: &[u8]| {
            if needed {
                records.extend_from_slice(&record(key, value));
            }
        };
        add(self.name.len() > 100, b"path", self.name);
        add(self.link.len() > 100, b"linkpath", self.link);
        add(u64::from(self.uid) > OCTAL_7, b"uid", self.uid.to_string().as_bytes());
        add(u64::from(self.gid) > OCTAL_7, b"gid", self.gid.to_string().as_bytes());
        add(self.size > OCTAL_11, b"size", self.size.to_string().as_bytes());
        let whole = u64::try_from(self.mtime.0).is_ok_and(|seconds| seconds <= OCTAL_11);
        add(self.mtime.1 != 0 || !whole, b"mtime", time(self.mtime).as_bytes());
        for (name, value) in &self.xattrs {
            add(true, &[b"SCHILY.xattr.", *name].concat(), value);
        }
        records
    }

    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut text = |at: usize, len: usize, bytes: &[u8]| {
            let len = len.min(bytes.len());
            block[at..at + len].copy_from_slice(&bytes[..len]);
        };
        text(0, 100, self.name);
        text(157, 100, self.link);
        let (seconds, size) = (u64::try_from(self.mtime.0).unwrap_or(0).min(OCTAL_11), self.size.min(OCTAL_11));
        for (at, digits, value) in [(124, 11, size), (136, 11, seconds)] {
            text(at, 12, format!("{value:0digits$o}\0").as_bytes());
        }
        let (uid, gid) = (u64::from(self.uid).min(OCTAL_7), u64::from(self.gid).min(OCTAL_7));
        let (major, minor) = (u64::from(self.device.0), u64::from(self.device.1));
        for (at, value) in [(100, u64::from(self.mode)), (108, uid), (116, gid), (329, major), (337, minor)] {
            text(at, 8, format!("{value:07o}\0").as_bytes());
        }
        text(257, 8, b"ustar\x0000");
        block[148..156].fill(b' ');
        block[156] = self.kind;
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// The largest numbers in fields of 8 and 12 bytes.
const OCTAL_7: u64 = 0o7_777_777;
const OCTAL_11: u64 = 0o77_777_777_777;

/// Returns a record with its own length in front.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Returns a time as a decimal number; nanoseconds count upwards, also before 1970.
fn time((seconds, nanoseconds): (i64, u32)) -> String {
    if nanoseconds == 0 {
        return seconds.to_string();
    }
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let (sign, total) = if total < 0 { ("-", -total) } else { ("", total) };
    format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000)
}

/// Fills the last block of `len` bytes.
pub(crate) fn pad(out: &mut impl Write, len: u64) -> io::Result<()> {
    let missing = usize::try_from(len.wrapping_neg() % BLOCK as u64).expect("less than a block");
    out.write_all(&[0; BLOCK][..missing])
}

/// Ends the archive.
pub(crate) fn end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

#[cfg(test)]
mod tests {
    use super::super::Archive;
    use super::*;

    #[test]
    fn what_has_no_room_in_a_block_comes_back_from_records() {
        let name = [b'n'; 150];
        for mtime in [(0, 0), (-5, 250_000_000), (1 << 40, 1), (7, 999_999_999), (-1, 0)] {
            let header = Header {
                name: &name,
                kind: b'2',
                mode: 0o777,
                uid: 4_000_000_000,
                gid: 7,
                mtime,
                link: &[b'l'; 300],
                xattrs: vec![(b"user.a", b"with\nnewline"), (b"trusted.b", b"")],
                ..Header::default()
            };
            let mut bytes = Vec::new();
            header.write(&mut bytes).unwrap();
            end(&mut bytes).unwrap();
            let entry = Archive::new(&bytes[..]).next_entry().unwrap().unwrap();
            assert_eq!((entry.path, entry.link), (name.to_vec(), vec![b'l'; 300]));
            assert_eq!((entry.uid, entry.gid, (entry.mtime, entry.mtime_nsec)), (4_000_000_000, 7, mtime));
            assert_eq!(entry.xattrs.len(), 2);
            assert_eq!(entry.xattrs[std::ffi::OsStr::new("user.a")], b"with\nnewline");
        }
    }
}
