//! Mounting and unmounting one image.
//!
//! The intent is recorded, nydusd mounts, the image is recorded as live: in this order, so that the records name everything
//! that nydusd may have. Whoever calls these has the daemon's turn, or takes it here.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nydusd::api::types::{DaemonState, MountRequest};

use super::{Daemon, Inner, Owner, ServeError, Serves, spawn};
use crate::bootstrap;
use crate::configure;
use crate::meta::{Instance, Record, Stage};

/// How long the root directory of a mount may take to answer.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

impl Inner {
    /// Mounts one image, starting its daemon if need be.
    pub(super) async fn mount(self: &Arc<Self>, record: &Record) -> Result<Owner, ServeError> {
        let image = record.id;
        let daemon = self.daemon(&self.name_for(image));
        let _turn = daemon.turn.lock().await;
        if let Some(owner) = daemon.serving(image) {
            return Ok(owner);
        }
        let prepared = self.prepare(&daemon, record, Stage::Intended).await?;
        if !daemon.alive() {
            self.start(&daemon).await?;
            if daemon.serves == Serves::All {
                self.mount_recorded(&daemon, Some(image)).await;
            }
        }
        self.finish(&daemon, prepared).await
    }

    /// Writes the configuration of an image and records that it is to be mounted.
    pub(super) async fn prepare(&self, daemon: &Daemon, record: &Record, stage: Stage) -> Result<Prepared, ServeError> {
        let image = record.id;
        let (upper, labels) = (self.layout.upper(image), record.labels.clone());
        let (template, settings) = (self.template.clone(), self.settings.clone());
        let file = self.layout.image_config(&daemon.name, image);
        let meta = self.meta.clone();
        let daemon = daemon.name.clone();
        let work = tokio::task::spawn_blocking(move || -> Result<Prepared, ServeError> {
            let found = bootstrap::find(&upper)?;
            let filled = configure::fill(
                template,
                image,
                &labels,
                &settings.work_dir,
                settings.skip_verify,
                &settings.keychain,
                Some(&file),
            )?;
            configure::write(&file, &filled.text)?;
            let instance = Instance { id: image, daemon, image: filled.image, blobs: found.blobs, stage };
            meta.set_instance(&instance)?;
            Ok(Prepared { instance, bootstrap: found.path, config: filled.text })
        });
        work.await.map_err(|error| ServeError::Records(error.to_string()))?
    }

