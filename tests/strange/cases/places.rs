//! Where entries lie, and what layers do to one another.

use super::Verdict::{Refused, Same};
use crate::made::{Image, Layer};
use nydus_tests::rawtar::{Entry, dir, file, gone, hardlink, symlink, tar};

use super::{Case, case, of};

pub(super) fn paths() -> Vec<Case> {
    let long = "n".repeat(255);
    let deep = format!("{0}/{0}/{0}/f", "d".repeat(120));
    vec![
        case("dot dot first", Same, &[&[file("../x", "1"), file("../../y/z", "2")]]),
        case("absolute name", Same, &[&[file("/abs", "1"), dir("/d/"), file("//d//f", "2")]]),
        case("dot dot inside", Same, &[&[dir("a"), file("a/../../b", "1"), file("c/../d/./e", "2")]]),
        case(
            "dots and slashes",
            Same,
            &[&[dir("./"), dir("./a//"), file("./a//f", "1"), dir("a/."), file("a/./g", "2")]],
        ),
        case(
            "the root listed",
            Same,
            &[&[dir("./").mode(0o700).owner(7, 8), file("f", "1")], &[dir("/").mode(0o1777)]],
        ),
        case("only dots", Same, &[&[dir(".."), dir("."), dir("/"), dir("a/.."), file("f", "1")]]),
        case("file named as the root", Same, &[&[file("f", "1"), file("./", "2"), file("/", "3")]]),
        case("file with trailing slash", Same, &[&[file("f/", "1"), file("g//", "2")]]),
        case("empty name", Same, &[&[file("", "1"), file("f", "2")]]),
        case(
            "name of 255 bytes",
            Same,
            &[&[file(&long, "1"), dir(format!("d/{long}")), file(format!("d/{long}/{long}"), "2")]],
        ),
        case("name of 256 bytes", Refused("longer than 255 bytes"), &[&[file(format!("{long}x"), "1")]]),
        case("deep names", Same, &[&[file(&deep, "1"), symlink("l", &deep), hardlink("h", &deep)]]),
        case(
            "names in pax records",
            Same,
            &[&[
                file("short", "1").pax("path", &deep),
                symlink("s", "x").pax("linkpath", "t".repeat(300)),
                hardlink("h", "x").pax("linkpath", &deep),
            ]],
        ),
        case(
            "names that are not text",
            Same,
            &[
                &[file(b"\xff\xfe", "1"), dir(b"d\x80"), file(b"d\x80/\xc3\x28", "2"), symlink(b"l\xf0", b"\xff\n")],
                &[gone(b".wh.\xff\xfe"), file(b"d\x80/tab\tnewline\nbackslash\\", "3")],
            ],
        ),
        case("name with nul in pax", Refused("pax record `path`"), &[&[file("f", "1").pax("path", b"a\0b")]]),
        case("ustar prefix", Same, &[&[file("name", "1").patch(345, "pre/fix"), file("n", "2").patch(345, "a/../b")]]),
        case(
            "backslash and blanks",
            Same,
            &[&[file(" ", "1"), file("a\\b", "2"), dir(" /"), file("...", "3"), file("..a/b", "4")]],
        ),
        case("path through a file", Refused("not a directory"), &[&[file("f", "1"), file("f/g", "2")]]),
        case("path through a lower file", Same, &[&[file("f", "1")], &[file("f/g", "2")]]),
        case(
            "deeper path through a lower file",
            Refused("cannot be looked up"),
            &[&[file("f", "1")], &[file("f/g/h", "2")]],
        ),
    ]
}

