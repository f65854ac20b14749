//! The weather over a server of blobs: what an answer goes through before it reaches its reader.
//!
//! The weather changes while answers are under way: a slow or a silent one goes on at full speed once it clears, as with a
//! server that was overloaded or stopped.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_LENGTH, RETRY_AFTER, USER_AGENT};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;

use crate::oddity::Oddity;

/// What every answer suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weather {
    /// Nothing.
    #[default]
    Clear,
    /// It is this status instead.
    Status(StatusCode),
    /// It is 429, and asks for a pause of so many seconds.
    TooMany(u64),
    /// It ends after so many bytes of its body, with an error.
    Cut(usize),
    /// Its body comes with so many bytes a second.
    Slow(u64),
    /// It does not come.
    Silent,
    /// It is whole, well formed and a byte too short.
    Short,
    /// Some of its bytes are others.
    Flipped(To),
    /// It is 429, and asks for a pause until a date.
    TooManyUntilDate,
    /// It is answered in an odd form.
    Odd(Oddity),
}

impl Weather {
    /// A 429 that asks for a pause of two seconds by naming their end.
    pub(crate) fn too_many_until_date() -> Response {
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
        (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, date)]).into_response()
    }
}

/// Whom the weather hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// Everybody.
    All,
    /// Mirrors only: those who ask them are given what they were given.
    Mirrors,
}

/// The sky over one server.
#[derive(Debug, Default)]
pub struct Sky {
    now: watch::Sender<Weather>,
    met: AtomicU64,
    met_by_mirrors: AtomicU64,
}

impl Sky {
    /// Changes the weather.
    pub fn set(&self, weather: Weather) {
        self.now.send_replace(weather);
    }

    /// Returns what it is now.
    pub fn now(&self) -> Weather {
        *self.now.borrow()
    }

    /// Returns how many answers for mirrors have met other weather than clear.
    pub fn met_by_mirrors(&self) -> u64 {
        self.met_by_mirrors.load(Ordering::Relaxed)
    }

    /// Returns how many answers have met other weather than clear.
    pub fn met(&self) -> u64 {
        self.met.load(Ordering::Relaxed)
    }

    /// Sends an answer through it. `asked` are the headers of the request.
    pub async fn through(
        &self,
        method: &Method,
        asked: &HeaderMap,
        answer: impl Future<Output = Response>,
    ) -> Response {
        let weather = *self.now.borrow();
        let passes_by = match weather {
            Weather::Clear => true,
            Weather::Flipped(To::Mirrors) => !is_mirror(asked),
            Weather::Odd(oddity) if oddity.is_of_heads() => method != Method::HEAD,
            _ => false,
        };
        if passes_by {
            return answer.await;
        }
        self.met.fetch_add(1, Ordering::Relaxed);
        self.met_by_mirrors.fetch_add(u64::from(is_mirror(asked)), Ordering::Relaxed);
        match weather {
            Weather::Status(status) => status.into_response(),
            Weather::TooMany(seconds) => (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, seconds)]).into_response(),
            Weather::Silent => {
                let mut now = self.now.subscribe();
                // It fails when the sky is gone, and nobody waits for an answer then.
                drop(now.wait_for(|now| *now != Weather::Silent).await);
                answer.await
            }
            Weather::Clear => answer.await,
            Weather::Cut(after) => with_body(answer.await, |body| cut(body, after)),
            Weather::Flipped(_) => with_body(answer.await, |body| body.map_ok(flip)),
            Weather::Slow(pace) => {
                let now = self.now.subscribe();
                with_body(answer.await, |body| slow(body, pace, now))
            }
            Weather::TooManyUntilDate => Weather::too_many_until_date(),
            Weather::Odd(oddity) => oddity.of(answer.await),
            Weather::Short => shorten(answer.await).await,
        }
    }
}

/// Whether a mirror asks, and no nydusd.
pub(crate) fn is_mirror(asked: &HeaderMap) -> bool {
    asked.get(USER_AGENT).is_some_and(|agent| agent.as_bytes().starts_with(b"nydus-p2p/"))
}

fn with_body<S>(answer: Response, change: impl FnOnce(axum::body::BodyDataStream) -> S) -> Response
where
    S: Stream<Item = Result<Bytes, axum::Error>> + Send + 'static,
{
    let (head, body) = answer.into_parts();
    Response::from_parts(head, Body::from_stream(change(body.into_data_stream())))
}

