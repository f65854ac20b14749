//! What proves to a registry that we may read: a user and password, or a token.
//!
//! Credentials come from nydusd's configuration (`auth`, `registry_token`), from docker's `config.json`
//! with its helpers, or from whoever asks us at run time. They never appear in a `Debug` text.

use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

/// How long a credential helper may take: it may ask a cloud, and somebody waits for a mount or a read.
const HELPER_LIMIT: Duration = Duration::from_secs(5);

/// A proof of identity for one registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credential {
    /// None.
    #[default]
    Anonymous,
    /// A user and a password, shown to the registry itself or to its token service.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A refresh token, for the token service only.
    Identity(String),
    /// An access token, shown to the registry as it is until it is refused.
    Bearer(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(..)",
            Self::Identity(_) => "Identity(..)",
            Self::Bearer(_) => "Bearer(..)",
        })
    }
}

/// Why credentials could not be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CredentialError {
    /// `auth` of a configuration is not what it must be. The text is not repeated: it is secret.
    #[error("`auth` is not the base64 form of `user:password`")]
    Malformed,
    /// Docker's configuration exists but does not yield the credential.
    #[error("could not take the credential for {registry} from {}: {reason}", path.display())]
    Docker {
        /// The registry.
        registry: String,
        /// The configuration file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

impl Credential {
    /// Decodes `auth` of nydusd's and docker's configurations: base64 of `user:password`. Empty is anonymous.
    ///
    /// # Errors
    ///
    /// [`CredentialError::Malformed`].
    pub fn from_auth(auth: &str) -> Result<Self, CredentialError> {
        let auth = auth.trim();
        if auth.is_empty() {
            return Ok(Self::Anonymous);
        }
        let bytes =
            STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth)).map_err(|_| CredentialError::Malformed)?;
        let text = String::from_utf8(bytes).map_err(|_| CredentialError::Malformed)?;
        let (user, password) = text.split_once(':').ok_or(CredentialError::Malformed)?;
        Ok(Self::Basic { user: user.to_owned(), password: password.to_owned() })
    }

    /// Returns the value of an `Authorization: Basic` header, if this is a user and password.
    pub fn basic_header(&self) -> Option<String> {
        match self {
            Self::Basic { user, password } => Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))),
            _ => None,
        }
    }

    /// Looks `registry` up in docker's configuration (`$DOCKER_CONFIG/config.json`, else
    /// `~/.docker/config.json`), asking its credential helpers. No file and no entry are anonymous.
    ///
    /// `registry` is a host as in an image name; Docker Hub is found under its classic key. Helpers are
    /// programs, so this blocks, for at most five seconds: call it from a thread that may wait.
    ///
    /// # Errors
    ///
    /// [`CredentialError::Docker`] if the file cannot be read or a helper fails.
    pub fn from_docker_config(registry: &str) -> Result<Self, CredentialError> {
        let Some(path) = docker_config::path() else {
            return Ok(Self::Anonymous);
        };
        Self::from_docker_config_at(path, registry)
    }

    /// As [`Credential::from_docker_config`], with the file given.
    ///
    /// # Errors
    ///
    /// As [`Credential::from_docker_config`].
    pub fn from_docker_config_at(path: PathBuf, registry: &str) -> Result<Self, CredentialError> {
        use docker_credential::{CredentialRetrievalError as Failure, DockerCredential};

        let refuse =
            |path: PathBuf, reason: String| CredentialError::Docker { registry: registry.to_owned(), path, reason };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::Anonymous),
            Err(error) => return Err(refuse(path, error.to_string())),
        };
        let key = match registry {
            "docker.io" | "index.docker.io" | "registry-1.docker.io" => "https://index.docker.io/v1/",
            other => other,
        };
        let key = key.to_owned();
        let found = within(HELPER_LIMIT, move || docker_credential::get_credential_from_reader(&*text, &key));
        match found.ok_or_else(|| {
            refuse(path.clone(), format!("its helper did not answer within {} s", HELPER_LIMIT.as_secs()))
        })? {
            Ok(DockerCredential::IdentityToken(token)) if token.is_empty() => Ok(Self::Anonymous),
            Ok(DockerCredential::IdentityToken(token)) => Ok(Self::Identity(token)),
            Ok(DockerCredential::UsernamePassword(user, password)) => Ok(Self::Basic { user, password }),
            Err(Failure::NoCredentialConfigured | Failure::ConfigNotFound) => Ok(Self::Anonymous),
            // What helpers say when they hold nothing for this server; it is no failure.
            Err(Failure::HelperFailure { stdout, stderr, .. })
                if stdout.contains("credentials not found") || stderr.contains("credentials not found") =>
            {
                Ok(Self::Anonymous)
            }
            Err(Failure::HelperFailure { helper, stderr, .. }) => {
                Err(refuse(path, format!("{helper} failed: {}", stderr.trim())))
            }
            Err(Failure::ConfigReadError) => Err(refuse(path, "it is not valid JSON of the expected form".to_owned())),
            Err(other) => Err(refuse(path, other.to_string())),
        }
    }
}

