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
use http::header::{ACCEPT_ENCODING, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Response, Url};
use sha2::Digest as _;

use super::head::{self, Odd, Plan};
use super::redirect::is_redirect;
use super::{Access, Call, Client, MAX_REMEMBERED, RegistryError, Traffic, Who, lock, name};
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

/// The path at the registry, and what stands for the proof of somebody else if it was asked for in their name.
type TargetKey = (String, Option<[u8; 32]>);

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
            Err(error) if says_nothing(&error) => {}
            Err(error) => return Err(error),
        }
        let stream = self.blob(repository, digest, &BlobRequest::range(0..1)).await?;
        stream.total().ok_or_else(|| RegistryError::Form {
            url: stream.url.clone(),
            reason: "without telling the size of the blob".to_owned(),
        })
    }

    /// Asks whether a blob is there: with HEAD, and where that is refused with GET for the first byte.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] unless the answer is yes or no.
    pub async fn has_blob(&self, repository: &str, digest: &str) -> Result<bool, RegistryError> {
        let mut asked = self.head_blob(repository, digest, &BlobRequest::default()).await.map(drop);
        if asked.as_ref().is_err_and(says_nothing) {
            asked = self.blob(repository, digest, &BlobRequest::range(0..1)).await.map(drop);
        }
        match asked {
            Ok(()) => Ok(true),
            Err(error) => match error.status() {
                Some(StatusCode::NOT_FOUND) => Ok(false),
                // It has no first byte, but it is there.
                Some(StatusCode::RANGE_NOT_SATISFIABLE) => Ok(true),
                _ => Err(error),
            },
        }
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
        if head::is_page(response.headers()) {
            let url = loggable(response.url());
            return Err(RegistryError::Form { url, reason: "with a web page where a blob was asked for".to_owned() });
        }
        Ok(head::length(response.headers()))
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
        let response = self.fetch(&call).await?;
        self.stream(response, request)
    }

    /// Sends `call` to where the registry last sent us for it, else to the registry, and returns a 200 or 206.
    pub(crate) async fn fetch(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let key = target_key(call);
        if let Some(target) = self.0.targets.get(&key) {
            let answer = self.send_elsewhere(call, target.clone()).await;
            match answer {
                Ok(response) if response.status().is_success() => return Ok(response),
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
        let first = self.call(call).await?;
        let redirected = is_redirect(first.status());
        let response = self.follow(call, first).await?;
        if redirected && response.status().is_success() && response.url().origin() != call.url.origin() {
            self.0.targets.keep(key, response.url().clone());
        }
        self.expect(&call.method, response, &[StatusCode::OK, StatusCode::PARTIAL_CONTENT]).await
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
        if let Some(theirs) = &request.authorization {
            call.who = Who::Caller(Some(theirs.clone()));
        }
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
        let body =
            head::judge(response.status(), response.headers(), response.content_length(), request.range.as_ref());
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

/// Tells whether an answer to HEAD is about HEAD and not about the blob: stores refuse it with a signature made for GET,
/// others know no HEAD. A 404 is the truth.
fn says_nothing(error: &RegistryError) -> bool {
    matches!(error.status().map(|status| status.as_u16()), Some(400 | 403 | 405 | 406 | 501))
}

fn target_key(call: &Call<'_>) -> TargetKey {
    let mark = |theirs: &Option<HeaderValue>| {
        let proof = theirs.as_ref().map_or(&[][..], HeaderValue::as_bytes);
        sha2::Sha256::digest(proof).into()
    };
    match &call.who {
        Who::Ours => (call.url.path().to_owned(), None),
        Who::Caller(theirs) => (call.url.path().to_owned(), Some(mark(theirs))),
    }
}
