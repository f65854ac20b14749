use std::fs;

use nydus_rafs::{Bootstrap, Compressor, NodeKind, Tree};

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
