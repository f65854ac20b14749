//! Manifests and referrers.

use bytes::Bytes;
use nydus_backend::registry::{MAX_MANIFEST, RegistryError};

use crate::server::{How, Reply, Seen, Server, digest};

const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#;

#[tokio::test]
async fn the_digest_of_a_manifest_is_computed_and_not_believed() {
    let registry = Server::start(|seen: &Seen| {
        assert!(seen.header("accept").contains("vnd.oci.image.index.v1+json"));
        Reply::new(200).header("Docker-Content-Digest", digest(b"a lie")).body(MANIFEST)
    })
    .await;
    let manifest = registry.client().manifest("r", "latest").await.unwrap();
    assert_eq!(manifest.digest, digest(MANIFEST.as_bytes()));
    assert_eq!((manifest.bytes, manifest.media_type.contains("oci")), (Bytes::from(MANIFEST), true));
    registry.client().manifest("r", &manifest.digest).await.unwrap();
    let error = registry.client().manifest("r", &digest(b"other")).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
}

#[tokio::test]
async fn a_manifest_without_end_is_refused() {
    let registry = Server::start(|_| Reply::new(200).body(vec![b' '; 1 << 16]).how(How::Endless)).await;
    let error = registry.client().manifest("r", "latest").await.unwrap_err().to_string();
    assert!(error.contains(&MAX_MANIFEST.to_string()), "{error}");
}

#[tokio::test]
async fn whether_a_manifest_is_there_is_asked_without_its_body() {
    let registry = Server::start(|seen: &Seen| match seen.path() {
        path if path.ends_with("/there") => Reply::new(200).header("Docker-Content-Digest", "sha256:x"),
        path if path.ends_with("/silent") => Reply::new(200),
        path if path.ends_with("/denied") => Reply::new(403),
        _ => Reply::new(404),
    })
    .await;
    let client = registry.client();
    assert_eq!(client.has_manifest("r", "there").await.unwrap(), Some(Some("sha256:x".to_owned())));
    assert_eq!(client.has_manifest("r", "silent").await.unwrap(), Some(None));
    assert_eq!(client.has_manifest("r", "absent").await.unwrap(), None);
    assert!(client.has_manifest("r", "denied").await.is_err());
}

#[tokio::test]
async fn referrers_come_from_the_call_or_the_tag_and_are_filtered() {
    let entry = |kind: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":1,"artifactType":"{kind}"}}"#,
            digest(kind.as_bytes())
        )
    };
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{},{}]}}"#, entry("application/a"), entry("application/b"));
    let subject = digest(b"subject");
    for by_tag in [false, true] {
        let (index, tag) = (index.clone(), subject.replace(':', "-"));
        let registry = Server::start(move |seen: &Seen| {
            let found = if by_tag { seen.path().ends_with(&tag) } else { seen.path().contains("/referrers/") };
            if found { Reply::new(200).body(index.clone()) } else { Reply::new(404) }
        })
        .await;
        let client = registry.client();
        assert_eq!(client.referrers("r", &subject, None).await.unwrap().manifests().len(), 2);
        assert_eq!(client.referrers("r", &subject, Some("application/a")).await.unwrap().manifests().len(), 1);
    }
    let registry = Server::start(|_| Reply::new(404)).await;
    assert!(registry.client().referrers("r", &subject, None).await.unwrap().manifests().is_empty());
    let registry = Server::start(|_| Reply::new(503)).await;
    assert!(registry.client().referrers("r", &subject, None).await.is_err());
}
