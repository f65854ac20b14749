//! Disks of one's own for the cache, with a way to break each.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, umount2};

/// A file system that is mounted at a place, and unmounted when dropped.
pub(crate) struct Disk {
    path: PathBuf,
    /// The file that holds an ext4.
    image: Option<tempfile::NamedTempFile>,
}

impl Disk {
    /// Memory that holds `options` (`size=2m`).
    pub(crate) fn tmpfs(at: &Path, options: &str) -> Self {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "shoal-test"]).arg(at));
        Self { path: at.to_owned(), image: None }
    }

    /// An ext4 in a file of `mib` MiB, mounted with `options`.
    pub(crate) fn ext4(at: &Path, mib: u64, options: &str) -> Self {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(mib << 20).unwrap();
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(image.path()));
        let disk = Self { path: at.to_owned(), image: Some(image) };
        disk.mount(options);
        disk
    }

    fn mount(&self, options: &str) {
        let image = self.image.as_ref().expect("an ext4 has an image").path();
        run(Command::new("mount").args(["-t", "ext4", "-o"]).arg(format!("loop,{options}")).arg(image).arg(&self.path));
    }

    pub(crate) fn remount(&self, options: &str) {
        run(Command::new("mount").arg("-o").arg(format!("remount,{options}")).arg(&self.path));
    }

    /// Everything behind the first `mib` MiB of the device is gone.
    pub(crate) fn lose_all_behind(&self, mib: u64) {
        self.image.as_ref().expect("an ext4 has an image").as_file().set_len(mib << 20).unwrap();
    }

    /// The file system finds an error in itself.
    pub(crate) fn find_error(&self) {
        let source = run(Command::new("findmnt").args(["-n", "-o", "SOURCE", "-M"]).arg(&self.path));
        let device = source.trim().rsplit('/').next().expect("a device has a name").to_owned();
        std::fs::write(Path::new("/sys/fs/ext4").join(device).join("trigger_fs_error"), "for a test").unwrap();
    }

    /// The power goes: what is not on the disk by now never will be.
    pub(crate) fn cut_power(&self) {
        // EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH.
        let script = "import fcntl, os, struct, sys\n\
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        run(Command::new("python3").args(["-c", script]).arg(&self.path));
    }

    /// Unmounts and mounts again, as a machine does that starts.
    pub(crate) fn start_again(&self, options: &str) {
        umount2(&self.path, MntFlags::empty()).unwrap();
        self.mount(options);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Takes the pages of a file out of memory, so that the next reader asks whoever holds it.
pub(crate) fn drop_pages(path: &Path) {
    let file = File::open(path).unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// The same for all regular files below `dir`.
pub(crate) fn drop_pages_below(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => drop_pages_below(&entry.path()),
            kind if kind.is_file() => drop_pages(&entry.path()),
            _ => {}
        }
    }
}
