//! What `nydusify convert` meets on its way to the target: registries that restart, forget, refuse, hurry and lie,
//! its own sudden death, and proxies. Whatever happens, no tag appears before the image was read back.

#[path = "push/deaths.rs"]
mod deaths;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use axum::http::{Method, StatusCode};
use nix::mount::{MsFlags, mount, umount};
use nydus_backend::registry::Client;
use nydus_tests::authority::Authority;
use nydus_tests::converted::Converted;
use nydus_tests::front::Front;
use nydus_tests::gate::{Gate, Loss, Pace};
use nydus_tests::image::{self, Layer};
use nydus_tests::keeper::Keeper;
use nydus_tests::moody::{Asked, Mood, Moody};
use nydus_tests::needs::{Need, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::proxy::Proxy;
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::{rawtar, smoke};
use serde_json::json;

const NEEDS: &[Need] = &[Need::Program("docker-registry")];

/// A registry with an image of two layers that do not compress, 12 MB and 3 MB.
struct Bed {
    registry: Registry,
    scratch: Scratch,
}

impl Bed {
    async fn new(purpose: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let client = image::client(&registry.host)?;
        let noise = |turn: u32| smoke::random().iter().map(|byte| byte.rotate_left(turn)).collect::<Vec<_>>();
        let large: Vec<_> = (0..4).map(|turn| rawtar::file(format!("large/{turn}"), noise(turn))).collect();
        let small = [rawtar::file("small", noise(5)), rawtar::file("text", "some text")];
        let layers = [Layer::new(&rawtar::tar(&large))?, Layer::new(&rawtar::tar(&small))?];
        image::push(&client, "source", "oci", &layers, json!({})).await?;
        Ok(Self { registry, scratch })
    }

    fn work(&self) -> PathBuf {
        self.scratch.path().join("work")
    }

    /// A conversion of `source:oci` at one host to `target:nydus` at another.
    fn convert(&self, from: &str, to: &str) -> Result<Command> {
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["convert", "--source", &format!("{from}/source:oci"), "--target", &format!("{to}/target:nydus")]);
        command.arg("--work-dir").arg(self.work()).env_remove("DOCKER_CONFIG").env("HOME", self.scratch.path());
        Ok(command)
    }

    /// Compares what lies at `host` with what a conversion in fair weather makes.
    async fn is_right(&self, host: &str) -> Result<()> {
        let fair = Registry::start(&self.scratch.dir("fair")?)?;
        let client = image::client(&fair.host)?;
        let converted = ended(&mut self.convert(&self.registry.host, &fair.host)?).await?;
        ensure!(converted.status.success(), "a conversion in fair weather failed:\n{}", said(&converted));
        let pull = async |client: &Client, dir: &str| -> Result<_> {
            let image = Converted::pull(client, "target", "nydus", &self.scratch.dir(dir)?).await?;
            Ok(image.manifest["layers"].clone())
        };
        let found = pull(&image::client(host)?, "found").await?;
        ensure!(found == pull(&client, "wanted").await?, "another image than in fair weather: {found}");
        Ok(())
    }
}

async fn ended(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null());
    tokio::task::block_in_place(|| command.output()).context("starting nydusify")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn has_tag(host: &str) -> Result<bool> {
    Ok(image::client(host)?.has_manifest("target", "nydus").await?.is_some())
}

