//! POSIX access control lists, as far as unpacking a layer changes them: a file made in a directory with a default list
//! inherits it, and setting permissions changes the list that is there.
//!
//! The form is that of the kernel's attribute values: a version, then tag, permissions and id of each entry, little-endian.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

const HEADER: usize = 4;
const ENTRY: usize = 8;

const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

type Xattrs = BTreeMap<OsString, Vec<u8>>;

/// Returns the lists of what is made in a directory with the attributes `parent`, before its permissions are set.
pub(crate) fn inherited(parent: &Xattrs, directory: bool) -> Xattrs {
    let mut lists = Xattrs::new();
    if let Some(default) = parent.get(OsStr::new(DEFAULT)) {
        lists.insert(ACCESS.into(), default.clone());
        if directory {
            lists.insert(DEFAULT.into(), default.clone());
        }
    }
    lists
}

/// Changes the access list as setting the permissions does; one that says no more than they do is not kept.
pub(crate) fn set_permissions(xattrs: &mut Xattrs, permissions: u16) {
    let Some(list) = xattrs.get_mut(OsStr::new(ACCESS)) else { return };
    let (entries, rest) = list.get_mut(HEADER..).unwrap_or_default().as_chunks_mut::<ENTRY>();
    if entries.is_empty() || !rest.is_empty() {
        return;
    }
    let tag = |entry: &[u8; ENTRY]| u16::from_le_bytes([entry[0], entry[1]]);
    let masked = entries.iter().any(|entry| tag(entry) == MASK);
    for entry in entries.iter_mut() {
        let shift = match tag(entry) {
            USER_OBJ => 6,
            MASK => 3,
            GROUP_OBJ if !masked => 3,
            OTHER => 0,
            _ => continue,
        };
        entry[2..4].copy_from_slice(&(permissions >> shift & 7).to_le_bytes());
    }
    if entries.iter().all(|entry| matches!(tag(entry), USER_OBJ | GROUP_OBJ | OTHER)) {
        xattrs.remove(OsStr::new(ACCESS));
    }
}
