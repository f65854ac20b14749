//! Configurations that cannot be followed: the program says what is wrong and what to do, and leaves nothing behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const TEMPLATE: &str = r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/x"}},"cache":{"type":"blobcache","config":{}}},"mode":"direct"}"#;

/// Starts the program with a file and flags; `DIR` in both is a fresh directory.
fn start(file: &str, flags: &[&str]) -> (tempfile::TempDir, Output) {
    let dir = tempfile::tempdir().expect("a directory");
    let place = |text: &str| text.replace("DIR", dir.path().to_str().expect("text"));
    fs::write(dir.path().join("template.json"), TEMPLATE).expect("written");
    let config = dir.path().join("config.toml");
    fs::write(&config, place(file)).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-nydus-grpc"));
    command.arg("--config").arg(&config).args(["--nydusd", "/bin/true"]);
    command.arg("--nydusd-config").arg(dir.path().join("template.json"));
    // clap takes a flag once: what a case says about one wins.
    for (flag, value) in [("--root", "=DIR/root"), ("--address", "=DIR/s.sock"), ("--log-to-stdout", "")] {
        let said = flags.iter().any(|given| given.starts_with(flag)) || file.contains(&format!("\n{} =", &flag[2..]));
        if !said {
            command.arg(place(&format!("{flag}{value}")));
        }
    }
    command.args(flags.iter().map(|flag| place(flag)));
    // An end is expected; whoever starts to serve instead is ended by its alarm.
    let output = Command::new("timeout").arg("20").arg(command.get_program()).args(command.get_args()).output();
    (dir, output.expect("run"))
}

fn left_behind(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("read").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name != "config.toml" && name != "template.json").collect()
}

#[test]
fn what_cannot_be_followed_is_told_with_its_place_and_nothing_is_begun() {
    let table: &[(&str, &[&str], &[&str])] = &[
        ("", &[], &["config.toml", "version"]),
        ("version = 1\nroot = ", &[], &["config.toml", "line 2"]),
        ("version = 1\n[log]\nlevel = \"info\"\nlevel = \"info\"", &[], &["config.toml", "line 4"]),
        ("version = \"1\"", &[], &["config.toml", "version = 1"]),
        ("version = 1\nuid = \"me\"", &[], &["config.toml", "uid", "a number"]),
        ("version = 1\nroot = \"here\"", &[], &["config.toml", "root", "absolute"]),
        ("version = 1\n[system]\nenable = \"yes\"", &[], &["config.toml", "system.enable", "true or false"]),
        ("version = 1\n[daemon]\nfs_driver = \"fscache\"", &[], &["config.toml", "fs_driver", "fusedev"]),
        ("version = 1\n[daemon]\nthreads_number = 2000", &[], &["config.toml", "daemon.threads_number", "1024"]),
        ("version = 1\n[image]\nvalidate_signature = true", &[], &["config.toml", "image.validate_signature", "false"]),
        ("version = 1", &["--daemon-mode", "none"], &["daemon_mode", "shared"]),
        ("version = 1", &["--daemon-mode", "many"], &["daemon_mode", "many", "shared"]),
        ("version = 1", &["--log-level", "loud"], &["log level", "loud", "debug"]),
        ("version = 1", &["--log-to-stdout=perhaps"], &["--log-to-stdout", "perhaps"]),
        ("version = 1", &["--nydus-grpc"], &["--nydus-grpc"]),
        ("version = 1", &["--root=relative"], &["root", "absolute"]),
        ("version = 1", &["--root=/with,comma"], &["root", "','"]),
    ];
    for (file, flags, parts) in table {
        let (dir, output) = start(file, flags);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{file:?} {flags:?}: {:?} {text}", output.status);
        for part in *parts {
            assert!(text.contains(part), "{file:?} {flags:?}: {part:?} is not in {text:?}");
        }
        assert_eq!(left_behind(dir.path()), Vec::<String>::new(), "{file:?} {flags:?}");
    }
}

#[test]
fn what_is_in_the_way_is_told_before_anything_serves() {
    let long = format!("--address=DIR/{}", "x".repeat(120));
    let table: &[(&str, &[&str], &[&str])] = &[
        ("version = 1", &["--root=/proc/nowhere"], &["/proc/nowhere"]),
        ("version = 1", &[&long], &["address", "107"]),
        ("version = 1", &["--address=DIR/template.json"], &["template.json", "not a socket"]),
        ("version = 1\n[metrics]\naddress = \"nonsense\"", &[], &["nonsense", "metrics.address"]),
        ("version = 1\n[system]\nenable = true\naddress = \"/proc/x\"", &[], &["system.address", "/proc/x"]),
    ];
    for (file, flags, parts) in table {
        let (dir, output) = start(file, flags);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{file:?} {flags:?}: {text}");
        for part in *parts {
            assert!(text.contains(part), "{file:?} {flags:?}: {part:?} is not in {text:?}");
        }
        assert!(!dir.path().join("s.sock").exists(), "{file:?} {flags:?}");
    }
}

#[test]
fn a_template_that_cannot_be_followed_stops_the_start_and_names_file_and_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let template = dir.path().join("template.json");
    for (text, parts) in [
        (TEMPLATE.replace("localfs", "s3"), &["template.json", "s3"][..]),
        (TEMPLATE.replace(r#""mode":"direct""#, r#""mode":7"#), &["template.json", "mode"]),
        (TEMPLATE.replace(r#""mode""#, r#"mode""#), &["template.json", "line 1"]),
        (String::new(), &["template.json"]),
    ] {
        fs::write(&template, &text).expect("written");
        let output = Command::new("timeout")
            .args(["20", env!("CARGO_BIN_EXE_containerd-nydus-grpc"), "--log-to-stdout", "--nydusd", "/bin/true"])
            .arg("--root")
            .arg(dir.path().join("root"))
            .arg("--address")
            .arg(dir.path().join("s.sock"))
            .arg("--nydusd-config")
            .arg(&template)
            .output()
            .expect("run");
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}: {told}");
        assert!(parts.iter().all(|part| told.contains(part)), "{text}: {told}");
        assert!(!dir.path().join("s.sock").exists());
    }
}
