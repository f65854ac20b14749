//! Blobs: their size, and their bytes as a stream of exactly the range that was asked for.
//!
//! Registries often answer a blob with a redirect to a store, good for some minutes. The target is kept per
//! blob and asked directly, until it answers with a status that means "expired" or not at all. It was given
//! to whoever showed a proof, so what one caller's proof obtained is not used for another's.
//!
//! A host may ignore `Range` and send the whole blob with 200. Then the stream skips to the range and stops
//! behind it; nothing is held, but everything before the range is paid for. [`BlobStream::ignores_ranges`]
//! tells, so that a caller who wants many ranges can read the blob once instead.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Response, Url};

use super::{Access, Call, Client, MAX_REMEMBERED, RegistryError, Traffic, is_redirect, lock, name};
use crate::http::{Body, loggable};

/// What to fetch of a blob, and in whose name.
#[derive(Debug, Clone, Default)]
pub struct BlobRequest {
    /// The bytes wanted; `None` is all of them. Must not be empty.
    pub range: Option<Range<u64>>,
    /// Further headers, sent also to where the registry redirects.
    pub headers: HeaderMap,
    /// The caller's own `Authorization`. If given, it is the only proof used and a 401 is final.
    pub authorization: Option<HeaderValue>,
}

impl BlobRequest {
    /// Asks for `range` with our own credential.
    pub fn range(range: Range<u64>) -> Self {
        Self { range: Some(range), ..Self::default() }
    }
}

type TargetKey = (String, String, Option<HeaderValue>);

/// Where blobs were redirected to.
#[derive(Default)]
pub(super) struct Targets(Mutex<HashMap<TargetKey, Url>>);

impl Targets {
    pub(super) fn clear(&self) {
        lock(&self.0).clear();
    }

    fn get(&self, key: &TargetKey) -> Option<Url> {
        lock(&self.0).get(key).cloned()
    }

    fn keep(&self, key: TargetKey, target: Url) {
        let mut all = lock(&self.0);
        if all.len() >= MAX_REMEMBERED {
            all.clear();
        }
        all.insert(key, target);
    }

    /// Drops a target, unless another has taken its place.
    fn drop_if(&self, key: &TargetKey, target: &Url) {
        let mut all = lock(&self.0);
        if all.get(key) == Some(target) {
            all.remove(key);
        }
    }
}

/// The bytes of a blob as they come.
#[derive(Debug)]
pub struct BlobStream {
    body: Body,
    url: String,
    traffic: std::sync::Arc<Traffic>,
    /// Bytes before the range, still to be thrown away.
    skip: u64,
    /// Bytes still to come, if that is known.
    left: Option<u64>,
    want: Option<u64>,
    total: Option<u64>,
    ignores_ranges: bool,
}

impl BlobStream {
    /// Returns the size of the whole blob, if the answer told.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// Returns how many bytes the stream will yield, if that is known.
    pub fn len(&self) -> Option<u64> {
        self.want
    }

    /// Tells whether the stream is known to yield nothing.
    pub fn is_empty(&self) -> bool {
        self.want == Some(0)
    }

    /// Tells whether the host sent the whole blob where a part of it was asked for.
    pub fn ignores_ranges(&self) -> bool {
        self.ignores_ranges
    }

