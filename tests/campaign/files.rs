//! The image under test: files whose sums are known, in layers of their own, and programs that sum themselves.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nydus_rafs::Algorithm;
use nydus_tests::image::Layer;
use nydus_tests::process::run;
use nydus_tests::smoke;

use crate::dice::Dice;

/// Layers with files, each of which becomes a blob.
const LAYERS: usize = 12;
/// Files of one layer. Together the layers have more bytes than the mirror keeps.
const FILES: usize = 5;
/// Bytes of a file, which is one chunk.
const BYTES: usize = 512 << 10;
/// Bytes that a program sums.
const TABLE: usize = 256 << 10;

/// A file of the image.
#[derive(Debug, Clone)]
pub(crate) struct File {
    /// Its path, relative to the root.
    pub(crate) path: String,
    /// SHA-256 of its bytes.
    pub(crate) sum: String,
    /// What it prints when it is run, if it is a program.
    pub(crate) prints: Option<String>,
}

/// Makes the layers; programs are compiled below `work`.
pub(crate) fn layers(work: &Path) -> Result<(Vec<Layer>, Vec<File>)> {
    let mut layers = smoke::layers()?;
    let mut files = Vec::new();
    for number in 0..LAYERS {
        let mut tar = tar::Builder::new(Vec::new());
        for at in 0..FILES {
            let bytes = noise(number * FILES + at, BYTES);
            append(&mut tar, &mut files, format!("cold/{number}-{at}"), 0o644, &bytes, None)?;
        }
        if number % 2 == 0 {
            let (binary, prints) = program(work, number)?;
            append(&mut tar, &mut files, format!("cold/run-{number}"), 0o755, &binary, Some(prints))?;
        }
        layers.push(Layer::new(&tar.into_inner()?)?);
    }
    Ok((layers, files))
}

fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    files: &mut Vec<File>,
    path: String,
    mode: u32,
    bytes: &[u8],
    prints: Option<String>,
) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, &path, bytes)?;
    files.push(File { path, sum: Algorithm::Sha256.digest(bytes).to_string(), prints });
    Ok(())
}

/// Bytes that nothing compresses, different for each number.
fn noise(number: usize, len: usize) -> Vec<u8> {
    let mut dice = Dice::new(number as u64);
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| dice.next().to_le_bytes()).take(len / 8).flatten().collect();
    bytes.truncate(len);
    bytes
}

/// Compiles a program that prints a sum of a table in itself: every page of it is read by running it.
fn program(work: &Path, number: usize) -> Result<(Vec<u8>, String)> {
    let table = noise(1000 + number, TABLE);
    let (data, source, binary) = (work.join("table"), work.join("program.c"), work.join("program"));
    std::fs::write(&data, &table)?;
    std::fs::write(
        &source,
        "#include <stdint.h>\n#include <stdio.h>\nextern const unsigned char table[], end[];\n\
         __asm__(\".section .rodata\\n.balign 4096\\n.globl table, end\\ntable: .incbin \\\"\" TABLE \"\\\"\\nend: .byte 0\\n.text\\n\");\n\
         int main(void) { uint64_t sum = 0xcbf29ce484222325u;\n\
         for (const unsigned char *at = table; at != end; at++) sum = (sum ^ *at) * 0x100000001b3u;\n\
         return printf(\"%016llx\\n\", (unsigned long long)sum) != 17; }\n",
    )?;
    let mut cc = Command::new("cc");
    cc.args(["-O1", "-static", "-s"])
        .arg(format!("-DTABLE=\"{}\"", data.display()))
        .arg("-o")
        .arg(&binary)
        .arg(&source);
    run(&mut cc).context("compiling a program")?;
    // FNV-1a.
    let sum = table
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    Ok((std::fs::read(&binary)?, format!("{sum:016x}")))
}
