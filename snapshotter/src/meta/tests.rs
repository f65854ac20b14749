use std::collections::BTreeMap;

use proptest::prelude::*;
use tonic::Code;

use super::*;

fn open() -> (tempfile::TempDir, Meta) {
    let dir = tempfile::tempdir().expect("a directory");
    let meta = Meta::open(&dir.path().join("m.redb")).expect("opened");
    (dir, meta)
}

/// What somebody may ask, over a handful of names so that they meet.
#[derive(Debug, Clone)]
enum Call {
    Create { key: u8, parent: Option<u8>, view: bool, fails: bool },
    Commit { name: u8, key: u8 },
    Remove { key: u8 },
    Update { key: u8, value: u8 },
    Supply { target: u8, leftover: u8, parent: Option<u8> },
    Reopen,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let name = 0..6_u8;
    let parent = proptest::option::of(0..6_u8);
    let call = prop_oneof![
        4 => (name.clone(), parent.clone(), any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(key, parent, view, fails)| Call::Create { key, parent, view, fails }),
        3 => (name.clone(), name.clone()).prop_map(|(name, key)| Call::Commit { name, key }),
        3 => name.clone().prop_map(|key| Call::Remove { key }),
        1 => (name.clone(), any::<u8>()).prop_map(|(key, value)| Call::Update { key, value }),
        2 => (name.clone(), name, parent).prop_map(|(target, leftover, parent)| Call::Supply { target, leftover, parent }),
        1 => Just(Call::Reopen),
    ];
    prop::collection::vec(call, 0..40)
}

/// The same rules on a map.
#[derive(Debug, Default)]
struct Model {
    rows: BTreeMap<String, (Kind, String, Labels)>,
}

impl Model {
    fn parent(&self, parent: &str) -> std::result::Result<(), Code> {
        match self.rows.get(parent) {
            _ if parent.is_empty() => Ok(()),
            None => Err(Code::NotFound),
            Some((Kind::Committed, ..)) => Ok(()),
            Some(_) => Err(Code::InvalidArgument),
        }
    }

    fn create(&mut self, key: &str, parent: &str, kind: Kind, fails: bool) -> std::result::Result<(), Code> {
        self.parent(parent)?;
        if self.rows.contains_key(key) {
            return Err(Code::AlreadyExists);
        }
        if fails {
            return Err(Code::Unavailable);
        }
        self.rows.insert(key.to_owned(), (kind, parent.to_owned(), Labels::new()));
        Ok(())
    }

    fn commit(&mut self, name: &str, key: &str, labels: Labels) -> std::result::Result<(), Code> {
        if self.rows.contains_key(name) {
            return Err(Code::AlreadyExists);
        }
        match self.rows.get(key) {
            None => return Err(Code::NotFound),
            Some((Kind::Active, ..)) => {}
            Some(_) => return Err(Code::FailedPrecondition),
        }
        let (_, parent, _) = self.rows.remove(key).expect("just seen");
        self.rows.insert(name.to_owned(), (Kind::Committed, parent, labels));
        Ok(())
    }

    fn remove(&mut self, key: &str) -> std::result::Result<(), Code> {
        if !self.rows.contains_key(key) {
            return Err(Code::NotFound);
        }
        if self.rows.values().any(|(_, parent, _)| parent == key) {
            return Err(Code::FailedPrecondition);
        }
        self.rows.remove(key);
        Ok(())
    }

    fn supply(&mut self, target: &str, leftover: &str, parent: &str, labels: &Labels) -> std::result::Result<(), Code> {
        self.parent(parent)?;
        let active = self.rows.get(leftover).is_some_and(|(kind, ..)| *kind == Kind::Active);
        let without: BTreeMap<_, _> = self
            .rows
            .iter()
            .filter(|(key, _)| !(active && *key == leftover))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let fits = |row: &(Kind, String, Labels)| {
            row.0 == Kind::Committed && row.1 == parent && row.2.get(labels::TARGET).map(String::as_str) == Some(target)
        };
        // Whatever it is called, there must be exactly one afterwards; its name is not the model's business.
        self.rows = without;
        if !self.rows.values().any(fits) {
            let free = !self.rows.contains_key(target);
            let name = if free { target.to_owned() } else { format!("{target} on {parent}") };
            self.rows.insert(name, (Kind::Committed, parent.to_owned(), labels.clone()));
        }
        Ok(())
    }
}

fn name(number: u8) -> String {
    format!("n{number}")
}

fn labelled(target: &str) -> Labels {
    [(labels::TARGET.to_owned(), target.to_owned())].into()
}

