#!/usr/bin/env bash
# Packs a root file system as an OCI archive of one layer (https://github.com/opencontainers/image-spec), no engine needed.
#   image/archive.sh ROOT NAME:TAG OUT.tar USER ENTRYPOINT
set -euo pipefail
root=${1:?ROOT} reference=${2:?NAME:TAG} out=${3:?OUT.tar} user=${4:?USER} entrypoint=${5:?ENTRYPOINT}
case $reference in */*) ;; *) reference=library/$reference ;; esac
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
layout=$work/layout; mkdir -p "$layout/blobs/sha256"
blob() { # FILE TYPE: moves a file into the layout, prints its descriptor
  local sum size; sum=$(sha256sum "$1" | cut -d' ' -f1) size=$(stat -c %s "$1")
  mv "$1" "$layout/blobs/sha256/$sum"
  printf '{"mediaType":"%s","digest":"sha256:%s","size":%s' "$2" "$sum" "$size"
}
tar --sort=name --mtime=@0 --numeric-owner -C "$root" -cf "$work/layer.tar" .
diff=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
layer=$(blob "$work/layer.tar" application/vnd.oci.image.layer.v1.tar)}
printf '{"architecture":"%s","os":"linux","config":{"User":"%s","Env":["PATH=/usr/local/bin"],"Entrypoint":["%s"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
  "$(dpkg --print-architecture)" "$user" "$entrypoint" "$diff" > "$work/config"
config=$(blob "$work/config" application/vnd.oci.image.config.v1+json)}
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' "$config" "$layer" > "$work/manifest"
manifest=$(blob "$work/manifest" application/vnd.oci.image.manifest.v1+json)
names="\"org.opencontainers.image.ref.name\":\"${reference##*:}\",\"io.containerd.image.name\":\"docker.io/$reference\""
printf '{"schemaVersion":2,"manifests":[%s,"annotations":{%s}}]}' "$manifest" "$names" > "$layout/index.json"
printf '{"imageLayoutVersion":"1.0.0"}' > "$layout/oci-layout"
tar -C "$layout" -cf "$out.tmp" . && mv "$out.tmp" "$out"
