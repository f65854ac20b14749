//! Callers in every mood: labels without sense, hanging up, asking twice, asking while nothing else answers.

#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[expect(dead_code, reason = "each test file uses a part of the bed")]
#[path = "bed/bed.rs"]
mod bed;
#[path = "bed/golden.rs"]
mod golden;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bed::{Bed, code, labels, may_mount, mounted, signal};
use containerd_snapshots::api::snapshots::v1::PrepareSnapshotRequest;
use golden::{Golden, pull, pull_as};
use nix::sys::signal::Signal;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::Code;

/// What other calls than Prepare, View and Mounts may take at most.
const CALL_LIMIT: Duration = Duration::from_secs(5);

fn request(key: &str, parent: &str) -> PrepareSnapshotRequest {
    PrepareSnapshotRequest {
        snapshotter: String::new(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: HashMap::new(),
    }
}

/// Labels that mean something, with values that make sense, and that make none.
fn any_labels() -> impl Strategy<Value = HashMap<String, String>> {
    let key = prop_oneof![
        8 => prop::sample::select(vec![
            "containerd.io/snapshot.ref",
            "containerd.io/snapshot/cri.image-ref",
            "containerd.io/snapshot/cri.layer-digest",
            "containerd.io/snapshot/cri.image-layers",
            "containerd.io/snapshot/cri.manifest-digest",
            "containerd.io/snapshot/remote/stargz.reference",
            "containerd.io/snapshot/nydus-blob",
            "containerd.io/snapshot/nydus-bootstrap",
            "containerd.io/snapshot/nydus-fs-version",
            "containerd.io/snapshot/nydus-ref",
            "containerd.io/snapshot/nydus-signature",
            "containerd.io/snapshot/tarfs-hint",
            "containerd.io/snapshot/overlay.volatile",
            "containerd.io/snapshot/uidmapping",
            "containerd.io/snapshot/gidmapping",
            "containerd.io/snapshot/pullusername",
            "containerd.io/snapshot/pullsecret",
        ])
        .prop_map(str::to_owned),
        1 => "\\PC{0,40}",
    ];
    let value = prop_oneof![
        3 => prop::sample::select(vec!["", "true", "0:1000:65536", "1:2", "sha256:ab", "r.example/a:1", "../../etc", "a,b:c\\d"])
            .prop_map(str::to_owned),
        1 => (0..3_u8).prop_map(|number| format!("sha256:{}", char::from(b'a' + number).to_string().repeat(64))),
        1 => "\\PC{0,60}",
        1 => Just("x".repeat(4096)),
    ];
    prop::collection::hash_map(key, value, 0..7)
}

#[tokio::test]
async fn no_labels_make_a_snapshot_that_containerd_cannot_use() {
    if !may_mount() {
        return;
    }
    let mut bed = Bed::plain().await;
    bed.prepare("base-key", "", labels(&[])).await.expect("prepared");
    bed.commit("base", "base-key", labels(&[])).await.expect("committed");
    let mut runner = TestRunner::deterministic();
    let mut met: HashMap<Code, usize> = HashMap::new();
    for round in 0..300 {
        let asked = any_labels().new_tree(&mut runner).expect("a value").current();
        let parent = if round % 3 == 0 { "base" } else { "" };
        let key = format!("key-{round}");
        let answer = bed.prepare(&key, parent, asked.clone()).await;
        let what = format!("{asked:?} on {parent:?}");
        let got = answer.as_ref().err().map_or(Code::Ok, tonic::Status::code);
        *met.entry(got).or_default() += 1;
        match answer {
            Ok(mounts) => {
                assert_eq!(bed.mounts(&key).await.expect("mounts"), mounts, "{what}");
                assert_eq!(bed.stat(&key).await.expect("known").labels, asked, "{what}");
                // The kernel has no such option: containerd maps owners itself.
                if !mounts[0].options.iter().any(|option| option.starts_with("uidmap=")) {
                    fs::write(mounted(&mounts).path().join("file"), "x")
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                bed.commit(&format!("name-{round}"), &key, asked.clone()).await.expect("committed");
                bed.usage(&format!("name-{round}")).await.expect("measured");
                bed.remove(&format!("name-{round}")).await.expect("removed");
            }
            Err(status) if status.code() == Code::AlreadyExists => {
                // What containerd does then: find it, or fail the pull.
                let target = &asked["containerd.io/snapshot.ref"];
                let filter = format!("labels.\"containerd.io/snapshot.ref\"=={target:?},parent=={parent:?}");
                // Go quotes what our words for text do not; those that it would write the same are enough.
                if target.chars().all(|c| c.is_ascii_graphic() && c != '\'') {
                    let found = bed.list(&[&filter]).await.unwrap_or_else(|error| panic!("{filter}: {error}"));
                    assert_eq!(found.len(), 1, "{what}");
                }
                for info in bed.list(&["name!=base"]).await.expect("listed") {
                    bed.remove(&info.name).await.expect("removed");
                }
            }
            Err(status) => {
                assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
                assert!(status.message().contains("mapping"), "{what}: {status:?}");
            }
        }
    }
    for code in [Code::Ok, Code::AlreadyExists, Code::InvalidArgument] {
        assert!(met.contains_key(&code), "{code:?} was never met: {met:?}");
    }
    assert_eq!(bed.directories().len(), 1, "only the base is left");
    assert!(!bed.log().contains("panicked"));
}

#[tokio::test]
async fn a_name_that_is_empty_is_refused() {
    let mut bed = Bed::plain().await;
    assert_eq!(code(bed.prepare("", "", labels(&[])).await), Code::InvalidArgument);
    assert_eq!(code(bed.view("", "").await), Code::InvalidArgument);
    bed.prepare("key", "", labels(&[])).await.expect("prepared");
    assert_eq!(code(bed.commit("", "key", labels(&[])).await), Code::InvalidArgument);
    assert_eq!(bed.list(&[]).await.expect("listed").len(), 1);
}

/// A nydusd that takes two seconds to start.
fn slow(nydusd: &Path, dir: &Path) -> PathBuf {
    let path = dir.join("slow-nydusd");
    fs::write(&path, format!("#!/bin/sh\nsleep 2\nexec {} \"$@\"\n", nydusd.display())).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
    path
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_nothing_under_its_key_and_its_repeat_joins() {
    let Some(nydusd) = bed::nydusd() else { return };
    let Some(golden) = Golden::unpack() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let mut bed = Bed::new(&slow(&nydusd, dir.path()), &golden.template(), &[]).await;
    let image = pull(&mut bed, &golden, "one").await;
    // Long enough for the call to arrive on a busy machine, and half of what the daemon takes to start.
    let patience = Duration::from_secs(1);
    let mut client = bed.client.clone();
    let given_up = tokio::time::timeout(patience, client.prepare(request("c", &image))).await;
    assert!(given_up.is_err(), "it was too quick to be given up");
    let begun = Instant::now();
    let mounts = bed.prepare("c", &image, labels(&[])).await.expect("the repeat succeeds");
    assert!(begun.elapsed() < Duration::from_secs(15));
    golden.compare(mounted(&mounts).path());
    assert_eq!(bed.nydusds().len(), 1, "the repeat joined the start of the daemon");

    // Given up and never repeated: nothing stays.
    for pid in bed.nydusds() {
        signal(pid, Signal::SIGKILL);
    }
    let mut client = bed.client.clone();
    drop(tokio::time::timeout(patience, client.prepare(request("d", &image))).await);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(code(bed.stat("d").await), Code::NotFound);
    assert_eq!(bed.directories().len(), 4, "two layers, the bootstrap, one container");
    assert!(bed.log().contains("its caller is gone"), "{}", bed.log());
}

#[tokio::test]
async fn one_key_asked_for_many_times_at_once_is_one_snapshot() {
    let Some(nydusd) = bed::nydusd() else { return };
    let Some(golden) = Golden::unpack() else { return };
    let mut bed = Bed::new(&nydusd, &golden.template(), &[]).await;
    let image = pull(&mut bed, &golden, "one").await;
    for parent in ["", image.as_str()] {
        let key = format!("same-{}", parent.len());
        let calls = (0..10).map(|_| {
            let mut client = bed.client.clone();
            let request = request(&key, parent);
            async move { client.prepare(request).await.map(drop) }
        });
        let answers = futures::future::join_all(calls).await;
        let codes: Vec<Code> =
            answers.into_iter().map(|answer| answer.err().map_or(Code::Ok, |status| status.code())).collect();
        assert_eq!(codes.iter().filter(|code| **code == Code::Ok).count(), 1, "{codes:?}");
        assert_eq!(codes.iter().filter(|code| **code == Code::AlreadyExists).count(), 9, "{codes:?}");
        bed.mounts(&key).await.expect("mounts");
    }
    assert_eq!(bed.directories().len(), 5);
}

#[tokio::test]
async fn cleanup_beside_other_calls_takes_nothing_away() {
    let mut bed = Bed::plain().await;
    let mut client = bed.client.clone();
    let cleaning = tokio::spawn(async move {
        for _ in 0..60 {
            client
                .cleanup(containerd_snapshots::api::snapshots::v1::CleanupRequest::default())
                .await
                .expect("cleaned up");
        }
    });
    for number in 0..60 {
        let key = format!("k{number}");
        let mounts = bed.prepare(&key, "", labels(&[])).await.expect("prepared");
        fs::write(Path::new(&mounts[0].source).join("file"), &key).expect("its directory is there");
        bed.commit(&format!("n{number}"), &key, labels(&[])).await.expect("committed");
        if number % 3 == 0 {
            bed.remove(&format!("n{number}")).await.expect("removed");
        }
    }
    cleaning.await.expect("no panic");
    assert_eq!(bed.directories().len(), bed.list(&[]).await.expect("listed").len());
}

/// Runs a call that must not wait for anybody.
async fn quick<T>(what: &str, call: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let answer = call.await;
    assert!(begun.elapsed() < CALL_LIMIT, "{what} took {:?}", begun.elapsed());
    answer
}

#[tokio::test]
async fn only_mounts_wait_for_a_daemon_that_hangs() {
    let Some(nydusd) = bed::nydusd() else { return };
    let Some(golden) = Golden::unpack() else { return };
    let mut bed = Bed::new(&nydusd, &golden.template(), &[]).await;
    let image = pull(&mut bed, &golden, "one").await;
    bed.prepare("c", &image, labels(&[])).await.expect("prepared");
    let stuck = bed.nydusds();
    signal(stuck[0], Signal::SIGSTOP);
    quick("stat", bed.stat("c")).await.expect("known");
    quick("list", bed.list(&[])).await.expect("listed");
    quick("usage of a container", bed.usage("c")).await.expect("measured");
    quick("usage of a data layer", bed.usage("sha256:chain0")).await.expect("measured");
    quick("commit", bed.commit("done", "c", labels(&[]))).await.expect("committed");
    quick("remove", bed.remove("done")).await.expect("removed");
    quick("remove of the image", bed.remove(&image)).await.expect("removed");
    quick("cleanup", bed.cleanup()).await.expect("cleaned up");
    signal(stuck[0], Signal::SIGCONT);
    let begun = Instant::now();
    while fs::read_dir(bed.root().join("mnt")).expect("there").count() > 0 {
        bed.cleanup().await.expect("cleaned up");
        assert!(begun.elapsed() < Duration::from_secs(15), "the image is still mounted");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A frame of HTTP/2 on the first stream.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("a short payload");
    [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
}

#[tokio::test]
async fn a_caller_whose_authority_is_the_path_of_the_socket_is_answered() {
    const PATH: &[u8] = b"/containerd.services.snapshots.v1.Snapshots/Stat";
    const AUTHORITY: &[u8] = b"run%2Fcontainerd-nydus%2Fs.sock";
    let bed = Bed::plain().await;
    let mut connection = UnixStream::connect(bed.root().with_file_name("s.sock")).await.expect("connected");
    let text = |name: &[u8], value: &[u8]| {
        let length = |text: &[u8]| [u8::try_from(text.len()).expect("a short text")];
        [&[0x40][..], &length(name), name, &length(value), value].concat()
    };
    // As gRPC's C core writes them, then `:method POST` and `:scheme http` by their numbers.
    let headers = [
        text(b":path", PATH),
        text(b":authority", AUTHORITY),
        b"\x83\x86".to_vec(),
        text(b"content-type", b"application/grpc"),
        text(b"te", b"trailers"),
    ]
    .concat();
    let call = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, b""),
        frame(1, 4, 1, &headers),
        frame(0, 1, 1, b"\0\0\0\0\x03\x12\x01x"),
    ]
    .concat();
    connection.write_all(&call).await.expect("written");
    let answer = loop {
        let mut head = [0; 9];
        connection.read_exact(&mut head).await.expect("an answer");
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        connection.read_exact(&mut payload).await.expect("an answer");
        if head[8] == 1 && [1, 3].contains(&head[3]) {
            break head[3];
        }
    };
    assert_eq!(answer, 1, "the stream was reset instead of answered with headers");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_asks_the_registry_until_something_is_read() {
    let Some(nydusd) = bed::nydusd() else { return };
    let Some(golden) = Golden::unpack() else { return };
    // It accepts and never answers.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let host = listener.local_addr().expect("bound").to_string();
    let connected = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connected);
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            count.fetch_add(1, SeqCst);
            held.push(connection);
        }
    });
    let template = r#"{"device":{"backend":{"type":"registry","config":{"scheme":"http"}},
        "cache":{"type":"blobcache","config":{}}},"mode":"direct","read_deadline":5}"#;
    let mut bed = Bed::new(&nydusd, template, &[]).await;
    let reference = format!("{host}/team/golden:1");
    let named = [("containerd.io/snapshot/cri.image-ref", reference.as_str())];
    let image = pull_as(&mut bed, &golden, "one", &named).await;
    let mounts = quick("prepare", bed.prepare("c", &image, labels(&[]))).await.expect("prepared");
    quick("view", bed.view("v", &image)).await.expect("viewed");
    quick("mounts", bed.mounts("c")).await.expect("mounts");
    quick("stat", bed.stat("c")).await.expect("known");
    quick("list", bed.list(&[])).await.expect("listed");
    quick("usage", bed.usage("sha256:chain0")).await.expect("measured");
    bed.prepare("e", &image, labels(&[])).await.expect("prepared");
    quick("commit", bed.commit("done", "e", labels(&[]))).await.expect("committed");
    quick("remove", bed.remove("done")).await.expect("removed");
    assert_eq!(connected.load(SeqCst), 0, "somebody asked the registry");
    let at = mounted(&mounts);
    let path = at.path().to_path_buf();
    let read = tokio::task::spawn_blocking(move || {
        let mut waiting = vec![path];
        while let Some(place) = waiting.pop() {
            match fs::metadata(&place) {
                Ok(found) if found.is_dir() => {
                    waiting.extend(fs::read_dir(&place).expect("read").flatten().map(|entry| entry.path()));
                }
                Ok(found) if found.is_file() && found.len() > 0 => return fs::read(&place).is_ok(),
                _ => {}
            }
        }
        panic!("the image has no file");
    });
    assert!(!read.await.expect("no panic"), "bytes came from a registry that never answers");
    assert!(connected.load(SeqCst) > 0, "a read asks the registry");
}