    /// Returns who answered, without query and user.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the next bytes, or `None` after exactly as many as were asked for. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Http`] if the connection breaks or stalls, [`RegistryError::Short`] if the body ends early.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        while self.left != Some(0) {
            let Some(mut piece) = self.body.next().await? else {
                return match (self.left, self.want) {
                    (Some(left), Some(want)) => {
                        let have = want - left;
                        Err(RegistryError::Short { url: self.url.clone(), want, have })
                    }
                    _ => {
                        self.left = Some(0);
                        Ok(None)
                    }
                };
            };
            self.traffic.count_bytes(piece.len());
            let skipped = self.skip.min(piece.len() as u64);
            self.skip -= skipped;
            drop(piece.split_to(usize::try_from(skipped).expect("not longer than a piece in memory")));
            if let Some(left) = &mut self.left {
                // A longer body is cut: what follows was not asked for.
                piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= piece.len() as u64;
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// Returns all bytes; never more than were asked for, so a range bounds the memory.
    ///
    /// # Errors
    ///
    /// As [`BlobStream::next`]; and [`RegistryError::Form`] if the length is unknown and the body over `limit`.
    pub async fn read(mut self, limit: u64) -> Result<Bytes, RegistryError> {
        let too_long =
            |url: &str| RegistryError::Form { url: url.to_owned(), reason: format!("with more than {limit} bytes") };
        if self.want.is_some_and(|want| want > limit) {
            return Err(too_long(&self.url));
        }
        // What a host claims is not a reason to reserve much memory before it sends.
        let expected = self.want.unwrap_or(0).min(4 << 20);
        let mut held = BytesMut::with_capacity(usize::try_from(expected).unwrap_or(0));
        while let Some(piece) = self.next().await? {
            held.extend_from_slice(&piece);
            if held.len() as u64 > limit {
                return Err(too_long(&self.url));
            }
        }
        Ok(held.freeze())
    }
}

impl Client {
    /// Returns the size of a blob.
    ///
    /// Asks with HEAD; where that is refused or tells no length, with GET for the first byte.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; `Form` if the host tells the size in neither way.
    pub async fn blob_size(&self, repository: &str, digest: &str) -> Result<u64, RegistryError> {
        match self.head_blob(repository, digest, &BlobRequest::default()).await {
            Ok(Some(size)) => return Ok(size),
            Ok(None) => {}
            // Stores refuse HEAD with a signature made for GET; a 404 is the truth.
            Err(RegistryError::Refused(refusal)) if matches!(refusal.status.as_u16(), 400 | 403 | 405 | 406 | 501) => {}
            Err(error) => return Err(error),
        }
        let stream = self.blob(repository, digest, &BlobRequest::range(0..1)).await?;
        stream.total().ok_or_else(|| RegistryError::Form {
            url: stream.url.clone(),
            reason: "without telling the size of the blob".to_owned(),
        })
    }

    /// Asks with HEAD whether a blob may be read; returns its size if the answer told.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Refused`] with the status if not.
    pub async fn head_blob(
        &self,
        repository: &str,
        digest: &str,
        request: &BlobRequest,
    ) -> Result<Option<u64>, RegistryError> {
        let mut call = self.blob_call(Method::HEAD, repository, digest, request).await?;
        call.headers.remove(RANGE);
        let response = self.call(&call).await?;
        let response = self.follow(&call, response).await?;
        let response = self.expect(&call.method, response, &[StatusCode::OK]).await?;
        // The length of a HEAD is in its header only: there is no body to measure.
        let length = response.headers().get(http::header::CONTENT_LENGTH);
        Ok(length.and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok()))
    }

    /// Opens a blob or a part of it. The stream yields exactly what was asked for, or fails.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; nothing has been read of the body yet.
    pub async fn blob(
        &self,
        repository: &str,
        digest: &str,
        request: &BlobRequest,
    ) -> Result<BlobStream, RegistryError> {
        let call = self.blob_call(Method::GET, repository, digest, request).await?;
        let key = (repository.to_owned(), digest.to_owned(), request.authorization.clone());
        if let Some(target) = self.0.targets.get(&key) {
            let answer = self.send_elsewhere(&call, target.clone()).await;
            match answer {
                Ok(response) if response.status().is_success() => return self.stream(response, request),
                // It stands for the registry while it lives: these answers are about the blob, not about the target.
                Ok(response) if matches!(response.status().as_u16(), 416 | 429) => {
                    return Err(self.refusal(&call.method, response).await);
                }
                Ok(response) => {
                    tracing::debug!(target = %loggable(&target), status = %response.status(), "asking the registry where the blob is now");
                }
                Err(error) => {
                    tracing::debug!(target = %loggable(&target), %error, "asking the registry where the blob is now");
                }
            }
            self.0.targets.drop_if(&key, &target);
        }
        let first = self.call(&call).await?;
        let redirected = is_redirect(first.status());
        let response = self.follow(&call, first).await?;
        if redirected && response.status().is_success() && response.url().origin() != call.url.origin() {
            self.0.targets.keep(key, response.url().clone());
        }
        let response = self.expect(&call.method, response, &[StatusCode::OK, StatusCode::PARTIAL_CONTENT]).await?;
        self.stream(response, request)
    }

