//! Whatever goes into an image comes out of it again, in every form; layers lie on one another as containerd lays them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use nydus_backend::Config;
use nydus_rafs::tree::ChunkList;
use nydus_rafs::{Compressor, NodeId, NodeKind, Stat, Tree, Version};
use proptest::prelude::*;

use super::create::{BlobPlace, BootstrapPlace, PrefetchPolicy, Request, Source, create};
use super::{merge, open, unpack};
use crate::layer::{BodyId, LayerBuilder, Rules};
use crate::pack::Recipe;
use crate::tar::Archive;
use crate::tar::made::{Item, Made, item};

/// What a path is: attributes, the kind without its chunks, what a file holds, and the first name of the same node.
type Seen = (Stat, BTreeMap<std::ffi::OsString, Vec<u8>>, Option<NodeKind>, Vec<u8>, PathBuf);

/// Reads a tar as a layer on its own.
fn listing(tar: &[u8]) -> BTreeMap<PathBuf, Seen> {
    let mut archive = Archive::new(tar);
    let mut builder = LayerBuilder::new(Rules::Alone);
    let mut bodies: Vec<Vec<u8>> = Vec::new();
    while let Some(entry) = archive.next_entry().unwrap() {
        let size = entry.size;
        let body = LayerBuilder::wants_body(&entry).then_some(BodyId(bodies.len()));
        builder.add(entry, body).unwrap();
        if body.is_some() {
            let mut bytes = vec![0; size as usize];
            archive.read_body_exact(&mut bytes).unwrap();
            bodies.push(bytes);
        }
    }
    let layer = builder.finish().unwrap();
    let content = |id| layer.bodies.get(&id).map(|body| bodies[body.0].clone()).unwrap_or_default();
    let mut seen = BTreeMap::new();
    walk(&layer.tree, Tree::ROOT, PathBuf::new(), &content, &mut HashMap::new(), &mut seen);
    seen
}

fn walk(
    tree: &Tree,
    id: NodeId,
    path: PathBuf,
    content: &dyn Fn(NodeId) -> Vec<u8>,
    first: &mut HashMap<NodeId, PathBuf>,
    seen: &mut BTreeMap<PathBuf, Seen>,
) {
    let node = tree.node(id);
    let alias = first.entry(id).or_insert_with(|| path.clone()).clone();
    let kind = match &node.kind {
        NodeKind::Directory(_) => None,
        NodeKind::Regular { size, .. } => Some(NodeKind::Regular { size: *size, chunks: ChunkList::new() }),
        other => Some(other.clone()),
    };
    if !path.as_os_str().is_empty() {
        seen.insert(path.clone(), (node.stat.clone(), node.xattrs.clone(), kind, content(id), alias));
    }
    for (name, &child) in tree.children(id).into_iter().flatten() {
        walk(tree, child, path.join(name), content, first, seen);
    }
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(0u8..3, 1..200),
        prop::collection::vec(any::<u8>(), 1..200),
        (any::<u8>(), 4000usize..9000).prop_map(|(byte, len)| vec![byte; len]),
        prop::collection::vec(any::<u8>(), 4096..10_000),
    ]
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c"), Just("dd")], 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn dressed(item: impl Strategy<Value = Item>) -> impl Strategy<Value = Item> {
    (item, 0u32..0o10000, (0u32..3000, 0u32..3000), 0u64..1 << 33, prop::option::of((0u32..1000, content()))).prop_map(
        |(mut item, mode, ids, mtime, extra)| {
            (item.mode, item.ids, item.mtime) = (mode, ids, mtime);
            match extra {
                Some((nanoseconds, value)) => item
                    .record("mtime", format!("{mtime}.{:09}", nanoseconds * 1001))
                    .record("SCHILY.xattr.user.x", &value[..value.len().min(300)]),
                None => item,
            }
        },
    )
}

/// An entry that can be placed wherever its parents are directories.
fn items() -> impl Strategy<Value = Item> {
    dressed(prop_oneof![
        3 => path().prop_map(|path| item(format!("d/{path}/"), b'5')),
        6 => (path(), content()).prop_map(|(path, body)| item(format!("{path}.f"), b'0').body(body)),
        1 => (path(), path()).prop_map(|(path, to)| item(format!("{path}.l"), b'2').link(to)),
        1 => path().prop_map(|path| item(format!("{path}.p"), b'6')),
        1 => (path(), 0u32..300, 0u32..70_000).prop_map(|(path, major, minor)| {
            let mut item = item(format!("{path}.c"), b'3');
            item.device = (major, minor);
            item
        }),
    ])
}

/// A tar, some of whose files have a second name.
fn tars() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((items(), prop::option::of(path())), 0..25).prop_map(|items| {
        let mut all = Vec::new();
        for (entry, second) in items {
            let name = String::from_utf8(entry.name.clone()).unwrap();
            let file = entry.kind == b'0';
            let mut again = Item { name: Vec::new(), kind: b'1', body: Vec::new(), ..entry.clone() };
            all.push(entry);
            if let Some(second) = second.filter(|_| file) {
                again.name = format!("{second}.h").into_bytes();
                all.push(again.link(name));
            }
        }
        Made::of(all)
    })
}

