//! Random images through the converter and the mount, against a model of what layers mean.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use nydus_rafs::Algorithm;
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::image::{self, Layer};
use nydus_tests::needs::{Need, met};
use nydus_tests::oracle::{self, Erofs};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Record, Table};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::json;

/// What a layer does to one path. Whether it can (the parent is a directory, …) is decided by the model.
#[derive(Debug, Clone)]
enum Act {
    File { size: u32, mode: u32, xattr: bool },
    Directory { mode: u32 },
    Opaque { mode: u32 },
    Symlink { target: String },
    HardLink,
    Fifo { mode: u32 },
    Device { major: u32, minor: u32 },
    Remove,
}

type Step = (Vec<u8>, Act);

fn acts() -> impl Strategy<Value = Act> {
    let mode = 0_u32..0o10000;
    prop_oneof![
        8 => (0_u32..40_000, mode.clone(), any::<bool>()).prop_map(|(size, mode, xattr)| Act::File { size, mode, xattr }),
        6 => mode.clone().prop_map(|mode| Act::Directory { mode }),
        1 => mode.clone().prop_map(|mode| Act::Opaque { mode }),
        2 => "[a-z/.]{1,80}".prop_map(|target| Act::Symlink { target }),
        2 => Just(Act::HardLink),
        1 => mode.prop_map(|mode| Act::Fifo { mode }),
        1 => (0_u32..4096, 0_u32..70_000).prop_map(|(major, minor)| Act::Device { major, minor }),
        3 => Just(Act::Remove),
    ]
}

/// Paths of up to four parts over few names, so that layers meet.
fn layers() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let path = prop::collection::vec(0_u8..4, 1..4);
    prop::collection::vec(prop::collection::vec((path, acts()), 1..30), 1..4)
}

fn path_of(parts: &[u8]) -> PathBuf {
    let names = ["a", "b-longer-name", ".c", "d é"];
    parts.iter().map(|part| names[usize::from(*part)]).collect()
}

/// The model: what is mounted after the layers so far, and the tar of the layer under way.
struct Model {
    table: Table,
    /// Names that share an inode; they are left alone from then on, so that every link count stays true.
    linked: BTreeSet<PathBuf>,
    touched: BTreeSet<PathBuf>,
    tar: tar::Builder<Vec<u8>>,
    clock: u64,
}

impl Model {
    fn new() -> Self {
        Self {
            table: Table::from([(PathBuf::new(), record('d', 0o755, (0, 0)))]),
            linked: BTreeSet::new(),
            touched: BTreeSet::new(),
            tar: tar::Builder::new(Vec::new()),
            clock: 1_600_000_000,
        }
    }

    fn layer(&mut self, steps: &[Step]) -> Result<Layer> {
        self.touched.clear();
        let below: BTreeSet<PathBuf> = self.table.keys().cloned().collect();
        let mut last_file = None;
        for (parts, act) in steps {
            let path = path_of(parts);
            if self.fits(&path, act, &below) {
                self.act(&path, act, &mut last_file)?;
            }
        }
        let tar = std::mem::replace(&mut self.tar, tar::Builder::new(Vec::new())).into_inner()?;
        Layer::new(&tar)
    }

    /// Each path is touched once per layer, parents are directories, and what is removed was there before.
    fn fits(&self, path: &Path, act: &Act, below: &BTreeSet<PathBuf>) -> bool {
        let parent_is_dir =
            path.parent().is_some_and(|parent| self.table.get(parent).is_some_and(|record| record.kind == 'd'));
        let under = |set: &BTreeSet<PathBuf>| set.iter().any(|other| other.starts_with(path));
        let exists = self.table.contains_key(path);
        parent_is_dir
            && !under(&self.touched)
            && !under(&self.linked)
            && match act {
                Act::Remove => below.contains(path) && exists,
                Act::HardLink => true,
                _ => true,
            }
    }

