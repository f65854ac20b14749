//! Every fault once: it passes by containers on real nodes, which read through it and go on without any restart.
//!
//! The campaign draws from faults that come at any moment; here each comes alone, in order, and what has to come of it is
//! known: the right bytes, or an error and a line in the log that names registry, blob and what to do.
#![expect(clippy::print_stdout, reason = "what came of each fault is for people to read")]

#[path = "parade/disks.rs"]
mod disks;
#[path = "parade/heads.rs"]
mod heads;
#[path = "parade/image.rs"]
mod image;
#[path = "parade/names.rs"]
mod names;
#[path = "parade/post.rs"]
mod post;
#[path = "parade/registries.rs"]
mod registries;

use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use nydus_tests::bed::Bed;
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::node::Setup;
use nydus_tests::proxy::Proxy;

use post::Post;

fn skip() -> bool {
    !met(CONTAINERD) || !met(&[Need::Program("openssl"), Need::Program("curl")])
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_registries_do_readers_behind_a_mirror_and_without_one_get_right_bytes_or_are_told() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let bed = Bed::new("parade", &image::layers()?).await?;
    let setup = Post::setup(&bed);
    let mirrored = Post::start(&bed, "mirrored", &setup).await?;
    let mut alone = Post::start(&bed, "alone", &setup).await?;
    alone.node.mirror.crash()?;
    let mut posts = [mirrored, alone];
    heads::mirror(&bed, &mut posts[0]).await?;
    tokio::task::block_in_place(|| heads::converter(&bed))?;
    let blobs = bed.blobs().await?;
    let only = std::env::var("SHOAL_CASE").unwrap_or_default();
    let mut failed = Vec::new();
    for case in registries::PARADE.iter().filter(|(name, ..)| name.contains(&only)) {
        if let Err(error) = registries::pass(*case, &bed.front, &mut posts, &blobs).await {
            println!("{}: FAILED: {error:#}", case.0);
            failed.push(case.0);
        }
    }
    ensure!(failed.is_empty(), "{failed:?} failed");
    ensure!(bed.front.seen.leaked.load(Ordering::Relaxed) == 0, "the store was shown an Authorization");
    Ok(())
}

#[test]
fn names_and_proxies_that_fail_or_change_are_told_or_got_over() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let hosts = tempfile::NamedTempFile::new()?;
    // Before there are other threads: those that this one starts see the same names.
    names::own(hosts.path())?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let bed = Bed::named("way", &image::layers()?, names::NAME).await?;
        let way = names::Way { blobs: bed.blobs().await?, bed: &bed };
        let plain = Setup { read_deadline: Some(6), ..Post::setup(&bed) };
        let proxy = Proxy::start(&bed.front.host.replace(names::NAME, "127.0.0.1"))?;
        let environment = vec![
            ("HTTPS_PROXY".to_owned(), format!("http://{}", proxy.host)),
            ("NO_PROXY".to_owned(), "elsewhere.shoal.test".to_owned()),
        ];
        let proxied = Setup { environment, ..plain.clone() };
        way.proxies(&proxy, &mut [Post::start(&bed, "proxied", &proxied).await?]).await?;
        way.names(&mut [Post::start(&bed, "named", &plain).await?]).await
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_and_clocks_that_fail_cost_no_read_and_no_wrong_byte() -> Result<()> {
    let library = std::path::Path::new(disks::LIBRARY).exists();
    if skip() || !met(&["mkfs.ext4", "findmnt", "python3", "strace", "faketime"].map(Need::Program)) {
        return Ok(());
    }
    ensure!(library, "{} is missing beside faketime", disks::LIBRARY);
    let bed = Bed::new("disks", &image::layers()?).await?;
    let mut frail = disks::Frail::start(&bed).await?;
    frail.clock().await?;
    frail.full_cache().await?;
    frail.failing_calls().await?;
    frail.dying_cache().await?;
    frail.refusing_root().await?;
    frail.dying_root().await?;
    tokio::task::block_in_place(|| disks::full_work(&bed))
}