    /// Reads the bytes `range` of a blob.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    pub async fn blob_range(&self, repository: &str, digest: &str, range: Range<u64>) -> Result<Bytes, RegistryError> {
        let length = range.end.saturating_sub(range.start);
        if length == 0 {
            return Ok(Bytes::new());
        }
        self.blob(repository, digest, &BlobRequest::range(range)).await?.read(length).await
    }

    async fn blob_call<'c>(
        &self,
        method: Method,
        repository: &'c str,
        digest: &str,
        request: &BlobRequest,
    ) -> Result<Call<'c>, RegistryError> {
        let url = self.url(&format!("v2/{}/blobs/{}", name(repository)?, name(digest)?)).await?;
        let mut call = Call::new(method, url, repository, Access::Pull);
        call.headers = request.headers.clone();
        call.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        call.authorization = request.authorization.clone();
        if let Some(range) = &request.range {
            let last = range.end.checked_sub(1).filter(|last| *last >= range.start);
            let last = last.ok_or_else(|| RegistryError::Name(format!("bytes {range:?}")))?;
            let value = HeaderValue::try_from(format!("bytes={}-{last}", range.start));
            call.headers.insert(RANGE, value.expect("digits and signs are a header"));
        }
        Ok(call)
    }

    fn stream(&self, response: Response, request: &BlobRequest) -> Result<BlobStream, RegistryError> {
        let url = loggable(response.url());
        let body = judge(response.status(), response.headers(), response.content_length(), request.range.as_ref());
        let Plan { skip, left, total, ignores_ranges } = match body {
            Ok(plan) => plan,
            Err(Odd::Form(reason)) => return Err(RegistryError::Form { url, reason }),
            Err(Odd::Short { want, have }) => return Err(RegistryError::Short { url, want, have }),
        };
        Ok(BlobStream {
            body: self.0.http.body(response),
            url,
            traffic: std::sync::Arc::clone(&self.0.traffic),
            skip,
            left,
            want: left,
            total,
            ignores_ranges,
        })
    }
}

/// How to read a body so that exactly the wanted bytes come out.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    skip: u64,
    left: Option<u64>,
    total: Option<u64>,
    ignores_ranges: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Odd {
    Form(String),
    Short { want: u64, have: u64 },
}

/// Decides from the head of an answer what its body is.
fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    length: Option<u64>,
    asked: Option<&Range<u64>>,
) -> Result<Plan, Odd> {
    let form = |reason: &str| Err(Odd::Form(reason.to_owned()));
    let text = |header| headers.get(header).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or("").trim();
    let encoding = text(CONTENT_ENCODING);
    if !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity") {
        return Err(Odd::Form(format!("with a body in the encoding `{encoding}`, though none was accepted")));
    }
    let kind = text(CONTENT_TYPE).to_ascii_lowercase();
    if kind.starts_with("text/html") {
        return form("with a web page instead of the blob: is a login page or proxy in between?");
    }
    if kind.starts_with("multipart/") {
        return form("with several ranges where one was asked for");
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
    let Some(value) = headers.get(CONTENT_RANGE) else {
        // Nothing says which part this is; a length that fits is the only hint, and digests tell the rest.
        return if length == Some(want) {
            Ok(Plan { skip: 0, left: Some(want), total: None, ignores_ranges: false })
        } else {
            form("with 206 but without `Content-Range`")
        };
    };
    let Some((given, total)) = value.to_str().ok().and_then(content_range) else {
        return Err(Odd::Form(format!(
            "with `Content-Range: {}`",
            String::from_utf8_lossy(value.as_bytes()).escape_debug()
        )));
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

/// Reads `bytes first-last/total`; the total may be `*`.
fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(|character: char| character.is_ascii_whitespace() || character == '=')?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |&(name, value): &(&str, &str)| {
            (http::HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap())
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
}
