#!/usr/bin/env bash
# Fuzzes each decoder for SECONDS (10) beginning with the kept corpus; what it finds is left in broker/fuzz/found.
# TARGETS="batch manifest" for some of them. MERGE=1 adds what reaches new code to the corpus.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${SECONDS_EACH:-10}
targets=${TARGETS:-batch entry snapshot rows manifest}
host=$(rustc -vV | sed -n 's/^host: //p')
folder=$CARGO_TARGET_DIR/fuzz
# what cargo-fuzz sets, without a sanitizer: Rust's own checks are what is asked here
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Ccodegen-units=1"
cargo build --locked -p weir-fuzz --features libfuzzer --bins --target "$host" --target-dir "$folder"
mkdir -p broker/fuzz/found
for target in $targets; do
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  run=("$folder/$host/debug/$target" -max_len=16384 -rss_limit_mb=512 -timeout=10 -artifact_prefix="broker/fuzz/found/$target-")
  "${run[@]}" -max_total_time="$seconds" -print_final_stats=1 "$fresh" "broker/fuzz/corpus/$target" 2> "$fresh.log" || {
    tail -40 "$fresh.log"
    echo "fuzz: $target failed; the input is in broker/fuzz/found: TARGETS=$target make fuzz runs it again once it is in the corpus"
    exit 1
  }
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$fresh.log")
  memory=$(sed -n 's/^stat::peak_rss_mb: *//p' "$fresh.log")
  echo "fuzz: $target: $runs inputs in $seconds s, at most $memory MiB, none broke it"
  if [ -n "${MERGE:-}" ]; then
    "${run[@]}" -merge=1 "broker/fuzz/corpus/$target" "$fresh" 2> /dev/null
  fi
  rm -rf "$fresh" "$fresh.log"
done
