//! Tokens: who we are, as a registry's token service certifies it.
//!
//! A token is good for some scopes and some minutes. One that is wanted by many readers at once is fetched
//! once; those who waited share the outcome, also a failure, because asking again for each would queue
//! failures one after another. Failures are not kept beyond that.
//!
//! The life of a token is counted from its arrival on our own monotonic clock. `issued_at` is ignored: the
//! clocks of registries are wrong more often than a token is old when it comes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION};
use http::{HeaderValue, Method, StatusCode};
use reqwest::{Request, Response, Url};
use tokio::time::Instant;

use super::head::retry_after;
use super::{Refusal, RegistryError, Traffic, lock, secret};
use crate::credentials::Credential;
use crate::http::{Http, HttpError, is_loopback, loggable};

/// What the token service is told about us; some count their users by it.
const CLIENT_ID: &str = "shoal-registry-client";
/// Life of a token that does not tell: the protocol's default.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// Nobody is believed beyond this.
const LONGEST_LIFE: Duration = Duration::from_secs(86_400);
/// A token is renewed this long before it ends, or a quarter of its life before if that is shorter.
const MARGIN: Duration = Duration::from_secs(20);
/// Tokens are a few kilobytes; some with many groups are larger.
const MAX_ANSWER: usize = 1 << 20;

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    pub(super) realm: Url,
    pub(super) service: Option<String>,
    /// Sorted.
    pub(super) scopes: Vec<String>,
    /// Whether the challenge came over TLS: then the credential may not travel without.
    pub(super) from_tls: bool,
}

#[derive(Default)]
struct Slot {
    held: tokio::sync::Mutex<Held>,
}

#[derive(Default)]
struct Held {
    token: Option<Token>,
    failed: Option<(Instant, RegistryError)>,
}

struct Token {
    text: String,
    renew: Instant,
    end: Instant,
}

/// Who we are for one registry and its mirrors: the credential, and the tokens got with it.
pub(super) struct Identity {
    http: Http,
    traffic: Arc<Traffic>,
    /// The registry itself is reached over TLS, even where a mirror relays its challenges without.
    tls_only: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    credential: Credential,
    /// The static token was refused.
    static_refused: bool,
    slots: HashMap<TokenKey, Arc<Slot>>,
    /// Token services that do not take POST.
    get_only: HashSet<Url>,
}

impl Identity {
    pub(super) fn new(http: Http, credential: Credential, traffic: Arc<Traffic>, tls_only: bool) -> Self {
        Self { http, traffic, tls_only, state: Mutex::new(State { credential, ..State::default() }) }
    }

    pub(super) fn replace(&self, credential: Credential) {
        *lock(&self.state) = State { credential, ..State::default() };
    }

    pub(super) fn is(&self, credential: &Credential) -> bool {
        lock(&self.state).credential == *credential
    }

    pub(super) fn basic(&self) -> Option<HeaderValue> {
        let text = lock(&self.state).credential.basic_header()?;
        secret(&text).ok()
    }

    /// Returns the configured access token, until it is refused.
    pub(super) fn static_bearer(&self) -> Option<HeaderValue> {
        match &*lock(&self.state) {
            State { credential: Credential::Bearer(token), static_refused: false, .. } => {
                secret(&format!("Bearer {}", token.trim())).ok()
            }
            _ => None,
        }
    }

    pub(super) fn refuse_static(&self, value: &HeaderValue) {
        if self.static_bearer().as_ref() == Some(value) {
            lock(&self.state).static_refused = true;
        }
    }

    /// Forgets a token that a registry refused. One that took its place meanwhile stays.
    pub(super) fn refuse(&self, key: &TokenKey, text: &str) {
        let slot = lock(&self.state).slots.get(key).cloned();
        // If it is being renewed right now there is nothing to forget.
        if let Some(mut held) = slot.as_ref().and_then(|slot| slot.held.try_lock().ok())
            && held.token.as_ref().is_some_and(|token| token.text == text)
        {
            held.token = None;
        }
    }

