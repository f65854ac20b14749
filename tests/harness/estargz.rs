//! eStargz layers, made of tars as the format has them: each chunk of a file begins a gzip member, and the layer ends in a
//! table of contents and a footer that names its place.

use std::io::Write as _;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use nydus_convert::tar::{Archive, Entry, EntryKind};
use nydus_rafs::Algorithm;
use serde_json::{Map, Value, json};

use crate::image::Layer;

/// The annotation of a layer that names the digest of its table of contents.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// A layer that is being written.
struct Writer {
    stored: Vec<u8>,
    plain: Vec<u8>,
    member: GzEncoder<Vec<u8>>,
}

impl Writer {
    fn new() -> Self {
        Self { stored: Vec::new(), plain: Vec::new(), member: member() }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.plain.extend_from_slice(bytes);
        Ok(self.member.write_all(bytes)?)
    }

    /// Begins a new member and returns its position.
    fn begin(&mut self) -> Result<usize> {
        let ended = std::mem::replace(&mut self.member, member()).finish()?;
        self.stored.extend(ended);
        Ok(self.stored.len())
    }
}

fn member() -> GzEncoder<Vec<u8>> {
    GzEncoder::new(Vec::new(), Compression::new(6))
}

/// Makes a layer of a tar, its files cut into chunks of `cut` bytes, with the annotation that its table is found by.
pub fn layer(tar: &[u8], cut: usize) -> Result<Layer> {
    layer_with(tar, cut, |_| {})
}

/// As [`layer`], with a table of contents that was changed before it was written.
pub fn layer_with(tar: &[u8], cut: usize, change: impl FnOnce(&mut Vec<Value>)) -> Result<Layer> {
    let mut writer = Writer::new();
    let mut entries = Vec::new();
    let mut at = 0;
    let mut archive = Archive::new(tar);
    while let Some(entry) = archive.next_entry()? {
        let body_at = usize::try_from(archive.position())?;
        let body = &tar[body_at..body_at + usize::try_from(entry.size)?];
        // Headers go into the member of whatever was before them.
        writer.write(&tar[at..body_at])?;
        let mut told = told(&entry);
        for (number, chunk) in body.chunks(cut).enumerate() {
            if number > 0 {
                told = json!({"name": told["name"], "type": "chunk", "chunkOffset": number * cut});
            }
            told["offset"] = json!(writer.begin()?);
            told["chunkDigest"] = json!(format!("sha256:{}", Algorithm::Sha256.digest(chunk)));
            if (number + 1) * cut < body.len() {
                told["chunkSize"] = json!(cut);
            }
            writer.write(chunk)?;
            entries.push(told.clone());
        }
        if body.is_empty() {
            entries.push(told);
        }
        at = (body_at + body.len()).next_multiple_of(512);
        writer.write(&tar[body_at + body.len()..at])?;
    }
    change(&mut entries);
    finish(writer, &json!({"version": 1, "entries": entries}))
}

/// Writes the table of contents, and the footer.
fn finish(mut writer: Writer, toc: &Value) -> Result<Layer> {
    let toc = serde_json::to_vec_pretty(toc)?;
    let position = writer.begin()?;
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(toc.len() as u64);
    header.set_mode(0);
    builder.append_data(&mut header, "stargz.index.json", &toc[..])?;
    writer.write(&builder.into_inner()?)?;
    writer.begin()?;
    let extra = format!("{position:016x}STARGZ");
    writer.stored.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, b'S', b'G', 22, 0]);
    writer.stored.extend(extra.bytes());
    writer.stored.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let annotations = [(TOC_DIGEST.to_owned(), format!("sha256:{}", Algorithm::Sha256.digest(&toc)))].into();
    Ok(Layer { diff_id: Algorithm::Sha256.digest(&writer.plain), gzip: writer.stored, annotations })
}

/// What a table tells of an entry; names that are not UTF-8 are changed, as by every JSON writer.
fn told(entry: &Entry) -> Value {
    let kind = match entry.kind {
        EntryKind::Directory => "dir",
        EntryKind::Regular => "reg",
        EntryKind::Symlink => "symlink",
        EntryKind::HardLink => "hardlink",
        EntryKind::CharDevice => "char",
        EntryKind::BlockDevice => "block",
        EntryKind::Fifo => "fifo",
    };
    let xattrs = entry.xattrs.iter().map(|(name, value)| (name.display().to_string(), json!(STANDARD.encode(value))));
    let mut told = json!({
        "name": String::from_utf8_lossy(&entry.path), "type": kind, "size": entry.size, "mode": entry.permissions,
        "uid": entry.uid, "gid": entry.gid, "modtime": rfc_3339(entry.mtime.unsigned_abs()),
        "linkName": String::from_utf8_lossy(&entry.link), "devMajor": entry.device.0, "devMinor": entry.device.1,
        "xattrs": xattrs.collect::<Map<_, _>>(),
    });
    // Numbers and texts that say nothing are left out.
    if let Value::Object(told) = &mut told {
        told.retain(|_, value| !matches!(value.as_str(), Some("")) && *value != json!(0) && *value != json!({}));
    }
    told
}

/// A time as tables have it.
fn rfc_3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March: the leap day is the last of one.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let (day, month_number) = (of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month_number <= 2);
    format!("{year:04}-{month_number:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}
