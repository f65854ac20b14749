//! The flags of `nydus-image merge`.

use std::path::PathBuf;

use clap::Args;
use nydus_convert::image::merge;

use crate::{PrefetchPolicy, dictionary, patterns, say};

#[derive(Debug, Args)]
pub(crate) struct Merge {
    /// Bootstraps, lowest layer first
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<PathBuf>,
    /// Bootstrap of a lower image
    #[arg(long)]
    parent_bootstrap: Option<PathBuf>,
    /// File for the merged bootstrap
    #[arg(short = 'B', long)]
    bootstrap: Option<PathBuf>,
    /// Directory for the merged bootstrap if it has no file
    #[arg(short = 'D', long)]
    blob_dir: Option<PathBuf>,
    /// Bootstrap of an image whose chunks need not be stored again (`PATH` or `bootstrap=PATH`)
    #[arg(long)]
    chunk_dict: Option<String>,
    /// What is made of the prefetch patterns on standard input
    #[arg(long, default_value = "none")]
    prefetch_policy: PrefetchPolicy,
    /// File for the result, as JSON
    #[arg(short = 'J', long)]
    output_json: Option<PathBuf>,
    /// Digests of the layers' blobs
    #[arg(long, value_delimiter = ',')]
    blob_digests: Vec<String>,
    /// Names of the layers' blobs
    #[arg(long, value_delimiter = ',')]
    original_blob_ids: Vec<String>,
    /// Sizes of the layers' blobs
    #[arg(long, value_delimiter = ',')]
    blob_sizes: Vec<u64>,
    /// Digests of the tables of contents
    #[arg(long, value_delimiter = ',')]
    blob_toc_digests: Vec<String>,
    /// Sizes of the tables of contents
    #[arg(long, value_delimiter = ',')]
    blob_toc_sizes: Vec<u32>,
    /// Configuration of a storage backend
    #[arg(short = 'C', long)]
    config: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(flags: Merge) -> anyhow::Result<()> {
    let prefetch = patterns(flags.prefetch_policy)?;
    let report = merge::merge(&merge::Request {
        sources: flags.sources,
        bootstrap: flags.bootstrap,
        blob_dir: flags.blob_dir,
        prefetch,
        blob_digests: flags.blob_digests,
        original_blob_ids: flags.original_blob_ids,
        blob_sizes: flags.blob_sizes,
        toc_digests: flags.blob_toc_digests,
        toc_sizes: flags.blob_toc_sizes,
        parent: flags.parent_bootstrap,
        dictionary: dictionary(flags.chunk_dict)?,
    })?;
    report.save(flags.output_json.as_ref())?;
    say(&report);
    Ok(())
}
