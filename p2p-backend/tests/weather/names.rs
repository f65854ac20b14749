//! Names that cannot be resolved, that change, and that have addresses where nobody answers.
//!
//! Each test runs again in a mount namespace with an `/etc/hosts` of its own, so that the system's resolver is asked.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nydus_backend::http::{Reach, Timeouts};
use nydus_backend::registry::{Client, ClientOptions, RegistryError, Scheme};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::child;
use crate::server::{Reply, Server, digest, hasty, sample, skipped};

/// Returns whether this is the process whose `/etc/hosts` may be written; else runs the test `name` in one.
async fn has_own_names(name: &str) -> bool {
    if child::is_child() {
        return true;
    }
    let hosts = tempfile::NamedTempFile::new().unwrap();
    match child::run_with_hosts(&format!("names::{name}"), hosts.path(), &[]).await {
        Some(output) => child::succeeded(&output),
        None => skipped("a mount namespace cannot be had"),
    }
    false
}

fn name(addresses: &[&str]) {
    let lines: String = addresses.iter().map(|address| format!("{address} registry.test\n")).collect();
    std::fs::write("/etc/hosts", format!("127.0.0.1 localhost\n{lines}")).unwrap();
}

/// A client that would rather wait than fail.
fn client(port: u16) -> Client {
    let long = Duration::from_secs(20);
    let timeouts = Timeouts { connect: long, first_byte: long, stall: long };
    let options = ClientOptions { scheme: Scheme::Http, timeouts, ..ClientOptions::default() };
    Client::new(&format!("registry.test:{port}"), options).unwrap()
}

async fn read(client: &Client) -> Result<bytes::Bytes, RegistryError> {
    client.blob_range("r", &digest(b"x"), 10..20).await
}

async fn good() -> Server {
    Server::start(|seen| Reply::ranged(seen, &sample(100))).await
}

/// Makes `address` one where connections are neither accepted nor refused, as long as its full queue is held.
async fn swallow(address: SocketAddr) -> (TcpListener, Vec<TcpStream>) {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(1).unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
        queue.push(stream.unwrap());
    }
    (listener, queue)
}

#[tokio::test]
async fn an_address_that_swallows_connections_is_passed_over_within_one_request() {
    if !has_own_names("an_address_that_swallows_connections_is_passed_over_within_one_request").await {
        return;
    }
    let server = good().await;
    let port = server.address.port();
    let _dead = swallow(SocketAddr::from(([127, 0, 0, 2], port))).await;
    name(&["127.0.0.2", "127.0.0.1"]);
    let timeouts = Timeouts { connect: Duration::from_secs(2), first_byte: Duration::from_secs(4), ..hasty() };
    let options = ClientOptions { scheme: Scheme::Http, timeouts, ..ClientOptions::default() };
    let client = Client::new(&format!("registry.test:{port}"), options).unwrap();
    assert_eq!(read(&client).await.unwrap(), sample(100).slice(10..20));
}

#[tokio::test]
async fn the_other_family_is_tried_soon_where_the_first_swallows_connections() {
    if !has_own_names("the_other_family_is_tried_soon_where_the_first_swallows_connections").await {
        return;
    }
    let server = good().await;
    let port = server.address.port();
    name(&["::1", "127.0.0.1"]);
    if TcpSocket::new_v6().and_then(|socket| socket.bind("[::1]:0".parse().unwrap())).is_err() {
        return skipped("there is no IPv6 here");
    }
    let _dead = swallow(format!("[::1]:{port}").parse().unwrap()).await;
    let begin = Instant::now();
    assert_eq!(read(&client(port)).await.unwrap(), sample(100).slice(10..20));
    // Without the second attempt beside the first it takes half of the 20 s.
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_name_that_fails_or_changes_is_asked_for_again() {
    if !has_own_names("a_name_that_fails_or_changes_is_asked_for_again").await {
        return;
    }
    let first = good().await;
    let port = first.address.port();
    name(&[]);
    let client = client(port);
    let error = read(&client).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("registry.test"), "{error}");
    name(&["127.0.0.1"]);
    read(&client).await.unwrap();
    first.stop().await;
    let _second =
        Server::start_at(SocketAddr::from(([127, 0, 0, 3], port)), |seen| Reply::ranged(seen, &sample(100))).await;
    name(&["127.0.0.3"]);
    assert_eq!(read(&client).await.unwrap(), sample(100).slice(10..20));
}

#[tokio::test]
async fn a_name_of_the_metadata_service_is_not_asked_on_behalf_of_others() {
    if !has_own_names("a_name_of_the_metadata_service_is_not_asked_on_behalf_of_others").await {
        return;
    }
    let server = good().await;
    let options = ClientOptions {
        scheme: Scheme::Http,
        timeouts: hasty(),
        reach: Reach::NotLinkLocal,
        ..ClientOptions::default()
    };
    let client = Client::new(&format!("registry.test:{}", server.address.port()), options).unwrap();
    name(&["169.254.169.254", "::ffff:169.254.1.1"]);
    let error = read(&client).await.unwrap_err().to_string();
    assert!(error.contains("link-local"), "{error}");
    name(&["169.254.169.254", "127.0.0.1"]);
    read(&client).await.unwrap();
}
