use proptest::prelude::*;

use super::*;

const GUIDE: &str = r#"{"device":{"backend":{"type":"registry","config":{"mirrors":[{"host":"http://127.0.0.1:4001","auth_through":false,"headers":{"X-Dragonfly-Registry":"https://index.docker.io"},"ping_url":"http://127.0.0.1:4003/healthy"}],"scheme":"https","skip_verify":true,"timeout":10,"connect_timeout":10,"retry_limit":2}},"cache":{"type":"blobcache","config":{"work_dir":"/var/lib/nydus/cache/"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true,"fs_prefetch":{"enable":true,"threads_count":10,"merging_size":131072,"bandwidth_rate":1048576}}"#;

fn v1(change: impl FnOnce(&mut Value)) -> String {
    let mut document = json!({
        "device": {
            "id": "one",
            "backend": {"type": "localfs", "config": {"dir": "/blobs"}},
            "cache": {"type": "blobcache", "config": {"work_dir": "/cache"}},
        },
        "mode": "direct",
    });
    change(&mut document);
    document.to_string()
}

#[test]
fn the_guides_template_parses_and_a_mount_names_what_is_blank() {
    let parsed = parse(GUIDE).unwrap();
    assert_eq!(parsed.config.dialect, Dialect::V1);
    assert_eq!(parsed.config.cache.work_dir, Path::new("/var/lib/nydus/cache/"));
    let prefetch = parsed.config.rafs.prefetch;
    assert!(prefetch.enable && prefetch.prefetch_all);
    assert_eq!((prefetch.threads, prefetch.batch_size, prefetch.bandwidth_limit), (10, 131_072, 1_048_576));
    let error = parsed.config.ready_to_mount().unwrap_err();
    assert!(error.to_string().contains("device.backend.config.host"), "{error}");
}

#[test]
fn a_filled_template_keeps_every_key_it_had() {
    let mut template = Template::parse(GUIDE).unwrap();
    template.set_backend("host", "registry.example:5000");
    template.set_backend("repo", "library/python");
    template.set_id("/17");
    template.set_work_dir(Path::new("/other/cache"));
    template.set_mirror_header("x-dragonfly-registry", "https://registry.example:5000", true);
    let mut want: Value = serde_json::from_str(GUIDE).unwrap();
    want["device"]["backend"]["config"]["host"] = json!("registry.example:5000");
    want["device"]["backend"]["config"]["repo"] = json!("library/python");
    want["device"]["id"] = json!("/17");
    want["device"]["cache"]["config"]["work_dir"] = json!("/other/cache");
    want["device"]["backend"]["config"]["mirrors"][0]["headers"]["X-Dragonfly-Registry"] =
        json!("https://registry.example:5000");
    assert_eq!(template.document(), &want);
    let again = parse(&template.to_json()).unwrap().config;
    again.ready_to_mount().unwrap();
    assert_eq!(again.id, "/17");
}

#[test]
fn a_template_keeps_keys_that_nobody_knows() {
    let text = v1(|document| document["device"]["backend"]["config"]["from_the_future"] = json!([1, 2]));
    let template = Template::parse(&text).unwrap();
    assert_eq!(template.backend("from_the_future"), Some(&json!([1, 2])));
    assert_eq!(template.resolve().unwrap().ignored, ["device.backend.config.from_the_future"]);
}

#[test]
fn a_wrong_type_names_its_key() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 13] = [
        ("device.cache.config.work_dir", |d| d["device"]["cache"]["config"]["work_dir"] = json!(5)),
        ("device.backend.config.dir", |d| d["device"]["backend"]["config"]["dir"] = json!({})),
        ("device.backend.type", |d| d["device"]["backend"]["type"] = json!("carrier-pigeon")),
        ("device.backend", |d| drop(d["device"].as_object_mut().unwrap().remove("backend"))),
        ("mode", |d| d["mode"] = json!("indirect")),
        ("fs_prefetch.threads_count", |d| d["fs_prefetch"] = json!({"enable": true, "threads_count": 0})),
        ("digest_validate", |d| d["digest_validate"] = json!("yes")),
        ("amplify_io", |d| d["amplify_io"] = json!(-1)),
        ("read_deadline", |d| d["read_deadline"] = json!(4)),
        ("read_deadline", |d| d["read_deadline"] = json!(101)),
        ("fs_prefetch", |d| d["fs_prefetch"] = json!([])),
        ("device.cache.config", |d| d["device"]["cache"]["config"] = json!(["/cache"])),
        ("device.backend.config.scheme", |d| {
            d["device"]["backend"] = json!({"type": "registry", "config": {"scheme": "htps"}});
        }),
    ];
    for (key, change) in cases {
        let error = parse(&v1(change)).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{key}: {error}");
    }
}

#[test]
fn version_1_prefetches_everything_unless_told_otherwise_and_version_2_does_not() {
    let parsed = parse(&v1(|d| d["fs_prefetch"] = json!({"enable": true}))).unwrap();
    assert!(parsed.config.rafs.prefetch.prefetch_all);
    assert_eq!(parsed.config.rafs.prefetch.threads, 8);
    assert_eq!(parse(&v1(|_| ())).unwrap().config.rafs.prefetch, Prefetch::OFF);
    let toml = "version = 2\n[backend]\ntype = \"localfs\"\n[backend.localfs]\ndir = \"/b\"\n[cache]\n\
                type = \"filecache\"\n[cache.filecache]\nwork_dir = \"/c\"\n[rafs]\n[rafs.prefetch]\nenable = true\n";
    let parsed = parse(toml).unwrap();
    assert!(parsed.config.rafs.prefetch.enable && !parsed.config.rafs.prefetch.prefetch_all);
    assert_eq!(parsed.config.dialect, Dialect::V2);
    assert_eq!(parsed.ignored, Vec::<String>::new());
    parsed.config.ready_to_mount().unwrap();
}

