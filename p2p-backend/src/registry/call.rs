//! One request, with what proves that it may be made.
//!
//! A request goes with the header that worked last time for this repository; on a 401 the challenge is answered and the
//! request repeated, at most twice. A request in somebody else's name goes as it is, and a 401 is for them.

use std::time::SystemTime;

use bytes::Bytes;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Request, Response, Url};

use super::head::retry_after;
use super::token::TokenKey;
use super::{Challenge, Client, MAX_REMEMBERED, Refusal, RegistryError, challenges, lock, secret};
use crate::http::loggable;

/// Bytes of an error's body that are kept to explain it.
pub(super) const MAX_EXPLANATION: usize = 2048;

/// What a request wants to do with a repository; decides the scope of the token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
    /// Push, with blobs taken from this other repository.
    Mount(String),
}

impl Access {
    fn scopes(&self, repository: &str) -> Vec<String> {
        match self {
            Self::Pull => vec![format!("repository:{repository}:pull")],
            Self::Push => vec![format!("repository:{repository}:pull,push")],
            Self::Mount(from) => {
                vec![format!("repository:{repository}:pull,push"), format!("repository:{from}:pull")]
            }
        }
    }
}

/// One request before it is authorised.
#[derive(Clone)]
pub(crate) struct Call<'c> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) repository: &'c str,
    pub(crate) access: Access,
    pub(crate) headers: HeaderMap,
    /// Further headers, for this host alone.
    pub(crate) own_headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    pub(crate) who: Who,
}

/// In whose name a request is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Who {
    /// Ours: challenges are answered with our credential.
    Ours,
    /// Somebody else's, with this proof or none. Ours is neither used nor shown, and a 401 is for them.
    Caller(Option<HeaderValue>),
}

impl<'c> Call<'c> {
    pub(crate) fn new(method: Method, url: Url, repository: &'c str, access: Access) -> Self {
        Self {
            method,
            url,
            repository,
            access,
            headers: HeaderMap::new(),
            own_headers: HeaderMap::new(),
            body: None,
            who: Who::Ours,
        }
    }
}

/// What a registry wanted last time.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    Basic,
    Token(TokenKey),
}

/// Where a proof came from, so that a refusal can be attributed.
pub(super) enum Proof {
    None,
    Given(Option<HeaderValue>),
    Basic(HeaderValue),
    Token(HeaderValue, TokenKey, String),
    Static(HeaderValue),
}

impl Proof {
    pub(super) fn header(&self) -> Option<&HeaderValue> {
        match self {
            Self::None => None,
            Self::Given(value) => value.as_ref(),
            Self::Basic(value) | Self::Token(value, ..) | Self::Static(value) => Some(value),
        }
    }
}

impl Client {
    /// Sends a request with what proves that we may, and answers challenges. Returns any answer but a 401.
    pub(crate) async fn call(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let (mut bare, mut renewed) = (false, false);
        for last in [false, false, true] {
            let proof = if bare { Proof::None } else { self.proof(call).await? };
            let response = self.send_once(call, proof.header()).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            let offered = challenges(response.headers());
            let key = (call.repository.to_owned(), call.access.clone());
            // Forget what was refused, whether or not there is another attempt.
            match &proof {
                Proof::None | Proof::Given(_) | Proof::Basic(_) => {}
                Proof::Static(value) => self.0.identity.refuse_static(value),
                Proof::Token(_, key, text) => self.0.identity.refuse(key, text),
            }
            // The same password a second time would only bring us closer to a locked account.
            let hopeless = last || matches!(proof, Proof::Given(_) | Proof::Basic(_));
            if hopeless {
                if !matches!(proof, Proof::Given(_)) {
                    lock(&self.0.wanted).remove(&key);
                }
                return Err(self.refusal(&call.method, response).await);
            }
            match self.choose(&offered, call) {
                Some(wanted) => {
                    let mut all = lock(&self.0.wanted);
                    if all.len() >= MAX_REMEMBERED {
                        all.clear();
                    }
                    all.insert(key, wanted);
                    bare = false;
                }
                // Some registries refuse a stale token without saying what they want: what they wanted before, most likely.
                None if matches!(proof, Proof::Token(..)) && !renewed => renewed = true,
                // If not that, they may tell those who come with empty hands.
                None if proof.header().is_some() => {
                    lock(&self.0.wanted).remove(&key);
                    bare = true;
                }
                None => return Err(self.refusal(&call.method, response).await),
            }
        }
        unreachable!("the third attempt returns in every branch")
    }

