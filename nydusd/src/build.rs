//! Which build this is.

use crate::api::types::BuildInfo;

/// Returns the build.
pub fn info() -> BuildInfo {
    BuildInfo {
        package_ver: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
        git_commit: env!("SHOAL_COMMIT").to_owned(),
        build_time: env!("SHOAL_TIME").to_owned(),
        profile: env!("SHOAL_PROFILE").to_owned(),
        rustc: env!("SHOAL_RUSTC").to_owned(),
    }
}

/// What `--version` prints after the program's name; tools look for the line that begins with `Git Commit:`.
pub const VERSION: &str = concat!(
    "Version: \tv",
    env!("CARGO_PKG_VERSION"),
    "\nGit Commit: \t",
    env!("SHOAL_COMMIT"),
    "\nBuild Time: \t",
    env!("SHOAL_TIME"),
    "\nProfile: \t\t",
    env!("SHOAL_PROFILE"),
    "\nRustc: \t\t",
    env!("SHOAL_RUSTC"),
    "\n"
);
