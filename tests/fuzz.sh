#!/usr/bin/env bash
# Fuzzes every parser of tests/harness/parsers.rs, or those named: tests/fuzz.sh [NAME...]
#
# FUZZ_SECONDS (default 600) is the time for each; FUZZ_LOGS (default: a new folder below /tmp) takes logs, what was found,
# and the inputs that broke something: those belong into tests/corpora/NAME, which `make test` replays.
# Works on the stable compiler: its passes and libFuzzer (built with g++) need no flag that is not stable.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-600}
logs=${FUZZ_LOGS:-$(mktemp -d /tmp/shoal-fuzz-XXXXXX)}
target=$(rustc -vV | sed -n 's/^host: //p')
command -v g++ >/dev/null || { echo 'fuzz: install g++: libFuzzer is built with it' >&2; exit 1; }

# The versions of everything are those of the product.
cp ../Cargo.lock fuzz/Cargo.lock
trap 'rm -f fuzz/Cargo.lock' EXIT
passes='-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1'
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../target}/fuzz
# With --target the flags do not reach build scripts, which would not link with them.
RUSTFLAGS="$passes" cargo build --quiet --release --manifest-path fuzz/Cargo.toml --target "$target"

[ $# -gt 0 ] || set -- $(ls corpora)
failed=()
for name in "$@"; do
  mkdir -p "$logs/$name"
  # One job of bounded time and memory; an input that takes ten seconds is a hang.
  if PARSER=$name "$CARGO_TARGET_DIR/$target/release/shoal-fuzz" "$logs/$name" "corpora/$name" -max_total_time="$seconds" \
    -timeout=10 -rss_limit_mb=2048 -max_len=65536 -artifact_prefix="$logs/$name-" >"$logs/$name.log" 2>&1; then
    echo "fuzz: $name: green, $(grep -c . <(ls "$logs/$name")) inputs of interest, $(tail -1 "$logs/$name.log")"
  else
    failed+=("$name")
    echo "fuzz: $name: RED, see $logs/$name.log and $logs/$name-*"
  fi
done
[ ${#failed[@]} -eq 0 ]
