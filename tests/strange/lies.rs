//! Images whose documents contradict each other, and what containerd makes of each.

use nydus_tests::liar::Tale;
use nydus_tests::rawtar::{file, tar};
use serde_json::{Value, json};

use super::cases::{Case, Source, Verdict};
use super::made::Layer;

use Verdict::{Refused, Same};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// The platform of this machine, and one that it is not.
const HOST: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
const OTHER: &str = "s390x";

fn lie(name: &'static str, verdict: Verdict, tell: fn(&Tale)) -> Case {
    Case { name, verdict, source: Source::Told(tell), arguments: &[] }
}

/// The parts of an image of one layer, for a platform.
fn parts(tale: &Tale, architecture: &str) -> (Value, Value) {
    let tar = tar(&[file("f", format!("{} for {architecture}", tale.name()))]);
    let layer = tale.blob(LAYER, &Layer::tar(&tar).into_stored());
    let diff_id = nydus_rafs::Algorithm::Sha256.digest(&tar);
    let config = json!({
        "architecture": architecture, "os": "linux", "config": {}, "author": tale.name(),
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    });
    (tale.blob(CONFIG, config.to_string().as_bytes()), layer)
}

fn manifest(tale: &Tale, architecture: &str) -> Value {
    let (config, layer) = parts(tale, architecture);
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]})
}

fn index(entries: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
}

/// An entry of an index: the image for `architecture`, said to be for `said`.
fn entry(tale: &Tale, architecture: &str, said: &str) -> Value {
    let mut entry = tale.document(MANIFEST, &manifest(tale, architecture));
    entry["platform"] = json!({"architecture": said, "os": "linux"});
    entry
}

/// A manifest of the host's image, changed before it is told.
fn changed(tale: &Tale, change: impl FnOnce(&mut Value)) {
    let mut manifest = manifest(tale, HOST);
    change(&mut manifest);
    tale.document_as("oci", MANIFEST, &manifest);
}

/// All of them.
pub(crate) fn all() -> Vec<Case> {
    [indexes(), manifests()].concat()
}

fn indexes() -> Vec<Case> {
    vec![
        lie("index", Same, |tale| {
            let entries = [entry(tale, OTHER, OTHER), entry(tale, HOST, HOST)];
            tale.document_as("oci", INDEX, &index(&entries));
        }),
        lie("index within an index", Same, |tale| {
            let inner = tale.document(INDEX, &index(&[entry(tale, OTHER, OTHER), entry(tale, HOST, HOST)]));
            tale.document_as("oci", INDEX, &index(&[inner]));
        }),
        lie("index without platforms", Refused("does not say"), |tale| {
            let entries = [OTHER, HOST].map(|architecture| tale.document(MANIFEST, &manifest(tale, architecture)));
            tale.document_as("oci", INDEX, &index(&entries));
        }),
        lie("index whose platform lies", Same, |tale| {
            tale.document_as("oci", INDEX, &index(&[entry(tale, OTHER, HOST)]));
        }),
        lie("index of other platforms", Refused("it has linux/s390x"), |tale| {
            tale.document_as("oci", INDEX, &index(&[entry(tale, HOST, OTHER)]));
        }),
        lie("index of nothing", Refused("it has none"), |tale| {
            tale.document_as("oci", INDEX, &index(&[]));
        }),
        lie("index with attestations", Same, |tale| {
            let mut attestation = tale.document(MANIFEST, &manifest(tale, "unknown"));
            attestation["platform"] = json!({"architecture": "unknown", "os": "unknown"});
            attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
            tale.document_as("oci", INDEX, &index(&[attestation, entry(tale, HOST, HOST)]));
        }),
        lie("docker list of oci manifests", Same, |tale| {
            let list = json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry(tale, HOST, HOST)]});
            tale.document_as("oci", DOCKER_LIST, &list);
        }),
        lie("index that names a missing manifest", Refused("404"), |tale| {
            let mut lost = entry(tale, HOST, HOST);
            lost["digest"] = format!("sha256:{}", "0".repeat(64)).into();
            tale.document_as("oci", INDEX, &index(&[lost]));
        }),
        lie("index that names a manifest by another digest", Refused("digest"), |tale| {
            let mut named = entry(tale, HOST, HOST);
            let digest = format!("sha256:{}", "1".repeat(64));
            tale.document_as(&digest, MANIFEST, &manifest(tale, HOST));
            named["digest"] = digest.into();
            tale.document_as("oci", INDEX, &index(&[named]));
        }),
        lie("index that names itself", Refused("digest"), |tale| {
            let digest = format!("sha256:{}", "2".repeat(64));
            let own = json!({"mediaType": INDEX, "digest": digest, "size": 500});
            tale.document_as(&digest, INDEX, &index(std::slice::from_ref(&own)));
            tale.document_as("oci", INDEX, &index(&[own]));
        }),
        lie("index said to be a manifest", Refused("index"), |tale| {
            let mut inner = tale.document(INDEX, &index(&[entry(tale, HOST, HOST)]));
            inner["mediaType"] = MANIFEST.into();
            inner["platform"] = json!({"architecture": HOST, "os": "linux"});
            tale.document_as("oci", INDEX, &index(&[inner]));
        }),
        lie("index that is a manifest too", Refused("both"), |tale| {
            let mut both = index(&[entry(tale, HOST, HOST)]);
            let manifest = manifest(tale, HOST);
            (both["config"], both["layers"]) = (manifest["config"].clone(), manifest["layers"].clone());
            tale.document_as("oci", INDEX, &both);
        }),
    ]
}

