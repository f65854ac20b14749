//! What nydusd is told about one image.
//!
//! The operator's template says how; the image says which registry and repository. Only what the image decides is filled in,
//! everything else reaches nydusd as the operator wrote it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nydus_backend::Credential;
use nydus_backend::registry::Reference;
use nydusd::config::{ConfigError, Template};

use crate::credentials::{self, Found};
use crate::keychain::Keychain;
use crate::labels::{self, Labels, PullSecret};

/// Tells a mirror which registry a request is meant for.
const MIRROR_HEADER: &str = "X-Dragonfly-Registry";

/// Why an image has no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// The client did not say which image it is.
    #[error(
        "the label {label} is missing, so the registry of this image is not known: let the client pass it (nerdctl does; for CRI set disable_snapshot_annotations = false in containerd's configuration)",
        label = labels::IMAGE_REF
    )]
    NoReference,
    /// What the client said does not name an image.
    #[error("the image reference {text:?} cannot be understood: {why}")]
    BadReference {
        /// What it said.
        text: String,
        /// Why not.
        why: String,
    },
    /// The filled-in template is not a configuration.
    #[error("the template for nydusd cannot be filled in: {0}")]
    Template(#[from] ConfigError),
    /// The labels cannot be read.
    #[error(transparent)]
    Labels(#[from] labels::LabelError),
    /// The file cannot be written.
    #[error("writing {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A configuration for one image.
#[derive(Debug)]
pub struct Filled {
    /// The document, JSON.
    pub text: String,
    /// The image's reference, if known.
    pub image: Option<String>,
}

/// Fills `template` in for the image of bootstrap snapshot `image`. `earlier` is the file of an earlier mount, whose credentials
/// are used when none are found now: after a reboot kubelet does not pull again.
///
/// # Errors
/// When the image's registry is not known, or the result is not a configuration.
pub fn fill(
    mut template: Template,
    image: u64,
    labels: &Labels,
    work_dir: &Path,
    skip_verify: bool,
    keychain: &Keychain,
    earlier: Option<&Path>,
) -> Result<Filled, ConfigureError> {
    let layer = labels::parse(labels)?;
    template.set_id(&format!("/{image}"));
    template.set_work_dir(work_dir);
    // Without a word about it nydusd would fetch whole images; the programs that write templates rely on this.
    template.default_prefetch_all(false);
    if template.backend_kind() == "registry" {
        let text = layer.image.clone().ok_or(ConfigureError::NoReference)?;
        let bad = |why: String| ConfigureError::BadReference { text: text.clone(), why };
        let reference: Reference = text.parse().map_err(|error| bad(format!("{error}")))?;
        let host = match reference.registry() {
            "docker.io" => "index.docker.io",
            other => other,
        };
        template.set_backend("host", host);
        template.set_backend("repo", reference.repository());
        if skip_verify {
            template.set_backend("skip_verify", true);
        }
        let scheme = template.backend("scheme").and_then(|scheme| scheme.as_str()).filter(|scheme| !scheme.is_empty());
        let registry = format!("{}://{host}", scheme.unwrap_or("https"));
        template.set_mirror_header(MIRROR_HEADER, &registry, false);
        let secret = layer.secret.clone().or_else(|| keychain.find(&reference));
        authenticate(&mut template, secret.as_ref(), reference.registry(), earlier);
    }
    template.config()?;
    Ok(Filled { text: template.to_json(), image: layer.image })
}

fn authenticate(template: &mut Template, secret: Option<&PullSecret>, registry: &str, earlier: Option<&Path>) {
    match credentials::find(secret, registry) {
        Some(found) => set_credential(template, &found),
        None => {
            let Some(before) = earlier.and_then(|path| Template::load(path).ok()) else { return };
            for key in ["auth", "registry_token"] {
                if template.backend(key).is_none()
                    && let Some(value) = before.backend(key)
                {
                    template.set_backend(key, value.clone());
                }
            }
        }
    }
}

/// Writes a credential into the backend section.
pub fn set_credential(template: &mut Template, found: &Found) {
    match found {
        Found::Basic { user, password } => {
            template.remove_backend("registry_token");
            template.set_backend("auth", STANDARD.encode(format!("{user}:{password}")));
        }
        Found::Token(token) => {
            template.remove_backend("auth");
            template.set_backend("registry_token", token.as_str());
        }
    }
}

/// Reads the credential of the backend section.
pub fn credential(template: &Template) -> Option<Found> {
    let text = |key| template.backend(key)?.as_str().filter(|text| !text.is_empty());
    match (text("auth").map(Credential::from_auth), text("registry_token")) {
        (Some(Ok(Credential::Basic { user, password })), _) => Some(Found::Basic { user, password }),
        (_, token) => token.map(|token| Found::Token(token.to_owned())),
    }
}

/// Puts a configuration in its place, readable by its owner only.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<(), ConfigureError> {
    let failed = |source| ConfigureError::Io { path: path.to_path_buf(), source };
    let directory = path.parent().expect("a file of ours has a directory");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    // Renamed into place: a kill leaves the old one or the new one.
    let fresh = path.with_extension("json.new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    fs::rename(&fresh, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::{Value, json};

    use super::*;

    const GUIDE: &str = r#"{"device":{"backend":{"type":"registry","config":{"mirrors":[{"host":"http://127.0.0.1:4001","auth_through":false,"headers":{"X-Dragonfly-Registry":"https://index.docker.io"},"ping_url":"http://127.0.0.1:4003/healthy"},{"host":"http://other:1"}],"scheme":"https","skip_verify":true,"timeout":10,"connect_timeout":10,"retry_limit":2,"invented":{"x":[1]}}},"cache":{"type":"blobcache","config":{"work_dir":"/var/lib/nydus/cache/"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true,"fs_prefetch":{"enable":true,"threads_count":10,"merging_size":131072,"bandwidth_rate":1048576}}"#;

    fn labels(image: &str, secret: Option<(&str, &str)>) -> Labels {
        let mut labels: Labels = [(labels::IMAGE_REF.to_owned(), image.to_owned())].into();
        if let Some((user, secret)) = secret {
            labels.insert(labels::PULL_USER.to_owned(), user.to_owned());
            labels.insert(labels::PULL_SECRET.to_owned(), secret.to_owned());
        }
        labels
    }

    fn filled(template: &str, labels: &Labels, earlier: Option<&Path>) -> Value {
        let template = Template::parse(template).expect("a template");
        let filled =
            fill(template, 7, labels, Path::new("/cache"), false, &Keychain::default(), earlier).expect("filled");
        serde_json::from_str(&filled.text).expect("JSON")
    }

    #[test]
    fn the_guides_template_gets_what_the_image_says_and_keeps_the_rest() {
        let config = filled(GUIDE, &labels("reg.example:5000/a/b:1", Some(("me", "pw"))), None);
        let mut want: Value = serde_json::from_str(GUIDE).expect("JSON");
        want["device"]["id"] = json!("/7");
        want["device"]["cache"]["config"]["work_dir"] = json!("/cache");
        want["fs_prefetch"]["prefetch_all"] = json!(false);
        let backend = &mut want["device"]["backend"]["config"];
        backend["host"] = json!("reg.example:5000");
        backend["repo"] = json!("a/b");
        backend["auth"] = json!("bWU6cHc=");
        for mirror in backend["mirrors"].as_array_mut().expect("a list") {
            mirror["headers"]["X-Dragonfly-Registry"] = json!("https://reg.example:5000");
        }
        assert_eq!(config, want);
    }

    #[test]
    fn the_hub_is_asked_at_its_index_and_the_scheme_is_the_templates() {
        let http = GUIDE.replace(r#""scheme":"https""#, r#""scheme":"http""#);
        let config = filled(&http, &labels("docker.io/library/busybox:1", Some(("", "token"))), None);
        let backend = &config["device"]["backend"]["config"];
        assert_eq!((&backend["host"], &backend["repo"]), (&json!("index.docker.io"), &json!("library/busybox")));
        assert_eq!(backend["mirrors"][0]["headers"]["X-Dragonfly-Registry"], "http://index.docker.io");
        assert_eq!((backend.get("auth"), &backend["registry_token"]), (None, &json!("token")));
    }

    #[test]
    fn an_image_without_a_reference_needs_a_backend_that_does_not_ask() {
        let template = Template::parse(GUIDE).expect("a template");
        let error = fill(template, 7, &Labels::new(), Path::new("/cache"), false, &Keychain::default(), None)
            .expect_err("no registry is known");
        assert!(error.to_string().contains("disable_snapshot_annotations"), "{error}");
        let local = r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/blobs"}},"cache":{"type":"blobcache","config":{}}},"mode":"direct"}"#;
        assert_eq!(filled(local, &Labels::new(), None)["device"]["backend"]["config"], json!({"dir": "/blobs"}));
    }

    #[test]
    fn after_a_reboot_the_credentials_of_the_earlier_mount_are_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("deep/config.json");
        let template = Template::parse(GUIDE).expect("a template");
        let pulled = labels("nowhere.invalid/a:1", Some(("me", "pw")));
        let first = fill(template, 7, &pulled, Path::new("/cache"), false, &Keychain::default(), None).expect("filled");
        write(&path, &first.text).expect("written");
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o7777, 0o600);
        let again = filled(GUIDE, &labels("nowhere.invalid/a:1", None), Some(&path));
        assert_eq!(again["device"]["backend"]["config"]["auth"], "bWU6cHc=");
    }
}