/// Waits for an answer on a thread that is left to itself when it takes too long.
fn within<T: Send + 'static>(limit: Duration, answer: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody listens any more when it took too long.
        drop(tell.send(answer()));
    });
    told.recv_timeout(limit).ok()
}

/// Docker's configuration file: where it is, and which of its entries is used.
pub mod docker_config {
    use std::path::PathBuf;

    use serde_json::Value;

    /// Returns the file of the user who runs this.
    pub fn path() -> Option<PathBuf> {
        let folder = match std::env::var_os("DOCKER_CONFIG") {
            Some(folder) if !folder.is_empty() => PathBuf::from(folder),
            _ => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
        };
        Some(folder.join("config.json"))
    }

    /// Returns the name under which a registry's account is filed.
    pub(super) fn key(registry: &str) -> &str {
        match registry {
            "docker.io" | "index.docker.io" | "registry-1.docker.io" => "https://index.docker.io/v1/",
            other => other,
        }
    }

    /// Where a registry's account comes from, to be told to a person.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub enum Account {
        /// There is no file.
        Nowhere,
        /// The file has no entry for the registry.
        Unknown(PathBuf),
        /// This entry of the file, or the helper that it names.
        Entry(String, PathBuf),
    }

    /// Tells where the account for `registry` comes from.
    pub fn account(registry: &str) -> Account {
        let Some(path) = path() else { return Account::Nowhere };
        let Ok(text) = std::fs::read(&path) else { return Account::Nowhere };
        let file: Value = serde_json::from_slice(&text).unwrap_or_default();
        let key = key(registry);
        if let Some(helper) = file["credHelpers"][key].as_str() {
            return Account::Entry(format!("credHelpers {key}: {helper}"), path);
        }
        let filed = |name: &str| {
            let bare = name.trim_start_matches("https://").trim_start_matches("http://");
            name == key || bare.split('/').next() == Some(key)
        };
        let found = file["auths"].as_object().and_then(|auths| auths.keys().find(|name| filed(name)));
        match (found, file["credsStore"].as_str()) {
            (Some(name), _) => Account::Entry(name.clone(), path),
            (None, Some(store)) => Account::Entry(format!("credsStore: {store}"), path),
            (None, None) => Account::Unknown(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auth_is_base64_of_user_and_password_and_the_password_may_hold_colons() {
        let expected = Credential::Basic { user: "u".into(), password: "p:q".into() };
        assert_eq!(Credential::from_auth(" dTpwOnE=\n").unwrap(), expected);
        assert_eq!(Credential::from_auth("dTpwOnE").unwrap(), expected);
        assert_eq!(expected.basic_header().unwrap(), "Basic dTpwOnE=");
        assert_eq!(Credential::from_auth("").unwrap(), Credential::Anonymous);
        for bad in ["dXA=", "***", "/w=="] {
            let error = Credential::from_auth(bad).unwrap_err().to_string();
            assert!(!error.contains(bad), "{error}");
        }
    }

    #[test]
    fn debug_never_prints_secrets() {
        for secret in [
            Credential::Basic { user: "hidden".into(), password: "hidden".into() },
            Credential::Identity("hidden".into()),
            Credential::Bearer("hidden".into()),
        ] {
            assert!(!format!("{secret:?}").contains("hidden"));
        }
    }

    #[test]
    fn docker_config_is_searched_under_the_names_docker_uses() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(
            &path,
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"aHViOnB3"},"127.0.0.1:5000":{"auth":"dTpw"},
                "tok.example":{"auth":"dTpw","identitytoken":"refresh"}}}"#,
        )
        .unwrap();
        let find = |registry: &str| Credential::from_docker_config_at(path.clone(), registry).unwrap();
        let basic = |user: &str, password: &str| Credential::Basic { user: user.into(), password: password.into() };
        assert_eq!(find("docker.io"), basic("hub", "pw"));
        assert_eq!(find("registry-1.docker.io"), basic("hub", "pw"));
        assert_eq!(find("127.0.0.1:5000"), basic("u", "p"));
        assert_eq!(find("tok.example"), Credential::Identity("refresh".into()));
        assert_eq!(find("elsewhere.example"), Credential::Anonymous);
        assert_eq!(
            Credential::from_docker_config_at(folder.path().join("absent"), "docker.io").unwrap(),
            Credential::Anonymous
        );
        std::fs::write(&path, "{").unwrap();
        assert!(Credential::from_docker_config_at(path.clone(), "docker.io").is_err());
    }

    #[test]
    fn who_takes_too_long_is_not_waited_for() {
        let hung = || std::thread::sleep(Duration::from_secs(3));
        let begun = std::time::Instant::now();
        assert_eq!(within(Duration::from_millis(50), hung), None);
        assert!(begun.elapsed() < Duration::from_secs(2));
        assert_eq!(within(HELPER_LIMIT, || 7), Some(7));
    }
}
