//! Manifests, indexes and referrers.
//!
//! A manifest asked for by digest must have that digest; asked for by tag, its digest is computed here and
//! `Docker-Content-Digest` is not believed: registries forget it, and some proxies send a stale one.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderValue, Method, StatusCode};
use oci_spec::image::ImageIndex;
use serde::Deserialize;
use sha2::Digest as _;

use super::{Access, Call, Client, RegistryError, name};
use crate::http::loggable;

/// Largest manifest accepted, in bytes. The protocol asks registries for 4 MiB; twice that is generous.
pub const MAX_MANIFEST: usize = 8 << 20;

/// What we can read, in order of preference.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// A manifest or index as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The bytes that the digest names.
    pub bytes: Bytes,
    /// The type: what the answer says, else what the document says.
    pub media_type: String,
    /// `sha256:` and the digest of `bytes` (or the digest asked for, if that is of another kind).
    pub digest: String,
}

impl Manifest {
    /// Returns the document that `bytes` are; `stated` is the type that whoever holds them says, if any.
    pub fn of(stated: &str, bytes: Bytes) -> Option<Self> {
        let media_type = media_type(stated, &bytes)?;
        let digest = format!("sha256:{}", hex::encode(sha2::Sha256::digest(&bytes)));
        Some(Self { bytes, media_type, digest })
    }

    /// Tells whether this is a list of manifests rather than one.
    pub fn is_index(&self) -> bool {
        self.media_type.contains("image.index") || self.media_type.contains("manifest.list")
    }
}

impl Client {
    /// Reads the manifest or index that a tag or digest names.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; `Digest` if the bytes are not what the digest names, `Form` if they are too many.
    pub async fn manifest(&self, repository: &str, target: &str) -> Result<Manifest, RegistryError> {
        let call = self.manifest_call(Method::GET, repository, target).await?;
        let response = self.call(&call).await?;
        let response = self.follow(&call, response).await?;
        let response = self.expect(&call.method, response, &[StatusCode::OK]).await?;
        let url = loggable(response.url());
        let stated =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned();
        let bytes = self.document(&url, response).await?;
        let digest = checked_digest(&url, target, &bytes)?;
        let media_type = media_type(&stated, &bytes)
            .ok_or_else(|| RegistryError::Form { url, reason: "with something that is no manifest".to_owned() })?;
        Ok(Manifest { bytes, media_type, digest })
    }

    /// Asks whether a manifest is there; returns its digest if the answer told it.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] unless the answer is yes or no.
    pub async fn has_manifest(&self, repository: &str, target: &str) -> Result<Option<Option<String>>, RegistryError> {
        let call = self.manifest_call(Method::HEAD, repository, target).await?;
        let response = self.call(&call).await?;
        let response = self.follow(&call, response).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = self.expect(&call.method, response, &[StatusCode::OK]).await?;
        let digest = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        Ok(Some(digest.map(str::to_owned)))
    }

    /// Lists the manifests that refer to the one with `digest`, of all kinds or one.
    ///
    /// Registries without the call keep them, if at all, in an index under a tag made from the digest.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; a registry without referrers gives an empty index.
    pub async fn referrers(
        &self,
        repository: &str,
        digest: &str,
        artifact_type: Option<&str>,
    ) -> Result<ImageIndex, RegistryError> {
        let mut url = self.url(&format!("v2/{}/referrers/{}", name(repository)?, name(digest)?)).await?;
        if let Some(kind) = artifact_type {
            url.query_pairs_mut().append_pair("artifactType", kind);
        }
        let mut call = Call::new(Method::GET, url, repository, Access::Pull);
        call.headers.insert(ACCEPT, HeaderValue::from_static("application/vnd.oci.image.index.v1+json"));
        let response = self.call(&call).await?;
        let response = self.follow(&call, response).await?;
        let index = if response.status() == StatusCode::OK {
            let url = loggable(response.url());
            let bytes = self.document(&url, response).await?;
            // Some answer every unknown path with a page and 200; that is no list.
            serde_json::from_slice::<ImageIndex>(&bytes).ok()
        } else if matches!(response.status().as_u16(), 400 | 404 | 405 | 501) {
            None
        } else {
            return Err(self.refusal(&call.method, response).await);
        };
        let mut index = match index {
            Some(index) => index,
            None => self.referrers_by_tag(repository, digest).await?,
        };
        if let Some(kind) = artifact_type {
            // The filter is optional for registries.
            let kept = index.manifests().iter().filter(|entry| match entry.artifact_type() {
                Some(found) => found.to_string() == kind,
                None => false,
            });
            let kept = kept.cloned().collect();
            index.set_manifests(kept);
        }
        Ok(index)
    }

