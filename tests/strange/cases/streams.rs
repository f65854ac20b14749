//! How layers are packed, and what their manifests say.

use super::Verdict::{Refused, Same};
use crate::made::{Image, Layer};
use nydus_tests::rawtar::{dir, file, gone, tar, unended};

use super::{Case, of};

pub(super) fn streams() -> Vec<Case> {
    let entries = |name: &str| vec![dir("d").mode(0o750), file("d/f", name), file("big", name.repeat(5000))];
    let plain = |name: &str| tar(&entries(name));
    let one = |layer: Layer| Image::new(vec![layer]);
    let mut garbage = plain("garbage");
    garbage.extend(b"this is no tar any more".repeat(100));
    let mut padded = plain("padded");
    padded.resize(padded.len() + 20_000, 0);
    let mut odd = unended(&entries("odd end"));
    odd.extend([0; 512]);
    let mut short = unended(&[file("a", "1"), file("b", "cut padding")]);
    short.truncate(short.len() - 500);
    let mut cut = unended(&entries("cut body"));
    cut.truncate(cut.len() - 6000);
    let mut half = unended(&entries("half header"));
    half.extend([b'x'; 100]);
    let mut bad_sum = unended(&entries("checksum"));
    bad_sum[0] ^= 1;
    vec![
        of("gzip members", Same, one(Layer::members(&plain("members"), &[10, 1024, 5000]))),
        of("gzip empty members", Same, one(Layer::members(&plain("empty members"), &[0, 0, 700, 700]))),
        of(
            "gzip trailing zeros",
            Refused("could not read the archive"),
            one(Layer::tar(&plain("gzip zeros")).edit(|bytes| bytes.extend([0; 512]))),
        ),
        of(
            "gzip trailing garbage",
            Refused("could not read the archive"),
            one(Layer::tar(&plain("gzip garbage")).edit(|bytes| bytes.extend(b"garbage"))),
        ),
        of("gzip cut", Refused(""), one(Layer::tar(&plain("gzip cut")).edit(|bytes| bytes.truncate(bytes.len() - 20)))),
        of(
            "gzip without trailer",
            Refused(""),
            one(Layer::tar(&plain("gzip no trailer")).edit(|bytes| bytes.truncate(bytes.len() - 8))),
        ),
        of(
            "gzip wrong checksum",
            Refused(""),
            one(Layer::tar(&plain("gzip crc")).edit(|bytes| {
                let at = bytes.len() - 6;
                bytes[at] ^= 1;
            })),
        ),
        of("zstd", Same, one(Layer::zstd(&plain("zstd")))),
        of("zstd frames", Same, one(Layer::zstd_frames(&plain("zstd frames"), &[700, 700, 5000]))),
        of(
            "zstd cut",
            Refused(""),
            one(Layer::zstd(&plain("zstd cut")).edit(|bytes| bytes.truncate(bytes.len() - 20))),
        ),
        of("uncompressed", Same, one(Layer::plain(&plain("uncompressed")))),
        of(
            "gzip said to be uncompressed",
            Refused("inside a header"),
            one({
                let tar = plain("said plain");
                Layer::stored("layer.v1.tar", gzip_of(&tar), &tar)
            }),
        ),
        of(
            "uncompressed said to be gzip",
            Same,
            one({
                let tar = plain("said gzip");
                Layer::stored("layer.v1.tar+gzip", tar.clone(), &tar)
            }),
        ),
        of(
            "nondistributable",
            Same,
            one({
                let tar = plain("nondistributable");
                Layer::stored("layer.nondistributable.v1.tar+gzip", gzip_of(&tar), &tar)
            }),
        ),
        of(
            "unknown media type",
            Refused("media type `application/vnd.oci.image.layer.v1.zip`"),
            one({
                let tar = plain("unknown type");
                Layer::stored("layer.v1.zip", gzip_of(&tar), &tar)
            }),
        ),
        of(
            "docker types",
            Same,
            Image::new(vec![Layer::of(&entries("docker")), Layer::of(&[gone(".wh.big")])]).docker(),
        ),
        of("no end", Same, one(Layer::tar(&unended(&entries("no end"))))),
        of("one block at the end", Same, one(Layer::tar(&odd))),
        of("cut padding", Same, one(Layer::tar(&short))),
        of("cut body", Refused("cut short"), one(Layer::tar(&cut))),
        of("half a header", Refused("cut short"), one(Layer::tar(&half))),
        of("wrong checksum of a header", Refused("checksum"), one(Layer::tar(&bad_sum))),
        of("garbage after the end", Same, one(Layer::tar(&garbage))),
        of("padding after the end", Same, one(Layer::tar(&padded))),
        of("not a tar", Refused("not a tar header"), one(Layer::tar(&b"<html>not found</html>".repeat(100)))),
    ]
}

fn gzip_of(tar: &[u8]) -> Vec<u8> {
    Layer::tar(tar).into_stored()
}

pub(super) fn manifests() -> Vec<Case> {
    let layer = |name: &str| Layer::of(&[file("f", name.repeat(3000))]);
    let one = |layer: Layer| Image::new(vec![layer]);
    vec![
        of("wrong digest", Refused("digest"), one(layer("wrong digest").corrupt())),
        of("wrong diff id", Refused("digest"), one(layer("wrong diff id").wrong_diff_id())),
        of("size too large", Refused("manifest tells"), one(layer("size too large").wrong_size(5))),
        of("size too small", Refused("manifest tells"), one(layer("size too small").wrong_size(-5))),
        of(
            "more layers than diff ids",
            Refused("rootfs.diff_ids"),
            Image::new(vec![layer("more layers"), layer("than ids")]).config(|config| {
                config["rootfs"]["diff_ids"].as_array_mut().map(Vec::pop);
            }),
        ),
        of(
            "fewer layers than diff ids",
            Refused("rootfs.diff_ids"),
            one(layer("fewer layers")).config(|config| {
                let first = config["rootfs"]["diff_ids"][0].clone();
                if let Some(list) = config["rootfs"]["diff_ids"].as_array_mut() {
                    list.push(first);
                }
            }),
        ),
        of(
            "config without rootfs",
            Refused("rootfs.diff_ids"),
            one(layer("no rootfs")).config(|config| {
                config.as_object_mut().map(|config| config.remove("rootfs"));
            }),
        ),
        of(
            "config without platform",
            Same,
            one(layer("no platform")).config(|config| {
                config
                    .as_object_mut()
                    .map(|config| (config.remove("architecture"), config.remove("os"), config.remove("config")));
            }),
        ),
        of(
            "config of another platform",
            Same,
            one(layer("other platform")).config(|config| config["architecture"] = "s390x".into()),
        ),
        of(
            "config that is no object",
            Refused("rootfs.diff_ids"),
            one(layer("no object")).config(|config| *config = serde_json::json!([1])),
        ),
        of(
            "diff ids that are no digests",
            Refused(""),
            one(layer("no digests")).config(|config| config["rootfs"]["diff_ids"][0] = "x".into()),
        ),
        of(
            "rootfs type",
            Same,
            one(layer("rootfs type")).config(|config| config["rootfs"]["type"] = "something".into()),
        ),
        of(
            "history that lies",
            Same,
            one(layer("history"))
                .config(|config| config["history"] = serde_json::json!([{"empty_layer": true}, {"created_by": "x"}])),
        ),
        of("no layers", Same, Image::new(vec![])),
        of(
            "no layers and no rootfs",
            Same,
            Image::new(vec![]).config(|config| {
                config.as_object_mut().map(|config| config.remove("rootfs"));
            }),
        ),
    ]
}
