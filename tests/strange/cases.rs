//! The strange images, and what containerd makes of each.

#[path = "cases/entries.rs"]
mod entries;
#[path = "cases/places.rs"]
mod places;
#[path = "cases/streams.rs"]
mod streams;

use nydus_tests::liar::Tale;
use nydus_tests::rawtar::Entry;

use super::made::{Image, Layer};

/// What containerd makes of an image, and what we do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Both take it and show the same.
    Same,
    /// Both refuse it; the text is part of what nydusify says.
    Refused(&'static str),
}

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
        places::paths(),
        places::links(),
        places::whiteouts(),
        places::replacements(),
        places::hard_links(),
        entries::attributes(),
        entries::kinds(),
        entries::size_fields(),
        entries::sparse(),
        streams::streams(),
        streams::manifests(),
        super::lies::all(),
    ]
    .concat()
}
