//! Keeps the mirror from being talked into asking link-local addresses.
//!
//! Such addresses hold a cloud's metadata service with the node's own credentials. A registry's name, or a redirect it
//! answers with, may resolve to one: literal addresses are refused before a request, resolved ones here.

use std::net::{IpAddr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Whether `address` is link-local, in any of its spellings.
pub(super) fn forbidden(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => {
            v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().or_else(|| v6.to_ipv4()).is_some_and(|v4| v4.is_link_local())
        }
    }
}

/// Whether the host of `url` is a literal link-local address.
pub(super) fn forbidden_host(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(v4)) => forbidden(v4.into()),
        Some(Host::Ipv6(v6)) => forbidden(v6.into()),
        Some(Host::Domain(_)) | None => false,
    }
}

/// The system's resolver without link-local answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guarded;

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((host.as_str(), 0)).await?.filter(|found| !forbidden(found.ip())).collect();
            if found.is_empty() {
                return Err(format!("`{host}` has no address that may be asked (link-local ones are not)").into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_addresses_are_known_in_every_spelling() {
        for text in ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "::169.254.1.1"] {
            assert!(forbidden(text.parse().unwrap()), "{text}");
        }
        for text in ["127.0.0.1", "10.0.0.1", "::1", "2001:db8::1", "170.254.1.1"] {
            assert!(!forbidden(text.parse().unwrap()), "{text}");
        }
        for url in ["http://169.254.169.254/x", "http://[fe80::1]/", "http://2852039166/"] {
            assert!(forbidden_host(&Url::parse(url).unwrap()), "{url}");
        }
    }
}