pub(super) fn links() -> Vec<Case> {
    vec![
        case(
            "link targets",
            Same,
            &[&[
                symlink("abs", "/etc/passwd"),
                symlink("up", "../../../x"),
                symlink("dot", "."),
                symlink("self", "self"),
                symlink("long", "t".repeat(4095)),
                symlink("slash", "a//b/"),
            ]],
        ),
        case("link target too long", Refused("1 to 4,095 bytes"), &[&[symlink("l", "t".repeat(4096))]]),
        case("link without target", Refused("1 to 4,095 bytes"), &[&[symlink("l", "")]]),
        case("through a link of the same layer", Same, &[&[dir("real"), symlink("l", "real"), file("l/f", "1")]]),
        case("through an absolute link", Same, &[&[dir("real"), symlink("l", "/real"), file("l/f", "1")]]),
        case("through a link out of the root", Same, &[&[symlink("l", "../../../out"), file("l/f", "1")]]),
        case("through a dangling link", Same, &[&[symlink("l", "none/at/all"), file("l/f", "1")]]),
        case(
            "through a chain of links",
            Same,
            &[&[symlink("a", "b"), symlink("b", "c/d"), dir("c"), symlink("c/d", "../e"), file("a/f", "1")]],
        ),
        case(
            "through a loop of links",
            Refused("255 symbolic links"),
            &[&[symlink("a", "b"), symlink("b", "a"), file("a/f", "1")]],
        ),
        case(
            "through a lower link",
            Same,
            &[&[dir("real").mode(0o750), symlink("l", "real"), file("real/old", "0")], &[file("l/f", "1")]],
        ),
        case("through a lower link out of the root", Same, &[&[symlink("l", "/../../etc")], &[file("l/f", "1")]]),
        case(
            "through a link listed as directory above",
            Same,
            &[&[dir("real"), symlink("l", "real")], &[dir("l"), file("l/f", "1")]],
        ),
        case(
            "directory entry on a link of the same layer",
            Same,
            &[&[dir("real"), symlink("l", "real"), dir("l").mode(0o700), file("l/f", "1")]],
        ),
        case("file entry on a link", Same, &[&[file("real", "0"), symlink("l", "real"), file("l", "1")]]),
        case(
            "link replaced by what it leads to",
            Same,
            &[&[symlink("a", "b"), dir("b"), file("a/x", "1"), dir("a"), file("a/y", "2")]],
        ),
    ]
}

