//! Where other members may be: a list, and names that are asked again and again.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

/// Addresses that are tried at a time.
pub(super) const MOST: usize = 8;
/// How long a name may take.
const LIMIT: Duration = Duration::from_secs(5);

/// The port where the configuration names none.
pub(super) const PORT: u16 = 4011;

/// Where to look.
#[derive(Debug, Clone)]
pub(super) struct Discovery {
    /// `host[:port]`, each one member or a name with many.
    pub(super) seeds: Vec<String>,
}

impl Discovery {
    /// Returns the addresses that the names have now.
    pub(super) async fn addresses(&self) -> Vec<SocketAddr> {
        let mut all = BTreeSet::new();
        for seed in &self.seeds {
            let looking = tokio::time::timeout(LIMIT, tokio::net::lookup_host(with_port(seed))).await;
            match looking {
                Ok(Ok(found)) => all.extend(found),
                Ok(Err(error)) => tracing::debug!(seed, %error, "a name of swarm.seeds has no address"),
                Err(_) => tracing::debug!(seed, limit = ?LIMIT, "a name of swarm.seeds is not answered"),
            }
        }
        all.into_iter().collect()
    }
}

/// Adds the port that is meant where none is given.
fn with_port(seed: &str) -> String {
    let has_port = match seed.rsplit_once(':') {
        Some((host, port)) => port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')),
        None => false,
    };
    match seed.parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]:{PORT}"),
        Err(_) if has_port => seed.to_owned(),
        Err(_) => format!("{seed}:{PORT}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_may_leave_its_port_out() {
        for (seed, full) in [
            ("10.0.0.2", "10.0.0.2:4011"),
            ("10.0.0.2:5", "10.0.0.2:5"),
            ("node.example", "node.example:4011"),
            ("fd00::2", "[fd00::2]:4011"),
            ("[fd00::2]", "[fd00::2]:4011"),
            ("[fd00::2]:5", "[fd00::2]:5"),
        ] {
            assert_eq!(with_port(seed), full);
        }
    }

    #[tokio::test]
    async fn a_name_without_an_address_does_not_hide_the_others() {
        let seeds = vec!["no.such.name.invalid".into(), "127.0.0.1:7".into()];
        assert_eq!(Discovery { seeds }.addresses().await, [SocketAddr::from(([127, 0, 0, 1], 7))]);
    }
}
