//! Strange images: what containerd's overlayfs unpacks of them is what our mount shows, and what it refuses we refuse.
//!
//! The cases and the verdict on each are data in [`cases`]. One containerd judges all of them; a verdict that is not
//! containerd's any more fails the test too, so the table stays true. `SHOAL_CONTAINERD` names another containerd than the
//! installed one.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use nydus_backend::registry::Client;
use nydus_tests::containerd::{Containerd, Options};
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::image;
use nydus_tests::liar::Liar;
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::oracle::Erofs;
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Record, Table};

#[path = "strange/cases.rs"]
mod cases;
#[path = "strange/large.rs"]
mod large;
#[path = "strange/lies.rs"]
mod lies;
#[path = "strange/image.rs"]
mod made;

use self::cases::{Case, Source, Verdict};

/// Cases under way at once: most of a case is waiting for programs to start.
const AT_ONCE: usize = 4;

struct Court {
    scratch: Scratch,
    registry: Registry,
    liar: Liar,
    containerd: Containerd,
    client: Client,
    /// Seconds since 1970 at which the first image was unpacked.
    begun: i64,
}

#[tokio::test(flavor = "multi_thread")]
async fn strange_images_are_what_containerd_makes_of_them() -> Result<()> {
    let Some(court) = Court::open("strange").await? else { return Ok(()) };
    let court = Arc::new(court);
    let only = std::env::var("SHOAL_CASE").ok();
    let cases = cases::all()
        .into_iter()
        .filter(|case| only.as_deref().is_none_or(|only| only.split(',').any(|part| case.name.contains(part))));
    let judged = futures::stream::iter(cases)
        .map(|case| {
            let court = Arc::clone(&court);
            tokio::spawn(async move { court.judge(&case).await.with_context(|| format!("case `{}`", case.name)) })
        })
        .buffered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let total = judged.len();
    let mut wrong = Vec::new();
    for result in judged {
        if let Err(error) = result? {
            wrong.push(format!("{error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{} of {total} cases went wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

impl Court {
    /// Starts all that is needed; nothing where the machine lacks it.
    async fn open(purpose: &str) -> Result<Option<Self>> {
        if !met(CONTAINERD) || !met(&[Need::ErofsFiles]) {
            return Ok(None);
        }
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let liar = Liar::start().await?;
        let options = Options {
            plain_http: vec![registry.host.clone(), liar.host.clone()],
            binary: std::env::var_os("SHOAL_CONTAINERD").map(Into::into),
            ..Options::plain(&registry.host)
        };
        let containerd = Containerd::start(&scratch.dir("ctd")?, &options)?;
        let client = image::client(&registry.host)?;
        let begun = i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs())?;
        Ok(Some(Self { scratch, registry, liar, containerd, client, begun }))
    }

    async fn judge(&self, case: &Case) -> Result<()> {
        let repo = case.name.replace(' ', "-");
        let dir = self.scratch.dir(&repo)?;
        let (host, layers) = match &case.source {
            Source::Pushed(image) => {
                let data = self.scratch.path().join("registry/data");
                image.push(&self.client, &repo, &data).await?;
                (&self.registry.host, image.len())
            }
            Source::Told(tell) => {
                tell(&self.liar.repository(&repo));
                (&self.liar.host, 1)
            }
        };
        let source = format!("{host}/{repo}:oci");
        let oracle = tokio::task::block_in_place(|| self.unpacked(&source, layers, &dir));
        let converted = tokio::task::block_in_place(|| self.convert(case, &source, &repo, &dir));
        let tagged = self.client.manifest(&repo, "nydus").await.is_ok();
        match (case.verdict, oracle, converted) {
            (Verdict::Same, Ok(want), Ok(())) => self.compare(&repo, &dir, &want).await,
            (Verdict::Refused(why), Err(_), Err(error)) => {
                let said = format!("{error:#}");
                ensure!(said.contains(why), "nydusify should say `{why}` and says: {said}");
                ensure!(!tagged, "the target has its tag though the conversion failed");
                Ok(())
            }
            (_, Ok(_), Err(ours)) => Err(ours).context("containerd takes it, nydusify refuses it"),
            (_, Err(oracle), Ok(())) => Err(oracle).context("nydusify takes it, containerd refuses it"),
            (Verdict::Same, Err(oracle), Err(ours)) => bail!("both refuse it: {oracle:#}\n{ours:#}"),
            (Verdict::Refused(_), Ok(_), Ok(())) => bail!("both take it"),
        }
    }

    /// Lets containerd unpack the image and reads what a container would see.
    fn unpacked(&self, reference: &str, layers: usize, dir: &Path) -> Result<Table> {
        let root = dir.join("overlay");
        std::fs::create_dir_all(&root)?;
        let ctr = || self.containerd.ctr();
        run(ctr().args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference]))?;
        let mut mount = ctr();
        mount.args(["images", "mount", "--snapshotter", "overlayfs"]);
        // A view of one layer is the layer itself; a container has an overlay above it.
        if layers < 2 {
            mount.arg("--rw");
        }
        run(mount.arg(reference).arg(&root))?;
        tree::read_overlay(&root).context("reading what containerd unpacked")
    }

    fn convert(&self, case: &Case, source: &str, repo: &str, dir: &Path) -> Result<()> {
        let mut convert = Command::new(shoal("nydusify")?);
        convert.args(["--log-level", "warn", "convert", "--source", source]);
        convert.arg("--target").arg(format!("{}/{repo}:nydus", self.registry.host));
        run(convert.arg("--work-dir").arg(dir.join("work")).args(case.arguments)).map(drop)
    }

    async fn compare(&self, repo: &str, dir: &Path, want: &Table) -> Result<()> {
        let image = Converted::pull(&self.client, repo, "nydus", dir).await?;
        let (fuse, erofs) = tokio::task::block_in_place(|| {
            let devices = image.devices(&dir.join("devices"))?;
            // Mount options end after a page, and so does what the kernel can be told of devices.
            let fits = devices.iter().map(|device| device.as_os_str().len() + 8).sum::<usize>() < 4096;
            let erofs = fits.then(|| Erofs::mount(&image.bootstrap, &devices, &dir.join("erofs"))).transpose()?;
            anyhow::Ok((Mounted::localfs(&image.bootstrap, &image.blobs, dir)?, erofs))
        })?;
        let mounts = [("nydusd", Some(&fuse.path)), ("the kernel's EROFS", erofs.as_ref().map(|erofs| &erofs.path))];
        for (who, root) in mounts {
            let Some(root) = root else { continue };
            let got = tree::read(root).with_context(|| format!("reading the mount of {who}"))?;
            let lines = tree::differences(&got, want, |_, got, want| {
                if self.unpacked_now(want) {
                    got.mtime = want.mtime;
                }
            });
            ensure!(lines.is_empty(), "{who} differs from containerd:\n  {}", lines.join("\n  "));
        }
        Ok(())
    }

    /// A directory that a layer changes without listing it has the time of unpacking.
    fn unpacked_now(&self, record: &Record) -> bool {
        record.kind == 'd' && record.mtime.0 >= self.begun
    }
}
