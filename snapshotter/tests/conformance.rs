//! The service as containerd's own test suite for snapshotters expects it, over the real socket.

#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[expect(dead_code, reason = "each test file uses a part of the bed")]
#[path = "bed/bed.rs"]
mod bed;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use bed::{Bed, code, labels, may_mount, mounted};
use containerd_snapshots::api::snapshots::v1::Kind;
use tonic::Code;

const TARGET: &str = "containerd.io/snapshot.ref";
const DATA: &str = "containerd.io/snapshot/nydus-blob";

fn none() -> HashMap<String, String> {
    HashMap::new()
}

/// Commits a layer with one file and returns nothing: its name is its content.
async fn layer(bed: &mut Bed, name: &str, parent: &str) {
    let key = format!("{name}-key");
    let mounts = bed.prepare(&key, parent, none()).await.expect("prepared");
    let at = mounted(&mounts);
    fs::write(at.path().join(name), name).expect("written");
    fs::write(at.path().join("top"), name).expect("written");
    drop(at);
    bed.commit(name, &key, none()).await.expect("committed");
}

#[tokio::test]
async fn layers_stack_and_containers_write_to_their_own() {
    if !may_mount() {
        return;
    }
    let mut bed = Bed::plain().await;
    for (name, parent) in [("one", ""), ("two", "one"), ("three", "two")] {
        layer(&mut bed, name, parent).await;
    }
    let mounts = bed.prepare("container", "three", none()).await.expect("prepared");
    assert_eq!(bed.mounts("container").await.expect("mounts"), mounts, "Mounts repeats Prepare");
    let at = mounted(&mounts);
    for name in ["one", "two", "three"] {
        assert_eq!(fs::read_to_string(at.path().join(name)).expect("read"), name);
    }
    assert_eq!(fs::read_to_string(at.path().join("top")).expect("read"), "three");
    fs::write(at.path().join("one"), "changed").expect("written");
    drop(at);
    let view = mounted(&bed.view("look", "three").await.expect("viewed"));
    assert_eq!(fs::read_to_string(view.path().join("one")).expect("read"), "one");
    fs::write(view.path().join("x"), "").expect_err("a view is read-only");
    drop(view);
    let single = mounted(&bed.view("look-at-one", "one").await.expect("viewed"));
    assert!(!single.path().join("two").exists());
    fs::write(single.path().join("x"), "").expect_err("a view is read-only");
}

