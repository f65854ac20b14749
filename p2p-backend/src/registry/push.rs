//! Blobs and manifests on their way up.
//!
//! An upload is a session: POST opens it, its address comes in `Location` (absolute or relative, with a
//! query that must be kept, and new after every step), PATCH adds bytes, PUT with the digest closes it.
//!
//! Where a connection breaks in the middle, GET of that address tells how many bytes arrived ([`Upload::resume`]), and the
//! rest goes on from there. Not every registry can: CNCF distribution 2.8 gives a session up whose bytes are not those that
//! its address tells of, and a registry that restarts forgets its sessions. Then the upload starts again from the beginning. Either way only
//! the caller knows where the bytes come from. [`RegistryError::is_transient`] tells when to try.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Request, Response, Url};
use sha2::Digest as _;

use super::{Access, Call, Client, RegistryError, name};
use crate::http::{Http, loggable};

/// What came of the wish to take a blob from another repository.
#[derive(Debug)]
pub enum Mounted {
    /// The blob is there.
    Done,
    /// The registry would not; it opened an upload instead.
    Upload(Upload),
}

/// An open upload of one blob.
#[derive(Debug)]
pub struct Upload {
    client: Client,
    repository: String,
    /// What it was opened with: a proof for this is at hand, one for something less may not be.
    access: Access,
    location: Url,
    sent: u64,
}

impl Client {
    /// Makes a blob of repository `from` appear in `repository` without moving its bytes.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]. A registry that declines is no error: [`Mounted::Upload`].
    pub async fn mount_blob(&self, repository: &str, digest: &str, from: &str) -> Result<Mounted, RegistryError> {
        let mut url = self.uploads(repository).await?;
        url.query_pairs_mut().append_pair("mount", digest).append_pair("from", name(from)?);
        let access = Access::Mount(from.to_owned());
        match self.open(url, repository, access.clone()).await {
            Ok(response) if response.status() == StatusCode::CREATED => Ok(Mounted::Done),
            Ok(response) => Ok(Mounted::Upload(self.session(repository, access, &response)?)),
            // No right to read `from`, or no such verb; an upload may still be possible.
            Err(error) if matches!(error.status().map(|status| status.as_u16()), Some(400 | 401 | 403 | 404 | 405)) => {
                Ok(Mounted::Upload(self.start_upload(repository).await?))
            }
            Err(error) => Err(error),
        }
    }

    /// Opens an upload.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    pub async fn start_upload(&self, repository: &str) -> Result<Upload, RegistryError> {
        let url = self.uploads(repository).await?;
        let response = self.open(url, repository, Access::Push).await?;
        self.session(repository, Access::Push, &response)
    }

    /// Uploads a blob that is in memory, unless it is there already. Starts a lost session again once.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    pub async fn push_blob(&self, repository: &str, digest: &str, bytes: Bytes) -> Result<(), RegistryError> {
        if self.has_blob(repository, digest).await? {
            return Ok(());
        }
        for last in [false, true] {
            let attempt = async { self.start_upload(repository).await?.finish(digest, bytes.clone()).await };
            match attempt.await {
                Err(error) if !last && is_lost_session(&error) => {
                    tracing::debug!(repository, digest, %error, "starting the upload again");
                }
                outcome => return outcome,
            }
        }
        unreachable!("the last attempt returns")
    }

    /// Writes a manifest under a tag or its digest; returns the digest of the bytes.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    pub async fn put_manifest(
        &self,
        repository: &str,
        target: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<String, RegistryError> {
        let digest = format!("sha256:{}", hex::encode(sha2::Sha256::digest(&bytes)));
        let url = self.url(&format!("v2/{}/manifests/{}", name(repository)?, name(target)?)).await?;
        let mut call = Call::new(Method::PUT, url, repository, Access::Push);
        let kind = HeaderValue::try_from(media_type).map_err(|_| RegistryError::Name(media_type.to_owned()))?;
        call.headers.insert(CONTENT_TYPE, kind);
        call.body = Some(bytes);
        let response = self.call(&call).await?;
        let accepted = [StatusCode::CREATED, StatusCode::OK, StatusCode::ACCEPTED];
        self.expect(&call.method, response, &accepted).await?;
        Ok(digest)
    }

    async fn uploads(&self, repository: &str) -> Result<Url, RegistryError> {
        self.url(&format!("v2/{}/blobs/uploads/", name(repository)?)).await
    }

    async fn open(&self, url: Url, repository: &str, access: Access) -> Result<Response, RegistryError> {
        let mut call = Call::new(Method::POST, url, repository, access);
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        call.body = Some(Bytes::new());
        let response = self.call(&call).await?;
        self.expect(&call.method, response, &[StatusCode::ACCEPTED, StatusCode::CREATED]).await
    }

    fn session(&self, repository: &str, access: Access, response: &Response) -> Result<Upload, RegistryError> {
        let location = next_location(response)?;
        Ok(Upload { client: self.clone(), repository: repository.to_owned(), access, location, sent: 0 })
    }

    /// Returns the proof to send to `url`: ours where it is ours, none elsewhere.
    async fn proof_for(
        &self,
        repository: &str,
        access: &Access,
        url: &Url,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        if url.origin() != self.url("").await?.origin() {
            return Ok(None);
        }
        let call = Call::new(Method::PATCH, url.clone(), repository, access.clone());
        Ok(self.proof(&call).await?.header().cloned())
    }
}

