#!/usr/bin/env bash
# Breaks one promise after another in a scratch copy, and shows that the suite of the core and its simulation goes red each time.
# Ends with 1 where a mutation survives, or no longer finds the code it changes.
set -euo pipefail
cd "$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$scratch"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/weir/target}/mutants RUNS=${RUNS:-300} RUST_BACKTRACE=0
# each mutation compiles the core and its simulation anew: compiled quickly rather than quick
export CARGO_PROFILE_DEV_OPT_LEVEL=1 CARGO_INCREMENTAL=1
core=broker/core/src
survived=0
build() { (cd "$scratch" && cargo test --locked --offline -p weir-core -p weir-sim --no-run); }
suite() { (cd "$scratch" && timeout 900 cargo test --locked --offline -p weir-core -p weir-sim); }
build > "$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }

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
  if ! build > "$scratch/log" 2>&1; then
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
mutate "what a member leaves behind counts as failed" $core/delivery.rs 'self.remove(id, Return::Uncounted);' 'self.remove(id, Return::Failed { delay_ms: Some(0) });'
mutate "retention above the smallest cursor" $core/duties.rs 'now_ms, keep);' 'now_ms, keep.and(None));'
mutate "what puts dead letters back keeps them" $core/duties.rs 'positions.filter(|(id, _)| !redrives.contains(id))' 'positions'
mutate "what was scheduled is removed before anybody knows what is published" $core/retention.rs 'let published = !spec.schedule_for.is_empty() && keep_from.is_some();' 'let published = !spec.schedule_for.is_empty();'
mutate "a checkpoint whose answer is lost is not sent again" $core/group.rs 'self.raft.report_snapshot(id, SnapshotStatus::Failure);' ''
mutate "a change that waits for a lost broker is left alone" $core/meta/plan.rs 'assignment.replicas.iter().any(|r| lost(r.broker))' 'assignment.replicas.iter().any(|r| lost(r.broker)) && false'
mutate "a removed leader leads on" $core/group.rs 'if self.is_leader() && !votes {' 'if self.is_leader() && !votes && false {'
mutate "what sleeps because of a silent broker sleeps on" $core/sleep.rs 'self.ticks - h.tick == silence)' 'self.ticks - h.tick == silence && false)'
mutate "what is damaged at a sleeping partition's leader wakes nobody" $core/node.rs 'self.to_renew.insert(info.group, info.damaged);
            self.wake(info.group);' 'self.to_renew.insert(info.group, info.damaged);'
mutate "data of a rolled-back volume is used" $core/incarnation.rs '.filter(|(_, a)| a.newest > own);' '.filter(|(_, a)| a.newest > own && false);'
mutate "another broker's start is kept after what it asked to keep" $core/incarnation.rs '        self.remember_others(ops);
' ''
mutate "a broker takes part before it has asked" $core/incarnation.rs 'let standing = if fresh {' 'let standing = if fresh || true {'
mutate "a follower with a longer committed log is not heard" $core/group.rs '(message.term == self.term() && said > self.last_index()).then_some(said)' '(message.term == self.term() && said > self.last_index() && false).then_some(said)'
mutate "each replica cuts its log where it likes" $core/group.rs 'points.take_while(|i| *i > oldest).find(|i| *i <= state.cut.index)' 'points.take_while(|i| *i > oldest).find(|i| *i <= state.cut.index || *i > 0)'
mutate "times of a wrong clock enter the log" $core/node.rs 'self.skew_ms.unsigned_abs() > self.limits.clock_offset_ms_max' 'self.skew_ms.unsigned_abs() > self.limits.clock_offset_ms_max && false'
mutate "records are old by a clock that no majority confirms" $core/node.rs 'self.clock_confirmed = 2 * clocks::agreeing(&heard, within) > members' 'self.clock_confirmed = !self.is_skewed()'
mutate "a slow disk keeps leadership" $core/syncs.rs 'self.slow |= now_ms.saturating_sub(since) >= SLOW_FOR_MS;' 'self.slow |= false;'
mutate "publishers are not slowed for a replica that falls behind" $core/pace.rs 'self.share = (self.share + STEP).min(SHARE_MAX);' 'self.share = 0;'
mutate "a leader is known after its broker has gone" $core/sleep.rs 'self.forget_leaderships(|broker, _| gone.contains(&broker));' ''
mutate "messages of a group that is just being made are dropped" $core/node.rs 'self.early.push_back((from, Envelope { group: id, message }));' ''
mutate "a client changes an internal object" $core/meta/command.rs '    if names::is_internal(name) {
        return Err(MetaError::Invalid(' '    if name.is_empty() {
        return Err(MetaError::Invalid('
mutate "what is scheduled outlives its topic" $core/meta/command.rs '        self.remove_topic(&schedule);' ''
mutate "a schedule that was decided for a topic that is deleted is made" $core/meta/command.rs 'is_none_or(|t| change.name != names::scheduled(t.id))' 'is_none()'
mutate "what is scheduled keeps the durability its topic had first" $core/meta/command.rs '            self.follow_topic(&topic);' ''
mutate "a replica that cannot be read once is written off" $core/node.rs '        self.damaged.insert(stored.group, stored.replica);
        self.out.opened.push(stored.group);' '        self.damaged.insert(stored.group, stored.replica);
        self.ops.push(WriteOp::Quarantine { group: stored.group, replica: stored.replica });
        self.out.opened.push(stored.group);'
mutate "an only replica is replaced" $core/duties.rs '.filter(|_| assignment.replicas.len() > 1)?;' '.filter(|_| !assignment.replicas.is_empty())?;'
mutate "a replica goes before its successor is called" $core/node.rs '            _ if self.held_replica(id).is_some() => return,' '            _ if self.damaged.contains_key(&id) => return,
            _ if self.held_replica(id).is_some() => self.destroy(id),'
exit $survived
