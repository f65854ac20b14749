//! Why a host gave no answer, or not all of it.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Why there was no answer, or not all of it.
#[derive(Clone, thiserror::Error)]
pub enum HttpError {
    /// A file with certificates cannot be used.
    #[error("could not use the certificates in {}: {reason}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A client cannot be made from the options.
    #[error("could not prepare an HTTP client: {0}")]
    Client(String),
    /// An address that is never asked: see [`Reach`](super::Reach).
    #[error("{host} is a link-local address, which is never asked")]
    Forbidden {
        /// Host and port.
        host: String,
    },
    /// No connection: refused, unreachable, no such name, or TLS failed.
    #[error(
        "could not connect to {host}{}: {reason}",
        proxy.as_ref().map(|proxy| format!(" through the proxy {proxy}")).unwrap_or_default()
    )]
    Connect {
        /// Host and port.
        host: String,
        /// The proxy in between, host and port.
        proxy: Option<String>,
        /// The innermost reason.
        reason: String,
        /// It took the whole time limit to find out.
        slow: bool,
    },
    /// The certificate of the host is not believed.
    #[error("the certificate of {host} is not trusted: {reason}")]
    Untrusted {
        /// Host and port.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No head of an answer in time.
    #[error("{host} did not answer within {} s", limit.as_secs_f32())]
    Silent {
        /// Host and port.
        host: String,
        /// The limit that ran out.
        limit: Duration,
    },
    /// The body stopped moving.
    #[error("{host} sent nothing for {} s in the middle of a body", limit.as_secs_f32())]
    Stalled {
        /// Host and port.
        host: String,
        /// The limit that ran out.
        limit: Duration,
    },
    /// The connection broke.
    #[error("the connection to {host} broke: {reason}")]
    Broken {
        /// Host and port.
        host: String,
        /// The innermost reason.
        reason: String,
    },
}

impl fmt::Debug for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Returns the text of the last error in the chain: the others only say that something failed, and may hold a
/// signed URL.
pub(super) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    match last.downcast_ref::<reqwest::Error>() {
        Some(error) if error.is_timeout() => "timed out".to_owned(),
        Some(error) if error.url().is_some() => "the exchange broke".to_owned(),
        _ => last.to_string(),
    }
}

/// Tells whether the far end of a connection did not even acknowledge what was sent to it.
pub(super) fn is_unacknowledged(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind;
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| {
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable)
        })
}

/// Returns what is wrong with the certificate, if that is what an error is about.
pub(super) fn distrust(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        // An I/O error hides what it wraps from `source`.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = error.downcast_ref::<rustls::Error>().or(inner.and_then(|inner| inner.downcast_ref()));
        if let Some(rustls::Error::InvalidCertificate(reason)) = tls {
            return Some(format!("{reason:?}"));
        }
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