fn outcome<T>(result: Result<T>) -> std::result::Result<(), Code> {
    result.map(drop).map_err(|error| error.code())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_records_behave_as_a_map_would(calls in calls()) {
        let (dir, mut meta) = open();
        let mut model = Model::default();
        for call in calls {
            let (got, want) = match call {
                Call::Create { key, parent, view, fails } => {
                    let kind = if view { Kind::View } else { Kind::Active };
                    let (key, parent) = (name(key), parent.map(name).unwrap_or_default());
                    let make = |_| if fails { Err(SnapshotError::Unavailable("no".into())) } else { Ok(()) };
                    let got = outcome(meta.create(&key, &parent, kind, &Labels::new(), make));
                    (got, model.create(&key, &parent, kind, fails))
                }
                Call::Commit { name: to, key } => {
                    let got = outcome(meta.commit(&name(to), &name(key), &labelled("t")));
                    (got, model.commit(&name(to), &name(key), labelled("t")))
                }
                Call::Remove { key } => (outcome(meta.remove(&name(key))), model.remove(&name(key))),
                Call::Update { key, value } => {
                    let wanted: Labels = [("v".to_owned(), value.to_string())].into();
                    let got = outcome(meta.update(&name(key), &wanted, &["labels.v".to_owned()]));
                    let want = match model.rows.get_mut(&name(key)) {
                        Some((.., labels)) => {
                            labels.extend(wanted);
                            Ok(())
                        }
                        None => Err(Code::NotFound),
                    };
                    (got, want)
                }
                Call::Supply { target, leftover, parent } => {
                    // A fixed name that is taken by a stranger twice is refused; a map has room for any name.
                    let (target, leftover) = (format!("t{target}"), name(leftover));
                    let parent = parent.map(name).filter(|parent| *parent != leftover).unwrap_or_default();
                    let got = outcome(meta.supply(&target, &leftover, &parent, &labelled(&target), |_| Ok(())));
                    (got, model.supply(&target, &leftover, &parent, &labelled(&target)))
                }
                Call::Reopen => {
                    drop(meta);
                    meta = Meta::open(&dir.path().join("m.redb")).expect("opened again");
                    (Ok(()), Ok(()))
                }
            };
            prop_assert_eq!(got, want);
            let mut rows: Vec<_> = meta.list().expect("listed").into_iter().map(|(_, r)| (r.kind, r.parent, r.labels)).collect();
            let mut wanted: Vec<_> = model.rows.values().cloned().collect();
            rows.sort_by(|a, b| format!("{a:?}").cmp(&format!("{b:?}")));
            wanted.sort_by(|a, b| format!("{a:?}").cmp(&format!("{b:?}")));
            prop_assert_eq!(rows, wanted);
        }
        let listed = meta.list().expect("listed");
        let mut ids: Vec<u64> = listed.iter().map(|(_, record)| record.id).collect();
        ids.sort_unstable();
        ids.dedup();
        prop_assert_eq!(ids.len(), listed.len(), "no number is used twice");
        for (key, record) in listed {
            prop_assert_eq!(meta.by_id(record.id).expect("read"), Some(meta.stat(&key).expect("known")));
        }
    }
}

#[test]
fn a_record_that_was_never_made_leaves_nothing() {
    let (_dir, meta) = open();
    let failed = meta.create("k", "", Kind::Active, &Labels::new(), |_| Err(SnapshotError::Unavailable("no".into())));
    assert!(matches!(failed, Err(SnapshotError::Unavailable(_))));
    assert!(matches!(meta.stat("k"), Err(SnapshotError::NotFound(_))));
    let made = meta.create("k", "", Kind::Active, &Labels::new(), |_| Ok(())).expect("created");
    assert_eq!(made.id, 1, "the number was not used up");
}

#[test]
fn the_time_of_a_change_moves_even_if_the_clock_does_not() {
    let (_dir, meta) = open();
    let mut last = meta.create("k", "", Kind::Active, &Labels::new(), |_| Ok(())).expect("created").updated;
    for _ in 0..20 {
        let updated = meta.update("k", &Labels::new(), &[]).expect("updated").updated;
        assert!(updated > last);
        last = updated;
    }
}

#[test]
fn an_image_without_its_snapshot_is_not_recorded_and_a_forgotten_one_leaves_garbage() {
    let (_dir, meta) = open();
    let record = meta.create("k", "", Kind::Active, &Labels::new(), |_| Ok(())).expect("created");
    let mut instance = Instance {
        id: record.id,
        daemon: "shared".into(),
        image: None,
        blobs: Some(vec!["b".into()]),
        stage: Stage::Intended,
    };
    meta.set_instance(&instance).expect("recorded");
    assert_eq!(meta.instance(record.id).expect("read"), Some(instance.clone()));
    meta.forget_instance(record.id).expect("forgotten");
    meta.frozen(|frozen| {
        assert_eq!(frozen.garbage, ["b"]);
        vec!["b".to_owned()]
    })
    .expect("read");
    meta.frozen(|frozen| {
        assert!(frozen.garbage.is_empty());
        Vec::new()
    })
    .expect("read");
    instance.id = 99;
    assert!(matches!(meta.set_instance(&instance), Err(SnapshotError::NotFound(_))));
}

#[test]
fn two_processes_cannot_have_the_records() {
    let (dir, _meta) = open();
    let error = Meta::open(&dir.path().join("m.redb")).expect_err("taken");
    assert!(error.to_string().contains("another snapshotter"), "{error}");
}

#[test]
fn the_mark_of_an_indexed_layer_is_ours_alone() {
    let (_dir, meta) = open();
    let marked: Labels = [(labels::STARGZ_LAYER.to_owned(), "true".to_owned())].into();
    meta.supply("sha256:a", "k", "", &marked, |_| Ok(())).expect("supplied");
    meta.create("b", "", Kind::Active, &Labels::new(), |_| Ok(())).expect("created");
    let content = |key| labels::content(&meta.stat(key).expect("there").labels);
    for fields in [vec![], vec!["labels".to_owned()], vec![format!("labels.{}", labels::STARGZ_LAYER)]] {
        meta.update("sha256:a", &Labels::new(), &fields).expect("updated");
        meta.update("b", &marked, &fields).expect("updated");
        assert_eq!(
            (content("sha256:a"), content("b")),
            (labels::Content::Indexed, labels::Content::Files),
            "{fields:?}"
        );
    }
}