/// Counts how often each of some things happened, by name.
#[derive(Debug, Clone, Default)]
struct Tally(Arc<Mutex<HashMap<&'static str, usize>>>);

impl Tally {
    /// Counts one more; returns how many there were before.
    fn add(&self, name: &'static str) -> usize {
        let mut counts = self.0.lock().expect("no holder of this lock panics");
        let count = counts.entry(name).or_default();
        *count += 1;
        *count - 1
    }

    fn get(&self, name: &str) -> usize {
        self.0.lock().expect("no holder of this lock panics").get(name).copied().unwrap_or(0)
    }
}

/// What a request is, by the step of a push.
fn step(asked: &Asked<'_>) -> &'static str {
    let path = asked.uri.path();
    match *asked.method {
        Method::POST if asked.uri.query().is_some_and(|query| query.contains("mount=")) => "mount",
        Method::POST => "open",
        Method::PATCH => "send",
        Method::PUT if path.contains("/manifests/") => "manifest",
        Method::PUT => "close",
        Method::HEAD => "ask",
        Method::GET if path.contains("/blobs/") => "read",
        _ => "other",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_restarts_in_the_middle_of_a_push_gets_the_image() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("restart").await?;
    let dir = bed.scratch.dir("other")?;
    let mut other = Registry::start(&dir)?;
    // 40 Mbit/s: the large blob takes more than two seconds.
    let gate = Gate::open(&other.host, Pace { bits_per_second: 40_000_000, round_trip: Duration::ZERO })?;
    let converting = tokio::spawn({
        let mut command = bed.convert(&bed.registry.host, &gate.host)?;
        async move { ended(&mut command).await }
    });
    let uploads = dir.join("data/docker/registry/v2/repositories/target/_uploads");
    let begun = Instant::now();
    while std::fs::read_dir(&uploads).map_or(0, Iterator::count) == 0 {
        ensure!(begun.elapsed() < Duration::from_secs(60), "no upload has begun");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    other.process.crash()?;
    ensure!(!converting.is_finished(), "the conversion was over before the registry went");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let port = other.host.rsplit_once(':').context("a port")?.1.parse()?;
    let other = Registry::start_at(&dir, port)?;
    let output = converting.await??;
    ensure!(output.status.success(), "the conversion did not survive:\n{}", said(&output));
    ensure!(said(&output).contains("broke off"), "nothing was said of the restart:\n{}", said(&output));
    bed.is_right(&other.host).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_breaks_in_the_middle_goes_on_there_if_the_registry_kept_what_came() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("resume").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    let keeper = Keeper::start(&other.host).await?;
    // 40 Mbit/s: the large blob takes more than two seconds.
    let gate = Gate::open(&keeper.host, Pace { bits_per_second: 40_000_000, round_trip: Duration::ZERO })?;
    let converting = tokio::spawn({
        let mut command = bed.convert(&bed.registry.host, &gate.host)?;
        command.arg("--no-verify");
        async move { ended(&mut command).await }
    });
    for come in [6_000_000, 10_000_000] {
        let begun = Instant::now();
        while keeper.came() < come {
            ensure!(begun.elapsed() < Duration::from_secs(60), "only {} bytes have come", keeper.came());
            ensure!(!converting.is_finished(), "the conversion is over with {} bytes", keeper.came());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        gate.cut(Loss::Reset)?;
    }
    let output = converting.await??;
    ensure!(output.status.success(), "the conversion did not survive:\n{}", said(&output));
    ensure!(said(&output).contains("going on where the push broke off"), "it began again:\n{}", said(&output));
    bed.is_right(&other.host).await?;
    let image = Converted::pull(&image::client(&other.host)?, "target", "nydus", &bed.scratch.dir("sizes")?).await?;
    let sizes = image.manifest["layers"].as_array().into_iter().flatten().filter_map(|layer| layer["size"].as_u64());
    let whole = sizes.sum::<u64>() + image.manifest["config"]["size"].as_u64().unwrap_or_default();
    ensure!(keeper.came() == whole, "{} bytes were sent of blobs of {whole}", keeper.came());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_may_hurry_decline_a_mount_and_say_where_in_relative_terms() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("moods").await?;
    let tally = Tally::default();
    let moods = {
        let tally = tally.clone();
        move |asked: &Asked<'_>| {
            let step = step(asked);
            let wait = |value: Option<String>| {
                Mood::Refuse(StatusCode::TOO_MANY_REQUESTS, value.map(|value| ("retry-after", value)))
            };
            match (step, tally.add(step)) {
                // The three forms of "later": seconds, a date, and nothing.
                ("mount", 0) => wait(Some("1".into())),
                ("send", 0) => wait(Some(httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(1)))),
                ("manifest" | "close" | "read", 0) => wait(None),
                ("ask", 1) => Mood::Refuse(StatusCode::BAD_GATEWAY, None),
                ("mount", _) => Mood::Forgetful,
                _ => Mood::Fair,
            }
        }
    };
    let moody = Moody::start(&bed.registry.host, moods).await?;
    // Source and target are one registry, so mounting is tried.
    let output = ended(&mut bed.convert(&moody.host, &moody.host)?).await?;
    ensure!(output.status.success(), "the conversion failed:\n{}", said(&output));
    ensure!(tally.get("mount") >= 2 && tally.get("send") >= 2, "the moods were not met: {tally:?}");
    bed.is_right(&bed.registry.host).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_takes_only_small_requests_gets_the_blobs_in_parts() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("small").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    let tally = Tally::default();
    let up_to = |limit: u64, tally: Tally| {
        move |asked: &Asked<'_>| match asked.length > limit {
            true if tally.add("refused") < 1000 => Mood::Refuse(StatusCode::PAYLOAD_TOO_LARGE, None),
            _ => {
                tally.add(step(asked));
                Mood::Fair
            }
        }
    };
    let moody = Moody::start(&other.host, up_to(2 << 20, tally.clone())).await?;
    let output = ended(&mut bed.convert(&bed.registry.host, &moody.host)?).await?;
    ensure!(output.status.success(), "the conversion failed:\n{}", said(&output));
    // 12 MB and 3 MB in parts of 1 MiB.
    ensure!(tally.get("send") > 12 && tally.get("refused") >= 3, "nothing was cut: {tally:?}");
    bed.is_right(&moody.host).await?;

    let strict = Moody::start(&other.host, up_to(100 << 10, Tally::default())).await?;
    let mut convert = bed.convert(&bed.registry.host, &strict.host)?;
    // Other chunks, so that nothing is there yet.
    let output = ended(convert.args(["--fs-chunk-size", "0x8000"])).await?;
    ensure!(!output.status.success(), "a registry that takes nothing took the image");
    let text = said(&output);
    ensure!(
        text.contains("client_max_body_size") && text.contains(&strict.host),
        "it does not say what to do:\n{text}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_read_back_as_pushed_is_not_tagged() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("damage").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    let moody = Moody::start(&other.host, |asked| match step(asked) {
        "read" => Mood::Damaging,
        _ => Mood::Fair,
    });
    let moody = moody.await?;
    let output = ended(&mut bed.convert(&bed.registry.host, &moody.host)?).await?;
    ensure!(!output.status.success(), "a damaged image was taken for the source");
    ensure!(said(&output).contains("nothing was tagged"), "it does not say so:\n{}", said(&output));
    ensure!(!has_tag(&other.host).await?, "a damaged image has its tag");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_work_directory_that_is_full_or_read_only_is_named() -> Result<()> {
    if !met(NEEDS) || !met(&[Need::Root]) {
        return Ok(());
    }
    let bed = Bed::new("disk").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    for (options, flags, why) in [
        ("size=5m", MsFlags::empty(), "No space left on device"),
        ("size=5m", MsFlags::MS_RDONLY, "Read-only file system"),
    ] {
        let work = bed.scratch.dir("work")?;
        mount(Some("shoal"), &work, Some("tmpfs"), flags, Some(options))?;
        let output = ended(&mut bed.convert(&bed.registry.host, &other.host)?).await?;
        umount(&work)?;
        let text = said(&output);
        ensure!(!output.status.success(), "a conversion without room succeeded ({why})");
        let named = text.contains(why) && text.contains(&*work.to_string_lossy());
        ensure!(named, "`{why}` of {} is not named:\n{text}", work.display());
        ensure!(!has_tag(&other.host).await?, "it left a tag ({why})");
    }
    let output = ended(&mut bed.convert(&bed.registry.host, &other.host)?).await?;
    ensure!(output.status.success(), "with room again it still fails:\n{}", said(&output));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_dies_under_the_work_directory_ends_the_conversion() -> Result<()> {
    let needs = [Need::Root, Need::Program("mkfs.ext4"), Need::Program("python3")];
    if !met(NEEDS) || !met(&needs) {
        return Ok(());
    }
    let bed = Bed::new("eio").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    let work = bed.scratch.dir("work")?;
    let disk = bed.scratch.path().join("disk");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    run(Command::new("mkfs.ext4").arg("-q").arg(&disk))?;
    run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&work))?;
    // It dies when the first upload begins: the large layer's blob is read from it then.
    let shut = Arc::new(AtomicBool::new(false));
    let moods = {
        let (shut, work) = (Arc::clone(&shut), work.clone());
        move |asked: &Asked<'_>| {
            if step(asked) == "open" && !shut.swap(true, Ordering::Relaxed) {
                // EXT4_IOC_SHUTDOWN, without flushing the journal.
                let script = "import fcntl,os,struct,sys; \
                    fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
                drop(run(Command::new("python3").args(["-c", script]).arg(&work)));
            }
            Mood::Fair
        }
    };
    let moody = Moody::start(&other.host, moods).await?;
    let output = ended(&mut bed.convert(&bed.registry.host, &moody.host)?).await?;
    let text = said(&output);
    ensure!(shut.load(Ordering::Relaxed), "nothing was pushed:\n{text}");
    ensure!(!output.status.success(), "the conversion succeeded without its disk");
    ensure!(text.contains("Input/output error") && text.contains("work directory"), "the disk is not named:\n{text}");
    ensure!(!has_tag(&other.host).await?, "it left a tag");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_are_used_as_the_environment_says_and_never_for_this_machine() -> Result<()> {
    if !met(NEEDS) || !met(&[Need::Program("openssl")]) {
        return Ok(());
    }
    let bed = Bed::new("proxy").await?;
    let authority = Authority::make(&bed.scratch.dir("authority")?)?;
    let front = Front::start(&bed.registry.host, &authority).await?;
    let far = "registry.shoal.test";
    let docker = bed.scratch.dir("docker")?;
    std::fs::write(docker.join("config.json"), front.docker_config().replace(&front.host, far))?;
    let proxy = Proxy::start(&front.host)?;
    let convert = |from: &str| -> Result<Command> {
        let mut command = bed.convert(from, from)?;
        command.env("HTTPS_PROXY", format!("http://{}", proxy.host)).env("SSL_CERT_FILE", authority.ca());
        command.env("DOCKER_CONFIG", &docker).env_remove("NO_PROXY").env_remove("no_proxy");
        Ok(command)
    };
    let output = ended(&mut convert(far)?).await?;
    ensure!(output.status.success(), "the conversion through the proxy failed:\n{}", said(&output));
    ensure!(proxy.asked().iter().all(|asked| asked == &format!("{far}:443")), "asked for {:?}", proxy.asked());

    let before = proxy.asked().len();
    ensure!(before > 0, "the proxy was not asked");
    let output = ended(convert(far)?.env("NO_PROXY", "shoal.test")).await?;
    ensure!(!output.status.success(), "NO_PROXY was not honoured");
    ensure!(said(&output).contains(far), "the host is not named:\n{}", said(&output));
    std::fs::write(docker.join("config.json"), front.docker_config())?;
    let output = ended(&mut convert(&front.host)?).await?;
    ensure!(output.status.success(), "the conversion on this machine failed:\n{}", said(&output));
    ensure!(proxy.asked().len() == before, "the proxy was asked for {:?}", &proxy.asked()[before..]);
    Ok(())
}
