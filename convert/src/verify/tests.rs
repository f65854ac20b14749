use nydus_rafs::blob::write::Form;
use nydus_rafs::{BlobInfo, Chunk, Compressor};
use proptest::prelude::*;

use super::*;
use crate::bootstrap::{self, Blob, Style};
use crate::layer::stream::pack_tar;
use crate::layer::{BodyId, Layer, Rules};
use crate::overlay;
use crate::pack::{BodyDigest, Packer, Pool, Recipe};
use crate::tar::made::{Item, Made, item};

struct Image {
    boot: Vec<u8>,
    blobs: Vec<Vec<u8>>,
    tree: Tree,
    contents: Contents,
}

fn recipe(compressor: Compressor, algorithm: Algorithm) -> Recipe {
    Recipe { compressor, algorithm, chunk_size: 4096, ..Recipe::default() }
}

struct Part {
    layer: Layer,
    bodies: Vec<BodyDigest>,
    info: Option<BlobInfo>,
    chunks: Vec<Chunk>,
    stored: Vec<u8>,
}

fn part(pool: &Pool, recipe: Recipe, rules: Rules, items: &[Item]) -> Part {
    let tar = Made::of(items.to_vec());
    let packer = Packer::new(pool, recipe, &Default::default(), Form::InlineToc, Vec::new()).unwrap();
    let (layer, bodies, blob) = pack_tar(&tar[..], rules, recipe.chunk_size, packer).unwrap();
    let sealed = blob.seal().unwrap();
    let (info, chunks) = (sealed.info().cloned(), sealed.chunks().to_vec());
    let finished = sealed.finish(b"").unwrap();
    let info = info.map(|info| bootstrap::named(info, finished.digest.into()));
    Part { layer, bodies, info, chunks, stored: finished.out }
}

fn image(recipe: Recipe, layers: &[&[Item]]) -> Image {
    let pool = Pool::start(2).unwrap();
    let rules = |index| if index == 0 { Rules::Lowest } else { Rules::Upper };
    let parts: Vec<Part> =
        layers.iter().enumerate().map(|(index, items)| part(&pool, recipe, rules(index), items)).collect();
    let (mut layers, mut rest) = (Vec::new(), Vec::new());
    for Part { layer, bodies, info, chunks, stored } in parts {
        layers.push(layer);
        rest.push((bodies, info, chunks, stored));
    }
    let same: Vec<u16> = (0..).take(rest.len()).collect();
    let mut merged = overlay::merge(layers).unwrap();
    let order = bootstrap::number_blobs(&mut merged.tree, &same, &[]);
    let used: Vec<_> = order.iter().map(|&index| &rest[usize::from(index)]).collect();
    let blobs: Vec<_> = used.iter().map(|(_, info, chunks, _)| Blob { info: info.clone().unwrap(), chunks }).collect();
    let dir = std::env::temp_dir();
    let mut written = bootstrap::write(&dir, &merged.tree, &blobs, recipe, &[], Style::default()).unwrap();
    let mut boot = Vec::new();
    written.read().unwrap().read_to_end(&mut boot).unwrap();
    let digest = |&(layer, BodyId(body)): &(usize, BodyId)| rest[layer].0[body].unwrap();
    let contents = merged.bodies.iter().map(|(&node, place)| (node, digest(place))).collect();
    let blobs = used.iter().map(|(.., stored)| stored.clone()).collect();
    Image { boot, blobs, tree: merged.tree, contents }
}

impl Image {
    fn verify(&self, algorithm: Algorithm) -> Result<u64, VerifyError> {
        let image = Bootstrap::open(&self.boot[..]).map_err(VerifyError::Tables)?;
        let sound: Result<Vec<_>, _> =
            self.blobs.iter().enumerate().map(|(number, stored)| check(&image, number, stored)).collect();
        compare(&image, &sound?, &self.tree, &self.contents, algorithm, Rigour::Everything)
    }
}

