//! Values in a registry's table that could be read and cannot be meant.
//!
//! What is blank is checked when an image is mounted: a template has no host and no repository yet.

use nydus_backend::config::Registry;

use super::ConfigError;

/// Checks the values of the table at `at`.
pub(super) fn check(registry: &Registry, at: &str) -> Result<(), ConfigError> {
    let wrong = |key: &str, value: &str, wanted: &str| {
        Err(ConfigError::key(format!("{at}.{key}"), format!("`{value}` is not {wanted}")))
    };
    for (key, scheme) in [("scheme", &registry.scheme), ("blob_url_scheme", &registry.blob_url_scheme)] {
        if !matches!(scheme.as_str(), "" | "http" | "https") {
            return wrong(key, scheme, "a scheme that is known: use `http` or `https`");
        }
    }
    for (key, host) in [("host", &registry.host), ("blob_redirected_host", &registry.blob_redirected_host)] {
        if !host.is_empty() && !is_host(host) {
            return wrong(key, host, "a host: write `name` or `name:port`, without scheme and path");
        }
    }
    if !registry.repo.is_empty() && !is_repository(&registry.repo) {
        return wrong("repo", &registry.repo, "a repository: write `namespace/name`, without tag and digest");
    }
    Ok(())
}

fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        // A colon inside brackets belongs to an address.
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:%".contains(&byte);
    !name.is_empty() && name.bytes().all(good) && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

fn is_repository(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    text.split('/').all(|part| !part.is_empty() && part.bytes().all(good))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_key_and_what_is_wanted() {
        for (key, values) in [
            ("scheme", ["htps", "ftp", "https://"]),
            ("blob_url_scheme", ["ftp", "HTTP", "://"]),
            ("host", ["http://x", "x/y", "a b"]),
            ("blob_redirected_host", ["x:port", ":5000", "x:99999"]),
            ("repo", ["a/b:tag", "/a/b", "a@sha256:x"]),
        ] {
            for value in values {
                let table = serde_json::json!({ key: value });
                let registry: Registry = serde_json::from_value(table).unwrap();
                let error = check(&registry, "backend.registry").unwrap_err().to_string();
                assert!(error.contains(&format!("`backend.registry.{key}`")) && error.contains(value), "{error}");
            }
        }
    }

    #[test]
    fn what_people_write_is_accepted() {
        for host in ["", "localhost", "127.0.0.1:5000", "[::1]:5000", "[fe80::1%25eth0]", "ghcr.io", "my_reg.local:443"]
        {
            let registry = Registry {
                host: host.into(),
                repo: "a.b/c-d/e__f".into(),
                scheme: "http".into(),
                ..Registry::default()
            };
            check(&registry, "at").unwrap();
        }
    }
}
