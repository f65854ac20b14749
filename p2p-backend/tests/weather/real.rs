//! The same verbs against the real docker-registry, where it is installed.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use nydus_backend::registry::{Client, ClientOptions, Mounted, Scheme};
use nydus_backend::{Config, Route, RouteOptions, Urgency};
use serde_json::json;

use crate::server::{Server, digest, sample, skipped};

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

/// Starts a registry, or says why not.
async fn start() -> Option<Registry> {
    let data = tempfile::tempdir().unwrap();
    let host = Server::nobody().await.to_string();
    let config = data.path().join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: \"{host}\"}}\n",
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

#[tokio::test]
async fn a_real_registry_takes_and_gives_blobs_and_manifests() {
    let Some(registry) = start().await else { return };
    let options = || ClientOptions { scheme: Scheme::Auto, ..ClientOptions::default() };
    let client = Client::new(&registry.host, options()).unwrap();
    let mut up = false;
    for _ in 0..100 {
        up = client.ping().await.is_ok();
        if up {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(up, "docker-registry did not come up");

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
    let Mounted::Upload(upload) = client.mount_blob("to/there", &digest(&other), "from/here").await.unwrap() else {
        panic!("it is not there")
    };
    let pieces: Vec<Result<Bytes, std::io::Error>> =
        other.chunks(100_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    let upload = upload.stream(None, futures::stream::iter(pieces)).await.unwrap();
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