fn check(image: &Bootstrap<&[u8]>, number: usize, stored: &[u8]) -> Result<Sound, VerifyError> {
    let info = &image.blobs()[number];
    let lost = || VerifyError::Blob { blob: info.id.to_string(), source: io::ErrorKind::UnexpectedEof.into() };
    let table = info.table.as_ref().map(|table| {
        let range = table.with_header();
        stored.get(range.start as usize..range.end as usize).ok_or_else(lost)
    });
    let named = image.chunks(number as u16).map_err(VerifyError::Tables)?;
    let joined = match table.transpose()? {
        Some(table) => chunks(info, &named, table)?,
        None => named,
    };
    check_blob(info, &joined, stored)
}

fn example() -> Vec<Vec<Item>> {
    let noise = |seed: u32, len: usize| -> Vec<u8> {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(len)
        .collect()
    };
    vec![
        vec![
            item("etc", b'5').mode(0o755),
            item("etc/a", b'0').body(noise(1, 10_000)).record("SCHILY.xattr.user.k", "v"),
            item("etc/b", b'1').link("etc/a"),
            item("etc/text", b'0').body("text ".repeat(5000)),
            item("etc/empty", b'0'),
            item("link", b'2').link("etc/a"),
            item("null", b'3'),
        ],
        vec![
            item("etc/text", b'0').body(noise(2, 9000)),
            item(".wh.link", b'0'),
            item("copy", b'0').body(noise(1, 10_000)),
        ],
    ]
}

fn sample(compressor: Compressor) -> Image {
    let layers = example();
    let layers: Vec<&[Item]> = layers.iter().map(Vec::as_slice).collect();
    image(recipe(compressor, Algorithm::Blake3), &layers)
}

#[test]
fn a_bootstrap_that_names_chunks_otherwise_than_they_were_made_is_refused() {
    let image = sample(Compressor::Zstd);
    let boot = Bootstrap::open(&image.boot[..]).unwrap();
    let (info, named) = (&boot.blobs()[0], boot.chunks(0).unwrap());
    agree(info, &named, &named).unwrap();
    let changes: [fn(&mut Chunk); 4] = [
        |chunk| chunk.stored.start += 1,
        |chunk| chunk.plain.start += 4096,
        |chunk| chunk.digest = Some(Digest([7; 32])),
        |chunk| chunk.index.0 += 1000,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut made = named.all().to_vec();
        change(&mut made[0]);
        assert!(agree(info, &named, &ChunkTable::new(made)).is_err(), "change {number}");
    }
}

#[test]
fn a_sound_image_is_found_equal() {
    for compressor in [Compressor::None, Compressor::Lz4Block, Compressor::Zstd] {
        // Root, etc, five names in it of which one is replaced, copy; the null device is a whiteout.
        assert_eq!(sample(compressor).verify(Algorithm::Blake3).unwrap(), 7);
    }
}

#[test]
fn a_flipped_bit_in_any_chunk_is_found() {
    let image = Bootstrap::open(sample(Compressor::Zstd).boot).unwrap();
    for blob in 0..2_u16 {
        for chunk in image.chunks(blob).unwrap().all() {
            let mut damaged = sample(Compressor::Zstd);
            damaged.blobs[usize::from(blob)][chunk.stored.start as usize] ^= 1;
            let found = damaged.verify(Algorithm::Blake3);
            assert!(matches!(found, Err(VerifyError::Chunk { .. })), "{blob} {chunk:?} {found:?}");
        }
    }
}

#[test]
fn a_blob_that_is_cut_short_is_found() {
    let mut damaged = sample(Compressor::None);
    damaged.blobs[1].truncate(5000);
    assert!(matches!(damaged.verify(Algorithm::Blake3), Err(VerifyError::Blob { .. })));
}