    /// Has a running daemon mount a prepared image, and records it as live.
    pub(super) async fn finish(&self, daemon: &Daemon, prepared: Prepared) -> Result<Owner, ServeError> {
        let Prepared { mut instance, bootstrap, config } = prepared;
        let image = instance.id;
        if daemon.serves == Serves::All {
            let request = MountRequest::rafs(bootstrap.to_string_lossy(), config);
            match daemon.client().mount(&format!("/{image}"), &request).await {
                Ok(()) => {}
                // Asked for before, by us or by our predecessor.
                Err(error) if error.already_mounted() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let owner = look(self.layout.rafs(image)).await?;
        instance.stage = Stage::Live;
        let meta = self.meta.clone();
        let (reference, blobs) = (instance.image.clone(), instance.blobs.as_ref().map_or(0, Vec::len));
        let recorded = tokio::task::spawn_blocking(move || meta.set_instance(&instance)).await;
        if let Err(error) = recorded.map_err(|error| ServeError::Records(error.to_string())).and_then(|done| Ok(done?))
        {
            // Its snapshot was removed meanwhile, so nobody else would ever unmount it.
            if daemon.serves == Serves::All
                && let Err(error) = daemon.client().umount(&format!("/{image}")).await
            {
                tracing::warn!(image, %error, "an image that is not recorded is still mounted");
            }
            return Err(error);
        }
        daemon.lock().mounted.insert(image, owner);
        tracing::info!(image, reference, blobs, daemon = daemon.name, "image mounted");
        Ok(owner)
    }

    /// Mounts every image that is recorded for a daemon that was just started, but `except`.
    pub(super) async fn mount_recorded(self: &Arc<Self>, daemon: &Arc<Daemon>, except: Option<u64>) {
        let present = match daemon.client().info().await {
            Ok(info) if info.state == DaemonState::Running => {
                info.backend_collection.unwrap_or_default().into_keys().collect()
            }
            _ => HashSet::new(),
        };
        let instances = match self.meta.instances() {
            Ok(instances) => instances,
            Err(error) => {
                tracing::error!(error = error.full_text(), "images could not be mounted again");
                return;
            }
        };
        for instance in instances.into_iter().filter(|found| found.daemon == daemon.name && Some(found.id) != except) {
            let image = instance.id;
            match self.mount_again(daemon, image, present.contains(&format!("/{image}"))).await {
                Ok(true) => {}
                Ok(false) => tracing::debug!(image, "the bootstrap is gone, and its image is not mounted again"),
                // Whoever asks for its mounts will try again, and hear the reason.
                Err(error) => tracing::warn!(image, %error, "an image could not be mounted again"),
            }
        }
    }

    async fn mount_again(&self, daemon: &Daemon, image: u64, present: bool) -> Result<bool, ServeError> {
        let Some(record) = self.meta.by_id(image)? else { return Ok(false) };
        if present && let Ok(owner) = look(self.layout.rafs(image)).await {
            daemon.lock().mounted.insert(image, owner);
            return Ok(true);
        }
        let prepared = self.prepare(daemon, &record, Stage::Live).await?;
        self.finish(daemon, prepared).await?;
        Ok(true)
    }

    pub(super) async fn unmount(&self, image: u64) -> Result<(), ServeError> {
        let Some(instance) = self.meta.instance(image)? else { return Ok(()) };
        let daemon = self.daemon(&instance.daemon);
        let _turn = daemon.turn.lock().await;
        match daemon.serves {
            Serves::All => match daemon.client().umount(&format!("/{image}")).await {
                Ok(()) => {}
                Err(error) if error.not_mounted() || error.nobody_there() => {}
                Err(error) => return Err(error.into()),
            },
            Serves::One(_) => spawn::stop(&daemon).await,
        }
        daemon.lock().mounted.remove(&image);
        self.refusals.lock().expect("no code panics while it holds this lock").remove(&image);
        let meta = self.meta.clone();
        let forgotten = tokio::task::spawn_blocking(move || meta.forget_instance(image)).await;
        forgotten.map_err(|error| ServeError::Records(error.to_string()))??;
        let config = self.layout.image_config(&daemon.name, image);
        if let Some(directory) = config.parent() {
            remove_quietly(std::fs::remove_dir_all(directory), directory);
        }
        if daemon.serves == Serves::One(image) {
            self.daemons.lock().expect("no code panics while it holds this lock").remove(&daemon.name);
            remove_quietly(std::fs::remove_dir_all(self.layout.daemon_config(&daemon.name)), &daemon.mountpoint);
            remove_quietly(std::fs::remove_dir(&daemon.mountpoint), &daemon.mountpoint);
        }
        tracing::info!(image, daemon = daemon.name, "image unmounted");
        Ok(())
    }
}

/// An image that is ready to be mounted.
pub(super) struct Prepared {
    instance: Instance,
    bootstrap: PathBuf,
    config: String,
}

fn remove_quietly(result: std::io::Result<()>, path: &Path) {
    if let Err(error) = result
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(path = %path.display(), %error, "something unused is still there");
    }
}

/// Asks a mount for its root directory, and gives up on one that does not answer.
async fn look(path: PathBuf) -> Result<Owner, ServeError> {
    let asked = path.clone();
    let answer = tokio::task::spawn_blocking(move || std::fs::metadata(&asked).map(|found| (found.uid(), found.gid())));
    let dead = |why: String| ServeError::Dead { path: path.clone(), why };
    match tokio::time::timeout(LOOK_LIMIT, answer).await {
        Ok(Ok(Ok(owner))) => Ok(owner),
        Ok(Ok(Err(error))) => Err(dead(error.to_string())),
        Ok(Err(error)) => Err(dead(error.to_string())),
        Err(_) => Err(dead(format!("no answer within {} s", LOOK_LIMIT.as_secs()))),
    }
}
