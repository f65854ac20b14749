//! Bytes of strangers end in values or errors, never in a panic, a hang or a memory hog.

use nydus_rafs::tree::Reading;
use nydus_rafs::{Bootstrap, Ino};
use proptest::prelude::*;

use crate::fixtures::fixtures;
use crate::trees::{options, to_bytes, trees, versions};

/// Asks everything that can be asked.
fn exercise(bytes: &[u8]) -> bool {
    let Ok(bootstrap) = Bootstrap::open(bytes) else { return false };
    for blob in 0..=bootstrap.blobs().len() {
        let _ = bootstrap.chunks(blob as u16);
    }
    let mut inos = bootstrap.prefetch().unwrap_or_default();
    inos.extend([0, 1, 127, 128, 1 << 40, u64::MAX / 32, u64::MAX].map(Ino));
    let sound = match Reading::of(&bootstrap) {
        Ok(reading) => {
            inos.extend(reading.nodes.into_keys());
            true
        }
        Err(_) => false,
    };
    for ino in inos {
        let _ = bootstrap.attr(ino);
        let _ = bootstrap.xattrs(ino);
        let _ = bootstrap.readlink(ino);
        let _ = bootstrap.lookup(ino, "a".as_ref());
        for from in [0, 1, 1 << 20, u64::MAX] {
            let _ = bootstrap.entries(ino, from).map(|entries| entries.count());
        }
        for range in [0..u64::MAX, u64::MAX - 1..u64::MAX, 4000..5000] {
            let _ = bootstrap.extents(ino, range).map(|extents| extents.count());
        }
    }
    sound
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn flipped_bits_are_survived(tree in trees(), options in versions(), flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..40)) {
        let mut bytes = to_bytes(&tree, &options);
        for (at, bit) in flips {
            // Most of an image is zeros that nobody reads: flip what means something.
            let used: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
            bytes[*at.get(&used)] ^= 1 << bit;
            exercise(&bytes);
        }
    }

    #[test]
    fn golden_images_survive_changes(
        which in prop::sample::select(&["v5-inline/image.boot", "v5-prefetch-blob/bootstrap", "v6-inline/image.boot", "v6-tarfs/bootstrap", "chunk-dict/bootstrap"][..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..30),
    ) {
        let mut bytes = fixtures().get(&format!("out/{which}")).to_vec();
        prop_assert!(exercise(&bytes), "the image is sound");
        let used: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
        for (at, value, flip) in changes {
            let at = *at.get(&used);
            bytes[at] = if flip { bytes[at] ^ 1 << (value % 8) } else { value };
            exercise(&bytes);
        }
        let cut = used[used.len() / 2];
        exercise(&bytes[..cut]);
        exercise(&bytes[..cut / 8 * 8]);
    }

    #[test]
    fn words_of_any_value_are_survived(
        tree in trees(),
        words in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![Just(0u32), Just(u32::MAX), Just(0xffff), any::<u32>()]), 1..20),
    ) {
        let mut bytes = to_bytes(&tree, &options());
        for (at, word) in words {
            let at = at.index(bytes.len() / 4) * 4;
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            exercise(&bytes);
        }
    }

    #[test]
    fn truncated_images_are_survived(tree in trees(), at in any::<prop::sample::Index>()) {
        let bytes = to_bytes(&tree, &options());
        prop_assert!(exercise(&bytes), "the whole image is sound");
        let cut = at.index(bytes.len());
        exercise(&bytes[..cut]);
        exercise(&bytes[..cut / 4096 * 4096]);
    }

    #[test]
    fn random_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..9000), head in any::<bool>()) {
        if head && bytes.len() > 1408 {
            // With a sound head the rest is looked at.
            let sound = to_bytes(&nydus_rafs::Tree::new(Default::default()), &options());
            bytes[..1408].copy_from_slice(&sound[..1408]);
            bytes.truncate(bytes.len() / 4096 * 4096);
        }
        exercise(&bytes);
    }
}

#[test]
fn every_byte_of_the_superblocks_may_be_anything() {
    let bytes = to_bytes(&nydus_rafs::Tree::new(Default::default()), &options());
    for at in (0..4).chain(1024..1700).chain(4096..4700) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] = value;
            exercise(&bad);
        }
    }
}

#[test]
fn a_directory_below_itself_is_an_error() {
    let mut tree = nydus_rafs::Tree::new(Default::default());
    let node = nydus_rafs::Node {
        stat: Default::default(),
        xattrs: Default::default(),
        kind: nydus_rafs::NodeKind::Directory(Default::default()),
        implied: false,
    };
    let below = tree.add(node);
    let nydus_rafs::NodeKind::Directory(children) = &mut tree.node_mut(nydus_rafs::Tree::ROOT).kind else {
        panic!("a directory")
    };
    children.insert("below".into(), below);
    let mut bytes = to_bytes(&tree, &options());
    assert!(exercise(&bytes));
    let bootstrap = Bootstrap::open(&bytes[..]).expect("own bytes");
    let nid = bootstrap.lookup(bootstrap.root(), "below".as_ref()).expect("own bytes").expect("it is there").0;
    let named = bytes.windows(8).rposition(|window| window == nid.to_le_bytes()).expect("its own dot");
    let named = bytes[..named].windows(8).position(|window| window == nid.to_le_bytes()).unwrap_or(named);
    bytes[named..named + 8].copy_from_slice(&128u64.to_le_bytes());
    assert!(!exercise(&bytes), "the root was found below itself");
}