#[tokio::test]
async fn a_view_of_nothing_is_an_empty_directory() {
    let mut bed = Bed::plain().await;
    let mounts = bed.view("empty", "").await.expect("viewed");
    assert_eq!(
        (mounts[0].r#type.as_str(), mounts[0].options.as_slice()),
        ("bind", &["ro".to_owned(), "rbind".to_owned()][..])
    );
    assert_eq!(fs::read_dir(&mounts[0].source).expect("there").count(), 0);
    let info = bed.stat("empty").await.expect("known");
    assert_eq!(info.kind(), Kind::View);
}

#[tokio::test]
async fn every_misuse_has_its_code() {
    let mut bed = Bed::plain().await;
    bed.prepare("base-key", "", none()).await.expect("prepared");
    bed.commit("base", "base-key", none()).await.expect("committed");
    bed.prepare("active", "base", none()).await.expect("prepared");
    bed.view("view", "base").await.expect("viewed");

    assert_eq!(code(bed.prepare("active", "base", none()).await), Code::AlreadyExists);
    assert_eq!(code(bed.prepare("base", "", none()).await), Code::AlreadyExists);
    assert_eq!(code(bed.view("active", "base").await), Code::AlreadyExists);
    assert_eq!(code(bed.prepare("x", "missing", none()).await), Code::NotFound);
    assert_eq!(code(bed.view("x", "missing").await), Code::NotFound);
    assert_eq!(code(bed.prepare("x", "active", none()).await), Code::InvalidArgument);
    assert_eq!(code(bed.view("x", "view").await), Code::InvalidArgument);
    assert_eq!(code(bed.mounts("missing").await), Code::NotFound);
    assert_eq!(code(bed.mounts("base").await), Code::FailedPrecondition);
    assert_eq!(code(bed.commit("base", "active", none()).await), Code::AlreadyExists);
    assert_eq!(code(bed.commit("new", "missing", none()).await), Code::NotFound);
    assert_eq!(code(bed.commit("new", "view", none()).await), Code::FailedPrecondition);
    assert_eq!(code(bed.commit("new", "base", none()).await), Code::FailedPrecondition);
    assert_eq!(code(bed.stat("missing").await), Code::NotFound);
    assert_eq!(code(bed.usage("missing").await), Code::NotFound);
    assert_eq!(code(bed.remove("missing").await), Code::NotFound);
    assert_eq!(code(bed.remove("base").await), Code::FailedPrecondition);
    assert_eq!(code(bed.list(&["kind=="]).await), Code::InvalidArgument);
    let half = labels(&[("containerd.io/snapshot/uidmapping", "0:1:2")]);
    assert_eq!(code(bed.prepare("x", "base", half).await), Code::InvalidArgument);

    for key in ["active", "view", "base"] {
        bed.remove(key).await.expect("leaf first");
    }
    assert_eq!(bed.list(&[]).await.expect("listed"), []);
    assert_eq!(bed.directories(), Vec::<String>::new(), "nothing is left on disk");
}

#[tokio::test]
async fn stat_tells_kinds_parents_labels_and_times() {
    let mut bed = Bed::plain().await;
    let before = SystemTime::now();
    bed.prepare("k", "", labels(&[("a", "1")])).await.expect("prepared");
    let active = bed.stat("k").await.expect("known");
    assert_eq!((active.name.as_str(), active.parent.as_str(), active.kind()), ("k", "", Kind::Active));
    assert_eq!(active.labels, labels(&[("a", "1")]));
    assert_eq!(active.created_at, active.updated_at);
    let created = SystemTime::try_from(active.created_at.expect("set")).expect("after 1970");
    assert!(created >= before && created <= SystemTime::now());

    bed.commit("n", "k", labels(&[("b", "2")])).await.expect("committed");
    assert_eq!(code(bed.stat("k").await), Code::NotFound);
    let committed = bed.stat("n").await.expect("known");
    assert_eq!(committed.kind(), Kind::Committed);
    assert_eq!(committed.labels, labels(&[("b", "2")]), "labels are replaced, not merged");

    bed.view("v", "n").await.expect("viewed");
    let view = bed.stat("v").await.expect("known");
    assert_eq!((view.parent.as_str(), view.kind()), ("n", Kind::View));
}

#[tokio::test]
async fn update_honours_its_mask() {
    let mut bed = Bed::plain().await;
    bed.prepare("k", "", labels(&[("a", "1"), ("b", "2")])).await.expect("prepared");
    let first = bed.stat("k").await.expect("known");
    let with = |pairs: &[(&str, &str)]| {
        let mut info = first.clone();
        info.labels = labels(pairs);
        info
    };
    let one = bed.update(with(&[("a", "9"), ("c", "3")]), &["labels.a"]).await.expect("updated");
    assert_eq!(one.labels, labels(&[("a", "9"), ("b", "2")]));
    assert_eq!(one.created_at, first.created_at);
    let (old, new) = (first.updated_at.clone().expect("set"), one.updated_at.clone().expect("set"));
    assert!((new.seconds, new.nanos) > (old.seconds, old.nanos), "the time of a change moves");
    let gone = bed.update(with(&[]), &["labels.a"]).await.expect("updated");
    assert_eq!(gone.labels, labels(&[("b", "2")]), "an absent value removes a label");
    let whole = bed.update(with(&[("x", "1")]), &["labels"]).await.expect("updated");
    assert_eq!(whole.labels, labels(&[("x", "1")]));
    let all = bed.update(with(&[("y", "1")]), &[]).await.expect("updated");
    assert_eq!(all.labels, labels(&[("y", "1")]));
    let dotted = bed.update(with(&[("containerd.io/snapshot/x.y", "1")]), &["labels.containerd.io/snapshot/x.y"]).await;
    assert_eq!(dotted.expect("updated").labels, labels(&[("y", "1"), ("containerd.io/snapshot/x.y", "1")]));
    assert_eq!(bed.stat("k").await.expect("known").labels.len(), 2);
    for field in ["parent", "kind", "name", "created_at"] {
        assert_eq!(code(bed.update(with(&[]), &[field]).await), Code::InvalidArgument, "{field}");
    }
    let mut missing = first.clone();
    missing.name = "missing".into();
    assert_eq!(code(bed.update(missing, &["labels"]).await), Code::NotFound);
}

#[tokio::test]
async fn more_snapshots_than_one_message_holds_are_listed() {
    let mut bed = Bed::plain().await;
    for number in 0..130 {
        bed.prepare(&format!("k{number}"), "", labels(&[("n", &number.to_string())])).await.expect("prepared");
    }
    assert_eq!(bed.list(&[]).await.expect("listed").len(), 130);
    assert_eq!(bed.list(&["labels.n==7", "name==k9"]).await.expect("listed").len(), 2);
    assert_eq!(bed.list(&["kind==committed"]).await.expect("listed").len(), 0);
}

#[tokio::test]
async fn usage_counts_an_inode_once_and_is_kept_at_commit() {
    let mut bed = Bed::plain().await;
    let mounts = bed.prepare("k", "", none()).await.expect("prepared");
    let upper = Path::new(&mounts[0].source);
    let empty = bed.usage("k").await.expect("measured");
    assert_eq!(empty.inodes, 1);
    fs::write(upper.join("a"), vec![1; 200_000]).expect("written");
    fs::hard_link(upper.join("a"), upper.join("b")).expect("linked");
    let active = bed.usage("k").await.expect("measured");
    assert_eq!(active.inodes, 2);
    assert!((200_000..400_000).contains(&(active.size - empty.size)));
    bed.commit("n", "k", none()).await.expect("committed");
    assert_eq!(bed.usage("n").await.expect("measured"), active);
}

#[tokio::test]
async fn a_new_directory_is_owned_as_the_one_below() {
    if !may_mount() {
        return;
    }
    let mut bed = Bed::plain().await;
    let mounts = bed.prepare("k", "", none()).await.expect("prepared");
    std::os::unix::fs::chown(&mounts[0].source, Some(1234), Some(5678)).expect("root may");
    bed.commit("n", "k", none()).await.expect("committed");
    let at = mounted(&bed.prepare("c", "n", none()).await.expect("prepared"));
    let found = at.path().metadata().expect("there");
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (1234, 5678, 0o755));
}

