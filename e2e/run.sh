#!/usr/bin/env bash
# Runs the end-to-end tests: on the cluster of $KUBECONFIG with the image $WEIR_IMAGE (which must be there already), else on one that is
# brought up here and taken down again. Everything was built before (see the Makefile).
set -euo pipefail
export RUST_LIB_BACKTRACE=0 # errors say what was expected; where they were made helps nobody
root=$(cd "$(dirname "$0")/.." && pwd) begun=$SECONDS
tests=(cargo test --offline --locked --workspace --test chart --test dashboards --test kubernetes -- --ignored --nocapture --test-threads=1)
if [ -n "${KUBECONFIG:-}" ]; then
  : "${WEIR_IMAGE:?set it to the image to test, NAME:TAG, as your nodes know it}"
  for tool in helm prometheus promtool; do
    command -v "$tool" >/dev/null || { echo "please install $tool first (Debian: prometheus; Helm: https://helm.sh)"; exit 1; }
  done
  "${tests[@]}"
else
  [ "$(id -u)" = 0 ] || { echo "bringing up a Kubernetes needs root; or set KUBECONFIG and WEIR_IMAGE"; exit 1; }
  cache=${WEIR_CACHE:-$HOME/.cache/weir}/e2e
  "$root/e2e/cluster/build.sh" "$cache"
  WEIR_E2E_BIN=$cache cargo test --offline --locked --workspace --test schema -- --ignored --nocapture
  home=$(mktemp -d); mkdir "$home/images"
  "$root/e2e/dashboards.sh" "$cache"
  "$root/image/oci.sh" weir:e2e "$home/images/weir.tar"
  "$root/image/oci.sh" weir:next "$home/images/next.tar" # the same under another name, to roll to
  "$root/e2e/cluster/up.sh" "$cache" "$home" > "$home/up.log" 2>&1 &
  up=$!
  trap 'code=$?; kill $up 2>/dev/null; wait $up 2>/dev/null; [ $code = 0 ] && rm -rf "$home" || echo "logs: $home"; exit $code' EXIT
  for _ in $(seq 600); do grep -q '^up$' "$home/up.log" && break; kill -0 $up 2>/dev/null || break; sleep 0.2; done
  grep -q '^up$' "$home/up.log" || { cat "$home/up.log"; exit 1; }
  echo "Kubernetes is up after $((SECONDS - begun)) s"
  KUBECONFIG=$home/kubeconfig WEIR_E2E_HOME=$home WEIR_IMAGE=weir:e2e WEIR_IMAGE_NEXT=weir:next HELM=$cache/helm HELM4=$cache/helm4 "$home/ns" "${tests[@]}"
fi
echo "end-to-end tests: $((SECONDS - begun)) s"
