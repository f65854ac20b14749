#!/usr/bin/env bash
# Breaks the rules of the swarm, one at a time and in a copy, and looks whether a simulated crowd notices: a rule that can be taken
# out without a red seed is a rule that nothing proves. The copy is built once; which rule is broken is told when it runs.
#
#   tests/swarm/broken.sh            all rules
#   tests/swarm/broken.sh lease      this one
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
only=${1:-}
copy=$(mktemp -d /tmp/shoal-broken.XXXXXX)
trap 'rm -rf "$copy"' EXIT
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target/broken}
module=$copy/p2p-backend/src/swarm
unproved=()

(cd "$top" && git ls-files -z | xargs -0 cp --parents -t "$copy")
cat >>"$module.rs" <<'RUST'

/// Whether this run is to break a rule.
pub(crate) fn broken(rule: &str) -> bool {
    static BROKEN: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    BROKEN.get_or_init(|| std::env::var("SHOAL_BROKEN").unwrap_or_default()) == rule
}
RUST

# replace FILE OLD NEW: OLD has to be there exactly once.
replace() {
    OLD=$2 NEW=$3 perl -0pi -e '
        my ($old, $new) = ($ENV{OLD}, $ENV{NEW});
        my $found = () = /\Q$old\E/g;
        die "$ARGV: `$old` is there $found times; write its rule anew\n" if $found != 1;
        s/\Q$old\E/$new/;
    ' "$module/$1"
}

replace heard.rs 'vouch.filter(|vouch| vouch.sum == sum)' 'vouch.filter(|vouch| vouch.sum == sum || super::broken("hash"))'
replace want.rs 'Known::Ask => self.out.push(Output::Check { caller: reader.caller, object, origin: origin.clone() }),' \
    'Known::Ask => {
                if super::broken("grant") {
                    self.out.push(Output::Grant { want });
                }
                self.out.push(Output::Check { caller: reader.caller, object, origin: origin.clone() });
            }'
replace watch.rs 'self.intake.silence(self.config.silence)' \
    'if super::broken("silence") { Duration::from_secs(3600) } else { self.intake.silence(self.config.silence) }'
replace ask.rs 'Manner::Home | Manner::BytesOnly => self.config.deadline,' \
    'Manner::Home | Manner::BytesOnly if super::broken("promises") => Duration::from_secs(3600),
                Manner::Home | Manner::BytesOnly => self.config.deadline,'
replace read.rs 'now + self.config.lease' 'now + if super::broken("lease") { Duration::from_secs(3600) } else { self.config.lease }'
replace home.rs 'end: now + LONGEST_LEASE' \
    'end: now + if super::broken("lease") { Duration::from_secs(3600) } else { LONGEST_LEASE }'
replace leave.rs 'blob.have.groups().map' 'blob.have.groups().filter(|_| !super::broken("withdraw")).map'
replace heard.rs 'let until = self.now + RETRY;' \
    'let until = self.now + RETRY;
            if super::broken("evidence") {
                self.quarantine(to, Blame::Bytes, object, piece);
            }'
replace source.rs 'busy.filter(|vain| vain.until > self.now)' 'busy.filter(|vain| vain.until > self.now && !super::broken("busy"))'
replace ask.rs 'if manner == Manner::Spare { 0 } else { below.unwrap_or(u8::MAX) }' \
    'if manner == Manner::Spare { 0 } else { below.filter(|_| !super::broken("depth")).unwrap_or(u8::MAX) }'
replace heard.rs 'depth.is_some_and(|depth| depth >= fetch.ceiling)' \
    'depth.is_some_and(|depth| depth >= fetch.ceiling) && !super::broken("depth")'
replace source.rs 'if fetch.urgency == Urgency::Prefetch {' 'if fetch.urgency == Urgency::Prefetch && !super::broken("budget") {'
replace read.rs 'if other == piece { offset }' 'if other == piece || super::broken("offset") { offset }'

(cd "$copy" && cargo build -q --release -p nydus-swarm)

# rule NAME NODES SEEDS SCENARIO WHAT
rule() {
    local name=$1 nodes=$2 seeds=$3 scenario=$4 what=$5 log=$copy/log
    [[ -z $only || $name == "$only" ]] || return 0
    if SHOAL_BROKEN=$name timeout 300 "$CARGO_TARGET_DIR/release/shoal-swarm" \
        --nodes "$nodes" --seeds "$seeds" --scenario "$scenario" >"$log" 2>&1; then
        echo "GREEN  $name: $what ($scenario, $nodes nodes, $seeds seeds)"
        unproved+=("$name")
    else
        echo "red    $name: $what ($scenario, $nodes nodes): $(grep -m1 -o 'WRONG: .*' "$log" || echo 'it did not end')"
    fi
}

rule hash 10 3 "lie: WrongBytes" "a hash is compared before a piece is kept"
rule grant 10 3 strangers "bytes wait for the registry's word about the caller"
rule silence 10 3 "lie: Stalls" "a silent source is left"
rule promises 10 5 "lie: Promises" "a home that only promises is left"
rule lease 20 10 "tokens, kill" "a lease is void after a silence"
rule withdraw 20 10 "late eviction" "what goes is withdrawn first"
rule evidence 20 10 "lie: FalseVouch" "quarantine is for own evidence"
rule busy 100 3 "busy homes" "a busy home is still the home"
rule depth 100 10 "weak links" "nobody waits for one who does not stand above"
rule budget 10 5 "demand beside prefetch" "prefetch has a budget"
rule offset 20 5 "registry down" "a piece goes on from its own bytes"

if ((${#unproved[@]})); then
    printf 'nothing proves: %s\n' "${unproved[@]}"
    exit 1
fi
