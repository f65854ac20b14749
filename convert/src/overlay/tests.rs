use super::*;
use crate::layer::Rules;
use crate::layer::tests::{layer, listing};
use crate::tar::made::{Item, item};

fn merged(layers: &[&[Item]]) -> Merged {
    let rules = |index| if index == 0 { Rules::Lowest } else { Rules::Upper };
    merge(layers.iter().enumerate().map(|(index, items)| layer(rules(index), items.to_vec()).unwrap()).collect())
        .unwrap()
}

fn listed(layers: &[&[Item]]) -> Vec<String> {
    listing(&merged(layers).tree)
}

#[test]
fn whiteouts_take_away_what_lies_below_and_are_not_seen() {
    let lower = [item("a/f", b'0'), item("a/g", b'0'), item("b/x/y", b'0'), item("lone", b'0')];
    let upper = [item("a/.wh.f", b'0'), item(".wh.b", b'0'), item(".wh.nothing", b'0')];
    assert_eq!(listed(&[&lower, &upper]), ["d755 /a", "-644 /a/g", "-644 /lone"]);
    assert_eq!(listed(&[&[item(".wh.f", b'0'), item("f", b'0')]]), ["-644 /f"]);
}

#[test]
fn each_kind_of_whiteouts_hides_by_its_own_sign_only() {
    let lower = [item("a", b'0'), item("b", b'0')];
    let upper = [item(".wh.a", b'0'), item("b", b'3')];
    let shown = |whiteouts| {
        let mut above = layer(Rules::Upper, upper.to_vec()).unwrap();
        above.whiteouts = whiteouts;
        listing(&merge(vec![layer(Rules::Lowest, lower.to_vec()).unwrap(), above]).unwrap().tree)
    };
    assert_eq!(shown(Whiteouts::Unpacked), Vec::<String>::new());
    assert_eq!(shown(Whiteouts::Oci), ["c644 /b"]);
    assert_eq!(shown(Whiteouts::Overlayfs), ["-644 /.wh.a", "-644 /a"]);
    assert_eq!(shown(Whiteouts::None), ["-644 /.wh.a", "-644 /a", "c644 /b"]);
}

#[test]
fn an_opaque_directory_shows_only_its_own_entries_but_an_opaque_root_hides_nothing() {
    let lower = [item("d/old", b'0'), item("d/both", b'0').mode(0o600), item("r", b'0')];
    let upper = [item("d/both", b'0'), item("d/.wh..wh..opq", b'0'), item(".wh..wh..opq", b'0')];
    assert_eq!(listed(&[&lower, &upper]), ["d755 /d", "-644 /d/both", "-644 /r"]);
    let again = [item("d/new", b'0'), item("d/.wh..wh..opq", b'0')];
    assert_eq!(listed(&[&lower, &upper, &again]), ["d755 /d", "-644 /d/new", "-644 /r"]);
}

#[test]
fn directories_join_and_other_things_replace() {
    let lower = [item("d", b'5').mode(0o700), item("d/f", b'0'), item("x/y", b'0'), item("f", b'0')];
    let upper = [
        item("d", b'5').mode(0o711),
        item("d/g", b'0'),
        item("x", b'0'),
        item("f", b'5').mode(0o750),
        item("f/in", b'0'),
    ];
    assert_eq!(listed(&[&lower, &upper]), ["d711 /d", "-644 /d/f", "-644 /d/g", "d750 /f", "-644 /f/in", "-644 /x"]);
    assert_eq!(
        listed(&[&lower, &upper, &[item("x", b'5').mode(0o755)]]),
        ["d711 /d", "-644 /d/f", "-644 /d/g", "d750 /f", "-644 /f/in", "d755 /x"]
    );
}

