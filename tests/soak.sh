#!/usr/bin/env bash
# The long tests, for a machine that has some hours: every fault once on release binaries, a million entries and a full 8 GiB,
# fuzzing, the fault campaign.
#
# SOAK_LOGS (default: a new folder below /tmp) takes all logs and summary.txt. SOAK_FUZZ_SECONDS (600, for each parser) and
# SOAK_CAMPAIGN_SECONDS (3600) are the times; SOAK_SEED decides the campaign's faults. SOAK_ONLY runs only the steps whose
# names it contains: "parade large fuzz campaign". A step that fails does not stop the others.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${SOAK_LOGS:-$(mktemp -d /tmp/shoal-soak-XXXXXX)}
fuzz=${SOAK_FUZZ_SECONDS:-600}
campaign=${SOAK_CAMPAIGN_SECONDS:-3600}
seed=${SOAK_SEED:-$(date +%s)}
only=${SOAK_ONLY:-parade large fuzz campaign}
mkdir -p "$logs"
summary=$logs/summary.txt
bin=${CARGO_TARGET_DIR:-target}/release

{
  echo "commit   $(git rev-parse HEAD)$([ -z "$(git status --porcelain)" ] || echo ', with changes that are not committed')"
  echo "machine  $(nproc) cores, $(awk '/MemTotal/ {printf "%.0f GiB", $2 / 1048576}' /proc/meminfo), Linux $(uname -r)"
  echo "begun    $(date -u +'%F %T') UTC, logs in $logs"
} | tee "$summary"

red=0
# step NAME SECONDS COMMAND...: runs it for at most so long, its output in a log of its own.
step() {
  local name=$1 limit=$2 begin=$SECONDS outcome
  shift 2
  [[ " $only " == *" $name "* ]] || return 0
  echo "$name ..."
  if timeout --kill-after=60 "$limit" "$@" >"$logs/$name.log" 2>&1; then outcome=green; else outcome="RED ($?)"; red=1; fi
  echo "$name: $outcome after $((SECONDS - begin)) s" | tee -a "$summary"
}

cargo build --release --workspace --bins --locked
step parade 1800 cargo test --release --locked -p nydus-tests --test parade --test weather -- --nocapture
step large 10800 env SHOAL_SOAK=1 cargo test --release --locked -p nydus-tests --test strange large
step fuzz $(($(ls tests/corpora | wc -l) * (fuzz + 60) + 3600)) env FUZZ_SECONDS="$fuzz" FUZZ_LOGS="$logs/fuzz" tests/fuzz.sh
step campaign $((campaign + 1800)) "$bin/shoal-campaign" --seconds "$campaign" --seed "$seed" --logs "$logs/campaign"

{
  echo
  [ ! -e "$logs/fuzz.log" ] || grep '^fuzz:' "$logs/fuzz.log" || true
  [ ! -e "$logs/campaign.log" ] || cat "$logs/campaign.log"
  echo "ended    $(date -u +'%F %T') UTC: $([ $red = 0 ] && echo green || echo RED)"
} >>"$summary"
cat "$summary"
exit $red