/// Tells whether an upload failed so that a new session may succeed.
pub(crate) fn is_lost_session(error: &RegistryError) -> bool {
    error.is_transient() || matches!(error.status().map(|status| status.as_u16()), Some(401 | 404 | 410 | 416))
}

impl Upload {
    /// Returns how many bytes the registry has, as far as it has said so.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Asks how many bytes arrived, after sending broke off, so that the rest can be sent as a [`Self::part`].
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; unless it is transient, the session is lost.
    pub async fn resume(&mut self) -> Result<u64, RegistryError> {
        let call = Call::new(Method::GET, self.location.clone(), &self.repository, self.access.clone());
        let response = self.client.call(&call).await?;
        let known = [StatusCode::NO_CONTENT, StatusCode::OK, StatusCode::ACCEPTED];
        let response = self.client.expect(&call.method, response, &known).await?;
        let range = response.headers().get(RANGE).and_then(|range| range.to_str().ok()).and_then(arrived);
        let reason = || "an upload's state without saying how much it has".to_owned();
        let arrived = range.ok_or_else(|| RegistryError::Form { url: loggable(response.url()), reason: reason() })?;
        if response.headers().contains_key(LOCATION) {
            self.location = next_location(&response)?;
        }
        self.sent = arrived;
        Ok(arrived)
    }

    /// Tells whether `error`, returned by an upload, may be answered by starting a new one from the beginning.
    pub fn may_restart(error: &RegistryError) -> bool {
        is_lost_session(error)
    }

