#!/usr/bin/env bash
# Fuzzes each decoder, beginning with the kept corpus: RUNS_EACH inputs (50000), the same each time, or for SECONDS_EACH, other ones
# each time. What breaks one is left in broker/fuzz/found. TARGETS="batch manifest" for some of them; MERGE=1 adds what reaches
# new code to the corpus.
set -euo pipefail
cd "$(dirname "$0")/../.."
targets=${TARGETS:-batch record entry snapshot rows manifest spec}
host=$(rustc -vV | sed -n 's/^host: //p')
folder=$CARGO_TARGET_DIR/fuzz
if [ -n "${SECONDS_EACH:-}" ]; then bound="-max_total_time=$SECONDS_EACH"; else bound="-seed=1 -runs=${RUNS_EACH:-50000}"; fi
# what cargo-fuzz sets, without a sanitizer: Rust's own checks are what is asked here
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Ccodegen-units=1"
# quickly built rather than quick: most of it is not what is fuzzed
cargo build --locked -p weir-fuzz --features libfuzzer --bins --target "$host" --target-dir "$folder" \
  --config 'profile.dev.package."*".opt-level=1' --config 'profile.dev.opt-level=1'
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
mkdir -p broker/fuzz/found
for target in $targets; do
  mkdir "$fresh/$target"
  run=("$folder/$host/debug/$target" -max_len=16384 -rss_limit_mb=512 -timeout=10 -artifact_prefix="broker/fuzz/found/$target-")
  # shellcheck disable=SC2086 # two words
  "${run[@]}" $bound -print_final_stats=1 "$fresh/$target" "broker/fuzz/corpus/$target" 2> "$fresh/log" || {
    tail -40 "$fresh/log"
    echo "fuzz: $target failed on the input that is now in broker/fuzz/found; put it into broker/fuzz/corpus/$target, where every test run reads it"
    exit 1
  }
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$fresh/log")
  memory=$(sed -n 's/^stat::peak_rss_mb: *//p' "$fresh/log")
  echo "fuzz: $target: $runs inputs, at most $memory MiB, none broke it"
  if [ -n "${MERGE:-}" ]; then
    "${run[@]}" -merge=1 "broker/fuzz/corpus/$target" "$fresh/$target" 2> /dev/null
  fi
done