fn recipes() -> impl Strategy<Value = (Recipe, bool)> {
    let compressor = prop_oneof![Just(Compressor::None), Just(Compressor::Lz4Block), Just(Compressor::Zstd)];
    let v6 = (prop::option::of(Just(4096)), any::<bool>(), any::<bool>());
    (compressor, any::<bool>(), prop::option::of(v6)).prop_map(|(compressor, aligned, v6)| {
        let recipe = Recipe { compressor, aligned, chunk_size: 4096, ..Recipe::default() };
        match v6 {
            None => (Recipe { version: Version::V5, ..recipe }, false),
            Some((batch_size, encrypt, toc)) => (Recipe { batch_size, encrypt, ..recipe }, toc),
        }
    })
}

fn request(source: Source, path: &Path, dir: &Path, recipe: Recipe, toc: bool) -> Request {
    Request {
        source,
        path: path.to_owned(),
        blob: BlobPlace::Directory(dir.to_owned()),
        bootstrap: BootstrapPlace::File(dir.join("bootstrap")),
        toc,
        blob_id: None,
        recipe,
        prefetch: Vec::new(),
        prefetch_policy: PrefetchPolicy::None,
        repeatable: false,
        parent: None,
        dictionary: None,
    }
}

fn unpacked(bootstrap: &Path, blobs: &Path) -> Vec<u8> {
    let backend = Config::from_parts("localfs", serde_json::json!({ "dir": blobs })).unwrap();
    let tar = blobs.join("unpacked");
    unpack::unpack(open(bootstrap).unwrap(), &backend, &tar).unwrap();
    fs::read(tar).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_goes_into_an_image_comes_out_of_it(tar in tars(), (recipe, toc) in recipes()) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("tar");
        fs::write(&source, &tar).unwrap();
        create(&request(Source::Tar, &source, dir.path(), recipe, toc)).unwrap();
        prop_assert_eq!(listing(&unpacked(&dir.path().join("bootstrap"), dir.path())), listing(&tar));
    }

    #[test]
    fn what_is_referred_to_is_read_where_it_lies(tar in tars(), kind in 0..3) {
        let dir = tempfile::tempdir().unwrap();
        let (bytes, source) = match kind {
            0 => (tar.clone(), Source::RawTar),
            1 => (tar.clone(), Source::Reference),
            _ => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(&tar).unwrap();
                (gzip.finish().unwrap(), Source::Reference)
            }
        };
        let path = dir.path().join(nydus_rafs::Algorithm::Sha256.digest(&bytes).to_string());
        fs::write(&path, &bytes).unwrap();
        let recipe = Recipe {
            compressor: if kind == 2 { Compressor::Gzip } else { Compressor::None },
            algorithm: nydus_rafs::Algorithm::Sha256,
            chunk_size: 4096,
            ..Recipe::default()
        };
        create(&request(source, &path, dir.path(), recipe, kind == 1)).unwrap();
        prop_assert_eq!(listing(&unpacked(&dir.path().join("bootstrap"), dir.path())), listing(&tar));
    }
}

/// What a layer does to one path.
#[derive(Debug, Clone)]
enum Change {
    Directory(u32),
    File(u32, Vec<u8>),
    Gone,
    Opaque,
}

/// What an overlay of unpacked layers shows: mode and content by path; `None` for directories.
type Shown = BTreeMap<String, (u32, Option<Vec<u8>>)>;

/// Lays a layer on what lies below, one change after the other, as a program that knows nothing of layers would.
fn apply(shown: &mut Shown, layer: &BTreeMap<String, Change>) {
    let below = |shown: &Shown, path: &str| -> Vec<String> {
        shown.keys().filter(|key| key.starts_with(&format!("{path}/"))).cloned().collect()
    };
    for (path, change) in layer {
        let with_all = match change {
            Change::Gone => true,
            Change::Opaque => false,
            Change::Directory(_) | Change::File(..) => continue,
        };
        for key in below(shown, path) {
            shown.remove(&key);
        }
        if with_all {
            shown.remove(path);
        }
    }
    for (path, change) in layer {
        // Directories that are needed and not listed are as they are below.
        let parts: Vec<&str> = path.split('/').collect();
        let needed = if matches!(change, Change::Opaque) { parts.len() } else { parts.len() - 1 };
        for len in 1..=needed {
            let parent = parts[..len].join("/");
            if shown.get(&parent).is_none_or(|(_, content)| content.is_some()) {
                shown.insert(parent, (0o755, None));
            }
        }
        match change {
            Change::Directory(mode) => {
                shown.insert(path.clone(), (*mode, None));
            }
            Change::File(mode, body) => {
                for key in below(shown, path) {
                    shown.remove(&key);
                }
                shown.insert(path.clone(), (*mode, Some(body.clone())));
            }
            Change::Gone | Change::Opaque => {}
        }
    }
}