#[test]
fn a_template_may_be_told_not_to_prefetch_everything() {
    let mut template = Template::parse(GUIDE).unwrap();
    template.default_prefetch_all(false);
    assert!(!template.resolve().unwrap().config.rafs.prefetch.prefetch_all);
    let text = v1(|d| d["fs_prefetch"] = json!({"enable": true, "prefetch_all": true}));
    let mut template = Template::parse(&text).unwrap();
    template.default_prefetch_all(false);
    assert!(template.resolve().unwrap().config.rafs.prefetch.prefetch_all, "what the author wrote stays");
}

#[test]
fn no_key_of_theirs_turns_verification_off_and_ours_does() {
    let text = v1(|d| {
        d["digest_validate"] = json!(false);
        d["device"]["cache"]["validate"] = json!(false);
    });
    assert!(!parse(&text).unwrap().config.cache.skip_verification);
    let text = v1(|d| d["device"]["cache"]["skip_verification"] = json!(true));
    assert!(parse(&text).unwrap().config.cache.skip_verification);
}

#[test]
fn the_echo_is_a_version_2_document_without_secrets() {
    let text = v1(|d| {
        d["device"]["backend"] = json!({
            "type": "registry",
            "config": {"host": "h", "repo": "r", "scheme": "http", "auth": "dXNlcjpwYXNz", "registry_token": "s3cret"},
        });
    });
    let parsed = parse(&text).unwrap();
    let echo = parsed.config.echo();
    assert_eq!(echo["version"], 2);
    assert_eq!(echo["backend"]["registry"]["host"], "h");
    assert!(echo["backend"]["localfs"].is_null());
    let text = echo.to_string();
    assert!(!text.contains("dXNlcjpwYXNz") && !text.contains("s3cret"), "{text}");
    let again = parse(&text).unwrap();
    assert_eq!(again.config.rafs, parsed.config.rafs);
    assert_eq!(again.config.cache, parsed.config.cache);
    assert_eq!(again.config.read_deadline, parsed.config.read_deadline);
}

#[test]
fn too_long_and_unreadable_documents_say_so() {
    let long = format!("{{\"x\": \"{}\"}}", "a".repeat(1 << 20));
    assert!(matches!(parse(&long), Err(ConfigError::TooLarge { .. })));
    assert!(matches!(parse("{\"device\": "), Err(ConfigError::Json(_))));
    assert!(matches!(parse("version 2"), Err(ConfigError::Toml(_))));
    assert!(matches!(parse("{}"), Err(ConfigError::Unrecognised)));
    assert!(parse("{\"version\": 3}").unwrap_err().to_string().contains("version"));
}

#[test]
fn localfs_dir_is_blobs_and_cache_in_one() {
    let config = Config::localfs(Path::new("/somewhere")).unwrap();
    config.ready_to_mount().unwrap();
    assert_eq!(config.cache.work_dir, Path::new("/somewhere"));
    assert!(!config.rafs.prefetch.enable);
}

#[test]
fn the_samples_are_understood_to_the_last_key() {
    for name in ["nydusd-config.json", "nydusd-config.toml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config").join(name);
        let parsed = load(&path).unwrap();
        assert_eq!(parsed.ignored, Vec::<String>::new(), "{name}");
        assert!(!parsed.config.cache.skip_verification, "{name}");
    }
}

/// Any JSON, with the names that mean something more often than others.
fn documents() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec!["", "registry", "localfs", "blobcache", "direct", "http", "/x"])
            .prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    let names = prop::sample::select(vec![
        "device",
        "version",
        "mode",
        "backend",
        "type",
        "config",
        "cache",
        "work_dir",
        "filecache",
        "rafs",
        "fs_prefetch",
        "prefetch",
        "enable",
        "mirrors",
        "host",
        "proxy",
        "localfs",
        "registry",
        "dir",
        "read_deadline",
        "x",
    ]);
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names.clone(), inner, 0..6)
                .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

/// Puts `value` in the place of one of a document's values.
fn replace(document: &mut Value, mut place: usize, value: Value) -> bool {
    fn walk(at: &mut Value, place: &mut usize, value: &Value) -> bool {
        if *place == 0 {
            *at = value.clone();
            return true;
        }
        *place -= 1;
        match at {
            Value::Object(map) => map.values_mut().any(|child| walk(child, place, value)),
            Value::Array(items) => items.iter_mut().any(|child| walk(child, place, value)),
            _ => false,
        }
    }
    walk(document, &mut place, &value)
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,200}", start in prop::sample::select(vec!["", "{", "[", "version = 2\n"])) {
        let _ = parse(&format!("{start}{text}"));
    }

    #[test]
    fn no_document_makes_the_parser_panic(document in documents()) {
        let _ = parse(&document.to_string());
    }

    /// One value of a good document becomes another: it is understood to the end, or the error names a key.
    #[test]
    fn a_wrong_value_anywhere_is_an_error_that_names_a_key_or_a_document_that_survives_its_echo(
        place in 1usize..40, value in documents(),
    ) {
        let mut document: Value = serde_json::from_str(GUIDE).unwrap();
        replace(&mut document, place, value);
        match parse(&document.to_string()) {
            Ok(parsed) => {
                let again = parse(&parsed.config.echo().to_string());
                prop_assert!(again.is_ok() || parsed.config.ready_to_mount().is_err(), "{again:?}");
            }
            Err(ConfigError::Key { key, why }) => prop_assert!(!key.is_empty() && !why.is_empty()),
            Err(ConfigError::Unrecognised) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
