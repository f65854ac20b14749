//! The faults, one kind each: how it is brought about, how one sees that a read met it, how it ends.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::http::StatusCode;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, kill};
use nydus_tests::cache;
use nydus_tests::registry::Registry;
use nydus_tests::sky::{Sky, To, Weather};

use crate::dice::Dice;
use crate::ledger::Ledger;
use crate::schedule::Fault;
use crate::site::{ADDRESS_LIFE, Site, TOKEN_LIFE};
use crate::thief::Trade;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    RegistryGone,
    RegistryKilled,
    RegistryWedged,
    StoreSilent,
    ServerErrors,
    TooManyRequests,
    CutBodies,
    SlowBodies,
    WrongLengths,
    WrongBytes,
    WrongBytesFromMirror,
    TokensRevoked,
    TokensShort,
    MirrorKilled,
    MirrorWedged,
    AllSourcesGone,
    NydusdKilled,
    SnapshotterKilled,
    ContainerdKilled,
    CacheFull,
    CacheCut,
    CacheHoles,
    CacheDamaged,
}

impl Kind {
    pub(crate) const ALL: &'static [Self] = &[
        Self::RegistryGone,
        Self::RegistryKilled,
        Self::RegistryWedged,
        Self::StoreSilent,
        Self::ServerErrors,
        Self::TooManyRequests,
        Self::CutBodies,
        Self::SlowBodies,
        Self::WrongLengths,
        Self::WrongBytes,
        Self::WrongBytesFromMirror,
        Self::TokensRevoked,
        Self::TokensShort,
        Self::MirrorKilled,
        Self::MirrorWedged,
        Self::AllSourcesGone,
        Self::NydusdKilled,
        Self::SnapshotterKilled,
        Self::ContainerdKilled,
        Self::CacheFull,
        Self::CacheCut,
        Self::CacheHoles,
        Self::CacheDamaged,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RegistryGone => "registry refuses connections",
            Self::RegistryKilled => "registry killed behind its front",
            Self::RegistryWedged => "registry wedged (SIGSTOP)",
            Self::StoreSilent => "store of blobs silent",
            Self::ServerErrors => "5xx",
            Self::TooManyRequests => "429 with Retry-After",
            Self::CutBodies => "bodies cut",
            Self::SlowBodies => "bodies slow",
            Self::WrongLengths => "wrong lengths",
            Self::WrongBytes => "wrong bytes from everybody",
            Self::WrongBytesFromMirror => "wrong bytes from the mirror",
            Self::TokensRevoked => "tokens revoked",
            Self::TokensShort => "tokens of one second",
            Self::MirrorKilled => "mirror killed",
            Self::MirrorWedged => "mirror wedged (SIGSTOP)",
            Self::AllSourcesGone => "mirror and registry gone",
            Self::NydusdKilled => "nydusd killed",
            Self::SnapshotterKilled => "snapshotter killed",
            Self::ContainerdKilled => "containerd killed",
            Self::CacheFull => "cache disk full",
            Self::CacheCut => "cache files cut",
            Self::CacheHoles => "holes in cache files",
            Self::CacheDamaged => "cache damaged under a dead nydusd",
        }
    }

    /// How long it lasts, at least and at most.
    pub(crate) fn lasts(self) -> (Duration, Duration) {
        let (shortest, longest) = match self {
            // Over half of nydusd's deadline: what a page-cached read has.
            Self::AllSourcesGone => (11_000, 12_000),
            // Over the time that a mirror may be silent.
            Self::MirrorWedged => (6_000, 7_000),
            Self::NydusdKilled | Self::CacheDamaged | Self::CacheHoles => (200, 600),
            _ => (1_500, 3_000),
        };
        (Duration::from_millis(shortest), Duration::from_millis(longest))
    }

    /// Whether reads may fail in its window. Where they may not, another source, or none at all, is enough.
    pub(crate) fn forgives(self) -> bool {
        !matches!(
            self,
            Self::WrongBytesFromMirror
                | Self::TokensRevoked
                | Self::TokensShort
                | Self::MirrorKilled
                | Self::MirrorWedged
                | Self::SnapshotterKilled
                | Self::ContainerdKilled
                | Self::CacheFull
                | Self::CacheCut
                | Self::CacheHoles
        )
    }

    /// Whether containers have to be started to see that all is well again.
    fn wants_container(self) -> bool {
        matches!(self, Self::NydusdKilled | Self::SnapshotterKilled | Self::ContainerdKilled | Self::CacheDamaged)
    }
}

/// A fault that has begun.
#[derive(Debug)]
pub(crate) struct Raging {
    fault: Fault,
    /// What was counted when it began.
    before: u64,
}