#[tokio::test]
async fn a_data_layer_is_supplied_without_a_download() {
    let mut bed = Bed::plain().await;
    let ask =
        |target: &str| labels(&[(TARGET, target), (DATA, "true"), ("containerd.io/snapshot/cri.image-ref", "r/i:1")]);
    // Two namespaces pull the same image: the second finds the layers of the first.
    for namespace in ["one", "two"] {
        let mut parent = String::new();
        for target in ["sha256:a", "sha256:b"] {
            assert_eq!(
                code(bed.prepare(&format!("{namespace}/extract-{target}"), &parent, ask(target)).await),
                Code::AlreadyExists
            );
            // What containerd does next, to the letter.
            let filter = format!(r#"labels."{TARGET}"=={target},parent=="{parent}""#);
            let found = bed.list(&[&filter]).await.expect("listed");
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(
                (found[0].kind(), found[0].labels[TARGET].as_str(), found[0].parent.as_str()),
                (Kind::Committed, target, parent.as_str())
            );
            parent = found[0].name.clone();
            assert_eq!(bed.stat(&parent).await.expect("known").name, parent);
        }
    }
    assert_eq!(bed.list(&[]).await.expect("listed").len(), 2, "no extract record is left behind");
    assert_eq!(bed.directories().len(), 2);
    assert_eq!(code(bed.view("v", "sha256:b").await), Code::Unknown);
    bed.remove("sha256:b").await.expect("removed");
    bed.remove("sha256:a").await.expect("removed");
}

#[tokio::test]
async fn a_data_layer_whose_name_is_taken_by_another_chain_is_found_all_the_same() {
    let mut bed = Bed::plain().await;
    bed.prepare("k", "", none()).await.expect("prepared");
    bed.commit("below", "k", none()).await.expect("committed");
    let ask = || labels(&[(TARGET, "sha256:a"), (DATA, "true")]);
    assert_eq!(code(bed.prepare("one", "", ask()).await), Code::AlreadyExists);
    for key in ["two", "three"] {
        assert_eq!(code(bed.prepare(key, "below", ask()).await), Code::AlreadyExists);
    }
    let filter = format!(r#"labels."{TARGET}"==sha256:a,parent=="below""#);
    assert_eq!(bed.list(&[&filter]).await.expect("listed").len(), 1);
}

#[tokio::test]
async fn a_leftover_extract_record_goes_when_the_layer_is_supplied() {
    let mut bed = Bed::plain().await;
    bed.prepare("extract", "", none()).await.expect("prepared");
    assert_eq!(
        code(bed.prepare("extract", "", labels(&[(TARGET, "sha256:a"), (DATA, "true")])).await),
        Code::AlreadyExists
    );
    let names: Vec<String> = bed.list(&[]).await.expect("listed").into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["sha256:a"]);
    assert_eq!(bed.directories().len(), 1);
}

#[tokio::test]
async fn everything_is_there_again_after_a_kill() {
    let mut bed = Bed::plain().await;
    let first = bed.prepare("k", "", labels(&[("a", "1")])).await.expect("prepared");
    fs::write(Path::new(&first[0].source).join("f"), "x").expect("written");
    bed.commit("n", "k", none()).await.expect("committed");
    let mounts = bed.prepare("c", "n", none()).await.expect("prepared");
    // What a kill between making a directory and recording it leaves.
    for rubbish in ["77", "3", "rm-5"] {
        fs::create_dir_all(bed.root().join("snapshots").join(rubbish).join("fs/deep")).expect("made");
    }
    bed.kill();
    bed.start().await;
    assert_eq!(bed.directories(), ["1", "2"]);
    assert_eq!(bed.mounts("c").await.expect("mounts"), mounts);
    bed.prepare("d", "n", none()).await.expect("prepared");
    assert_eq!(bed.directories(), ["1", "2", "3"]);
    // A failed call of this run leaves the same.
    fs::create_dir_all(bed.root().join("snapshots/4/fs/deep")).expect("made");
    let fresh = bed.prepare("e", "", none()).await.expect("prepared");
    assert_eq!(fs::read_dir(&fresh[0].source).expect("there").count(), 0);
    bed.remove("e").await.expect("removed");
    bed.stop().await;
    bed.start().await;
    assert_eq!(bed.list(&[]).await.expect("listed").len(), 3);
}

#[tokio::test]
async fn the_mark_of_volatile_does_not_make_a_snapshot_unusable() {
    if !may_mount() {
        return;
    }
    let mut bed = Bed::plain().await;
    layer(&mut bed, "one", "").await;
    let volatile = labels(&[("containerd.io/snapshot/overlay.volatile", "")]);
    let mounts = bed.prepare("c", "one", volatile).await.expect("prepared");
    assert!(mounts[0].options.contains(&"volatile".to_owned()));
    let at = mounted(&mounts);
    let mark = bed.root().join("snapshots/2/work/work/incompat/volatile");
    assert!(mark.exists());
    bed.mounts("c").await.expect("mounts");
    assert!(mark.exists(), "the mark of a living mount stays");
    drop(at);
    drop(mounted(&bed.mounts("c").await.expect("mounts")));
}

#[tokio::test]
async fn a_root_of_the_go_snapshotter_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("metadata.db"), "bolt").expect("written");
    fs::write(dir.path().join("t.json"), bed::localfs_template(Path::new("/x"))).expect("written");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_containerd-nydus-grpc"))
        .args(["--log-to-stdout", "--nydusd", "/bin/true", "--root"])
        .arg(dir.path())
        .arg("--address")
        .arg(dir.path().join("s.sock"))
        .arg("--nydusd-config")
        .arg(dir.path().join("t.json"))
        .output()
        .expect("run");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("metadata.db") && text.contains("--root"), "{text}");
}

