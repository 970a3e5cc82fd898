#!/usr/bin/env bash
# A Kubernetes of $NODES nodes (default 3, each in a zone of its own) on this machine, in network namespaces, without an engine:
# etcd and the control plane beside node 0; on each node containerd, kubelet and kube-proxy. CoreDNS serves names.
#   up.sh BIN HOME    BIN: what build.sh built; HOME: a folder of its own
# Prints "up" once all nodes are ready, stays in the foreground, and ends all it started when it is ended.
# In HOME: kubeconfig; ns (run a command in the cluster's network); images/*.tar (imported when a node starts); node-N/ with each
# node's sockets, logs and volumes; commands/: a file called stop-node-N, start-node-N, stop-api or start-api is carried out and removed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=$(realpath "${1:?folder of programs}"); mkdir -p "${2:?folder}"; home=$(realpath "$2"); nodes=${NODES:-3}
net=weir-e2e-$$; api=10.200.0.1; group=$net
mkdir -p "$home/certs"; cd "$home"
declare -A pid
in_net() { nsenter --net="/var/run/netns/$1" "${@:2}"; } # `ip netns exec` would hide the cgroups, which kubelet needs
net_of() { [ "$1" = 0 ] && echo "$net" || echo "$net-$1"; }

down() {
  trap '' INT TERM
  kill "${pid[@]}" 2>/dev/null || true
  for _ in $(seq 30); do kill -0 "${pid[@]}" 2>/dev/null || break; sleep 0.1; done
  kill -9 "${pid[@]}" 2>/dev/null || true
  for n in $(seq 0 $((nodes - 1))); do end_pods "$n"; done
  awk -v h="$home/" 'index($2, h) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount -l 2>/dev/null || true
  for n in $(seq 0 $((nodes - 1))); do ip netns del "$(net_of "$n")" 2>/dev/null || true; done
}
# pods outlive their runtime: what runs in the node's cgroups is ended, and the shims, and the pods' network namespaces
end_pods() {
  local nets; nets=$(grep -rhoE '/var/run/netns/cni-[0-9a-f-]+' "$home/node-$1/containerd/state" 2>/dev/null | sort -u || true)
  find "/sys/fs/cgroup/pids/$group-$1" -name cgroup.procs -exec cat {} + 2>/dev/null | xargs -r kill -9 2>/dev/null || true
  pgrep -f "containerd-shim-runc-v2 .*-address $home/node-$1/" | xargs -r kill -9 2>/dev/null || true
  xargs -r -n1 basename <<< "$nets" | xargs -r -n1 ip netns del 2>/dev/null || true
}
trap down EXIT
trap 'exit 0' INT TERM

run() { # NAME NETWORK COMMAND…
  nsenter --net="/var/run/netns/$2" "${@:3}" >> "$home/$1.log" 2>&1 & # not by a function: the id would be a shell's
  pid[$1]=$!
}

ip netns add "$net"
in_net "$net" sh -c "ip link set lo up; ip link add node0 type bridge; ip addr add $api/24 dev node0; ip link set node0 up
  ip route add default dev node0; sysctl -qw net.ipv4.ip_forward=1"
[ -f sa.key ] || { openssl genrsa -out sa.key 2048; openssl rsa -in sa.key -pubout -out sa.pub; } 2>/dev/null
echo 'e2e,admin,admin,"system:masters"' > tokens.csv
cat > kubeconfig <<Y
apiVersion: v1
kind: Config
clusters: [{name: e2e, cluster: {server: "https://$api:6443", insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: e2e}}]
contexts: [{name: e2e, context: {cluster: e2e, user: admin}}]
current-context: e2e
Y
printf '#!/bin/sh\nexec nsenter --net=/var/run/netns/%s "$@"\n' "$net" > ns; chmod +x ns

