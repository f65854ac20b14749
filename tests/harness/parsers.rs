//! Everything that reads strangers' bytes, each as a function of bytes: what fuzzing calls, and what its corpora are
//! replayed through. None of them may panic, hang or take memory without bound, whatever it is given.

use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use axum::http::Method;
use nydus_backend::node::anything;
use nydus_backend::swarm::message::{Ask, Frame, Report, Summary};
use nydus_backend::swarm::wire::Message;
use nydus_convert::layer::estargz::Toc as LayerToc;
use nydus_convert::layer::{BodyId, LayerBuilder, Rules, reference};
use nydus_convert::tar::Archive;
use nydus_rafs::blob::format::TABLE_HEADER_SIZE;
use nydus_rafs::blob::section;
use nydus_rafs::blob::table::{Batch, BlobTable, Point};
use nydus_rafs::blob::toc::Toc;
use nydus_rafs::bootstrap::TableLocation;
use nydus_rafs::tree::Reading;
use nydus_rafs::write::{Options, write};
use nydus_rafs::{
    Algorithm, BlobInfo, Bootstrap, Chunk, ChunkIndex, ChunkTable, Cipher, Codec, Compressor, Container, Flags,
    Verified, Version, estargz as ends,
};
use nydus_snapshotter::labels::{self, Labels};
use nydusd::api::server;
use nydusd::api::types::MountRequest;
use nydusd::config::template::Template;

/// A parser.
pub type Parser = fn(&[u8]);

/// All of them, by name.
pub const ALL: &[(&str, Parser)] = &[
    ("bootstrap", bootstrap),
    ("blob-table", blob_table),
    ("toc", toc),
    ("tar", tar),
    ("layer", layer),
    ("estargz", estargz),
    ("zran", zran),
    ("batch", batch),
    ("labels", labels),
    ("config", config),
    ("api", api),
    ("swarm", swarm),
    ("node", node),
    ("request", nydus_backend::mirror::read_head),
];

/// Returns the parser of a name.
pub fn named(name: &str) -> Option<Parser> {
    ALL.iter().find(|(known, _)| *known == name).map(|(_, parser)| *parser)
}

/// Any bytes as a bootstrap: all of it is read, and what can be read can be written.
fn bootstrap(bytes: &[u8]) {
    let Ok(bootstrap) = Bootstrap::open(bytes) else { return };
    let blobs = 0..u16::try_from(bootstrap.blobs().len()).unwrap_or(u16::MAX);
    let chunks: Result<Vec<ChunkTable>, _> = blobs.map(|blob| bootstrap.chunks(blob)).collect();
    let prefetch = bootstrap.prefetch().unwrap_or_default();
    let Ok(reading) = Reading::of(&bootstrap) else { return };
    for (&ino, &id) in &reading.nodes {
        for name in reading.tree.children(id).into_iter().flat_map(|children| children.keys()) {
            let _ = bootstrap.lookup(ino, name);
        }
    }
    if let Ok(chunks) = chunks {
        let prefetch: Vec<_> = prefetch.iter().filter_map(|ino| reading.nodes.get(ino).copied()).collect();
        for version in [Version::V5, Version::V6] {
            let options = Options {
                version,
                chunk_size: bootstrap.chunk_size(),
                tarfs: bootstrap.flags().has(Flags::TARFS),
                prefetch: prefetch.clone(),
                ..Options::default()
            };
            let _ = write(&reading.tree, bootstrap.blobs(), &chunks, &options);
        }
    }
}

/// Eight bytes as what an image says of a blob; half of the others as its chunk table, half as the stored bytes of chunks.
fn blob_table(bytes: &[u8]) {
    let Some((words, rest)) = bytes.split_first_chunk::<8>() else { return };
    let (table, stored) = rest.split_at(rest.len() / 2);
    let compressor = Compressor::from_code(u32::from(words[0] % 4)).unwrap_or(Compressor::None);
    let mut info = BlobInfo::new("blob".parse().expect("it is a name"), compressor, Algorithm::Blake3);
    info.features |= u32::from(u16::from_le_bytes([words[1], words[2]])) & 0xffe;
    info.chunk_count = u32::from(words[3]);
    let plain_size = u64::from(u32::from_le_bytes([words[4], words[5], words[6], words[7]]));
    info.table = Some(TableLocation { stored: 0..table.len() as u64, plain_size, compressor });
    // The header must name the same numbers: a fuzzer would not guess them.
    let mut header = vec![0; usize::try_from(TABLE_HEADER_SIZE).expect("it is a page")];
    header[..4].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[4092..].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[8..12].copy_from_slice(&compressor.code().to_le_bytes());
    header[12..16].copy_from_slice(&info.chunk_count.to_le_bytes());
    header[24..32].copy_from_slice(&(table.len() as u64).to_le_bytes());
    header[32..40].copy_from_slice(&plain_size.to_le_bytes());
    header[40..48].copy_from_slice(&(u64::from(info.chunk_count) * 24).to_le_bytes());
    header[56..60].copy_from_slice(&u32::from(words[0] >> 2).to_le_bytes());
    let object = [table, &header].concat();
    if let Ok(table) = BlobTable::read(&info, &object) {
        for chunk in table.chunks().iter().take(8) {
            let len = usize::try_from(chunk.stored.end - chunk.stored.start).unwrap_or(usize::MAX);
            let _ = Verified::trusting(chunk, &stored[..len.min(stored.len())]);
        }
    }
}

