//! A disk of one's own, with ways to break it.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

/// An ext4 in a file, mounted at a place until dropped.
pub(crate) struct Disk {
    at: PathBuf,
    image: tempfile::NamedTempFile,
}

impl Disk {
    /// Of `mib` MiB.
    pub(crate) fn mount(at: &Path, mib: u64) -> Self {
        std::fs::create_dir_all(at).expect("made");
        let image = tempfile::NamedTempFile::new().expect("a file");
        image.as_file().set_len(mib << 20).expect("sized");
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(image.path()));
        let disk = Self { at: at.to_path_buf(), image };
        disk.attach();
        disk
    }

    fn attach(&self) {
        let options = "loop,errors=remount-ro";
        run(Command::new("mount").args(["-t", "ext4", "-o", options]).arg(self.image.path()).arg(&self.at));
    }

    /// The file system finds an error in itself and is read-only from now on.
    pub(crate) fn find_error(&self) {
        let source = run(Command::new("findmnt").args(["-n", "-o", "SOURCE", "-M"]).arg(&self.at));
        let device = source.trim().rsplit('/').next().expect("a device has a name").to_owned();
        std::fs::write(Path::new("/sys/fs/ext4").join(device).join("trigger_fs_error"), "for a test").expect("written");
    }

    /// The power goes: what is not on the disk by now never will be.
    pub(crate) fn cut_power(&self) {
        // EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH.
        let script = "import fcntl, os, struct, sys\n\
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        run(Command::new("python3").args(["-c", script]).arg(&self.at));
    }

    /// Comes back, as after a start of the machine.
    pub(crate) fn start_again(&self) {
        while umount2(&self.at, MntFlags::empty()).is_err() {
            // Something of a killed program is still on its way out.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        self.attach();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
