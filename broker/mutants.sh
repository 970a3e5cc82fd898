#!/usr/bin/env bash
# Breaks one promise after another in a scratch copy, and shows that the suite of the core and its simulation goes red each time.
# Ends with 1 where a mutation survives, or no longer finds the code it changes.
set -euo pipefail
cd "$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$scratch"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/weir/target}/mutants RUNS=${RUNS:-300} RUST_BACKTRACE=0
core=broker/core/src
survived=0
suite() { (cd "$scratch" && timeout 900 cargo test --locked --offline -p weir-core -p weir-sim "$@"); }
suite --no-run > "$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }

# mutate WHAT FILE OLD NEW: the text OLD, which stands there once, becomes NEW
mutate() {
  local what=$1 file=$scratch/$2
  cp "$file" "$scratch/before"
  if ! OLD=$3 NEW=$4 python3 - "$file" <<'P'
import os, sys
text = open(sys.argv[1]).read()
old = os.environ["OLD"]
if text.count(old) != 1:
    sys.exit(f"{sys.argv[1]}: found {text.count(old)} times: {old}")
open(sys.argv[1], "w").write(text.replace(old, os.environ["NEW"]))
P
  then survived=1; return; fi
  if ! suite --no-run > "$scratch/log" 2>&1; then
    echo "does not build: $what"; tail -20 "$scratch/log"; survived=1
  elif suite > "$scratch/log" 2>&1; then
    echo "SURVIVED: $what"; survived=1
  else
    echo "red: $what ($(grep -oE '^test .* FAILED' "$scratch/log" | sed 's/^test //; s/ \.\.\. FAILED//' | head -3 | paste -sd, | sed 's/,/, /g'))"
  fi
  cp "$scratch/before" "$file"; touch "$file"
}

mutate "ack before sync" $core/group.rs 'sync |= !self.memory || vote != self.vote_written;' 'sync |= vote != self.vote_written;'
mutate "ack by the leader alone" $core/group.rs 'filter(|e| *e.key() <= self.applied)' 'filter(|e| *e.key() <= self.raft.raft.raft_log.persisted)'
mutate "vote not synced" $core/group.rs 'sync |= !self.memory || vote != self.vote_written;' 'sync |= !self.memory && !entries.is_empty();'
mutate "applied state apart from its index" $core/group.rs '            index: self.applied,
            term,' '            index: self.applied - 1,
            term,'
mutate "producer table missing from a checkpoint" $core/partition.rs 'producers: self.producers.to_records()' 'producers: Vec::new()'
mutate "an empty disk that votes as the one before" $core/meta/command.rs '        let id = self.take_id();
        self.brokers.insert(id, Broker { id, phase: Phase::Active.into(), ..broker.clone() });' '        let id = old.id;
        self.brokers.insert(id, Broker { id, phase: Phase::Active.into(), ..broker.clone() });'
mutate "high watermark from the leader's own log" $core/group.rs 'let next = self.machine.next_offset();
        self.log().tail().set_high_watermark(next);' 'let next = self.log().tail().end_offset();
        self.log().tail().set_high_watermark(next);'
mutate "a new leader serves before its own first entry is committed" $core/group.rs 'l.term == self.term() && l.begun <= self.applied)' 'l.term == self.term())'
mutate "a new leader stamps records without a look at what it has not applied" $core/group.rs 'lead.append_time_ms = lead.append_time_ms.max(stamped);' ''
mutate "lease not checked on ack" $core/delivery.rs 'if matches!(slot.state, State::Acked | State::Dying) || !slot.given {' 'if matches!(slot.state, State::Acked | State::Dying) {'
mutate "retention above the smallest cursor" $core/duties.rs 'self.now.log_ms, keep);' 'self.now.log_ms, keep.and(None));'
mutate "a checkpoint whose answer is lost is not sent again" $core/group.rs 'self.raft.report_snapshot(id, SnapshotStatus::Failure);' ''
mutate "a change that waits for a lost broker is left alone" $core/meta/plan.rs 'assignment.replicas.iter().any(|r| lost(r.broker))' 'assignment.replicas.iter().any(|r| lost(r.broker)) && false'
mutate "a removed leader leads on" $core/group.rs 'if self.is_leader() && !votes {' 'if self.is_leader() && !votes && false {'
mutate "what sleeps because of a silent broker sleeps on" $core/sleep.rs 'self.ticks - h.tick == silence)' 'self.ticks - h.tick == silence && false)'
mutate "what is damaged at a sleeping partition's leader wakes nobody" $core/node.rs 'self.to_renew.insert(info.group, info.damaged);
            self.wake(info.group);' 'self.to_renew.insert(info.group, info.damaged);'
exit $survived
