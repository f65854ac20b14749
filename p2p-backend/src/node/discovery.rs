//! Where other members may be: a list, and names that are asked again and again.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;

/// Addresses that are tried at a time.
pub(super) const MOST: usize = 8;
/// Targets of one SRV name that are looked at.
const MOST_TARGETS: usize = 32;
/// How long a name may take.
const LIMIT: Duration = Duration::from_secs(5);

/// The port where the configuration names none.
pub(super) const PORT: u16 = 4011;

/// Where to look.
#[derive(Debug)]
pub(super) struct Discovery {
    /// `host[:port]`, each one member or a name with many, and names of SRV records.
    seeds: Vec<String>,
    /// Asks for SRV records, if some are named.
    resolver: Option<TokioResolver>,
}

impl Discovery {
    /// Looks at `seeds`, as the system's DNS knows them.
    pub(super) fn new(seeds: Vec<String>) -> Self {
        let resolver = if seeds.iter().any(|seed| is_service(seed)) { system() } else { None };
        Self { seeds, resolver }
    }

    /// Returns the addresses that the names have now.
    pub(super) async fn addresses(&self) -> Vec<SocketAddr> {
        let mut all = BTreeSet::new();
        for seed in &self.seeds {
            match tokio::time::timeout(LIMIT, self.look_up(seed)).await {
                Ok(Ok(found)) => all.extend(found),
                Ok(Err(error)) => tracing::debug!(seed, %error, "a name of swarm.seeds has no address"),
                Err(_) => tracing::debug!(seed, limit = ?LIMIT, "a name of swarm.seeds is not answered"),
            }
        }
        all.into_iter().collect()
    }

    async fn look_up(&self, seed: &str) -> io::Result<Vec<SocketAddr>> {
        let mut found = Vec::new();
        match &self.resolver {
            Some(resolver) if is_service(seed) => {
                let answer = resolver.srv_lookup(seed).await.map_err(io::Error::other)?;
                let records = answer.answers().iter().filter_map(|record| match &record.data {
                    RData::SRV(service) => Some((service.target.clone(), service.port)),
                    _ => None,
                });
                // Whoever is named is as good as any other, so priorities and weights are not looked at.
                for (target, port) in records.take(MOST_TARGETS) {
                    match resolver.lookup_ip(target.clone()).await {
                        Ok(addresses) => found.extend(addresses.iter().map(|ip| SocketAddr::new(ip, port))),
                        Err(error) => {
                            tracing::debug!(seed, %target, %error, "a target of an SRV record has no address");
                        }
                    }
                }
            }
            _ => found.extend(tokio::net::lookup_host(with_port(seed)).await?),
        }
        Ok(found)
    }
}

/// Whether a seed names SRV records, as `_service._protocol.domain` does.
fn is_service(seed: &str) -> bool {
    seed.starts_with('_')
}

fn system() -> Option<TokioResolver> {
    match TokioResolver::builder_tokio().and_then(|builder| builder.build()) {
        Ok(resolver) => Some(resolver),
        Err(error) => {
            tracing::warn!(%error, "SRV records in swarm.seeds cannot be looked up; check /etc/resolv.conf");
            None
        }
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
    use hickory_resolver::config::{NameServerConfig, ResolverConfig};
    use hickory_resolver::net::runtime::TokioRuntimeProvider;

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
        assert_eq!(Discovery::new(seeds).addresses().await, [SocketAddr::from(([127, 0, 0, 1], 7))]);
    }

    /// Answers every question from `records`, whose names are as they are on the wire.
    async fn serve_names(records: Vec<(Vec<u8>, u16, Vec<u8>)>) -> SocketAddr {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut packet = [0; 512];
            while let Ok((_, from)) = socket.recv_from(&mut packet).await {
                let end = 12 + packet[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
                let (name, kind) = (&packet[12..end], u16::from_be_bytes([packet[end], packet[end + 1]]));
                let data: Vec<&Vec<u8>> =
                    records.iter().filter(|(of, is, _)| of == name && *is == kind).map(|(_, _, data)| data).collect();
                // The question comes back, and each answer points to its name.
                let mut answer = packet[..2].to_vec();
                answer.extend([0x81, 0x80, 0, 1, 0, data.len() as u8, 0, 0, 0, 0]);
                answer.extend(&packet[12..end + 4]);
                for data in data {
                    answer.extend([0xc0, 12]);
                    answer.extend(kind.to_be_bytes());
                    answer.extend([0, 1, 0, 0, 0, 60, 0, data.len() as u8]);
                    answer.extend(data);
                }
                let _ = socket.send_to(&answer, from).await;
            }
        });
        address
    }

    fn wire(name: &str) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            name.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
        bytes.push(0);
        bytes
    }

    #[tokio::test]
    async fn srv_records_name_hosts_with_their_ports() {
        let service = |port: u16, target: &str| [&[0, 0, 0, 0][..], &port.to_be_bytes(), &wire(target)].concat();
        let dns = serve_names(vec![
            (wire("_swarm._tcp.nodes.example"), 33, service(5000, "a.nodes.example")),
            (wire("_swarm._tcp.nodes.example"), 33, service(5001, "b.nodes.example")),
            (wire("a.nodes.example"), 1, vec![10, 0, 0, 1]),
            (wire("b.nodes.example"), 1, vec![10, 0, 0, 2]),
        ])
        .await;
        let mut server = NameServerConfig::udp(dns.ip());
        server.connections.iter_mut().for_each(|connection| connection.port = dns.port());
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).build().unwrap();
        let seeds = vec!["_swarm._tcp.nodes.example".into(), "_other._tcp.nodes.example".into()];
        let found = Discovery { seeds, resolver: Some(resolver) }.addresses().await;
        assert_eq!(found, [SocketAddr::from(([10, 0, 0, 1], 5000)), SocketAddr::from(([10, 0, 0, 2], 5001))]);
    }
}