#[test]
fn implied_directories_keep_the_attributes_from_below() {
    let lower = [
        Item { ids: (7, 8), mtime: 99, ..item("tmp", b'5').mode(0o1777).record("SCHILY.xattr.user.a", "1") },
        item("usr/lib", b'5').mode(0o751),
        item("lib", b'2').link("usr/lib"),
    ];
    let upper = [item("tmp/x", b'0'), item("lib/so", b'0')];
    let merged = merged(&[&lower, &[item("other", b'0')], &upper]);
    assert_eq!(
        listing(&merged.tree),
        ["d751 /lib", "-644 /lib/so", "-644 /other", "d1777 /tmp", "-644 /tmp/x", "d755 /usr", "d751 /usr/lib"]
    );
    let tmp = merged.tree.node(merged.tree.find(std::path::Path::new("/tmp")).unwrap());
    assert_eq!((tmp.stat.uid, tmp.stat.gid, tmp.stat.mtime, tmp.xattrs.len()), (7, 8, 99, 1));
}

#[test]
fn implied_directories_without_any_below_take_the_group_and_the_default_acl_that_are_handed_down() {
    let acl = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x05\0\x05\0\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x05\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
    let dir = |name| Item { ids: (7, 8), ..item(name, b'5').mode(0o2770) };
    let lower = [dir("g"), dir("h").record("SCHILY.xattr.system.posix_acl_default", acl)];
    let merged = merged(&[&lower, &[item("g/a/b/f", b'0'), item("h/c/f", b'0')]]);
    let node = |path: &str| merged.tree.node(merged.tree.find(std::path::Path::new(path)).unwrap());
    let seen = |path: &str| (node(path).stat.permissions, node(path).stat.gid, node(path).xattrs.len());
    assert_eq!((seen("/g/a"), seen("/g/a/b")), ((0o755, 8, 0), (0o755, 0, 0)));
    assert_eq!((seen("/h/c"), seen("/h/c/f").0), ((0o755, 8, 2), 0o644));
}

#[test]
fn a_directory_listed_after_its_entries_keeps_only_attributes_of_its_own_and_those_from_below() {
    let lower = [item("d", b'5').mode(0o700).record("SCHILY.xattr.user.a", "1").record("SCHILY.xattr.user.b", "1")];
    let upper = [item("d/f", b'0'), item("d", b'5').mode(0o711).record("SCHILY.xattr.user.b", "2")];
    let merged = merged(&[&lower, &upper]);
    let dir = merged.tree.node(merged.tree.find(std::path::Path::new("/d")).unwrap());
    let xattrs: Vec<_> = dir.xattrs.values().map(|value| value[0]).collect();
    assert_eq!((dir.stat.permissions, xattrs), (0o711, vec![b'1', b'2']));
}

#[test]
fn hard_links_stay_together_and_names_need_not_be_text() {
    let name = b"caf\xe9";
    let lower = [item(name, b'0').body("x"), item("l", b'1').link(name)];
    let merged = merged(&[&lower, &[item([b".wh.", &name[..]].concat(), b'0')]]);
    assert_eq!(listing(&merged.tree), ["-644 /l"]);
    assert_eq!(merged.bodies.len(), 1);
    let merged = merge(vec![layer(Rules::Lowest, lower).unwrap()]).unwrap();
    let children: Vec<_> = merged.tree.children(Tree::ROOT).unwrap().values().collect();
    assert_eq!(children[0], children[1]);
}

#[test]
fn a_device_with_number_zero_is_a_whiteout_to_the_kernel() {
    let lower = [item("f", b'0'), item("g", b'0')];
    assert_eq!(listed(&[&lower, &[item("f", b'3')]]), ["-644 /g"]);
}

#[test]
fn an_unlisted_directory_below_a_file_of_a_lower_layer_is_refused_as_containerd_does() {
    let layers = |upper: &[Item]| {
        vec![layer(Rules::Lowest, [item("a", b'0')]).unwrap(), layer(Rules::Upper, upper.to_vec()).unwrap()]
    };
    let error = merge(layers(&[item("a/b/c", b'0')])).unwrap_err();
    assert_eq!((error.layer, error.path.as_str(), error.below), (1, "/a/b", 0));
    assert!(merge(layers(&[item("a/b", b'0')])).is_ok(), "the file itself is replaced");
    assert!(merge(layers(&[item("a", b'5'), item("a/b", b'5'), item("a/b/c", b'0')])).is_ok());
}
