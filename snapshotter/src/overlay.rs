//! What overlayfs wants on this machine, and what it leaves behind.

use std::fs;
use std::io;
use std::path::Path;

use crate::mounts::Overlay;

/// Looks at the kernel and at our user namespace.
pub fn probe() -> Overlay {
    Overlay {
        // The parameter is there on every kernel that has the index at all; whether it is on by default does not matter.
        index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
        userxattr: in_user_namespace(),
    }
}

/// Whether ids are mapped: then `trusted.` attributes are out of reach.
fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let fields: Vec<&str> = map.split_whitespace().collect();
        fields != ["0", "0", "4294967295"] && !fields.is_empty()
    })
}

/// Removes the mark that makes overlayfs refuse directories which were once mounted `volatile`, unless they are mounted.
///
/// The mark says that data may be missing after a crash. The container that chose `volatile` accepted that; without this, its
/// snapshot could never be mounted again, not even plainly.
///
/// # Errors
/// When the mark is there and cannot be removed.
pub fn forget_volatile(upper: &Path, work: &Path) -> io::Result<()> {
    let mark = work.join("work/incompat/volatile");
    if !mark.exists() || is_upper_of_a_mount(upper)? {
        return Ok(());
    }
    fs::remove_dir_all(mark)
}

fn is_upper_of_a_mount(upper: &Path) -> io::Result<bool> {
    let wanted = format!("upperdir={}", upper.display());
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().any(|line| {
        let options = line.rsplit(' ').next().unwrap_or_default();
        options.split(',').any(|option| option == wanted)
    }))
}
