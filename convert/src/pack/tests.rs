use super::*;

fn small() -> Recipe {
    Recipe { chunk_size: 4096, ..Recipe::default() }
}

/// Chunks of several sizes, many of them the same, some tiny.
fn chunks() -> Vec<Vec<u8>> {
    (0..400_usize).map(|number| vec![(number % 37) as u8; [10, 3000, 4096, 4096, 2500][number % 5]]).collect()
}

fn pack(threads: usize, compressor: Compressor) -> (Vec<Body>, Digest, usize) {
    let pool = Pool::start(threads).unwrap();
    let mut packer =
        Packer::new(&pool, Recipe { compressor, ..small() }, &Arc::default(), Form::InlineToc, Vec::new()).unwrap();
    for chunk in chunks().chunks(7) {
        let body = packer.begin(4096 * 7);
        for piece in chunk {
            packer.push(body, piece.clone()).unwrap();
        }
    }
    let (bodies, blob) = packer.finish().unwrap();
    let count = blob.chunks().len();
    (bodies, blob.seal().unwrap().finish(b"boot").unwrap().digest, count)
}

#[test]
fn the_blob_does_not_depend_on_how_many_threads_made_it() {
    for compressor in [Compressor::None, Compressor::Lz4Block, Compressor::Zstd] {
        let one = pack(1, compressor);
        for threads in [2, 3, 8] {
            assert_eq!(pack(threads, compressor), one);
        }
    }
}

#[test]
fn a_chunk_is_stored_once_however_often_it_comes() {
    let (bodies, _, count) = pack(4, Compressor::Zstd);
    let different: std::collections::BTreeSet<Vec<u8>> = chunks().into_iter().collect();
    assert_eq!(count, different.len());
    assert_eq!(bodies.iter().map(|body| body.chunks.len()).sum::<usize>(), 400);
}

#[test]
fn a_full_disk_is_an_error_that_names_the_chunk() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let pool = Pool::start(2).unwrap();
    let recipe = Recipe { compressor: Compressor::None, ..small() };
    let mut packer = Packer::new(&pool, recipe, &Arc::default(), Form::Plain, Full(10_000)).unwrap();
    let body = packer.begin(4096 * 7);
    let failed = chunks().into_iter().find_map(|chunk| packer.push(body, chunk).err());
    let failed = failed.or_else(|| packer.finish().err());
    assert!(matches!(failed, Some(PackError::Write { chunk: 3.., .. })), "{failed:?}");
}