    /// Returns a token for `key`, from memory or from the token service.
    pub(super) async fn token(&self, key: &TokenKey) -> Result<String, RegistryError> {
        let came = Instant::now();
        let slot = Arc::clone(lock(&self.state).slots.entry(key.clone()).or_default());
        let mut held = slot.held.lock().await;
        let now = Instant::now();
        if let Some(token) = held.token.as_ref().filter(|token| now < token.renew) {
            return Ok(token.text.clone());
        }
        if let Some((when, error)) = &held.failed
            && *when >= came
        {
            return Err(error.clone());
        }
        match self.fetch(key).await {
            Ok(token) => {
                let text = token.text.clone();
                *held = Held { token: Some(token), failed: None };
                Ok(text)
            }
            // It was to be renewed early, but is still good.
            Err(error) if held.token.as_ref().is_some_and(|token| Instant::now() < token.end) => {
                tracing::debug!(%error, "a token could not be renewed yet");
                Ok(held.token.as_ref().map(|token| token.text.clone()).unwrap_or_default())
            }
            Err(error) => {
                let error = RegistryError::Token { realm: loggable(&key.realm), source: Box::new(error) };
                *held = Held { token: None, failed: Some((Instant::now(), error.clone())) };
                Err(error)
            }
        }
    }

    async fn fetch(&self, key: &TokenKey) -> Result<Token, RegistryError> {
        let (credential, get_only) = {
            let state = lock(&self.state);
            (state.credential.clone(), state.get_only.contains(&key.realm))
        };
        let shows = matches!(credential, Credential::Basic { .. } | Credential::Identity(_));
        if shows && (key.from_tls || self.tls_only) && key.realm.scheme() != "https" && !is_loopback(&key.realm) {
            return Err(RegistryError::WouldLeak { to: loggable(&key.realm) });
        }
        if let Credential::Identity(_) = credential {
            return self.post(key, &credential).await;
        }
        let can_post = shows && !get_only;
        if !can_post {
            return match self.get(key, &credential).await {
                Err(error) if error.status() == Some(StatusCode::METHOD_NOT_ALLOWED) => {
                    self.post(key, &credential).await
                }
                outcome => outcome,
            };
        }
        let error = match self.post(key, &credential).await {
            Ok(token) => return Ok(token),
            Err(error) => error,
        };
        // Services without POST say so in every way: 404, 405, 401, 400, 500, a page, a closed connection.
        let unreachable = matches!(error, RegistryError::Http(HttpError::Connect { .. } | HttpError::Silent { .. }));
        if unreachable || error.status() == Some(StatusCode::TOO_MANY_REQUESTS) {
            return Err(error);
        }
        let token = self.get(key, &credential).await?;
        if error.status().is_some_and(|status| status.is_client_error()) {
            lock(&self.state).get_only.insert(key.realm.clone());
        }
        Ok(token)
    }

    async fn post(&self, key: &TokenKey, credential: &Credential) -> Result<Token, RegistryError> {
        let form = form(key, credential);
        let mut request = Request::new(Method::POST, key.realm.clone());
        let headers = request.headers_mut();
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        // Some services look only at the header, and would give an anonymous token for the form alone.
        if let Some(basic) = credential.basic_header() {
            headers.insert(AUTHORIZATION, secret(&basic)?);
        }
        *request.body_mut() = Some(form.into());
        self.traffic.count_request();
        let response = self.http.send(request).await?;
        self.read(Method::POST, response).await
    }

