use std::io::Write as _;

use nydus_rafs::{NodeKind, Verified};
use serde_json::{Value, json};

use super::*;
use crate::path::{self, Found};

fn id() -> BlobId {
    "a".repeat(64).parse().expect("a name")
}

/// A layer in the making: its members, and what its table says.
#[derive(Default)]
struct Made {
    blob: Vec<u8>,
    entries: Vec<Value>,
}

impl Made {
    /// Adds a file, cut into chunks of `cut` bytes.
    fn file(&mut self, name: &str, body: &[u8], cut: usize) {
        for (number, plain) in body.chunks(cut).enumerate() {
            let mut entry = json!({
                "name": name, "type": if number == 0 { "reg" } else { "chunk" }, "offset": self.blob.len(),
                "chunkDigest": format!("sha256:{}", Algorithm::Sha256.digest(plain)),
            });
            if number == 0 {
                entry["size"] = json!(body.len());
                entry["mode"] = json!(0o644);
            } else {
                entry["chunkOffset"] = json!(number * cut);
            }
            if number * cut + plain.len() < body.len() {
                entry["chunkSize"] = json!(plain.len());
            }
            self.entries.push(entry);
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(plain).expect("memory");
            // What follows in the tar is in the same member.
            gzip.write_all(&[0; 700]).expect("memory");
            self.blob.extend(gzip.finish().expect("memory"));
        }
        if body.is_empty() {
            self.entries.push(json!({"name": name, "type": "reg", "mode": 0o644}));
        }
    }

    fn json(&self) -> Vec<u8> {
        json!({"version": 1, "entries": self.entries}).to_string().into_bytes()
    }

    fn raw(&self) -> Result<Raw, EstargzError> {
        Toc::parse(&self.json())?.layer(Rules::Lowest, id(), self.blob.len() as u64)
    }
}

/// What is done to the entries of a table.
type Damage = fn(&mut Vec<Value>);

fn noise(len: u32) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

/// Reads a file of the layer through its chunks.
fn read(made: &Made, raw: &Raw, name: &str) -> Vec<u8> {
    let Found::Node(node) = path::find(&raw.layer.tree, &path::clean(name.as_bytes())) else { panic!("{name}") };
    let NodeKind::Regular { size, chunks } = &raw.layer.tree.node(node).kind else { panic!("{name} is no file") };
    let mut bytes = Vec::new();
    for place in chunks {
        let chunk = &raw.chunks[place.chunk.0 as usize];
        let stored = &made.blob[chunk.stored.start as usize..chunk.stored.end as usize];
        bytes.extend_from_slice(Verified::decode(chunk, stored).expect("its own bytes").bytes());
    }
    assert_eq!(*size, bytes.len() as u64);
    bytes
}

