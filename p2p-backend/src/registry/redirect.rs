//! Where a registry sends us for an answer.
//!
//! A redirect is followed by hand, because who may see the credential at the next hop is a question of its own:
//! `Authorization`, and headers meant for the registry alone, go to the same scheme, host and port and to nobody else.

use http::StatusCode;
use http::header::{AUTHORIZATION, LOCATION};
use reqwest::{Request, Response, Url};

use super::{Call, Client, RegistryError, base_url};
use crate::http::loggable;

/// Redirects followed for one request; S3 in front of a CDN needs two, so ten is a loop.
const MAX_HOPS: usize = 10;

impl Client {
    /// Follows redirects of `response` until something else comes, and returns that.
    ///
    /// `Authorization` (of `call`) goes along only as long as scheme, host and port stay the same.
    pub(crate) async fn follow(&self, call: &Call<'_>, mut response: Response) -> Result<Response, RegistryError> {
        for _ in 0..MAX_HOPS {
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let next = self.next_hop(&response)?;
            response = if next.origin() == call.url.origin() {
                self.call(&Call { url: next, body: None, ..call.clone() }).await?
            } else {
                self.send_elsewhere(call, next).await?
            };
        }
        Err(RegistryError::Redirect { url: loggable(&call.url), reason: "in a circle, or too often" })
    }

    /// Sends `call` to a host that is not ours: without proof and without the headers meant for ours.
    pub(crate) async fn send_elsewhere(&self, call: &Call<'_>, url: Url) -> Result<Response, RegistryError> {
        let mut request = Request::new(call.method.clone(), url);
        *request.headers_mut() = call.headers.clone();
        request.headers_mut().remove(AUTHORIZATION);
        self.0.traffic.count_request();
        Ok(self.0.http.send(request).await?)
    }

    fn next_hop(&self, response: &Response) -> Result<Url, RegistryError> {
        let wrong = |reason| RegistryError::Redirect { url: loggable(response.url()), reason };
        let location = response.headers().get(LOCATION).ok_or_else(|| wrong("without saying where"))?;
        let location = std::str::from_utf8(location.as_bytes()).map_err(|_| wrong("to what is no text"))?;
        let mut next = response.url().join(location).map_err(|_| wrong("to what is no URL"))?;
        if !matches!(next.scheme(), "http" | "https") || next.host().is_none() {
            return Err(wrong("to what is not HTTP"));
        }
        if let Some(scheme) = &self.0.blob_url_scheme {
            next.set_scheme(scheme).map_err(|()| wrong("to where `blob_url_scheme` cannot be used"))?;
        }
        if let Some(host) = &self.0.blob_redirected_host {
            let other = base_url(next.scheme(), host)?;
            next.set_host(other.host_str()).map_err(|_| wrong("to where `blob_redirected_host` cannot be used"))?;
            next.set_port(other.port()).map_err(|()| wrong("to where `blob_redirected_host` cannot be used"))?;
        }
        Ok(next)
    }
}

pub(crate) fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}
