//! The kernel's side of a mount: attaching the device, detaching it, finding it in the mount table.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{getgid, getuid};

/// Largest request or reply in bytes, with its header: 256 pages and one for the header. The mount option `max_read`
/// keeps the kernel from asking for more.
pub(crate) const BUFFER: usize = (1 << 20) + 4096;

/// Mounts a FUSE filesystem at `mountpoint` and returns its end of the connection.
pub(crate) fn attach(mountpoint: &Path, readonly: bool) -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    if readonly {
        flags |= MsFlags::MS_RDONLY;
    }
    let options = format!(
        "default_permissions,fd={},rootmode=40000,user_id={},group_id={},max_read={BUFFER},allow_other",
        device.as_raw_fd(),
        getuid(),
        getgid(),
    );
    mount(Some("rafs"), mountpoint, Some("fuse"), flags, Some(options.as_str()))?;
    Ok(device)
}

/// Takes the mount out of the tree; it ends when the last user is gone.
pub(crate) fn detach(mountpoint: &Path) -> io::Result<()> {
    Ok(umount2(mountpoint, MntFlags::MNT_DETACH)?)
}

/// What the mount table says of the uppermost mount at a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// `major:minor` of the filesystem.
    pub(crate) device: String,
    /// Type of the filesystem.
    pub(crate) fstype: String,
}

/// Looks `mountpoint` up in the mount table, without touching the mount (a dead one would answer with an error).
pub(crate) fn mounted(mountpoint: &Path) -> io::Result<Option<Mounted>> {
    Ok(find(&std::fs::read("/proc/self/mountinfo")?, mountpoint))
}

fn find(table: &[u8], mountpoint: &Path) -> Option<Mounted> {
    table.split(|&byte| byte == b'\n').rev().find_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let device = fields.nth(2)?;
        let place = unescape(fields.nth(1)?);
        if place != mountpoint {
            return None;
        }
        let fstype = fields.skip_while(|field| *field != b"-").nth(1)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some(Mounted { device: text(device), fstype: text(fstype) })
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if byte == b'\\' => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Sets how much the kernel reads ahead on the filesystem `device` (`major:minor`), in KiB.
pub(crate) fn set_read_ahead(device: &str, kib: u32) -> io::Result<()> {
    std::fs::write(Path::new("/sys/class/bdi").join(device).join("read_ahead_kb"), kib.to_string())
}

/// Makes every request on the filesystem `device` (`major:minor`) fail at once, now and later.
pub(crate) fn abort(device: &str) -> io::Result<()> {
    let minor = device.split(':').nth(1).unwrap_or(device);
    std::fs::write(Path::new("/sys/fs/fuse/connections").join(minor).join("abort"), "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_at_a_place_with_blanks_is_found() {
        let (place, escaped) = (Path::new("/mnt/a b\\c"), "/mnt/a\\040b\\134c");
        let table = format!(
            "36 35 98:0 / {escaped} rw,noatime master:1 - ext4 /dev/root rw\n\
             37 36 0:51 / {escaped} ro - fuse rafs ro,user_id=0\n\
             38 36 0:52 / /mnt/other ro - tmpfs none ro\n"
        );
        let found = find(table.as_bytes(), place).expect("it is in the table");
        assert_eq!(found, Mounted { device: "0:51".to_owned(), fstype: "fuse".to_owned() });
        assert_eq!(find(table.as_bytes(), Path::new("/mnt")), None);
    }
}
