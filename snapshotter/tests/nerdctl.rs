//! What containerd asks when people use nerdctl, asked again exactly: `fixtures/README.md` tells where it comes from.

#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[expect(dead_code, reason = "each test file uses a part of the bed")]
#[path = "bed/bed.rs"]
mod bed;
#[expect(dead_code, reason = "each test file uses a part of it")]
#[path = "bed/golden.rs"]
mod golden;

use std::collections::HashMap;
use std::fs;

use bed::{Bed, mounted};
use golden::Golden;
use tonic::{Code, Status};

const CALLS: &str = include_str!("fixtures/nerdctl-2.3.5.jsonl");

#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
enum Line {
    Step {
        step: String,
    },
    Call {
        call: String,
        #[serde(default)]
        key: String,
        #[serde(default)]
        parent: String,
        #[serde(default)]
        name: String,
        #[serde(default)]
        labels: HashMap<String, String>,
        #[serde(default)]
        filters: Vec<String>,
        #[serde(default)]
        answer: String,
    },
}

fn code<T>(answer: Result<T, Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test]
async fn every_call_of_nerdctls_pull_run_and_remove_is_answered_as_it_needs() {
    let Some(nydusd) = bed::nydusd() else { return };
    let Some(golden) = Golden::unpack() else { return };
    let mut bed = Bed::new(&nydusd, &golden.template(), &[]).await;
    let mut step = String::new();
    let mut seen = 0;
    for line in CALLS.lines() {
        let (call, key, parent, name, labels, filters, answer) =
            match serde_json::from_str(line).expect("a line of the fixture") {
                Line::Step { step: next } => {
                    step = next;
                    continue;
                }
                Line::Call { call, key, parent, name, labels, filters, answer } => {
                    (call, key, parent, name, labels, filters, answer)
                }
            };
        let bootstrap = labels.contains_key("containerd.io/snapshot/nydus-bootstrap");
        let got = match call.as_str() {
            "Prepare" => {
                let extracts = labels.contains_key("containerd.io/snapshot.ref");
                let answer = bed.prepare(&key, &parent, labels).await;
                if let Ok(mounts) = &answer {
                    let at = mounted(mounts);
                    match (extracts, bootstrap) {
                        (true, true) => {
                            fs::create_dir(at.path().join("image")).expect("made");
                            fs::copy(golden.image().join("bootstrap"), at.path().join("image/image.boot"))
                                .expect("copied");
                        }
                        (true, false) => {
                            let name = key[..10].replace('/', "-");
                            fs::write(at.path().join(name), "layer").expect("written");
                        }
                        (false, _) if step == "run nydus" => golden.compare(at.path()),
                        (false, _) => assert_eq!(fs::read_dir(at.path()).expect("read").count(), 2, "two layers"),
                    }
                }
                code(answer)
            }
            "View" => code(bed.view(&key, &parent).await),
            "Mounts" => code(bed.mounts(&key).await),
            "Commit" => code(bed.commit(&name, &key, labels).await),
            "Remove" => code(bed.remove(&key).await),
            "Stat" => code(bed.stat(&key).await),
            "Cleanup" => code(bed.cleanup().await),
            "List" => {
                let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
                let found = bed.list(&filters).await.expect("listed");
                // After a layer "already exists" containerd takes the first that fits, and fails the pull without one.
                assert!(filters.is_empty() || found.len() == 1, "{step}: {filters:?} finds {found:?}");
                Code::Ok
            }
            other => panic!("{step}: {other} is not replayed"),
        };
        let want = match answer.as_str() {
            "" | "OK" => Code::Ok,
            "ALREADY_EXISTS" => Code::AlreadyExists,
            other => panic!("{other} is not expected of any answer"),
        };
        assert_eq!(got, want, "{step}: {line}\n{}", bed.log());
        seen += 1;
    }
    assert!(seen > 40, "the fixture holds {seen} calls");
    assert_eq!(bed.list(&[]).await.expect("listed"), [], "everything was removed");
    assert_eq!(bed.directories(), Vec::<String>::new());
    let mounts = fs::read_dir(bed.root().join("mnt")).expect("there").count();
    assert_eq!(mounts, 0, "no image is mounted any more");
}
