//! Why an upstream gave nothing.

use std::time::Duration;

use http::{HeaderValue, StatusCode};

use crate::http::HttpError;
use crate::registry::RegistryError;

/// Why an upstream could not be made from the configuration; completes "could not prepare the upstreams".
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The password file of an account cannot be used.
    #[error("password_file of {of}: {}: {source}", path.display())]
    Password {
        /// The entry.
        of: String,
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The client cannot be made: certificates, or a name that is none.
    #[error("{of}: {source}")]
    Client {
        /// The entry.
        of: String,
        /// What is wrong.
        source: RegistryError,
    },
}

/// Why an upstream gave nothing; completes "could not read upstream".
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum UpstreamError {
    /// It says that this caller may not have it, or that there is no such thing.
    #[error("{by} answered {status}")]
    Refused { by: String, status: StatusCode, challenges: Vec<HeaderValue> },
    /// It has had too much of us.
    #[error("{by} answered 429")]
    Busy { by: String, retry_after: Option<Duration> },
    /// It is broken.
    #[error("{by} answered {status}")]
    Broken { by: String, status: StatusCode },
    /// There is no connection to it, or it broke.
    #[error("{by}: {source}")]
    Unreachable { by: String, source: HttpError },
    /// It is silent.
    #[error("{by} sent nothing for {limit:?}")]
    Silent { by: String, limit: Duration },
    /// It answers something that cannot be the answer.
    #[error("{by}: {reason}")]
    Odd { by: String, reason: String },
    /// Another mirror's question waits for this piece, and we wait for another mirror: waiting could be for ever.
    #[error("the piece is on its way from another mirror, for which this request must not wait")]
    Entangled,
}

impl UpstreamError {
    /// What `error` says about the upstream that is called `by`.
    pub(super) fn of(by: &str, error: RegistryError) -> Self {
        let by = by.to_owned();
        match error {
            RegistryError::Refused(refusal) => match refusal.status.as_u16() {
                429 => Self::Busy { by, retry_after: refusal.retry_after },
                400..500 => Self::Refused { by, status: refusal.status, challenges: refusal.challenges },
                500.. => Self::Broken { by, status: refusal.status },
                _ => Self::Odd { by, reason: refusal.to_string() },
            },
            RegistryError::Http(HttpError::Silent { limit, .. } | HttpError::Stalled { limit, .. }) => {
                Self::Silent { by, limit }
            }
            RegistryError::Http(error @ HttpError::Forbidden { .. }) => Self::Odd { by, reason: error.to_string() },
            RegistryError::Http(source) => Self::Unreachable { by, source },
            RegistryError::Token { .. } if error.status() == Some(StatusCode::TOO_MANY_REQUESTS) => {
                Self::Busy { by, retry_after: error.retry_after() }
            }
            // A token is asked for with an account that is lent, so what comes of it is not the caller's affair.
            error @ RegistryError::Token { .. } => {
                Self::Odd { by, reason: format!("{error}; check its [registry.lend]") }
            }
            other => Self::Odd { by, reason: other.to_string() },
        }
    }

    /// Whether it is about the caller and the thing, not about the upstream's health.
    pub(in super::super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether it is about the upstream's health, and an operator can do something.
    pub(super) fn is_trouble(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::Busy { .. } | Self::Entangled)
    }

    /// Whether the upstream is dead or silent.
    pub(super) fn is_illness(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Silent { .. })
    }

    /// Returns what may help; begins with `; ` or is empty.
    pub(super) fn advice(&self) -> &'static str {
        match self {
            Self::Unreachable { source: HttpError::Untrusted { .. }, .. } => "; add its authority to its `ca_files`",
            Self::Unreachable { source: HttpError::Connect { proxy: Some(_), .. }, .. } => {
                "; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY, and whether the proxy lets us through"
            }
            Self::Unreachable { .. } => "; check its `url`, DNS and that it is running",
            Self::Silent { .. } => "; it accepts connections but does not answer: check its load and the network",
            Self::Broken { .. } => "; see its own log",
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_says_about_a_caller_is_no_trouble_and_a_certificate_is() {
        let by = String::from("r.example");
        let refused = UpstreamError::Refused { by: by.clone(), status: StatusCode::UNAUTHORIZED, challenges: vec![] };
        assert!(!refused.is_trouble());
        let source = HttpError::Untrusted { host: by.clone(), reason: "UnknownIssuer".into() };
        let wrong = UpstreamError::Unreachable { by, source };
        assert!(wrong.is_trouble() && wrong.advice().contains("ca_files"));
    }
}
