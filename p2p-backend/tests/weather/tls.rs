//! Registries with certificates of an authority of their own, and https that must not become http.

use std::path::Path;

use nydus_backend::Credential;
use nydus_backend::http::{HttpError, Tls};
use nydus_backend::registry::{Client, ClientOptions, RegistryError, Scheme};

use crate::authority::Authority;
use crate::server::{Reply, Server, digest, hasty, sample};

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
    let host = authority.wrap(inner.address).await;
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
