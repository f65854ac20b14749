//! Three minutes of everything that can go wrong.

use std::process::Command;

use anyhow::Result;
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::process::{run, shoal};

#[test]
fn readers_get_the_right_bytes_or_an_error_in_time_whatever_goes_wrong() -> Result<()> {
    if !met(CONTAINERD) || !met(&[Need::Program("openssl"), Need::Program("python3")]) {
        return Ok(());
    }
    let mut campaign = Command::new(shoal("shoal-campaign")?);
    if std::env::var_os("SHOAL_CAMPAIGN_SEED").is_none() {
        campaign.args(["--seed", "4"]);
    }
    run(&mut campaign).map(drop)
}
