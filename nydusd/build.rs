//! Notes which source this is built from, for `--version` and for the API.

use std::path::Path;
use std::process::Command;

fn main() {
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|text| !text.is_empty())
    };
    let commit = run("git", &["rev-parse", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    // The commit's time, not the clock's: the same source gives the same program.
    let time = run("git", &["show", "-s", "--format=%cI", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let compiler = run(&compiler, &["--version"]).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=SHOAL_COMMIT={commit}");
    println!("cargo::rustc-env=SHOAL_TIME={time}");
    println!("cargo::rustc-env=SHOAL_RUSTC={compiler}");
    println!("cargo::rustc-env=SHOAL_PROFILE={}", std::env::var("PROFILE").unwrap_or_default());
    println!("cargo::rerun-if-changed=build.rs");
    if Path::new("../.git/HEAD").exists() {
        println!("cargo::rerun-if-changed=../.git/HEAD");
    }
}
