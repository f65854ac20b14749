use std::fs;

use nydus_rafs::{Algorithm, Bootstrap, Compressor, NodeKind, Tree};

use super::*;
use crate::image::{check, merge};
use crate::tar::made::{Made, item};

fn request(source: Source, path: &Path, out: &Path) -> Request {
    Request {
        source,
        path: path.to_owned(),
        blob: BlobPlace::Directory(out.to_owned()),
        bootstrap: BootstrapPlace::File(out.join("bootstrap")),
        toc: false,
        blob_id: None,
        recipe: Recipe { compressor: Compressor::Lz4Block, chunk_size: 4096, ..Recipe::default() },
        prefetch: Vec::new(),
        prefetch_policy: PrefetchPolicy::None,
        repeatable: false,
        parent: None,
        dictionary: None,
    }
}

fn tar(path: &Path, layer: &[(&str, &[u8])]) {
    let items = layer.iter().map(|(name, body)| item(name, b'0').body(body));
    fs::write(path, Made::of(items)).unwrap();
}

#[test]
fn a_directory_and_a_tar_of_it_make_the_same_blob_named_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&out).unwrap();
    let files: [(&str, &[u8]); 3] = [("a", &[1; 9000]), ("b", b"text"), ("c", b"")];
    for (name, body) in files {
        fs::write(tree.join(name), body).unwrap();
    }
    let archive = dir.path().join("tar");
    tar(&archive, &files);
    let one = create(&request(Source::Directory(Whiteouts::Oci), &tree, &out)).unwrap();
    let other = create(&request(Source::Tar, &archive, &out)).unwrap();
    assert_eq!((one.blobs.len(), &one.blobs), (1, &other.blobs));
    let stored = fs::read(out.join(&one.blobs[0])).unwrap();
    assert_eq!(Algorithm::Sha256.digest(&stored).to_string(), one.blobs[0]);
    let left: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "the blob and the bootstrap, nothing else: {left:?}");
}

#[test]
fn layers_merge_by_the_names_of_their_files_and_implied_directories_keep_what_is_below() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("tar");
    let lower = [item("d", b'5').mode(0o1777), item("d/gone", b'0').body("x"), item("d/kept", b'0').body("y")];
    let upper = [item("d/.wh.gone", b'0'), item("d/new", b'0').body("z")];
    let mut sources = Vec::new();
    for (number, items) in [lower.to_vec(), upper.to_vec()].into_iter().enumerate() {
        fs::write(&archive, Made::of(items)).unwrap();
        let blob = dir.path().join(format!("blob{number}"));
        let request = Request {
            blob: BlobPlace::File(blob.clone()),
            bootstrap: BootstrapPlace::Inline,
            toc: true,
            ..request(Source::Tar, &archive, dir.path())
        };
        create(&request).unwrap();
        let stored = fs::read(&blob).unwrap();
        let boot = nydus_rafs::blob::section::read_bootstrap(&mut io::Cursor::new(&stored)).unwrap();
        let source = dir.path().join(Algorithm::Sha256.digest(&stored).to_string());
        fs::write(&source, boot).unwrap();
        sources.push(source);
    }
    let bootstrap = dir.path().join("merged");
    let request = merge::Request { sources: sources.clone(), bootstrap: Some(bootstrap.clone()), ..Default::default() };
    let report = merge::merge(&request).unwrap();
    let names: Vec<_> = sources.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(report.blobs, names);
    let tree = Tree::read(&Bootstrap::open(fs::read(&bootstrap).unwrap()).unwrap()).unwrap();
    let d = tree.node(tree.find(Path::new("/d")).unwrap());
    let NodeKind::Directory(children) = &d.kind else { panic!("{d:?}") };
    assert_eq!((children.len(), d.stat.permissions, d.xattrs.len()), (2, 0o1777, 0));
    let mut text = Vec::new();
    check::check(&bootstrap, false, &mut text, None).unwrap();
    assert!(String::from_utf8(text).unwrap().contains(names[1]));
    let wrong = merge::Request { blob_sizes: vec![1], ..request };
    assert!(merge::merge(&wrong).unwrap_err().to_string().contains("doesn't match number of sources 2"));
}

#[test]
fn layers_of_different_chunk_sizes_do_not_merge() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("tar");
    tar(&archive, &[("a", b"x")]);
    let mut sources = Vec::new();
    for chunk_size in [4096, 8192] {
        let mut request = request(Source::Tar, &archive, dir.path());
        request.recipe.chunk_size = chunk_size;
        let path = dir.path().join(chunk_size.to_string());
        request.bootstrap = BootstrapPlace::File(path.clone());
        create(&request).unwrap();
        sources.push(path);
    }
    let request = merge::Request { sources, bootstrap: Some(dir.path().join("merged")), ..Default::default() };
    let error = merge::merge(&request).unwrap_err();
    assert!(error.downcast_ref::<merge::Incompatible>().is_some(), "{error}");
    assert!(!dir.path().join("merged").exists());
}

