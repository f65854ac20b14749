//! What the swarm costs and saves: hits, misses, and crowds, each beside the simplest program that could do the same.
//!
//! * A hit of 1 MiB at the mirror, beside a bare HTTP server of the same file, in turn on one kept connection each.
//! * A miss of 64 KiB that nobody was ever let in to, beside the same request to the registry itself, in turn.
//! * Four nodes on links of 1 Gbit/s read 64 MiB at once from a registry behind 1 Gbit/s and 20 ms: without a swarm, in a swarm with
//!   TLS between the nodes, and in one without.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures::stream;
use nydus_tests::cluster::{Cluster, Door, Manner, REPOSITORY};
use nydus_tests::gate::Pace;
use nydus_tests::lab::LAB;
use nydus_tests::needs::{Need, met};

use crate::series::Series;

const HIT: usize = 1 << 20;
const HITS: usize = 200;
const MISS: usize = 64 << 10;
const MISSES: u64 = 150;
const CROWD: usize = 64 << 20;

pub(crate) async fn run(rounds: usize) -> Result<()> {
    if !met(&[LAB, &[Need::Program("docker-registry"), Need::Program("openssl")]].concat()) {
        return Ok(());
    }
    let slow = Pace { bits_per_second: 1_000_000_000, round_trip: Duration::from_millis(20) };
    let swarm = |keys| Manner { keys: Some(keys), pace: slow };
    let alone = Cluster::start_in(3, 4, Manner { keys: None, pace: slow }).await?;
    let sealed = Cluster::start_in(4, 4, swarm("")).await?;
    let plain = Cluster::start_in(5, 4, swarm("tls = false")).await?;
    hits(&sealed).await?;
    misses(&sealed, &alone).await?;
    crowds(rounds, &[("no swarm", &alone), ("swarm", &sealed), ("swarm without TLS", &plain)]).await
}

/// A kept connection.
struct Kept(BufReader<TcpStream>);

impl Kept {
    fn open(address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::with_capacity(256 << 10, stream)))
    }

    /// Reads a part and throws it away; returns how long that took.
    fn part(&mut self, path: &str, begin: usize, length: usize) -> Result<Duration> {
        let start = Instant::now();
        let end = begin + length - 1;
        write!(self.0.get_mut(), "GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes={begin}-{end}\r\n\r\n")?;
        let (mut line, mut left, mut status) = (String::new(), 0, String::new());
        loop {
            line.clear();
            self.0.read_line(&mut line)?;
            if status.is_empty() {
                status = line.trim().to_owned();
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                left = value.trim().parse()?;
            }
            if line == "\r\n" {
                break;
            }
        }
        ensure!(status.contains(" 206") && left == length, "{status}, {left} bytes");
        let mut rest = vec![0; 256 << 10];
        while left > 0 {
            let most = rest.len().min(left);
            let got = self.0.read(&mut rest[..most])?;
            ensure!(got > 0, "the answer broke off");
            left -= got;
        }
        Ok(start.elapsed())
    }
}

