//! The same verbs against the real docker-registry, where it is installed.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use nydus_backend::registry::{Client, ClientOptions, Mounted, RegistryError, Scheme};
use nydus_backend::{Config, Credential, Route, RouteOptions, Urgency};
use serde_json::json;

use crate::authority::Authority;
use crate::server::{Reply, Seen, Server, digest, sample, skipped};

struct Registry {
    child: Child,
    host: String,
    _data: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Starts a registry with further lines of configuration, or says why not.
async fn start(tls: &str, more: &str) -> Option<Registry> {
    let data = tempfile::tempdir().unwrap();
    let host = Server::nobody().await.to_string();
    let config = data.path().join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: \"{host}\"\n{tls}{more}",
        data.path().display()
    );
    std::fs::write(&config, text).unwrap();
    let started =
        Command::new("docker-registry").arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    match started {
        Ok(child) => Some(Registry { child, host, _data: data }),
        Err(error) => {
            skipped(&format!("docker-registry cannot be started: {error}"));
            None
        }
    }
}

/// Waits until it answers, be it with a no.
async fn up(client: &Client) {
    for _ in 0..100 {
        match client.ping().await {
            Err(RegistryError::Http(_)) => tokio::time::sleep(Duration::from_millis(100)).await,
            _ => return,
        }
    }
    panic!("docker-registry did not come up");
}

#[tokio::test]
async fn a_real_registry_takes_and_gives_blobs_and_manifests() {
    let Some(registry) = start("", "").await else { return };
    let options = || ClientOptions { scheme: Scheme::Auto, ..ClientOptions::default() };
    let client = Client::new(&registry.host, options()).unwrap();
    up(&client).await;

    let blob = sample(3_000_000);
    let name = digest(&blob);
    assert!(!client.has_blob("from/here", &name).await.unwrap());
    client.push_blob("from/here", &name, blob.clone()).await.unwrap();
    assert!(client.has_blob("from/here", &name).await.unwrap());
    assert_eq!(client.blob_size("from/here", &name).await.unwrap(), 3_000_000);
    assert_eq!(
        client.blob_range("from/here", &name, 1_000_000..2_000_000).await.unwrap(),
        blob.slice(1_000_000..2_000_000)
    );
    assert!(matches!(client.mount_blob("to/there", &name, "from/here").await.unwrap(), Mounted::Done));

    let other = sample(1_234_567).slice(1..);
    let Mounted::Upload(mut upload) = client.mount_blob("to/there", &digest(&other), "from/here").await.unwrap() else {
        panic!("it is not there")
    };
    let pieces: Vec<Result<Bytes, std::io::Error>> =
        other.chunks(100_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    upload.stream(None, futures::stream::iter(pieces)).await.unwrap();
    upload.finish(&digest(&other), Bytes::new()).await.unwrap();
    assert_eq!(client.blob_size("to/there", &digest(&other)).await.unwrap(), 1_234_566);

    let layer = |digest: &str, size: usize| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": name, "size": blob.len()},
        "layers": [layer(&digest(&other), other.len())],
    });
    let bytes = Bytes::from(manifest.to_string());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let put = client.put_manifest("to/there", "v1", kind, bytes.clone()).await.unwrap();
    let got = client.manifest("to/there", "v1").await.unwrap();
    assert_eq!((got.bytes, got.digest.as_str(), got.media_type.as_str()), (bytes, put.as_str(), kind));
    assert_eq!(client.has_manifest("to/there", "v2").await.unwrap(), None);
    assert!(client.referrers("to/there", &put, None).await.unwrap().manifests().is_empty());

    let table = json!({"scheme": "http", "host": registry.host, "repo": "to/there"});
    let route = Route::open(&Config::from_parts("registry", table).unwrap(), RouteOptions::default()).unwrap();
    let id = name.trim_start_matches("sha256:").parse().unwrap();
    assert_eq!(route.read(&id, 5..1_500_000, Urgency::Demand).await.unwrap(), blob.slice(5..1_500_000));
    assert_eq!(route.size(&id).await.unwrap(), 3_000_000);
    let absent = "0".repeat(64).parse().unwrap();
    assert!(route.read(&absent, 0..5, Urgency::Demand).await.unwrap_err().is_missing());
}

const SERVICE: &str = "shoal-weather";

