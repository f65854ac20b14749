//! Why no source gave the bytes, in words that say what to do.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use nydus_rafs::BlobId;

use crate::http::HttpError;
use crate::registry::RegistryError;

/// Why no source gave the bytes. Nothing remembers it: the next read asks again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// The configuration names no usable source.
    #[error("{0}")]
    Config(String),
    /// The credential is missing, wrong or too old. A new one may help: `Route::set_credential`.
    #[error(
        "{place} does not let us read blob {blob}: {source}; check the credential (`auth`, `registry_token`, pull secret)"
    )]
    Denied {
        /// The registry and repository.
        place: String,
        /// The blob.
        blob: BlobId,
        /// The answer.
        source: Box<RegistryError>,
    },
    /// The blob is not there.
    #[error("{place} has no blob {blob}: {source}; check `repo`, and whether the image was pushed with all its blobs")]
    Missing {
        /// The registry and repository.
        place: String,
        /// The blob.
        blob: BlobId,
        /// The answer.
        source: Box<RegistryError>,
    },
    /// A source answers, but never as it should.
    #[error("{place} did not give blob {blob}: {source}{advice}")]
    Unavailable {
        /// The registry and repository.
        place: String,
        /// The blob.
        blob: BlobId,
        /// The last answer.
        source: Box<RegistryError>,
        /// What may help; begins with `; ` or is empty.
        advice: &'static str,
    },
    /// Time is up.
    #[error(
        "{place} did not give blob {blob} within {:.1} s{}{advice}",
        after.as_secs_f32(),
        last.as_ref().map(|last| format!(": {last}")).unwrap_or_default()
    )]
    Deadline {
        /// The registry and repository.
        place: String,
        /// The blob.
        blob: BlobId,
        /// How long was tried.
        after: Duration,
        /// What the last source said.
        last: Option<Box<RegistryError>>,
        /// What may help; begins with `; ` or is empty.
        advice: &'static str,
    },
    /// A file cannot be read.
    #[error("could not read blob {blob} from {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The blob.
        blob: BlobId,
        /// What the system said.
        reason: String,
    },
    /// The blob ends before the bytes asked for.
    #[error(
        "{place} holds {size} bytes of blob {blob}, and bytes {stored:?} were asked for: it was cut, or is another blob"
    )]
    Outside {
        /// The file or store.
        place: String,
        /// The blob.
        blob: BlobId,
        /// The bytes asked for.
        stored: Range<u64>,
        /// The size of the blob there, in bytes.
        size: u64,
    },
    /// A test wants it so.
    #[error("could not read blob {blob}: a fault was injected")]
    Injected {
        /// The blob.
        blob: BlobId,
    },
}

impl SourceError {
    /// Tells whether another credential may help.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Denied { .. })
    }

    /// Tells whether the blob is certainly not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

/// Returns what may help against `error`: begins with `; ` or is empty.
pub(super) fn advice(error: &RegistryError) -> &'static str {
    match error {
        RegistryError::Http(HttpError::Untrusted { .. }) => {
            "; add its authority to `ca_cert_files`, or install the system's ca-certificates"
        }
        RegistryError::Http(HttpError::Connect { proxy: Some(_), .. }) => {
            "; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY, and whether the proxy lets us through"
        }
        RegistryError::Http(HttpError::Connect { .. }) => "; check `host`, `scheme`, DNS and that it is running",
        RegistryError::Http(HttpError::Silent { .. } | HttpError::Stalled { .. }) => {
            "; it accepts connections but does not answer: check its load and the network"
        }
        RegistryError::Http(_) => "; check the network and the proxies in between",
        RegistryError::Token { .. } => "; check the token service and the credential",
        RegistryError::Refused(refusal) if refusal.status.as_u16() == 429 => {
            "; it limits our rate: log in, or use a mirror"
        }
        RegistryError::Refused(refusal) if refusal.status.as_u16() == 407 => {
            "; a proxy wants a user and password: give them in the URL of HTTPS_PROXY or HTTP_PROXY"
        }
        RegistryError::Refused(refusal) if refusal.by_mirror => "; see the log of the mirror",
        RegistryError::Refused(refusal) if refusal.status.is_server_error() => "; see the log of the registry",
        RegistryError::Short { .. } | RegistryError::Refused(_) => {
            "; the blob there may be cut or another one: push the image again"
        }
        RegistryError::Form { .. } | RegistryError::Redirect { .. } => {
            "; is that host a registry, and is there a proxy or login page in between?"
        }
        _ => "",
    }
}
