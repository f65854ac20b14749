//! Limits of this process.

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Most files that are asked for.
const MOST: u64 = 1_000_000;

/// Files that are left to the rest of the machine.
const LEFT: u64 = 16_384;

/// Raises the number of files that may be open to `wanted`, as far as the system lets us; 0 leaves it alone. A lower limit
/// than wanted is a warning: a daemon with a thousand files still serves.
pub fn raise_open_files(wanted: u64) {
    if wanted == 0 {
        return;
    }
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let machine = std::fs::read_to_string("/proc/sys/fs/file-max").ok().and_then(|text| text.trim().parse().ok());
    let wanted = target(wanted, soft, machine);
    if wanted <= soft {
        return;
    }
    let result = match setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted.max(hard)) {
        // Only the privileged raise the hard limit; up to it everyone may go.
        Err(Errno::EPERM) => setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard),
        other => other,
    };
    match result {
        Ok(()) if wanted > hard => tracing::debug!(wanted, hard, "the limit of open files was raised"),
        Ok(()) => {}
        Err(error) => tracing::warn!(wanted, soft, %error, "could not raise the limit of open files"),
    }
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < wanted
    {
        tracing::warn!(wanted, soft, "fewer files may be open than --rlimit-nofile asks for");
    }
}

/// Keeps free memory in few places. To be called before there are other threads.
pub fn hoard_less_memory() {
    crate::sys::allocator::be_modest();
}

fn target(wanted: u64, soft: u64, machine: Option<u64>) -> u64 {
    let most = machine.map_or(MOST, |files: u64| files.saturating_sub(LEFT).min(MOST));
    wanted.min(most.max(soft))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_keeps_some_files_and_nothing_is_lowered() {
        assert_eq!(target(1_000_000, 1024, Some(100_000)), 83_616);
        assert_eq!(target(1_000_000, 1024, Some(9_223_372_036_854_775_807)), 1_000_000);
        assert_eq!(target(500, 1024, None), 500);
        assert_eq!(target(2_000_000, 1_500_000, None), 1_500_000);
    }
}
