//! A real image made of Debian packages: a minimal system, Python on it, and an application on that.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::Layer;
use crate::process::run;

/// Prints what a start-up of a real program does: imports, a computation, and a line at the end.
pub const SCRIPT: &str = "import json, ssl, decimal, asyncio, numpy\n\
a = numpy.arange(1_000_000, dtype=float).reshape(1000, 1000)\n\
print('answer', json.dumps({'sum': float((a @ a.T).trace())}))\n";

/// Makes the layers: the minimal system, Python with numpy, and an application that also deletes the manuals.
/// `work` needs about 1 GB.
pub fn python(work: &Path) -> Result<Vec<Layer>> {
    fs::create_dir_all(work)?;
    let tar = work.join("system.tar");
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap.env("SOURCE_DATE_EPOCH", "1735689600").args(["--quiet", "--mode=root", "--variant=minbase"]);
    bootstrap.args(["--include=python3,python3-numpy,ca-certificates", "--format=tar", "bookworm"]).arg(&tar);
    if let Some(mirror) = mirror() {
        bootstrap.arg(mirror);
    }
    run(&mut bootstrap).context("making a Debian system")?;

    let owned = python_files(&tar)?;
    let (mut base, mut python) = (tar::Builder::new(Vec::new()), tar::Builder::new(Vec::new()));
    let mut archive = tar::Archive::new(fs::File::open(&tar)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = PathBuf::from(OsString::from_vec(entry.path_bytes().into_owned()));
        let clean: PathBuf = path.components().filter(|part| !matches!(part, std::path::Component::CurDir)).collect();
        if clean.starts_with("dev") && clean != Path::new("dev") {
            continue;
        }
        let target = if owned.contains(&clean) { &mut python } else { &mut base };
        append(target, &mut entry, &clean)?;
    }
    Ok(vec![Layer::new(&base.into_inner()?)?, Layer::new(&python.into_inner()?)?, Layer::new(&application()?)?])
}

/// Copies an entry with its extended headers: path and link are set anew, the rest is as it was.
fn append(to: &mut tar::Builder<Vec<u8>>, entry: &mut tar::Entry<'_, fs::File>, path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let mut header = entry.header().clone();
    match entry.link_name()? {
        Some(target) if header.entry_type().is_hard_link() || header.entry_type().is_symlink() => {
            let target: PathBuf = if header.entry_type().is_hard_link() {
                target.components().filter(|part| !matches!(part, std::path::Component::CurDir)).collect()
            } else {
                target.into_owned()
            };
            to.append_link(&mut header, path, &target)?;
        }
        _ => {
            let mut body = Vec::new();
            entry.read_to_end(&mut body)?;
            to.append_data(&mut header, path, body.as_slice())?;
        }
    }
    Ok(())
}

/// Returns the paths that belong to Python's packages, from dpkg's own lists in the tar.
fn python_files(tar: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut owned = BTreeSet::new();
    let mut others = BTreeSet::new();
    let mut archive = tar::Archive::new(fs::File::open(tar)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some(name) = path.strip_suffix(".list").and_then(|path| path.rsplit_once("/info/")).map(|(_, name)| name)
        else {
            continue;
        };
        let mut list = String::new();
        entry.read_to_string(&mut list)?;
        let is_python = ["python3", "libpython3", "libblas", "liblapack", "libgfortran", "libquadmath"];
        let set = if is_python.iter().any(|prefix| name.starts_with(prefix)) { &mut owned } else { &mut others };
        set.extend(list.lines().map(|line| PathBuf::from(line.trim_start_matches('/'))));
    }
    Ok(owned.difference(&others).cloned().collect())
}

fn application() -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, mode, body) in
        [("app/main.py", 0o644, SCRIPT), ("usr/share/.wh.man", 0o644, ""), ("usr/share/.wh.locale", 0o644, "")]
    {
        let mut header = tar::Header::new_ustar();
        header.set_mode(mode);
        header.set_mtime(1_735_689_600);
        header.set_size(body.len() as u64);
        tar.append_data(&mut header, path, body.as_bytes())?;
    }
    Ok(tar.into_inner()?)
}

/// Returns the mirror that this machine's own apt uses.
fn mirror() -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path()));
    let words: Vec<String> = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .flat_map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    words.into_iter().find(|word| word.starts_with("http") && word.trim_end_matches('/').ends_with("/debian"))
}

/// Compiles the pause process of pods into a one-file layer.
pub fn pause(work: &Path) -> Result<Layer> {
    fs::create_dir_all(work)?;
    let source = work.join("pause.c");
    fs::write(
        &source,
        "#include <signal.h>\n#include <unistd.h>\nstatic void end(int s) { (void)s; _exit(0); }\n\
         int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }\n",
    )?;
    let binary = work.join("pause");
    run(Command::new("cc").args(["-Os", "-static", "-s", "-o"]).arg(&binary).arg(&source))
        .context("compiling pause")?;
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_path_with_name(&binary, "pause")?;
    Layer::new(&tar.into_inner()?)
}
