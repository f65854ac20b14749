//! The registry's name and the way to it: DNS and proxies, for mirror and nydusd alike.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::http::StatusCode;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nydus_tests::bed::Bed;
use nydus_tests::gate::{Gate, Loss, Pace};
use nydus_tests::proxy::{Proxy, State};

use crate::post::{Post, Read, expect_right};

/// The registry's name, which stands in its certificate and in no resolver.
pub(crate) const NAME: &str = "registry.shoal.test";

/// Gives this thread, and all that it starts, names of its own in the file `hosts`.
pub(crate) fn own(hosts: &Path) -> Result<()> {
    File::create(hosts)?;
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some(hosts), "/etc/hosts", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    name(&["127.0.0.1"])
}

/// Has the registry's name lead to these addresses.
fn name(addresses: &[&str]) -> Result<()> {
    let lines: String = addresses.iter().map(|address| format!("{address} {NAME}\n")).collect();
    std::fs::write("/etc/hosts", format!("127.0.0.1 localhost\n{lines}")).context("writing /etc/hosts")
}

/// An address where connections are neither accepted nor refused.
#[derive(Debug)]
struct Swallow {
    _listener: TcpListener,
    _queue: Vec<TcpStream>,
}

impl Swallow {
    fn at(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)?;
        // The shortest queue that there is, and it is full.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0)?)?;
        let limit = Duration::from_millis(300);
        let queue = std::iter::from_fn(|| TcpStream::connect_timeout(&address, limit).ok()).take(64).collect();
        Ok(Self { _listener: listener, _queue: queue })
    }
}

/// A server that knows no TLS: it answers whatever comes in plain HTTP, and remembers what came.
#[derive(Debug)]
struct Plain {
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Plain {
    fn at(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)?;
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hearing = Arc::clone(&heard);
        // It ends with the process, as does the test that it is for.
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut piece = [0; 4096];
                let count = stream.read(&mut piece).unwrap_or(0);
                hearing.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&piece[..count]);
                // Whoever does not listen is no worse off.
                drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
            }
        });
        Ok(Self { heard })
    }

    fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Takes the mirrors away.
fn without_mirror(posts: &mut [Post]) -> Result<()> {
    posts.iter_mut().try_for_each(|post| Ok(post.node.mirror.crash()?))
}

/// How often a read may find what was on its way, or a connection still open, when the fault began.
const TRIES: usize = 3;

/// The bed and those who read by way of its name.
#[derive(Debug)]
pub(crate) struct Way<'b> {
    pub(crate) bed: &'b Bed,
    pub(crate) blobs: Vec<String>,
}

