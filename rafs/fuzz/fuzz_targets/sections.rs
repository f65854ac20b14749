//! Any bytes as a blob with tar headers and a table of contents.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use nydus_rafs::blob::section;
use nydus_rafs::blob::toc::Toc;

fuzz_target!(|bytes: &[u8]| {
    let _ = Toc::parse(bytes);
    let mut blob = Cursor::new(bytes);
    let _ = section::locate(&mut blob);
    let _ = section::read_bootstrap(&mut blob);
});