make_node() {
  local n=$1 dir=$home/node-$1 own; own=$(net_of "$1")
  mkdir -p "$dir"/{cni,kubelet,logs,volumes}
  if [ "$n" != 0 ]; then
    ip netns add "$own"
    ip link add "v$n" netns "$net" type veth peer name eth0 netns "$own"
    in_net "$net" sh -c "ip link set v$n master node0; ip link set v$n up"
    in_net "$own" sh -c "ip link set lo up; ip addr add 10.200.0.$((n + 1))/24 dev eth0; ip link set eth0 up
      ip route add default via $api; sysctl -qw net.ipv4.ip_forward=1"
  fi
  for other in $(seq 0 $((nodes - 1))); do
    [ "$other" = "$n" ] || in_net "$own" ip route add "10.244.$other.0/24" via "10.200.0.$((other + 1))"
  done
  cat > "$dir/cni/10-bridge.conflist" <<J
{"cniVersion": "0.4.0", "name": "e2e$n", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {"type": "host-local", "dataDir": "$dir/ipam",
   "ranges": [[{"subnet": "10.244.$n.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
J
  cat > "$dir/containerd.toml" <<T
version = 2
root = "$dir/containerd/root"
state = "$dir/containerd/state"
[grpc]
  address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "weir/pause:1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
T
  for controller in /sys/fs/cgroup/*/; do mkdir -p "$controller/$group-$n" 2>/dev/null || true; done
  for file in cpus mems; do
    cat "/sys/fs/cgroup/cpuset/cpuset.$file" > "/sys/fs/cgroup/cpuset/$group-$n/cpuset.$file" 2>/dev/null || true
  done
  cat > "$dir/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /$group-$n
clusterDNS: [$api]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://$dir/containerd.sock
enforceNodeAllocatable: []
evictionHard: {memory.available: "1Mi", nodefs.available: "0%", imagefs.available: "0%"}
failCgroupV1: false
failSwapOn: false
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 2s
podLogsDir: $dir/logs
resolvConf: ""
shutdownGracePeriod: 0s
syncFrequency: 10s
Y
}
start_node() {
  local n=$1 dir=$home/node-$1 own; own=$(net_of "$1")
  run "node-$n/containerd" "$own" containerd -c "$dir/containerd.toml"
  for _ in $(seq 100); do ctr -a "$dir/containerd.sock" version >/dev/null 2>&1 && break; sleep 0.1; done
  for archive in "$home"/images/*.tar; do
    [ -e "$archive" ] || continue
    ctr -a "$dir/containerd.sock" -n k8s.io images import "$archive" >> "$dir/import.log" 2>&1
  done
  run "node-$n/kubelet" "$own" "$bin/kubelet" --config "$dir/kubelet.yaml" --kubeconfig kubeconfig --root-dir "$dir/kubelet" \
    --hostname-override "node-$n" --node-ip "10.200.0.$((n + 1))" --node-labels "topology.kubernetes.io/zone=zone-$n"
  run "node-$n/proxy" "$own" "$bin/kube-proxy" --kubeconfig kubeconfig --hostname-override "node-$n" --proxy-mode iptables \
    --cluster-cidr 10.244.0.0/16 --conntrack-max-per-core 0
}
stop_node() { # as if its power went
  kill -9 "${pid[node-$1/containerd]}" "${pid[node-$1/kubelet]}" "${pid[node-$1/proxy]}" 2>/dev/null || true
  end_pods "$1"
}
start_api() {
  run apiserver "$net" "$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --service-account-key-file=sa.pub \
    --service-account-signing-key-file=sa.key --service-account-issuer=https://kubernetes.default.svc --token-auth-file=tokens.csv \
    --authorization-mode=Node,RBAC --bind-address=0.0.0.0 --advertise-address=$api --secure-port=6443 --cert-dir=certs \
    --service-cluster-ip-range=10.96.0.0/16 --allow-privileged=true --kubelet-preferred-address-types=InternalIP
}
ask() { in_net "$net" curl -sfk -H "Authorization: Bearer e2e" "https://$api:6443$1"; }
nodes_ready() { ask '/api/v1/nodes?pretty=true' | grep -c '"reason": "KubeletReady"' || true; }

mkdir -p images commands root-pause && cp "$bin/pause" root-pause/pause
[ -f images/pause.tar ] || "$here/../../image/archive.sh" root-pause weir/pause:1 images/pause.tar 65535:65535 /pause
run etcd "$net" etcd --data-dir etcd --unsafe-no-fsync=true --listen-client-urls http://127.0.0.1:2379 \
  --advertise-client-urls http://127.0.0.1:2379
start_api
for n in $(seq 0 $((nodes - 1))); do make_node "$n"; done
for _ in $(seq 240); do ask /readyz >/dev/null && break; sleep 0.25; done
run controller-manager "$net" "$bin/kube-controller-manager" --kubeconfig kubeconfig --service-account-private-key-file=sa.key \
  --use-service-account-credentials --root-ca-file=certs/apiserver.crt --leader-elect=false --node-monitor-grace-period=20s
run scheduler "$net" "$bin/kube-scheduler" --kubeconfig kubeconfig --leader-elect=false
cat > Corefile <<C
.:53 {
  bind $api
  errors
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $home/kubeconfig
    pods insecure
    ttl 1
  }
  cache 1
}
C
run coredns "$net" "$bin/coredns" -conf Corefile
for n in $(seq 0 $((nodes - 1))); do start_node "$n"; done
for _ in $(seq 240); do [ "$(nodes_ready)" = "$nodes" ] && break; sleep 0.25; done
[ "$(nodes_ready)" = "$nodes" ] || { echo "the nodes did not become ready; see $home/*.log" >&2; exit 1; }
echo up
while sleep 0.1; do
  for command in commands/*; do
    [ -e "$command" ] || continue
    case $(basename "$command") in
      stop-node-*) stop_node "${command##*-}" ;;
      start-node-*) start_node "${command##*-}" ;;
      stop-api) kill -9 "${pid[apiserver]}"; wait "${pid[apiserver]}" 2>/dev/null || true ;;
      start-api) start_api ;;
    esac
    rm -f "$command"
  done
done