/// Returns whether a layer needs a directory, without listing it, of a path that leads through a file or a whiteout below:
/// nobody can tell what attributes it has, and containerd stops there as well.
fn leads_nowhere(below: &[BTreeMap<String, Change>], layer: &BTreeMap<String, Change>) -> bool {
    let in_the_way = |(at, lower): (usize, &BTreeMap<String, Change>), path: &str| match lower.get(path) {
        Some(Change::File(..)) => true,
        Some(Change::Gone) => at > 0,
        _ => false,
    };
    let parents = layer.keys().flat_map(|path| path.match_indices('/').map(|(at, _)| &path[..at]));
    parents.into_iter().any(|parent| below.iter().enumerate().any(|lower| in_the_way(lower, parent)))
}

/// Layers whose entries do not contradict one another within a layer: what is a file has nothing below it.
fn layers() -> impl Strategy<Value = Vec<BTreeMap<String, Change>>> {
    let change = prop_oneof![
        3 => (0u32..0o1000).prop_map(Change::Directory),
        4 => (0u32..0o1000, content()).prop_map(|(mode, body)| Change::File(mode, body)),
        2 => Just(Change::Gone),
        1 => Just(Change::Opaque),
    ];
    let layer = prop::collection::btree_map(path(), change, 0..12).prop_map(|mut layer| {
        let names: Vec<String> = layer.keys().cloned().collect();
        layer.retain(|path, _| !names.iter().any(|other| path.starts_with(&format!("{other}/"))));
        layer
    });
    // A second draw adds what lies below listed directories.
    let deeper = (layer, prop::collection::vec((any::<prop::sample::Index>(), content()), 0..4)).prop_map(
        |(mut layer, files)| {
            let directories: Vec<String> = layer
                .iter()
                .filter(|(_, change)| matches!(change, Change::Directory(_) | Change::Opaque))
                .map(|(path, _)| path.clone())
                .collect();
            for (index, body) in files {
                if !directories.is_empty() {
                    layer.insert(format!("{}/new", index.get(&directories)), Change::File(0o600, body));
                }
            }
            layer
        },
    );
    prop::collection::vec(deeper, 1..5)
}

fn layer_tar(layer: &BTreeMap<String, Change>) -> Vec<u8> {
    let items = layer.iter().map(|(path, change)| {
        let (dir, name) =
            path.rsplit_once('/').map_or((String::new(), path.as_str()), |(dir, name)| (format!("{dir}/"), name));
        match change {
            Change::Directory(mode) => item(path, b'5').mode(*mode),
            Change::File(mode, body) => item(path, b'0').mode(*mode).body(body),
            Change::Gone => item(format!("{dir}.wh.{name}"), b'0'),
            Change::Opaque => item(format!("{path}/.wh..wh..opq"), b'0'),
        }
    });
    Made::of(items)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layers_are_merged_as_an_overlay_shows_them(layers in layers(), version in prop_oneof![Just(Version::V5), Just(Version::V6)]) {
        let dir = tempfile::tempdir().unwrap();
        let (mut wanted, mut unclear) = (Shown::new(), false);
        let mut sources = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            unclear |= leads_nowhere(&layers[..number], layer);
            apply(&mut wanted, layer);
            let source = dir.path().join(format!("tar{number}"));
            fs::write(&source, layer_tar(layer)).unwrap();
            let blob = dir.path().join(format!("blob{number}"));
            let recipe = Recipe { version, chunk_size: 4096, ..Recipe::default() };
            let request = Request {
                blob: BlobPlace::File(blob.clone()),
                bootstrap: BootstrapPlace::Inline,
                ..request(Source::Tar, &source, dir.path(), recipe, version == Version::V6)
            };
            create(&request).unwrap();
            let stored = fs::read(&blob).unwrap();
            let id = nydus_rafs::Algorithm::Sha256.digest(&stored).to_string();
            let boot = nydus_rafs::blob::section::read_bootstrap(&mut Cursor::new(&stored)).unwrap();
            fs::write(dir.path().join(&id), &stored).unwrap();
            let named = dir.path().join(format!("{id}.{number}"));
            fs::write(&named, boot).unwrap();
            sources.push(named);
        }
        let bootstrap = dir.path().join("bootstrap");
        let request = merge::Request { sources, bootstrap: Some(bootstrap.clone()), ..Default::default() };
        if let Err(error) = merge::merge(&request) {
            prop_assert!(unclear, "{error:#}");
            return Ok(());
        }
        let mut shown = Shown::new();
        for (path, (stat, xattrs, kind, body, _)) in listing(&unpacked(&bootstrap, dir.path())) {
            prop_assert!(xattrs.is_empty());
            let path = path.into_os_string().into_string().unwrap();
            shown.insert(path, (u32::from(stat.permissions), kind.map(|_| body)));
        }
        prop_assert_eq!(shown, wanted);
    }
}