    async fn send_once(&self, call: &Call<'_>, proof: Option<&HeaderValue>) -> Result<Response, RegistryError> {
        let mut request = Request::new(call.method.clone(), call.url.clone());
        let headers = request.headers_mut();
        headers.extend(self.0.headers.clone());
        headers.extend(call.own_headers.clone());
        headers.extend(call.headers.clone());
        if let Some(proof) = proof {
            headers.insert(AUTHORIZATION, proof.clone());
        }
        *request.body_mut() = call.body.clone().map(Into::into);
        self.0.traffic.count_request();
        Ok(self.http().send(request).await?)
    }

    pub(super) async fn proof(&self, call: &Call<'_>) -> Result<Proof, RegistryError> {
        if let Who::Caller(theirs) = &call.who {
            return Ok(Proof::Given(theirs.clone()));
        }
        if let Some(value) = self.0.identity.static_bearer() {
            return Ok(Proof::Static(value));
        }
        let wanted = lock(&self.0.wanted).get(&(call.repository.to_owned(), call.access.clone())).cloned();
        match wanted {
            None => Ok(Proof::None),
            Some(Wanted::Basic) => Ok(self.0.identity.basic().map_or(Proof::None, Proof::Basic)),
            Some(Wanted::Token(key)) => {
                let text = self.0.identity.token(&key).await?;
                let value = secret(&format!("Bearer {text}"))?;
                Ok(Proof::Token(value, key, text))
            }
        }
    }

    /// Picks a challenge that we can answer; tokens first, for they show the password to fewer hosts.
    fn choose(&self, offered: &[Challenge], call: &Call<'_>) -> Option<Wanted> {
        let bearer = offered.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => {
                let realm = call.url.join(realm).ok()?;
                let own = if call.repository.is_empty() { Vec::new() } else { call.access.scopes(call.repository) };
                let mut scopes: Vec<String> =
                    scope.iter().flat_map(|text| text.split_ascii_whitespace()).map(str::to_owned).collect();
                // A pull is described well by the registry; what a push will need next, it cannot know.
                if scopes.is_empty() || call.access != Access::Pull {
                    scopes.extend(own);
                }
                scopes.sort_unstable();
                scopes.dedup();
                Some(Wanted::Token(TokenKey {
                    realm,
                    service: service.clone(),
                    scopes,
                    from_tls: call.url.scheme() == "https",
                }))
            }
            Challenge::Basic => None,
        });
        bearer.or_else(|| {
            let basic = offered.contains(&Challenge::Basic) && self.0.identity.basic().is_some();
            basic.then_some(Wanted::Basic)
        })
    }

    /// Turns an answer that is not wanted into an error.
    pub(crate) async fn refusal(&self, method: &Method, response: Response) -> RegistryError {
        let url = loggable(response.url());
        let status = response.status();
        let headers = response.headers();
        let challenges = headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect();
        let retry_after = retry_after(headers, SystemTime::now());
        let by_mirror = headers.get("x-dragonfly-error-type").is_some_and(|value| value == "proxy");
        let (body, _) = match *method {
            Method::HEAD => (Bytes::new(), true),
            _ => self.http().body(response).beginning(MAX_EXPLANATION).await,
        };
        RegistryError::Refused(Box::new(Refusal {
            method: method.clone(),
            url,
            status,
            retry_after,
            challenges,
            by_mirror,
            body,
        }))
    }

    /// Passes the answer on if its status is one of `wanted`.
    pub(crate) async fn expect(
        &self,
        method: &Method,
        response: Response,
        wanted: &[StatusCode],
    ) -> Result<Response, RegistryError> {
        if wanted.contains(&response.status()) { Ok(response) } else { Err(self.refusal(method, response).await) }
    }
}
