#!/usr/bin/env bash
# Runs the five stories, each to its end, against brokers of this script's own. `make examples` calls it; arguments choose stories.
set -euo pipefail
cd "$(dirname "$0")"
bin=${CARGO_TARGET_DIR:-../../target}/debug
data=$(mktemp -d) brokers=${BROKERS:-3}
WEIR_LOG=${WEIR_LOG:-warn} "$bin/weir" serve --brokers "$brokers" --listen 127.0.0.1:0 --manifests manifests --data "$data" -o json > "$data/said" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$data"' EXIT
for _ in $(seq 300); do [ -s "$data/said" ] && break; kill -0 $server || exit 1; sleep 0.1; done
WEIR_SERVER=$(grep -o '"client":"[^"]*"' "$data/said" | cut -d'"' -f4 | paste -sd,)
export WEIR_SERVER
for _ in $(seq 300); do [ "$("$bin/weir" subscription list | grep -c default/)" -ge 7 ] && break; sleep 0.1; done
for story in ${*:-decoupling peak_shaving distribution completion registration}; do
  printf '\n\033[1m%s\033[0m\n' "$story"
  "$bin/$story" || { echo "$story failed"; exit 1; }
done
printf '\nall stories ended well\n'