    async fn referrers_by_tag(&self, repository: &str, digest: &str) -> Result<ImageIndex, RegistryError> {
        let mut none = ImageIndex::default();
        none.set_manifests(Vec::new());
        match self.manifest(repository, &digest.replace(':', "-")).await {
            Ok(manifest) => Ok(serde_json::from_slice(&manifest.bytes).unwrap_or(none)),
            Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => Ok(none),
            Err(error) => Err(error),
        }
    }

    async fn manifest_call<'c>(
        &self,
        method: Method,
        repository: &'c str,
        target: &str,
    ) -> Result<Call<'c>, RegistryError> {
        let url = self.url(&format!("v2/{}/manifests/{}", name(repository)?, name(target)?)).await?;
        let mut call = Call::new(method, url, repository, Access::Pull);
        call.headers.insert(ACCEPT, HeaderValue::from_static(ACCEPTED));
        Ok(call)
    }

    async fn document(&self, url: &str, response: reqwest::Response) -> Result<Bytes, RegistryError> {
        let form = |reason: String| RegistryError::Form { url: url.to_owned(), reason };
        let mut body = self.http().body(response);
        let mut held = Vec::new();
        while let Some(piece) = body.next().await? {
            held.extend_from_slice(&piece);
            if held.len() > MAX_MANIFEST {
                return Err(form(format!("with a document of more than {MAX_MANIFEST} bytes")));
            }
        }
        Ok(held.into())
    }
}

/// Returns the digest of `bytes`, which must be `target` if that is a digest.
fn checked_digest(url: &str, target: &str, bytes: &[u8]) -> Result<String, RegistryError> {
    let (want, have) = match target.split_once(':') {
        None => return Ok(format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))),
        Some(("sha512", want)) => (want, hex::encode(sha2::Sha512::digest(bytes))),
        Some(("sha384", want)) => (want, hex::encode(sha2::Sha384::digest(bytes))),
        Some((_, want)) => (want, hex::encode(sha2::Sha256::digest(bytes))),
    };
    if want.eq_ignore_ascii_case(&have) {
        Ok(target.to_owned())
    } else {
        Err(RegistryError::Digest { url: url.to_owned(), want: target.to_owned(), have })
    }
}

/// Returns the type of a manifest: the header's, unless that is one of the types that say nothing.
fn media_type(stated: &str, bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Document {
        media_type: Option<String>,
        schema_version: Option<u64>,
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
    }
    let document: Document = serde_json::from_slice(bytes).ok()?;
    let stated = stated.split(';').next().unwrap_or("").trim();
    if stated.contains("vnd.") {
        return Some(stated.to_owned());
    }
    if let Some(own) = document.media_type.filter(|own| !own.is_empty()) {
        return Some(own);
    }
    match (document.manifests, document.layers, document.schema_version) {
        (Some(_), _, _) => Some("application/vnd.oci.image.index.v1+json".to_owned()),
        (None, Some(_), _) => Some("application/vnd.oci.image.manifest.v1+json".to_owned()),
        (None, None, Some(1)) => Some("application/vnd.docker.distribution.manifest.v1+json".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_of_a_manifest_is_found_wherever_it_is_told() {
        let oci = "application/vnd.oci.image.manifest.v1+json";
        for (stated, body, expected) in [
            (oci, "{}", Some(oci)),
            ("application/vnd.oci.image.manifest.v1+json; charset=utf-8", "{}", Some(oci)),
            ("application/json", r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#, Some(oci)),
            ("", r#"{"layers":[]}"#, Some(oci)),
            ("text/plain", r#"{"manifests":[]}"#, Some("application/vnd.oci.image.index.v1+json")),
            ("application/json", "{}", None),
            ("text/html", "<html>", None),
            (oci, "<html>", None),
        ] {
            assert_eq!(media_type(stated, body.as_bytes()).as_deref(), expected, "{stated} {body}");
        }
    }

    #[test]
    fn bytes_must_have_the_digest_that_was_asked_for() {
        let digest = checked_digest("u", "latest", b"x").unwrap();
        assert_eq!(checked_digest("u", &digest, b"x").unwrap(), digest);
        assert!(matches!(checked_digest("u", &digest, b"y"), Err(RegistryError::Digest { .. })));
    }
}