fn manifests() -> Vec<Case> {
    vec![
        lie("manifest told the truth", Same, |tale| changed(tale, |_| ())),
        lie("manifest that is an index too", Refused("both"), |tale| {
            let entry = entry(tale, HOST, HOST);
            changed(tale, |manifest| manifest["manifests"] = json!([entry]));
        }),
        lie("manifest served as docker", Same, |tale| {
            let manifest = manifest(tale, HOST);
            tale.document_as("oci", DOCKER_MANIFEST, &manifest);
        }),
        lie("manifest without its own type", Same, |tale| {
            changed(tale, |manifest| drop(manifest.as_object_mut().map(|manifest| manifest.remove("mediaType"))));
        }),
        lie("manifest with unknown fields", Same, |tale| {
            changed(tale, |manifest| {
                manifest["more"] = json!({"a": [1]});
                manifest["annotations"] = Value::Null;
            });
        }),
        lie("manifest of schema 1", Refused("schema 1"), |tale| {
            let (_, layer) = parts(tale, HOST);
            let history = json!({"architecture": HOST, "os": "linux", "id": "0".repeat(64)}).to_string();
            let old = json!({
                "schemaVersion": 1, "name": "x", "tag": "oci", "architecture": HOST,
                "fsLayers": [{"blobSum": layer["digest"]}], "history": [{"v1Compatibility": history}],
            });
            tale.document_as("oci", "application/vnd.docker.distribution.manifest.v1+json", &old);
        }),
        lie("manifest without config", Refused("config"), |tale| {
            changed(tale, |manifest| drop(manifest.as_object_mut().map(|manifest| manifest.remove("config"))));
        }),
        lie("manifest of an artifact", Refused("not a container image"), |tale| {
            let config = tale.blob("application/vnd.example.thing+json", b"{}");
            changed(tale, |manifest| {
                manifest["config"] = config;
                manifest["layers"][0]["mediaType"] = "application/vnd.example.thing".into();
            });
        }),
        lie("config of another type", Same, |tale| {
            changed(tale, |manifest| manifest["config"]["mediaType"] = "application/vnd.example+json".into());
        }),
        lie("config missing", Refused("configuration"), |tale| {
            changed(tale, |manifest| manifest["config"]["digest"] = format!("sha256:{}", "3".repeat(64)).into());
        }),
        lie("config of another digest", Refused("digest"), |tale| {
            let (config, _) = parts(tale, HOST);
            changed(tale, |_| ());
            tale.blob_as(&config, b"{\"architecture\":\"none\"}");
        }),
        lie("config of another size", Refused("configuration"), |tale| {
            changed(tale, |manifest| manifest["config"]["size"] = json!(3));
        }),
        lie("config that is no json", Refused("configuration"), |tale| {
            let config = tale.blob(CONFIG, b"<html>");
            changed(tale, |manifest| manifest["config"] = config);
        }),
        lie("layer missing", Refused("404"), |tale| {
            changed(tale, |manifest| manifest["layers"][0]["digest"] = format!("sha256:{}", "4".repeat(64)).into());
        }),
        lie("layer of no size", Refused("manifest"), |tale| {
            changed(tale, |manifest| manifest["layers"][0]["size"] = json!(-1));
        }),
        lie("layer with a digest of another kind", Refused("sha512"), |tale| {
            changed(tale, |manifest| manifest["layers"][0]["digest"] = format!("sha512:{}", "5".repeat(128)).into());
        }),
        lie("layer with a digest that is none", Refused("digest"), |tale| {
            changed(tale, |manifest| manifest["layers"][0]["digest"] = "sha256:../../x".into());
        }),
        lie("manifest that is a page", Refused("no manifest"), |tale| {
            tale.document_as("oci", "text/html", &json!("<html>"));
        }),
    ]
}
