//! The command line of `containerd-nydus-grpc`, as old guides write it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

/// Gives lazily loaded nydus images, and plain ones, to containerd.
#[derive(Debug, Default, Parser)]
#[command(name = "containerd-nydus-grpc", version, disable_version_flag = true)]
pub struct Cli {
    /// Directory of all state [default: /var/lib/containerd/io.containerd.snapshotter.v1.nydus]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Socket that containerd connects to [default: /run/containerd-nydus/containerd-nydus-grpc.sock]
    #[arg(long, value_name = "SOCKET")]
    pub address: Option<PathBuf>,
    /// Configuration file, TOML; flags override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The nydus-image program, which makes the metadata of eStargz layers [default: beside this program, else on PATH]
    #[arg(long, value_name = "FILE")]
    pub nydus_image: Option<PathBuf>,
    /// The nydusd program [default: beside this program, else on PATH]
    #[arg(long, value_name = "FILE")]
    pub nydusd: Option<PathBuf>,
    /// Template of nydusd's configuration, JSON [default: /etc/nydus/nydusd-config.json]
    #[arg(long, alias = "config-path", value_name = "FILE")]
    pub nydusd_config: Option<PathBuf>,
    /// Accepted and not used yet
    #[arg(long, value_name = "FILE")]
    pub nydus_overlayfs_path: Option<PathBuf>,
    /// One nydusd for all images (shared) or for each (dedicated) [default: shared]
    #[arg(long, value_name = "MODE")]
    pub daemon_mode: Option<String>,
    /// How images reach the kernel: fusedev
    #[arg(long, value_name = "DRIVER")]
    pub fs_driver: Option<String>,
    /// trace, debug, info, warn or error [default: info]
    #[arg(long, short = 'l', value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Log to standard output instead of ROOT/logs/nydus-snapshotter.log
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub log_to_stdout: Option<bool>,
    /// Print the version
    #[arg(long, short = 'V', short_alias = 'v')]
    pub version: bool,
}

/// A flag of older releases.
struct Retired {
    name: &'static str,
    takes_value: bool,
    /// What it is called now, if it still means something.
    now: Option<&'static str>,
}

const fn retired(name: &'static str, takes_value: bool, now: Option<&'static str>) -> Retired {
    Retired { name, takes_value, now }
}

const RETIRED: [Retired; 18] = [
    retired("shared-daemon", false, Some("daemon-mode=shared")),
    retired("cache-dir", true, None),
    retired("enable-stargz", false, None),
    retired("recover-policy", true, None),
    retired("async-remove", false, None),
    retired("sync-remove", false, None),
    retired("nydusd-path", true, Some("nydusd")),
    retired("nydusimg-path", true, Some("nydus-image")),
    retired("log-dir", true, None),
    retired("validate-signature", false, None),
    retired("publickey-file", true, None),
    retired("convert-vpc-registry", false, None),
    retired("enable-metrics", false, None),
    retired("metrics-file", true, None),
    retired("enable-nydus-overlayfs", false, None),
    retired("kubeconfig-path", true, None),
    retired("disable-cache-manager", false, None),
    retired("gc-period", true, None),
];

/// Takes retired flags out of `args`, replacing those that have a new name, and tells one warning for each.
pub fn without_retired(args: impl IntoIterator<Item = OsString>) -> (Vec<OsString>, Vec<String>) {
    let mut kept = Vec::new();
    let mut warnings = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let body = text.strip_prefix("--").unwrap_or_default();
        let (name, inline) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        let Some(flag) = RETIRED.iter().find(|flag| flag.name == name) else {
            kept.push(arg);
            continue;
        };
        let value = match (flag.takes_value, inline) {
            (true, None) => args.next().map(|value| value.to_string_lossy().into_owned()),
            (_, inline) => inline,
        };
        match flag.now {
            Some(now) => {
                warnings.push(format!("flag --{name} is retired: use --{now}"));
                match (flag.takes_value, value.as_deref()) {
                    (true, Some(value)) => kept.push(format!("--{now}={value}").into()),
                    (false, Some("false")) | (true, None) => {}
                    (false, _) => kept.push(format!("--{now}").into()),
                }
            }
            None => {
                warnings.push(format!("flag --{name} is retired and ignored: see the keys of the configuration file"));
            }
        }
    }
    (kept, warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> (Cli, Vec<String>) {
        let args = std::iter::once("containerd-nydus-grpc").chain(args.iter().copied()).map(OsString::from);
        let (kept, warnings) = without_retired(args);
        (Cli::try_parse_from(kept).expect("accepted"), warnings)
    }

    #[test]
    fn the_guides_command_line_is_accepted() {
        let (cli, warnings) = parsed(&[
            "--nydusd-config",
            "/etc/nydus/config.json",
            "--log-to-stdout",
            "--log-level=debug",
            "--root",
            "/r",
        ]);
        assert_eq!(cli.nydusd_config, Some("/etc/nydus/config.json".into()));
        assert_eq!((cli.log_to_stdout, cli.log_level.as_deref()), (Some(true), Some("debug")));
        assert!(warnings.is_empty());
        let (old, _) = parsed(&["--config-path", "/x", "--log-to-stdout=false"]);
        assert_eq!((old.nydusd_config, old.log_to_stdout), (Some("/x".into()), Some(false)));
    }

    #[test]
    fn every_retired_flag_is_accepted_with_one_warning() {
        for flag in &RETIRED {
            let long = format!("--{}", flag.name);
            let mut ways = vec![vec![format!("{long}=true")]];
            ways.push(if flag.takes_value { vec![long, "value".to_owned()] } else { vec![long] });
            for way in ways {
                let way: Vec<&str> = way.iter().map(String::as_str).chain(["--root", "/r"]).collect();
                let (cli, warnings) = parsed(&way);
                assert_eq!(cli.root, Some("/r".into()), "{way:?}");
                assert_eq!(warnings.len(), 1, "{way:?}");
                assert!(warnings[0].contains(flag.name));
            }
        }
    }

    #[test]
    fn a_flag_with_a_new_name_still_works() {
        assert_eq!(parsed(&["--nydusd-path", "/x/nydusd"]).0.nydusd, Some("/x/nydusd".into()));
        assert_eq!(parsed(&["--shared-daemon"]).0.daemon_mode.as_deref(), Some("shared"));
        assert_eq!(parsed(&["--shared-daemon=false"]).0.daemon_mode, None);
    }

    #[test]
    fn an_unknown_flag_is_refused() {
        let (kept, _) = without_retired(["x", "--no-such-flag"].map(OsString::from));
        Cli::try_parse_from(kept).expect_err("a misspelt flag must not be ignored");
    }
}