#[test]
fn every_file_is_read_from_the_members_that_the_table_names() {
    let mut made = Made::default();
    let big = noise(20_000);
    made.file("dir/big", &big, 8192);
    made.file("again", &big[..8192], 8192);
    made.file("empty", b"", 8192);
    made.file("small", b"text", 8192);
    made.entries.push(json!({"name": "link", "type": "hardlink", "linkName": "small", "mode": 0o600}));
    made.entries
        .push(json!({"name": "sym", "type": "symlink", "linkName": "dir/big", "modtime": "2001-09-09T01:46:40Z"}));
    made.entries.push(json!({"name": "dev", "type": "char", "devMajor": 1, "devMinor": 3, "mode": 0o4755,
        "xattrs": {"user.a": "AAE="}}));
    let toc = Toc::parse(&made.json()).expect("a table");
    assert_eq!(toc.chunk_size(None).expect("a size"), 8192);
    assert!(matches!(toc.chunk_size(Some(4096)), Err(EstargzError::ChunkSize { found: 8192, wanted: 4096 })));
    let raw = made.raw().expect("a layer");
    for (name, want) in
        [("dir/big", &big[..]), ("again", &big[..8192]), ("empty", b""), ("small", b"text"), ("link", b"text")]
    {
        assert_eq!(read(&made, &raw, name), want, "{name}");
    }
    // Equal chunks are one.
    assert_eq!(raw.chunks.len(), 4);
    let find = |name: &str| match path::find(&raw.layer.tree, &path::clean(name.as_bytes())) {
        Found::Node(node) => raw.layer.tree.node(node).clone(),
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(find("sym").stat.mtime, 1_000_000_000);
    assert_eq!(find("dev").kind, NodeKind::CharDevice(0x103));
    assert_eq!((find("dev").stat.permissions, find("dev").xattrs.len()), (0o4755, 1));
}

#[test]
fn layers_without_large_files_fit_into_images_of_any_large_enough_chunk_size() {
    let mut made = Made::default();
    made.file("a", &noise(5000), 1 << 20);
    let toc = Toc::parse(&made.json()).expect("a table");
    assert_eq!(toc.chunk_size(None).expect("a size"), 4 << 20);
    assert_eq!(toc.chunk_size(Some(8192)).expect("a size"), 8192);
    assert!(toc.chunk_size(Some(4096)).is_err());
}

#[test]
fn what_cannot_be_read_by_itself_is_named() {
    let good = || {
        let mut made = Made::default();
        made.file("first", &noise(9000), 4096);
        made.file("second", b"text", 4096);
        made
    };
    assert!(good().raw().is_ok());
    let table: [(&str, &str, Damage); 12] = [
        ("sha256 digest", "no digest", |entries| {
            drop(entries[0].as_object_mut().map(|entry| entry.remove("chunkDigest")));
        }),
        ("sha256 digest", "another digest", |entries| entries[1]["chunkDigest"] = json!("sha512:00")),
        ("in the middle", "an inner offset", |entries| entries[3]["innerOffset"] = json!(512)),
        ("where others have", "uneven chunks", |entries| {
            entries[1]["chunkSize"] = json!(2048);
            entries[2]["chunkOffset"] = json!(6144);
        }),
        ("is wanted", "a gap", |entries| entries[1]["chunkOffset"] = json!(5000)),
        ("chunks of 8192", "a chunk is missing", |entries| drop(entries.remove(2))),
        ("chunk of no file", "a chunk without its file", |entries| drop(entries.remove(0))),
        ("of a layer with", "beyond the end", |entries| entries[3]["offset"] = json!(1_u64 << 40)),
        ("16 MiB", "a huge file", |entries| entries[3]["size"] = json!(u64::MAX)),
        ("unknown type", "another kind", |entries| entries[3]["type"] = json!("door")),
        ("RFC 3339", "no time", |entries| entries[3]["modtime"] = json!("yesterday")),
        ("base64", "an attribute", |entries| entries[3]["xattrs"] = json!({"user.a": "?"})),
    ];
    for (wanted, name, damage) in table {
        let mut made = good();
        damage(&mut made.entries);
        let error = made.raw().expect_err(name).to_string();
        assert!(error.contains(wanted), "{name}: {error}");
    }
    let toc = |text: &str| Toc::parse(text.as_bytes()).expect_err("not a table");
    assert!(matches!(toc("{"), EstargzError::Json(_)));
    assert!(matches!(toc(r#"{"version":2,"entries":[]}"#), EstargzError::Version(2)));
    let mut uneven = Made::default();
    uneven.file("a", &noise(9000), 5000);
    let toc = Toc::parse(&uneven.json()).expect("a table");
    assert!(matches!(toc.chunk_size(None), Err(EstargzError::Uneven(5000))));
}

#[test]
fn times_are_read_as_rfc_3339_has_them() {
    for (text, want) in [
        ("1970-01-01T00:00:00Z", Some((0, 0))),
        ("2024-02-29T12:34:56Z", Some((1_709_210_096, 0))),
        ("2024-02-29T12:34:56.5+01:00", Some((1_709_206_496, 500_000_000))),
        ("1969-12-31T23:59:59.123456789012Z", Some((-1, 123_456_789))),
        ("0001-01-01T00:00:00Z", Some((-62_135_596_800, 0))),
        ("2024-02-29T12:34:56", None),
        ("2024-13-01T00:00:00Z", None),
        ("2024-02-29 12:34:56Z", None),
        ("2024-02-29T12:34:56+0100", None),
        ("\u{e9}024-02-29T12:34:56Z", None),
        ("", None),
    ] {
        assert_eq!(instant(text), want, "{text}");
    }
}
