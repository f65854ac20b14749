//! Answers with manifests: by digest from memory, by tag as the registry says now.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::response::Response;
use bytes::BytesMut;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderValue, Method};
use nydus_rafs::Digest;
use sha2::Digest as _;

use super::admission::Wish;
use super::{CONTENT_DIGEST, Server, lock, text};
use crate::mirror::allow::{Caller, Claimed};
use crate::mirror::answer::Failure;
use crate::mirror::manifests::{LARGEST, Manifest};
use crate::mirror::request::Ask;
use crate::mirror::upstream::{Call, UpstreamError, Via};
use crate::registry::head::is_page;

impl Server {
    pub(super) async fn manifest(self: &Arc<Self>, wish: &Wish<'_>, headers: &HeaderMap) -> Result<Response, Failure> {
        let kept = lock(&self.manifests).get(wish.digest);
        if let Some(manifest) = kept.filter(|_| !wish.ask.no_peer) {
            self.admit(wish, None).await?;
            return Ok(tell(&manifest, wish.ask.head));
        }
        let manifest = self.fetch_manifest(&wish.call(headers.get(ACCEPT)), Some(wish.digest)).await?;
        let size = manifest.body.len() as u64;
        lock(&self.rights).grant(&wish.caller, wish.what(), size, Instant::now());
        Ok(tell(&manifest, wish.ask.head))
    }

    pub(super) async fn tag(
        &self,
        ask: &Ask,
        registry: &str,
        repo: &str,
        tag: &str,
        caller: Caller,
        headers: &HeaderMap,
    ) -> Result<Response, Failure> {
        let path = format!("/v2/{repo}/manifests/{tag}");
        let accept = headers.get(ACCEPT);
        let mut key = blake3::Hasher::new();
        for part in [&caller[..], registry.as_bytes(), path.as_bytes(), accept.map_or(&[], HeaderValue::as_bytes)] {
            key.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let key = *key.finalize().as_bytes();
        let call = Call {
            method: Method::GET,
            registry,
            repo,
            path: &path,
            range: None,
            accept,
            authorization: ask.authorization.as_ref(),
            hops: &ask.hops,
        };
        match self.fetch_manifest(&call, None).await {
            Ok(manifest) => {
                let now = Instant::now();
                let what = Claimed { registry, repo, digest: &manifest.digest };
                lock(&self.rights).grant(&caller, what, manifest.body.len() as u64, now);
                lock(&self.manifests).name(key, manifest.digest, now);
                Ok(tell(&manifest, ask.head))
            }
            Err(error) if error.is_refusal() => {
                lock(&self.manifests).forget(&key);
                Err(error.into())
            }
            Err(error) => match lock(&self.manifests).last(&key, Instant::now()) {
                Some(manifest) => {
                    tracing::warn!(%error, path, digest = %manifest.digest, "the registry cannot say what the tag names; its last answer stands");
                    Ok(tell(&manifest, ask.head))
                }
                None => Err(error.into()),
            },
        }
    }

    /// Reads a manifest from the first who gives it, and keeps it.
    ///
    /// Even for HEAD it is read whole: it is small, and about to be asked for.
    async fn fetch_manifest(&self, call: &Call<'_>, digest: Option<&Digest>) -> Result<Manifest, UpstreamError> {
        for via in self.fetcher.upstream.mirrors(true) {
            match self.manifest_via(via, call, digest).await {
                Ok(manifest) => return Ok(manifest),
                Err(error) => tracing::debug!(%error, path = call.path, "a mirror gives no manifest; asking the next"),
            }
        }
        self.manifest_via(Via::Registry, call, digest).await
    }

    async fn manifest_via(
        &self,
        via: Via,
        call: &Call<'_>,
        digest: Option<&Digest>,
    ) -> Result<Manifest, UpstreamError> {
        let upstream = &self.fetcher.upstream;
        let mut answer = upstream.send(via, call).await?;
        let odd = |reason: &str| UpstreamError::Odd {
            by: upstream.name(via, call.registry).to_owned(),
            reason: format!("{}: {reason}", call.path),
        };
        let mut body = BytesMut::new();
        while let Some(bytes) = upstream.next(&mut answer).await? {
            if body.len() + bytes.len() > LARGEST {
                return Err(odd("the manifest is larger than 8 MiB"));
            }
            body.extend_from_slice(&bytes);
        }
        let found = Digest(sha2::Sha256::digest(&body).into());
        if digest.is_some_and(|digest| *digest != found) {
            return Err(odd("the manifest does not match its digest"));
        }
        let said = answer.headers.get(CONTENT_DIGEST).and_then(|said| said.to_str().ok());
        if said.is_some_and(|said| said.starts_with("sha256:") && said != format!("sha256:{found}")) {
            return Err(odd("the manifest does not match the digest in its header"));
        }
        let media_type = match answer.headers.get(CONTENT_TYPE) {
            Some(_) if is_page(&answer.headers) => return Err(odd("answers with a web page")),
            Some(is) => is.clone(),
            None => HeaderValue::from_static("application/vnd.oci.image.manifest.v1+json"),
        };
        let manifest = Manifest { digest: found, media_type, body: body.freeze() };
        lock(&self.manifests).keep(manifest.clone());
        Ok(manifest)
    }
}

fn tell(manifest: &Manifest, head: bool) -> Response {
    let body = if head { Body::empty() } else { Body::from(manifest.body.clone()) };
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, manifest.media_type.clone());
    headers.insert(CONTENT_LENGTH, manifest.body.len().into());
    headers.insert(CONTENT_DIGEST, text(&format!("sha256:{}", manifest.digest)));
    headers.insert(ETAG, text(&format!("\"sha256:{}\"", manifest.digest)));
    answer
}
