//! A disk of one's own, with ways to break it.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use crate::process::run;

/// An ext4 in a file, mounted at a place until dropped. It turns read-only where it finds an error in itself.
#[derive(Debug)]
pub struct Disk {
    at: PathBuf,
    image: tempfile::NamedTempFile,
    /// Where the device ends, if a part of it is gone, and what was behind that.
    lost: Option<(u64, Vec<u8>)>,
}

impl Disk {
    /// Of `mib` MiB.
    pub fn mount(at: &Path, mib: u64) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        let image = tempfile::NamedTempFile::new()?;
        let disk = Self { at: at.to_owned(), image, lost: None };
        disk.format(mib)?;
        disk.attach()?;
        Ok(disk)
    }

    fn format(&self, mib: u64) -> Result<()> {
        self.image.as_file().set_len(mib << 20)?;
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(self.image.path());
        run(&mut mkfs).map(drop)
    }

    fn attach(&self) -> Result<()> {
        let options = "loop,errors=remount-ro";
        run(Command::new("mount").args(["-t", "ext4", "-o", options]).arg(self.image.path()).arg(&self.at)).map(drop)
    }

    /// Fills it to the last block; returns the file that does.
    pub fn fill(&self) -> Result<PathBuf> {
        let path = self.at.join("filler");
        let mut file = File::options().create(true).append(true).open(&path)?;
        // First in large steps, then in the smallest that there are.
        for step in [1 << 20, 4096] {
            while file.write_all(&vec![0xa5; step]).is_ok() {}
        }
        Ok(path)
    }

    /// The file system finds an error in itself and is read-only from now on.
    pub fn find_error(&self) -> Result<()> {
        let source = run(Command::new("findmnt").args(["-n", "-o", "SOURCE", "-M"]).arg(&self.at))?;
        let device = source.trim().rsplit('/').next().context("a device has a name")?;
        std::fs::write(Path::new("/sys/fs/ext4").join(device).join("trigger_fs_error"), "for a test")?;
        Ok(())
    }

    /// Everything behind the first `mib` MiB of the device is gone, and what of it is not in memory cannot be read.
    pub fn lose_all_behind(&mut self, mib: u64) -> Result<()> {
        let (file, end) = (self.image.as_file(), mib << 20);
        let mut behind = vec![0; usize::try_from(file.metadata()?.len() - end)?];
        file.read_exact_at(&mut behind, end)?;
        file.set_len(end)?;
        self.lost = Some((end, behind));
        Ok(())
    }

    /// The power goes: what is not on the disk by now never will be.
    pub fn cut_power(&self) -> Result<()> {
        // EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH.
        let script = "import fcntl, os, struct, sys\n\
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        run(Command::new("python3").args(["-c", script]).arg(&self.at)).map(drop)
    }

    /// Comes back with all that is on it, as after a start of the machine.
    pub fn start_again(&mut self) -> Result<()> {
        self.detach()?;
        if let Some((end, behind)) = self.lost.take() {
            self.image.as_file().write_all_at(&behind, end)?;
        }
        self.attach()
    }

    /// Is replaced by a new one of `mib` MiB.
    pub fn replace(&mut self, mib: u64) -> Result<()> {
        self.detach()?;
        self.lost = None;
        self.format(mib)?;
        self.attach()
    }

    fn detach(&self) -> Result<()> {
        let begin = Instant::now();
        while let Err(error) = umount2(&self.at, MntFlags::empty()) {
            // Something of a killed program is still on its way out.
            if begin.elapsed() > Duration::from_secs(10) {
                bail!("{} cannot be unmounted: {error}", self.at.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It is gone where its user has unmounted all below a folder.
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}