fn cut(
    body: impl Stream<Item = Result<Bytes, axum::Error>> + Send + 'static,
    after: usize,
) -> impl Stream<Item = Result<Bytes, axum::Error>> + Send + 'static {
    let mut left = after;
    body.map(move |piece| {
        let piece = piece?;
        if left == 0 {
            return Err(axum::Error::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        }
        let piece = piece.slice(..piece.len().min(left));
        left -= piece.len();
        Ok(piece)
    })
}

fn flip(piece: Bytes) -> Bytes {
    let mut piece = piece.to_vec();
    let middle = piece.len() / 2;
    if let Some(byte) = piece.get_mut(middle) {
        *byte ^= 0x20;
    }
    piece.into()
}

fn slow(
    body: impl Stream<Item = Result<Bytes, axum::Error>> + Send + 'static,
    pace: u64,
    now: watch::Receiver<Weather>,
) -> impl Stream<Item = Result<Bytes, axum::Error>> + Send + 'static {
    body.then(move |piece| {
        let mut now = now.clone();
        async move {
            let bytes = piece.as_ref().map_or(0, |piece| piece.len() as u64);
            let pause = Duration::from_millis(bytes * 1000 / pace.max(1));
            let cleared = now.wait_for(|now| !matches!(now, Weather::Slow(_)));
            drop(tokio::time::timeout(pause, cleared).await);
            piece
        }
    })
}

/// A length that agrees with the body, and with nothing else that the answer says.
async fn shorten(answer: Response) -> Response {
    let (mut head, body) = answer.into_parts();
    let Ok(bytes) = axum::body::to_bytes(body, 256 << 20).await else { return StatusCode::BAD_GATEWAY.into_response() };
    let bytes = bytes.slice(..bytes.len().saturating_sub(1));
    head.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    let body = stream::iter([Ok::<_, Infallible>(bytes)]);
    Response::from_parts(head, Body::from_stream(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn through(sky: &Sky, agent: &'static str) -> (StatusCode, Option<Vec<u8>>) {
        let asked = HeaderMap::from_iter([(USER_AGENT, HeaderValue::from_static(agent))]);
        let answer = sky.through(&Method::GET, &asked, async { "0123456789".into_response() }).await;
        let status = answer.status();
        let body = axum::body::to_bytes(answer.into_body(), 1 << 10).await;
        (status, body.ok().map(|bytes| bytes.to_vec()))
    }

    #[tokio::test]
    async fn each_weather_is_met_and_counted() {
        let sky = Sky::default();
        let table = [
            (Weather::Clear, 200, Some(&b"0123456789"[..])),
            (Weather::Status(StatusCode::BAD_GATEWAY), 502, Some(b"")),
            (Weather::TooMany(3), 429, Some(b"")),
            (Weather::Short, 200, Some(b"012345678")),
            (Weather::Flipped(To::All), 200, Some(b"01234\x156789")),
            (Weather::Flipped(To::Mirrors), 200, Some(b"0123456789")),
            (Weather::Cut(0), 200, None),
            (Weather::TooManyUntilDate, 429, Some(b"")),
            (Weather::Odd(Oddity::Html), 200, Some(b"<html>please log in</html>")),
            (Weather::Slow(1_000), 200, Some(b"0123456789")),
            (Weather::Odd(Oddity::NoHead), 200, Some(b"0123456789")),
        ];
        for (weather, status, body) in table {
            sky.set(weather);
            assert_eq!(
                through(&sky, "reader").await,
                (StatusCode::from_u16(status).unwrap(), body.map(<[u8]>::to_vec))
            );
        }
        assert_eq!(sky.met(), 8);
        sky.set(Weather::Flipped(To::Mirrors));
        assert_ne!(through(&sky, "nydus-p2p/0").await.1.unwrap(), b"0123456789");
    }

    #[tokio::test]
    async fn a_silent_answer_comes_when_it_clears() {
        let sky = Sky::default();
        sky.set(Weather::Silent);
        let waiting = through(&sky, "reader");
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err());
        sky.set(Weather::Clear);
        assert_eq!(waiting.await.1.unwrap(), b"0123456789");
    }
}
