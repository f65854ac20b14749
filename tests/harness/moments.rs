//! Moments at which something is killed: random, and the same for the same seed.

use std::time::Duration;

use anyhow::{Context, Result};

/// Reads what a seed stands for, one moment after another.
#[derive(Debug)]
pub struct Moments(u64);

impl Moments {
    /// Takes the seed from `SHOAL_SEED`, or makes one; says which in any case.
    pub fn from_environment() -> Result<Self> {
        let seed = match std::env::var("SHOAL_SEED") {
            Ok(text) => text.parse().context("SHOAL_SEED is a number")?,
            Err(_) => u64::from(std::time::UNIX_EPOCH.elapsed()?.subsec_nanos()),
        };
        println!("SHOAL_SEED={seed} gives the same moments again");
        Ok(Self(seed))
    }

    /// Returns some part of `whole`.
    pub fn within(&mut self, whole: Duration) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        whole.mul_f64((self.0 >> 33) as f64 / f64::from(1_u32 << 31))
    }
}

/// Returns how often things are to be killed: what `SHOAL_ROUNDS` says, or `usual`.
pub fn rounds(usual: usize) -> Result<usize> {
    std::env::var("SHOAL_ROUNDS").map_or(Ok(usual), |text| text.parse().context("SHOAL_ROUNDS is a number"))
}
