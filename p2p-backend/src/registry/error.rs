//! Why a registry did not do what it was asked.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};

use crate::http::HttpError;

/// An answer that is not what was asked for.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// What was asked.
    pub method: Method,
    /// Of whom, without query and user.
    pub url: String,
    /// What came back.
    pub status: StatusCode,
    /// How long to wait before asking again, if the answer says so.
    pub retry_after: Option<Duration>,
    /// The challenges, as they came.
    pub challenges: Vec<HeaderValue>,
    /// `X-Dragonfly-Error-Type: proxy`: the mirror failed, not the registry behind it.
    pub by_mirror: bool,
    /// The beginning of the body.
    pub body: Bytes,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} was answered with {}", self.method, self.url, self.status)?;
        if let Some(wait) = self.retry_after {
            write!(f, ", ask again in {} s", wait.as_secs())?;
        }
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<Explanation>,
        }
        #[derive(serde::Deserialize)]
        struct Explanation {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        match serde_json::from_slice::<Errors>(&self.body) {
            Ok(Errors { errors }) => {
                errors.iter().try_for_each(|Explanation { code, message }| write!(f, " ({code}: {message})"))
            }
            Err(_) => {
                // One line of text explains; markup does not.
                let text = String::from_utf8_lossy(&self.body);
                match text.lines().next().map(str::trim) {
                    Some(line) if !line.is_empty() && !line.starts_with('<') => {
                        write!(f, " ({})", line.chars().take(200).collect::<String>().escape_debug())
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Why a registry did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// There was no complete answer.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The answer was no.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The token service did not give a token.
    #[error("no token from {realm}: {source}")]
    Token {
        /// The URL of the token service.
        realm: String,
        /// Why.
        source: Box<RegistryError>,
    },
    /// A name cannot be put into a URL.
    #[error("`{0}` is not the name of a host, repository, tag or digest")]
    Name(String),
    /// The credential would travel in plain text.
    #[error(
        "{to} is asked for in plain HTTP, and the credential is not sent there: use https, or plain HTTP explicitly"
    )]
    WouldLeak {
        /// Where it would have gone.
        to: String,
    },
    /// A redirect leads nowhere.
    #[error("{url} redirects {reason}")]
    Redirect {
        /// Who redirects.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The answer has another form than the request.
    #[error("{url} answered {reason}")]
    Form {
        /// Who answered.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The answer ends before what was asked for.
    #[error("{url} has {have} bytes where {want} are wanted")]
    Short {
        /// Who answered.
        url: String,
        /// Bytes wanted.
        want: u64,
        /// Bytes there.
        have: u64,
    },
    /// The bytes are not those that the digest names.
    #[error("{url} has the digest {have}, not {want}")]
    Digest {
        /// Who answered.
        url: String,
        /// The digest asked for.
        want: String,
        /// The digest of the answer.
        have: String,
    },
    /// The body to be sent could not be read.
    #[error("could not read what is to be sent: {0}")]
    Source(String),
}

impl RegistryError {
    /// Returns the status of the answer, if there was one. A token service's counts as well.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused(refusal) => Some(refusal.status),
            Self::Token { source, .. } => source.status(),
            _ => None,
        }
    }

    /// Returns how long to wait before the next attempt, if the answer says so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) => refusal.retry_after,
            Self::Token { source, .. } => source.retry_after(),
            _ => None,
        }
    }

    /// Tells whether the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Http(HttpError::Certificates { .. } | HttpError::Untrusted { .. } | HttpError::Client(_)) => false,
            Self::Http(_) | Self::Short { .. } | Self::Form { .. } | Self::Digest { .. } => true,
            Self::Refused(refusal) => {
                refusal.status.is_server_error()
                    || matches!(refusal.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            Self::Token { source, .. } => source.is_transient(),
            Self::Name(_) | Self::WouldLeak { .. } | Self::Redirect { .. } | Self::Source(_) => false,
        }
    }
}