#[tokio::test]
async fn killed_at_any_moment_records_and_directories_agree() {
    let mut bed = Bed::plain().await;
    bed.prepare("base-key", "", none()).await.expect("prepared");
    bed.commit("base", "base-key", none()).await.expect("committed");
    for round in 0..8_u64 {
        let mut client = bed.client.clone();
        let busy = tokio::spawn(async move {
            use containerd_snapshots::api::snapshots::v1::{
                CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
            };
            for number in 0.. {
                let snapshotter = String::new;
                let key = format!("{round}-{number}");
                let prepare = PrepareSnapshotRequest {
                    snapshotter: snapshotter(),
                    key: key.clone(),
                    parent: "base".to_owned(),
                    labels: HashMap::new(),
                };
                if client.prepare(prepare).await.is_err() {
                    return;
                }
                let name = format!("{key}-done");
                let commit = CommitSnapshotRequest {
                    snapshotter: snapshotter(),
                    name: name.clone(),
                    key,
                    labels: HashMap::new(),
                };
                if client.commit(commit).await.is_err() {
                    return;
                }
                if number % 2 == 0
                    && client.remove(RemoveSnapshotRequest { snapshotter: snapshotter(), key: name }).await.is_err()
                {
                    return;
                }
            }
        });
        tokio::time::sleep(std::time::Duration::from_millis(20 + 17 * round)).await;
        bed.kill();
        busy.await.expect("it ends when nobody answers");
        bed.start().await;
        let listed = bed.list(&[]).await.expect("listed");
        assert_eq!(bed.directories().len(), listed.len(), "one directory for each record");
        for info in listed.iter().filter(|info| info.kind() == Kind::Active) {
            let mounts = bed.mounts(&info.name).await.expect("mounts");
            let upper =
                mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).expect("an overlay");
            assert!(Path::new(upper).is_dir());
        }
    }
    for info in bed.list(&["name!=base"]).await.expect("listed") {
        bed.remove(&info.name).await.expect("removed");
    }
    bed.remove("base").await.expect("removed");
    assert_eq!(bed.directories(), Vec::<String>::new());
}
