//! Wrong hands: what both programs say of flags and files that cannot be.

use std::process::{Command, Output};

fn run(program: &str, line: &str) -> Output {
    let arguments = line.split_whitespace();
    let mut command = Command::new(program);
    // What the environment of the tests says shall not answer for the flags.
    for name in ["SOURCE", "TARGET", "FS_VERSION", "WORK_DIR", "LOG_LEVEL", "LOG_FILE", "NYDUS_IMAGE"] {
        command.env_remove(name);
    }
    command.args(arguments).stdin(std::process::Stdio::null()).output().expect("the program starts")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Each line fails, and what is said holds all of the words.
fn refuses(program: &str, table: &[(&str, &[&str])]) {
    for (line, words) in table {
        let output = run(program, line);
        let text = said(&output);
        assert!(matches!(output.status.code(), Some(1 | 2)), "`{line}` ended with {}:\n{text}", output.status);
        for word in *words {
            assert!(text.contains(word), "`{line}` does not say `{word}`:\n{text}");
        }
    }
}

#[test]
fn nydusify_names_the_flag_that_is_wrong_and_what_it_takes() {
    let digest = format!("convert --source a --target b@sha256:{}", "0".repeat(64));
    refuses(
        env!("CARGO_BIN_EXE_nydusify"),
        &[
            ("convert", &["--source", "--target"]),
            ("convert --source a", &["--target"]),
            ("convert --source UPPER:x --target b", &["--source", "UPPER:x", "registry.example:5000/group/name:tag"]),
            ("convert --source a --target b:c:d", &["--target", "b:c:d"]),
            (&digest, &["names a digest", "name a tag"]),
            ("convert --source a --target b --target-suffix -x", &["--target", "--target-suffix"]),
            ("convert --source a --target b --fs-version 7", &["--fs-version", "7", "5, 6"]),
            ("convert --source a --target b --compressor gzip", &["--compressor", "none, lz4_block, zstd"]),
            ("convert --source a --target b --fs-chunk-size 3000", &["--fs-chunk-size", "0x1000 to 0x1000000"]),
            ("convert --source a --target b --fs-chunk-size x", &["--fs-chunk-size", "0x1000 to 0x1000000"]),
            ("convert --source a --target b --platform amd64", &["--platform", "linux/amd64"]),
            ("convert --source a --target b --platform linux/a --all-platforms", &["--platform", "--all-platforms"]),
            ("convert --source a --target b --prefetch-dir rel", &["--prefetch-dir", "`rel`", "absolute"]),
            ("convert --source a --target b --prefetch-dir / --prefetch-patterns", &["--prefetch-patterns"]),
            ("convert --source a --target b --bogus", &["--bogus"]),
            ("convert --source a --target b --build-cache-max-records 201", &["--build-cache-max-records", "200"]),
            ("convert --source a --target b --work-dir /dev/null/x", &["--work-dir", "/dev/null/x"]),
            ("convert --source a --target b --output-json /dev/null/x", &["--output-json", "/dev/null"]),
            ("--log-file /dev/null/x convert --source a --target b", &["log file", "/dev/null/x"]),
            ("convrt", &["convrt", "convert"]),
        ],
    );
}

#[test]
fn nydus_image_names_the_flag_or_file_that_is_wrong() {
    refuses(
        env!("CARGO_BIN_EXE_nydus-image"),
        &[
            ("create", &["--bootstrap", "<SOURCE>"]),
            ("create -B b -D d -t foo src", &["--type", "foo", "dir-rafs"]),
            ("create -B b -D d --chunk-size 3000 src", &["chunk size", "3000", "0x1000 to 0x1000000"]),
            ("create -B b -D d --compressor gzip src", &["--compressor", "none, lz4_block, zstd"]),
            ("create -B b -D d --digester md5 src", &["--digester", "blake3, sha256"]),
            ("create -B b -D d --fs-version 7 src", &["--fs-version", "5, 6"]),
            ("create -B b -D d --bogus src", &["--bogus"]),
            ("create -B b -D /nonexistent /etc", &["/nonexistent"]),
            ("create -B b -D . /nonexistent", &["/nonexistent"]),
            ("create -B b src", &["--blob", "--blob-dir"]),
            ("create -t tar-rafs -B b -D . /etc/passwd", &["/etc/passwd", "not a tar header"]),
            ("create -t dir-rafs -B b -D . /etc/passwd", &["/etc/passwd", "not a directory"]),
            ("check", &["BOOTSTRAP"]),
            ("check /nonexistent", &["/nonexistent"]),
            ("check /etc/passwd", &["/etc/passwd"]),
            ("merge -B b /nonexistent", &["/nonexistent"]),
            ("merge -B b /etc/passwd", &["/etc/passwd"]),
            ("-l loud check x", &["--log-level", "loud", "warn"]),
        ],
    );
}

#[test]
fn flags_of_the_replaced_program_that_mean_nothing_here_are_named_in_one_warning_each() {
    let flags = ["--docker-v2-format", "--nydus-image nydus-image", "--push-retry-count 3", "--push-retry-delay 5s"];
    let line = format!("convert --source a --target b --work-dir /dev/null/x {}", flags.join(" "));
    let text = said(&run(env!("CARGO_BIN_EXE_nydusify"), &line));
    for flag in flags {
        let name = flag.split(' ').next().expect("a first word");
        let warnings = text.lines().filter(|line| line.contains(name) && line.contains("has no effect"));
        assert_eq!(warnings.count(), 1, "{name}:\n{text}");
    }
}

#[test]
fn both_programs_tell_their_version_as_callers_ask_for_it() {
    for (program, flag) in [
        (env!("CARGO_BIN_EXE_nydusify"), "-v"),
        (env!("CARGO_BIN_EXE_nydusify"), "--version"),
        (env!("CARGO_BIN_EXE_nydus-image"), "-V"),
        (env!("CARGO_BIN_EXE_nydus-image"), "--version"),
    ] {
        let output = run(program, flag);
        assert!(output.status.success(), "{program} {flag}: {}", said(&output));
        assert!(said(&output).contains(env!("CARGO_PKG_VERSION")), "{}", said(&output));
    }
}
