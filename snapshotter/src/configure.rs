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
use nydus_backend::registry::Reference;
use nydusd::config::{ConfigError, Template};

use crate::credentials;
use crate::labels::{self, Labels};

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
        authenticate(&mut template, &layer, reference.registry(), earlier);
    }
    template.config()?;
    Ok(Filled { text: template.to_json(), image: layer.image })
}

fn authenticate(template: &mut Template, layer: &labels::Layer, registry: &str, earlier: Option<&Path>) {
    match credentials::find(layer.secret.as_ref(), registry) {
        Some(credentials::Found::Basic { user, password }) => {
            template.remove_backend("registry_token");
            template.set_backend("auth", STANDARD.encode(format!("{user}:{password}")));
        }
        Some(credentials::Found::Token(token)) => {
            template.remove_backend("auth");
            template.set_backend("registry_token", token);
        }
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
