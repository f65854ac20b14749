use proptest::prelude::*;

use super::made::{Item, Made, item, sealed};
use super::*;

fn all(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut archive = Archive::new(bytes);
    let mut found = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        let mut body = Vec::new();
        let mut piece = [0; 700];
        loop {
            match archive.read_body(&mut piece)? {
                0 => break,
                len => body.extend_from_slice(&piece[..len]),
            }
        }
        found.push((entry, body));
    }
    archive.drain()?;
    assert_eq!(archive.position(), bytes.len() as u64, "everything is read");
    Ok(found)
}

fn one(bytes: &[u8]) -> (Entry, Vec<u8>) {
    let mut found = all(bytes).unwrap();
    assert_eq!(found.len(), 1);
    found.remove(0)
}

#[test]
fn long_names_come_from_pax_gnu_headers_and_prefixes() {
    let long = vec![b'n'; 300];
    assert_eq!(one(&Made::of([item("short", b'0').record("path", &long)])).0.path, long);
    let gnu = [item("././@LongLink", b'L').body([&long[..], b"\0"].concat()), item("short", b'0')];
    assert_eq!(one(&Made::of(gnu)).0.path, long);
    let gnu = [item("././@LongLink", b'K').body([&long[..], b"\0"].concat()), item("l", b'2').link("x")];
    assert_eq!(one(&Made::of(gnu)).0.link, long);
    let mut header = item("name", b'0').header();
    header[345..351].copy_from_slice(b"prefix");
    let mut made = Made::default();
    made.data(&sealed(header));
    assert_eq!(one(&made.end()).0.path, b"prefix/name");
}

#[test]
fn an_extended_attribute_may_hold_any_bytes() {
    let value = b"\x01\n12 path=evil\n\0\xff";
    let tar = Made::of([item("f", b'0').record("SCHILY.xattr.security.capability", value).record("mtime", "5.25")]);
    let (entry, _) = one(&tar);
    assert_eq!(entry.xattrs[std::ffi::OsStr::new("security.capability")], value);
    assert_eq!((entry.path.as_slice(), entry.mtime, entry.mtime_nsec), (&b"f"[..], 5, 250_000_000));
}

#[test]
fn global_headers_change_nothing() {
    let global = item("g", b'g').body(made::record(b"path", b"other"));
    assert_eq!(one(&Made::of([global, item("f", b'0')])).0.path, b"f");
}

#[test]
fn old_directories_end_in_a_slash() {
    let old = item("dir/", 0).magic(&[0; 8]);
    assert_eq!(one(&Made::of([old])).0.kind, EntryKind::Directory);
    let old = item("file", 0).magic(&[0; 8]).body("x");
    assert_eq!(one(&Made::of([old])).0.kind, EntryKind::Regular);
}

#[test]
fn sizes_and_times_may_be_binary() {
    let mut header = item("f", b'0').body([7; 600]).header();
    header[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 88]);
    header[136..148].fill(0xff);
    let mut made = Made::default();
    made.data(&sealed(header));
    made.data(&[7; 600]);
    let (entry, body) = one(&made.end());
    assert_eq!((entry.size, entry.mtime, body), (600, -1, vec![7; 600]));
}

#[test]
fn links_and_directories_carry_no_data_whatever_they_say() {
    let mut header = item("d/", b'5').header();
    header[124..136].copy_from_slice(b"00000001000\0");
    let mut made = Made::default();
    made.data(&sealed(header));
    made.push(&item("f", b'0').body("x"));
    let names: Vec<_> = all(&made.end()).unwrap().into_iter().map(|(entry, _)| entry.path).collect();
    assert_eq!(names, [b"d/".to_vec(), b"f".to_vec()]);
}

/// 1,000 bytes: data at 100..600 and 900..1000.
fn sparse_plain() -> Vec<u8> {
    let mut plain = vec![0; 1000];
    plain[100..600].fill(b'a');
    plain[900..].fill(b'b');
    plain
}

fn sparse_data() -> Vec<u8> {
    [vec![b'a'; 500], vec![b'b'; 100]].concat()
}