    async fn get(&self, key: &TokenKey, credential: &Credential) -> Result<Token, RegistryError> {
        let mut url = key.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &key.service {
                query.append_pair("service", service);
            }
            for scope in &key.scopes {
                query.append_pair("scope", scope);
            }
            query.append_pair("client_id", CLIENT_ID);
            if let Credential::Basic { user, .. } = credential {
                query.append_pair("account", user);
            }
        }
        let mut request = Request::new(Method::GET, url);
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
        if let Some(basic) = credential.basic_header() {
            request.headers_mut().insert(AUTHORIZATION, secret(&basic)?);
        }
        self.traffic.count_request();
        let response = self.http.send(request).await?;
        self.read(Method::GET, response).await
    }

    async fn read(&self, method: Method, response: Response) -> Result<Token, RegistryError> {
        let (url, status) = (loggable(response.url()), response.status());
        let wait = retry_after(response.headers(), std::time::SystemTime::now());
        let (body, whole) = self.http.body(response).beginning(MAX_ANSWER).await;
        if !status.is_success() {
            return Err(RegistryError::Refused(Box::new(Refusal {
                method,
                url,
                status,
                retry_after: wait,
                challenges: Vec::new(),
                by_mirror: false,
                body: body.slice(..body.len().min(super::MAX_EXPLANATION)),
            })));
        }
        let form = |reason: &str| RegistryError::Form { url: url.clone(), reason: reason.to_owned() };
        if !whole {
            return Err(form("with something too long or cut short for a token"));
        }
        parse(&body, Instant::now()).ok_or_else(|| form("with JSON that holds no token, or no JSON"))
    }
}

/// Returns the body of a POST to a token service.
fn form(key: &TokenKey, credential: &Credential) -> String {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("client_id", CLIENT_ID);
    if let Some(service) = &key.service {
        form.append_pair("service", service);
    }
    if !key.scopes.is_empty() {
        form.append_pair("scope", &key.scopes.join(" "));
    }
    match credential {
        Credential::Basic { user, password } => {
            form.append_pair("grant_type", "password").append_pair("username", user).append_pair("password", password);
        }
        Credential::Identity(token) => {
            form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token);
        }
        Credential::Anonymous | Credential::Bearer(_) => {}
    }
    form.finish()
}

fn parse(body: &[u8], now: Instant) -> Option<Token> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    let text = ["token", "access_token"]
        .into_iter()
        .filter_map(|name| answer.get(name)?.as_str())
        .find(|text| !text.is_empty())?
        .to_owned();
    // Numbers, numbers with fractions, and numbers in quotes are all seen in the wild.
    let life = answer.get("expires_in").and_then(|life| match life {
        serde_json::Value::String(text) => text.trim().parse::<f64>().ok(),
        other => other.as_f64(),
    });
    let life = match life {
        Some(seconds) if seconds >= 1.0 => Duration::from_secs_f64(seconds.min(LONGEST_LIFE.as_secs_f64())),
        _ => DEFAULT_LIFE,
    };
    Some(Token { text, renew: now + (life - MARGIN.min(life / 4)), end: now + life })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_in_every_form_that_services_send() {
        let now = Instant::now();
        for (body, expected) in [
            (r#"{"token":"t","expires_in":300,"issued_at":"1999-01-01T00:00:00Z"}"#, Some(("t", 280, 300))),
            (r#"{"access_token":"a"}"#, Some(("a", 45, 60))),
            (r#"{"token":"","access_token":"a","expires_in":"40"}"#, Some(("a", 30, 40))),
            (r#"{"token":"t","expires_in":0}"#, Some(("t", 45, 60))),
            (r#"{"token":"t","expires_in":-5}"#, Some(("t", 45, 60))),
            (r#"{"token":"t","expires_in":1e300}"#, Some(("t", 86_380, 86_400))),
            (r#"{"token":7}"#, None),
            ("<html>", None),
        ] {
            let token = parse(body.as_bytes(), now);
            let found = token
                .as_ref()
                .map(|token| (token.text.as_str(), (token.renew - now).as_secs(), (token.end - now).as_secs()));
            assert_eq!(found, expected, "{body}");
        }
    }
}
