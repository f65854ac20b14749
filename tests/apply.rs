//! Random layers, unpacked by containerd and converted by us: the same tree, however odd the layers are.
//!
//! `tests/model.rs` knows what ordinary layers mean. Here nobody knows but containerd: entries come twice, in any order and without
//! their parents, whiteouts remove what is not there, hard links have names that are taken, names lead through symbolic links.
//!
//! `SHOAL_CASES` is the number of images, 60 unless it is set.
#![expect(clippy::print_stdout, reason = "how many images there were to compare is for people to read")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use nydus_tests::containerd::{Containerd, Options};
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::image::{self, Layer};
use nydus_tests::needs::{CONTAINERD, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::tree;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::json;

/// One entry of a layer's tar.
#[derive(Debug, Clone)]
struct Entry {
    path: String,
    kind: Kind,
    mode: u32,
    owner: (u64, u64),
    /// Beyond the layer's own time, in nanoseconds.
    later: u32,
    xattr: Option<u8>,
}

#[derive(Debug, Clone)]
enum Kind {
    File(u32),
    Directory,
    Symlink(String),
    /// To a file that came before in its layer.
    HardLink(prop::sample::Index),
    Fifo,
    Device(u32, u32),
    Whiteout,
    Opaque,
}

const NAMES: [&str; 5] = ["a", "b", ".c", "d é", "wh.e"];

fn paths() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(&NAMES[..]), 1..4).prop_map(|parts| parts.join("/"))
}

fn entries() -> impl Strategy<Value = Entry> {
    let kind = prop_oneof![
        8 => (0_u32..9_000).prop_map(Kind::File),
        6 => Just(Kind::Directory),
        2 => prop_oneof![paths(), paths().prop_map(|path| format!("../{path}")), paths().prop_map(|path| format!("/{path}"))]
            .prop_map(Kind::Symlink),
        3 => any::<prop::sample::Index>().prop_map(Kind::HardLink),
        1 => Just(Kind::Fifo),
        1 => (0_u32..300, 0_u32..300).prop_map(|(major, minor)| Kind::Device(major, minor)),
        3 => Just(Kind::Whiteout),
        2 => Just(Kind::Opaque),
    ];
    let owner = (0_u64..3, 0_u64..70_000);
    (paths(), kind, 0_u32..0o10000, owner, 0_u32..1_000_000_000, prop::option::weighted(0.3, any::<u8>()))
        .prop_map(|(path, kind, mode, owner, later, xattr)| Entry { path, kind, mode, owner, later, xattr })
}

/// Images of up to four layers.
fn images() -> impl Strategy<Value = Vec<Vec<Entry>>> {
    prop::collection::vec(prop::collection::vec(entries(), 1..12), 1..5)
}

/// What names stand for after the layers so far, as far as it takes to draw images that containerd accepts.
#[derive(Default)]
struct Names(BTreeMap<String, char>);

impl Names {
    /// Begins a layer: containerd links to nothing that lies below it.
    fn begin(&mut self) {
        self.0.values_mut().filter(|kind| **kind == 'f').for_each(|kind| *kind = 'o');
    }

    /// Notes an entry; false if its name leads through something that is no directory, or if there is no file to link to.
    fn take(&mut self, entry: &Entry) -> bool {
        let through = |at: &usize| self.0.get(&entry.path[..*at]).is_some_and(|kind| !matches!(kind, 'd' | 'l'));
        if entry.path.match_indices('/').any(|(at, _)| through(&at)) {
            return false;
        }
        let kind = match &entry.kind {
            Kind::File(_) => 'f',
            Kind::Directory | Kind::Opaque => 'd',
            Kind::Symlink(_) => 'l',
            Kind::HardLink(_) if self.files().is_empty() => return false,
            Kind::HardLink(_) => 'f',
            Kind::Fifo | Kind::Device(..) => 'o',
            Kind::Whiteout => {
                self.clear(&entry.path);
                return true;
            }
        };
        if kind != 'd' || self.0.get(&entry.path).is_some_and(|old| *old != 'd') {
            self.clear(&entry.path);
        }
        for (at, _) in entry.path.match_indices('/') {
            self.0.entry(entry.path[..at].to_owned()).or_insert('d');
        }
        self.0.insert(entry.path.clone(), kind);
        true
    }

    fn clear(&mut self, path: &str) {
        self.0.retain(|name, _| name != path && !name.starts_with(&format!("{path}/")));
    }

    fn files(&self) -> Vec<&String> {
        self.0.iter().filter(|(_, kind)| **kind == 'f').map(|(name, _)| name).collect()
    }
}

/// An access control list; an even one says no more than permissions can.
fn acl(value: u8) -> Vec<u8> {
    let bits = u16::from(value) % 8;
    let mut entries = vec![(0x01, 7, u32::MAX)];
    if value % 2 == 1 {
        entries.push((0x02, bits, 5));
    }
    entries.push((0x04, bits, u32::MAX));
    if value % 2 == 1 {
        entries.push((0x10, 5, u32::MAX));
    }
    entries.push((0x20, bits, u32::MAX));
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend([u16::to_le_bytes(tag), u16::to_le_bytes(permissions)].concat());
        list.extend(id.to_le_bytes());
    }
    list
}

