#!/usr/bin/env bash
# Builds what the end-to-end cluster runs into $1 (a cache outside the clone), unless it is there: Kubernetes (4 minutes),
# Helm 3 and 4, CoreDNS, and a "pause" for pods. Versions are in the file names, so that a changed version is built anew.
set -euo pipefail
out=${1:?folder}; here=$(cd "$(dirname "$0")" && pwd)
kubernetes=v1.34.4 helm=v3.19.0 helm4=v4.3.2 coredns=v1.14.7
command -v go >/dev/null || { echo "building Kubernetes needs Go 1.24 or newer; or set KUBECONFIG and WEIR_IMAGE"; exit 1; }
mkdir -p "$out"
build() { # NAME-VERSION COMMAND…: the command writes to $target
  target=$out/$1
  if [ ! -x "$target" ]; then
    echo "building $1"
    local begun=$SECONDS
    "${@:2}"
    echo "built $1 in $((SECONDS - begun)) s"
  fi
  ln -sfn "$1" "$out/${1%-v*}"
}
kubernetes() {
  local stamp=k8s.io/component-base/version minor=${kubernetes#v1.}
  (cd "$here" && CGO_ENABLED=0 go build -trimpath -o "$target.tmp" -ldflags "-s -w \
    -X $stamp.gitVersion=$kubernetes -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*}" .) && mv "$target.tmp" "$target"
}
install() { # MODULE: its program is named as the last part of the path
  local bin; bin=$(mktemp -d)
  CGO_ENABLED=0 GOBIN=$bin go install -trimpath -ldflags "-s -w" "$1" && mv "$bin"/* "$target"
  rmdir "$bin"
}
pause() { printf 'int pause(void); int main(void) { for (;;) pause(); }' | cc -static -O2 -x c -o "$target" -; }
build kubernetes-$kubernetes kubernetes
build helm-$helm install helm.sh/helm/v3/cmd/helm@$helm
build helm4-$helm4 install helm.sh/helm/v4/cmd/helm@$helm4
build coredns-$coredns install github.com/coredns/coredns@$coredns
build pause-v1 pause
for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy; do ln -sfn kubernetes "$out/$name"; done
