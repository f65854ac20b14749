//! A front that makes a plain registry private: TLS, tokens from a service elsewhere, blobs from a store elsewhere.
//!
//! Three listeners with TLS, each behind a gate: the registry at `127.0.0.1`, the token service and the store of blobs
//! at `localhost`. The registry wants a bearer token for the repository and verb, and redirects readers of blobs to the
//! store with an address that expires. The store counts who shows it an `Authorization`, which is nobody's right.
//! Readers of blobs have a sky above each of the two, which a test can cloud.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, LOCATION, RANGE, TRANSFER_ENCODING, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use nydus_backend::credentials::Credential;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto};
use tokio_rustls::server::TlsStream;

use crate::authority::Authority;
use crate::gate::{Gate, Loss, Pace, Passed};
use crate::manner::{Manner, Temper};
use crate::multiplex;
use crate::oddity::Oddity;
use crate::sky::{Sky, Weather, is_mirror};

/// The user that the token service knows.
pub const USER: &str = "puller";
/// The user's password.
pub const PASSWORD: &str = "s3cret:with colon";

/// What the three listeners have seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Tokens given out.
    pub tokens: AtomicU64,
    /// Requests for tokens without the right password.
    pub strangers: AtomicU64,
    /// Requests at the registry that its tokens did not allow.
    pub refused: AtomicU64,
    /// Blobs read, or parts of them, at the store.
    pub blobs: AtomicU64,
    /// Requests at the store whose address had expired.
    pub expired: AtomicU64,
    /// Requests at the store that showed an `Authorization`.
    pub leaked: AtomicU64,
    /// Answers in another manner than the usual.
    pub odd: AtomicU64,
    /// Of these, those for mirrors.
    pub odd_for_mirrors: AtomicU64,
    /// Requests for which the registry behind could not be reached.
    pub unreachable: AtomicU64,
}

struct Shared {
    upstream: String,
    http: reqwest::Client,
    realm: String,
    store: String,
    multiplexed: OnceLock<String>,
    manner: Mutex<Manner>,
    /// Requests that a store with HTTP/2 still meets in bad temper.
    spell: AtomicU64,
    /// Addresses given out until then, in milliseconds, get this answer.
    void: Mutex<(u128, StatusCode)>,
    /// Milliseconds that tokens are good for.
    life: AtomicU64,
    /// Milliseconds that addresses are good for.
    address_life: AtomicU64,
    begin: Instant,
    tokens: Mutex<HashMap<String, Token>>,
    password: Mutex<String>,
    seen: Arc<Seen>,
    registry_sky: Sky,
    store_sky: Sky,
}

struct Token {
    end: Instant,
    /// `repository:NAME:VERBS`.
    scopes: Vec<String>,
}

