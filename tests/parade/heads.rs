//! Hosts that do not answer HEAD, or tell no length when they do: mirrors ask so for the right to what they hold, and
//! `nydusify` for what is there already.

use anyhow::{Context, Result, ensure};
use nydus_tests::bed::Bed;
use nydus_tests::oddity::Oddity;
use nydus_tests::process::run;
use nydus_tests::sky::{Sky, Weather};

use crate::post::{Post, expect_right};

const ODDITIES: [Oddity; 2] = [Oddity::NoHead, Oddity::NoLength];

/// What a mirror holds is given to those who may read it, though it knows of nobody's right.
pub(crate) async fn mirror(bed: &Bed, post: &mut Post) -> Result<()> {
    for oddity in ODDITIES {
        let held = post.next();
        post.recovers(held).await?;
        // A new process has no fresh rights, and the old one's blobs.
        post.node.mirror.crash()?;
        post.node.restart_mirror()?;
        post.turn_page();
        let sky = bed.front.registry_sky();
        let before = sky.met_by_mirrors();
        sky.set(Weather::Odd(oddity));
        let read = post.read_cold(held).await;
        sky.set(Weather::Clear);
        expect_right(read?, post).with_context(|| format!("during {oddity:?}"))?;
        ensure!(sky.met_by_mirrors() > before, "{oddity:?} of the registry: the mirror never met it");
        ensure!(!post.page().contains("mirror refuses"), "{oddity:?}: reads went past the mirror\n{}", post.page());
        println!("{oddity:?} of the registry: right");
    }
    Ok(())
}

/// Blobs are found where they are, and sent where they are not.
pub(crate) fn converter(bed: &Bed) -> Result<()> {
    let work = bed.scratch.path().join("work");
    for (host, sky) in [("registry", bed.front.registry_sky()), ("store", bed.front.store_sky())] {
        for (oddity, chunk) in ODDITIES.into_iter().zip(["0x20000", "0x40000"]) {
            let sky: &Sky = sky;
            let before = sky.met();
            sky.set(Weather::Odd(oddity));
            // Other chunks are other blobs, which are not there the first time.
            let mut convert = bed.convert_to(&format!("{host}-{chunk}"), "docker", &work)?;
            let outcome = run(convert.args(["--fs-chunk-size", chunk]));
            sky.set(Weather::Clear);
            outcome.with_context(|| format!("during {oddity:?} of the {host}"))?;
            ensure!(sky.met() > before, "{oddity:?} of the {host}: nydusify never met it");
            println!("{oddity:?} of the {host}: converted");
        }
    }
    Ok(())
}
