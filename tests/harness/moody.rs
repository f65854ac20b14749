//! A registry with moods: a front that lets a request through, refuses it, or changes what comes back.
//!
//! The test decides for each request by a function, which is asked in the order in which requests come.

use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{LOCATION, TRANSFER_ENCODING};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use tokio::net::TcpListener;

/// What is done with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mood {
    /// It is passed on.
    Fair,
    /// It is answered with this status and header, and its body is not read.
    Refuse(StatusCode, Option<(&'static str, String)>),
    /// It is passed on without its query, so that a mount becomes an upload.
    Forgetful,
    /// It is passed on, and one bit of the answer's body is turned.
    Damaging,
}

/// A request as the test sees it.
#[derive(Debug)]
pub struct Asked<'r> {
    /// The verb.
    pub method: &'r Method,
    /// Where it goes, with its query.
    pub uri: &'r Uri,
    /// Bytes of its body, if it tells.
    pub length: u64,
}

type Decide = dyn Fn(&Asked<'_>) -> Mood + Send + Sync;

/// The front; it ends with the runtime that it was started on.
#[derive(Debug)]
pub struct Moody {
    /// `host:port`, plain HTTP.
    pub host: String,
}

struct Inner {
    upstream: String,
    http: reqwest::Client,
    decide: Box<Decide>,
}

impl Moody {
    /// Puts a front before the registry at `upstream` (`host:port`, plain HTTP). It says where uploads go in relative
    /// terms, as some registries do.
    pub async fn start(upstream: &str, decide: impl Fn(&Asked<'_>) -> Mood + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let host = listener.local_addr()?.to_string();
        let http = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build()?;
        let inner = Arc::new(Inner { upstream: upstream.to_owned(), http, decide: Box::new(decide) });
        let router = Router::new().fallback(answer).with_state(inner);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { host })
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let length = request.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
    let asked = Asked { method: request.method(), uri: request.uri(), length: length.unwrap_or(0) };
    let mood = (inner.decide)(&asked);
    match &mood {
        Mood::Refuse(status, header) => {
            let mut response = status.into_response();
            if let Some((name, value)) = header {
                response.headers_mut().insert(*name, HeaderValue::try_from(value).expect("the test gives a header"));
            }
            response
        }
        Mood::Fair | Mood::Forgetful | Mood::Damaging => pass_on(&inner.http, &inner.upstream, request, &mood)
            .await
            .unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response()),
    }
}

/// Passes a request on to `upstream`, and its answer back.
pub(crate) async fn pass_on(http: &reqwest::Client, upstream: &str, request: Request, mood: &Mood) -> Result<Response> {
    let (head, body) = request.into_parts();
    let path = match mood {
        Mood::Forgetful => head.uri.path(),
        _ => head.uri.path_and_query().map_or("", |path| path.as_str()),
    };
    let sent = http.request(head.method, format!("http://{upstream}{path}")).headers(head.headers);
    let answer = sent.body(reqwest::Body::wrap_stream(body.into_data_stream())).send().await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = answer.status();
    *response.headers_mut() = answer.headers().clone();
    response.headers_mut().remove(TRANSFER_ENCODING);
    if let Some(place) = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()) {
        let path = place.split_once("://").and_then(|(_, rest)| rest.split_once('/'));
        let relative = path.map_or_else(|| place.to_owned(), |(_, path)| format!("/{path}"));
        response.headers_mut().insert(LOCATION, HeaderValue::try_from(relative)?);
    }
    *response.body_mut() = Body::from_stream(answer.bytes_stream());
    if *mood == Mood::Damaging {
        let mut bytes = to_bytes(std::mem::take(response.body_mut()), usize::MAX).await?.to_vec();
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.get_mut(middle) {
            *byte ^= 1;
        }
        *response.body_mut() = Body::from(bytes);
    }
    Ok(response)
}
