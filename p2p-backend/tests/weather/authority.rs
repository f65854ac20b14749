//! Certificates of an authority of its own, and servers that show them.
//!
//! They are made by the `openssl` program, because making some is not worth a dependency.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use nydus_backend::http::Tls;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};

use crate::server::skipped;

/// An authority, and a certificate that it gave to 127.0.0.1.
pub(crate) struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let run = |arguments: &str| {
            let done = Command::new("openssl").args(arguments.split(' ')).current_dir(folder.path()).output();
            done.is_ok_and(|done| done.status.success())
        };
        let names = "subjectAltName=IP:127.0.0.1,DNS:registry.test\nextendedKeyUsage=serverAuth\n";
        std::fs::write(folder.path().join("names"), names).unwrap();
        let made = run("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority")
            && run("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server")
            && run(
                "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
            );
        if !made {
            skipped("the program `openssl` does not make certificates here");
        }
        made.then_some(Self { folder })
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a client needs to believe it.
    pub(crate) fn trusted(&self) -> Tls {
        Tls { ca_cert_files: vec![self.file("ca.pem")], ..Tls::default() }
    }

    /// What a server needs to show its certificate; `protocols` are offered in the handshake.
    pub(crate) fn acceptor(&self, protocols: &[&[u8]]) -> TlsAcceptor {
        let chain = CertificateDer::pem_file_iter(self.file("server.pem")).unwrap();
        let chain = chain.collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(self.file("server.key")).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }

    /// Puts TLS in front of the server at `inner`; returns the address.
    pub(crate) async fn wrap(&self, inner: SocketAddr) -> String {
        let acceptor = self.acceptor(&[]);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    // Go's servers answer a plain request with a sentence; others hang up, as this one does.
                    let Ok(mut outer) = acceptor.accept(stream).await else { return };
                    let mut inner = tokio::net::TcpStream::connect(inner).await.unwrap();
                    drop(tokio::io::copy_bidirectional(&mut outer, &mut inner).await);
                });
            }
        });
        host
    }
}
