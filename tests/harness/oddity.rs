//! Odd forms of an answer with a blob's bytes, of which some are right and some are not.

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode, Version};
use axum::response::{IntoResponse as _, Response};
use futures::stream;

/// What is odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oddity {
    /// A page for people, with 200.
    Html,
    /// It says that its body is compressed.
    Encoded,
    /// It does not say which part of the blob it is.
    NoContentRange,
    /// It says that it is another part.
    OtherContentRange,
    /// Its body comes in chunks, without a length before it.
    Chunked,
    /// Its body has no length and ends with the connection.
    UntilClose,
    /// Its body never ends.
    Endless,
    /// It is the whole blob, whatever was asked for. The front sees to that.
    Whole,
    /// It names another digest than the blob's.
    OtherDigest,
    /// It names no digest.
    NoDigest,
    /// To HEAD it says that this is not allowed; all else is well.
    NoHead,
    /// To HEAD it tells no length; all else is well.
    NoLength,
}

/// What registries tell of what they give.
const DIGEST: &str = "docker-content-digest";

impl Oddity {
    /// Makes a good answer odd.
    pub(crate) fn of(self, mut answer: Response) -> Response {
        match self {
            Self::Html => return ([(CONTENT_TYPE, "text/html")], "<html>please log in</html>").into_response(),
            Self::Encoded => drop(answer.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"))),
            Self::NoContentRange => drop(answer.headers_mut().remove(CONTENT_RANGE)),
            Self::OtherContentRange => {
                let other = HeaderValue::from_static("bytes 4096-8191/1000000");
                answer.headers_mut().insert(CONTENT_RANGE, other);
            }
            Self::Chunked => drop(answer.headers_mut().remove(CONTENT_LENGTH)),
            Self::UntilClose => {
                answer.headers_mut().remove(CONTENT_LENGTH);
                // An answer of that version has no chunks.
                *answer.version_mut() = Version::HTTP_10;
            }
            Self::Endless => {
                answer.headers_mut().remove(CONTENT_LENGTH);
                let piece = Bytes::from_static(&[0x5a; 4096]);
                *answer.body_mut() =
                    Body::from_stream(stream::repeat_with(move || Ok::<_, axum::Error>(piece.clone())));
            }
            Self::OtherDigest => {
                let other = format!("sha256:{}", "5a".repeat(32));
                answer
                    .headers_mut()
                    .insert(DIGEST, HeaderValue::try_from(other).expect("a digest is a header's value"));
            }
            Self::NoDigest => drop(answer.headers_mut().remove(DIGEST)),
            Self::Whole => {}
            Self::NoHead => return StatusCode::METHOD_NOT_ALLOWED.into_response(),
            Self::NoLength => drop(answer.headers_mut().remove(CONTENT_LENGTH)),
        }
        answer
    }

    /// Whether only HEAD meets it.
    pub(crate) fn is_of_heads(self) -> bool {
        matches!(self, Self::NoHead | Self::NoLength)
    }
}