impl Raging {
    /// Brings the fault about.
    pub(crate) async fn begin(fault: Fault, site: &mut Site) -> Result<Self> {
        let mut dice = Dice::new(fault.salt);
        let mut raging = Self { fault, before: 0 };
        let half = dice.below(2) == 0;
        let pause = Duration::from_millis(dice.below(400));
        let front = &site.bed.front;
        let sky = |weather: Weather| {
            let sky: &Sky = if half { front.registry_sky() } else { front.store_sky() };
            sky.set(weather);
        };
        // Before it begins, so that nothing that meets it is missed; what is counted late counts all the same.
        raging.before = raging.count(site);
        match raging.fault.kind {
            Kind::RegistryGone => front.shut(),
            Kind::RegistryKilled => site.bed.registry.process.crash()?,
            Kind::RegistryWedged => kill(site.bed.registry.process.pid(), Signal::SIGSTOP)?,
            Kind::StoreSilent => front.store_sky().set(Weather::Silent),
            Kind::ServerErrors => sky(Weather::Status(StatusCode::from_u16(*dice.pick(&[500, 502, 503, 504]))?)),
            Kind::TooManyRequests => sky(Weather::TooMany(1 + dice.below(2))),
            Kind::CutBodies => {
                front.store_sky().set(Weather::Cut(usize::try_from(dice.below(64 << 10))?));
            }
            Kind::SlowBodies => front.store_sky().set(Weather::Slow((16 << 10) + dice.below(128 << 10))),
            Kind::WrongLengths => front.store_sky().set(Weather::Short),
            Kind::WrongBytes => front.store_sky().set(Weather::Flipped(To::All)),
            Kind::WrongBytesFromMirror => front.store_sky().set(Weather::Flipped(To::Mirrors)),
            Kind::TokensRevoked => front.revoke(),
            Kind::TokensShort => {
                front.set_lives(Duration::from_secs(1), ADDRESS_LIFE);
                front.revoke();
            }
            Kind::MirrorKilled => site.node.mirror.crash()?,
            Kind::MirrorWedged => kill(site.node.mirror.pid(), Signal::SIGSTOP)?,
            Kind::AllSourcesGone => {
                site.node.mirror.crash()?;
                site.bed.front.shut();
            }
            Kind::NydusdKilled => {
                let start = site.start_beside();
                tokio::time::sleep(pause).await;
                site.kill_nydusd()?;
                site.expect_nothing_of(start);
            }
            Kind::SnapshotterKilled => {
                let start = site.start_beside();
                tokio::time::sleep(pause).await;
                site.node.snapshotter.crash()?;
                site.expect_nothing_of(start);
            }
            Kind::ContainerdKilled => {
                let start = site.start_beside();
                tokio::time::sleep(pause).await;
                site.node.containerd.process.crash()?;
                site.expect_nothing_of(start);
            }
            Kind::CacheFull => {
                site.thief.take_all();
                site.thief.turn(Trade::Hoards);
            }
            Kind::CacheCut => site.thief.take_all(),
            Kind::CacheHoles => {
                site.thief.turn(Trade::Rests);
                // Until most of it is there again.
                tokio::time::sleep(Duration::from_secs(2)).await;
                raging.before = raging.count(site);
                for path in cache::data_files(&site.cache()) {
                    punch(&path, &mut dice)?;
                }
            }
            Kind::CacheDamaged => {
                // The snapshotter must not start the next daemon before the damage is done.
                kill(site.node.snapshotter.pid(), Signal::SIGSTOP)?;
                site.thief.turn(Trade::Rests);
                let killed = site.kill_nydusd();
                let damaged = killed.and_then(|()| damage(site, &mut dice));
                kill(site.node.snapshotter.pid(), Signal::SIGCONT)?;
                damaged?;
            }
        }
        Ok(raging)
    }

    /// Returns whether a read met it.
    pub(crate) fn is_met(&self, site: &Site, ledger: &Ledger) -> bool {
        let (errors, right) = ledger.in_window();
        let counted = self.count(site) > self.before;
        match self.fault.kind {
            Kind::AllSourcesGone | Kind::NydusdKilled | Kind::CacheDamaged => errors > 0,
            Kind::SnapshotterKilled | Kind::ContainerdKilled | Kind::CacheFull | Kind::CacheCut | Kind::CacheHoles => {
                counted && right > 0
            }
            _ => counted,
        }
    }

