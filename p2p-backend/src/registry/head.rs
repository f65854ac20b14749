//! What the head of an answer says about its body, and about the next request.
//!
//! Hosts ignore ranges, answer other ranges than were asked for, compress, or put a login page where a blob should be.
//! All of it shows in the head, so it is judged before a byte of the body is believed.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// How to read a body so that exactly the wanted bytes come out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Bytes to throw away first.
    pub(super) skip: u64,
    /// Bytes to take then, if that is known.
    pub(super) left: Option<u64>,
    /// Bytes of the whole blob, if that is known.
    pub(super) total: Option<u64>,
    /// The whole blob comes, where a part of it was asked for.
    pub(super) ignores_ranges: bool,
}

/// Why a body is not what was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Odd {
    Form(String),
    Short { want: u64, have: u64 },
}

/// Decides from the head of an answer what its body is.
pub(super) fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    length: Option<u64>,
    asked: Option<&Range<u64>>,
) -> Result<Plan, Odd> {
    let form = |reason: &str| Err(Odd::Form(reason.to_owned()));
    if let Some(reason) = no_blob(headers) {
        return Err(Odd::Form(reason));
    }
    let Some(asked) = asked else {
        return if status == StatusCode::OK {
            Ok(Plan { skip: 0, left: length, total: length, ignores_ranges: false })
        } else {
            form("with a part of the blob where all of it was asked for")
        };
    };
    let want = asked.end - asked.start;
    if status == StatusCode::OK {
        if let Some(length) = length.filter(|length| *length < asked.end) {
            return Err(Odd::Short { want, have: length.saturating_sub(asked.start) });
        }
        let ignores_ranges = asked.start != 0 || length != Some(want);
        return Ok(Plan { skip: asked.start, left: Some(want), total: length, ignores_ranges });
    }
    if !headers.contains_key(CONTENT_RANGE) {
        // Nothing says which part this is; a length that fits is the only hint, and digests tell the rest.
        return if length == Some(want) {
            Ok(Plan { skip: 0, left: Some(want), total: None, ignores_ranges: false })
        } else {
            form("with 206 but without `Content-Range`")
        };
    }
    let Some((given, total)) = content_range(headers) else {
        return Err(Odd::Form(format!("with `Content-Range: {}`", text(headers, CONTENT_RANGE).escape_debug())));
    };
    if given.start > asked.start || given.end <= asked.start {
        return Err(Odd::Form(format!("with bytes {given:?} where {asked:?} were asked for")));
    }
    if given.end < asked.end {
        return Err(Odd::Short { want, have: given.end - asked.start });
    }
    if length.is_some_and(|length| length != given.end - given.start) {
        return form("with a `Content-Length` that contradicts its `Content-Range`");
    }
    Ok(Plan { skip: asked.start - given.start, left: Some(want), total, ignores_ranges: false })
}

/// Returns what makes a body no blob, whatever it holds: an encoding, a web page, several parts.
pub(crate) fn no_blob(headers: &HeaderMap) -> Option<String> {
    let encoding = text(headers, CONTENT_ENCODING);
    let kind = text(headers, CONTENT_TYPE).to_ascii_lowercase();
    if !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity") {
        Some(format!("with a body in the encoding `{}`, though none was accepted", encoding.escape_debug()))
    } else if is_page(headers) {
        Some("with a web page instead of the blob: is a login page or proxy in between?".to_owned())
    } else if kind.starts_with("multipart/") {
        Some("with several ranges where one was asked for".to_owned())
    } else {
        None
    }
}

/// Tells whether the body is HTML, which no registry's answer is: a login page or a proxy's error.
pub(crate) fn is_page(headers: &HeaderMap) -> bool {
    text(headers, CONTENT_TYPE).to_ascii_lowercase().starts_with("text/html")
}

/// Returns what `Content-Length` says; of an answer to HEAD it is all there is to measure.
pub(crate) fn length(headers: &HeaderMap) -> Option<u64> {
    let digits = text(headers, CONTENT_LENGTH);
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Returns what `Content-Range: bytes first-last/total` says: the bytes in the body, and the size of the whole unless
/// that is `*`.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, Option<u64>)> {
    let text = text(headers, CONTENT_RANGE);
    let (unit, rest) = text.split_once(|character: char| character.is_ascii_whitespace() || character == '=')?;
    let (range, total) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let end = last.checked_add(1)?;
    let total = match total.trim() {
        "*" => None,
        digits => Some(digits.parse().ok()?),
    };
    let sound = unit.eq_ignore_ascii_case("bytes") && first < end && total.is_none_or(|total| end <= total);
    sound.then_some((first..end, total))
}

fn text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or("").trim()
}

