//! From a host's name to the addresses that are tried, in order.
//!
//! Names are resolved as the system does it, anew for every connection, so a name that changes is followed. A name may
//! have several addresses, and the first may be dead: those of one family are tried one after another within the time
//! for a connection, and begin with another one each time; the other family is tried beside them after 300 ms (the HTTP
//! library does both).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Which addresses may be asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Reach {
    /// All.
    #[default]
    Everywhere,
    /// All but link-local ones, in any spelling: they hold a cloud's metadata service with the node's own
    /// credentials, and whoever asks on behalf of others may be talked into asking it, by a name or by a redirect.
    NotLinkLocal,
}

impl Reach {
    /// Tells whether `address` may be asked.
    pub(crate) fn covers(self, address: IpAddr) -> bool {
        self == Self::Everywhere || !is_link_local(address)
    }

    /// Tells whether the host of `url` may be asked as far as it is a literal address; names are judged when they are
    /// resolved.
    pub(crate) fn covers_url(self, url: &Url) -> bool {
        match url.host() {
            Some(url::Host::Ipv4(address)) => self.covers(address.into()),
            Some(url::Host::Ipv6(address)) => self.covers(address.into()),
            Some(url::Host::Domain(_)) | None => true,
        }
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => {
            v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().or_else(|| v6.to_ipv4()).is_some_and(|v4| v4.is_link_local())
        }
    }
}

/// Resolves names as the system does, and gives the addresses of a family in turn.
#[derive(Debug, Default)]
pub(super) struct Names {
    turn: Arc<AtomicUsize>,
    reach: Reach,
}

impl Names {
    pub(super) fn new(reach: Reach) -> Self {
        Self { turn: Arc::default(), reach }
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let (turn, reach) = (self.turn.fetch_add(1, Ordering::Relaxed), self.reach);
        Box::pin(async move {
            let all: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let found: Vec<SocketAddr> = all.iter().copied().filter(|found| reach.covers(found.ip())).collect();
            if found.is_empty() && !all.is_empty() {
                return Err(format!("`{}` has link-local addresses only, which are never asked", name.as_str()).into());
            }
            Ok(Box::new(turned(found, turn).into_iter()) as Addrs)
        })
    }
}

/// Turns the addresses of each family. The family that came first stays first: the other one is tried after
/// 300 ms anyway.
fn turned(addresses: Vec<SocketAddr>, turn: usize) -> Vec<SocketAddr> {
    let first_is_v4 = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv4() == first_is_v4);
    for family in [&mut first, &mut second] {
        if !family.is_empty() {
            let by = turn % family.len();
            family.rotate_left(by);
        }
    }
    first.append(&mut second);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_take_turns_and_families_do_not() {
        let addresses =
            |texts: &[&str]| -> Vec<SocketAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        let found = addresses(&["[::1]:0", "10.0.0.1:0", "[::2]:0", "10.0.0.2:0", "10.0.0.3:0"]);
        let expected = addresses(&["[::2]:0", "[::1]:0", "10.0.0.2:0", "10.0.0.3:0", "10.0.0.1:0"]);
        assert_eq!(turned(found, 1), expected);
        assert!(turned(Vec::new(), 7).is_empty());
    }

    #[test]
    fn link_local_addresses_are_known_in_every_spelling() {
        for text in ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "::169.254.1.1"] {
            assert!(!Reach::NotLinkLocal.covers(text.parse().unwrap()), "{text}");
            assert!(Reach::Everywhere.covers(text.parse().unwrap()), "{text}");
        }
        for text in ["127.0.0.1", "10.0.0.1", "::1", "2001:db8::1", "170.254.1.1"] {
            assert!(Reach::NotLinkLocal.covers(text.parse().unwrap()), "{text}");
        }
        for url in ["http://169.254.169.254/x", "http://[fe80::1]/", "http://2852039166/"] {
            assert!(!Reach::NotLinkLocal.covers_url(&Url::parse(url).unwrap()), "{url}");
        }
    }
}
