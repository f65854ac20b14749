//! `shoal-campaign`: everything that can go wrong, over and over, while readers read.
//!
//! Parallel readers compare files with what they must be, through `read`, `mmap` and `exec` on overlayfs above our mount and
//! with `O_DIRECT` on the mount itself. A thief takes the cache away, so that they always need a source. A schedule that
//! a seed decides brings one fault after another; the ledger says what each did, and what it must not have done.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the campaign is a program for people")]

mod dice;
mod faults;
mod files;
mod ledger;
mod readers;
mod schedule;
mod site;
mod thief;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nydus_tests::needs::{CONTAINERD, Need, met};

use crate::faults::{Kind, Raging};
use crate::ledger::{LIMIT, Ledger};
use crate::readers::Readers;
use crate::schedule::{Fault, Schedule};
use crate::site::Site;
use crate::thief::Trade;

/// How much longer a fault may last when no read has met it yet.
const UNTIL_MET: Duration = Duration::from_secs(30);

/// Time between two looks at the readers.
const GLANCE: Duration = Duration::from_millis(50);

/// Readers, faults, and a table of what came of it.
#[derive(Debug, Parser)]
struct Cli {
    /// For how many seconds; every fault comes once at least, however long that takes
    #[arg(long, env = "SHOAL_CAMPAIGN_SECONDS", default_value_t = 180)]
    seconds: u64,
    /// Decides order, times and details of the faults [default: the time of day]
    #[arg(long, env = "SHOAL_CAMPAIGN_SEED")]
    seed: Option<u64>,
    /// Where the logs go [default: a new folder below /tmp]
    #[arg(long, env = "SHOAL_CAMPAIGN_LOGS")]
    logs: Option<PathBuf>,
    /// Only faults whose names contain this text
    #[arg(long, env = "SHOAL_CAMPAIGN_ONLY", default_value = "")]
    only: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let seed = cli
        .seed
        .unwrap_or_else(|| SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs()));
    let logs = cli.logs.unwrap_or_else(|| std::env::temp_dir().join(format!("shoal-campaign-logs-{seed}")));
    println!("campaign: seed {seed}, {} s, logs in {}", cli.seconds, logs.display());
    let result = tokio::runtime::Runtime::new()
        .context("starting a runtime")
        .and_then(|runtime| runtime.block_on(campaign(seed, Duration::from_secs(cli.seconds), &logs, &cli.only)));
    match result {
        Ok(()) => {
            println!("campaign: green");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("campaign: RED: {error:#}");
            println!("campaign: again with --seed {seed}; the logs are in {}", logs.display());
            ExitCode::FAILURE
        }
    }
}

async fn campaign(seed: u64, time: Duration, logs: &Path, only: &str) -> Result<()> {
    ensure!(
        met(CONTAINERD) && met(&[Need::Program("openssl"), Need::Program("python3")]),
        "this machine lacks something"
    );
    let kinds: Vec<Kind> = Kind::ALL.iter().copied().filter(|kind| kind.name().contains(only)).collect();
    ensure!(!kinds.is_empty(), "no fault's name contains {only:?}");
    std::fs::create_dir_all(logs).with_context(|| format!("making {}", logs.display()))?;
    let ledger = Arc::new(Ledger::open(logs)?);
    tokio::spawn(stop_when_asked(Arc::clone(&ledger)));
    let mut site = Site::new(Arc::clone(&ledger), seed).await?;
    let readers = Readers::start(&site.library, logs, seed)?;
    site.thief.turn(Trade::Steals);

    let begin = Instant::now();
    let (mut rounds, mut outcome) = (0, Ok(()));
    for fault in Schedule::new(seed, &kinds) {
        let ends_round = fault.ends_round;
        outcome = endure(fault, &mut site, &ledger).await;
        rounds += usize::from(ends_round);
        if outcome.is_err() || ledger.is_red() || (begin.elapsed() >= time && rounds > 0) {
            break;
        }
    }
    drop(readers);
    site.thief.turn(Trade::Rests);
    if outcome.is_ok() && !ledger.is_red() {
        ledger.expect_met(&kinds);
        outcome = site.clean_up().await.context("removing the containers");
    }
    site.keep_logs(logs);
    let table = ledger.table();
    println!("{table}");
    std::fs::write(logs.join("table.txt"), format!("seed {seed}\n{table}\n"))?;
    outcome?;
    let reasons = ledger.reasons();
    ensure!(reasons.is_empty(), "{}", reasons.join("\n  "));
    Ok(())
}

/// Ends the campaign as any red ends it, with everything taken down, when the user has had enough.
async fn stop_when_asked(ledger: Arc<Ledger>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return;
    };
    tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
    ledger.redden("it was interrupted".to_owned());
}

/// One fault, from the calm before it until all is well again.
async fn endure(fault: Fault, site: &mut Site, ledger: &Ledger) -> Result<()> {
    wait(ledger, fault.calm, || false).await;
    let (kind, lasts) = (fault.kind, fault.lasts);
    ledger.note(&format!("{} for {:.1} s, salt {:#x}", kind.name(), lasts.as_secs_f64(), fault.salt));
    ledger.open_window(kind);
    let raging = Raging::begin(fault, site).await.with_context(|| format!("bringing about \"{}\"", kind.name()))?;
    wait(ledger, lasts, || false).await;
    wait(ledger, UNTIL_MET, || raging.is_met(site, ledger)).await;
    let met = raging.is_met(site, ledger);
    let cleared = Instant::now();
    raging.end(site).with_context(|| format!("ending \"{}\"", kind.name()))?;
    ledger.clear(cleared);
    if let Err(error) = watched(ledger, raging.recover(site, cleared + LIMIT)).await {
        ledger.redden(format!("after \"{}\": {error:#}", kind.name()));
    }
    wait(ledger, 2 * LIMIT, || ledger.is_well()).await;
    ledger.close_window(met);
    Ok(())
}

/// Looks at the readers until `work` is done.
async fn watched<T>(ledger: &Ledger, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        match tokio::time::timeout(GLANCE, work.as_mut()).await {
            Ok(done) => return done,
            // Red is red: the reasons are not counted again at each glance.
            Err(_) if ledger.is_red() => {}
            Err(_) => ledger.look(),
        }
    }
}

/// Waits until `done`, until the campaign is red, or for `limit`.
async fn wait(ledger: &Ledger, limit: Duration, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while begin.elapsed() < limit && !done() && !ledger.is_red() {
        tokio::time::sleep(GLANCE).await;
        ledger.look();
    }
}
