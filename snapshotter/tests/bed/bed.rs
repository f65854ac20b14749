//! The real program on a real socket, in a directory of its own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containerd_snapshots::api::snapshots::v1::snapshots_client::SnapshotsClient;
use containerd_snapshots::api::snapshots::v1::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, UsageResponse,
    ViewSnapshotRequest,
};
use containerd_snapshots::api::types::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// What every test starts from: the program runs and serves.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) client: SnapshotsClient<Channel>,
    child: Option<Child>,
    nydusd: PathBuf,
    flags: Vec<String>,
    /// Further variables for the program.
    pub(crate) environment: Vec<(String, String)>,
}

/// A template that finds blobs in a directory.
pub(crate) fn localfs_template(blobs: &Path) -> String {
    format!(
        r#"{{"device":{{"backend":{{"type":"localfs","config":{{"dir":"{}"}}}},"cache":{{"type":"blobcache","config":{{}}}}}},"mode":"direct","digest_validate":false,"enable_xattr":true}}"#,
        blobs.display()
    )
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

impl Bed {
    /// For images without nydusd.
    pub(crate) async fn plain() -> Self {
        Self::new(Path::new("/bin/true"), &localfs_template(Path::new("/nonexistent")), &[]).await
    }

    pub(crate) async fn new(nydusd: &Path, template: &str, flags: &[&str]) -> Self {
        let mut bed = Self::unstarted(nydusd, template, flags);
        bed.start().await;
        bed
    }

    /// Everything but the program itself, so that its root can be something special.
    pub(crate) fn unstarted(nydusd: &Path, template: &str, flags: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("snap-").tempdir().expect("a directory");
        std::fs::write(dir.path().join("template.json"), template).expect("written");
        let client = connect(&dir.path().join("s.sock"));
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let environment = Vec::new();
        Self { dir, client, child: None, nydusd: nydusd.to_path_buf(), flags, environment }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("r")
    }

    /// Starts the program and waits until it serves.
    pub(crate) async fn start(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).expect("opened");
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-nydus-grpc"));
        command.arg("--root").arg(self.root()).arg("--address").arg(self.dir.path().join("s.sock"));
        command.arg("--nydusd-config").arg(self.dir.path().join("template.json")).arg("--nydusd").arg(&self.nydusd);
        command.args(["--log-to-stdout", "--log-level", "debug"]).args(&self.flags);
        // Whoever runs the tests may have accounts of their own.
        command.env("DOCKER_CONFIG", self.dir.path().join("docker")).envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("cloned")).stderr(log);
        self.child = Some(command.spawn().expect("the program was built for this test"));
        let begun = Instant::now();
        // A new client each time: an old connection may be waiting before it tries again.
        self.client = connect(&self.dir.path().join("s.sock"));
        while self.list(&[]).await.is_err() {
            let ended = self.child.as_mut().expect("just started").try_wait().expect("it is ours");
            assert!(ended.is_none(), "it ended with {ended:?}:\n{}", self.log());
            assert!(begun.elapsed() < Duration::from_secs(30), "it does not serve:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
            self.client = connect(&self.dir.path().join("s.sock"));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().expect("it runs").id()).expect("small")
    }

    /// Ends the program without a chance to tidy up.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
    }

    /// Ends the program as a service manager does. Our connection must go on meanwhile, to hear that it is closed.
    pub(crate) async fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        signal(i32::try_from(child.id()).expect("small"), Signal::SIGTERM);
        let status = loop {
            if let Some(status) = child.try_wait().expect("it is ours") {
                break status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert!(status.success(), "it ended with {status}:\n{}", self.log());
    }

    pub(crate) async fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, Status> {
        let request =
            PrepareSnapshotRequest { snapshotter: String::new(), key: key.into(), parent: parent.into(), labels };
        Ok(self.client.prepare(request).await?.into_inner().mounts)
    }

    pub(crate) async fn view(&mut self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request = ViewSnapshotRequest {
            snapshotter: String::new(),
            key: key.into(),
            parent: parent.into(),
            labels: HashMap::new(),
        };
        Ok(self.client.view(request).await?.into_inner().mounts)
    }

    pub(crate) async fn mounts(&mut self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.client.mounts(request).await?.into_inner().mounts)
    }

    pub(crate) async fn commit(
        &mut self,
        name: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let request = CommitSnapshotRequest { snapshotter: String::new(), name: name.into(), key: key.into(), labels };
        self.client.commit(request).await.map(drop)
    }

    pub(crate) async fn remove(&mut self, key: &str) -> Result<(), Status> {
        self.client.remove(RemoveSnapshotRequest { snapshotter: String::new(), key: key.into() }).await.map(drop)
    }

    pub(crate) async fn stat(&mut self, key: &str) -> Result<Info, Status> {
        let answer = self.client.stat(StatSnapshotRequest { snapshotter: String::new(), key: key.into() }).await?;
        Ok(answer.into_inner().info.expect("an answer holds what was asked for"))
    }

    pub(crate) async fn update(&mut self, info: Info, fields: &[&str]) -> Result<Info, Status> {
        let paths = fields.iter().map(|field| (*field).to_owned()).collect();
        let mut request = UpdateSnapshotRequest { snapshotter: String::new(), info: Some(info), update_mask: None };
        let mut mask = request.update_mask.take().unwrap_or_default();
        mask.paths = paths;
        request.update_mask = Some(mask);
        let answer = self.client.update(request).await?;
        Ok(answer.into_inner().info.expect("an answer holds what was asked for"))
    }

    pub(crate) async fn usage(&mut self, key: &str) -> Result<UsageResponse, Status> {
        Ok(self.client.usage(UsageRequest { snapshotter: String::new(), key: key.into() }).await?.into_inner())
    }

    pub(crate) async fn cleanup(&mut self) -> Result<(), Status> {
        self.client.cleanup(CleanupRequest { snapshotter: String::new() }).await.map(drop)
    }

    pub(crate) async fn list(&mut self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let mut stream =
            self.client.list(ListSnapshotsRequest { snapshotter: String::new(), filters }).await?.into_inner();
        let mut all = Vec::new();
        while let Some(part) = stream.message().await? {
            all.extend(part.info);
        }
        Ok(all)
    }

    /// Numbers of the snapshot directories on disk.
    pub(crate) fn directories(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root().join("snapshots")).expect("it is there");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("read").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    /// Processes of nydusd that serve this root.
    pub(crate) fn nydusds(&self) -> Vec<i32> {
        let root = self.root().to_string_lossy().into_owned();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("mounted").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            if words.split('\0').any(|word| word == "--apisock") && words.contains(&root) {
                found.push(pid);
            }
        }
        found
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in self.nydusds() {
            signal(pid, Signal::SIGKILL);
        }
        let inside = self.dir.path().to_string_lossy().into_owned();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in mounts.lines().rev() {
            if let Some(path) = line.split(' ').nth(4).filter(|path| path.starts_with(&inside)) {
                let _ = umount2(path, MntFlags::MNT_DETACH);
            }
        }
        if std::thread::panicking() {
            println!("the program's log:\n{}", self.log());
            let logs = self.root().join("logs");
            for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
                let path = entry.path().join("nydusd.log");
                println!("{}:\n{}", path.display(), std::fs::read_to_string(&path).unwrap_or_default());
            }
        }
    }
}

