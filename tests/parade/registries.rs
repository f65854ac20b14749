//! What registries, token services and stores of blobs do, one after another.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use axum::http::StatusCode;
use nydus_tests::front::Front;
use nydus_tests::gate::Loss;
use nydus_tests::manner::{Manner, Temper};
use nydus_tests::oddity::Oddity;
use nydus_tests::sky::Weather;

use crate::image;
use crate::post::{Post, Read, expect_right};

/// A connection on which nothing is acknowledged is given up after 3.3 s; waiting for an answer on it takes 10 s.
const SOON: Duration = Duration::from_secs(8);

/// How a fault is brought about.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Above the store of blobs.
    Store(Weather),
    /// Above the registry, where blobs are asked for.
    Registry(Weather),
    /// In the front's manner.
    Front(Manner),
    /// Addresses that were given out are refused.
    Void(StatusCode),
    /// Connections are lost while they are idle.
    Cut(Loss),
}

/// What a reader sees of it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    /// Nothing.
    Right,
    /// An error, and a warning with this word.
    Refused(&'static str),
    /// Nothing, and soon: nobody is thought ill for it.
    Soon,
    /// A wait for its end.
    Waits,
    /// An error at worst, and nothing at the next try.
    Stumbles,
}

use Expect::{Refused, Right, Soon, Stumbles, Waits};
use Fault::{Cut, Front as Way, Registry, Store, Void};

const fn status(code: u16) -> StatusCode {
    match StatusCode::from_u16(code) {
        Ok(status) => status,
        Err(_) => panic!("no status"),
    }
}

const fn odd(oddity: Oddity) -> Fault {
    Store(Weather::Odd(oddity))
}

