//! The samples that users copy are loaded by the programs that they are for.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_tests::needs::{Need, met};
use nydus_tests::process::{run, shoal};

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The configuration of the Dragonfly guide, as it is printed there.
const GUIDE: &str = r#"{"device":{"backend":{"type":"registry","config":{"mirrors":[{"host":"http://127.0.0.1:4001","auth_through":false,"headers":{"X-Dragonfly-Registry":"https://index.docker.io"},"ping_url":"http://127.0.0.1:4003/healthy"}],"scheme":"https","skip_verify":true,"timeout":10,"connect_timeout":10,"retry_limit":2}},"cache":{"type":"blobcache","config":{"work_dir":"/var/lib/nydus/cache/"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true,"fs_prefetch":{"enable":true,"threads_count":10,"merging_size":131072,"bandwidth_rate":1048576}}"#;

#[test]
fn the_mirror_loads_its_sample() -> Result<()> {
    run(Command::new(shoal("nydus-p2p")?)
        .arg("--config")
        .arg(top().join("config/nydus-p2p.toml"))
        .arg("--check-config"))?;
    Ok(())
}

#[test]
fn the_snapshotter_loads_its_sample() -> Result<()> {
    let cli = nydus_snapshotter::cli::Cli { config: Some(top().join("config/config.toml")), ..Default::default() };
    let (config, warnings) = nydus_snapshotter::config::Config::load(&cli).context("config/config.toml")?;
    ensure!(warnings.is_empty(), "{warnings:?}");
    ensure!(config.template == Path::new("/etc/nydus/config.json"), "{config:?}");
    Ok(())
}

#[test]
fn nydusd_and_the_snapshotters_template_load_the_samples_and_the_guides_configuration() -> Result<()> {
    let sample = std::fs::read_to_string(top().join("config/nydusd-config.json"))?;
    let by_hand = std::fs::read_to_string(top().join("config/nydusd-config.toml"))?;
    for (name, text) in [("guide", GUIDE), ("nydusd-config.json", &sample), ("nydusd-config.toml", &by_hand)] {
        nydusd::config::parse(text).with_context(|| name.to_owned())?;
    }
    for (name, text) in [("guide", GUIDE), ("nydusd-config.json", &sample)] {
        nydusd::config::Template::parse(text).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn systemd_accepts_the_units() -> Result<()> {
    if !met(&[Need::Program("systemd-analyze")]) {
        return Ok(());
    }
    let mut command = Command::new("systemd-analyze");
    command.arg("verify");
    for unit in ["nydus-snapshotter.service", "nydus-p2p.service", "nydus.slice"] {
        command.arg(top().join("systemd").join(unit));
    }
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    // The binaries are not installed where tests run; nothing else may be wrong.
    let wrong: Vec<&str> = said.lines().filter(|line| !line.contains("is not executable")).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
