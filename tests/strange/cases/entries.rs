//! What single entries are.

use super::Verdict::{Refused, Same};
use nydus_tests::rawtar::{Entry, dir, file, hardlink, record, symlink};

use super::{Case, case};

pub(super) fn attributes() -> Vec<Case> {
    let capability = b"\x01\0\0\x02\x0a\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    vec![
        case("pax global header", Same, &[&[Entry::new(b'g', "pax_global_header").body([record("comment", b"a global"), record("mode", b"755"), record("uid", b"9"), record("path", b"g")].concat()), file("f", "1")]]),
        case("large ids in pax", Same, &[&[file("f", "1").pax("uid", "4000000").pax("gid", "4294967294"), dir("d").pax("uid", "2097152")]]),
        case("large ids in binary", Same, &[&[file("f", "1").patch(108, b"\x80\0\0\0\x7f\xff\xff\xff").patch(116, b"\x80\0\0\0\0\x20\0\0")]]),
        case("ids of 32 bits and more", Same, &[&[file("f", "1").pax("uid", "4294967295"), file("g", "1").pax("gid", "4294967296"), file("h", "2").pax("uid", "-1"), file("i", "3").pax("uid", "-2")]]),
        case("ids that are no numbers", Refused("pax record `uid`"), &[&[file("f", "1").pax("uid", "root")]]),
        case("names of owners", Same, &[&[file("f", "1").patch(265, "daemon").patch(297, "daemon"), file("g", "1").pax("uname", "x").pax("gname", "y")]]),
        case("times with fractions", Same, &[&[
            file("a", "1").pax("mtime", "1500000000.123456789"), dir("b").pax("mtime", "1500000000.5"), symlink("c", "x").pax("mtime", "1500000001.000000001"),
            file("d", "1").pax("mtime", "1500000000.1234567891234"), file("e", "1").pax("mtime", "1500000000."), file("f", "1").pax("atime", "1").pax("ctime", "2"),
        ]]),
        case("times before 1970", Same, &[&[file("a", "1").pax("mtime", "-1"), file("b", "1").pax("mtime", "-1.5"), file("c", "1").pax("mtime", "-0.25"), dir("d").pax("mtime", "-100000000"),
            file("e", "1").patch(136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00"), symlink("s", "x").pax("mtime", "-5")]]),
        case("times at the edges", Same, &[&[file("a", "1").time(0), file("b", "1").pax("mtime", "0.000000001"), file("c", "1").pax("mtime", "4294967296"), file("d", "1").pax("mtime", "9223372035.999999999"),
            file("e", "1").pax("mtime", "9223372037"), file("f", "1").pax("mtime", "99999999999999"), file("g", "1").pax("mtime", "2147483648")]]),
        case("numbers with plus", Same, &[&[file("a", "1").pax("mtime", "+5").pax("uid", "+7"), file("b", "1").pax("mtime", "+5.25").pax("size", "+1")]]),
        case("time that is none", Refused("pax record `mtime`"), &[&[file("a", "1").pax("mtime", "now")]]),
        case("values with newlines", Same, &[&[
            file("f", "1").pax("SCHILY.xattr.user.n", b"a\n9 path=b\n\0=").pax("SCHILY.xattr.user.e", ""), symlink("s", "x").pax("linkpath", "a\nb"),
            file("g", "1").pax("path", "new\nline"), file("h", "1").pax("comment", "a\n12 path=evil\n"),
        ]]),
        case("capabilities", Same, &[&[file("f", "1").mode(0o755).pax("SCHILY.xattr.security.capability", capability), file("suid", "1").mode(0o4755).owner(5, 5).pax("SCHILY.xattr.security.capability", capability)]]),
        case("trusted attributes", Same, &[&[file("f", "1").pax("SCHILY.xattr.trusted.a", "1"), dir("d").pax("SCHILY.xattr.trusted.b", "2"), symlink("l", "x").pax("SCHILY.xattr.trusted.c", "3")]]),
        case("user attributes where they cannot be", Same, &[&[symlink("l", "x").pax("SCHILY.xattr.user.a", "1"), Entry::new(b'6', "p").pax("SCHILY.xattr.user.a", "1"), Entry::new(b'3', "c").device(Some((1, 3))).pax("SCHILY.xattr.user.a", "1")]]),
        case("security attributes", Same, &[&[file("f", "1").pax("SCHILY.xattr.security.ima", b"\x03\n\0").pax("SCHILY.xattr.security.other", "x"), symlink("l", "f").pax("SCHILY.xattr.security.other", "y")]]),
        case("attributes of no kind", Same, &[&[file("f", "1").pax("SCHILY.xattr.nothing.a", "1").pax("SCHILY.xattr.system.nfs4_acl", "2").pax("SCHILY.xattr.plain", "3")]]),
        case("attribute without a name", Refused("attribute without a name"), &[&[file("f", "1").pax("SCHILY.xattr.user.", "1")]]),
        case("attribute with no name at all", Refused("attribute without a name"), &[&[file("f", "1").pax("SCHILY.xattr.", "1")]]),
        case("security attribute without a name", Refused("attribute without a name"), &[&[file("f", "1").pax("SCHILY.xattr.security.", "1")]]),
        case("the longest attribute name", Same, &[&[file("f", "1").pax(&format!("SCHILY.xattr.user.{}", "n".repeat(250)), "1")]]),
        case("many attributes", Same, &[&[(0..40).fold(file("f", "1"), |entry, i| entry.pax(&format!("SCHILY.xattr.user.n{i:02}"), vec![b'v'; i]))]]),
        case("acls", Same, &[&[
            dir("d").pax("SCHILY.xattr.system.posix_acl_default", b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x04\0\x05\0\xff\xff\xff\xff\x20\0\x05\0\xff\xff\xff\xff"),
            file("f", "1").pax("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\x05\0\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff"),
        ]]),
        case("libarchive attributes", Same, &[&[file("f", "1").pax("LIBARCHIVE.xattr.user.a", "dmFsdWU"), file("g", "1").pax("SCHILY.acl.access", "user::rw-")]]),
        case("special modes", Same, &[&[
            file("u", "1").mode(0o4755).owner(1, 1), file("g", "1").mode(0o2755).owner(2, 2), file("t", "1").mode(0o1644), dir("sticky").mode(0o1777), dir("sgid").mode(0o2775).owner(0, 50),
            file("sgid/f", "1"), dir("sgid/d"), file("none", "1").mode(0), dir("closed").mode(0), file("closed/f", "1"), symlink("l", "u").mode(0), file("type", "1").mode(0o100_644),
        ]]),
        case("modes with more bits", Same, &[&[file("a", "1").mode(0o777_777), dir("d").mode(0o40755), file("dirbit", "1").mode(0o40755)]]),
        case("pax records that lie", Refused("pax record"), &[&[Entry::new(b'x', "x").body("99 path=a\n"), file("f", "1")]]),
        case("pax size", Same, &[&[file("f", "12345").size(0).pax("size", "5"), file("g", "1")]]),
        case("pax twice", Same, &[&[Entry::new(b'x', "x").body(record("path", b"aa")), Entry::new(b'x', "x").body(record("uid", b"77")), file("f", "1")]]),
        case("pax empty values", Same, &[&[file("f", "1").owner(3, 4).pax("path", "").pax("uid", "").pax("mtime", "")]]),
    ]
}

pub(super) fn kinds() -> Vec<Case> {
    let chunk = 4096;
    let body = |len: usize| (0..len).map(|i| (i * 7 / 5 % 251) as u8).collect::<Vec<_>>();
    let sizes: Vec<Entry> = [0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk - 1, 3 * chunk, 3 * chunk + 1, 512, 511, 513]
        .iter()
        .map(|&len| file(format!("f{len}"), body(len)))
        .collect();
    let mut small = case("sizes around a chunk", Same, &[&sizes, &[file("f4096", body(8192))]]);
    small.arguments = &["--fs-chunk-size", "0x1000"];
    let mib = 1 << 20;
    vec![
        small,
        case(
            "sizes around a large chunk",
            Same,
            &[&[
                file("a", body(mib)),
                file("b", body(mib - 1)),
                file("c", body(2 * mib + 1)),
                file("zeros", vec![0; mib + 5]),
            ]],
        ),
        case("nothing but empty files", Same, &[&[file("a", ""), file("b/c", ""), dir("d")]]),
        case(
            "fifo with blank numbers",
            Same,
            &[&[
                Entry::new(b'6', "p").device(None).mode(0o600),
                Entry::new(b'6', "q").patch(329, b"       \0       \0"),
            ]],
        ),
        case(
            "devices",
            Same,
            &[&[
                Entry::new(b'3', "null").device(Some((1, 3))).mode(0o666),
                Entry::new(b'4', "disk").device(Some((259, 65_537))).owner(0, 6),
                Entry::new(b'3', "high").device(Some((4095, 1_048_575))),
                Entry::new(b'4', "zero"),
                Entry::new(b'3', "one").device(Some((0, 1))),
            ]],
        ),
        case(
            "devices beyond the kernel",
            Same,
            &[&[Entry::new(b'3', "d").device(Some((4096, 3))), Entry::new(b'4', "e").device(Some((8, 1_048_576)))]],
        ),
        case("device of the old format", Same, &[&[Entry::new(b'4', "b").v7(), file("f", "1")]]),
        case("device with a body", Same, &[&[Entry::new(b'3', "c").device(Some((1, 5))).size(512), file("f", "1")]]),
        case("contiguous file", Refused("type `7`"), &[&[Entry::new(b'7', "f").body("1")]]),
        case(
            "old format",
            Same,
            &[&[
                Entry::new(0, "d/").v7().mode(0o750),
                Entry::new(0, "d/f").v7().body("1"),
                hardlink("h", "d/f").v7(),
                symlink("l", "x").v7(),
                Entry::new(0, "e").v7(),
            ]],
        ),
        case(
            "old directory that is a file",
            Refused("not a tar header"),
            &[&[Entry::new(0, "d/").body("four"), file("f", "1")]],
        ),
        case("directory with a body", Same, &[&[dir("d").size(1024), file("f", "1")]]),
        case("unknown types", Refused("type `"), &[&[Entry::new(b'A', "a"), file("f", "1")]]),
        case("volume header", Refused("type `V`"), &[&[Entry::new(b'V', "label").gnu(), file("f", "1")]]),
        case("gnu dump directory", Refused("type `D`"), &[&[Entry::new(b'D', "d").gnu(), file("f", "1")]]),
        case(
            "gnu names",
            Same,
            &[&[
                file("n".repeat(200), "1").gnu(),
                symlink("l", "t".repeat(200)).gnu(),
                file("f", "1").gnu().owner(1, 2),
            ]],
        ),
        case(
            "stargz landmarks",
            Same,
            &[&[
                file(".prefetch.landmark", "\x0f"),
                file(".no.prefetch.landmark", "\x0f"),
                file("stargz.index.json", "{}"),
                file("f", "1"),
            ]],
        ),
    ]
}

pub(super) fn size_fields() -> Vec<Case> {
    let sized = |name: &str, field: &[u8]| file(name, "12345").patch(124, field);
    let binary = |value: u64| [&[0x80, 0, 0, 0][..], &value.to_be_bytes()].concat();
    let gib = 1_u64 << 30;
    vec![
        case(
            "sizes in every spelling",
            Same,
            &[&[
                sized("twelve digits", b"000000000005"),
                sized("binary", &binary(5)),
                sized("blanks", b"         5\0 "),
                sized("no zeros", b"5\0\0\0\0\0\0\0\0\0\0\0"),
                file("nothing", "").patch(124, [0; 12]),
                file("only blanks", "").patch(124, [b' '; 12]),
                file("f", "1"),
            ]],
        ),
        case("size below zero", Refused("not a tar header"), &[&[sized("f", &[0xff; 12])]]),
        case(
            "size beyond 63 bits",
            Refused("not a tar header"),
            &[&[sized("f", &[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0])]],
        ),
        case("size beyond 64 bits", Refused("not a tar header"), &[&[sized("f", &[0xbf; 12])]]),
        case("size that is no number", Refused("not a tar header"), &[&[sized("f", b"00000000x05\0")]]),
        case("size that is not octal", Refused("not a tar header"), &[&[sized("f", b"00000000008\0")]]),
        case("size in pax below zero", Refused(""), &[&[file("f", "12345").pax("size", "-5")]]),
        case("size in pax that is no number", Refused("pax record `size`"), &[&[file("f", "1").pax("size", "1k")]]),
        case("size just below 8 gib", Refused("cut short"), &[&[sized("f", b"77777777777\0")]]),
        case("size of 8 gib in twelve digits", Refused("cut short"), &[&[sized("f", b"100000000000")]]),
        case("size of 8 gib in binary", Refused("cut short"), &[&[sized("f", &binary(8 * gib))]]),
        case(
            "size of 8 gib in pax",
            Refused("cut short"),
            &[&[file("f", "12345").size(0).pax("size", (8 * gib).to_string())]],
        ),
        case("size in pax wins", Same, &[&[sized("f", &binary(8 * gib)).pax("size", "5"), file("g", "1")]]),
        case(
            "other numbers in binary",
            Same,
            &[&[
                file("f", "1").patch(100, b"\x80\0\0\0\0\0\x01\xa4").patch(136, binary(1_400_000_000)),
                Entry::new(b'3', "c").patch(329, b"\x80\0\0\0\0\0\0\x05").patch(337, b"\x80\0\0\0\0\0\0\x01"),
            ]],
        ),
    ]
}

pub(super) fn sparse() -> Vec<Case> {
    let old = |pieces: &[(u64, u64)], real: u64, body: &[u8]| {
        let mut entry = Entry::new(b'S', "s").gnu().body(body).patch(483, format!("{real:011o}\0"));
        for (i, (offset, len)) in pieces.iter().enumerate() {
            entry = entry.patch(386 + i * 24, format!("{offset:011o}\0{len:011o}\0"));
        }
        entry
    };
    let map = |text: &str, data: &[u8]| {
        let mut body = text.as_bytes().to_vec();
        body.resize(512, 0);
        body.extend(data);
        body
    };
    let one = |body: &[u8]| {
        file("GNUSparseFile.1/s", body)
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.name", "s")
    };
    vec![
        case(
            "sparse old gnu",
            Refused("type `S`"),
            &[&[old(&[(0, 4), (8192, 3), (20000, 0)], 20000, b"headend"), file("f", "1")]],
        ),
        case(
            "sparse pax 0 0",
            Same,
            &[&[
                file("s", "headend")
                    .pax("GNU.sparse.size", "20000")
                    .pax("GNU.sparse.numblocks", "2")
                    .pax("GNU.sparse.offset", "0")
                    .pax("GNU.sparse.numbytes", "4")
                    .pax("GNU.sparse.offset", "8192")
                    .pax("GNU.sparse.numbytes", "3"),
                file("f", "1"),
            ]],
        ),
        case(
            "sparse pax 0 1",
            Same,
            &[&[
                file("GNUSparseFile.1/s", "headend")
                    .pax("GNU.sparse.size", "20000")
                    .pax("GNU.sparse.numblocks", "2")
                    .pax("GNU.sparse.map", "0,4,8192,3")
                    .pax("GNU.sparse.name", "s"),
                file("f", "1"),
            ]],
        ),
        case(
            "sparse pax 1 0",
            Same,
            &[&[one(&map("2\n0\n4\n8192\n3\n", b"headend")).pax("GNU.sparse.realsize", "20000"), file("f", "1")]],
        ),
        case(
            "sparse pax 1 0 only hole",
            Same,
            &[&[one(&map("1\n3000000\n0\n", b"")).pax("GNU.sparse.realsize", "3000000"), file("f", "1")]],
        ),
        case(
            "sparse map beyond the size",
            Refused("sparse map"),
            &[&[one(&map("2\n0\n4\n8192\n3\n", b"headend")).pax("GNU.sparse.realsize", "100"), file("f", "1")]],
        ),
        case(
            "sparse map out of order",
            Refused("sparse map"),
            &[&[one(&map("2\n8192\n3\n0\n4\n", b"endhead")).pax("GNU.sparse.realsize", "20000"), file("f", "1")]],
        ),
        case(
            "sparse map of no numbers",
            Refused("sparse map"),
            &[&[one(&map("x\n", b"")).pax("GNU.sparse.realsize", "20000"), file("f", "1")]],
        ),
        case(
            "sparse map short of data",
            Refused("sparse map"),
            &[&[one(&map("1\n0\n400\n", b"short")).pax("GNU.sparse.realsize", "400"), file("f", "1")]],
        ),
        case(
            "sparse map with data left over",
            Refused("sparse map"),
            &[&[one(&map("1\n0\n4\n", b"headmore")).pax("GNU.sparse.realsize", "400"), file("f", "1")]],
        ),
    ]
}
