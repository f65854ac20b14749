//! Finding daemons that run already, and noticing those that die.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nydusd::api::types::DaemonState;
use tokio::net::UnixStream;

use super::{Daemon, Daemons, Inner, Mode, Process, Recovery, SHARED, ServeError, Serves};

/// How often a daemon's process is looked at. With the start of a daemon, a dead one is replaced well within five seconds.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Longest pause between attempts to start a daemon that does not want to.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl Daemons {
    /// Adopts daemons that run, starts those that should, and has every recorded image mounted. Called before the first
    /// request is served.
    pub async fn recover(&self) {
        let inner = &self.inner;
        let instances = match inner.meta.instances() {
            Ok(instances) => instances,
            Err(error) => {
                tracing::error!(error = error.full_text(), "the images of the last run are not known");
                return;
            }
        };
        let mut names: BTreeSet<String> = instances.into_iter().map(|instance| instance.daemon).collect();
        inner.settle_mode(&names);
        if inner.layout.api_socket(SHARED).exists() {
            names.insert(SHARED.to_owned());
        }
        futures::future::join_all(names.iter().map(|name| inner.recover_one(name))).await;
        self.release_orphans().await;
    }
}

impl Inner {
    /// Images of one mode lie where daemons of the other would mount, so the mode changes only when none are left.
    fn settle_mode(&self, names: &BTreeSet<String>) {
        let used = match names.iter().next().map(String::as_str) {
            None => return,
            Some(SHARED) => Mode::Shared,
            Some(_) => Mode::Dedicated,
        };
        if used != self.settings.mode {
            tracing::warn!(wanted = ?self.settings.mode, ?used, "the daemon mode changes once no image of the old mode is left");
            *self.mode.lock().expect("no code panics while it holds this lock") = used;
        }
    }

    async fn recover_one(self: &Arc<Self>, name: &str) {
        let daemon = self.daemon(name);
        let _turn = daemon.turn.lock().await;
        match self.adopt(&daemon).await {
            Some(process) => {
                tracing::info!(daemon = name, pid = process.pid(), "a running nydusd is adopted");
                daemon.lock().process = Some(process);
                self.watch(&daemon);
                self.mount_recorded(&daemon, None).await;
            }
            None => {
                if let Err(error) = self.revive(&daemon).await {
                    // Plain images must work all the same; whoever wants this daemon's images will start it or hear why.
                    tracing::error!(daemon = name, %error, "nydusd could not be started again");
                    self.watch(&daemon);
                }
            }
        }
    }

    /// The process behind a daemon's socket, if it serves.
    async fn adopt(&self, daemon: &Daemon) -> Option<Process> {
        let connection = UnixStream::connect(&daemon.socket).await.ok()?;
        let pid = connection.peer_cred().ok()?.pid()?;
        drop(connection);
        let state = daemon.client().info().await.map(|info| info.state);
        let usable =
            matches!(state, Ok(DaemonState::Running)) && super::spawn::is_mounted(&daemon.mountpoint).unwrap_or(false);
        if !usable {
            // It listens on our socket, so it is ours, whatever ails it.
            tracing::warn!(daemon = daemon.name, pid, ?state, "a running nydusd is of no use and is replaced");
            daemon.lock().process = Process::find(pid);
            super::spawn::stop(daemon).await;
            return None;
        }
        Process::find(pid)
    }

    /// Starts a dead daemon again with all its images. The caller has the daemon's turn.
    pub(super) async fn revive(self: &Arc<Self>, daemon: &Arc<Daemon>) -> Result<(), ServeError> {
        if let Serves::One(image) = daemon.serves {
            let Some(record) = self.meta.by_id(image)? else {
                super::spawn::clear(daemon)?;
                return Ok(());
            };
            let prepared = self.prepare(daemon, &record, crate::meta::Stage::Live).await?;
            self.start(daemon).await?;
            self.finish(daemon, prepared).await?;
            return Ok(());
        }
        let wanted = self.meta.instances()?.iter().any(|instance| instance.daemon == daemon.name);
        if !wanted {
            return super::spawn::clear(daemon);
        }
        self.start(daemon).await?;
        self.mount_recorded(daemon, None).await;
        Ok(())
    }

    /// Looks after a daemon from now on.
    pub(super) fn watch(self: &Arc<Self>, daemon: &Arc<Daemon>) {
        {
            let mut state = daemon.lock();
            if state.watched {
                return;
            }
            state.watched = true;
        }
        let (inner, daemon) = (self.clone(), daemon.clone());
        tokio::spawn(async move {
            let closing = inner.closing.clone();
            tokio::select! {
                () = closing.cancelled() => {}
                () = inner.look_after(&daemon) => {}
            }
            daemon.lock().watched = false;
        });
    }

    async fn look_after(self: &Arc<Self>, daemon: &Arc<Daemon>) {
        let mut pause = LOOK_EVERY;
        loop {
            tokio::time::sleep(pause).await;
            if daemon.alive() {
                pause = LOOK_EVERY;
                continue;
            }
            let _turn = daemon.turn.lock().await;
            let wanted = match self.meta.instances() {
                Ok(instances) => instances.iter().any(|instance| instance.daemon == daemon.name),
                Err(_) => true,
            };
            if daemon.alive() {
                continue;
            }
            if !wanted {
                // Stopped because its last image went, or never needed: the next image starts it.
                return;
            }
            if self.settings.recovery == Recovery::None {
                tracing::error!(
                    daemon = daemon.name,
                    "nydusd died; by the recover policy it stays dead until it is needed"
                );
                return;
            }
            tracing::warn!(
                daemon = daemon.name,
                "nydusd died and is started again; containers that use it must be restarted"
            );
            match self.revive(daemon).await {
                Ok(()) => pause = LOOK_EVERY,
                Err(error) => {
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    tracing::error!(daemon = daemon.name, %error, again_in = ?pause, "nydusd could not be started again");
                }
            }
        }
    }
}
