//! Registries with certificates of an authority of their own.
//!
//! The certificates are made by the `openssl` program, because making some is not worth a dependency.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nydus_backend::Credential;
use nydus_backend::http::{HttpError, Tls};
use nydus_backend::registry::{Client, ClientOptions, RegistryError, Scheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};

use crate::server::{Reply, Server, digest, hasty, sample};

/// An authority, and a certificate that it gave to 127.0.0.1.
struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    #[expect(clippy::print_stdout, reason = "a skipped test says why")]
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let run = |arguments: &str| {
            let done = Command::new("openssl").args(arguments.split(' ')).current_dir(folder.path()).output();
            done.is_ok_and(|done| done.status.success())
        };
        std::fs::write(folder.path().join("names"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
            .unwrap();
        let made = run("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority")
            && run("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server")
            && run(
                "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
            );
        if !made {
            println!("skipped: the program `openssl` does not make certificates here");
        }
        made.then_some(Self { folder })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Puts TLS in front of a server; returns its address.
async fn wrap(authority: &Authority, inner: &Server) -> String {
    let chain = CertificateDer::pem_file_iter(authority.file("server.pem")).unwrap().collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(authority.file("server.key")).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let inner = inner.address;
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

fn options(scheme: Scheme, tls: Tls) -> ClientOptions {
    ClientOptions { scheme, tls, timeouts: hasty(), ..ClientOptions::default() }
}

fn trusting(file: &Path) -> Tls {
    Tls { ca_cert_files: vec![file.to_owned()], ..Tls::default() }
}

async fn read(host: &str, options: ClientOptions) -> Result<bytes::Bytes, RegistryError> {
    Client::new(host, options).unwrap().blob_range("r", &digest(b"x"), 0..5).await
}

#[tokio::test]
async fn a_private_authority_is_believed_only_if_it_is_named() {
    let (Some(authority), Some(other)) = (Authority::new(), Authority::new()) else { return };
    let inner = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    let host = wrap(&authority, &inner).await;
    for scheme in [Scheme::Https, Scheme::Auto] {
        read(&host, options(scheme, trusting(&authority.file("ca.pem")))).await.unwrap();
        read(&host, options(scheme, Tls { skip_verify: true, ..Tls::default() })).await.unwrap();
        for tls in [trusting(&other.file("ca.pem")), Tls::default()] {
            let error = read(&host, options(scheme, tls)).await.unwrap_err();
            assert!(matches!(error, RegistryError::Http(HttpError::Untrusted { .. })), "{error:?}");
            assert!(error.to_string().contains(&host) && !error.is_transient(), "{error}");
        }
    }
}

#[tokio::test]
async fn https_never_becomes_http() {
    let plain = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    let insecure = Tls { skip_verify: true, ..Tls::default() };
    let credential = Credential::Basic { user: "u".into(), password: "p".into() };
    let options = ClientOptions { credential, ..options(Scheme::Https, insecure) };
    assert!(read(&plain.host(), options).await.is_err());
    assert!(plain.seen().iter().all(|seen| seen.headers.is_empty() || seen.header("authorization").is_empty()));
    assert_eq!(plain.count("/blobs/"), 0);
}

#[tokio::test]
async fn a_loopback_registry_without_tls_is_found_out() {
    let plain = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    read(&plain.host(), options(Scheme::Auto, Tls::default())).await.unwrap();
    // One that is not there yet is asked again.
    let nobody = Server::nobody().await;
    let client = Client::new(&nobody.to_string(), options(Scheme::Auto, Tls::default())).unwrap();
    assert!(client.blob_range("r", &digest(b"x"), 0..5).await.is_err());
    let _server = Server::start_at(nobody, |seen| Reply::ranged(seen, &sample(100))).await;
    client.blob_range("r", &digest(b"x"), 0..5).await.unwrap();
    // What a TLS server of Go says to plain requests.
    let go = Server::start(|_| Reply::new(400).body("Client sent an HTTP request to an HTTPS server.\n")).await;
    assert!(read(&go.host(), options(Scheme::Auto, Tls::default())).await.is_err());
    assert_eq!(go.count("/blobs/"), 0);
}

#[tokio::test]
async fn the_environments_proxy_is_not_used_for_loopback() {
    // The variables are set for a child of this test: another process, because they are the process's.
    if std::env::var_os("WEATHER_CHILD").is_none() {
        let dead = format!("http://{}", Server::nobody().await);
        let child = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tls::the_environments_proxy_is_not_used_for_loopback"])
            .env("WEATHER_CHILD", "1")
            .env("HTTP_PROXY", &dead)
            .env("http_proxy", &dead)
            .env("ALL_PROXY", &dead)
            .env_remove("NO_PROXY")
            .env_remove("no_proxy")
            .status();
        assert!(child.await.unwrap().success());
        return;
    }
    let plain = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    read(&plain.host(), options(Scheme::Http, Tls::default())).await.unwrap();
    // And it is used for everybody else.
    let error = read("registry.invalid", options(Scheme::Http, Tls::default())).await.unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}

/// Speaks HTTP/2 after ALPN only if it is offered; this only shows that it is.
#[tokio::test]
async fn http2_is_offered_over_tls() {
    let Some(authority) = Authority::new() else { return };
    let chain = CertificateDer::pem_file_iter(authority.file("server.pem")).unwrap().collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(authority.file("server.key")).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let talk = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = acceptor.accept(stream).await.unwrap();
        let mut preface = [0; 24];
        stream.read_exact(&mut preface).await.unwrap();
        // Goes away at once: length 8, type 7, stream 0, last stream 0, no error.
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        stream.write_all(&settings).await.unwrap();
        stream.write_all(&goaway).await.unwrap();
        stream.flush().await.unwrap();
        preface
    });
    let error = read(&host, options(Scheme::Https, trusting(&authority.file("ca.pem")))).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(talk.await.unwrap().starts_with(b"PRI * HTTP/2.0"));
}
