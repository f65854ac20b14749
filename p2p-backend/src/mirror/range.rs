//! The part of a body that a Range header asks for.

use std::ops::Range;

/// What a request wants of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it: no Range, one that is not understood, or several (which may be answered so).
    Whole,
    /// These bytes, at least one.
    Part(Range<u64>),
    /// Bytes that are not there.
    Unsatisfiable,
}

impl Wanted {
    /// Reads the value of a Range header, if there is one, for a body of `size` bytes.
    pub(super) fn of(header: Option<&str>, size: u64) -> Self {
        let Some(spec) = header.and_then(|header| {
            let (unit, spec) = header.split_once('=')?;
            unit.trim().eq_ignore_ascii_case("bytes").then(|| spec.trim())
        }) else {
            return Self::Whole;
        };
        let Some((first, last)) = spec.split_once('-') else {
            return Self::Whole;
        };
        match (number(first), number(last)) {
            (Number::Is(first), Number::Is(last)) if first > last => Self::Whole,
            (Number::Is(first), Number::Is(last)) => Self::part(first..last.saturating_add(1).min(size), size),
            (Number::Is(first), Number::Absent) => Self::part(first..size, size),
            (Number::Absent, Number::Is(length)) => Self::part(size.saturating_sub(length)..size, size),
            _ => Self::Whole,
        }
    }

    fn part(range: Range<u64>, size: u64) -> Self {
        if range.start >= size || range.is_empty() { Self::Unsatisfiable } else { Self::Part(range) }
    }
}

/// Returns the bytes that a request asks for as far as that can be told without the size; none if it depends on it.
pub(super) fn begins(header: Option<&str>) -> Option<Range<u64>> {
    let longest = u64::MAX / 2;
    match (Wanted::of(header, longest), Wanted::of(header, longest - 1)) {
        (Wanted::Whole, _) => Some(0..longest),
        // One that counts from the end begins where the size says.
        (Wanted::Part(one), Wanted::Part(other)) if one.start == other.start => Some(one),
        _ => None,
    }
}

enum Number {
    Absent,
    Is(u64),
    Not,
}

fn number(text: &str) -> Number {
    let text = text.trim();
    if text.is_empty() {
        Number::Absent
    } else if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        Number::Not
    } else {
        // More digits than fit mean "beyond the end", which the largest number says as well.
        Number::Is(text.parse().unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_the_standard_says() {
        let cases = [
            (None, 10, Wanted::Whole),
            (Some("bytes=0-3"), 10, Wanted::Part(0..4)),
            (Some("Bytes = 0-3"), 10, Wanted::Part(0..4)),
            (Some("bytes=4-"), 10, Wanted::Part(4..10)),
            (Some("bytes=-4"), 10, Wanted::Part(6..10)),
            (Some("bytes=-40"), 10, Wanted::Part(0..10)),
            (Some("bytes=8-99999999999999999999999"), 10, Wanted::Part(8..10)),
            (Some("bytes=10-"), 10, Wanted::Unsatisfiable),
            (Some("bytes=99999999999999999999999-"), 10, Wanted::Unsatisfiable),
            (Some("bytes=-0"), 10, Wanted::Unsatisfiable),
            (Some("bytes=0-0"), 0, Wanted::Unsatisfiable),
            (Some("bytes=-1"), 0, Wanted::Unsatisfiable),
            (Some("bytes=0-1,4-5"), 10, Wanted::Whole),
            (Some("bytes=5-4"), 10, Wanted::Whole),
            (Some("bytes=-"), 10, Wanted::Whole),
            (Some("bytes=+1-2"), 10, Wanted::Whole),
            (Some("lines=1-2"), 10, Wanted::Whole),
            (Some("nonsense"), 10, Wanted::Whole),
        ];
        for (header, size, wanted) in cases {
            assert_eq!(Wanted::of(header, size), wanted, "{header:?} of {size}");
        }
    }

    #[test]
    fn what_depends_on_the_size_is_not_guessed() {
        let begin = |header| begins(header).map(|range| range.start);
        for (header, start) in [
            (None, Some(0)),
            (Some("bytes=7-9"), Some(7)),
            (Some("bytes=7-"), Some(7)),
            (Some("bytes=-7"), None),
            (Some("bytes = -7"), None),
            (Some("nonsense"), Some(0)),
        ] {
            assert_eq!(begin(header), start, "{header:?}");
        }
        assert_eq!(begins(Some("bytes=7-9")), Some(7..10));
    }
}