    /// Sends a stream of bytes, which may be long: only a stall ends it, not the time it takes.
    ///
    /// `length` is sent as `Content-Length` if known; else the body is chunked.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; how much has arrived only [`Self::resume`] can tell then.
    pub async fn stream<S, E>(&mut self, length: Option<u64>, bytes: S) -> Result<(), RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        self.patch(length, None, bytes).await
    }

    /// Sends the next `length` bytes, with more to follow: for registries that do not take all of a blob at once.
    ///
    /// # Errors
    ///
    /// As [`Self::stream`].
    pub async fn part<S, E>(&mut self, length: u64, bytes: S) -> Result<(), RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        let last = (self.sent + length).saturating_sub(1);
        let range = HeaderValue::try_from(format!("{}-{last}", self.sent)).expect("digits and a sign are a header");
        self.patch(Some(length), Some(range), bytes).await
    }

    async fn patch<S, E>(
        &mut self,
        length: Option<u64>,
        range: Option<HeaderValue>,
        bytes: S,
    ) -> Result<(), RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        let moved = Progress::default();
        let watched = moved.clone();
        // An error of the stream comes back as one of the connection, and is not the same at all.
        let failed = Arc::new(OnceLock::new());
        let failing = Arc::clone(&failed);
        let bytes = bytes.inspect_ok(move |piece| watched.add(piece.len())).map_err(move |error| {
            let error = error.into();
            failing.get_or_init(|| error.to_string());
            error
        });
        let body = reqwest::Body::wrap_stream(bytes);
        let sending = self.send(Method::PATCH, self.location.clone(), length, range, body, &moved).await;
        let response = match (sending, failed.get()) {
            (Err(_), Some(reason)) => return Err(RegistryError::Source(reason.clone())),
            (sending, _) => sending?,
        };
        let accepted = [StatusCode::ACCEPTED, StatusCode::NO_CONTENT, StatusCode::CREATED];
        let response = self.client.expect(&Method::PATCH, response, &accepted).await?;
        self.sent += moved.total();
        if response.headers().contains_key(LOCATION) {
            self.location = next_location(&response)?;
        }
        Ok(())
    }

    /// Sends what is left, if anything, and closes the upload: the blob must have `digest` now.
    ///
    /// # Errors
    ///
    /// As [`Self::stream`].
    pub async fn finish(&self, digest: &str, rest: Bytes) -> Result<(), RegistryError> {
        let mut url = self.location.clone();
        url.query_pairs_mut().append_pair("digest", digest);
        let moved = Progress::default();
        let length = rest.len() as u64;
        let watched = moved.clone();
        // In slices, so that a large body shows that it moves.
        let slices = futures::stream::unfold(rest, move |mut rest| {
            let watched = watched.clone();
            async move {
                let piece = rest.split_to(rest.len().min(256 << 10));
                watched.add(piece.len());
                (!piece.is_empty()).then_some((Ok::<_, std::io::Error>(piece), rest))
            }
        });
        let body = if length == 0 { reqwest::Body::from(Bytes::new()) } else { reqwest::Body::wrap_stream(slices) };
        let response = self.send(Method::PUT, url, Some(length), None, body, &moved).await?;
        let accepted = [StatusCode::CREATED, StatusCode::NO_CONTENT, StatusCode::ACCEPTED, StatusCode::OK];
        self.client.expect(&Method::PUT, response, &accepted).await?;
        Ok(())
    }

    /// Gives the upload up, so that the registry can forget it at once.
    pub async fn cancel(self) {
        let call = Call::new(Method::DELETE, self.location.clone(), &self.repository, self.access.clone());
        if let Err(error) = self.client.call(&call).await {
            tracing::debug!(%error, "an upload could not be cancelled; the registry will time it out");
        }
    }

    async fn send(
        &self,
        method: Method,
        url: Url,
        length: Option<u64>,
        range: Option<HeaderValue>,
        body: reqwest::Body,
        moved: &Progress,
    ) -> Result<Response, RegistryError> {
        let client = &self.client;
        let proof = client.proof_for(&self.repository, &self.access, &url).await?;
        let mut request = Request::new(method, url);
        let headers: &mut HeaderMap = request.headers_mut();
        headers.extend(client.0.headers.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if let Some(length) = length {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        if let Some(range) = range {
            headers.insert(CONTENT_RANGE, range);
        }
        if let Some(proof) = proof {
            headers.insert(AUTHORIZATION, proof);
        }
        *request.body_mut() = Some(body);
        client.0.traffic.count_request();
        while_moving(&client.0.http, request, moved).await
    }
}

/// Bytes that were handed to the connection.
#[derive(Debug, Clone, Default)]
struct Progress(Arc<std::sync::atomic::AtomicU64>);

impl Progress {
    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, std::sync::atomic::Ordering::Relaxed);
    }

    fn total(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Sends a request whose body may take long, and gives up when nothing moves for the stall time.
///
/// After the last byte the registry may still hash and store what it got, so the answer gets a minute.
async fn while_moving(http: &Http, request: Request, moved: &Progress) -> Result<Response, RegistryError> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let host = crate::http::authority(request.url());
    let sending = http.send_within(request, Duration::from_secs(86_400));
    tokio::pin!(sending);
    let mut before = moved.total();
    loop {
        tokio::select! {
            outcome = &mut sending => return Ok(outcome?),
            () = tokio::time::sleep(PATIENCE) => {
                let now = moved.total();
                if now == before {
                    return Err(crate::http::HttpError::Stalled { host, limit: PATIENCE }.into());
                }
                before = now;
            }
        }
    }
}

/// Reads how many bytes of an upload arrived: `0-N` for the last of them, in some registries with `bytes=` before it.
fn arrived(range: &str) -> Option<u64> {
    let range = range.trim().trim_start_matches("bytes").trim_start_matches(['=', ' ']);
    let (first, last) = range.split_once('-')?;
    match (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?) {
        // Also said of nothing at all; to send one byte twice would be wrong, to begin again is not.
        (0, 0) => Some(0),
        (0, last) => last.checked_add(1),
        _ => None,
    }
}

fn next_location(response: &Response) -> Result<Url, RegistryError> {
    let wrong = |reason| RegistryError::Redirect { url: loggable(response.url()), reason };
    let location = response.headers().get(LOCATION).ok_or_else(|| wrong("an upload without saying where"))?;
    let location = location.to_str().map_err(|_| wrong("an upload to what is no URL"))?;
    response.url().join(location).map_err(|_| wrong("an upload to what is no URL"))
}

#[cfg(test)]
mod tests {
    use super::arrived;

    #[test]
    fn registries_tell_in_two_ways_how_much_of_an_upload_arrived() {
        for (range, wanted) in [
            ("0-0", Some(0)),
            ("0-1023", Some(1024)),
            ("bytes=0-9", Some(10)),
            ("bytes 0-9", Some(10)),
            ("5-9", None),
            ("0-", None),
            ("", None),
            ("0-18446744073709551615", None),
        ] {
            assert_eq!(arrived(range), wanted, "{range}");
        }
    }
}
