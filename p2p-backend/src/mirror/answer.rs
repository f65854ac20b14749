//! From what happened to what the caller is told.
//!
//! A refusal of the registry is passed on as it is, with its challenge, for it is the caller who has the password.
//! Trouble of our own, or of a registry, is a 5xx with `X-Dragonfly-Error-Type: proxy`, on which callers turn to the registry.

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};

use super::request::Refused;
use super::upstream::UpstreamError;

/// Why a request is answered with an error.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The request itself.
    #[error(transparent)]
    Request(#[from] Refused),
    /// Those who were asked.
    #[error("{0}")]
    Upstream(std::sync::Arc<UpstreamError>),
    /// Nobody could say whether this caller may have it.
    #[error("whether this caller may read it could not be checked: {0}")]
    Unchecked(std::sync::Arc<UpstreamError>),
    /// The Range header.
    #[error("the range lies outside the blob of {size} bytes")]
    Range {
        /// Of the blob.
        size: u64,
    },
    /// Two sources disagree about the size of a blob that is being read.
    #[error("sources disagree about the size of the blob; try again")]
    Size,
    /// Too many at once.
    #[error("too many requests are being answered; try again")]
    Crowded,
}

impl From<UpstreamError> for Failure {
    fn from(error: UpstreamError) -> Self {
        Self::Upstream(error.into())
    }
}

impl Failure {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Request(refused) => refused.status(),
            Self::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Unchecked(_) | Self::Size | Self::Crowded => StatusCode::SERVICE_UNAVAILABLE,
            Self::Upstream(error) => match &**error {
                UpstreamError::Refused { status, .. } if matches!(status.as_u16(), 401 | 403 | 404 | 410) => *status,
                UpstreamError::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
                UpstreamError::Silent { .. } => StatusCode::GATEWAY_TIMEOUT,
                UpstreamError::Entangled => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::BAD_GATEWAY,
            },
        }
    }

    /// Returns the answer that says so; to HEAD it has no body.
    pub(super) fn answer(&self, head: bool) -> Response {
        let status = self.status();
        let code = match status.as_u16() {
            401 => "UNAUTHORIZED",
            403 => "DENIED",
            404 | 410 => "NOT_FOUND",
            405 => "UNSUPPORTED",
            416 => "RANGE_INVALID",
            429 => "TOOMANYREQUESTS",
            _ => "UNAVAILABLE",
        };
        let body = serde_json::json!({ "errors": [{ "code": code, "message": format!("nydus-p2p: {self}") }] });
        let mut answer = Response::new(if head { Body::empty() } else { Body::from(body.to_string()) });
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut ours = true;
        match self {
            Self::Upstream(error) => match &**error {
                UpstreamError::Refused { challenges, .. } => {
                    ours = status == StatusCode::BAD_GATEWAY;
                    for challenge in challenges.iter().filter(|_| status == StatusCode::UNAUTHORIZED) {
                        headers.append(WWW_AUTHENTICATE, challenge.clone());
                    }
                }
                UpstreamError::Busy { retry_after, .. } => {
                    ours = false;
                    if let Some(after) = retry_after {
                        headers.insert(RETRY_AFTER, after.as_secs().into());
                    }
                }
                _ => {}
            },
            Self::Range { size } => {
                ours = false;
                if let Ok(value) = format!("bytes */{size}").parse() {
                    headers.insert(http::header::CONTENT_RANGE, value);
                }
            }
            Self::Request(_) | Self::Unchecked(_) | Self::Size | Self::Crowded => {}
        }
        if ours {
            headers.insert("x-dragonfly-error-type", HeaderValue::from_static("proxy"));
        }
        answer
    }
}
