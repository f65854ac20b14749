//! A small client of containerd's CRI service: pull, run to the end, remove.
//!
//! The messages hold the fields that are used, with the numbers of the published CRI; protobuf skips the rest.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tonic::transport::{Channel, Endpoint, Uri};

mod message {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ImageSpec {
        #[prost(string, tag = "1")]
        pub(super) image: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct PullImage {
        #[prost(message, optional, tag = "1")]
        pub(super) image: Option<ImageSpec>,
        #[prost(message, optional, tag = "2")]
        pub(super) auth: Option<Auth>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Auth {
        #[prost(string, tag = "1")]
        pub(super) username: String,
        #[prost(string, tag = "2")]
        pub(super) password: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ImageRef {
        #[prost(string, tag = "1")]
        pub(super) image_ref: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Metadata {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(string, tag = "2")]
        pub(super) uid: String,
        #[prost(string, tag = "3")]
        pub(super) namespace: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct NamespaceOptions {
        #[prost(int32, tag = "1")]
        pub(super) network: i32,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct SandboxSecurity {
        #[prost(message, optional, tag = "1")]
        pub(super) namespaces: Option<NamespaceOptions>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct LinuxSandbox {
        #[prost(message, optional, tag = "2")]
        pub(super) security: Option<SandboxSecurity>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct SandboxConfig {
        #[prost(message, optional, tag = "1")]
        pub(super) metadata: Option<Metadata>,
        #[prost(string, tag = "3")]
        pub(super) log_directory: String,
        #[prost(message, optional, tag = "8")]
        pub(super) linux: Option<LinuxSandbox>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RunSandbox {
        #[prost(message, optional, tag = "1")]
        pub(super) config: Option<SandboxConfig>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Exec {
        #[prost(string, tag = "1")]
        pub(super) container: String,
        #[prost(string, repeated, tag = "2")]
        pub(super) command: Vec<String>,
        #[prost(int64, tag = "3")]
        pub(super) timeout: i64,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Executed {
        #[prost(bytes, tag = "1")]
        pub(super) stdout: Vec<u8>,
        #[prost(bytes, tag = "2")]
        pub(super) stderr: Vec<u8>,
        #[prost(int32, tag = "3")]
        pub(super) code: i32,
    }
    /// Any message whose first field is an id.
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Id {
        #[prost(string, tag = "1")]
        pub(super) id: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ContainerMetadata {
        #[prost(string, tag = "1")]
        pub(super) name: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ContainerConfig {
        #[prost(message, optional, tag = "1")]
        pub(super) metadata: Option<ContainerMetadata>,
        #[prost(message, optional, tag = "2")]
        pub(super) image: Option<ImageSpec>,
        #[prost(string, repeated, tag = "3")]
        pub(super) command: Vec<String>,
        #[prost(string, tag = "11")]
        pub(super) log_path: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct CreateContainer {
        #[prost(string, tag = "1")]
        pub(super) sandbox: String,
        #[prost(message, optional, tag = "2")]
        pub(super) config: Option<ContainerConfig>,
        #[prost(message, optional, tag = "3")]
        pub(super) sandbox_config: Option<SandboxConfig>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Status {
        #[prost(int32, tag = "3")]
        pub(super) state: i32,
        #[prost(int32, tag = "7")]
        pub(super) exit_code: i32,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) status: Option<Status>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Nothing {}
}

/// The state number of a container that has ended.
const EXITED: i32 = 2;
/// The network mode of a pod that lives in the node's own network.
const NODE: i32 = 2;

/// A connection to the CRI service of a containerd.
#[derive(Debug, Clone)]
pub struct Cri {
    channel: Channel,
    logs: PathBuf,
}

/// A container that was started.
#[derive(Debug, Clone)]
pub struct Container {
    id: String,
    sandbox: String,
    log: PathBuf,
}

impl Container {
    /// Returns containerd's name for it.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// How a container ended, and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// Standard output and error.
    pub output: String,
}

impl Cri {
    /// Connects to `socket`; container logs go below `logs`.
    pub async fn connect(socket: &Path, logs: &Path) -> Result<Self> {
        let socket = socket.to_owned();
        let channel = Endpoint::from_static("http://cri.invalid")
            .connect_with_connector(tower_04::service_fn(move |_: Uri| tokio::net::UnixStream::connect(socket.clone())))
            .await
            .context("connecting to containerd")?;
        std::fs::create_dir_all(logs)?;
        Ok(Self { channel, logs: logs.to_owned() })
    }

    async fn call<Q, A>(&self, service: &str, verb: &str, request: Q) -> Result<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        client.ready().await.context("containerd is not ready")?;
        let path = format!("/runtime.v1.{service}/{verb}").parse().expect("service and verb make a path");
        let codec = tonic::codec::ProstCodec::default();
        let answer = client.unary(tonic::Request::new(request), path, codec).await;
        Ok(answer.with_context(|| format!("calling {verb}"))?.into_inner())
    }

    /// Pulls an image with the snapshotter that CRI is configured for.
    pub async fn pull(&self, image: &str) -> Result<()> {
        self.pull_with(image, None).await
    }

    /// Pulls an image as a user of its registry, as kubelet does with a pull secret.
    pub async fn pull_as(&self, image: &str, user: &str, password: &str) -> Result<()> {
        self.pull_with(image, Some(message::Auth { username: user.to_owned(), password: password.to_owned() })).await
    }

    async fn pull_with(&self, image: &str, auth: Option<message::Auth>) -> Result<()> {
        let request = message::PullImage { image: Some(message::ImageSpec { image: image.to_owned() }), auth };
        let answer: message::ImageRef = self.call("ImageService", "PullImage", request).await?;
        ensure!(!answer.image_ref.is_empty(), "pulling {image} gave no image");
        Ok(())
    }

    /// Starts `command` in a container of `image`, in a pod of its own.
    pub async fn start(&self, name: &str, image: &str, command: &[&str]) -> Result<Container> {
        let pod = message::SandboxConfig {
            metadata: Some(message::Metadata { name: name.into(), uid: name.into(), namespace: "shoal".into() }),
            log_directory: self.logs.display().to_string(),
            linux: Some(message::LinuxSandbox {
                security: Some(message::SandboxSecurity {
                    namespaces: Some(message::NamespaceOptions { network: NODE }),
                }),
            }),
        };
        let sandbox: message::Id =
            self.call("RuntimeService", "RunPodSandbox", message::RunSandbox { config: Some(pod.clone()) }).await?;
        let log = format!("{name}.log");
        let config = message::ContainerConfig {
            metadata: Some(message::ContainerMetadata { name: name.into() }),
            image: Some(message::ImageSpec { image: image.into() }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: log.clone(),
        };
        let create =
            message::CreateContainer { sandbox: sandbox.id.clone(), config: Some(config), sandbox_config: Some(pod) };
        let container: message::Id = self.call("RuntimeService", "CreateContainer", create).await?;
        let request = message::Id { id: container.id.clone() };
        let _: message::Nothing = self.call("RuntimeService", "StartContainer", request).await?;
        Ok(Container { id: container.id, sandbox: sandbox.id, log: self.logs.join(log) })
    }

    /// Runs `command` in a running container to its end, which containerd forces after `limit`.
    pub async fn exec(&self, container: &Container, command: &[&str], limit: Duration) -> Result<Ended> {
        let request = message::Exec {
            container: container.id.clone(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: i64::try_from(limit.as_secs())?,
        };
        let answer: message::Executed = self.call("RuntimeService", "ExecSync", request).await?;
        let output = [answer.stdout, answer.stderr].concat();
        Ok(Ended { code: answer.code, output: String::from_utf8_lossy(&output).into_owned() })
    }

    /// Waits for a container's end.
    pub async fn wait(&self, container: &Container, limit: Duration) -> Result<Ended> {
        let begin = Instant::now();
        loop {
            let request = message::Id { id: container.id.clone() };
            let answer: message::StatusResponse = self.call("RuntimeService", "ContainerStatus", request).await?;
            let status = answer.status.context("a container has a status")?;
            if status.state == EXITED {
                return Ok(Ended { code: status.exit_code, output: self.output(container)? });
            }
            if begin.elapsed() > limit {
                bail!("the container did not end within {limit:?}; it wrote:\n{}", self.output(container)?);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Returns what a container has written so far.
    pub fn output(&self, container: &Container) -> Result<String> {
        let text = std::fs::read_to_string(&container.log)?;
        // Each line is `time stream tag text`, tag `P` for a line cut in pieces.
        let mut output = String::new();
        for line in text.lines() {
            let mut words = line.splitn(4, ' ').skip(2);
            let (tag, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            output.push_str(rest);
            if tag != "P" {
                output.push('\n');
            }
        }
        Ok(output)
    }

    /// Removes a container and its pod, running or not.
    pub async fn remove(&self, container: Container) -> Result<()> {
        for (verb, id) in [
            ("StopContainer", &container.id),
            ("RemoveContainer", &container.id),
            ("StopPodSandbox", &container.sandbox),
            ("RemovePodSandbox", &container.sandbox),
        ] {
            let _: message::Nothing = self.call("RuntimeService", verb, message::Id { id: id.clone() }).await?;
        }
        Ok(())
    }

    /// Removes an image.
    pub async fn remove_image(&self, image: &str) -> Result<()> {
        let request = message::PullImage { image: Some(message::ImageSpec { image: image.to_owned() }), auth: None };
        let _: message::Nothing = self.call("ImageService", "RemoveImage", request).await?;
        Ok(())
    }

    /// Starts, waits, removes.
    pub async fn run(&self, name: &str, image: &str, command: &[&str]) -> Result<Ended> {
        let container = self.start(name, image, command).await?;
        let ended = self.wait(&container, Duration::from_secs(120)).await;
        self.remove(container).await?;
        ended
    }
}
