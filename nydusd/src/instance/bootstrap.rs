//! Finding the bootstrap in the file that a mount names.
//!
//! Usually the file is the bootstrap. It may also be a data blob that carries its bootstrap inside (`image.boot`); that
//! bootstrap cannot know the digest of the blob around it, so the blob's name is then the name of the file up to
//! its first dot.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nydus_backend::{Route, Urgency};
use nydus_rafs::blob::format::features;
use nydus_rafs::blob::section;
use nydus_rafs::blob::table::BlobTable;
use nydus_rafs::{BlobInfo, Bootstrap, ChunkTable};

use super::{InstanceError, named_by};
use crate::store::{ReadError, Table};

/// Largest bootstrap that is taken into memory: a million entries take about 300 MB.
const LARGEST: u64 = 2 << 30;

/// The first bytes of a v5 bootstrap (`RAFS` as a little-endian number).
const V5_MAGIC: [u8; 4] = [0x53, 0x46, 0x41, 0x52];

/// The magic of EROFS, at byte 1,024 of a v6 bootstrap.
const V6_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];

/// Reads and checks the bootstrap in `path`.
pub(super) fn load(path: &Path) -> Result<Bootstrap<Vec<u8>>, InstanceError> {
    let unread = |source| InstanceError::ReadBootstrap { path: path.to_owned(), source };
    // A pipe without a writer would keep us waiting for one.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut file = opened.map_err(unread)?;
    let meta = file.metadata().map_err(unread)?;
    if !meta.is_file() {
        return Err(unread(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let bytes = if inside(&file) {
        let source = section::read_bootstrap(&mut file);
        source.map_err(|source| InstanceError::Inlined { path: path.to_owned(), source: Box::new(source) })?
    } else if meta.len() > LARGEST {
        return Err(InstanceError::TooLarge { path: path.to_owned(), size: meta.len() });
    } else {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(unread)?;
        bytes
    };
    let damaged = |source| InstanceError::Bootstrap { path: path.to_owned(), source };
    let mut bootstrap = Bootstrap::open(bytes).map_err(damaged)?;
    if bootstrap.blobs().iter().any(|blob| blob.id.as_str() == BlobInfo::PLACEHOLDER) {
        let id = named_by(path).ok_or_else(|| InstanceError::Unnamed { path: path.to_owned() })?;
        bootstrap.name_inlined_blob(&id);
    }
    Ok(bootstrap)
}

/// Returns whether the file is none of a bootstrap but ends as a blob with sections does.
fn inside(file: &File) -> bool {
    let mut head = [0; 1028];
    if file.read_exact_at(&mut head, 0).is_ok() && (head[..4] == V5_MAGIC || head[1024..] == V6_MAGIC) {
        return false;
    }
    let mut file = file;
    section::locate(&mut file).is_ok_and(|sections| !sections.is_empty())
}

/// Says where the chunks of a blob are described. Native blobs are described by the bootstrap; where chunks are parts of
/// something larger, or the bootstrap says nothing, the blob's own table is fetched by the first read.
pub(super) fn table(info: &BlobInfo, known: ChunkTable, route: &Route) -> Table {
    let native = !known.all().is_empty() && !info.has(features::ZRAN) && !info.has(features::BATCH);
    let Some(location) = info.table.clone().filter(|_| !native) else {
        return Table::Known(known);
    };
    let (info, known, route) = (info.clone(), Arc::new(known), route.clone());
    Table::Lazy(Box::new(move || {
        let (info, known, route, location) = (info.clone(), known.clone(), route.clone(), location.clone());
        Box::pin(async move {
            let object = info.table_object();
            let stored = route
                .read(&object, location.with_header(), Urgency::Demand)
                .await
                .map_err(|source| ReadError::TableSource { blob: info.id.clone(), source: Box::new(source) })?;
            let read = BlobTable::read(&info, &stored).and_then(|table| table.with_digests(&known));
            read.map_err(|source| ReadError::TableFormat { blob: info.id.clone(), source })
        })
    }))
}