    fn act(&mut self, path: &Path, act: &Act, last_file: &mut Option<PathBuf>) -> Result<()> {
        let parents: Vec<PathBuf> = path.ancestors().skip(1).map(Path::to_owned).collect();
        for parent in parents.into_iter().rev().filter(|parent| !parent.as_os_str().is_empty()) {
            self.restate(&parent)?;
        }
        self.clock += 1;
        let time = (i64::try_from(self.clock)?, 0);
        match act {
            Act::File { size, mode, xattr } => {
                let step = u32::try_from(self.clock % 251)? + 1;
                let body: Vec<u8> = (0..*size).map(|i| (i / 7).wrapping_mul(step).to_le_bytes()[0]).collect();
                let mut new = record('f', *mode, time);
                new.nlink = Some(1);
                new.size = Some(u64::from(*size));
                new.content = Some(Algorithm::Sha256.digest(&body));
                if *xattr {
                    let value = b"line\nline\0end".to_vec();
                    self.tar.append_pax_extensions([("SCHILY.xattr.user.note", value.as_slice())])?;
                    new.xattrs.insert(b"user.note".to_vec(), value);
                }
                let mut header = self.header(tar::EntryType::Regular, *mode, u64::from(*size));
                self.tar.append_data(&mut header, path, body.as_slice())?;
                self.put(path, new);
                *last_file = Some(path.to_owned());
            }
            Act::Directory { mode } | Act::Opaque { mode } => {
                let mut header = self.header(tar::EntryType::Directory, *mode, 0);
                self.tar.append_data(&mut header, path.join(""), std::io::empty())?;
                let opaque = matches!(act, Act::Opaque { .. });
                if opaque {
                    let mut header = self.header(tar::EntryType::Regular, 0o644, 0);
                    self.tar.append_data(&mut header, path.join(".wh..wh..opq"), std::io::empty())?;
                }
                let new = record('d', *mode, time);
                if self.table.get(path).is_some_and(|old| old.kind == 'd') && !opaque {
                    self.table.insert(path.to_owned(), new);
                } else {
                    self.put(path, new);
                }
            }
            Act::Symlink { target } => {
                let mut header = self.header(tar::EntryType::Symlink, 0o777, 0);
                header.set_link_name_literal(target)?;
                self.tar.append_data(&mut header, path, std::io::empty())?;
                let mut new = record('l', 0o777, time);
                new.nlink = Some(1);
                new.size = Some(target.len() as u64);
                new.target = Some(target.clone().into_bytes());
                self.put(path, new);
            }
            Act::HardLink => {
                let Some(target) = last_file.clone().filter(|file| !self.linked.contains(file) && *file != path) else {
                    return Ok(());
                };
                let Some(mut file) = self.table.get(&target).filter(|record| record.kind == 'f').cloned() else {
                    return Ok(());
                };
                let mut header = self.header(tar::EntryType::Link, file.permissions, 0);
                header.set_mtime(u64::try_from(file.mtime.0)?);
                self.tar.append_link(&mut header, path, &target)?;
                file.nlink = Some(2);
                self.put(path, file.clone());
                self.table.insert(target.clone(), file);
                self.linked.extend([target, path.to_owned()]);
            }
            Act::Fifo { mode } => {
                let mut header = self.header(tar::EntryType::Fifo, *mode, 0);
                self.tar.append_data(&mut header, path, std::io::empty())?;
                let mut new = record('p', *mode, time);
                new.nlink = Some(1);
                self.put(path, new);
            }
            Act::Device { major, minor } => {
                let mut header = self.header(tar::EntryType::Block, 0o600, 0);
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                self.tar.append_data(&mut header, path, std::io::empty())?;
                let mut new = record('b', 0o600, time);
                new.nlink = Some(1);
                new.rdev = Some(nix::sys::stat::makedev(u64::from(*major), u64::from(*minor)));
                self.put(path, new);
            }
            Act::Remove => {
                let mut name = std::ffi::OsString::from(".wh.");
                name.push(path.file_name().unwrap_or_default());
                let mut header = self.header(tar::EntryType::Regular, 0o644, 0);
                self.tar.append_data(&mut header, path.with_file_name(name), std::io::empty())?;
                self.clear(path);
            }
        }
        self.touched.insert(path.to_owned());
        Ok(())
    }

