//! A private registry with an image in Nydus form, converted through all of it.
//!
//! Only the callers hold credentials: docker's configuration is shown to `nydusify` and to the snapshotter, CRI gets a pull
//! secret; the mirror has none.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::authority::Authority;
use crate::cri::Cri;
use crate::debian;
use crate::front::{Front, PASSWORD, USER};
use crate::image::{self, Layer};
use crate::node::{Node, Private, Setup};
use crate::process::{run, shoal};
use crate::registry::Registry;
use crate::scratch::Scratch;

/// The image's repository.
pub const REPOSITORY: &str = "team/cold";

/// The registry and what belongs to it; nodes are started on it.
#[derive(Debug)]
pub struct Bed {
    /// The front, which is what everybody talks to.
    pub front: Front,
    /// Whom to believe.
    pub authority: Authority,
    /// The registry behind.
    pub registry: Registry,
    /// Its folder.
    pub scratch: Scratch,
}

impl Bed {
    /// Pushes an image of `layers` and converts it; without credentials that is refused.
    pub async fn new(purpose: &str, layers: &[Layer]) -> Result<Self> {
        Self::named(purpose, layers, "127.0.0.1").await
    }

    /// The same for a registry that is known by a `name`, which has to lead to this machine.
    pub async fn named(purpose: &str, layers: &[Layer], name: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let client = image::client(&registry.host)?;
        image::push(
            &client,
            "pause",
            "1",
            &[debian::pause(&scratch.dir("pause")?)?],
            json!({"Entrypoint": ["/pause"]}),
        )
        .await?;
        image::push(&client, REPOSITORY, "oci", layers, json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]})).await?;

        let authority = Authority::make(&scratch.dir("authority")?)?;
        let mut front = Front::start(&registry.host, &authority).await?;
        front.host = front.host.replace("127.0.0.1", name);
        std::fs::write(scratch.dir("docker")?.join("config.json"), front.docker_config())?;
        let bed = Self { front, authority, registry, scratch };
        let work = bed.scratch.path().join("work");
        let refused = run(&mut bed.convert("nobody", &work)?).expect_err("without credentials nothing is converted");
        ensure!(refused.to_string().contains(&bed.front.host), "the refusal does not name the registry: {refused}");
        run(&mut bed.convert("docker", &work)?)?;
        Ok(bed)
    }

    /// Returns a command that converts the image as somebody whose docker configuration is in the folder `docker`.
    pub fn convert(&self, docker: &str, work: &Path) -> Result<Command> {
        self.convert_to("nydus", docker, work)
    }

    /// The same under another `tag`.
    pub fn convert_to(&self, tag: &str, docker: &str, work: &Path) -> Result<Command> {
        let target = format!("{}/{REPOSITORY}:{tag}", self.front.host);
        let mut convert = Command::new(shoal("nydusify")?);
        convert.arg("convert").arg("--source").arg(format!("{}/{REPOSITORY}:oci", self.front.host));
        convert.arg("--target").arg(target).arg("--work-dir").arg(work);
        convert.env("DOCKER_CONFIG", self.scratch.dir(docker)?).env("SSL_CERT_FILE", self.authority.ca());
        Ok(convert)
    }

    /// Returns the converted image's name.
    pub fn image(&self) -> String {
        format!("{}/{REPOSITORY}:nydus", self.front.host)
    }

    /// Returns how a node for it is set up.
    pub fn setup(&self) -> Setup {
        Setup {
            private: Some(Private {
                ca: self.authority.ca(),
                lazy_ca: self.authority.ca(),
                docker_config: self.scratch.path().join("docker"),
            }),
            ..Setup::new(&self.front.host, format!("{}/pause:1", self.front.host))
        }
    }

    /// Connects to a node's CRI and pulls both images as kubelet would.
    pub async fn pull(&self, node: &Node) -> Result<Cri> {
        let cri = Cri::connect(&node.containerd.socket, &node.dir.join("pods")).await?;
        cri.pull_as(&format!("{}/pause:1", self.front.host), USER, PASSWORD).await?;
        cri.pull_as(&self.image(), USER, PASSWORD).await?;
        Ok(cri)
    }

    /// Returns the digests of the image's data blobs, the largest first.
    pub async fn blobs(&self) -> Result<Vec<String>> {
        let manifest = image::client(&self.registry.host)?.manifest(REPOSITORY, "nydus").await?;
        let manifest: Value = serde_json::from_slice(&manifest.bytes)?;
        let mut layers = manifest["layers"].as_array().context("a manifest has layers")?.clone();
        layers.pop().context("a converted image has a bootstrap")?;
        layers.sort_by_key(|layer| std::cmp::Reverse(layer["size"].as_u64()));
        Ok(layers.iter().filter_map(|layer| Some(layer["digest"].as_str()?.to_owned())).collect())
    }
}