/// Any bytes as a table of contents, and as a blob that ends in one.
fn toc(bytes: &[u8]) {
    let _ = Toc::parse(bytes);
    let mut blob = Cursor::new(bytes);
    let _ = section::locate(&mut blob);
    let _ = section::read_bootstrap(&mut blob);
}

/// Any bytes as a layer's tar, unpacked by each set of rules.
fn tar(bytes: &[u8]) {
    for rules in [Rules::Lowest, Rules::Upper, Rules::Alone] {
        let mut archive = Archive::new(bytes);
        let mut builder = LayerBuilder::new(rules);
        let mut bodies = 0;
        while let Ok(Some(entry)) = archive.next_entry() {
            let body = LayerBuilder::wants_body(&entry).then_some(BodyId(bodies));
            bodies += usize::from(body.is_some());
            if builder.add(entry, body).is_err() {
                break;
            }
            // A sparse file may have more zeros than there is time: some are enough.
            let mut buffer = [0; 4096];
            for _ in 0..16 {
                if !matches!(archive.read_body(&mut buffer), Ok(read) if read > 0) {
                    break;
                }
            }
        }
        let _ = builder.finish();
    }
}

/// Any bytes as an original layer, gzip or plain, whose files stay where they are: what is found in it is found again.
fn layer(bytes: &[u8]) {
    let Ok(referred) = reference::read(bytes, Rules::Upper, 4096) else { return };
    let chunks = reference::with_points(&referred.reference.chunks, &referred.reference.points);
    for chunk in chunks.iter().take(16) {
        let place = |at| usize::try_from(at).expect("it is in memory");
        let stored = &bytes[place(chunk.stored.start)..place(chunk.stored.end)];
        assert!(Verified::decode(chunk, stored).is_ok(), "chunk {} is not where it was found", chunk.index.0);
    }
}

/// Any bytes as the end of an eStargz layer, as the gzip member of its table of contents, and as the table itself, of which an
/// image is made.
fn estargz(bytes: &[u8]) {
    let size = bytes.len() as u64;
    let footer = &bytes[bytes.len().saturating_sub(usize::try_from(ends::FOOTER_SIZE).expect("51"))..];
    if let Ok(at) = ends::toc_position(footer, size) {
        let member = &bytes[usize::try_from(at).expect("it is in memory")..];
        let _ = ends::toc(member, Algorithm::Sha256.digest(b""));
    }
    let _ = ends::toc(bytes, Algorithm::Sha256.digest(b""));
    for rules in [Rules::Lowest, Rules::Upper, Rules::Alone] {
        let Ok(toc) = LayerToc::parse(bytes) else { return };
        let Ok(chunk_size) = toc.chunk_size(None) else { return };
        let Ok(raw) = toc.layer(rules, "blob".parse().expect("it is a name"), 1 << 20) else { continue };
        let blobs: Vec<BlobInfo> = raw.info.into_iter().collect();
        let chunks = [ChunkTable::new(raw.chunks)];
        for version in [Version::V5, Version::V6] {
            let options = Options { version, chunk_size, compressor: Compressor::Gzip, ..Options::default() };
            if let Ok(image) = write(&raw.layer.tree, &blobs, &chunks[..blobs.len()], &options) {
                bootstrap(&image);
            }
        }
    }
}

/// Six bytes as what is known of a point in a gzip stream, the others as its dictionary and as the stream from there on.
fn zran(bytes: &[u8]) {
    let Some((words, rest)) = bytes.split_first_chunk::<6>() else { return };
    let (dictionary, stored) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([words[2], words[3]]))));
    let plain_size = u32::from(u16::from_le_bytes([words[4], words[5]])) + 1;
    let point = Point {
        stored: 0..stored.len() as u64,
        plain_at: 0,
        plain_size,
        dictionary: dictionary[..dictionary.len().min(32_768)].to_vec(),
        byte: words[0],
        bits: words[1] % 8,
    };
    let codec = Codec::Zran { context: 0, offset: 0 };
    let _ = Verified::trusting(&part(codec, Container::Point(point), plain_size, stored), stored);
}