    /// Writes a directory's own entry once per layer, so that nothing is left to be implied.
    fn restate(&mut self, dir: &Path) -> Result<()> {
        if self.touched.insert(dir.to_owned()) {
            self.clock += 1;
            let mode = self.table.get(dir).map_or(0o755, |record| record.permissions);
            let mut header = self.header(tar::EntryType::Directory, mode, 0);
            self.tar.append_data(&mut header, dir.join(""), std::io::empty())?;
            let time = (i64::try_from(self.clock)?, 0);
            self.table.insert(dir.to_owned(), record('d', mode, time));
        }
        Ok(())
    }

    fn put(&mut self, path: &Path, new: Record) {
        self.clear(path);
        self.table.insert(path.to_owned(), new);
    }

    fn clear(&mut self, path: &Path) {
        self.table.retain(|other, _| !other.starts_with(path));
    }

    fn header(&self, kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(self.clock);
        header
    }
}

fn record(kind: char, permissions: u32, mtime: (i64, i64)) -> Record {
    Record {
        kind,
        permissions,
        uid: 0,
        gid: 0,
        mtime,
        nlink: None,
        size: None,
        rdev: None,
        content: None,
        target: None,
        xattrs: BTreeMap::new(),
    }
}

#[test]
fn random_layers_show_through_the_mount_what_the_model_says() -> Result<()> {
    let needs = [Need::Root, Need::Fuse, Need::ErofsFiles, Need::Program("docker-registry")];
    if !met(&needs) || !met(&[Need::Program("fsck.erofs"), Need::Program("python3")]) {
        return Ok(());
    }
    let scratch = Scratch::new("model")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let cases = Cell::new(0);
    let mut runner =
        TestRunner::new(Config { cases: 40, max_shrink_iters: 60, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&layers(), |layers| {
        cases.set(cases.get() + 1);
        let tag = format!("case{}", cases.get());
        let check = || -> Result<()> {
            let mut model = Model::new();
            let tars = layers.iter().map(|steps| model.layer(steps)).collect::<Result<Vec<_>>>()?;
            runtime.block_on(image::push(&client, "model", &tag, &tars, json!({})))?;
            let dir = scratch.dir(&tag)?;
            let mut convert = Command::new(shoal("nydusify")?);
            convert.arg("convert").arg("--source").arg(format!("{}/model:{tag}", registry.host));
            convert.arg("--target").arg(format!("{}/model:{tag}-nydus", registry.host));
            run(convert.args(["--fs-chunk-size", "0x1000", "--work-dir"]).arg(dir.join("work")))?;
            let image = runtime.block_on(Converted::pull(&client, "model", &format!("{tag}-nydus"), &dir))?;
            let mounted = Mounted::localfs(&image.bootstrap, &image.blobs, &dir)?;
            let got = tree::read(&mounted.path)?;
            let lines = tree::differences(&got, &model.table, |path, got, want| {
                // No tar lists its root.
                if path.as_os_str().is_empty() {
                    got.mtime = want.mtime;
                }
            });
            ensure!(lines.is_empty(), "{}", lines.join("\n"));

            // Readers that share no code with us agree.
            let manifest = dir.join("manifest.jsonl");
            oracle::manifest(&mounted.path, &manifest)?;
            oracle::verify(&image.bootstrap, &image.blobs, &manifest, "")?;
            let devices = image.devices(&dir.join("devices"))?;
            oracle::fsck(&image.bootstrap, &devices)?;
            let kernel = Erofs::mount(&image.bootstrap, &devices, &dir.join("erofs"))?;
            let lines = tree::differences(&tree::read(&kernel.path)?, &got, |_, _, _| {});
            ensure!(lines.is_empty(), "the kernel's EROFS: {}", lines.join("\n"));
            Ok(())
        };
        check().map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    outcome.map_err(|error| anyhow::anyhow!("{error}"))
}
