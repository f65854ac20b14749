//! What containerd is told to mount for a snapshot.
//!
//! Pure: a snapshot, the chain below it and what the kernel wants give the mounts. Plain images get exactly what containerd's
//! own overlayfs would give them. Images served by nydusd get the same overlay with the RAFS mount as lowest directory, and
//! with the same options: `index=off` is what lets an overlay be mounted again after its RAFS was mounted anew.

use std::path::Path;

use crate::labels::IdMap;
use crate::layout::Layout;
use crate::meta::Kind;

/// One mount, in containerd's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The type for `mount(2)`, or `bind`.
    pub kind: &'static str,
    /// What to mount.
    pub source: String,
    /// Options, in order.
    pub options: Vec<String>,
}

/// What lies below a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Snapshots with files of their own, the uppermost first.
    pub local: Vec<u64>,
    /// The bootstrap snapshot whose RAFS mount is below them all.
    pub image: Option<u64>,
}

/// What overlayfs wants on this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overlay {
    /// The kernel knows the inode index; it must be off, or directories cannot be shared by mounts.
    pub index_off: bool,
    /// Overlay attributes must be in the user namespace.
    pub userxattr: bool,
}

/// A snapshot to mount.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Its number.
    pub id: u64,
    /// Whether it is written or only looked at.
    pub kind: Kind,
    /// Whether syncing may be skipped.
    pub volatile: bool,
    /// Mapping of owners, for plain images.
    pub id_map: Option<&'a IdMap>,
}

/// The mounts of `subject` on `chain`.
pub fn of(subject: Subject<'_>, chain: &Chain, layout: &Layout, overlay: Overlay) -> Vec<Mount> {
    let mut options = Vec::new();
    if let Some(map) = subject.id_map {
        options.push(format!("uidmap={}", map.users));
        options.push(format!("gidmap={}", map.groups));
    }
    let active = subject.kind == Kind::Active;
    let mut lowers: Vec<String> = chain.local.iter().map(|id| text(&layout.upper(*id))).collect();
    lowers.extend(chain.image.map(|id| text(&layout.rafs(id))));

    match (&lowers[..], active) {
        ([], _) => return vec![bind(text(&layout.upper(subject.id)), active, options)],
        ([only], false) if chain.image.is_none() => return vec![bind(only.clone(), false, options)],
        // An overlay without an upper needs two lowers; our own directory is empty.
        ([_], false) => lowers.push(text(&layout.upper(subject.id))),
        _ => {}
    }
    if overlay.index_off {
        options.push("index=off".to_owned());
    }
    if overlay.userxattr {
        options.push("userxattr".to_owned());
    }
    if active {
        if subject.volatile {
            options.push("volatile".to_owned());
        }
        options.push(format!("workdir={}", text(&layout.work(subject.id))));
        options.push(format!("upperdir={}", text(&layout.upper(subject.id))));
    }
    options.push(format!("lowerdir={}", lowers.join(":")));
    vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
}

fn bind(source: String, writable: bool, mut options: Vec<String>) -> Mount {
    options.push(if writable { "rw" } else { "ro" }.to_owned());
    options.push("rbind".to_owned());
    Mount { kind: "bind", source, options }
}

