//! What the mirror counts. Every name begins with `nydus_p2p_`.

use std::fmt::Write;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// What a request was for and how it was answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Answered {
    pub(super) kind: &'static str,
    pub(super) code: u16,
}

/// Where bytes or answers came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Of {
    pub(super) source: &'static str,
}

/// How a check of a caller's right ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Checked {
    pub(super) result: &'static str,
}

/// What the swarm decided.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Decided {
    pub(super) event: &'static str,
}

/// The counters, and the registry that prints them.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub(super) requests: Family<Answered, Counter>,
    pub(super) served: Counter,
    pub(super) bytes: Family<Of, Counter>,
    pub(super) upstream_requests: Family<Of, Counter>,
    pub(super) upstream_errors: Family<Of, Counter>,
    pub(super) joins: Counter,
    pub(super) evictions: Counter,
    pub(super) blobs: Gauge,
    pub(super) finished: Counter,
    pub(super) refuted: Counter,
    pub(super) unkept: Counter,
    pub(super) disk_usage: Gauge,
    pub(super) checks: Family<Checked, Counter>,
    pub(super) members: Gauge,
    pub(super) decisions: Family<Decided, Counter>,
    pub(super) quarantines: Counter,
    pub(super) to_peers: Counter,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("nydus_p2p");
        let mut made = Self {
            requests: Family::default(),
            served: Counter::default(),
            bytes: Family::default(),
            upstream_requests: Family::default(),
            upstream_errors: Family::default(),
            joins: Counter::default(),
            evictions: Counter::default(),
            blobs: Gauge::default(),
            finished: Counter::default(),
            refuted: Counter::default(),
            unkept: Counter::default(),
            disk_usage: Gauge::default(),
            checks: Family::default(),
            members: Gauge::default(),
            decisions: Family::default(),
            quarantines: Counter::default(),
            to_peers: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests answered, by kind and status", made.requests.clone());
        registry.register_with_unit("served", "Bytes of bodies sent to callers", Unit::Bytes, made.served.clone());
        registry.register_with_unit(
            "source",
            "Bytes by where they came from: cache (read from our disk), peer, mirror and registry (received)",
            Unit::Bytes,
            made.bytes.clone(),
        );
        registry.register("upstream_requests", "Requests sent upstream", made.upstream_requests.clone());
        registry.register("upstream_errors", "Requests upstream that failed or broke", made.upstream_errors.clone());
        registry.register(
            "joins",
            "Times a caller joined a fetch in flight instead of asking upstream",
            made.joins.clone(),
        );
        registry.register("evictions", "Blobs evicted for the quota", made.evictions.clone());
        registry.register("blobs", "Blobs of which something is cached", made.blobs.clone());
        registry.register("finished_blobs", "Blobs that are complete and matched their sha256", made.finished.clone());
        registry.register(
            "refuted_blobs",
            "Blobs that were complete and did not match their sha256, so that all their pieces were dropped",
            made.refuted.clone(),
        );
        registry.register(
            "unkept_pieces",
            "Pieces passed on without being kept: no room or a broken disk",
            made.unkept.clone(),
        );
        registry.register_with_unit("disk_usage", "Bytes of cached pieces", Unit::Bytes, made.disk_usage.clone());
        registry.register("auth_checks", "Checks of callers' rights upstream, by result", made.checks.clone());
        registry.register(
            "swarm_members",
            "Members of the swarm that are ready, this node included",
            made.members.clone(),
        );
        registry.register(
            "swarm_decisions",
            "What the swarm decided: hedge, silent, alone, referral, lease",
            made.decisions.clone(),
        );
        registry.register("swarm_quarantines", "Members put in quarantine", made.quarantines.clone());
        registry.register_with_unit(
            "swarm_sent",
            "Bytes of pieces sent to members",
            Unit::Bytes,
            made.to_peers.clone(),
        );
        made.registry = registry;
        made
    }

    /// Counts bytes that came from members and were kept.
    pub(super) fn count_peers(&self, bytes: u64) {
        self.bytes.get_or_create(&Of { source: "peer" }).inc_by(bytes);
    }

    /// Returns all of them as OpenMetrics text.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, &self.registry).is_err() {
            // Writing into a String does not fail; a metric that cannot be encoded would be a mistake of ours.
            let _ = writeln!(text, "# could not encode");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_our_prefix_a_help_and_a_line_in_the_document() {
        let metrics = Metrics::new();
        metrics.requests.get_or_create(&Answered { kind: "blob", code: 206 }).inc();
        metrics.bytes.get_or_create(&Of { source: "cache" }).inc_by(5);
        let text = metrics.text();
        assert!(text.contains("nydus_p2p_requests_total{kind=\"blob\",code=\"206\"} 1"), "{text}");
        assert!(text.contains("nydus_p2p_source_bytes_total{source=\"cache\"} 5"), "{text}");
        assert!(text.contains("nydus_p2p_disk_usage_bytes 0"), "{text}");
        let document = include_str!("../../../config/README.md");
        let types = text.lines().filter(|line| line.starts_with("# TYPE"));
        for line in types {
            let name = line.split(' ').nth(2).unwrap();
            assert!(name.starts_with("nydus_p2p_"), "{name}");
            assert!(text.contains(&format!("# HELP {name} ")), "{name}");
            let counted = if line.ends_with(" counter") { "_total" } else { "" };
            let row = format!("| `{name}{counted}");
            assert!(document.lines().any(|line| line.starts_with(&row)), "{name} is not in config/README.md");
        }
    }
}
