//! What a caller asks for, from the text of its request.
//!
//! Four kinds of callers, one value: nydusd names the registry by `X-Dragonfly-Registry`, containerd by `?ns=`, another
//! mirror by the header plus the list of mirrors that the request has come through, and plain clients not at all. The
//! registry must be one of the configured ones, and every part of a path is checked before it goes into an upstream URL:
//! nobody may steer this node's requests, and what it knows about them, by clever spelling.

use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use nydus_rafs::Digest;

use super::config::canonical;

/// Names the registry that a request is for.
pub(super) const REGISTRY: &str = "x-dragonfly-registry";
/// Asks for bytes that come from the registry itself, because those that came before did not verify.
pub(super) const NO_PEER: &str = "x-shoal-no-peer";
/// Says that the caller compares what it gets with digests of its own, so that wrong bytes do it no harm.
pub(super) const VERIFIES: &str = "x-shoal-verifies";
/// The mirrors that a request has come through, so that it never comes back to one of them.
pub(super) const HOPS: &str = "x-shoal-hops";

/// A mirror further away than this many others is not asked: a longer chain is a mistake in the configuration.
const MAX_HOPS: usize = 8;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// `/v2/`: does the registry speak the protocol, and whom does it want to see?
    Ping,
    /// A blob named by its sha256.
    Blob {
        /// The repository.
        repo: String,
        /// Its name.
        digest: Digest,
    },
    /// A manifest named by its sha256.
    Manifest {
        /// The repository.
        repo: String,
        /// Its name.
        digest: Digest,
    },
    /// A manifest named by a tag, which may name another tomorrow.
    Tag {
        /// The repository.
        repo: String,
        /// The tag.
        tag: String,
    },
    /// Anything else that is read from a repository: passed on, never kept. The path begins with `/v2/`.
    Other {
        /// The repository.
        repo: String,
        /// The path and query to ask upstream.
        path: String,
    },
}

/// A request that may be answered.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// The configured registry that it is for; none only for a ping.
    pub(super) registry: Option<String>,
    /// What it is for.
    pub(super) target: Target,
    /// Whether only the headers are wanted.
    pub(super) head: bool,
    /// Whose right it is; marked sensitive, so that it is not printed.
    pub(super) authorization: Option<HeaderValue>,
    /// Whether only the registry's own bytes will do.
    pub(super) no_peer: bool,
    /// Whether the caller compares what it gets with digests of its own.
    pub(super) verifies: bool,
    /// Ids of the mirrors that it came through.
    pub(super) hops: Vec<String>,
}

/// A request that is refused, with the reason for its caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Neither GET nor HEAD.
    #[error("only GET and HEAD are answered here; push to the registry itself")]
    Method,
    /// A path that is none of the protocol's.
    #[error(
        "`{0}` is not a path of the registry protocol that a mirror serves (/v2/<name>/blobs|manifests/<reference>)"
    )]
    Path(String),
    /// No registry named, and no default.
    #[error(
        "the request names no registry: send X-Dragonfly-Registry or ?ns=, or set default_registry in the mirror's configuration"
    )]
    NoRegistry,
    /// A registry that is not configured.
    #[error(
        "registry `{0}` is not one that this mirror may ask; add a [[registry]] entry with this name to its configuration"
    )]
    Registry(String),
    /// A header that asks for something we never do.
    #[error("X-Dragonfly-Output-Path is refused: this mirror writes no files for its callers")]
    OutputPath,
    /// The request has been here before.
    #[error("the request has come through this mirror already; the mirrors' lists of upstream mirrors form a circle")]
    Loop,
}

impl Refused {
    /// Returns the status that says so.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Path(_) => StatusCode::NOT_FOUND,
            Self::NoRegistry | Self::OutputPath => StatusCode::BAD_REQUEST,
            Self::Registry(_) => StatusCode::FORBIDDEN,
            Self::Loop => StatusCode::LOOP_DETECTED,
        }
    }
}

/// What requests are read against.
#[derive(Debug)]
pub(super) struct Reception {
    /// The canonical names of the configured registries.
    pub(super) registries: Vec<String>,
    /// The registry of requests that name none.
    pub(super) default_registry: Option<String>,
    /// Our own id among mirrors.
    pub(super) id: String,
}