#[test]
fn every_attribute_is_compared() {
    type Change = fn(&mut nydus_rafs::Node);
    let changes: [(&str, Change); 7] = [
        ("mode", |node| node.stat.permissions ^= 1),
        ("owner", |node| node.stat.uid += 1),
        ("group", |node| node.stat.gid += 1),
        ("modification time", |node| node.stat.mtime_nsec += 1),
        ("extended attributes", |node| node.xattrs.clear()),
        ("size", |node| {
            if let NodeKind::Regular { size, .. } = &mut node.kind {
                *size += 1;
            }
        }),
        ("type", |node| node.kind = NodeKind::Fifo),
    ];
    for (what, change) in changes {
        let mut image = sample(Compressor::Zstd);
        let id = image.tree.find(std::path::Path::new("/etc/a")).unwrap();
        change(image.tree.node_mut(id));
        match image.verify(Algorithm::Blake3) {
            Err(VerifyError::Differs { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn missing_further_and_renamed_entries_are_found() {
    let changes: [fn(&mut BTreeMap<OsString, NodeId>); 3] = [
        |children| {
            children.remove(OsStr::new("a"));
        },
        |children| {
            children.insert("zz".into(), children[OsStr::new("a")]);
        },
        |children| {
            let id = children.remove(OsStr::new("a")).unwrap();
            children.insert("aa".into(), id);
        },
    ];
    for change in changes {
        let mut image = sample(Compressor::Zstd);
        let dir = image.tree.find(std::path::Path::new("/etc")).unwrap();
        let NodeKind::Directory(children) = &mut image.tree.node_mut(dir).kind else { unreachable!() };
        change(children);
        assert!(matches!(image.verify(Algorithm::Blake3), Err(VerifyError::Differs { .. })));
    }
}

#[test]
fn chunks_in_the_wrong_file_are_found_though_each_is_sound() {
    let mut image = sample(Compressor::Zstd);
    let find = |path: &str| image.tree.find(std::path::Path::new(path)).unwrap();
    let (a, text) = (find("/etc/a"), find("/etc/text"));
    let (one, other) = (image.contents[&a], image.contents[&text]);
    image.contents.insert(a, other);
    image.contents.insert(text, one);
    assert!(matches!(image.verify(Algorithm::Blake3), Err(VerifyError::Differs { what: "content", .. })));
}

fn random_item() -> impl Strategy<Value = Item> {
    let name = "[a-c]{1,2}(/[a-c]{1,2}){0,2}";
    let kind = prop_oneof![4 => Just(b'0'), 2 => Just(b'5'), 1 => Just(b'2'), 1 => Just(b'6')];
    let body = (0_usize..20_000, any::<u8>())
        .prop_map(|(len, byte)| (0..len).map(|at| byte ^ (at / 997) as u8).collect::<Vec<_>>());
    (name, kind, body, 0_u32..0o10000, 0_u32..3, prop::bool::weighted(0.2), prop::bool::weighted(0.1)).prop_map(
        |(name, kind, body, mode, owner, xattr, whiteout)| {
            let name = match (whiteout, name.rsplit_once('/')) {
                (false, _) => name,
                (true, Some((dir, base))) => format!("{dir}/.wh.{base}"),
                (true, None) => format!(".wh.{name}"),
            };
            let kind = if whiteout { b'0' } else { kind };
            let made = Item { ids: (owner, owner), ..item(name, kind).mode(mode) };
            let made = match kind {
                b'0' if !whiteout => made.body(body),
                b'2' => made.link("target"),
                _ => made,
            };
            if xattr { made.record("SCHILY.xattr.user.x", "1\n2") } else { made }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_layers_come_back_as_they_went_in(
        layers in prop::collection::vec(prop::collection::vec(random_item(), 0..12), 1..4),
        lz4 in any::<bool>(),
        sha256 in any::<bool>(),
    ) {
        // Items that this layer cannot take are left out, one by one.
        let usable: Vec<Vec<Item>> = layers.iter().enumerate().map(|(index, items)| {
            let rules = if index == 0 { Rules::Lowest } else { Rules::Upper };
            let mut kept: Vec<Item> = Vec::new();
            for item in items {
                kept.push(item.clone());
                if crate::layer::tests::layer(rules, kept.clone()).is_err() {
                    kept.pop();
                }
            }
            kept
        }).collect();
        let algorithm = if sha256 { Algorithm::Sha256 } else { Algorithm::Blake3 };
        let compressor = if lz4 { Compressor::Lz4Block } else { Compressor::Zstd };
        let layers: Vec<&[Item]> = usable.iter().map(Vec::as_slice).collect();
        let parsed = layers.iter().enumerate().map(|(index, items)| {
            crate::layer::tests::layer(if index == 0 { Rules::Lowest } else { Rules::Upper }, items.to_vec()).unwrap()
        });
        prop_assume!(overlay::merge(parsed.collect()).is_ok());
        image(recipe(compressor, algorithm), &layers).verify(algorithm).unwrap();
    }
}
