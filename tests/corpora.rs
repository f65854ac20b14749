//! What fuzzing started from and what it found, as ordinary tests: no input may panic, hang or exhaust memory.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nydus_tests::parsers;

#[test]
fn nothing_in_the_corpora_breaks_a_parser() -> Result<()> {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpora");
    for (name, parser) in parsers::ALL {
        let entries = std::fs::read_dir(corpora.join(name)).with_context(|| format!("the corpus of {name}"))?;
        let mut inputs = 0;
        for entry in entries {
            let path = entry?.path();
            let bytes = std::fs::read(&path)?;
            let begin = Instant::now();
            for end in [bytes.len(), bytes.len() / 2, bytes.len() * 7 / 8] {
                parser(&bytes[..end]);
            }
            // Every bit of what is short, some bits of what is long.
            for at in (0..bytes.len()).step_by(1 + bytes.len() / 512) {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << (at % 8);
                parser(&flipped);
            }
            ensure!(begin.elapsed() < Duration::from_secs(60), "{} hangs", path.display());
            inputs += 1;
        }
        ensure!(inputs > 0, "the corpus of {name} is empty");
    }
    Ok(())
}

#[test]
fn every_corpus_has_a_parser() -> Result<()> {
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpora"))? {
        let name = entry?.file_name();
        ensure!(name.to_str().is_some_and(|name| parsers::named(name).is_some()), "{name:?} is no parser");
    }
    Ok(())
}