#[test]
fn sparse_files_of_all_formats_are_expanded() {
    let pax_0_0 = item("GNUSparseFile.0/f", b'0')
        .record("GNU.sparse.size", "1000")
        .record("GNU.sparse.numblocks", "2")
        .record("GNU.sparse.offset", "100")
        .record("GNU.sparse.numbytes", "500")
        .record("GNU.sparse.offset", "900")
        .record("GNU.sparse.numbytes", "100")
        .body(sparse_data());
    let pax_0_1 = item("GNUSparseFile.0/f", b'0')
        .record("GNU.sparse.name", "real")
        .record("GNU.sparse.size", "1000")
        .record("GNU.sparse.map", "100,500,900,100")
        .body(sparse_data());
    let mut map = b"2\n100\n500\n900\n100\n".to_vec();
    map.resize(512, 0);
    let pax_1_0 = item("GNUSparseFile.0/f", b'0')
        .record("GNU.sparse.major", "1")
        .record("GNU.sparse.minor", "0")
        .record("GNU.sparse.name", "real")
        .record("GNU.sparse.realsize", "1000")
        .body([map, sparse_data()].concat());
    let mut old = item("f", b'S').magic(b"ustar  \0").body(sparse_data()).header();
    for (at, field) in [(386, 100), (398, 500), (410, 900), (422, 100), (483, 1000)] {
        old[at..at + 12].copy_from_slice(format!("{field:011o}\0").as_bytes());
    }
    let mut made = Made::default();
    made.data(&sealed(old));
    made.data(&sparse_data());
    made.push(&item("next", b'0'));
    let found = all(&made.end()).unwrap();
    assert_eq!((found[0].0.size, &found[0].1), (1000, &sparse_plain()));
    assert_eq!(found[1].0.path, b"next");
    for (item, name) in [(pax_0_0, &b"GNUSparseFile.0/f"[..]), (pax_0_1, b"real"), (pax_1_0, b"real")] {
        let found = all(&Made::of([item, made::item("next", b'0')])).unwrap();
        assert_eq!((found[0].0.path.as_slice(), found[0].0.size, &found[0].1), (name, 1000, &sparse_plain()));
        assert_eq!(found[1].0.path, b"next");
    }
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for map in ["100,500,50,10", "0,2000", "0,600,700,200", "0", "a,b"] {
        let item = item("f", b'0').record("GNU.sparse.size", "1000").record("GNU.sparse.map", map).body(sparse_data());
        assert!(matches!(all(&Made::of([item])), Err(TarError::Header { .. })), "{map}");
    }
}

#[test]
fn an_archive_may_end_without_a_mark_and_go_on_after_it() {
    let whole = Made::of([item("f", b'0').body("abc")]);
    assert_eq!(all(&whole[..1024]).unwrap().len(), 1, "no end at all");
    assert_eq!(all(&whole[..1024 + 512]).unwrap().len(), 1, "one zero block");
    assert_eq!(all(&[&whole[..], &[9; 5000]].concat()).unwrap().len(), 1, "padding after the end");
    for len in [300, 512, 514] {
        assert!(matches!(all(&whole[..len]), Err(TarError::Truncated { .. })), "{len}");
    }
}

#[test]
fn what_is_no_header_is_refused_with_its_place() {
    let mut tar = Made::of([item("a", b'0'), item("b", b'0')]);
    tar[512 + 3] ^= 1;
    assert!(matches!(all(&tar), Err(TarError::Header { at: 512, .. })));
    let tar = Made::of([item("v", b'V')]);
    assert!(matches!(all(&tar), Err(TarError::Kind { at: 0, kind: 'V', .. })));
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let one = (
        "[a-z]{1,90}",
        prop::collection::vec(any::<u8>(), 0..2000),
        0_u32..0o10000,
        0_u64..1 << 33,
        prop::collection::vec(any::<u8>(), 0..40),
    );
    let one = one.prop_map(|(name, body, mode, mtime, value)| {
        let item = Item { mtime, ..item(name, b'0').mode(mode).body(body) };
        if value.is_empty() { item } else { item.record("SCHILY.xattr.user.x", value) }
    });
    prop::collection::vec(one, 0..8)
}

proptest! {
    #[test]
    fn what_was_put_in_comes_out(items in items()) {
        let found = all(&Made::of(items.clone())).unwrap();
        prop_assert_eq!(found.len(), items.len());
        for ((entry, body), item) in found.iter().zip(&items) {
            prop_assert_eq!((&entry.path, body, u32::from(entry.permissions), entry.mtime), (&item.name, &item.body, item.mode, item.mtime as i64));
            prop_assert_eq!(entry.xattrs.values().next(), item.records.first().map(|(_, value)| value));
        }
    }

    #[test]
    fn damaged_archives_are_read_or_refused(items in items(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut bytes = Made::of(items);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(cut.index(bytes.len()) + 1);
        let mut archive = Archive::new(&bytes[..]);
        let mut piece = [0; 4096];
        while let Ok(Some(_)) = archive.next_entry() {
            while let Ok(1..) = archive.read_body(&mut piece) {}
        }
    }
}
