//! The bytes of files: from the cache file into the reply, or from whoever has them.
//!
//! A read whose bytes are all in the cache file is answered from there, into the reply, by the thread that took the
//! request. Otherwise that thread waits for the bytes; it gives up when the kernel says that the reader was interrupted.

use std::io;
use std::ops::Range;

use fuse_backend_rs::api::filesystem::ZeroCopyWriter;
use nydus_rafs::Ino;

use super::Filesystem;
use crate::fuse::errno::FsError;
use crate::instance::Instance;
use crate::sys::reply::Source;

impl Filesystem {
    /// Copies the bytes `range` of a file into the reply; returns how many there were.
    pub(super) fn copy(
        &self,
        instance: &Instance,
        ino: Ino,
        range: Range<u64>,
        reply: &mut dyn ZeroCopyWriter,
    ) -> Result<usize, FsError> {
        let mut at = range.start;
        // Neighbouring chunks are asked for together, so that they can be fetched together.
        let mut run: Option<(u16, Range<u64>)> = None;
        for extent in instance.bootstrap().extents(ino, range.clone())? {
            let extent = extent?;
            if extent.file.start != at {
                return Err(FsError::Gap { ino: ino.0, from: at });
            }
            at = extent.file.end;
            match &mut run {
                Some((blob, plain)) if *blob == extent.blob && plain.end == extent.plain.start => {
                    plain.end = extent.plain.end;
                }
                _ => {
                    if let Some((blob, plain)) = run.replace((extent.blob, extent.plain)) {
                        self.copy_run(instance, ino, blob, plain, reply)?;
                    }
                }
            }
        }
        if let Some((blob, plain)) = run {
            self.copy_run(instance, ino, blob, plain, reply)?;
        }
        if at < range.end {
            return Err(FsError::Gap { ino: ino.0, from: at });
        }
        Ok(usize::try_from(at - range.start).unwrap_or(usize::MAX))
    }

    /// Copies plain bytes of one blob into the reply, fetching what is missing.
    fn copy_run(
        &self,
        instance: &Instance,
        ino: Ino,
        blob: u16,
        plain: Range<u64>,
        reply: &mut dyn ZeroCopyWriter,
    ) -> Result<(), FsError> {
        let blob = instance.blob(blob).ok_or(FsError::Gap { ino: ino.0, from: plain.start })?;
        let len = usize::try_from(plain.end - plain.start).unwrap_or(usize::MAX);
        let mut failed = None;
        let mut source = Source(|buffer: &mut [u8], offset: u64| {
            let read = if blob.serve(buffer, offset) {
                Ok(buffer.len())
            } else {
                // The future is dropped when the reader gives up, and with it what it claimed.
                self.runtime.block_on(async {
                    tokio::select! {
                        biased;
                        read = blob.read(buffer, offset) => read.map_err(FsError::from),
                        () = self.slot.interrupted() => Err(FsError::Interrupted),
                    }
                })
            };
            read.map_err(|error| {
                failed = Some(error);
                // Never EINTR itself: whoever fills the reply would ask again, and again.
                io::ErrorKind::Other.into()
            })
        });
        match reply.write_all_from(&mut source, len, plain.start) {
            Ok(()) => Ok(()),
            Err(error) => Err(failed.take().unwrap_or(FsError::Reply(error))),
        }
    }
}