    /// What grows when a read meets the fault.
    fn count(&self, site: &Site) -> u64 {
        let front = &site.bed.front;
        let seen = &front.seen;
        match self.fault.kind {
            Kind::RegistryGone => front.turned_away(),
            Kind::RegistryKilled => seen.unreachable.load(Ordering::Relaxed),
            Kind::TokensRevoked => seen.refused.load(Ordering::Relaxed),
            Kind::TokensShort => seen.tokens.load(Ordering::Relaxed),
            Kind::StoreSilent
            | Kind::ServerErrors
            | Kind::TooManyRequests
            | Kind::CutBodies
            | Kind::SlowBodies
            | Kind::WrongLengths
            | Kind::WrongBytes
            | Kind::WrongBytesFromMirror => front.registry_sky().met() + front.store_sky().met(),
            // Cold reads: without a mirror they are nydusd's own.
            Kind::RegistryWedged
            | Kind::MirrorKilled
            | Kind::MirrorWedged
            | Kind::AllSourcesGone
            | Kind::NydusdKilled
            | Kind::SnapshotterKilled
            | Kind::ContainerdKilled
            | Kind::CacheFull
            | Kind::CacheCut
            | Kind::CacheHoles
            | Kind::CacheDamaged => seen.blobs.load(Ordering::Relaxed),
        }
    }

    /// Takes the fault away.
    pub(crate) fn end(&self, site: &mut Site) -> Result<()> {
        let front = &site.bed.front;
        match self.fault.kind {
            Kind::RegistryGone => front.reopen(),
            Kind::RegistryKilled => {
                let port = site.bed.registry.host.rsplit_once(':').context("a host has a port")?.1.parse()?;
                site.bed.registry = Registry::start_at(&site.bed.scratch.dir("registry")?, port)?;
            }
            Kind::RegistryWedged => kill(site.bed.registry.process.pid(), Signal::SIGCONT)?,
            Kind::StoreSilent
            | Kind::ServerErrors
            | Kind::TooManyRequests
            | Kind::CutBodies
            | Kind::SlowBodies
            | Kind::WrongLengths
            | Kind::WrongBytes
            | Kind::WrongBytesFromMirror => {
                front.registry_sky().set(Weather::Clear);
                front.store_sky().set(Weather::Clear);
            }
            Kind::TokensShort => front.set_lives(TOKEN_LIFE, ADDRESS_LIFE),
            Kind::MirrorKilled => site.node.restart_mirror()?,
            Kind::MirrorWedged => kill(site.node.mirror.pid(), Signal::SIGCONT)?,
            Kind::AllSourcesGone => {
                front.reopen();
                site.node.restart_mirror()?;
            }
            Kind::SnapshotterKilled => site.node.restart_snapshotter()?,
            Kind::ContainerdKilled => site.node.containerd.restart()?,
            Kind::CacheFull | Kind::CacheHoles | Kind::CacheDamaged => site.thief.turn(Trade::Steals),
            Kind::TokensRevoked | Kind::NydusdKilled | Kind::CacheCut => {}
        }
        Ok(())
    }

    /// Does what users do afterwards: those whose containers may be dead start others.
    pub(crate) async fn recover(&self, site: &mut Site, deadline: Instant) -> Result<()> {
        if self.fault.kind.wants_container() { site.move_readers(deadline).await } else { Ok(()) }
    }
}

/// Takes the blocks of a part of a file away: it reads as zeros.
fn punch(path: &std::path::Path, dice: &mut Dice) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    let len = i64::try_from(file.metadata()?.len())?;
    if len > 8192 {
        let from = i64::try_from(dice.below(u64::try_from(len / 8192)?))? * 4096;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, hole, from, len - from)?;
    }
    Ok(())
}

/// Damages every blob's files, each in a way of its own.
fn damage(site: &Site, dice: &mut Dice) -> Result<()> {
    let files = cache::data_files(&site.cache());
    for path in &files {
        match dice.below(4) {
            0 => punch(path, dice)?,
            1 => std::fs::File::options().write(true).open(path)?.set_len(dice.below(1 << 20))?,
            2 => drop(std::fs::copy(dice.pick(&files), path)?),
            _ => {}
        }
    }
    for path in cache::maps(&site.cache()) {
        let mut bytes = std::fs::read(&path)?;
        match dice.below(3) {
            0 => bytes.truncate(usize::try_from(dice.below(bytes.len() as u64 + 1))?),
            1 => {
                for _ in 0..8 {
                    let at = usize::try_from(dice.below(bytes.len().max(1) as u64))?;
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << dice.below(8);
                    }
                }
            }
            _ => continue,
        }
        std::fs::write(&path, bytes)?;
    }
    Ok(())
}