/// A token service whose tokens the registry believes: signed by the key of a certificate that its authority gave.
async fn token_service(authority: &Authority) -> Server {
    let (key, certificate) = (authority.file("server.key"), authority.file("server.pem"));
    Server::start(move |seen: &Seen| {
        // `me:secret`.
        if seen.header("authorization") != "Basic bWU6c2VjcmV0" {
            return Reply::new(401).body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you?"}]}"#);
        }
        let asked = if seen.method == "POST" { seen.form() } else { seen.query() };
        let access: Vec<serde_json::Value> = asked
            .get("scope")
            .into_iter()
            .flat_map(|scopes| scopes.split(' '))
            .map(|scope| {
                let parts: Vec<&str> = scope.split(':').collect();
                json!({"type": parts[0], "name": parts[1], "actions": parts[2].split(',').collect::<Vec<_>>()})
            })
            .collect();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let chain = std::fs::read_to_string(&certificate).unwrap();
        let chain: String = chain.lines().filter(|line| !line.starts_with("-----")).collect();
        let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!(
            "{}.{}",
            part(json!({"typ": "JWT", "alg": "RS256", "x5c": [chain]})),
            part(json!({"iss": SERVICE, "sub": "me", "aud": SERVICE, "exp": now + 300, "nbf": now - 60, "iat": now,
                "jti": "1", "access": access})),
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &signed).unwrap();
        let signature =
            Command::new("openssl").args(["dgst", "-sha256", "-sign"]).arg(&key).arg(file.path()).output().unwrap();
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.stdout));
        Reply::new(200).body(json!({"token": token, "expires_in": 300}).to_string())
    })
    .await
}

#[tokio::test]
async fn a_real_registry_with_tls_and_tokens_is_read_and_written_by_who_may() {
    let Some(authority) = Authority::new() else { return };
    let service = token_service(&authority).await;
    let realm = format!("https://{}/token", authority.wrap(service.address).await);
    let file = |name: &str| authority.file(name).display().to_string();
    let tls = format!("  tls: {{certificate: {}, key: {}}}\n", file("server.pem"), file("server.key"));
    let auth = format!(
        "auth:\n  token: {{realm: \"{realm}\", service: {SERVICE}, issuer: {SERVICE}, rootcertbundle: {}}}\n",
        file("ca.pem")
    );
    let Some(registry) = start(&tls, &auth).await else { return };
    let credential = Credential::Basic { user: "me".into(), password: "secret".into() };
    let options = |credential| ClientOptions { tls: authority.trusted(), credential, ..ClientOptions::default() };
    let client = Client::new(&registry.host, options(credential)).unwrap();
    up(&client).await;

    let (blob, other) = (sample(2_000_000), sample(500_000).slice(1..));
    let (name, other_name) = (digest(&blob), digest(&other));
    client.push_blob("from/here", &name, blob.clone()).await.unwrap();
    assert!(matches!(client.mount_blob("to/there", &name, "from/here").await.unwrap(), Mounted::Done));
    client.push_blob("to/there", &other_name, other).await.unwrap();
    assert_eq!(client.blob_range("to/there", &name, 5..1_500_000).await.unwrap(), blob.slice(5..1_500_000));

    let stranger = Client::new(&registry.host, options(Credential::Anonymous)).unwrap();
    let error = stranger.blob_range("to/there", &name, 0..5).await.unwrap_err();
    assert!(error.status().unwrap() == 401 && error.to_string().contains("who are you?"), "{error}");

    let table = json!({"scheme": "https", "host": registry.host, "repo": "to/there", "auth": "bWU6c2VjcmV0",
        "ca_cert_files": [file("ca.pem")]});
    let route = Route::open(&Config::from_parts("registry", table.clone()).unwrap(), RouteOptions::default()).unwrap();
    let id = name.trim_start_matches("sha256:").parse().unwrap();
    assert_eq!(route.read(&id, 5..1_500_000, Urgency::Demand).await.unwrap(), blob.slice(5..1_500_000));
    let mut untrusting = table;
    untrusting["ca_cert_files"] = json!([]);
    let route = Route::open(&Config::from_parts("registry", untrusting).unwrap(), RouteOptions::default()).unwrap();
    let error = route.read(&id, 0..5, Urgency::Demand).await.unwrap_err().to_string();
    assert!(error.contains("ca_cert_files") && error.contains(&registry.host), "{error}");
}
