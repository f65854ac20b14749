//! The strange images, and what containerd makes of each.

use nydus_tests::liar::Tale;
use nydus_tests::rawtar::{Entry, dir, file, gone, hardlink, record, symlink, tar, unended};

use super::made::{Image, Layer};

/// What containerd makes of an image, and what we do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Both take it and show the same.
    Same,
    /// Both refuse it; the text is part of what nydusify says.
    Refused(&'static str),
}

use Verdict::{Refused, Same};

/// One image.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Unique; lower case letters, digits and blanks.
    pub(crate) name: &'static str,
    /// What is made of it.
    pub(crate) verdict: Verdict,
    /// Where the image comes from.
    pub(crate) source: Source,
    /// More arguments for `nydusify convert`.
    pub(crate) arguments: &'static [&'static str],
}

/// Where an image comes from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// It is pushed to a real registry.
    Pushed(Image),
    /// It is told by a registry that lies.
    Told(fn(&Tale)),
}

fn of(name: &'static str, verdict: Verdict, image: Image) -> Case {
    Case { name, verdict, source: Source::Pushed(image), arguments: &[] }
}

/// An image of layers that are lists of entries.
fn case(name: &'static str, verdict: Verdict, layers: &[&[Entry]]) -> Case {
    of(name, verdict, Image::new(layers.iter().map(|entries| Layer::of(entries)).collect()))
}

/// All cases.
pub(crate) fn all() -> Vec<Case> {
    [
        paths(),
        links(),
        whiteouts(),
        replacements(),
        hard_links(),
        attributes(),
        kinds(),
        size_fields(),
        sparse(),
        streams(),
        manifests(),
        super::lies::all(),
    ]
    .concat()
}

