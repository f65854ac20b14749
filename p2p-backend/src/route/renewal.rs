//! A new pull credential in the place of one that the registry refuses.
//!
//! A container outlives the credential that its image was pulled with. A read that the registry refuses therefore asks,
//! once, whoever knows the current one; readers that are refused meanwhile share the answer, and no two questions are less
//! than a second apart. A credential that differs is used from then on and the read goes round again; the same one again
//! means that the refusal stands.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{Instant, timeout_at};

use super::sources::Sources;
use crate::credentials::Credential;

/// How long the answer may take: behind the question may be a program that asks a cloud.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two questions.
const INTERVAL: Duration = Duration::from_secs(1);

type Answer = Result<Credential, String>;

/// Knows the current credential of one repository. Cheap to clone.
#[derive(Clone)]
pub struct CredentialSource(Arc<dyn Fn() -> BoxFuture<'static, Answer> + Send + Sync>);

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CredentialSource(..)")
    }
}

impl CredentialSource {
    /// Makes a source of a question; what it fails with goes into the log, so it must hold no secret.
    pub fn new<F>(ask: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        Self(Arc::new(move || ask().boxed()))
    }
}

/// Whom the sources of a repository ask, and when they last did.
pub(super) struct Renewal {
    source: CredentialSource,
    asked: tokio::sync::Mutex<Option<Instant>>,
}

impl Renewal {
    pub(super) fn new(source: CredentialSource) -> Self {
        Self { source, asked: tokio::sync::Mutex::default() }
    }
}

impl Sources {
    /// Returns how often the credential was replaced.
    pub(super) fn credentials_seen(&self) -> u64 {
        self.replaced.load(Ordering::Acquire)
    }

    /// Tells whether there is another credential than the one that was refused after [`Sources::credentials_seen`]
    /// returned `seen`; finds one if it can.
    pub(super) async fn has_newer_credential(&self, seen: u64, deadline: Instant) -> bool {
        let came = Instant::now();
        let Some(renewal) = &self.renewal else { return self.credentials_seen() != seen };
        let Ok(mut asked) = timeout_at(deadline, renewal.asked.lock()).await else { return false };
        if self.credentials_seen() != seen {
            return true;
        }
        if let Some(last) = *asked {
            if last >= came {
                return false;
            }
            if timeout_at(deadline, tokio::time::sleep_until(last + INTERVAL)).await.is_err() {
                return false;
            }
        }
        let answer = timeout_at(deadline.min(Instant::now() + PATIENCE), (renewal.source.0)()).await;
        *asked = Some(Instant::now());
        let place = &self.place;
        match answer {
            Ok(Ok(credential)) if credential != Credential::Anonymous && !self.uses(&credential) => {
                self.set_credential(credential);
                tracing::info!(%place, "the registry refused the pull credential, which was replaced by the current one");
                true
            }
            Ok(Ok(_)) => {
                tracing::debug!(%place, "there is no newer pull credential than the one that was refused");
                false
            }
            Ok(Err(why)) => {
                tracing::warn!(%place, why, "the pull credential was refused, and the current one could not be asked for");
                false
            }
            Err(_) => {
                tracing::warn!(%place, "the pull credential was refused, and the current one was not told in time");
                false
            }
        }
    }
}
