use nydus_rafs::Kind;

use super::*;
use crate::tar::Archive;
use crate::tar::made::{Item, Made, item};

pub(crate) fn layer(rules: Rules, items: impl IntoIterator<Item = Item>) -> Result<Layer, LayerError> {
    let tar = Made::of(items);
    let mut archive = Archive::new(&tar[..]);
    let mut builder = LayerBuilder::new(rules);
    let mut bodies = 0;
    while let Some(entry) = archive.next_entry()? {
        let body = LayerBuilder::wants_body(&entry).then_some(BodyId(bodies));
        bodies += usize::from(body.is_some());
        builder.add(entry, body)?;
    }
    builder.finish()
}

/// Lists a tree: type, mode and path, `i` for implied directories.
pub(crate) fn listing(tree: &Tree) -> Vec<String> {
    fn below(tree: &Tree, id: NodeId, path: &str, out: &mut Vec<String>) {
        for (name, &child) in tree.children(id).into_iter().flatten() {
            let node = tree.node(child);
            let path = format!("{path}/{}", name.display());
            let kind = match node.kind.kind() {
                Kind::Directory => "d",
                Kind::Regular => "-",
                Kind::Symlink => "l",
                Kind::CharDevice => "c",
                Kind::BlockDevice => "b",
                Kind::Fifo => "p",
                Kind::Socket => "s",
            };
            let implied = if node.implied { "i" } else { "" };
            out.push(format!("{kind}{:o}{implied} {path}", node.stat.permissions));
            below(tree, child, &path, out);
        }
    }
    let mut out = Vec::new();
    below(tree, Tree::ROOT, "", &mut out);
    out
}

fn listed(rules: Rules, items: impl IntoIterator<Item = Item>) -> Vec<String> {
    listing(&layer(rules, items).unwrap().tree)
}