/// Serves parts of one file, and nothing else.
async fn file_server(path: PathBuf) -> Result<String> {
    async fn answer(path: PathBuf, request: Request) -> std::io::Result<Response> {
        let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
        let (begin, end) = range.trim_start_matches("bytes=").split_once('-').unwrap_or_default();
        let (begin, end) = (begin.parse().unwrap_or(0), end.parse::<u64>().unwrap_or(0) + 1);
        let file = std::sync::Arc::new(std::fs::File::open(path)?);
        let size = file.metadata()?.len();
        let parts = stream::try_unfold(begin, move |at| {
            let file = file.clone();
            async move {
                if at >= end {
                    return Ok::<_, std::io::Error>(None);
                }
                let length = (end - at).min(256 << 10);
                let read = tokio::task::spawn_blocking(move || {
                    use std::os::unix::fs::FileExt as _;
                    let mut bytes = vec![0; length as usize];
                    file.read_exact_at(&mut bytes, at)?;
                    Ok::<_, std::io::Error>(bytes)
                });
                Ok(Some((read.await.map_err(std::io::Error::other)??, at + length)))
            }
        });
        let mut answer = Body::from_stream(parts).into_response();
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        answer.headers_mut().insert(CONTENT_LENGTH, (end - begin).into());
        let told = format!("bytes {begin}-{}/{size}", end - 1);
        answer.headers_mut().insert(CONTENT_RANGE, HeaderValue::try_from(told).map_err(std::io::Error::other)?);
        Ok(answer)
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let router = Router::new().fallback(move |request: Request| {
        let path = path.clone();
        async move { answer(path, request).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR) }
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

async fn hits(cluster: &Cluster) -> Result<()> {
    let (path, bytes) = cluster.push(31, 32 << 20).await?;
    cluster.read(0, &path, "")?;
    let file = cluster.dir(0).join("data/blobs").join(name(&path)?).with_extension("data");
    let mut bare = Kept::open(&file_server(file).await?)?;
    let mut mirror = Kept::open(&format!("{}:4001", cluster.lab.address(0)))?;
    let (mut ours, mut theirs) = (Series::default(), Series::default());
    for round in 0..HITS {
        let at = round * HIT % (bytes.len() - HIT);
        theirs.push(bare.part("/", at, HIT)?.as_secs_f64() * 1e3);
        ours.push(mirror.part(&path, at, HIT)?.as_secs_f64() * 1e3);
    }
    println!("\nA hit of 1 MiB, ms: mirror {ours}, bare server {theirs}: {:.2}x of its speed", theirs.ratio(&ours));
    Ok(())
}

async fn misses(swarm: &Cluster, alone: &Cluster) -> Result<()> {
    println!("\nA miss of 64 KiB, ms beyond the registry's own time (median, 99th of a hundred):");
    for (what, cluster) in [("no swarm", alone), ("swarm of four", swarm)] {
        let mut paths = Vec::new();
        for seed in 0..MISSES {
            paths.push(cluster.push(1000 + seed, MISS).await?.0);
        }
        let mut mirror = Kept::open(&format!("{}:4001", cluster.lab.address(0)))?;
        let mut registry = Kept::open(cluster.host(Door::Open))?;
        let (mut direct, mut through) = (Series::default(), Series::default());
        for (round, path) in paths.iter().enumerate() {
            let [theirs, ours] = [registry.part(path, 0, MISS)?, mirror.part(path, 0, MISS)?];
            // The first ones open connections.
            if round >= 20 {
                direct.push(theirs.as_secs_f64() * 1e3);
                through.push(ours.as_secs_f64() * 1e3);
            }
        }
        let (median, tail) = (through.median() - direct.median(), through.part(0.99) - direct.part(0.99));
        println!("  {what:<16} {median:>6.2} {tail:>6.2}   (registry itself {direct}, through the mirror {through})");
    }
    Ok(())
}

async fn crowds(rounds: usize, clusters: &[(&str, &Cluster)]) -> Result<()> {
    let mut times = vec![(Series::default(), Series::default()); clusters.len()];
    for (_, cluster) in clusters {
        for node in cluster.everybody() {
            cluster.lab.shape(node, "1gbit")?;
        }
    }
    for round in 0..rounds as u64 {
        for ((_, cluster), (time, left)) in clusters.iter().zip(&mut times) {
            let (path, bytes) = cluster.push(500 + round, CROWD).await?;
            let (before, begin) = (cluster.passed(), Instant::now());
            cluster.read_at_once(&cluster.everybody(), Door::Open, &path, &bytes)?;
            time.push(begin.elapsed().as_secs_f64());
            left.push((cluster.passed() - before).bytes as f64 / bytes.len() as f64);
        }
    }
    println!(
        "\nFour nodes read 64 MiB at once (/v2/{REPOSITORY}): until the last has it, s; what left the registry, times the blob:"
    );
    for ((what, _), (time, left)) in clusters.iter().zip(&times) {
        println!("  {what:<20} {time:<24} {left:<24} {:.2}x of the time without a swarm", time.ratio(&times[0].0));
    }
    Ok(())
}

fn name(path: &str) -> Result<&Path> {
    Ok(Path::new(path.rsplit_once(':').context("a path of a blob")?.1))
}