fn text(path: &Path) -> String {
    // The root is checked to be UTF-8 when the configuration is read; below it everything is ours.
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: Overlay = Overlay { index_off: true, userxattr: false };

    fn mounts(id: u64, kind: Kind, local: &[u64], image: Option<u64>) -> String {
        let chain = Chain { local: local.to_vec(), image };
        let subject = Subject { id, kind, volatile: false, id_map: None };
        let mounts = of(subject, &chain, &Layout::new("/r"), KERNEL);
        assert_eq!(mounts.len(), 1);
        format!("{} {} {}", mounts[0].kind, mounts[0].source, mounts[0].options.join(","))
    }

    #[test]
    fn plain_snapshots_are_mounted_as_by_containerds_overlayfs() {
        let table = [
            (mounts(1, Kind::Active, &[], None), "bind /r/snapshots/1/fs rw,rbind"),
            (mounts(1, Kind::View, &[], None), "bind /r/snapshots/1/fs ro,rbind"),
            (mounts(2, Kind::View, &[1], None), "bind /r/snapshots/1/fs ro,rbind"),
            (
                mounts(2, Kind::Active, &[1], None),
                "overlay overlay index=off,workdir=/r/snapshots/2/work,upperdir=/r/snapshots/2/fs,lowerdir=/r/snapshots/1/fs",
            ),
            (
                mounts(3, Kind::Active, &[2, 1], None),
                "overlay overlay index=off,workdir=/r/snapshots/3/work,upperdir=/r/snapshots/3/fs,lowerdir=/r/snapshots/2/fs:/r/snapshots/1/fs",
            ),
            (
                mounts(3, Kind::View, &[2, 1], None),
                "overlay overlay index=off,lowerdir=/r/snapshots/2/fs:/r/snapshots/1/fs",
            ),
        ];
        for (got, want) in table {
            assert_eq!(got, want);
        }
    }

    #[test]
    fn an_image_is_the_lowest_directory_and_lies_outside_the_snapshots() {
        let table = [
            (
                mounts(9, Kind::Active, &[], Some(4)),
                "overlay overlay index=off,workdir=/r/snapshots/9/work,upperdir=/r/snapshots/9/fs,lowerdir=/r/mnt/4",
            ),
            (mounts(9, Kind::View, &[], Some(4)), "overlay overlay index=off,lowerdir=/r/mnt/4:/r/snapshots/9/fs"),
            (mounts(9, Kind::View, &[6], Some(4)), "overlay overlay index=off,lowerdir=/r/snapshots/6/fs:/r/mnt/4"),
            (
                mounts(9, Kind::Active, &[7, 6], Some(4)),
                "overlay overlay index=off,workdir=/r/snapshots/9/work,upperdir=/r/snapshots/9/fs,lowerdir=/r/snapshots/7/fs:/r/snapshots/6/fs:/r/mnt/4",
            ),
        ];
        for (got, want) in table {
            assert_eq!(got, want);
        }
    }

    #[test]
    fn as_many_layers_as_containerd_takes_fit_a_page_when_named_from_the_root() {
        // containerd goes to the directory that all lower ones share, ours included, and names them from there.
        let root = format!("/{}", "r".repeat(69));
        let local: Vec<u64> = (1_000_000_000..).take(127).collect();
        for image in [None, Some(u64::from(u32::MAX))] {
            let subject = Subject { id: 2_000_000_000, kind: Kind::Active, volatile: true, id_map: None };
            let mounts = of(subject, &Chain { local: local.clone(), image }, &Layout::new(&root), KERNEL);
            let text = mounts[0].options.join(",");
            assert!(text.len() > 4096, "it is too long as it is");
            let (before, lowers) = text.split_once("lowerdir=").expect("it has lower directories");
            let named: usize = lowers.split(':').map(|lower| lower.len() - root.len()).sum();
            assert!(before.len() + "lowerdir=".len() + named < 4096 - 512, "{}", before.len() + named);
        }
    }

    #[test]
    fn volatile_and_kernel_options_reach_overlays_only() {
        let layout = Layout::new("/r");
        let subject = Subject { id: 2, kind: Kind::Active, volatile: true, id_map: None };
        let overlay = Overlay { index_off: false, userxattr: true };
        let on_parent = of(subject, &Chain { local: vec![1], image: None }, &layout, overlay);
        assert_eq!(on_parent[0].options[..2], ["userxattr", "volatile"]);
        let alone = of(subject, &Chain::default(), &layout, overlay);
        assert_eq!(alone[0].options, ["rw", "rbind"]);
        let looked_at =
            of(Subject { kind: Kind::View, ..subject }, &Chain { local: vec![1, 3], image: None }, &layout, overlay);
        assert_eq!(looked_at[0].options[..1], ["userxattr"]);
        assert!(!looked_at[0].options.contains(&"volatile".to_owned()));
    }

    #[test]
    fn a_mapping_of_owners_is_passed_on() {
        let map = IdMap { users: "0:5:9".into(), groups: "0:6:9".into(), root_user: 5, root_group: 6 };
        let subject = Subject { id: 2, kind: Kind::Active, volatile: false, id_map: Some(&map) };
        let got = of(subject, &Chain { local: vec![1], image: None }, &Layout::new("/r"), Overlay::default());
        assert_eq!(got[0].options[..2], ["uidmap=0:5:9", "gidmap=0:6:9"]);
    }
}
