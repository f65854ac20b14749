//! One connection to the kernel and the threads that serve it.
//!
//! Threads read the device and block in it; the kernel wakes one per request. The pool begins with a few and
//! grows when the last idle one takes a request, up to a limit; surplus threads end when they fall idle. A thread
//! costs little while it waits for bytes: its reply buffer has no pages until data is copied into it.
//!
//! The threads end by themselves when the filesystem is gone (unmounted, and nobody holds a file of it). They cannot be
//! told to end earlier: a process that wants to leave the mount to a successor just ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::errno::Errno;
use nix::unistd::{read, write};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::errno::{AGAIN, PANICKED};
use super::filesystem::{Filesystem, Mode};
use super::namespace::{Changed, Namespace};
use super::slot::Slots;
use crate::sys::mount::{self, BUFFER};

/// Most threads that serve at once. Each waits for one read; with the kernel's read-ahead that is more than a node's
/// worth of readers, and a thread that waits holds some ten kilobytes.
const MOST_THREADS: usize = 1024;

/// Idle threads that are kept beyond the configured number, so that a changing load does not start and end threads all
/// the time. Each may hold a megabyte of reply buffer.
const SPARE_THREADS: usize = 4;

/// What the kernel reads ahead, in KiB: one request's worth. More is read ahead by the store, which knows chunks.
const READ_AHEAD_KIB: u32 = 1024;

/// The bit by which the kernel marks the number of an interruption.
const INTERRUPT_BIT: u64 = 1;

/// What a session needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the kernel shows the tree.
    pub mountpoint: PathBuf,
    /// Threads to begin with (1 to 1,024), also the number that stays when all is quiet.
    pub threads: usize,
    /// How the mounts are treated.
    pub mode: Mode,
}

/// A connection to the kernel that is being served.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    ended: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Shared {
    device: File,
    options: Options,
    namespace: Namespace,
    runtime: Handle,
    slots: Slots,
    idle: AtomicUsize,
    threads: AtomicUsize,
    ended: watch::Sender<bool>,
}

impl Session {
    /// Mounts and serves.
    pub fn mount(options: Options, namespace: Namespace, runtime: Handle) -> io::Result<Self> {
        let device = mount::attach(&options.mountpoint, true)?;
        Ok(Self::serve(device, options, namespace, runtime))
    }

    /// Serves a connection that is there already.
    pub fn serve(device: File, options: Options, namespace: Namespace, runtime: Handle) -> Self {
        let (sender, ended) = watch::channel(false);
        let shared = Arc::new(Shared {
            device,
            options,
            namespace,
            runtime,
            slots: Slots::default(),
            idle: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            ended: sender,
        });
        for _ in 0..shared.options.threads.max(1) {
            shared.spawn();
        }
        Self { shared, ended }
    }

    /// Waits until the filesystem is gone.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The sender lives as long as `self`; an error would mean the same.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Returns the requests that are being served.
    pub fn slots(&self) -> &Slots {
        &self.shared.slots
    }

    /// Returns where the tree is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.shared.options.mountpoint
    }

    /// Lets the kernel ask for as much at once as it may. Not for serving threads: the kernel may ask them something
    /// meanwhile.
    pub fn tune(&self) {
        let tuned = match mount::mounted(self.mountpoint()) {
            Ok(Some(mounted)) => mount::set_read_ahead(&mounted.device, READ_AHEAD_KIB),
            Ok(None) => Err(io::ErrorKind::NotFound.into()),
            Err(error) => Err(error),
        };
        if let Err(error) = tuned {
            tracing::debug!(%error, "read_ahead_kb stays as the kernel set it");
        }
    }

    /// Tells the kernel that names changed. Not for serving threads, nor under any lock that they take: the kernel may
    /// wait for an answer about the same directory first.
    pub fn revoke(&self, changed: &[Changed]) {
        for change in changed {
            if let Err(error) = self.shared.revoke(change) {
                tracing::debug!(%error, name = %change.name.display(), "the kernel had not cached the name");
            }
        }
    }

    /// Takes the mount out of the tree and waits, for at most `patience`, until nothing is being served; what is still
    /// waiting then is made to fail.
    pub async fn umount(&self, patience: Duration) {
        let mountpoint = self.mountpoint();
        let device = mount::mounted(mountpoint).ok().flatten().map(|mounted| mounted.device);
        if let Err(error) = mount::detach(mountpoint) {
            tracing::warn!(mountpoint = %mountpoint.display(), %error, "could not unmount");
        }
        let quiet = async {
            while !self.slots().inflight().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(patience, async {
            tokio::select! {
                () = self.ended() => {}
                () = quiet => {}
            }
        });
        if waited.await.is_err()
            && let Some(device) = device
        {
            tracing::warn!(mountpoint = %mountpoint.display(), "reads are still under way: they get an error now");
            if let Err(error) = mount::abort(&device) {
                tracing::debug!(%error, "could not abort the connection; it ends with this process");
            }
        }
    }
}

impl Shared {
    fn spawn(self: &Arc<Self>) {
        let number = self.threads.fetch_add(1, Ordering::Relaxed);
        let shared = self.clone();
        let spawned = thread::Builder::new().name("fuse_server".to_owned()).spawn(move || shared.run());
        if let Err(error) = spawned {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(threads = number, %error, "could not start another thread to serve the kernel");
        }
    }