/// The front; it ends with the runtime that it was started on.
#[derive(Debug)]
pub struct Front {
    /// `host:port` of the registry, as images are named.
    pub host: String,
    /// What was seen.
    pub seen: Arc<Seen>,
    gates: [Gate; 3],
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Front {
    /// Puts a front before the registry at `upstream` (`host:port`, plain HTTP).
    pub async fn start(upstream: &str, authority: &Authority) -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST, upstream, authority, Pace::default()).await
    }

    /// The same with all three listeners at `address`, each behind a link of its own.
    pub async fn start_at(address: Ipv4Addr, upstream: &str, authority: &Authority, pace: Pace) -> Result<Self> {
        // Somebody else in this process may have done so.
        drop(crypto::ring::default_provider().install_default());
        let acceptor = TlsAcceptor::from(authority.server()?);
        let (registry, tokens, store) =
            (Tls::listen(&acceptor).await?, Tls::listen(&acceptor).await?, Tls::listen(&acceptor).await?);
        let gate = |tls: &Tls| Gate::open_at(&format!("{address}:0"), &tls.address.to_string(), pace);
        let gates = [gate(&registry)?, gate(&tokens)?, gate(&store)?];
        let elsewhere = |gate: &Gate| gate.host.replace("127.0.0.1", "localhost");
        let seen = Arc::new(Seen::default());
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            http: reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build()?,
            realm: format!("https://{}/token", elsewhere(&gates[1])),
            store: format!("https://{}", elsewhere(&gates[2])),
            multiplexed: OnceLock::new(),
            manner: Mutex::default(),
            spell: AtomicU64::new(0),
            void: Mutex::new((0, StatusCode::FORBIDDEN)),
            life: AtomicU64::new(300_000),
            address_life: AtomicU64::new(300_000),
            begin: Instant::now(),
            tokens: Mutex::default(),
            password: Mutex::new(PASSWORD.to_owned()),
            seen: Arc::clone(&seen),
            registry_sky: Sky::default(),
            store_sky: Sky::default(),
        });
        let routers = [
            (registry, Router::new().fallback(registry_answer)),
            (tokens, Router::new().fallback(token_answer)),
            (store, Router::new().fallback(store_answer)),
        ];
        for (tls, router) in routers {
            let router = router.with_state(Arc::clone(&shared));
            tokio::spawn(async move { axum::serve(tls, router).await });
        }
        let mut http2 = ServerConfig::clone(&*authority.server()?);
        http2.alpn_protocols = vec![b"h2".to_vec()];
        let address = multiplex::listen(TlsAcceptor::from(Arc::new(http2)), Arc::clone(&shared)).await?;
        shared.multiplexed.get_or_init(|| format!("https://localhost:{}", address.port()));
        Ok(Self { host: gates[0].host.clone(), seen, gates, shared })
    }

    /// Sets how long tokens and the store's addresses are good for, from now on.
    pub fn set_life(&self, life: Duration) {
        self.set_lives(life, life);
    }

    /// The same, with a life of its own for each.
    pub fn set_lives(&self, tokens: Duration, addresses: Duration) {
        let millis = |life: Duration| u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
        self.shared.life.store(millis(tokens), Ordering::Relaxed);
        self.shared.address_life.store(millis(addresses), Ordering::Relaxed);
    }

    /// Returns what is above the registry, where blobs are read.
    pub fn registry_sky(&self) -> &Sky {
        &self.shared.registry_sky
    }

    /// Returns what is above the store.
    pub fn store_sky(&self) -> &Sky {
        &self.shared.store_sky
    }

    /// Does one thing in another way from now on, and all others as usual.
    pub fn behave(&self, manner: Manner) {
        let bad = matches!(manner, Manner::Multiplexed(temper) if temper != Temper::Good);
        // Each of two nodes shall meet it, and neither until its deadline.
        self.shared.spell.store(if bad { 4 } else { 0 }, Ordering::Relaxed);
        *lock(&self.shared.manner) = manner;
    }

    /// Has the store answer `status` at every address that was given out so far.
    pub fn void_addresses(&self, status: StatusCode) {
        *lock(&self.shared.void) = (self.shared.begin.elapsed().as_millis(), status);
    }

    /// Loses all connections to registry, token service and store that are open.
    ///
    /// # Errors
    ///
    /// As [`Gate::cut`].
    pub fn cut_connections(&self, loss: Loss) -> io::Result<()> {
        self.gates.iter().try_for_each(|gate| gate.cut(loss))
    }

    /// Makes every token that was given out worthless.
    pub fn revoke(&self) {
        lock(&self.shared.tokens).clear();
    }

    /// Has only this password good from now on, and no token that another one got.
    pub fn set_password(&self, password: &str) {
        *lock(&self.shared.password) = password.to_owned();
        self.revoke();
    }

    /// Takes registry, token service and store away, until [`Front::reopen`].
    pub fn shut(&self) {
        self.gates.iter().for_each(Gate::shut);
    }

    /// Brings them back.
    pub fn reopen(&self) {
        self.gates.iter().for_each(Gate::reopen);
    }

    /// Returns what has passed through all three so far, handshakes and headers included.
    pub fn passed(&self) -> Passed {
        self.gates.iter().map(Gate::passed).fold(Passed::default(), |all, gate| Passed {
            requests: all.requests + gate.requests,
            bytes: all.bytes + gate.bytes,
        })
    }

    /// Returns how many connections were refused while they were away.
    pub fn turned_away(&self) -> u64 {
        self.gates.iter().map(Gate::turned_away).sum()
    }

    /// Returns a token that is good for pulling from `repository`.
    pub fn token(&self, repository: &str) -> String {
        self.shared.new_token(vec![format!("repository:{repository}:pull")])
    }

    /// Returns docker's configuration of somebody who has logged in here.
    pub fn docker_config(&self) -> String {
        let header = self.shared.credential().basic_header().unwrap_or_default();
        let auth = header.trim_start_matches("Basic ");
        json!({"auths": {&self.host: {"auth": auth}}}).to_string()
    }
}