fn refused(rules: Rules, items: impl IntoIterator<Item = Item>) -> Refusal {
    match layer(rules, items) {
        Err(LayerError::Entry { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn missing_parents_are_made_and_remembered_until_they_are_listed() {
    let items = || vec![item("a/b/f", b'0'), item("a", b'5').mode(0o700)];
    assert_eq!(listed(Rules::Upper, items()), ["d700 /a", "d755i /a/b", "-644 /a/b/f"]);
    let layer = layer(Rules::Upper, items()).unwrap();
    let mut how: Vec<_> = layer.implied.values().copied().collect();
    how.sort_by_key(|how| *how == Implied::All);
    assert_eq!(how, [Implied::Xattrs, Implied::All]);
}

#[test]
fn names_never_leave_the_root_and_links_lead_inside_it() {
    let items = [
        item("../../etc/passwd", b'0'),
        item("/abs", b'0'),
        item("lib", b'2').link("/../usr/lib"),
        item("lib/so", b'0'),
        item("./..", b'0'),
    ];
    assert_eq!(
        listed(Rules::Upper, items),
        [
            "-644 /abs",
            "d755i /etc",
            "-644 /etc/passwd",
            "l777 /lib",
            "d755i /usr",
            "d755i /usr/lib",
            "-644 /usr/lib/so"
        ]
    );
}

#[test]
fn later_entries_replace_earlier_ones_but_directories_join() {
    let items = [
        item("a", b'5').mode(0o755),
        item("a/f", b'0'),
        item("a", b'5').mode(0o711),
        item("b", b'5'),
        item("b/gone", b'0'),
        item("b", b'0').mode(0o600),
    ];
    assert_eq!(listed(Rules::Upper, items), ["d711 /a", "-644 /a/f", "-600 /b"]);
}

#[test]
fn hard_links_share_a_node_and_the_last_header_counts() {
    let capability = "SCHILY.xattr.security.capability";
    let items = [
        item("d/a", b'0').body("x").record(capability, "c"),
        item("b", b'1').link("d/a").mode(0o600),
        item("s", b'2').link("nowhere"),
        item("t", b'1').link("./s"),
    ];
    let layer = layer(Rules::Upper, items).unwrap();
    let find = |path: &str| layer.tree.find(std::path::Path::new(path)).unwrap();
    assert_eq!(find("/b"), find("/d/a"));
    assert_eq!(layer.tree.node(find("/b")).stat.permissions, 0o600);
    assert!(layer.tree.node(find("/b")).xattrs.is_empty(), "a change of owner takes capabilities away");
    assert_eq!(find("/s"), find("/t"));
}

#[test]
fn what_cannot_be_unpacked_is_refused_by_name_and_place() {
    let link = |target: &str| item("l", b'1').link(target);
    assert_eq!(refused(Rules::Upper, [link("missing")]), Refusal::NoTarget("missing".into()));
    assert_eq!(refused(Rules::Upper, [item("l", b'0'), link("l")]), Refusal::NoTarget("l".into()));
    assert_eq!(refused(Rules::Upper, [item("d", b'5'), link("d")]), Refusal::DirectoryLink);
    assert_eq!(refused(Rules::Upper, [item("f", b'0'), item("f/x", b'0')]), PathError::NotADirectory.into());
    assert_eq!(refused(Rules::Upper, [item(".wh.f", b'0'), item("f/x", b'0')]), PathError::NotADirectory.into());
    assert_eq!(refused(Rules::Upper, [item("l", b'2').link("l"), item("l/x", b'0')]), PathError::TooManyLinks.into());
    assert_eq!(refused(Rules::Upper, [item("x", b'0').record("path", vec![b'n'; 256])]), Refusal::NameTooLong);
    assert_eq!(refused(Rules::Upper, [item("f", b'0'), item(".wh.f", b'0')]), Refusal::WhiteoutOfOwn);
    assert_eq!(refused(Rules::Upper, [item(".wh.f", b'0'), item(".wh.f", b'0')]), Refusal::WhiteoutOfOwn);
    for name in [".wh.", ".wh..", "d/.wh..."] {
        assert_eq!(refused(Rules::Upper, [item(name, b'0')]), Refusal::Whiteout);
    }
    let error = layer(Rules::Upper, [item("ok", b'0'), link("missing")]).unwrap_err();
    assert!(error.to_string().contains("`l` at byte 512"), "{error}");
}

#[test]
fn whiteouts_stay_in_upper_layers_and_act_at_once_in_the_lowest() {
    let items = || vec![item("d/f", b'0'), item("d/.wh.g", b'0'), item("d/g", b'0'), item(".wh.x", b'0')];
    assert_eq!(listed(Rules::Upper, items()), ["-644 /.wh.x", "d755i /d", "-644 /d/f", "-644 /d/g"]);
    let items = || {
        vec![
            item("d/f", b'0'),
            item("d/.wh.f", b'0'),
            item("e/i/f", b'0'),
            item("e/g", b'0'),
            item("e/.wh..wh..opq", b'0'),
        ]
    };
    assert_eq!(listed(Rules::Lowest, items()), ["d755i /d", "d755i /e", "-644 /e/g"]);
}

#[test]
fn attributes_are_what_unpacking_leaves() {
    let long = |value: &str| item("f", b'0').record("mtime", value);
    let stat = |rules, item| {
        let layer = layer(rules, [item]).unwrap();
        layer.tree.node(layer.tree.find(std::path::Path::new("/f")).unwrap()).stat.clone()
    };
    assert_eq!((stat(Rules::Upper, long("-5.5")).mtime, stat(Rules::Upper, long("-5.5")).mtime_nsec), (0, 0));
    assert_eq!(stat(Rules::Upper, long("9223372037")).mtime, 0);
    assert_eq!(stat(Rules::Upper, long("7.000000001")).mtime_nsec, 1);
    assert_eq!(stat(Rules::Upper, item("f", b'0').record("uid", "4294967295")).uid, 0);
    assert_eq!(stat(Rules::Upper, item("f", b'0').record("uid", "4294967294")).uid, 4_294_967_294);
    let xattrs = |rules| {
        let with = item("f", b'0')
            .record("SCHILY.xattr.trusted.a", "1")
            .record("SCHILY.xattr.user.b", "2")
            .record("SCHILY.xattr.odd", "3");
        let layer = layer(rules, [with]).unwrap();
        let id = layer.tree.find(std::path::Path::new("/f")).unwrap();
        layer.tree.node(id).xattrs.keys().map(|name| name.display().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(xattrs(Rules::Upper), ["user.b"]);
    assert_eq!(xattrs(Rules::Alone), ["trusted.a", "user.b"]);
}

#[test]
fn pipes_need_no_device_numbers_and_devices_have_theirs() {
    let items =
        [item("p", b'6'), Item { device: (259, 70000), ..item("c", b'3') }, Item { device: (7, 1), ..item("b", b'4') }];
    let layer = layer(Rules::Upper, items).unwrap();
    let kind = |path: &str| layer.tree.node(layer.tree.find(std::path::Path::new(path)).unwrap()).kind.clone();
    assert_eq!(kind("/p"), NodeKind::Fifo);
    assert_eq!(kind("/c"), NodeKind::CharDevice((70000 & 0xff) | 259 << 8 | (70000 & 0xf_ff00) << 12));
    assert_eq!(kind("/b"), NodeKind::BlockDevice(0x701));
}
