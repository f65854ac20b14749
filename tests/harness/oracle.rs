//! Readers that share no code with us: python written from the format's description, fsck.erofs, and the
//! kernel's own EROFS.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount, umount};

use crate::process::run;

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("oracle").join(name)
}

/// Returns a python with the modules `blake3` and `cryptography`, in a virtual environment beside the build's own files.
fn python() -> Result<PathBuf> {
    let target = std::env::current_exe()?;
    let target = target.ancestors().nth(3).context("tests lie three folders below the target folder")?;
    let python = target.join("oracle/bin/python3");
    let ready = || run(Command::new(&python).args(["-c", "import blake3, cryptography"])).is_ok();
    // Two tests may come here at once; the second waits for the first.
    let lock = std::fs::File::create(target.join("oracle.lock"))?;
    lock.lock()?;
    if !ready() {
        run(Command::new("python3").args(["-m", "venv"]).arg(target.join("oracle")))?;
        run(Command::new(&python).args([
            "-m",
            "pip",
            "-q",
            "install",
            "--disable-pip-version-check",
            "blake3",
            "cryptography",
        ]))?;
        ensure!(ready(), "python's blake3 or cryptography does not load");
    }
    Ok(python)
}

/// Lists a tree the way `verify` wants to have it; the image's own file if `to` is given.
pub fn manifest(root: &Path, to: &Path) -> Result<()> {
    std::fs::write(to, run(Command::new(python()?).arg(script("manifest.py")).arg(root))?)?;
    Ok(())
}

/// Reads an image independently: every digest, attribute and byte against a manifest. `known` names the
/// differences that are expected, as `key` or `key:/path`.
pub fn verify(bootstrap: &Path, blobs: &Path, manifest: &Path, known: &str) -> Result<String> {
    run(Command::new(python()?).arg(script("verify.py")).arg(bootstrap).arg(blobs).arg(manifest).arg(known))
}

/// Lists the sections of a blob, from its end.
pub fn sections(blob: &Path) -> Result<String> {
    run(Command::new(python()?).arg(script("extract.py")).arg(blob))
}

/// Recomputes every inode's place.
pub fn layout(bootstrap: &Path) -> Result<String> {
    run(Command::new(python()?).arg(script("layout_check.py")).arg(bootstrap))
}

/// Runs `fsck.erofs`, with one device per blob.
pub fn fsck(bootstrap: &Path, devices: &[PathBuf]) -> Result<String> {
    let mut command = Command::new("fsck.erofs");
    for device in devices {
        command.arg(format!("--device={}", device.display()));
    }
    run(command.arg("--extract").arg(bootstrap))
}

/// An image mounted by the kernel; unmounted when dropped.
#[derive(Debug)]
pub struct Erofs {
    /// The mount point.
    pub path: PathBuf,
}

impl Erofs {
    /// Mounts `bootstrap` at `path`, files as devices.
    pub fn mount(bootstrap: &Path, devices: &[PathBuf], path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let options: Vec<String> = devices.iter().map(|device| format!("device={}", device.display())).collect();
        mount(Some(bootstrap), path, Some("erofs"), MsFlags::MS_RDONLY, Some(options.join(",").as_str()))
            .with_context(|| format!("mounting {} with the kernel's EROFS", bootstrap.display()))?;
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for Erofs {
    fn drop(&mut self) {
        if let Err(error) = umount(&self.path) {
            println!("could not unmount {}: {error}", self.path.display());
        }
    }
}