/// Returns names and contents of the files of an image.
fn contents(bootstrap: &Path, blobs: &Path) -> Vec<(String, String)> {
    let backend = nydus_backend::Config::from_parts("localfs", serde_json::json!({ "dir": blobs })).unwrap();
    let tar = blobs.join("unpacked");
    crate::image::unpack::unpack(open(bootstrap).unwrap(), &backend, &tar).unwrap();
    let mut archive = crate::tar::Archive::new(File::open(tar).unwrap());
    let mut found = Vec::new();
    while let Some(entry) = archive.next_entry().unwrap() {
        let mut body = vec![0; entry.size as usize];
        archive.read_body_exact(&mut body).unwrap();
        found.push((entry.name(), String::from_utf8(body).unwrap().trim_matches('-').to_owned()));
    }
    found
}

/// Text that makes a chunk of its own.
fn long(text: &str) -> String {
    format!("{text}{}", "-".repeat(3000))
}

#[test]
fn chunks_of_a_dictionary_are_not_stored_again_in_either_version() {
    for version in [nydus_rafs::Version::V5, nydus_rafs::Version::V6] {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("tar");
        let recipe = Recipe { version, compressor: Compressor::None, chunk_size: 4096, ..Recipe::default() };
        let of = |name: &str| Request {
            recipe,
            bootstrap: BootstrapPlace::File(dir.path().join(name)),
            ..request(Source::Tar, &archive, dir.path())
        };
        tar(&archive, &[("a", long("one").as_bytes()), ("b", long("two").as_bytes())]);
        let base = create(&of("base")).unwrap();
        tar(&archive, &[("d/c", long("two").as_bytes()), ("e", long("three").as_bytes())]);
        let more = create(&Request { dictionary: Some(dir.path().join("base")), ..of("more") }).unwrap();
        // Files of a directory come before those of its directories, so that the own blob is used first.
        assert_eq!((more.blobs.len(), &more.blobs[1]), (2, &base.blobs[0]));
        let stored = fs::read(dir.path().join(&more.blobs[0])).unwrap();
        assert!(!stored.windows(3).any(|bytes| bytes == b"two"), "the dictionary has it");
        let wanted = [("d/", ""), ("d/c", "two"), ("e", "three")];
        let found = contents(&dir.path().join("more"), dir.path());
        assert_eq!(found, wanted.map(|(name, body)| (name.to_owned(), body.to_owned())));
        let unlike = Request { dictionary: Some(dir.path().join("base")), ..of("unlike") };
        let unlike = Request { recipe: Recipe { chunk_size: 8192, ..recipe }, ..unlike };
        assert!(format!("{:#}", create(&unlike).unwrap_err()).contains("its chunk size is 4096"));
    }
    // Version 5 names one compressor for all blobs.
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("tar");
    tar(&archive, &[("a", long("one").as_bytes())]);
    let v5 = |compressor, name: &str| {
        let recipe = Recipe { version: nydus_rafs::Version::V5, compressor, chunk_size: 4096, ..Recipe::default() };
        let bootstrap = BootstrapPlace::File(dir.path().join(name));
        Request { recipe, bootstrap, ..request(Source::Tar, &archive, dir.path()) }
    };
    create(&v5(Compressor::Zstd, "base")).unwrap();
    let mixed = Request { dictionary: Some(dir.path().join("base")), ..v5(Compressor::None, "mixed") };
    assert!(create(&mixed).unwrap_err().to_string().contains("another compressor"));
    assert!(!dir.path().join("mixed").exists());
}

#[test]
fn a_directory_is_laid_on_its_parent_with_its_whiteouts_and_opaque_directories() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
    for path in ["tree/d/old", "out"] {
        fs::create_dir_all(dir.path().join(path)).unwrap();
    }
    for (name, body) in [("a", "one"), ("b", "two"), ("d/old/x", "three")] {
        fs::write(tree.join(name), body).unwrap();
    }
    create(&request(Source::Directory(Whiteouts::Oci), &tree, &out)).unwrap();
    fs::remove_dir_all(&tree).unwrap();
    fs::create_dir_all(tree.join("d")).unwrap();
    for (name, body) in [(".wh.a", ""), ("d/.wh..wh..opq", ""), ("d/new", "four")] {
        fs::write(tree.join(name), body).unwrap();
    }
    let bootstrap = out.join("upper");
    let upper = Request {
        bootstrap: BootstrapPlace::File(bootstrap.clone()),
        parent: Some(out.join("bootstrap")),
        ..request(Source::Directory(Whiteouts::Oci), &tree, &out)
    };
    let report = create(&upper).unwrap();
    assert_eq!(report.blobs.len(), 2, "the parent's and its own");
    let wanted = [("b", "two"), ("d/", ""), ("d/new", "four")];
    assert_eq!(contents(&bootstrap, &out), wanted.map(|(name, body)| (name.to_owned(), body.to_owned())));
}

