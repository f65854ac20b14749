//! The credentials that kubelet pulled images with.
//!
//! kubelet hands them to the image service and to nobody else, so they are taken down where they pass by
//! ([`crate::image_service`]). They are in memory only; after a restart a mounted image has those of its configuration file, and
//! the next pull brings them again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use nydus_backend::registry::Reference;

use crate::labels::PullSecret;

/// The latest secret of each repository. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Keychain(Arc<Mutex<HashMap<(String, String), PullSecret>>>);

impl Keychain {
    /// Takes the place of an earlier secret of the same repository.
    pub fn keep(&self, image: &Reference, secret: PullSecret) {
        self.lock().insert(key(image), secret);
    }

    /// The secret that was last used for the repository of `image`.
    pub fn find(&self, image: &Reference) -> Option<PullSecret> {
        self.lock().get(&key(image)).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), PullSecret>> {
        self.0.lock().expect("no code panics while it holds this lock")
    }
}

fn key(image: &Reference) -> (String, String) {
    (image.registry().to_owned(), image.repository().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_has_its_latest_secret_however_the_image_is_written() {
        let reference = |text: &str| text.parse::<Reference>().expect("a reference");
        let secret = |text: &str| PullSecret { user: "u".into(), secret: text.into() };
        let keychain = Keychain::default();
        keychain.keep(&reference("nginx"), secret("one"));
        keychain.keep(&reference("docker.io/library/nginx:1.2"), secret("two"));
        assert_eq!(keychain.find(&reference("docker.io/library/nginx:latest")), Some(secret("two")));
        assert_eq!(keychain.find(&reference("r.example/library/nginx")), None);
        assert!(!format!("{keychain:?}").contains("two"));
    }
}
