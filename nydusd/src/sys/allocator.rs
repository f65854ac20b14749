//! What the C library's allocator keeps for later.

/// Pools of free memory. One per thread, as the library would have it, is a buffer of every size in each of them.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;

/// Keeps the allocator from hoarding: chunks are fetched and decoded by dozens of threads, each once in a while.
///
/// To be called before there are other threads.
pub(crate) fn be_modest() {
    // SAFETY: `mallopt` takes two integers and touches no memory of ours; no other thread allocates yet. What it
    // refuses stays as it was.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}