impl Shared {
    fn credential(&self) -> Credential {
        Credential::Basic { user: USER.into(), password: lock(&self.password).clone() }
    }

    fn life(&self) -> Duration {
        Duration::from_millis(self.life.load(Ordering::Relaxed))
    }

    fn new_token(&self, scopes: Vec<String>) -> String {
        let number = self.seen.tokens.fetch_add(1, Ordering::Relaxed);
        let text = format!("token-{number}");
        lock(&self.tokens).insert(text.clone(), Token { end: Instant::now() + self.life(), scopes });
        text
    }

    /// Whether the request's token allows `verb` on `repository`; an empty repository needs only a token.
    fn allows(&self, request: &Request, repository: &str, verb: &str) -> bool {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let manner = self.manner();
        if manner == Manner::Basic {
            return self.credential().basic_header().as_deref() == Some(header);
        }
        let tokens = lock(&self.tokens);
        let Some(token) = header.strip_prefix("Bearer ").and_then(|text| tokens.get(text)) else { return false };
        let grants = |repository: &str, verb: &str| {
            let mut scopes =
                token.scopes.iter().filter_map(|scope| scope.strip_prefix("repository:")?.rsplit_once(':'));
            scopes.any(|(name, verbs)| name == repository && verbs.split(',').any(|given| given == verb))
        };
        let granted = grants(repository, verb) && (manner != Manner::SeveralScopes || grants(SIBLING, "pull"));
        Instant::now() < token.end && (granted || repository.is_empty())
    }

    fn manner(&self) -> Manner {
        *lock(&self.manner)
    }

    fn note_odd(&self, asked: &HeaderMap) {
        self.seen.odd.fetch_add(1, Ordering::Relaxed);
        self.seen.odd_for_mirrors.fetch_add(u64::from(is_mirror(asked)), Ordering::Relaxed);
    }

    /// Sends a reader of a blob to where it is now.
    fn redirect(&self, request: &Request) -> Response {
        let path = request.uri().path();
        let now = self.begin.elapsed().as_millis();
        let until = now + u128::from(self.address_life.load(Ordering::Relaxed));
        let manner = self.manner();
        let (mut status, mut place) =
            (StatusCode::TEMPORARY_REDIRECT, format!("{}{path}?since={now}&until={until}", self.store));
        match (manner, path.strip_prefix(ELSEWHERE)) {
            (_, Some(path)) => place = format!("{}{path}?since={now}&until={until}", self.store),
            (Manner::Relative, _) => place = format!("{ELSEWHERE}{path}"),
            (Manner::Redirects(other), _) => status = other,
            (Manner::Hops(number), _) => place.push_str(&format!("&hops={number}")),
            (Manner::Multiplexed(_), _) => {
                place = place.replace(&self.store, self.multiplexed.get().map_or("", String::as_str));
            }
            _ => {}
        }
        if matches!(manner, Manner::Relative | Manner::Redirects(_)) {
            self.note_odd(request.headers());
        }
        (status, [(LOCATION, place)]).into_response()
    }

