#!/usr/bin/env bash
# Installs what building, testing and the demo need on Debian 12, as root. Does nothing where all is there.
set -euo pipefail

packages=(containerd runc docker-registry protobuf-compiler libprotobuf-dev fuse3 mmdebstrap erofs-utils strace faketime e2fsprogs iproute2
  ca-certificates curl openssl busybox-static gcc g++ libc6-dev make cmake pkg-config python3 python3-venv python3-cryptography liblz4-1 libzstd1 systemd)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "setup: these Debian packages are needed; install them, or run this as root on Debian: ${missing[*]}" >&2
  exit 1
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Another apt may be at work on a machine that has just booted: wait for it.
apt_get() { apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }
apt_get update
# containerd, runc and the registry are used by the tests as plain programs: their services stay off.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' > $policy
  chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
apt_get install -y --no-install-recommends "${missing[@]}" >/dev/null
