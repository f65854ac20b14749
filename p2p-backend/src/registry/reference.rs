//! Names of images, read as docker reads them.
//!
//! `busybox` is `docker.io/library/busybox:latest`, and `docker.io` is reached at `registry-1.docker.io`.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution;

/// The name of an image: registry, repository, and a tag or digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(distribution::Reference);

/// Text that does not name an image.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` does not name an image ({reason}); names look like `registry.example:5000/group/name:tag`")]
pub struct InvalidReference {
    text: String,
    reason: distribution::ParseError,
}

impl Reference {
    /// Returns the registry as it is written in names, for example `docker.io`; credentials are filed under it.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Returns the host (and port) to connect to.
    pub fn host(&self) -> &str {
        host_of(self.0.registry())
    }

    /// Returns the repository, for example `library/busybox`.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// Returns the tag, if the name has one. A name with neither tag nor digest means the tag `latest`.
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    /// Returns the digest, if the name has one.
    pub fn digest(&self) -> Option<&str> {
        self.0.digest()
    }

    /// Returns what to ask the registry for: the digest if there is one, else the tag.
    pub fn target(&self) -> &str {
        self.digest().or(self.tag()).unwrap_or("latest")
    }

    /// Returns the name of the manifest `digest` in the same repository.
    #[must_use]
    pub fn with_digest(&self, digest: &str) -> Self {
        Self(self.0.clone_with_digest(digest.to_owned()))
    }
}

/// Returns the host (and port) to connect to for the registry that names call `registry`.
pub fn host_of(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(reference) => Ok(Self(reference)),
            Err(reason) => Err(InvalidReference { text: text.to_owned(), reason }),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_completes_them() {
        let hex = "a".repeat(64);
        let digest = format!("sha256:{hex}");
        for (text, whole, host, target) in [
            ("busybox", "docker.io/library/busybox:latest", "registry-1.docker.io", "latest"),
            ("index.docker.io/me/app:1", "docker.io/me/app:1", "registry-1.docker.io", "1"),
            ("localhost/app", "localhost/app:latest", "localhost", "latest"),
            ("127.0.0.1:5000/a/b/c:x", "127.0.0.1:5000/a/b/c:x", "127.0.0.1:5000", "x"),
            (&format!("r.example/a:x@{digest}"), &format!("r.example/a:x@{digest}"), "r.example", &digest),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.to_string().as_str(), reference.host(), reference.target()), (whole, host, target));
        }
    }

    #[test]
    fn what_is_no_name_is_refused_by_name() {
        for text in ["", "r.example/UPPER case", "a b", "r.example/a@sha256:12"] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
