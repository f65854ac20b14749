//! Any bytes as the chunk table of a blob of any features, and as the stored bytes of its chunks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nydus_rafs::blob::format::TABLE_HEADER_SIZE;
use nydus_rafs::blob::table::BlobTable;
use nydus_rafs::bootstrap::TableLocation;
use nydus_rafs::{Algorithm, BlobInfo, Compressor, Verified};

fuzz_target!(|input: ([u8; 8], &[u8], &[u8])| {
    let (words, table, stored) = input;
    let compressor = Compressor::from_code(u32::from(words[0] % 4)).unwrap_or(Compressor::None);
    let mut info = BlobInfo::new("blob".parse().expect("a name"), compressor, Algorithm::Blake3);
    info.features |= u32::from(u16::from_le_bytes([words[1], words[2]])) & 0xffe;
    info.chunk_count = u32::from(words[3]);
    // The header must name the same numbers: put it there.
    let plain_size = u64::from(u32::from_le_bytes([words[4], words[5], words[6], words[7]]));
    info.table = Some(TableLocation { stored: 0..table.len() as u64, plain_size, compressor });
    let mut object = table.to_vec();
    let mut header = vec![0; TABLE_HEADER_SIZE as usize];
    header[..4].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[4092..].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[8..12].copy_from_slice(&compressor.code().to_le_bytes());
    header[12..16].copy_from_slice(&info.chunk_count.to_le_bytes());
    header[24..32].copy_from_slice(&(table.len() as u64).to_le_bytes());
    header[32..40].copy_from_slice(&plain_size.to_le_bytes());
    header[40..48].copy_from_slice(&(u64::from(info.chunk_count) * 24).to_le_bytes());
    header[56..60].copy_from_slice(&u32::from(words[0] >> 2).to_le_bytes());
    object.extend_from_slice(&header);
    if let Ok(table) = BlobTable::read(&info, &object) {
        for chunk in table.chunks().iter().take(8) {
            let len = (chunk.stored.end - chunk.stored.start) as usize;
            let _ = Verified::trusting(chunk, &stored[..len.min(stored.len())]);
        }
    }
});
