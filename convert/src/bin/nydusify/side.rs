//! One side of a command: an image's name, where it lies, and who we are there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nydus_backend::Credential;
use nydus_backend::credentials::docker_config;
use nydus_backend::http::{Proxy, Timeouts, Tls};
use nydus_backend::registry::{Client, ClientOptions, Reference, RegistryError, Scheme};
use nydus_convert::nydusify::layout::Layout;
use nydus_convert::nydusify::place::{Place, PlaceError};

/// The source or the target of a command.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    /// The image.
    pub(crate) name: Reference,
    /// The archive or directory that holds it, if no registry does.
    pub(crate) archive: Option<PathBuf>,
    /// Whether certificates are not checked.
    pub(crate) insecure: bool,
    /// Whether the registry speaks plain HTTP.
    pub(crate) plain_http: bool,
}

impl Side {
    /// Returns the place to read from.
    pub(crate) async fn source(&self, work_dir: &Path) -> anyhow::Result<Place> {
        let Some(path) = self.archive.clone() else { return self.repository().await };
        let (name, work_dir) = (self.name.clone(), work_dir.to_owned());
        let opening = tokio::task::spawn_blocking(move || Layout::open(&path, &name, &work_dir));
        Ok(Place::Layout(Arc::new(opening.await.context("reading the archive stopped")??)))
    }

    /// Returns the place to write to.
    pub(crate) async fn target(&self) -> anyhow::Result<Place> {
        match &self.archive {
            Some(path) => Ok(Place::Layout(Arc::new(Layout::create(path)?))),
            None => self.repository().await,
        }
    }

    async fn repository(&self) -> anyhow::Result<Place> {
        let registry = self.name.registry().to_owned();
        // Credential helpers are programs that may take their time.
        let credential = tokio::task::spawn_blocking(move || Credential::from_docker_config(&registry));
        let credential = credential.await.context("reading the docker configuration stopped")??;
        let options = ClientOptions {
            scheme: if self.plain_http { Scheme::Http } else { Scheme::Auto },
            tls: Tls { skip_verify: self.insecure, ..Tls::default() },
            timeouts: Timeouts { stall: Duration::from_secs(60), ..Timeouts::REGISTRY },
            proxy: Proxy::Environment,
            credential,
            ..ClientOptions::default()
        };
        let client = Client::for_reference(&self.name, options)
            .with_context(|| format!("preparing to speak to {}", self.name.registry()))?;
        Ok(Place::Repository { client, name: self.name.repository().to_owned() })
    }

    /// Returns the flag that names the place: `name` or that for an archive.
    pub(crate) fn flag(&self, name: &str) -> String {
        if self.archive.is_some() { format!("{name}-archive") } else { name.to_owned() }
    }

    /// Says who we were to the registry, if that is why something failed.
    pub(crate) fn explain(&self, error: &anyhow::Error) -> Option<String> {
        if self.archive.is_some() {
            return None;
        }
        let found = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<PlaceError>() {
            Some(PlaceError::Registry(error)) => Some(error.clone()),
            _ => cause.downcast_ref::<RegistryError>().cloned(),
        };
        let error = error.chain().find_map(found)?;
        if !matches!(error.status()?.as_u16(), 401 | 403) {
            return None;
        }
        let mut scope = String::new();
        if let RegistryError::Refused(refusal) = &error {
            if !refusal.url.contains(&format!("://{}/", self.name.host())) {
                return None;
            }
            let challenge = refusal.challenges.iter().filter_map(|value| value.to_str().ok()).find_map(|text| {
                let (_, rest) = text.split_once("scope=\"")?;
                rest.split('"').next()
            });
            scope = challenge.map(|scope| format!(" with the scope `{scope}`")).unwrap_or_default();
        }
        let host = self.name.registry();
        let account = match docker_config::account(host) {
            docker_config::Account::Nowhere => {
                format!(
                    "there is no docker configuration for this user, so {host} was asked anonymously{scope}; run `docker login {host}`"
                )
            }
            docker_config::Account::Unknown(path) => format!(
                "{} holds no entry for host {host}, so it was asked anonymously{scope}; run `docker login {host}`",
                path.display()
            ),
            docker_config::Account::Entry(entry, path) => format!(
                "used entry `{entry}` of {} for host {host}{scope}; check that its account may do this",
                path.display()
            ),
        };
        Some(account)
    }
}

/// Adds to an error who we were to the registries.
pub(crate) fn explained(error: anyhow::Error, sides: &[&Side]) -> anyhow::Error {
    let mut lines: Vec<String> = sides.iter().filter_map(|side| side.explain(&error)).collect();
    lines.dedup();
    match lines.is_empty() {
        true => error,
        false => error.context(lines.join("; ")),
    }
}

/// The work directory; removed at the end if it was not there before.
pub(crate) struct WorkDir {
    pub(crate) path: PathBuf,
    made: bool,
}

impl WorkDir {
    pub(crate) fn make(path: &Path) -> anyhow::Result<Self> {
        let made = !path.exists();
        std::fs::create_dir_all(path).with_context(|| format!("making the work directory {}", path.display()))?;
        Ok(Self { path: path.to_owned(), made })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.made
            && let Err(error) = std::fs::remove_dir(&self.path)
        {
            tracing::warn!(dir = %self.path.display(), %error, "the work directory was left behind");
        }
    }
}
