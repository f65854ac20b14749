//! Which files a node shall fetch first: patterns as builders take them on standard input.
//!
//! One absolute path per line; it stands for itself and everything below. A pattern below an earlier one adds nothing
//! and is dropped. What does not exist in the image is ignored when the bootstrap is written.

use std::ffi::OsString;
use std::io::{self, BufRead};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// Parses patterns, one a line; relative ones are warned about and left out.
///
/// # Errors
///
/// If the input cannot be read.
pub fn read(input: impl BufRead) -> io::Result<Vec<PathBuf>> {
    let mut patterns: Vec<PathBuf> = Vec::new();
    for line in input.split(b'\n') {
        let line = line?;
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        if !line.starts_with(b"/") {
            tracing::warn!(pattern = %OsString::from_vec(line.to_vec()).display(), "prefetch pattern left out: it is not an absolute path");
            continue;
        }
        let parts = crate::path::clean(line);
        let pattern: PathBuf = [OsString::from("/")].into_iter().chain(parts).collect();
        if !patterns.iter().any(|earlier| pattern.starts_with(earlier)) {
            patterns.push(pattern);
        }
    }
    Ok(patterns)
}

/// Returns the pattern for one directory.
///
/// # Errors
///
/// If the path is not absolute.
pub fn directory(path: &std::path::Path) -> io::Result<Vec<PathBuf>> {
    let patterns = read(path.as_os_str().as_bytes())?;
    if patterns.is_empty() {
        let why = format!("`{}` is not an absolute path", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(patterns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_below_earlier_ones_and_relative_ones_are_dropped() {
        let patterns = read(&b"/usr/lib\n/usr/lib/python3\n\nrelative\n /usr/library/ \n/../etc//passwd"[..]).unwrap();
        let wanted = ["/usr/lib", "/usr/library", "/etc/passwd"].map(PathBuf::from);
        assert_eq!(patterns, wanted);
        assert_eq!(read(&b"/\n/a\n"[..]).unwrap(), [PathBuf::from("/")]);
        assert!(directory(std::path::Path::new("a")).is_err());
    }
}
