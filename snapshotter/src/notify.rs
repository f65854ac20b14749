//! Tells the service manager that the socket serves.
//!
//! systemd gives the address of a datagram socket in `NOTIFY_SOCKET` and starts containerd, which needs us, only after it
//! heard from us.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `state`, such as `READY=1`, to the address in `NOTIFY_SOCKET`, a path or `@` and an abstract name.
///
/// # Errors
/// When nobody listens there.
pub fn send(address: &OsStr, state: &str) -> io::Result<()> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_address_are_reached() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let abstract_name = format!("shoal-notify-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).expect("bound");
        let by_name =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).expect("short")).expect("bound");
        send(path.as_os_str(), "READY=1").expect("sent");
        send(OsStr::new(&format!("@{abstract_name}")), "READY=1").expect("sent");
        for socket in [by_path, by_name] {
            let mut text = [0; 16];
            let len = socket.recv(&mut text).expect("received");
            assert_eq!(&text[..len], b"READY=1");
        }
    }
}