/// Connects when it is first used.
fn connect(socket: &Path) -> SnapshotsClient<Channel> {
    let socket = socket.to_path_buf();
    let channel = Endpoint::from_static("http://socket")
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| tokio::net::UnixStream::connect(socket.clone())));
    SnapshotsClient::new(channel)
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

pub(crate) fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("it must fail").code()
}

/// Something mounted for as long as this lives.
pub(crate) struct Mounted(pub(crate) tempfile::TempDir);

impl Mounted {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// Mounts what a call answered, as containerd does.
pub(crate) fn mounted(mounts: &[Mount]) -> Mounted {
    let [one] = mounts else { panic!("one mount is expected: {mounts:?}") };
    let at = Mounted(tempfile::Builder::new().prefix("snap-mnt-").tempdir().expect("a directory"));
    let bind = one.r#type == "bind";
    let data: Vec<&str> =
        one.options.iter().map(String::as_str).filter(|option| !matches!(*option, "rw" | "ro" | "rbind")).collect();
    let flags = if bind { MsFlags::MS_BIND | MsFlags::MS_REC } else { MsFlags::empty() };
    let data = data.join(",");
    mount(Some(one.source.as_str()), at.path(), Some(one.r#type.as_str()), flags, Some(data.as_str()))
        .unwrap_or_else(|error| panic!("{one:?}: {error}"));
    if bind && one.options.iter().any(|option| option == "ro") {
        let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, at.path(), None::<&str>, again, None::<&str>).expect("made read-only");
    }
    at
}

/// Whether this test can run; prints why not.
pub(crate) fn may_mount() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: mounting needs root");
    }
    root
}

/// A nydusd to test with: `NYDUSD`, or the one built beside us; prints why there is none.
pub(crate) fn nydusd() -> Option<PathBuf> {
    let named = std::env::var_os("NYDUSD").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_BIN_EXE_containerd-nydus-grpc")).with_file_name("nydusd");
    let found = named.into_iter().chain([beside]).find(|path| path.exists());
    if found.is_none() {
        println!("skipped: there is no nydusd beside the tests (cargo build -p nydusd), and NYDUSD names none");
    }
    found.filter(|_| may_mount() && fuse())
}

fn fuse() -> bool {
    let there = Path::new("/dev/fuse").exists();
    if !there {
        println!("skipped: there is no /dev/fuse");
    }
    there
}
