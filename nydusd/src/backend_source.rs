//! Who knows the current pull credential: the snapshotter, asked over its socket.
//!
//! The address is that of the program we replace, `SOCKET/api/v1/daemons/ID/backend`; it answers with the backend section of
//! a configuration, `{"type": .., "config": {"auth": .., "registry_token": ..}}`. One daemon serves many images there, so the
//! mountpoint of the image goes along as a query, which others ignore.

use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use nydus_backend::{Credential, CredentialSource};
use serde_json::Value;

use crate::api::client::{Client, with_query};

/// The environment variable that stands for `--backend-source`.
pub const BACKEND_SOURCE: &str = "NYDUSD_BACKEND_SOURCE";

/// How long one answer may take; behind it may be a helper that asks a cloud.
const LIMIT: Duration = Duration::from_secs(8);

/// Where the current backend sections of this daemon's images are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSource {
    socket: PathBuf,
    path: String,
}

/// An address that does not lead to a backend section.
#[derive(Debug, Clone, thiserror::Error)]
#[error("`{0}` is not a backend source: it is the path of a socket followed by /api/v1/daemons/ID/backend")]
pub struct InvalidSource(String);

impl std::str::FromStr for BackendSource {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, InvalidSource> {
        let plain = text.strip_prefix("unix://").unwrap_or(text);
        let found = plain.rfind("/api/v1/").filter(|at| *at > 0 && plain.starts_with('/'));
        let (socket, path) = found.map(|at| plain.split_at(at)).ok_or_else(|| InvalidSource(text.to_owned()))?;
        Ok(Self { socket: socket.into(), path: path.to_owned() })
    }
}

impl BackendSource {
    /// Returns whom to ask about the image at `mountpoint`.
    pub fn of_mount(&self, mountpoint: &str) -> CredentialSource {
        let client = Client::new(&self.socket).with_timeout(LIMIT);
        let path = with_query(&self.path, &[("mountpoint", mountpoint)]);
        CredentialSource::new(move || {
            let (client, path) = (client.clone(), path.clone());
            async move {
                let told =
                    client.raw(Method::GET, &path, bytes::Bytes::new()).await.map_err(|error| error.to_string())?;
                credential(&told)
            }
        })
    }
}

/// Takes the credential out of a backend section.
fn credential(section: &Value) -> Result<Credential, String> {
    let text = |key: &str| section["config"][key].as_str().map(str::trim).filter(|text| !text.is_empty());
    match (text("auth"), text("registry_token")) {
        (Some(auth), _) => Credential::from_auth(auth).map_err(|error| error.to_string()),
        (None, Some(token)) => Ok(Credential::Bearer(token.to_owned())),
        (None, None) => Ok(Credential::Anonymous),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_address_is_a_socket_and_a_path() {
        let want = BackendSource { socket: "/run/s.sock".into(), path: "/api/v1/daemons/x/backend".into() };
        for text in ["/run/s.sock/api/v1/daemons/x/backend", "unix:///run/s.sock/api/v1/daemons/x/backend"] {
            assert_eq!(text.parse::<BackendSource>().unwrap(), want);
        }
        for bad in ["", "/run/s.sock", "/api/v1/daemons/x/backend", "http://h/api/v1/daemons/x/backend"] {
            let error = bad.parse::<BackendSource>().unwrap_err().to_string();
            assert!(error.contains("/api/v1/daemons/ID/backend"), "{error}");
        }
    }

    #[test]
    fn a_password_is_preferred_to_a_token_and_neither_is_anonymous() {
        let told = |config: Value| credential(&json!({"type": "registry", "config": config}));
        let basic = Credential::Basic { user: "u".into(), password: "p".into() };
        assert_eq!(told(json!({"auth": "dTpw", "registry_token": "t"})), Ok(basic));
        assert_eq!(told(json!({"auth": "", "registry_token": "t"})), Ok(Credential::Bearer("t".into())));
        assert_eq!(told(json!({"host": "h"})), Ok(Credential::Anonymous));
        let error = told(json!({"auth": "c2VjcmV0"})).unwrap_err();
        assert!(!error.contains("c2VjcmV0"), "{error}");
    }
}
