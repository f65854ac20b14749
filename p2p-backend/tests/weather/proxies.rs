//! Proxies that the environment names: used for everybody but this machine, and named when they stand in the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use nydus_backend::http::Tls;
use nydus_backend::registry::{Client, ClientOptions, RegistryError, Scheme};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::authority::Authority;
use crate::child;
use crate::server::{Reply, Server, digest, hasty, sample};

async fn read(host: &str, options: ClientOptions) -> Result<bytes::Bytes, RegistryError> {
    Client::new(host, options).unwrap().blob_range("r", &digest(b"x"), 0..5).await
}

fn plain() -> ClientOptions {
    ClientOptions { scheme: Scheme::Http, timeouts: hasty(), ..ClientOptions::default() }
}

/// What a proxy does with a wish for a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Opens it for who shows `me:secret`, and asks others for it.
    Strict,
    /// Answers with 403.
    Refuses,
    /// Hangs up.
    Dies,
    /// Says nothing.
    Silent,
}

/// A proxy that leads every tunnel to `target`.
async fn proxy(manner: Manner, target: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tunnels = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tunnels);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (target, count) = (target.clone(), Arc::clone(&count));
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let (mut line, mut head) = (String::new(), String::new());
                while stream.read_line(&mut line).await.is_ok_and(|bytes| bytes > 2) {
                    head += &std::mem::take(&mut line);
                }
                let known = head.to_ascii_lowercase().contains("proxy-authorization: basic bwu6c2vjcmv0");
                let answer = match manner {
                    Manner::Strict if known && head.starts_with("CONNECT registry.test:443 ") => "200 Yes",
                    Manner::Strict => "407 Who are you",
                    Manner::Refuses => "403 No",
                    Manner::Dies => return,
                    Manner::Silent => std::future::pending().await,
                };
                stream.write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes()).await.unwrap();
                if answer.starts_with("200") {
                    count.fetch_add(1, SeqCst);
                    let mut inner = TcpStream::connect(target).await.unwrap();
                    drop(tokio::io::copy_bidirectional(&mut stream, &mut inner).await);
                }
            });
        }
    });
    (address, tunnels)
}

#[expect(clippy::print_stdout, reason = "the child tells its parent what came of it")]
#[tokio::test]
async fn a_registry_behind_a_tunnel_is_read_and_a_proxy_that_does_not_open_one_is_named() {
    if child::is_child() {
        let tls = Tls { ca_cert_files: vec![std::env::var("AUTHORITY").unwrap().into()], ..Tls::default() };
        let options = ClientOptions { tls, timeouts: hasty(), ..ClientOptions::default() };
        match read("registry.test", options).await {
            Ok(bytes) => println!("came: {bytes:?}"),
            Err(error) => println!("failed: {error}"),
        }
        return;
    }
    let Some(authority) = Authority::new() else { return };
    let inner = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    let target = authority.wrap(inner.address).await;
    let file = authority.file("ca.pem").display().to_string();
    let name = "proxies::a_registry_behind_a_tunnel_is_read_and_a_proxy_that_does_not_open_one_is_named";
    let ask = async |proxy: &str, exempt: &str| {
        let variables = [("AUTHORITY", &*file), ("HTTPS_PROXY", proxy), ("NO_PROXY", exempt)];
        let output = child::run(name, &variables).await;
        child::succeeded(&output);
        String::from_utf8(output.stdout).unwrap()
    };

    let (strict, tunnels) = proxy(Manner::Strict, target.clone()).await;
    let told = ask(&format!("http://me:secret@{strict}"), "").await;
    assert!(told.contains("came:") && tunnels.load(SeqCst) == 1, "{told}");
    // `.test` is resolved by nobody.
    let told = ask(&format!("http://me:secret@{strict}"), "example.org,.test").await;
    assert!(told.contains("failed:") && !told.contains("through the proxy") && tunnels.load(SeqCst) == 1, "{told}");

    let dead = Server::nobody().await.to_string();
    let mut failures = vec![(strict, "authorization required"), (dead, "refused")];
    for (manner, reason) in [(Manner::Refuses, "unsuccessful"), (Manner::Dies, ""), (Manner::Silent, "")] {
        failures.push((proxy(manner, target.clone()).await.0, reason));
    }
    for (address, reason) in failures {
        let told = ask(&format!("http://other:hidden@{address}"), "").await;
        let line = told.lines().find(|line| line.contains("failed:")).unwrap_or_else(|| panic!("{told}"));
        assert!(line.contains("registry.test") && line.contains(reason) && !line.contains("hidden"), "{line}");
        assert!(line.contains(&format!("through the proxy {address}")), "{line}");
    }
}

#[tokio::test]
async fn the_environments_proxy_is_not_used_for_loopback() {
    if !child::is_child() {
        let dead = format!("http://{}", Server::nobody().await);
        let variables = [("HTTP_PROXY", &*dead), ("http_proxy", &dead), ("HTTPS_PROXY", &dead), ("ALL_PROXY", &dead)];
        let name = "proxies::the_environments_proxy_is_not_used_for_loopback";
        child::succeeded(&child::run(name, &variables).await);
        return;
    }
    let server = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    read(&server.host(), plain()).await.unwrap();
    read(&format!("localhost:{}", server.address.port()), plain()).await.unwrap();
    // And it is used for everybody else.
    let error = read("registry.invalid", plain()).await.unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}