    /// Hands the request to the plain registry behind.
    async fn pass_on(&self, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let url = format!("http://{}{}", self.upstream, head.uri.path_and_query().map_or("", |path| path.as_str()));
        let mut headers = head.headers;
        headers.remove(AUTHORIZATION);
        headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
        let sent = self.http.request(head.method, url).headers(headers);
        let answer = match sent.body(reqwest::Body::wrap_stream(body.into_data_stream())).send().await {
            Ok(answer) => answer,
            Err(_) => {
                self.seen.unreachable.fetch_add(1, Ordering::Relaxed);
                return StatusCode::BAD_GATEWAY.into_response();
            }
        };
        let mut response = Response::new(Body::empty());
        *response.status_mut() = answer.status();
        *response.headers_mut() = answer.headers().clone();
        response.headers_mut().remove(TRANSFER_ENCODING);
        *response.body_mut() = Body::from_stream(answer.bytes_stream());
        response
    }
}

impl multiplex::Host for Shared {
    fn temper(&self) -> Temper {
        match self.manner() {
            Manner::Multiplexed(temper) if take_one(&self.spell) => {
                self.seen.odd.fetch_add(1, Ordering::Relaxed);
                temper
            }
            _ => Temper::Good,
        }
    }

    async fn answer(self: Arc<Self>, request: Request) -> Response {
        if self.manner() == Manner::Multiplexed(Temper::Good) {
            self.note_odd(request.headers());
        }
        store_answer(State(self), request).await
    }
}