/// Four bytes as what is known of a batch, the others as its stored bytes.
fn batch(bytes: &[u8]) {
    let Some((words, stored)) = bytes.split_first_chunk::<4>() else { return };
    let batch = Batch {
        stored_size: u32::try_from(stored.len()).expect("short"),
        plain_size: u32::from(u16::from_le_bytes([words[1], words[2]])) << (words[0] >> 4),
    };
    let compressor = Compressor::from_code(u32::from(words[0] % 4)).unwrap_or(Compressor::None);
    let cipher = (words[0] & 4 != 0).then_some(Cipher { key: [7; 32], iv: [9; 16] });
    let container = Container::Batch { batch, codec: compressor.codec(), cipher };
    let codec = Codec::Batch { batch: 0, offset: u32::from(words[3]) };
    let _ = Verified::trusting(&part(codec, container, u32::from(words[3]) + 1, stored), stored);
}

/// A chunk that is a part of something larger.
fn part(codec: Codec, container: Container, plain_size: u32, stored: &[u8]) -> Chunk {
    Chunk {
        index: ChunkIndex(0),
        plain: 0..u64::from(plain_size),
        stored: 0..stored.len() as u64,
        codec,
        encrypted: false,
        algorithm: Algorithm::Sha256,
        digest: None,
        container: Some(Arc::new(container)),
        crc32: None,
    }
}

/// Lines of `key=value` as a snapshot's labels. A key of one digit is one of those that mean something.
fn labels(bytes: &[u8]) {
    let known = [
        labels::TARGET,
        labels::IMAGE_REF,
        labels::STARGZ_REF,
        labels::LAYER_DIGEST,
        labels::TOC_DIGEST,
        labels::NYDUS_BLOB,
        labels::NYDUS_BOOTSTRAP,
        labels::VOLATILE,
        labels::UID_MAP,
        labels::GID_MAP,
    ];
    let text = String::from_utf8_lossy(bytes);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let named = |key: &str| key.parse().ok().and_then(|at: usize| known.get(at).copied()).unwrap_or(key).to_owned();
    let all: Labels = pairs.map(|(key, value)| (named(key), value.to_owned())).collect();
    let _ = labels::parse(&all);
    let _ = labels::content(&all);
    let _ = labels::data_blob(&all);
}

/// Any text as each configuration file: nydusd's, the snapshotter's template and own, the mirror's.
fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("/etc/nydus/config");
    if let Ok(parsed) = nydusd::config::parse(text) {
        let _ = parsed.config.ready_to_mount();
        let _ = parsed.config.echo();
    }
    if let Ok(mut template) = Template::parse(text) {
        template.set_backend("host", "registry.example");
        template.set_backend("repo", "a/b");
        template.set_mirror_header("X-Dragonfly-Registry", "https://registry.example", false);
        template.set_id("1");
        template.set_work_dir(path);
        let _ = template.config();
    }
    let _ = nydus_snapshotter::config::Config::parse(text, path, &Default::default());
    let _ = nydus_backend::mirror::config::Config::parse(text, path).and_then(|config| config.checked());
}

/// The first line as `METHOD TARGET`, the rest as the body of a request to nydusd; the configuration in a mount is read too.
fn api(bytes: &[u8]) {
    let line = bytes.iter().position(|&byte| byte == b'\n').unwrap_or(bytes.len());
    let (head, body) = (&bytes[..line], bytes.get(line + 1..).unwrap_or_default());
    let head = String::from_utf8_lossy(head);
    let (method, target) = head.split_once(' ').unwrap_or((&head, ""));
    let Ok(method) = Method::from_bytes(method.as_bytes()) else { return };
    if server::understands(&method, target, body)
        && let Ok(mount) = serde_json::from_slice::<MountRequest>(body)
    {
        config(mount.config.as_bytes());
    }
}

/// What comes in at a node's ports; the first byte says through which.
fn node(bytes: &[u8]) {
    let Some((port, bytes)) = bytes.split_first() else { return };
    match port % 5 {
        0 => anything::records(bytes),
        1 => anything::packet(bytes),
        2 => anything::greeting(bytes),
        3 => anything::list(bytes),
        _ => anything::gossip(bytes),
    }
}

/// Any bytes as each message between members of a swarm: what can be read is written the same again.
fn swarm(bytes: &[u8]) {
    fn read<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        if let Ok(message) = M::decode(bytes) {
            assert_eq!(M::decode(&message.encode()).as_ref(), Ok(&message), "it is not what was written");
        }
    }
    read::<Ask>(bytes);
    read::<Frame>(bytes);
    read::<Report>(bytes);
    read::<Summary>(bytes);
}