impl Reception {
    /// Reads a request.
    pub(super) fn read(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Ask, Refused> {
        let head = match *method {
            Method::GET => false,
            Method::HEAD => true,
            _ => return Err(Refused::Method),
        };
        if headers.contains_key("x-dragonfly-output-path") {
            return Err(Refused::OutputPath);
        }
        let target = target(uri.path(), uri.query()).ok_or_else(|| Refused::Path(uri.path().to_owned()))?;
        let registry = self.registry(uri.query(), headers)?;
        if registry.is_none() && target != Target::Ping {
            return Err(Refused::NoRegistry);
        }
        let hops: Vec<String> = headers
            .get(HOPS)
            .and_then(|hops| hops.to_str().ok())
            .map(|hops| hops.split(',').map(|hop| hop.trim().to_owned()).filter(|hop| !hop.is_empty()).collect())
            .unwrap_or_default();
        if hops.len() >= MAX_HOPS || hops.contains(&self.id) {
            return Err(Refused::Loop);
        }
        let authorization = headers.get(http::header::AUTHORIZATION).cloned().map(|mut value| {
            value.set_sensitive(true);
            value
        });
        Ok(Ask {
            registry,
            target,
            head,
            authorization,
            no_peer: headers.contains_key(NO_PEER),
            verifies: headers.contains_key(VERIFIES),
            hops,
        })
    }

    fn registry(&self, query: Option<&str>, headers: &HeaderMap) -> Result<Option<String>, Refused> {
        let from_query = query.and_then(|query| {
            url::form_urlencoded::parse(query.as_bytes())
                .find(|(key, _)| key == "ns")
                .map(|(_, value)| value.into_owned())
        });
        let named = match (headers.get(REGISTRY), from_query) {
            (Some(header), _) => header.to_str().map_err(|_| Refused::Registry("(not text)".into()))?.to_owned(),
            (None, Some(ns)) => ns,
            (None, None) => return Ok(self.default_registry.clone()),
        };
        // `https://index.docker.io/v1/` and `docker.io` are the same registry; how it is reached is the operator's word.
        let host = named.split_once("://").map_or(named.as_str(), |(_, rest)| rest);
        let name = canonical(host.split('/').next().unwrap_or_default());
        if self.registries.contains(&name) { Ok(Some(name)) } else { Err(Refused::Registry(named)) }
    }
}

fn target(path: &str, query: Option<&str>) -> Option<Target> {
    let rest = match path.strip_prefix("/v2") {
        Some("" | "/") => return Some(Target::Ping),
        Some(rest) => rest.strip_prefix('/')?,
        None => return None,
    };
    let mut parts: Vec<&str> = rest.split('/').collect();
    if parts.len() < 3 {
        return None;
    }
    let last = parts.pop()?;
    let verb = parts.pop()?;
    let repo = parts.join("/");
    if !is_repo(&repo) {
        return None;
    }
    match verb {
        "blobs" => match sha256(last) {
            Some(digest) => Some(Target::Blob { repo, digest }),
            None => is_foreign_digest(last).then(|| Target::Other { repo, path: path.to_owned() }),
        },
        "manifests" => match sha256(last) {
            Some(digest) => Some(Target::Manifest { repo, digest }),
            None if is_tag(last) => Some(Target::Tag { repo, tag: last.to_owned() }),
            None => is_foreign_digest(last).then(|| Target::Other { repo, path: path.to_owned() }),
        },
        "tags" if last == "list" => Some(Target::Other { repo, path: with_query(path, query) }),
        "referrers" if sha256(last).is_some() || is_foreign_digest(last) => {
            Some(Target::Other { repo, path: with_query(path, query) })
        }
        _ => None,
    }
}

/// Keeps the parameters of the protocol, drops the one for mirrors.
fn with_query(path: &str, query: Option<&str>) -> String {
    let mut kept = url::form_urlencoded::Serializer::new(String::new());
    for (key, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if key != "ns" {
            kept.append_pair(&key, &value);
        }
    }
    let kept = kept.finish();
    if kept.is_empty() { path.to_owned() } else { format!("{path}?{kept}") }
}

fn sha256(text: &str) -> Option<Digest> {
    let hex = text.strip_prefix("sha256:")?;
    let lower = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (hex.len() == 64 && lower).then(|| hex.parse().ok())?
}

fn is_foreign_digest(text: &str) -> bool {
    text.split_once(':').is_some_and(|(algorithm, hex)| {
        algorithm != "sha256"
            && !algorithm.is_empty()
            && algorithm.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            && (32..=256).contains(&hex.len())
            && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

/// Path components of lower-case letters and digits with `.`, `_`, `-` between them.
pub(super) fn is_repo(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= 255
        && text.split('/').all(|part| {
            part.bytes().next().is_some_and(plain)
                && part.bytes().last().is_some_and(plain)
                && part.bytes().all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
                && !part.contains("..")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn reception() -> Reception {
        Reception {
            registries: vec!["docker.io".into(), "localhost:5000".into()],
            default_registry: None,
            id: "me".into(),
        }
    }

    fn read(uri: &str, headers: &[(&'static str, &str)]) -> Result<Ask, Refused> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        reception().read(&Method::GET, &uri.parse().unwrap(), &map)
    }

    #[test]
    fn every_caller_can_name_its_registry_in_its_own_way() {
        let path = format!("/v2/library/py.thon/blobs/sha256:{HEX}");
        for (uri, header, registry) in [
            (path.clone(), Some("https://index.docker.io"), "docker.io"),
            (path.clone(), Some("docker.io"), "docker.io"),
            (path.clone(), Some("http://localhost:5000"), "localhost:5000"),
            (format!("{path}?ns=docker.io"), None, "docker.io"),
            (format!("{path}?ns=localhost%3A5000"), None, "localhost:5000"),
            (format!("{path}?ns=docker.io"), Some("localhost:5000"), "localhost:5000"),
        ] {
            let headers: Vec<_> = header.map(|value| (REGISTRY, value)).into_iter().collect();
            let ask = read(&uri, &headers).unwrap();
            assert_eq!(ask.registry.as_deref(), Some(registry), "{uri} {header:?}");
            assert_eq!(ask.target, Target::Blob { repo: "library/py.thon".into(), digest: HEX.parse().unwrap() });
        }
        assert_eq!(read(&path, &[]).unwrap_err(), Refused::NoRegistry);
    }

    #[test]
    fn a_registry_outside_the_list_is_refused_however_it_is_spelt() {
        let path = format!("/v2/a/blobs/sha256:{HEX}");
        for name in [
            "evil.example",
            "http://169.254.169.254",
            "localhost:5001",
            "localhost:5000@evil.example",
            "",
            "docker.io.evil.example",
        ] {
            assert!(matches!(read(&path, &[(REGISTRY, name)]), Err(Refused::Registry(_))), "{name}");
        }
    }

    #[test]
    fn paths_are_either_understood_or_refused() {
        let header = [(REGISTRY, "docker.io")];
        let target = |path: &str| read(path, &header).map(|ask| ask.target);
        assert_eq!(target("/v2/"), Ok(Target::Ping));
        assert_eq!(target("/v2"), Ok(Target::Ping));
        assert_eq!(target("/v2/a/b/c/manifests/v1.2"), Ok(Target::Tag { repo: "a/b/c".into(), tag: "v1.2".into() }));
        assert!(matches!(target(&format!("/v2/a/manifests/sha256:{HEX}")), Ok(Target::Manifest { .. })));
        assert_eq!(
            target("/v2/a/tags/list?n=5&ns=docker.io"),
            Ok(Target::Other { repo: "a".into(), path: "/v2/a/tags/list?n=5".into() })
        );
        let sha512 = format!("/v2/a/blobs/sha512:{HEX}{HEX}");
        assert_eq!(target(&sha512), Ok(Target::Other { repo: "a".into(), path: sha512 }));
        for path in [
            "/",
            "/token",
            "/v1/x",
            "/v2/blobs/x",
            "/v2/a/blobs/uploads",
            "/v2/a/blobs/sha256:12",
            "/v2/../b/blobs/sha512:0123456789abcdef0123456789abcdef",
            "/v2/A/manifests/x",
            "/v2/a//b/manifests/x",
            "/v2/a/manifests/-x",
            "/v2/a%2e%2e/manifests/x",
            "/v2/_catalog",
            "/v2/a/manifests/x%2f..",
        ] {
            assert!(matches!(target(path), Err(Refused::Path(_))), "{path}");
        }
    }

    #[test]
    fn loops_output_paths_and_other_methods_are_refused() {
        let path = format!("/v2/a/blobs/sha256:{HEX}");
        assert_eq!(read(&path, &[(REGISTRY, "docker.io"), (HOPS, "you, me")]).unwrap_err(), Refused::Loop);
        assert_eq!(read(&path, &[(REGISTRY, "docker.io"), (HOPS, "1,2,3,4,5,6,7,8")]).unwrap_err(), Refused::Loop);
        assert_eq!(read(&path, &[(REGISTRY, "docker.io"), (HOPS, "you")]).unwrap().hops, ["you"]);
        let output = read(&path, &[(REGISTRY, "docker.io"), ("x-dragonfly-output-path", "/etc/passwd")]);
        assert_eq!(output.unwrap_err(), Refused::OutputPath);
        let put = reception().read(&Method::PUT, &path.parse().unwrap(), &HeaderMap::new());
        assert_eq!(put.unwrap_err(), Refused::Method);
    }

    #[test]
    fn authorization_is_never_printed() {
        let path = format!("/v2/a/blobs/sha256:{HEX}");
        let ask = read(&path, &[(REGISTRY, "docker.io"), ("authorization", "Bearer secret")]).unwrap();
        assert!(!format!("{ask:?}").contains("secret"));
    }
}