fn paths() -> Vec<Case> {
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

fn links() -> Vec<Case> {
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

fn whiteouts() -> Vec<Case> {
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

fn replacements() -> Vec<Case> {
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

fn hard_links() -> Vec<Case> {
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

fn attributes() -> Vec<Case> {
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

fn kinds() -> Vec<Case> {
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

fn size_fields() -> Vec<Case> {
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

fn sparse() -> Vec<Case> {
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

fn streams() -> Vec<Case> {
    let entries = |name: &str| vec![dir("d").mode(0o750), file("d/f", name), file("big", name.repeat(5000))];
    let plain = |name: &str| tar(&entries(name));
    let one = |layer: Layer| Image::new(vec![layer]);
    let mut garbage = plain("garbage");
    garbage.extend(b"this is no tar any more".repeat(100));
    let mut padded = plain("padded");
    padded.resize(padded.len() + 20_000, 0);
    let mut odd = unended(&entries("odd end"));
    odd.extend([0; 512]);
    let mut short = unended(&[file("a", "1"), file("b", "cut padding")]);
    short.truncate(short.len() - 500);
    let mut cut = unended(&entries("cut body"));
    cut.truncate(cut.len() - 6000);
    let mut half = unended(&entries("half header"));
    half.extend([b'x'; 100]);
    let mut bad_sum = unended(&entries("checksum"));
    bad_sum[0] ^= 1;
    vec![
        of("gzip members", Same, one(Layer::members(&plain("members"), &[10, 1024, 5000]))),
        of("gzip empty members", Same, one(Layer::members(&plain("empty members"), &[0, 0, 700, 700]))),
        of(
            "gzip trailing zeros",
            Refused("could not read the archive"),
            one(Layer::tar(&plain("gzip zeros")).edit(|bytes| bytes.extend([0; 512]))),
        ),
        of(
            "gzip trailing garbage",
            Refused("could not read the archive"),
            one(Layer::tar(&plain("gzip garbage")).edit(|bytes| bytes.extend(b"garbage"))),
        ),
        of("gzip cut", Refused(""), one(Layer::tar(&plain("gzip cut")).edit(|bytes| bytes.truncate(bytes.len() - 20)))),
        of(
            "gzip without trailer",
            Refused(""),
            one(Layer::tar(&plain("gzip no trailer")).edit(|bytes| bytes.truncate(bytes.len() - 8))),
        ),
        of(
            "gzip wrong checksum",
            Refused(""),
            one(Layer::tar(&plain("gzip crc")).edit(|bytes| {
                let at = bytes.len() - 6;
                bytes[at] ^= 1;
            })),
        ),
        of("zstd", Same, one(Layer::zstd(&plain("zstd")))),
        of("zstd frames", Same, one(Layer::zstd_frames(&plain("zstd frames"), &[700, 700, 5000]))),
        of(
            "zstd cut",
            Refused(""),
            one(Layer::zstd(&plain("zstd cut")).edit(|bytes| bytes.truncate(bytes.len() - 20))),
        ),
        of("uncompressed", Same, one(Layer::plain(&plain("uncompressed")))),
        of(
            "gzip said to be uncompressed",
            Refused("inside a header"),
            one({
                let tar = plain("said plain");
                Layer::stored("layer.v1.tar", gzip_of(&tar), &tar)
            }),
        ),
        of(
            "uncompressed said to be gzip",
            Same,
            one({
                let tar = plain("said gzip");
                Layer::stored("layer.v1.tar+gzip", tar.clone(), &tar)
            }),
        ),
        of(
            "nondistributable",
            Same,
            one({
                let tar = plain("nondistributable");
                Layer::stored("layer.nondistributable.v1.tar+gzip", gzip_of(&tar), &tar)
            }),
        ),
        of(
            "unknown media type",
            Refused("media type `application/vnd.oci.image.layer.v1.zip`"),
            one({
                let tar = plain("unknown type");
                Layer::stored("layer.v1.zip", gzip_of(&tar), &tar)
            }),
        ),
        of(
            "docker types",
            Same,
            Image::new(vec![Layer::of(&entries("docker")), Layer::of(&[gone(".wh.big")])]).docker(),
        ),
        of("no end", Same, one(Layer::tar(&unended(&entries("no end"))))),
        of("one block at the end", Same, one(Layer::tar(&odd))),
        of("cut padding", Same, one(Layer::tar(&short))),
        of("cut body", Refused("cut short"), one(Layer::tar(&cut))),
        of("half a header", Refused("cut short"), one(Layer::tar(&half))),
        of("wrong checksum of a header", Refused("checksum"), one(Layer::tar(&bad_sum))),
        of("garbage after the end", Same, one(Layer::tar(&garbage))),
        of("padding after the end", Same, one(Layer::tar(&padded))),
        of("not a tar", Refused("not a tar header"), one(Layer::tar(&b"<html>not found</html>".repeat(100)))),
    ]
}

fn gzip_of(tar: &[u8]) -> Vec<u8> {
    Layer::tar(tar).into_stored()
}

fn manifests() -> Vec<Case> {
    let layer = |name: &str| Layer::of(&[file("f", name.repeat(3000))]);
    let one = |layer: Layer| Image::new(vec![layer]);
    vec![
        of("wrong digest", Refused("digest"), one(layer("wrong digest").corrupt())),
        of("wrong diff id", Refused("digest"), one(layer("wrong diff id").wrong_diff_id())),
        of("size too large", Refused("manifest tells"), one(layer("size too large").wrong_size(5))),
        of("size too small", Refused("manifest tells"), one(layer("size too small").wrong_size(-5))),
        of(
            "more layers than diff ids",
            Refused("rootfs.diff_ids"),
            Image::new(vec![layer("more layers"), layer("than ids")]).config(|config| {
                config["rootfs"]["diff_ids"].as_array_mut().map(Vec::pop);
            }),
        ),
        of(
            "fewer layers than diff ids",
            Refused("rootfs.diff_ids"),
            one(layer("fewer layers")).config(|config| {
                let first = config["rootfs"]["diff_ids"][0].clone();
                if let Some(list) = config["rootfs"]["diff_ids"].as_array_mut() {
                    list.push(first);
                }
            }),
        ),
        of(
            "config without rootfs",
            Refused("rootfs.diff_ids"),
            one(layer("no rootfs")).config(|config| {
                config.as_object_mut().map(|config| config.remove("rootfs"));
            }),
        ),
        of(
            "config without platform",
            Same,
            one(layer("no platform")).config(|config| {
                config
                    .as_object_mut()
                    .map(|config| (config.remove("architecture"), config.remove("os"), config.remove("config")));
            }),
        ),
        of(
            "config of another platform",
            Same,
            one(layer("other platform")).config(|config| config["architecture"] = "s390x".into()),
        ),
        of(
            "config that is no object",
            Refused("rootfs.diff_ids"),
            one(layer("no object")).config(|config| *config = serde_json::json!([1])),
        ),
        of(
            "diff ids that are no digests",
            Refused(""),
            one(layer("no digests")).config(|config| config["rootfs"]["diff_ids"][0] = "x".into()),
        ),
        of(
            "rootfs type",
            Same,
            one(layer("rootfs type")).config(|config| config["rootfs"]["type"] = "something".into()),
        ),
        of(
            "history that lies",
            Same,
            one(layer("history"))
                .config(|config| config["history"] = serde_json::json!([{"empty_layer": true}, {"created_by": "x"}])),
        ),
        of("no layers", Same, Image::new(vec![])),
        of(
            "no layers and no rootfs",
            Same,
            Image::new(vec![]).config(|config| {
                config.as_object_mut().map(|config| config.remove("rootfs"));
            }),
        ),
    ]
}
