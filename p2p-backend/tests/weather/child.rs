//! Tests that need a process of their own: the environment and the names that a process sees are the process's.

use std::path::Path;
use std::process::Output;

use tokio::process::Command;

/// Set in the child, which is the same test again.
const MARK: &str = "WEATHER_CHILD";

/// Tells whether this is the child.
pub(crate) fn is_child() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs the test `name` again with further variables, and without those of proxies.
pub(crate) async fn run(name: &str, variables: &[(&str, &str)]) -> Output {
    finish(Command::new(std::env::current_exe().unwrap()), name, variables).await
}

/// As [`run`], with the file `hosts` in the place of `/etc/hosts`. None if a mount namespace cannot be had.
pub(crate) async fn run_with_hosts(name: &str, hosts: &Path, variables: &[(&str, &str)]) -> Option<Output> {
    let inside = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script]);
        command
    };
    let possible = inside("mount --bind /etc/hosts /etc/hosts").output().await;
    if !possible.is_ok_and(|done| done.status.success()) {
        return None;
    }
    let mut command = inside("mount --bind \"$0\" /etc/hosts && exec \"$@\"");
    command.arg(hosts).arg(std::env::current_exe().unwrap());
    Some(finish(command, name, variables).await)
}

async fn finish(mut command: Command, name: &str, variables: &[(&str, &str)]) -> Output {
    command.args(["--exact", name, "--nocapture"]).env(MARK, "1");
    for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(proxy).env_remove(proxy.to_ascii_lowercase());
    }
    command.envs(variables.iter().copied()).output().await.unwrap()
}

/// Fails with what the child said, unless it succeeded.
pub(crate) fn succeeded(output: &Output) {
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", said(&output.stdout), said(&output.stderr));
}
