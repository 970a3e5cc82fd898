#!/usr/bin/env bash
# What `make run` shows: an embedded broker fed by this folder, messages going in and out, then it keeps serving.
set -euo pipefail
cd "$(dirname "$0")/.."
weir="${CARGO_TARGET_DIR:-target}/debug/weir"
data=${WEIR_DATA:-$(mktemp -d)/weir}
export WEIR_LOG=${WEIR_LOG:-warn}
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "weir serve --manifests examples --data $data"
"$weir" serve --manifests examples --data "$data" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true' EXIT
for _ in $(seq 100); do
  kill -0 $server 2>/dev/null || exit 1
  "$weir" topic list 2>/dev/null | grep -q default/orders && break
  sleep 0.1
done
for _ in $(seq 100); do "$weir" subscription list | grep -q default/stock && break; sleep 0.1; done

say "weir topic list"
"$weir" topic list
say "publishing three orders of two customers (weir publish orders --key NAME)"
printf '%s\n' "2 x coffee" "1 x tea" | "$weir" publish orders --key alice
echo "3 x cake" | "$weir" publish orders --key bob
say "weir consume --topic orders --from earliest --max 3"
"$weir" consume --topic orders --from earliest --max 3
say "weir consume --subscription mail --max 3 (acknowledges them; the subscription 'stock' still has its own)"
"$weir" consume --subscription mail --max 3
say "It keeps serving until you press Ctrl-C. In another terminal, try:"
cat <<T
  $weir consume --topic orders
  grpcurl -plaintext 127.0.0.1:7420 list
  grpcurl -plaintext -d '{"topic":"orders","messages":[{"key":"YW5u","value":"aGVsbG8="}]}' 127.0.0.1:7420 weir.v1.Publisher/Publish
  curl http://127.0.0.1:9464/metrics
T
wait $server
