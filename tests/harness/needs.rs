//! What a test needs of the machine.
//!
//! A test that needs more than a compiler says so in its first line. Where the machine lacks it, the test
//! prints why and ends; with `CI` set that is a failure, because a skipped proof is no proof.

use std::path::{Path, PathBuf};

/// Something a machine may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The effective user is root and may mount.
    Root,
    /// `/dev/fuse` exists.
    Fuse,
    /// A program is on `PATH`.
    Program(&'static str),
    /// The kernel mounts EROFS images from plain files.
    ErofsFiles,
}

/// Everything that a run through containerd needs.
pub const CONTAINERD: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("containerd"),
    Need::Program("runc"),
    Need::Program("docker-registry"),
    Need::Program("cc"),
    Need::Program("busybox"),
];

/// Returns whether all `needs` are met; prints the first that is not.
///
/// # Panics
///
/// Where one is not met and `CI` is set.
pub fn met(needs: &[Need]) -> bool {
    let Some(lacking) = needs.iter().find(|need| !need.is_met()) else { return true };
    assert!(std::env::var_os("CI").is_none(), "this test needs {lacking:?}, and in CI nothing may be skipped");
    println!("skipped: needs {lacking:?}");
    false
}

impl Need {
    fn is_met(self) -> bool {
        match self {
            Self::Root => nix::unistd::geteuid().is_root(),
            Self::Fuse => Path::new("/dev/fuse").exists(),
            Self::Program(name) => program(name).is_some(),
            Self::ErofsFiles => std::fs::read_to_string("/proc/filesystems")
                .is_ok_and(|list| list.lines().any(|l| l.ends_with("\terofs"))),
        }
    }
}

/// Finds a program on `PATH` or in the system's own folders.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}