#[test]
fn names_of_whiteouts_are_only_names_where_whiteouts_are_of_another_kind() {
    for whiteouts in [Whiteouts::Overlayfs, Whiteouts::None] {
        let dir = tempfile::tempdir().unwrap();
        let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
        fs::create_dir_all(&tree).unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(tree.join("a"), "one").unwrap();
        fs::write(tree.join(".wh.below"), "two").unwrap();
        create(&request(Source::Directory(whiteouts), &tree, &out)).unwrap();
        fs::remove_file(tree.join("a")).unwrap();
        fs::write(tree.join(".wh.a"), "").unwrap();
        let bootstrap = out.join("upper");
        let upper = Request {
            bootstrap: BootstrapPlace::File(bootstrap.clone()),
            parent: Some(out.join("bootstrap")),
            ..request(Source::Directory(whiteouts), &tree, &out)
        };
        create(&upper).unwrap();
        let wanted = [(".wh.a", ""), (".wh.below", "two"), ("a", "one")];
        assert_eq!(contents(&bootstrap, &out), wanted.map(|(name, body)| (name.to_owned(), body.to_owned())));
    }
}

#[test]
fn a_cache_holds_plain_chunks_at_their_plain_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("tar");
    tar(&archive, &[("a", b"one"), ("b", &[7; 5000])]);
    let gzip = dir.path().join("tar.gz");
    let mut encoder = flate2::write::GzEncoder::new(File::create(&gzip).unwrap(), flate2::Compression::fast());
    io::copy(&mut File::open(&archive).unwrap(), &mut encoder).unwrap();
    encoder.finish().unwrap();
    let recipe = Recipe { compressor: Compressor::None, chunk_size: 4096, ..Recipe::default() };
    for (source, path) in [(Source::Tar, &archive), (Source::Reference, &gzip)] {
        let request =
            Request { recipe, blob: BlobPlace::Cache(dir.path().to_owned()), ..request(source, path, dir.path()) };
        let report = create(&request).unwrap();
        let data = fs::read(dir.path().join(format!("{}.blob.data", report.blobs[0]))).unwrap();
        assert_eq!(
            (data.len(), &data[..4], data[4096], data[8192 + 903], data[8192 + 904]),
            (12288, &b"one\0"[..], 7, 7, 0)
        );
        let meta = fs::read(dir.path().join(format!("{}.blob.meta", report.blobs[0]))).unwrap();
        assert_eq!(meta.len(), 8192, "the table in a page, and its header");
    }
}

#[test]
fn layers_known_from_their_tables_of_contents_are_laid_on_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, offset: u64| {
        serde_json::json!({"name": name, "type": "reg", "size": 5, "mode": 0o644, "offset": offset,
            "chunkDigest": format!("sha256:{}", Algorithm::Sha256.digest(name.as_bytes()))})
    };
    let layers = [
        vec![
            serde_json::json!({"name": "d/", "type": "dir", "mode": 0o1777}),
            file("d/a", 0),
            file("d/b", 100),
            serde_json::json!({"name": ".wh.nothing", "type": "reg"}),
        ],
        vec![serde_json::json!({"name": "d/.wh.a", "type": "reg"}), file("d/c", 0), file("e/f", 50)],
    ];
    let mut parent = None;
    for (number, entries) in layers.into_iter().enumerate() {
        let toc = dir.path().join(format!("toc{number}"));
        fs::write(&toc, serde_json::json!({"version": 1, "entries": entries}).to_string()).unwrap();
        let source = Source::Toc { data_size: 1000, chunk_size: None, image: true };
        let bootstrap = dir.path().join(format!("boot{number}"));
        let request = Request {
            blob: BlobPlace::Nowhere,
            bootstrap: BootstrapPlace::File(bootstrap.clone()),
            blob_id: Some(Algorithm::Sha256.digest(&[number as u8]).into()),
            recipe: Recipe { compressor: Compressor::Gzip, algorithm: Algorithm::Sha256, ..Recipe::default() },
            parent,
            ..request(source, &toc, dir.path())
        };
        assert_eq!(create(&request).unwrap().blobs.len(), number + 1);
        parent = Some(bootstrap);
    }
    let image = Bootstrap::open(fs::read(parent.unwrap()).unwrap()).unwrap();
    let tree = Tree::read(&image).unwrap();
    let names = |id| tree.children(id).unwrap().keys().map(|name| name.to_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(names(Tree::ROOT), ["d", "e"]);
    let d = tree.children(Tree::ROOT).unwrap()[std::ffi::OsStr::new("d")];
    let e = tree.children(Tree::ROOT).unwrap()[std::ffi::OsStr::new("e")];
    assert_eq!((names(d), tree.node(d).stat.permissions), (vec!["b", "c"], 0o1777));
    assert!(tree.node(e).xattrs.is_empty(), "nothing tells that the directory was implied");
    let places = [(0, 100..1000), (1, 0..50), (1, 50..1000)];
    let found = (0..2)
        .flat_map(|blob| image.chunks(blob).unwrap().all().to_vec().into_iter().map(move |chunk| (blob, chunk.stored)));
    assert_eq!(found.collect::<Vec<_>>(), places);
}