/// Reads `Retry-After`, which is a number of seconds or a date.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = text(headers, RETRY_AFTER);
    match text.parse::<u64>() {
        // A day is as good as for ever.
        Ok(seconds) => Some(Duration::from_secs(seconds.min(86_400))),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(now).unwrap_or_default().min(Duration::from_secs(86_400)))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |&(name, value): &(&str, &str)| {
            (HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    fn plan(skip: u64, left: u64, total: Option<u64>, ignores_ranges: bool) -> Result<Plan, Odd> {
        Ok(Plan { skip, left: Some(left), total, ignores_ranges })
    }

    #[test]
    fn the_head_of_an_answer_decides_which_bytes_are_believed() {
        let ok = StatusCode::OK;
        let partial = StatusCode::PARTIAL_CONTENT;
        let range = |text| headers(&[("content-range", text)]);
        let table = [
            // A host without ranges sends everything.
            (ok, headers(&[]), Some(100), 10..20, plan(10, 10, Some(100), true)),
            (ok, headers(&[]), None, 10..20, plan(10, 10, None, true)),
            (ok, headers(&[]), Some(100), 0..100, plan(0, 100, Some(100), false)),
            (ok, headers(&[]), Some(15), 10..20, Err(Odd::Short { want: 10, have: 5 })),
            // Ranges as they should be, wider, narrower and elsewhere.
            (partial, range("bytes 10-19/100"), Some(10), 10..20, plan(0, 10, Some(100), false)),
            (partial, range("bytes 10-19/*"), None, 10..20, plan(0, 10, None, false)),
            (partial, range("bytes 0-99/100"), Some(100), 10..20, plan(10, 10, Some(100), false)),
            (partial, range("bytes 10-14/15"), Some(5), 10..20, Err(Odd::Short { want: 10, have: 5 })),
            (partial, headers(&[]), Some(10), 10..20, plan(0, 10, None, false)),
        ];
        for (status, headers, length, asked, expected) in table {
            assert_eq!(judge(status, &headers, length, Some(&asked)), expected, "{headers:?}");
        }
        for (status, pairs, length) in [
            (partial, &[("content-range", "bytes 11-20/100")][..], Some(10)),
            (partial, &[("content-range", "bytes 0-9/100")], Some(10)),
            (partial, &[("content-range", "bytes 19-10/100")], Some(10)),
            (partial, &[("content-range", "bytes 10-19/12")], Some(10)),
            (partial, &[("content-range", "items 10-19/100")], Some(10)),
            (partial, &[("content-range", "bytes 10-18446744073709551615/*")], None),
            (partial, &[("content-range", "bytes 10-19/100")], Some(11)),
            (partial, &[], None),
            (partial, &[], Some(11)),
            (partial, &[("content-type", "multipart/byteranges; boundary=x")], Some(10)),
            (ok, &[("content-type", "Text/HTML; charset=utf-8")], Some(100)),
            (ok, &[("content-encoding", "gzip")], Some(100)),
        ] {
            let judged = judge(status, &headers(pairs), length, Some(&(10..20)));
            assert!(matches!(judged, Err(Odd::Form(_))), "{pairs:?}: {judged:?}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        for (text, expected) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("99999999999", Some(86_400)),
            ("Tue, 14 Nov 2023 22:13:50 GMT", Some(30)),
            ("Tue, 14 Nov 2023 22:13:10 GMT", Some(0)),
            ("Mon, 14 Nov 2033 22:13:10 GMT", Some(86_400)),
            ("soon", None),
            ("-3", None),
            ("1.5", None),
        ] {
            let found = retry_after(&headers(&[("retry-after", text)]), now);
            assert_eq!(found.map(|wait| wait.as_secs()), expected, "{text}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(value in prop::collection::vec(any::<u8>(), 0..60), asked in 0_u64..100) {
            let Ok(value) = HeaderValue::from_bytes(&value) else { return Ok(()) };
            let map: HeaderMap =
                [CONTENT_RANGE, CONTENT_LENGTH, CONTENT_TYPE, CONTENT_ENCODING, RETRY_AFTER].map(|name| (name, value.clone())).into_iter().collect();
            let wait = retry_after(&map, SystemTime::now());
            prop_assert!(wait.is_none_or(|wait| wait <= Duration::from_secs(86_400)));
            for status in [StatusCode::OK, StatusCode::PARTIAL_CONTENT] {
                let _ = judge(status, &map, length(&map), Some(&(asked..asked + 10)));
            }
        }

        #[test]
        fn a_plan_never_takes_other_bytes_than_were_asked_for(
            (first, size, total) in (0_u64..50, 1_u64..50, prop::option::of(0_u64..120)),
            (start, want) in (0_u64..50, 1_u64..50),
            (status, length) in (prop::sample::select(vec![200_u16, 206]), prop::option::of(0_u64..120)),
        ) {
            let total_text = total.map_or("*".to_owned(), |total| total.to_string());
            let map = headers(&[("content-range", &format!("bytes {first}-{}/{total_text}", first + size - 1))]);
            let status = StatusCode::from_u16(status).unwrap();
            if let Ok(plan) = judge(status, &map, length, Some(&(start..start + want))) {
                let begins = if status == StatusCode::OK { 0 } else { first };
                prop_assert_eq!(begins + plan.skip, start);
                prop_assert_eq!(plan.left, Some(want));
                prop_assert!(status == StatusCode::OK || first + size >= start + want);
            }
        }

        #[test]
        fn a_content_range_comes_back(first in 0..u64::MAX / 3, size in 1..u64::MAX / 3, more in 0..u64::MAX / 3) {
            let (end, total) = (first + size, first + size + more);
            let map = headers(&[("content-range", &format!("bytes {first}-{}/{total}", end - 1))]);
            prop_assert_eq!(content_range(&map), Some((first..end, Some(total))));
        }
    }
}
