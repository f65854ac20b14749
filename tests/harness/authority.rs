//! A certificate authority of one's own, as companies have one.
//!
//! The `openssl` program makes the certificates, because making some is not worth a dependency.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::Result;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};

use crate::process::run;

/// An authority, with a certificate that it gave to `127.0.0.1`, `localhost`, and the name `registry.shoal.test`, which no
/// resolver knows.
#[derive(Debug, Clone)]
pub struct Authority {
    dir: PathBuf,
}

impl Authority {
    /// Makes an authority that keeps its files in `dir`.
    pub fn make(dir: &Path) -> Result<Self> {
        Self::make_for(dir, Ipv4Addr::LOCALHOST)
    }

    /// The same, with a certificate for `address` instead of `127.0.0.1`.
    pub fn make_for(dir: &Path, address: Ipv4Addr) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let names = format!(
            "subjectAltName=IP:{address},DNS:localhost,DNS:registry.shoal.test\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n"
        );
        std::fs::write(dir.join("names"), names)?;
        for arguments in [
            "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=shoal-authority",
            "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=registry",
            "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
        ] {
            run(Command::new("openssl").args(arguments.split(' ')).current_dir(dir))?;
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// Returns the file with the authority's own certificate, which clients are given.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Returns what a server needs to prove itself.
    pub fn server(&self) -> Result<Arc<ServerConfig>> {
        let chain = CertificateDer::pem_file_iter(self.dir.join("server.pem"))?.collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(self.dir.join("server.key"))?;
        let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        Ok(Arc::new(config))
    }
}