    /// One thread's life.
    fn run(self: Arc<Self>) {
        let slot = self.slots.add();
        let server = Server::new(Filesystem {
            namespace: self.namespace.clone(),
            runtime: self.runtime.clone(),
            mode: self.options.mode,
            slot: slot.clone(),
        });
        let mut request = vec![0; BUFFER];
        let mut reply = vec![0; BUFFER];
        loop {
            let surplus = self.idle.fetch_add(1, Ordering::AcqRel) >= self.options.threads + SPARE_THREADS;
            if surplus {
                // Others wait already; this one was needed for a moment only.
                self.idle.fetch_sub(1, Ordering::AcqRel);
                break;
            }
            let result = read(&self.device, &mut request);
            let last = self.idle.fetch_sub(1, Ordering::AcqRel) == 1;
            let len = match result {
                Ok(len) => len,
                // Interrupted before it was read, or a signal, or nothing after all.
                Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => continue,
                Err(Errno::ENODEV) => {
                    self.ended.send_replace(true);
                    break;
                }
                Err(error) => {
                    tracing::error!(%error, "could not read the FUSE device");
                    self.ended.send_replace(true);
                    break;
                }
            };
            if last && self.threads.load(Ordering::Relaxed) < MOST_THREADS.max(self.options.threads) {
                self.spawn();
            }
            let Some(header) = header(&request[..len]) else { continue };
            if header.opcode == Opcode::Interrupt as u32 {
                self.interrupt(&header, &request[..len]);
                continue;
            }
            slot.begin(header.unique, header.opcode, header.nodeid);
            // Whoever waits for the answer must get one, whatever happens here.
            let served = catch_unwind(AssertUnwindSafe(|| {
                let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request[..len]));
                let writer = FuseDevWriter::<()>::new(self.device.as_raw_fd(), &mut reply);
                match (reader, writer) {
                    (Ok(reader), Ok(writer)) => server.handle_message(reader, Writer::from(writer), None, None),
                    (Err(error), _) | (_, Err(error)) => {
                        Err(fuse_backend_rs::Error::InvalidMessage(io::Error::other(error)))
                    }
                }
            }));
            slot.end();
            match served {
                Ok(Ok(_)) => {}
                // A reader that was killed takes no answer: the kernel says so here.
                Ok(Err(error)) => tracing::debug!(?error, opcode = header.opcode, "a reply was not taken"),
                Err(_) => {
                    tracing::error!(opcode = header.opcode, node = header.nodeid, "serving a request panicked");
                    self.refuse(header.unique, PANICKED);
                }
            }
        }
        self.slots.remove(&slot);
        self.threads.fetch_sub(1, Ordering::Relaxed);
    }

    /// Wakes the thread that serves the request named by an interruption.
    fn interrupt(&self, header: &InHeader, request: &[u8]) {
        let at = size_of::<InHeader>();
        let Some(unique) = request.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes)
        else {
            return;
        };
        if !self.slots.interrupt(unique) {
            // Either answered meanwhile, and the kernel drops this, or read by a thread that has not begun yet.
            self.refuse(header.unique | INTERRUPT_BIT, AGAIN);
        }
    }

    /// Answers a request with a number.
    fn refuse(&self, unique: u64, errno: Errno) {
        let mut message = [0; size_of::<OutHeader>()];
        message[..4].copy_from_slice(&(size_of::<OutHeader>() as u32).to_ne_bytes());
        message[4..8].copy_from_slice(&(-(errno as i32)).to_ne_bytes());
        message[8..].copy_from_slice(&unique.to_ne_bytes());
        // The kernel refuses answers to requests that are over; that is as good.
        let _ = write(&self.device, &message);
    }

    /// Tells the kernel to forget a name.
    fn revoke(&self, change: &Changed) -> Result<(), Errno> {
        use std::os::unix::ffi::OsStrExt;
        const INVALIDATE_ENTRY: u32 = 3;
        let name = change.name.as_bytes();
        let len = size_of::<OutHeader>() + 16 + name.len() + 1;
        let mut message = Vec::with_capacity(len);
        message.extend_from_slice(&u32::try_from(len).map_err(|_| Errno::ENAMETOOLONG)?.to_ne_bytes());
        message.extend_from_slice(&INVALIDATE_ENTRY.to_ne_bytes());
        message.extend_from_slice(&0u64.to_ne_bytes());
        message.extend_from_slice(&change.parent.0.to_ne_bytes());
        message.extend_from_slice(&u32::try_from(name.len()).map_err(|_| Errno::ENAMETOOLONG)?.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(name);
        message.push(0);
        write(&self.device, &message).map(drop)
    }
}

/// Reads the header of a request (native byte order, as the kernel writes it).
fn header(request: &[u8]) -> Option<InHeader> {
    let u32_at = |at: usize| request.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    let u64_at = |at: usize| request.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_ne_bytes);
    Some(InHeader {
        len: u32_at(0)?,
        opcode: u32_at(4)?,
        unique: u64_at(8)?,
        nodeid: u64_at(16)?,
        uid: u32_at(24)?,
        gid: u32_at(28)?,
        pid: u32_at(32)?,
        ..InHeader::default()
    })
}