impl Way<'_> {
    /// All have to ask the registry itself again, on new connections.
    fn start_over(&self) -> Result<()> {
        self.bed.front.void_addresses(StatusCode::FORBIDDEN);
        Ok(self.bed.front.cut_connections(Loss::Ended)?)
    }

    /// Every post reads a file that it does not have, and gets it.
    async fn right(&self, what: &str, posts: &mut [Post]) -> Result<()> {
        self.start_over()?;
        let files: Vec<usize> = posts.iter_mut().map(Post::next).collect();
        let reads = futures::future::join_all(posts.iter().zip(&files).map(|(post, file)| post.read_cold(*file)));
        for (post, read) in posts.iter().zip(reads.await) {
            expect_right(read?, post).with_context(|| format!("during {what:?}"))?;
        }
        println!("{what}: right");
        Ok(())
    }

    /// Every post reads a file that nobody can give, and is told; nothing is remembered of it.
    async fn told(&self, what: &str, word: &str, posts: &mut [Post], end: impl Fn() -> Result<()>) -> Result<()> {
        let mut tries = TRIES;
        let files = loop {
            self.start_over()?;
            let files: Vec<usize> = posts.iter_mut().map(Post::next).collect();
            posts.iter_mut().for_each(Post::turn_page);
            let reads = futures::future::join_all(posts.iter().zip(&files).map(|(post, file)| post.read_cold(*file)));
            let reads = reads.await.into_iter().collect::<Result<Vec<_>>>()?;
            let warm = posts.iter().zip(&reads).find(|(_, read)| !matches!(read, Read::Failed(_)));
            let Some((post, _)) = warm else { break files };
            tries -= 1;
            ensure!(tries > 0, "{} read during {what:?}", post.name);
        };
        for post in posts.iter() {
            post.told(&[&self.bed.front.host, word], &self.blobs).with_context(|| format!("during {what:?}"))?;
        }
        end()?;
        for (post, file) in posts.iter().zip(&files) {
            post.recovers(*file).await.with_context(|| format!("after {what:?}"))?;
        }
        println!("{what}: told, and right afterwards");
        Ok(())
    }

    /// What DNS does.
    pub(crate) async fn names(&self, posts: &mut [Post]) -> Result<()> {
        let port = self.bed.front.host.rsplit_once(':').context("a host has a port")?.1.parse::<u16>()?;
        self.right("name known", posts).await?;
        name(&[])?;
        self.told("name unknown", "could not connect", posts, || name(&["127.0.0.1"])).await?;
        without_mirror(posts)?;
        name(&[])?;
        self.told("name unknown, without mirror", "DNS", posts, || name(&["127.0.0.1"])).await?;
        posts.iter_mut().try_for_each(|post| post.node.restart_mirror())?;

        let elsewhere = Gate::open_at(&format!("127.0.0.3:{port}"), &format!("127.0.0.1:{port}"), Pace::default())?;
        name(&["127.0.0.3"])?;
        self.right("name leads elsewhere", posts).await?;
        ensure!(elsewhere.passed().bytes > 0, "nobody followed the name");

        let _dead = Swallow::at(SocketAddr::from(([127, 0, 0, 2], port)))?;
        name(&["127.0.0.2", "127.0.0.1"])?;
        self.right("first address dead", posts).await?;

        // The system puts the address of the newer kind first.
        name(&["::1", "127.0.0.1"])?;
        self.right("AAAA refused", posts).await?;
        let _unreachable = Swallow::at(format!("[::1]:{port}").parse()?)?;
        self.unreachable("AAAA unreachable", posts).await?;

        let plain = Plain::at(SocketAddr::from(([127, 0, 0, 4], port)))?;
        name(&["127.0.0.4"])?;
        self.told("name leads to who knows no TLS", "could not connect", posts, || name(&["127.0.0.1"])).await?;
        let heard = String::from_utf8_lossy(&plain.heard()).into_owned();
        ensure!(!heard.is_empty() && !heard.contains("HTTP/"), "it was spoken to in the clear:\n{heard}");
        Ok(())
    }

    /// Every connection loses the 300 ms after which the other kind of address is tried, and no more.
    async fn unreachable(&self, what: &str, posts: &mut [Post]) -> Result<()> {
        let (mut shortest, mut longest) = (Duration::MAX, Duration::ZERO);
        for _ in 0..TRIES {
            let begin = Instant::now();
            self.right(what, posts).await?;
            shortest = shortest.min(begin.elapsed());
            longest = longest.max(begin.elapsed());
        }
        // A try may find a connection that was kept. Twice 300 ms at most, because nydusd asks the mirror at most once in vain; an
        // address that is waited for costs 1.5 s and more.
        ensure!(longest > Duration::from_millis(300), "nobody tried it first: {longest:?}");
        ensure!(shortest < Duration::from_millis(1400), "it was waited for: {shortest:?}");
        Ok(())
    }

    /// What a proxy does, between this post and the registry.
    pub(crate) async fn proxies(&self, proxy: &Proxy, posts: &mut [Post]) -> Result<()> {
        let before = proxy.asked().len();
        self.right("proxy", posts).await?;
        let asked = proxy.asked();
        ensure!(asked.len() > before, "the proxy was not asked");
        ensure!(asked.iter().all(|asked| *asked == self.bed.front.host), "the proxy was asked for {asked:?}");
        let works = || {
            proxy.set(State::Works);
            Ok(())
        };
        proxy.set(State::Refuses);
        self.told("proxy refuses", "through the proxy", posts, works).await?;
        without_mirror(posts)?;
        self.right("proxy, without mirror", posts).await?;
        proxy.set(State::Refuses);
        self.told("proxy refuses, without mirror", "check HTTPS_PROXY", posts, works).await?;
        proxy.set(State::Dead);
        self.told("proxy dead, without mirror", "check HTTPS_PROXY", posts, works).await
    }
}
