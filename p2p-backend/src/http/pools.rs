//! The connections that the clients of a program share.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{Http, HttpError, HttpOptions, Inner};

/// The pools of connections of a program, one for each set of options in use. Cheap to clone.
#[derive(Clone, Default)]
pub struct Pools(Arc<Mutex<HashMap<PoolKey, Weak<Inner>>>>);

/// The contents of certificate files are part of it: a renewed file is a new pool.
type PoolKey = (HttpOptions, Vec<Vec<u8>>);

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pools").finish_non_exhaustive()
    }
}

impl Pools {
    /// Returns the pool with these options, which is made if nobody holds it. Opens no connection; certificate
    /// files are read now.
    ///
    /// # Errors
    ///
    /// [`HttpError::Certificates`] if a file of `tls` cannot be read or holds no certificate, and
    /// [`HttpError::Client`] if the proxy's URL is none.
    pub fn get(&self, options: HttpOptions) -> Result<Http, HttpError> {
        let mut contents = Vec::new();
        for path in &options.tls.ca_cert_files {
            let unread =
                |error: std::io::Error| HttpError::Certificates { path: path.clone(), reason: error.to_string() };
            contents.push(std::fs::read(path).map_err(unread)?);
        }
        let key = (options, contents);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = all.get(&key).and_then(Weak::upgrade) {
            return Ok(Http(pool));
        }
        let (options, contents) = key.clone();
        let http = Http::new(options, &contents)?;
        all.retain(|_, pool| pool.strong_count() > 0);
        all.insert(key, Arc::downgrade(&http.0));
        Ok(http)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Proxy, Timeouts, Tls};
    use super::*;

    #[test]
    fn equal_options_share_a_pool_while_somebody_holds_it() {
        let pools = Pools::default();
        let options = |proxy: Proxy| HttpOptions { timeouts: Timeouts::MIRROR, proxy, ..HttpOptions::default() };
        let get = |proxy: Proxy| pools.get(options(proxy)).unwrap();
        let first = get(Proxy::Direct);
        assert!(Arc::ptr_eq(&first.0, &get(Proxy::Direct).0));
        assert!(!Arc::ptr_eq(&first.0, &get(Proxy::Environment).0));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let with_file = || {
            let tls = Tls { ca_cert_files: vec![path.clone()], ..Tls::default() };
            pools.get(HttpOptions { tls, ..options(Proxy::Direct) })
        };
        assert!(matches!(with_file(), Err(HttpError::Certificates { .. })));
        std::fs::write(&path, "no certificate").unwrap();
        assert!(matches!(with_file(), Err(HttpError::Certificates { .. })));
    }
}