/// A fault's name, itself, and what comes of it.
pub(crate) type Case = (&'static str, Fault, Expect);

/// All of them.
pub(crate) const PARADE: &[Case] = &[
    ("redirect by 301", Way(Manner::Redirects(status(301))), Right),
    ("redirect by 302", Way(Manner::Redirects(status(302))), Right),
    ("redirect by 303", Way(Manner::Redirects(status(303))), Right),
    ("redirect by 308", Way(Manner::Redirects(status(308))), Right),
    ("relative redirect", Way(Manner::Relative), Right),
    ("redirects over three hops", Way(Manner::Hops(3)), Right),
    ("redirects without end", Way(Manner::Hops(1000)), Refused("redirect")),
    ("address answers 400", Void(status(400)), Right),
    ("address answers 401", Void(status(401)), Right),
    ("address answers 403", Void(status(403)), Right),
    ("address answers 404", Void(status(404)), Right),
    ("address answers 410", Void(status(410)), Right),
    ("store answers 403", Store(Weather::Status(status(403))), Refused("403")),
    ("store answers 416", Store(Weather::Status(status(416))), Refused("416")),
    ("registry answers 404", Registry(Weather::Status(status(404))), Refused("404")),
    ("registry answers 403", Registry(Weather::Status(status(403))), Refused("403")),
    ("HTML with 200", odd(Oddity::Html), Refused("login page")),
    ("Content-Encoding", odd(Oddity::Encoded), Refused("ncod")),
    // Who gets no part as a part takes the whole.
    ("no Content-Range", odd(Oddity::NoContentRange), Right),
    ("wrong Content-Range", odd(Oddity::OtherContentRange), Refused("were asked for")),
    ("chunked body", odd(Oddity::Chunked), Right),
    ("body until the end of the connection", odd(Oddity::UntilClose), Right),
    ("endless body", odd(Oddity::Endless), Refused("push the image again")),
    ("ranges ignored", odd(Oddity::Whole), Right),
    ("wrong Docker-Content-Digest", odd(Oddity::OtherDigest), Right),
    ("no Docker-Content-Digest", odd(Oddity::NoDigest), Right),
    ("401 without challenge", Way(Manner::NoChallenge), Right),
    ("401 with several challenges", Way(Manner::SeveralChallenges), Right),
    ("401 without quotes", Way(Manner::Unquoted), Right),
    ("401 with several scopes", Way(Manner::SeveralScopes), Right),
    ("user and password instead of tokens", Way(Manner::Basic), Right),
    ("token service refuses POST", Way(Manner::NoPosts), Right),
    ("tokens without expires_in", Way(Manner::NoExpiry), Right),
    ("tokens of long ago", Way(Manner::IssuedLongAgo), Right),
    ("429 until a date from the token service", Way(Manner::TokensLimited), Waits),
    ("429 until a date from the store", Store(Weather::TooManyUntilDate), Waits),
    ("429 until a date from the registry", Registry(Weather::TooManyUntilDate), Waits),
    ("429 for some seconds from the store", Store(Weather::TooMany(2)), Waits),
    ("429 for some seconds from the registry", Registry(Weather::TooMany(2)), Waits),
    ("429 alone", Store(Weather::Status(status(429))), Waits),
    ("503 from the store", Store(Weather::Status(status(503))), Waits),
    ("502 from the registry", Registry(Weather::Status(status(502))), Waits),
    ("bodies cut", Store(Weather::Cut(70_000)), Waits),
    ("HTTP/2", Way(Manner::Multiplexed(Temper::Good)), Right),
    ("HTTP/2 with GOAWAY", Way(Manner::Multiplexed(Temper::Goes)), Right),
    ("HTTP/2 with RST_STREAM", Way(Manner::Multiplexed(Temper::Resets)), Right),
    ("HTTP/2 with RST_STREAM in bodies", Way(Manner::Multiplexed(Temper::ResetsBodies)), Right),
    ("HTTP/2 that is silent", Way(Manner::Multiplexed(Temper::Silent)), Stumbles),
    ("idle connections reset", Cut(Loss::Reset), Soon),
    ("idle connections ended", Cut(Loss::Ended), Soon),
    ("idle connections silent", Cut(Loss::Silent), Soon),
];

impl Fault {
    fn begin(self, front: &Front) -> Result<()> {
        match self {
            Store(weather) => front.store_sky().set(weather),
            Registry(weather) => front.registry_sky().set(weather),
            Way(manner) => front.behave(manner),
            Void(status) => front.void_addresses(status),
            Cut(loss) => front.cut_connections(loss)?,
        }
        match self {
            // Who holds an address does not ask the registry.
            Registry(_) | Way(Manner::Redirects(_) | Manner::Relative | Manner::Hops(_) | Manner::Multiplexed(_)) => {
                front.void_addresses(StatusCode::FORBIDDEN);
            }
            Way(_) => {
                front.void_addresses(StatusCode::FORBIDDEN);
                front.revoke();
            }
            _ => {}
        }
        Ok(())
    }

    fn end(self, front: &Front) {
        front.store_sky().set(Weather::Clear);
        front.registry_sky().set(Weather::Clear);
        front.behave(Manner::Usual);
        if matches!(self, Way(Manner::Multiplexed(_))) {
            front.void_addresses(StatusCode::FORBIDDEN);
        }
    }

    /// Whether it is counted for mirrors by themselves: tokens are the business of nydusd alone.
    fn is_for_mirrors(self) -> bool {
        matches!(
            self,
            Store(_) | Registry(_) | Void(_) | Way(Manner::Redirects(_) | Manner::Relative | Manner::Hops(_))
        )
    }

    /// How often it was met, by all and by mirrors.
    fn met(self, front: &Front) -> (u64, u64) {
        let seen = &front.seen;
        match self {
            Store(_) => (front.store_sky().met(), front.store_sky().met_by_mirrors()),
            Registry(_) => (front.registry_sky().met(), front.registry_sky().met_by_mirrors()),
            Way(_) | Void(_) => (seen.odd.load(Ordering::Relaxed), seen.odd_for_mirrors.load(Ordering::Relaxed)),
            Cut(_) => (seen.blobs.load(Ordering::Relaxed), 0),
        }
    }
}

/// Lets one fault pass by the posts; each reads through it.
pub(crate) async fn pass(case: Case, front: &Front, posts: &mut [Post], blobs: &[String]) -> Result<()> {
    // What a client knows is known, and connections are open.
    let mut files = Vec::new();
    for post in posts.iter_mut() {
        let warm = post.next();
        post.recovers(warm).await.context("before")?;
        files.push(post.next());
        post.turn_page();
    }
    let mut outcome = meet(case, front, posts, &files, blobs).await;
    // What a mirror holds by chance it gives whatever happens elsewhere: then the fault was not met.
    for _ in 0..image::FILES {
        if !matches!(outcome, Ok(None)) {
            break;
        }
        case.1.end(front);
        files = posts.iter_mut().map(Post::next).collect();
        outcome = meet(case, front, posts, &files, blobs).await;
    }
    case.1.end(front);
    let outcome = outcome.context("during");
    for (post, file) in posts.iter().zip(&files) {
        post.recovers(*file).await.context("after")?;
    }
    println!("{}: {}", case.0, outcome?.context("the mirror never met it")?);
    Ok(())
}

/// Brings it about, and has the files read.
async fn meet(
    (_, fault, expect): Case,
    front: &Front,
    posts: &[Post],
    files: &[usize],
    blobs: &[String],
) -> Result<Option<String>> {
    let before = fault.met(front);
    fault.begin(front)?;
    let begin = Instant::now();
    let reads = futures::future::join_all(posts.iter().zip(files).map(|(post, file)| post.read_cold(*file)));
    let ends = async {
        if matches!(expect, Waits) {
            while fault.met(front) == before && begin.elapsed() < Duration::from_secs(10) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            fault.end(front);
        }
    };
    let (reads, ()) = tokio::join!(reads, ends);
    let took = begin.elapsed();
    let (all, mirrors) = fault.met(front);
    if fault.is_for_mirrors() && mirrors == before.1 {
        return Ok(None);
    }
    let mut outcome = String::new();
    for ((post, read), file) in posts.iter().zip(reads).zip(files) {
        let read = read?;
        outcome += &format!("{} {}, ", post.name, if matches!(read, Read::Right) { "right" } else { "told" });
        match (expect, read) {
            (Refused(word), Read::Failed(_)) => post.told(&[&front.host, word], blobs)?,
            (Refused(_), Read::Right) => bail!("{} read what nobody could give\n{}", post.name, post.page()),
            (Soon, Read::Right) => {
                ensure!(took < SOON, "{}: it took {took:.1?}\n{}", post.name, post.page());
                let ill = post.page().contains("a source of blobs does not answer");
                ensure!(!ill, "{}: it was held against a source:\n{}", post.name, post.page());
            }
            (Stumbles, Read::Failed(_)) => drop(post.recovers(*file).await?),
            (_, read) => expect_right(read, post)?,
        }
    }
    ensure!(all > before.0, "it was never met");
    Ok(Some(format!(
        "{outcome}in {took:.1?}; met {} times, {} of them by the mirror",
        all - before.0,
        mirrors - before.1
    )))
}