/// Takes one of what is left, if there is one.
fn take_one(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

/// The repository that tokens have to be good for besides, under [`Manner::SeveralScopes`].
const SIBLING: &str = "team/base";
/// Where the registry has blobs for those whom it redirects to itself.
const ELSEWHERE: &str = "/elsewhere";

async fn registry_answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let verb = if reads { "pull" } else { "push" };
    let inner = path.strip_prefix(ELSEWHERE).unwrap_or(&path).strip_prefix("/v2/").unwrap_or_default();
    let repository = ["/blobs/", "/manifests/", "/tags/"].iter().find_map(|part| Some(inner.split_once(part)?.0));
    let repository = repository.unwrap_or_default();
    if !shared.allows(&request, repository, verb) {
        shared.seen.refused.fetch_add(1, Ordering::Relaxed);
        let mut challenge = format!("Bearer realm=\"{}\",service=\"shoal tests\"", shared.realm);
        if !repository.is_empty() {
            let verbs = if reads { "pull" } else { "pull,push" };
            let also = if shared.manner() == Manner::SeveralScopes {
                format!(" repository:{SIBLING}:pull")
            } else {
                String::new()
            };
            challenge.push_str(&format!(",scope=\"repository:{repository}:{verbs}{also}\""));
        }
        let body = json!({"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}).to_string();
        let mut answer = (StatusCode::UNAUTHORIZED, body).into_response();
        let challenges = match shared.manner() {
            Manner::NoChallenge => vec![],
            Manner::SeveralChallenges => vec!["Negotiate".to_owned(), challenge],
            Manner::Basic => vec!["Basic realm=\"shoal tests\"".to_owned()],
            Manner::Unquoted => vec![challenge.replace("service=\"shoal tests\"", "service=shoal").replace('"', "")],
            _ => vec![challenge],
        };
        if shared.manner().is_of_challenges() {
            shared.note_odd(request.headers());
        }
        for challenge in challenges.iter().filter_map(|text| HeaderValue::try_from(text).ok()) {
            answer.headers_mut().append(WWW_AUTHENTICATE, challenge);
        }
        return answer;
    }
    if !reads || !inner.contains("/blobs/sha256:") {
        return shared.pass_on(request).await;
    }
    let (method, asked) = (request.method().clone(), request.headers().clone());
    // An answer without a length that is a redirect would be nothing odd.
    if method == Method::HEAD && shared.registry_sky.now() == Weather::Odd(Oddity::NoLength) {
        return shared.registry_sky.through(&method, &asked, shared.pass_on(request)).await;
    }
    let answer = shared.redirect(&request);
    shared.registry_sky.through(&method, &asked, async { answer }).await
}

async fn store_answer(State(shared): State<Arc<Shared>>, mut request: Request) -> Response {
    if request.headers().contains_key(AUTHORIZATION) {
        shared.seen.leaked.fetch_add(1, Ordering::Relaxed);
        return StatusCode::BAD_REQUEST.into_response();
    }
    let query = request.uri().query().unwrap_or_default().to_owned();
    let field = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let time = |name: &str| field(name).and_then(|text| text.parse::<u128>().ok());
    let (since, until) = (time("since").unwrap_or(0), time("until").unwrap_or(0));
    let (void, status) = *lock(&shared.void);
    if until < shared.begin.elapsed().as_millis() || since <= void {
        shared.seen.expired.fetch_add(1, Ordering::Relaxed);
        shared.note_odd(request.headers());
        return (if since <= void { status } else { StatusCode::FORBIDDEN }).into_response();
    }
    if let Some(hops) = field("hops").and_then(|text| text.parse::<u32>().ok()?.checked_sub(1)) {
        shared.note_odd(request.headers());
        let place = format!("{}?since={since}&until={until}&hops={hops}", request.uri().path());
        return (StatusCode::FOUND, [(LOCATION, place)]).into_response();
    }
    shared.seen.blobs.fetch_add(1, Ordering::Relaxed);
    let (method, asked) = (request.method().clone(), request.headers().clone());
    if shared.store_sky.now() == Weather::Odd(Oddity::Whole) {
        request.headers_mut().remove(RANGE);
    }
    shared.store_sky.through(&method, &asked, shared.pass_on(request)).await
}

/// Answers GET with a query and POST with a form alike, to those who show the password.
async fn token_answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let manner = shared.manner();
    if manner.is_of_tokens() {
        shared.note_odd(&head.headers);
    }
    match manner {
        Manner::NoPosts if head.method == Method::POST => return StatusCode::METHOD_NOT_ALLOWED.into_response(),
        Manner::TokensLimited => return Weather::too_many_until_date(),
        _ => {}
    }
    let Ok(body) = axum::body::to_bytes(body, 64 << 10).await else { return StatusCode::BAD_REQUEST.into_response() };
    let form = String::from_utf8_lossy(&body);
    let form = head.uri.query().unwrap_or(&form);
    let Ok(url) = reqwest::Url::parse(&format!("http://form.invalid/?{form}")) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    let field = |name: &str| pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let by_form = field("username") == Some(USER) && field("password") == Some(lock(&shared.password).as_str());
    let shown = head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    if !by_form && shown != shared.credential().basic_header() {
        shared.seen.strangers.fetch_add(1, Ordering::Relaxed);
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let scopes = pairs.iter().filter(|(key, _)| key == "scope");
    let scopes = scopes.flat_map(|(_, value)| value.split(' ').map(str::to_owned)).collect();
    let token = shared.new_token(scopes);
    let life = shared.life().as_secs().max(1);
    let mut given = json!({"token": token, "access_token": token});
    if manner != Manner::NoExpiry {
        given["expires_in"] = json!(life);
    }
    if manner == Manner::IssuedLongAgo {
        given["issued_at"] = json!("2001-09-09T01:46:40Z");
    }
    axum::Json(given).into_response()
}

/// Connections with TLS that is already agreed on.
struct Tls {
    address: SocketAddr,
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl Tls {
    async fn listen(acceptor: &TlsAcceptor) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let acceptor = acceptor.clone();
        let (sender, ready) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((stream, from)) = listener.accept().await {
                let (acceptor, sender) = (acceptor.clone(), sender.clone());
                // Each by itself: a client that does not believe us must not keep the others waiting.
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        drop(sender.send((stream, from)).await);
                    }
                });
            }
        });
        Ok(Self { address, ready })
    }
}

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}
