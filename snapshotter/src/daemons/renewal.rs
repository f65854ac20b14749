//! The current pull credential of a mounted image, for a nydusd whose registry refuses the one that it has.
//!
//! nydusd asks only after a refusal, so what the image's configuration file holds is what was refused. Another credential is
//! looked for among those that kubelet pulled with, in the labels of later pulls of the same repository and in docker's
//! configuration; it goes into the file, which
//! a restarted nydusd reads, and into the answer. Once all are refused the memory of refusals ends, because a registry
//! may believe again what it did not.

use nydus_backend::registry::Reference;
use nydusd::config::Template;
use serde_json::{Value, json};

use super::{Daemons, Inner, ServeError};
use crate::configure;
use crate::credentials;
use crate::labels::{self, PullSecret};
use crate::status::SnapshotError;

impl Daemons {
    /// Returns the backend section of the image that the daemon `name` has at `mountpoint`, with a credential that was not
    /// refused if there is one; `None` if there is no such image.
    ///
    /// # Errors
    /// When records or configuration cannot be read or written.
    pub async fn backend(&self, name: String, mountpoint: String) -> Result<Option<Value>, SnapshotError> {
        let inner = self.inner.clone();
        let work = tokio::task::spawn_blocking(move || inner.backend(&name, &mountpoint));
        work.await.map_err(|error| SnapshotError::Task(error.to_string()))?
    }
}

impl Inner {
    fn backend(&self, name: &str, mountpoint: &str) -> Result<Option<Value>, SnapshotError> {
        // A daemon of one image has it at its root.
        let number = mountpoint.trim_matches('/');
        let number = if number.is_empty() { name.strip_prefix("image-").unwrap_or_default() } else { number };
        let Ok(image) = number.parse::<u64>() else { return Ok(None) };
        let instance = self.meta.instance(image)?.filter(|instance| instance.daemon == name);
        let (Some(_), Some(record)) = (instance, self.meta.by_id(image)?) else { return Ok(None) };

        let file = self.layout.image_config(name, image);
        let failed = |error: ServeError| error.status(image);
        let mut template =
            Template::load(&file).map_err(|error| failed(configure::ConfigureError::from(error).into()))?;
        let reference = labels::parse(&record.labels).ok().and_then(|layer| layer.image?.parse::<Reference>().ok());
        if template.backend_kind() == "registry"
            && let Some(reference) = reference
        {
            let refused = self.refused(image, configure::credential(&template));
            let mut pulls = self.pulls_of(&reference)?;
            // It may be of the same pull as a label, and never of an older one.
            pulls.splice(0..0, self.settings.keychain.find(&reference));
            match credentials::find_other(&pulls, reference.registry(), &refused) {
                Some(found) => {
                    configure::set_credential(&mut template, &found);
                    configure::write(&file, &template.to_json()).map_err(|error| failed(error.into()))?;
                    tracing::info!(image, %reference, "another pull credential takes the place of a refused one");
                }
                None => {
                    self.refusals().remove(&image);
                    tracing::warn!(
                        image, %reference,
                        "the registry refuses the pull credential, and no other is in the labels of later pulls or in docker's configuration: log in again, or pull the image again"
                    );
                }
            }
        }
        Ok(Some(json!({ "type": template.backend_kind(), "config": template.backend_table() })))
    }

    /// Remembers that `credential` was refused; returns all that were.
    fn refused(&self, image: u64, credential: Option<credentials::Found>) -> Vec<credentials::Found> {
        let mut all = self.refusals();
        let refused = all.entry(image).or_default();
        refused.extend(credential.filter(|found| !refused.contains(found)));
        refused.clone()
    }

    fn refusals(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<u64, Vec<credentials::Found>>> {
        self.refusals.lock().expect("no code panics while it holds this lock")
    }

    /// The secrets that came with pulls of the same repository, the latest first.
    fn pulls_of(&self, reference: &Reference) -> Result<Vec<PullSecret>, SnapshotError> {
        let mut pulls = Vec::new();
        for (_, record) in self.meta.list()? {
            let Ok(layer) = labels::parse(&record.labels) else { continue };
            let (Some(image), Some(secret)) = (layer.image, layer.secret) else { continue };
            let same = image.parse::<Reference>().is_ok_and(|other| {
                (other.registry(), other.repository()) == (reference.registry(), reference.repository())
            });
            if same {
                pulls.push((record.created, secret));
            }
        }
        pulls.sort_by_key(|(created, _)| std::cmp::Reverse(*created));
        Ok(pulls.into_iter().map(|(_, secret)| secret).collect())
    }
}
