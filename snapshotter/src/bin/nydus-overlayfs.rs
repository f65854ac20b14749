//! `nydus-overlayfs`: mounts an overlay for those who cannot pass the options of virtual machines by.
//!
//! With mounts of type `fuse.nydus-overlayfs` the system's `mount.fuse` runs `nydus-overlayfs overlay TARGET -o OPTIONS`. Options
//! that are meant for a virtual machine's runtime are left out; the rest is an ordinary overlay. The kernel takes one page of
//! options, so the directories of a long list are named relative to the directory that they share.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

/// Options that are not for the kernel.
const FOR_VIRTUAL_MACHINES: [&str; 2] = ["extraoption=", "io.katacontainers."];

/// The kernel reads this much, with a final zero.
const PAGE: usize = 4096;

#[expect(clippy::print_stderr, reason = "mount.fuse shows what its helpers print")]
fn main() -> ExitCode {
    match run(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-overlayfs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: impl Iterator<Item = OsString>) -> Result<()> {
    let Request { source, target, options } = Request::parse(args)?;
    let target = std::path::absolute(&target).with_context(|| format!("finding {}", target.display()))?;
    let Options { flags, data, directory } = Options::read(&options)?;
    if let Some(directory) = &directory {
        std::env::set_current_dir(directory).with_context(|| format!("going to {}", directory.display()))?;
    }
    mount(Some(source.as_str()), &target, Some("overlay"), flags, Some(data.as_str()))
        .with_context(|| format!("mounting an overlay on {} with {data}", target.display()))
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    source: String,
    target: PathBuf,
    options: String,
}

impl Request {
    fn parse(args: impl Iterator<Item = OsString>) -> Result<Self> {
        let usage = "usage: nydus-overlayfs overlay TARGET -o OPTIONS";
        let (mut places, mut options) = (Vec::new(), Vec::new());
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.to_str() {
                Some("-o") => {
                    let Some(list) = args.next().and_then(|list| list.into_string().ok()) else {
                        bail!("-o needs options in UTF-8; {usage}");
                    };
                    options.push(list);
                }
                // What mount(8) passes to its helpers and means nothing here.
                Some("-n" | "-s" | "-v" | "-f") => {}
                Some(flag) if flag.starts_with('-') => bail!("flag {flag} is not known; {usage}"),
                _ => places.push(arg),
            }
        }
        let [source, target] = <[OsString; 2]>::try_from(places).ok().context(usage)?;
        let source = source.into_string().ok().context("the source is not UTF-8")?;
        if options.is_empty() {
            bail!("an overlay needs -o lowerdir=...; {usage}");
        }
        Ok(Self { source, target: target.into(), options: options.join(",") })
    }
}

/// Options, sorted.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    data: String,
    /// Where to be when mounting.
    directory: Option<PathBuf>,
}

impl Options {
    fn read(text: &str) -> Result<Self> {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        for option in text.split(',').filter(|option| !option.is_empty()) {
            if FOR_VIRTUAL_MACHINES.iter().any(|prefix| option.starts_with(prefix)) {
                continue;
            }
            match flag(option) {
                Some((bit, true)) => flags |= bit,
                Some((bit, false)) => flags -= bit,
                None => data.push(option.to_owned()),
            }
        }
        if !data.iter().any(|option| option.starts_with("lowerdir=")) {
            bail!("the options name no lowerdir: {text}");
        }
        let joined = data.join(",");
        if joined.len() < PAGE {
            return Ok(Self { flags, data: joined, directory: None });
        }
        let (data, directory) = relative(data);
        if data.len() >= PAGE {
            bail!(
                "the options take {} bytes, and the kernel reads {}: this image has too many layers",
                data.len(),
                PAGE - 1
            );
        }
        Ok(Self { flags, data, directory })
    }
}

/// The kernel's flag for an option, and whether the option sets or clears it.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "defaults" => (MsFlags::empty(), true),
        _ => return None,
    })
}

/// Names lower directories relative to the directory that they share, if it is more than `/`.
fn relative(data: Vec<String>) -> (String, Option<PathBuf>) {
    let lowers: Vec<&Path> = data
        .iter()
        .filter_map(|option| option.strip_prefix("lowerdir="))
        .flat_map(|list| list.split(':'))
        .map(Path::new)
        .collect();
    let shared = lowers.iter().skip(1).fold(lowers.first().and_then(|first| first.parent()), |shared, path| {
        shared.and_then(|shared| shared.ancestors().find(|ancestor| path.starts_with(ancestor)))
    });
    let Some(shared) = shared.filter(|shared| shared.is_absolute() && *shared != Path::new("/")).map(Path::to_path_buf)
    else {
        return (data.join(","), None);
    };
    let shorten = |path: &str| {
        let rest =
            Path::new(path).strip_prefix(&shared).map_or(path.to_owned(), |rest| rest.to_string_lossy().into_owned());
        if rest.is_empty() { ".".to_owned() } else { rest }
    };
    let options: Vec<String> = data
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(list) => format!("lowerdir={}", list.split(':').map(shorten).collect::<Vec<_>>().join(":")),
            None => option.clone(),
        })
        .collect();
    (options.join(","), Some(shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(args: &[&str]) -> Result<Request> {
        Request::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn the_helpers_command_line_is_understood() {
        let got = request(&["overlay", "/t", "-n", "-o", "ro,lowerdir=/a", "-o", "x=y"]).expect("valid");
        let want = Request { source: "overlay".into(), target: "/t".into(), options: "ro,lowerdir=/a,x=y".into() };
        assert_eq!(got, want);
        for bad in
            [&["overlay"][..], &["overlay", "/t"], &["overlay", "/t", "-o"], &["a", "b", "c", "-o", "x"], &["-z"]]
        {
            request(bad).expect_err("incomplete");
        }
    }

    #[test]
    fn options_of_virtual_machines_do_not_reach_the_kernel() {
        let options = Options::read(
            "rw,nosuid,ro,workdir=/w,upperdir=/u,lowerdir=/a:/b,extraoption=eyJ4IjoxfQ==,io.katacontainers.volume=eyJ9,index=off",
        )
        .expect("valid");
        assert_eq!(options.data, "workdir=/w,upperdir=/u,lowerdir=/a:/b,index=off");
        assert_eq!(options.flags, MsFlags::MS_NOSUID | MsFlags::MS_RDONLY);
        assert_eq!(options.directory, None);
        Options::read("ro,extraoption=x").expect_err("nothing to mount");
    }

    #[test]
    fn a_long_list_is_named_from_where_it_is() {
        let lowers: Vec<String> =
            (0..100).map(|layer| format!("/var/lib/somewhere/far/away/indeed/snapshots/{layer}/fs")).collect();
        let text = format!("upperdir=/u,lowerdir={}:/var/lib/somewhere/far/away/indeed/mnt/7", lowers.join(":"));
        let options = Options::read(&text).expect("fits when shortened");
        assert_eq!(options.directory, Some("/var/lib/somewhere/far/away/indeed".into()));
        assert!(options.data.starts_with("upperdir=/u,lowerdir=snapshots/0/fs:snapshots/1/fs:"));
        assert!(options.data.ends_with(":mnt/7"));
        let apart = format!("lowerdir={}:/elsewhere", lowers.join(":"));
        Options::read(&apart).expect_err("a truncated list would be mounted with layers missing");
    }
}