fn layer(number: usize, entries: &[Entry], names: &mut Names) -> Result<Layer> {
    names.begin();
    let mut tar = tar::Builder::new(Vec::new());
    let time = 1_600_000_000 + number;
    for (at, entry) in entries.iter().enumerate() {
        let target = match &entry.kind {
            Kind::Symlink(target) => target.clone(),
            Kind::HardLink(which) if !names.files().is_empty() => (*which.get(&names.files())).clone(),
            _ => String::new(),
        };
        if !names.take(entry) || target == entry.path {
            continue;
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(u64::try_from(time)?);
        let mtime = format!("{time}.{:09}", entry.later);
        let mut records = vec![("mtime", mtime.into_bytes())];
        if let (Some(value), Kind::File(_) | Kind::Directory) = (entry.xattr, &entry.kind) {
            records.push(("SCHILY.xattr.user.note", vec![value; usize::from(value)]));
        }
        if let (Some(value), Kind::Directory) = (entry.xattr.filter(|value| value % 3 == 0), &entry.kind) {
            records.push(("SCHILY.xattr.system.posix_acl_default", acl(value)));
        }
        if let (Some(value), Kind::File(_)) = (entry.xattr.filter(|value| value % 3 == 0), &entry.kind) {
            records.push(("SCHILY.xattr.system.posix_acl_access", acl(value)));
        }
        tar.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_slice())))?;
        let path = Path::new(&entry.path);
        let hidden = |name: &str| path.with_file_name(format!(".wh.{name}"));
        let mut empty = |header: &mut tar::Header, kind, path: &Path| {
            header.set_entry_type(kind);
            header.set_size(0);
            tar.append_data(header, path, std::io::empty())
        };
        match &entry.kind {
            Kind::File(size) => {
                let body: Vec<u8> = (0..*size).map(|byte| (byte / 5 + at as u32).to_le_bytes()[0]).collect();
                header.set_size(u64::from(*size));
                tar.append_data(&mut header, path, body.as_slice())?;
            }
            Kind::Directory => empty(&mut header, tar::EntryType::Directory, &path.join(""))?,
            Kind::Fifo => empty(&mut header, tar::EntryType::Fifo, path)?,
            Kind::Device(major, minor) => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                empty(&mut header, tar::EntryType::Char, path)?;
            }
            Kind::Symlink(_) | Kind::HardLink(_) => {
                let kind =
                    if matches!(entry.kind, Kind::Symlink(_)) { tar::EntryType::Symlink } else { tar::EntryType::Link };
                header.set_link_name_literal(&target)?;
                empty(&mut header, kind, path)?;
            }
            Kind::Whiteout => {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                empty(&mut header, tar::EntryType::Regular, &hidden(name))?;
            }
            Kind::Opaque => empty(&mut header, tar::EntryType::Regular, &path.join(".wh..wh..opq"))?,
        }
    }
    Layer::new(&tar.into_inner()?)
}

#[test]
fn random_layers_look_as_containerd_unpacks_them() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let scratch = Scratch::new("apply")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let options = Options::plain(&registry.host);
    let containerd = Containerd::start(&scratch.dir("ctd")?, &options)?;
    let (cases, unpacked) = (Cell::new(0), Cell::new(0));
    let number = std::env::var("SHOAL_CASES").ok().map_or(Ok(60), |cases| cases.parse())?;
    let mut runner =
        TestRunner::new(Config { cases: number, max_shrink_iters: 80, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&images(), |layers| {
        cases.set(cases.get() + 1);
        let check = || -> Result<()> {
            let tag = format!("case{}", cases.get());
            let mut names = Names::default();
            let tars = layers
                .iter()
                .enumerate()
                .map(|(at, entries)| layer(at, entries, &mut names))
                .collect::<Result<Vec<_>>>()?;
            runtime.block_on(image::push(&client, "apply", &tag, &tars, json!({})))?;
            let dir = scratch.dir(&tag)?;
            let source = format!("{}/apply:{tag}", registry.host);
            let root = dir.join("overlay");
            std::fs::create_dir_all(&root)?;
            // What containerd refuses has no tree to compare with.
            let mut pull = containerd.ctr();
            if run(pull.args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &source])).is_err() {
                return Ok(());
            }
            unpacked.set(unpacked.get() + 1);
            run(containerd.ctr().args(["images", "mount", "--snapshotter", "overlayfs", &source]).arg(&root))?;
            let want = tree::read_overlay(&root);
            run(containerd.ctr().args(["images", "unmount"]).arg(&root))?;

            let version = if cases.get() % 2 == 0 { "6" } else { "5" };
            let mut convert = Command::new(shoal("nydusify")?);
            convert.args(["convert", "--fs-version", version, "--source", &source, "--target"]);
            convert.arg(format!("{}/apply:{tag}-nydus", registry.host));
            run(convert.args(["--fs-chunk-size", "0x1000", "--work-dir"]).arg(dir.join("work")))?;
            let image = runtime.block_on(Converted::pull(&client, "apply", &format!("{tag}-nydus"), &dir))?;
            let mounted = Mounted::localfs(&image.bootstrap, &image.blobs, &dir)?;
            let lines = tree::differences(&tree::read(&mounted.path)?, &want?, |_, got, want| {
                // containerd gives directories that no layer lists the time of unpacking.
                if want.kind == 'd' && want.mtime.0 > 1_700_000_000 {
                    got.mtime = want.mtime;
                }
            });
            ensure!(lines.is_empty(), "version {version} differs from containerd:\n{}", lines.join("\n"));
            Ok(())
        };
        check().map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    outcome.map_err(|error| anyhow::anyhow!("{error}"))?;
    println!("containerd took {} of {} images", unpacked.get(), cases.get());
    ensure!(unpacked.get() * 8 > cases.get(), "containerd took only {} of {} images", unpacked.get(), cases.get());
    Ok(())
}
