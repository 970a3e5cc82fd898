#!/usr/bin/env bash
# A backlog of messages of 100 bytes worked off by 100 members, each message acknowledged by itself: one broker of Weir, then one
# RabbitMQ with a quorum queue (Debian's package, driven by its own PerfTest), in turns, RUNS times. Prints the medians.
set -euo pipefail
cd "$(dirname "$0")/.."
RUNS=${RUNS:-3} RECORDS=${RECORDS:-1000000} MEMBERS=${MEMBERS:-100}
bin=${CARGO_TARGET_DIR:-$HOME/.cache/weir/target}/debug
perf=$HOME/.cache/weir/perf-test
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait 2>/dev/null || true; [ -n "${KEEP:-}" ] || rm -rf "$work"' EXIT
free_port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
median() { sort -n "$1" | awk '{v[NR]=$1} END {print v[int((NR+1)/2)], "(" v[1] " to " v[NR] ")"}'; }

if [ ! -d "$perf" ]; then
  echo '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion><groupId>weir</groupId><artifactId>bench</artifactId><version>1</version><packaging>pom</packaging><dependencies><dependency><groupId>com.rabbitmq</groupId><artifactId>perf-test</artifactId><version>2.22.1</version></dependency></dependencies></project>' > "$work/pom.xml"
  mvn -q -f "$work/pom.xml" dependency:copy-dependencies -DoutputDirectory="$perf"
fi

weir_run() {
  local data="$work/weir-$1" port; port=$(free_port); mkdir -p "$data/manifests"
  printf 'apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {name: work}\nspec: {partitions: 4, replicas: 1}\n---\napiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {name: work}\nspec: {topic: work, mode: shared, start: earliest, maxInFlight: 100000}\n' > "$data/manifests/work.yaml"
  "$bin/weir" serve --data "$data/data" --manifests "$data/manifests" --listen "127.0.0.1:$port" --metrics-listen "127.0.0.1:$(free_port)" > "$data/log" 2>&1 &
  local broker=$!
  until "$bin/weir" --server "127.0.0.1:$port" topic describe work > /dev/null 2>&1; do sleep 0.2; done
  "$bin/weir" --server "127.0.0.1:$port" bench produce --topic work --records "$RECORDS" --size 100 > /dev/null 2>&1
  "$bin/weir" --server "127.0.0.1:$port" -o json bench share --subscription work --members "$MEMBERS" --records "$RECORDS" 2> /dev/null |
    python3 -c 'import json,sys; d=json.load(sys.stdin); print(int(d["records_per_second"]))' >> "$work/weir"
  kill $broker; wait $broker 2>/dev/null || true
}

rabbit_run() {
  local data="$work/rabbit-$1" port; port=$(free_port); mkdir -p "$data"
  export RABBITMQ_NODENAME="weir-bench-$$@localhost" RABBITMQ_MNESIA_BASE="$data/db" RABBITMQ_LOG_BASE="$data/log" RABBITMQ_NODE_PORT=$port
  export RABBITMQ_DIST_PORT=$(free_port) ERL_EPMD_PORT=$epmd RABBITMQ_PID_FILE="$data/pid" RABBITMQ_ENABLED_PLUGINS_FILE="$data/plugins" HOME="$data"
  echo '[].' > "$data/plugins"
  /usr/lib/rabbitmq/bin/rabbitmq-server > "$data/out" 2>&1 &
  local broker=$!
  until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do sleep 0.3; done
  local test=(java -cp "$perf/*" com.rabbitmq.perf.PerfTest -h "amqp://guest:guest@127.0.0.1:$port" --quorum-queue -u work -s 100)
  # filled with confirms, eight publishers; then worked off, one ack a message, 200 messages ahead as with Weir
  "${test[@]}" -x 8 -y 0 -c 500 -C $((RECORDS / 8)) > "$data/fill" 2>&1
  "${test[@]}" -x 0 -y "$MEMBERS" -q 200 -A 1 -z 120 -i 1 > "$data/drain" 2>&1 &
  local members=$!
  # no member knows when all is done: the rate is that up to nine tenths of the backlog
  local rate=""
  for _ in $(seq 120); do
    sleep 1
    rate=$(sed -n 's/.*time \([0-9.]*\) s.*received: \([0-9]*\) msg.*/\1 \2/p' "$data/drain" |
      awk -v all="$RECORDS" '{sum += $2 * ($1 - t); t = $1; if (!done && sum >= 0.9 * all) {done = 1; print int(sum / t)}}')
    [ -z "$rate" ] || break
  done
  kill $members 2> /dev/null || true
  wait $members 2> /dev/null || true
  echo "${rate:-0}" >> "$work/rabbit"
  if [ -n "${VERBOSE:-}" ]; then tail -3 "$data/fill"; cat "$data/drain"; fi
  kill $broker; wait $broker 2>/dev/null || true
}

epmd=$(free_port)
for run in $(seq "$RUNS"); do
  weir_run "$run"
  (rabbit_run "$run")
  echo "run $run: Weir $(tail -1 "$work/weir")/s, RabbitMQ $(tail -1 "$work/rabbit")/s"
done
echo "medians: Weir $(median "$work/weir") messages/s, RabbitMQ $(median "$work/rabbit") messages/s"
