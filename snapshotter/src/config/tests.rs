use std::ffi::OsStr;
use std::fs;

use super::*;

fn resolved(text: &str, cli: &Cli) -> Result<(Config, Vec<String>), ConfigError> {
    Config::resolve(cli, text.parse().expect("valid TOML"))
}

#[test]
fn nothing_given_means_the_defaults_of_the_replaced_program() {
    let (config, warnings) = resolved("", &Cli::default()).expect("valid");
    assert_eq!(config.root, Path::new(ROOT));
    assert_eq!(config.address, Path::new(ADDRESS));
    assert_eq!(config.template, Path::new(NYDUSD_CONFIG));
    assert_eq!(config.log_to, LogTo::Directory(Path::new(ROOT).join("logs")));
    assert_eq!((config.mode, config.recovery), (Mode::Shared, Recovery::Restart));
    assert!(warnings.is_empty());
}

#[test]
fn flags_override_the_file_and_the_file_the_defaults() {
    let file = "root = \"/file\"\naddress = \"/file.sock\"\ndaemon_mode = \"dedicated\"\n[log]\nlevel = \"debug\"";
    let cli = Cli { root: Some("/flag".into()), log_level: Some("warn".into()), ..Cli::default() };
    let (config, _) = resolved(file, &cli).expect("valid");
    assert_eq!(config.root, Path::new("/flag"));
    assert_eq!(config.address, Path::new("/file.sock"));
    assert_eq!(config.log_level, tracing::Level::WARN);
    assert_eq!(config.mode, Mode::Dedicated);
}

#[test]
fn unknown_and_ignored_keys_are_warned_of_by_name() {
    let file = "rot = \"/x\"\n[daemon]\nnydus_path = \"x\"\nfailover_policy = \"resend\"\n[remote.auth]\nenable_kubeconfig_keychain = true\n[new]\nx = 1";
    let (_, warnings) = resolved(file, &Cli::default()).expect("valid");
    for name in ["rot", "daemon.nydus_path", "daemon.failover_policy", "remote.auth.enable_kubeconfig_keychain", "new"]
    {
        assert_eq!(
            warnings.iter().filter(|warning| warning.contains(&format!("key {name} "))).count(),
            1,
            "{name}: {warnings:?}"
        );
    }
    assert_eq!(warnings.len(), 5);
}

#[test]
fn values_that_say_nothing_are_not_warned_of() {
    let file = "[experimental]\nenable_stargz = false\n[image]\npublic_key_file = \"\"\nvalidate_signature = false\n[experimental.tarfs]\nenable_tarfs = false";
    assert_eq!(resolved(file, &Cli::default()).expect("valid").1, Vec::<String>::new());
}

#[test]
fn wrong_types_and_values_fail_and_name_the_key() {
    let table = [
        ("root = 1", "root"),
        ("log = 1", "log"),
        ("[log]\nlevel = true", "log.level"),
        ("[log]\nlevel = \"loud\"", "log level"),
        ("uid = -1", "uid"),
        ("root = \"relative\"", "root"),
        ("root = \"/with:colon\"", "root"),
        ("daemon_mode = \"none\"", "daemon_mode"),
        ("daemon_mode = \"many\"", "daemon_mode"),
        ("[daemon]\nfs_driver = \"fscache\"", "fs_driver"),
        ("[daemon]\nthreads_number = 5000", "daemon.threads_number"),
        ("[daemon]\nrecover_policy = \"pray\"", "daemon.recover_policy"),
        ("[snapshot]\nenable_kata_volume = true", "snapshot.enable_kata_volume"),
        ("[snapshot]\nenable_nydus_overlayfs = true", "snapshot.enable_nydus_overlayfs"),
        ("[image]\nvalidate_signature = true", "image.validate_signature"),
        ("[experimental.tarfs]\nenable_tarfs = true", "experimental.tarfs.enable_tarfs"),
    ];
    for (file, key) in table {
        let error = resolved(file, &Cli::default()).expect_err(file).to_string();
        assert!(error.contains(key), "{file}: {error}");
    }
    let long = format!("root = \"/{}\"", "x".repeat(80));
    assert!(resolved(&long, &Cli::default()).expect_err("too long").to_string().contains("root"));
}

#[test]
fn a_file_without_its_version_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("config.toml");
    for (text, fine) in [
        ("version = 1\n", true),
        ("", false),
        ("version = 2", false),
        ("version = \"1\"", false),
        ("version = ", false),
    ] {
        fs::write(&path, text).expect("written");
        let cli = Cli { config: Some(path.clone()), ..Cli::default() };
        assert_eq!(Config::load(&cli).is_ok(), fine, "{text:?}");
    }
    let cli = Cli { config: Some(dir.path().join("missing")), ..Cli::default() };
    assert!(Config::load(&cli).expect_err("missing").to_string().contains("missing"));
}

#[test]
fn a_program_is_found_beside_ours_then_on_path() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let make = |name: &str, mode| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("below the directory")).expect("made");
        fs::write(&path, "").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
        path
    };
    let own = make("own/us", 0o755);
    let listed = make("listed/nydusd", 0o755);
    let search = dir.path().join("listed");
    let found = |own: Option<&Path>| find_program(Path::new("nydusd"), own, Some(search.as_os_str()));
    assert_eq!(found(Some(&own)), Some(listed.clone()));
    let not_a_program = make("own/nydusd", 0o644);
    assert_eq!(found(Some(&own)), Some(listed));
    fs::set_permissions(&not_a_program, fs::Permissions::from_mode(0o755)).expect("set");
    assert_eq!(found(Some(&own)), Some(not_a_program.clone()));
    assert_eq!(find_program(&not_a_program, None, None), Some(not_a_program));
    assert_eq!(find_program(&dir.path().join("none"), Some(&own), Some(OsStr::new(""))), None);
}
