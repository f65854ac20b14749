//! What was measured, for people.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nydus_tests::gate::{Gate, Pace, Passed};
use nydus_tests::node::Node;
use nydus_tests::runner::Runner;

/// Bytes that reached a node, by the reason for which and the place from which they came.
#[derive(Debug, Clone, Copy, Default)]
struct Lazy {
    demand: u64,
    prefetch: u64,
    from_mirrors: u64,
}

/// One run.
#[derive(Debug)]
pub(crate) struct Row {
    name: String,
    pull: Option<Duration>,
    pull_bytes: u64,
    answer: Duration,
    bytes: u64,
    requests: u64,
    lazy: Option<Lazy>,
}

impl Row {
    /// Pulls (if asked), runs, and reads all counters before and after.
    pub(crate) async fn measure(
        what: &str,
        (label, command): &(&'static str, Vec<String>),
        runner: &Runner,
        gate: &Gate,
        node: Option<&Node>,
        image: &str,
        pull: bool,
    ) -> Result<Self> {
        let name = format!("{what}, {label}");
        let (begin, before) = (Instant::now(), gate.passed());
        let lazy_before = node.map(lazy).transpose()?.unwrap_or_default();
        let mut pulled = None;
        if pull {
            runner.pull(image).await.with_context(|| format!("pulling {image}"))?;
            pulled = Some(begin.elapsed());
        }
        let at_pull = gate.passed() - before;
        let output = runner.run(image, command).await.with_context(|| format!("running {command:?} in {image}"))?;
        let answer = begin.elapsed();
        let passed = gate.passed() - before;
        println!("    {name}: {:.2} s: {}", answer.as_secs_f64(), output.trim());
        let lazy = node.map(lazy).transpose()?.map(|now| Lazy {
            demand: now.demand - lazy_before.demand,
            prefetch: now.prefetch - lazy_before.prefetch,
            from_mirrors: now.from_mirrors - lazy_before.from_mirrors,
        });
        Ok(Self {
            name,
            pull: pulled,
            pull_bytes: at_pull.bytes,
            answer,
            bytes: passed.bytes,
            requests: passed.requests,
            lazy,
        })
    }
}

impl Row {
    /// Pulls and runs on one member of a swarm; what it took from the registry is what its mirror counted, for others read
    /// at the same time.
    pub(crate) async fn of_member(
        name: String,
        command: &[String],
        runner: &Runner,
        node: &Node,
        image: &str,
    ) -> Result<Self> {
        let begin = Instant::now();
        runner.pull(image).await.with_context(|| format!("pulling {image}"))?;
        let pull = begin.elapsed();
        let pull_bytes = node.mirror_metric("nydus_p2p_source_bytes_total", "registry")?;
        runner.run(image, command).await.with_context(|| format!("running {command:?} in {image}"))?;
        let answer = begin.elapsed();
        println!("    {name}: {:.2} s", answer.as_secs_f64());
        Ok(Self {
            name,
            pull: Some(pull),
            pull_bytes,
            answer,
            bytes: node.mirror_metric("nydus_p2p_source_bytes_total", "registry")?,
            requests: node.mirror_metric("nydus_p2p_upstream_requests_total", "registry")?,
            lazy: Some(lazy(node)?),
        })
    }

    /// What passed the gate while all members ran.
    pub(crate) fn of_all(name: String, answer: Duration, before: Passed, after: Passed) -> Self {
        let passed = after - before;
        Self { name, pull: None, pull_bytes: 0, answer, bytes: passed.bytes, requests: passed.requests, lazy: None }
    }
}

/// Reads what nydusd and the mirror of a node have counted.
fn lazy(node: &Node) -> Result<Lazy> {
    let from = |source: &str| node.mirror_metric("nydus_p2p_source_bytes_total", source);
    let mut counted = Lazy { from_mirrors: from("mirror")? + from("peer")?, ..Lazy::default() };
    for daemon in node.nydusd("/api/v1/daemon")? {
        for mount in daemon["backend_collection"].as_object().into_iter().flatten().map(|(mount, _)| mount) {
            let number = |path: &str, key: &str| -> Result<u64> {
                let answers = node.nydusd(&format!("/api/v1/metrics/{path}?id={mount}"))?;
                Ok(answers.iter().filter_map(|answer| answer[key].as_u64()).sum())
            };
            let prefetch = number("blobcache", "prefetch_data_amount")?;
            counted.prefetch += prefetch;
            counted.demand += number("backend", "read_amount_total")?.saturating_sub(prefetch);
        }
    }
    Ok(counted)
}

/// All runs.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
    client: String,
}

impl Table {
    pub(crate) fn client(&mut self, name: &str, version: &str) {
        self.client = format!("{name}, containerd {version}");
    }

    pub(crate) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    pub(crate) fn print(&self, pace: Pace) {
        println!("client: {}", self.client);
        if pace.bits_per_second == 0 {
            println!("link to the registry: loopback");
        } else {
            let (rate, trip) = (pace.bits_per_second / 1_000_000, pace.round_trip.as_millis());
            println!("link to the registry: {rate} Mbit/s, {trip} ms");
        }
        println!(
            "{}",
            line("", ["pull", "answer", "at pull", "registry", "requests", "demand", "prefetch", "other node"])
        );
        println!("{}", line("", ["s", "s", "MB", "MB", "", "MB", "MB", "MB"]));
        for row in &self.rows {
            let pull = row.pull.map_or_else(|| "-".to_owned(), |time| format!("{:.2}", time.as_secs_f64()));
            let lazy = |pick: fn(Lazy) -> u64| row.lazy.map_or_else(|| "-".to_owned(), |lazy| mb(pick(lazy)));
            let (answer, requests) = (format!("{:.2}", row.answer.as_secs_f64()), row.requests.to_string());
            let (at_pull, registry) = (mb(row.pull_bytes), mb(row.bytes));
            let (demand, prefetch) = (lazy(|lazy| lazy.demand), lazy(|lazy| lazy.prefetch));
            let mirrors = lazy(|lazy| lazy.from_mirrors);
            let cells = [&pull, &answer, &at_pull, &registry, &requests, &demand, &prefetch, &mirrors];
            println!("{}", line(&row.name, cells.map(String::as_str)));
        }
        println!(
            "pull: until the pull ended; answer: from its begin (or the run's) to the end of the command;\n\
             registry: all that left the registry in that time, at pull included; demand, prefetch: what nydusd read\n\
             because somebody waited, or in advance; other node: what this node's mirror took from other nodes';\n\
             swarm: of one node the bytes that its own mirror read from the registry, together all that left it."
        );
    }
}

fn line(name: &str, cells: [&str; 8]) -> String {
    let cells: String = cells.iter().map(|cell| format!("{cell:>12}")).collect();
    format!("{name:<26}{cells}")
}

fn mb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Formats a size for a sentence.
pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{} MB", mb(bytes))
}