pub(super) fn whiteouts() -> Vec<Case> {
    let base: &[Entry] =
        &[dir("d").mode(0o751), file("d/a", "1"), file("d/b", "2"), dir("d/e"), file("d/e/f", "3"), file("top", "4")];
    vec![
        case("whiteout", Same, &[base, &[gone("d/.wh.a"), gone(".wh.top")]]),
        case("whiteout of a directory", Same, &[base, &[gone(".wh.d")]]),
        case(
            "whiteout of what is not there",
            Same,
            &[base, &[gone(".wh.none"), gone("d/.wh.none"), gone("new/.wh.none")]],
        ),
        case(
            "whiteouts alone in a layer of their own",
            Same,
            &[base, &[gone(".wh.top")], &[gone("d/.wh.a")], &[gone("d/e/.wh.f")]],
        ),
        case(
            "whiteout in the lowest layer",
            Same,
            &[&[file("a", "1"), file("b", "2"), gone(".wh.a"), gone(".wh.none"), gone("d/.wh.x")]],
        ),
        case(
            "whiteout in the lowest of two",
            Same,
            &[&[file("a", "1"), file("b", "2"), gone(".wh.a")], &[file("c", "3")]],
        ),
        case("whiteout before what it hides", Same, &[base, &[gone(".wh.top"), file("top", "5")]]),
        case(
            "whiteout after what it hides",
            Refused("whiteout of what this layer itself brings"),
            &[base, &[file("top", "5"), gone(".wh.top")]],
        ),
        case(
            "whiteout after what it hides in the lowest layer",
            Same,
            &[&[file("x", "5"), gone(".wh.x"), file("y", "6")]],
        ),
        case("whiteout before what it hides in the lowest layer", Same, &[&[gone(".wh.x"), file("x", "5")]]),
        case("whiteout and directory again", Same, &[base, &[gone(".wh.d"), dir("d").mode(0o700), file("d/new", "5")]]),
        case(
            "directory and whiteout of it",
            Refused("whiteout of what this layer itself brings"),
            &[base, &[dir("d"), file("d/new", "5"), gone(".wh.d")]],
        ),
        case("whiteout twice", Refused("has a whiteout for already"), &[base, &[gone(".wh.top"), gone(".wh.top")]]),
        case(
            "whiteout then something below it",
            Refused("not a directory"),
            &[base, &[gone(".wh.d"), file("d/x", "5")]],
        ),
        case("whiteout with a body", Same, &[base, &[file(".wh.top", "not empty")]]),
        case("whiteout that is a link", Same, &[base, &[symlink(".wh.top", "x"), hardlink("d/.wh.a", "nothing")]]),
        case("whiteout that is a directory", Same, &[base, &[dir(".wh.top"), file("d/.wh.a/x", "5")]]),
        case("opaque", Same, &[base, &[dir("d").mode(0o700), gone("d/.wh..wh..opq"), file("d/new", "5")]]),
        case(
            "opaque after entries",
            Same,
            &[base, &[dir("d"), file("d/new", "5"), dir("d/e"), gone("d/.wh..wh..opq")]],
        ),
        case("opaque and nothing listed", Same, &[base, &[gone("d/.wh..wh..opq")]]),
        case(
            "opaque below opaque",
            Same,
            &[
                base,
                &[dir("d"), gone("d/.wh..wh..opq"), dir("d/e"), gone("d/e/.wh..wh..opq"), file("d/e/n", "5")],
                &[gone("d/.wh..wh..opq"), file("d/last", "6")],
            ],
        ),
        case("opaque of a missing directory", Same, &[base, &[gone("none/.wh..wh..opq"), gone("d/none/.wh..wh..opq")]]),
        case("opaque root", Same, &[base, &[gone(".wh..wh..opq"), file("new", "5")]]),
        case(
            "opaque in the lowest layer",
            Same,
            &[&[dir("d"), file("d/a", "1"), gone("d/.wh..wh..opq"), file("d/b", "2")]],
        ),
        case(
            "opaque in the lowest layer with implied",
            Same,
            &[&[file("d/i/j/a", "1"), dir("d/k"), gone("d/.wh..wh..opq"), file("d/b", "2")]],
        ),
        case(
            "opaque and whiteout together",
            Same,
            &[base, &[dir("d"), gone("d/.wh..wh..opq"), gone("d/.wh.a"), file("d/b", "5")]],
        ),
        case("opaque over a lower file", Same, &[base, &[gone("top/.wh..wh..opq")]]),
        case(
            "opaque through a link",
            Same,
            &[&[dir("real"), file("real/f", "1"), symlink("l", "real")], &[gone("l/.wh..wh..opq"), file("l/g", "2")]],
        ),
        case(
            "whiteout odd names",
            Same,
            &[base, &[gone(".wh..wh.plnk"), gone(".wh..wh..opqx"), gone(".wh..hidden"), gone("d/.wh..wh.aufs")]],
        ),
        case(
            "whiteout that is a directory with entries",
            Same,
            &[base, &[dir("d/.wh.a"), file("d/.wh.a/x", "5")], &[file("e/.wh.b/x", "6"), gone("e/.wh.b")]],
        ),
        case(
            "whiteout aufs directory",
            Same,
            &[base, &[dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", "x"), file("n", "5")]],
        ),
        case("whiteout without name", Refused("without a usable name"), &[base, &[gone(".wh.")]]),
        case("whiteout of dot", Refused("without a usable name"), &[base, &[gone(".wh..")]]),
        case("whiteout of dot dot", Refused("without a usable name"), &[base, &[gone("d/.wh...")]]),
        case("whiteout without name in the lowest layer", Same, &[&[file("a", "1"), gone("d/.wh.x")]]),
        case("whiteout of a whiteout", Same, &[base, &[gone(".wh..wh.top")], &[file("z", "5")]]),
        case("whiteout then file two layers up", Same, &[base, &[gone(".wh.d")], &[file("d/a", "5")]]),
        case("opaque then file two layers up", Same, &[base, &[dir("d"), gone("d/.wh..wh..opq")], &[file("d/a", "5")]]),
        case(
            "whiteout of an implied directory",
            Same,
            &[base, &[file("n/m/x", "5")], &[gone("n/.wh.m")], &[file("n/m/y", "6")]],
        ),
        case("zero device as whiteout", Same, &[base, &[Entry::new(b'3', "top"), Entry::new(b'3', "d/none")]]),
        case("zero device in the lowest layer", Same, &[&[Entry::new(b'3', "z"), file("a", "1")]]),
        case("zero device under a layer", Same, &[&[Entry::new(b'3', "z"), file("a", "1")], &[file("b", "2")]]),
        case(
            "overlay attributes in a layer",
            Same,
            &[
                base,
                &[
                    dir("d").pax("SCHILY.xattr.trusted.overlay.opaque", "y"),
                    dir("e").pax("SCHILY.xattr.trusted.overlay.redirect", "/d"),
                    file("g", "5").pax("SCHILY.xattr.trusted.overlay.metacopy", ""),
                    dir("h").pax("SCHILY.xattr.user.overlay.opaque", "y"),
                ],
            ],
        ),
    ]
}

pub(super) fn replacements() -> Vec<Case> {
    let base: &[Entry] = &[dir("x"), file("x/in", "1"), file("y", "2"), symlink("z", "x")];
    let special = dir("s").mode(0o1777).owner(5, 6).time(1_234_567_890).pax("SCHILY.xattr.user.k", "v");
    let mut many: Vec<Layer> =
        (0..126).map(|i| Layer::of(&[file(format!("f{i}"), i.to_string()), file("each", i.to_string())])).collect();
    many.push(Layer::of(&[gone(".wh.f3"), file("last", "x")]));
    vec![
        case("directory by file", Same, &[base, &[file("x", "3")], &[dir("x"), file("x/new", "4")]]),
        case(
            "file by directory",
            Same,
            &[base, &[dir("y"), file("y/new", "3")], &[file("y", "4")], &[symlink("y", "x")]],
        ),
        case(
            "link by directory",
            Same,
            &[base, &[dir("z"), file("z/new", "3")], &[symlink("z", "y")], &[file("z", "5")]],
        ),
        case("directory by link", Same, &[base, &[symlink("x", "z")], &[dir("x").mode(0o700)]]),
        case(
            "directory by file and back in a layer",
            Same,
            &[&[dir("x"), file("x/a", "1"), file("x", "2"), dir("x"), file("x/b", "3")]],
        ),
        case(
            "directory by link in a layer",
            Same,
            &[&[dir("x"), file("x/a", "1"), symlink("x", "y"), file("x/b", "3")]],
        ),
        case("a listed directory lost", Refused("leads through"), &[&[dir("a"), dir("a/b"), file("a", "1")]]),
        case(
            "a listed directory that is a file later",
            Same,
            &[&[dir("a").time(1_400_000_000), file("a", "1"), dir("b").time(1_300_000_000), symlink("b", "a")]],
        ),
        case(
            "a listed directory that is a dangling link later",
            Refused("takes away again"),
            &[&[dir("a"), symlink("a", "none")]],
        ),
        case(
            "the same path again",
            Same,
            &[&[file("f", "1").mode(0o600), file("f", "22").mode(0o755), file("f", ""), file("f", "4444")]],
        ),
        case(
            "the same directory again",
            Same,
            &[&[
                dir("d").mode(0o700).pax("SCHILY.xattr.user.a", "1"),
                file("d/f", "1"),
                dir("d").mode(0o750).owner(1, 1).pax("SCHILY.xattr.user.b", "2"),
            ]],
        ),
        case(
            "the same directory above",
            Same,
            &[
                &[dir("d").pax("SCHILY.xattr.user.a", "1"), file("d/f", "1")],
                &[dir("d").mode(0o711).pax("SCHILY.xattr.user.b", "2")],
            ],
        ),
        case("implied parents", Same, &[&[file("a/b/c/d", "1"), file("a/e", "2"), dir("a/b").mode(0o700).owner(3, 3)]]),
        case(
            "implied over a special directory",
            Same,
            &[std::slice::from_ref(&special), &[file("s/t/f", "1")], &[file("s/t/g", "2")]],
        ),
        case(
            "implied over a special directory two below",
            Same,
            &[std::slice::from_ref(&special), &[file("other", "0")], &[file("s/f", "1")]],
        ),
        case(
            "implied over a link",
            Same,
            &[&[special.clone(), symlink("l", "s"), symlink("far", "none")], &[file("l/f", "1"), file("far/f", "2")]],
        ),
        case("implied over a whiteout", Same, &[std::slice::from_ref(&special), &[gone(".wh.s")], &[file("s/f", "1")]]),
        case(
            "implied then listed",
            Same,
            &[std::slice::from_ref(&special), &[file("s/f", "1"), dir("s").mode(0o500).owner(9, 9)]],
        ),
        case("implied root", Same, &[&[file("f", "1")], &[file("g", "2")]]),
        of("127 layers", Same, Image::new(many)),
        of("a layer twice", Same, {
            let layer = Layer::of(&[file("f", "1"), dir("d"), gone("d/.wh.x")]);
            Image::new(vec![layer.clone(), Layer::of(&[file("f", "2"), file("d/x", "3")]), layer])
        }),
        of(
            "empty layers",
            Same,
            Image::new(vec![
                Layer::tar(&tar(&[])),
                Layer::of(&[file("f", "1")]),
                Layer::tar(&[]),
                Layer::tar(&[0; 512]),
                Layer::tar(&[0; 10240]),
            ]),
        ),
        of("nothing but empty layers", Same, Image::new(vec![Layer::tar(&tar(&[])), Layer::tar(&[0; 512])])),
        case("a layer of nothing", Same, &[&[]]),
        case("nothing left", Same, &[&[file("f", "1"), dir("d")], &[gone(".wh.f"), gone(".wh.d")]]),
    ]
}

pub(super) fn hard_links() -> Vec<Case> {
    let base: &[Entry] = &[file("a", "one"), hardlink("b", "a"), hardlink("c", "a")];
    vec![
        case("hard links", Same, &[base]),
        case("hard links below", Same, &[base, &[file("z", "1")]]),
        case(
            "hard link chain",
            Same,
            &[&[
                file("a", "1"),
                hardlink("b", "a"),
                hardlink("d/c", "b"),
                hardlink("e", "/d/../d/c"),
                hardlink("f", "./e"),
            ]],
        ),
        case(
            "hard link attributes",
            Same,
            &[&[
                file("a", "1").mode(0o600).pax("SCHILY.xattr.user.a", "1"),
                hardlink("b", "a").mode(0o4755).owner(1, 2).time(1_400_000_000).pax("SCHILY.xattr.user.b", "2"),
            ]],
        ),
        case(
            "hard link to link",
            Same,
            &[&[symlink("l", "target"), hardlink("h", "l"), hardlink("g", "h").owner(3, 3).time(1_400_000_000)]],
        ),
        case(
            "hard link to fifo and device",
            Same,
            &[&[
                Entry::new(b'6', "p"),
                hardlink("q", "p"),
                Entry::new(b'4', "b").device(Some((8, 1))),
                hardlink("c", "b").mode(0o600),
            ]],
        ),
        case(
            "hard link to later entry",
            Refused("which this layer does not hold"),
            &[&[hardlink("h", "later"), file("later", "1")]],
        ),
        case("hard link to nothing", Refused("which this layer does not hold"), &[&[hardlink("h", "none")]]),
        case(
            "hard link across layers",
            Refused("which this layer does not hold"),
            &[&[file("a", "1")], &[hardlink("h", "a")]],
        ),
        case("hard link to directory", Refused("hard link to a directory"), &[&[dir("d"), hardlink("h", "d")]]),
        case(
            "hard link to itself",
            Refused("which this layer does not hold"),
            &[&[file("a", "1"), hardlink("a", "a")]],
        ),
        case("hard link over a file", Same, &[&[file("a", "1"), file("b", "2"), hardlink("b", "a")]]),
        case("hard link over a directory", Same, &[&[file("a", "1"), dir("b"), file("b/c", "2"), hardlink("b", "a")]]),
        case(
            "hard link over a lower file",
            Same,
            &[&[file("b", "2"), dir("c"), file("c/x", "3")], &[file("a", "1"), hardlink("b", "a"), hardlink("c", "a")]],
        ),
        case(
            "hard link target replaced later",
            Same,
            &[&[file("a", "1"), hardlink("b", "a"), file("a", "2"), hardlink("c", "a")]],
        ),
        case(
            "hard link through a link",
            Same,
            &[&[dir("d"), file("d/f", "1"), symlink("l", "d"), hardlink("h", "l/f"), hardlink("l/g", "h")]],
        ),
        case("hard link out of the root", Same, &[&[file("f", "1"), hardlink("h", "../../f"), hardlink("i", "/f")]]),
        case("hard link with a body", Same, &[&[file("a", "1"), hardlink("b", "a").size(4096), file("c", "2")]]),
        case(
            "hard link to a whiteout",
            Refused("which this layer does not hold"),
            &[&[file("a", "1")], &[gone(".wh.a"), hardlink("h", ".wh.a")]],
        ),
        case(
            "hard link to what is whited out",
            Same,
            &[&[file("a", "1"), file("h", "2")], &[gone(".wh.a"), hardlink("h", "a")]],
        ),
        case(
            "hard link to nothing named",
            Refused("hard link to a directory"),
            &[&[file("a", "1"), hardlink("h", "")]],
        ),
        case("one name whited out", Same, &[base, &[gone(".wh.b")]]),
        case("two names whited out", Same, &[base, &[gone(".wh.b")], &[gone(".wh.a")]]),
        case("one name replaced above", Same, &[base, &[file("b", "two")]]),
        case(
            "all names replaced above",
            Same,
            &[base, &[file("b", "two"), hardlink("a", "b"), hardlink("c", "b")], &[gone(".wh.c")]],
        ),
        case(
            "names below an opaque directory",
            Same,
            &[
                &[dir("d"), file("d/a", "1"), hardlink("b", "d/a"), hardlink("d/c", "b")],
                &[dir("d"), gone("d/.wh..wh..opq")],
            ],
        ),
        case(
            "names lost in their own layer",
            Same,
            &[&[file("a", "1"), hardlink("b", "a"), hardlink("d/c", "a"), file("d", "2")]],
        ),
        case(
            "links to link whited out",
            Same,
            &[&[symlink("l", "t"), hardlink("m", "l"), hardlink("n", "l")], &[gone(".wh.m")]],
        ),
        case(
            "capability on a hard link",
            Same,
            &[&[
                file("a", "1")
                    .mode(0o755)
                    .pax("SCHILY.xattr.security.capability", b"\x01\0\0\x02\x0a\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
                hardlink("b", "a").mode(0o755),
            ]],
        ),
    ]
}
