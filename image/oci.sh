#!/usr/bin/env bash
# Makes the image as an OCI archive without a container engine: programs from $BIN (default the target folder), and the few
# libraries they need from Debian's packages. The Dockerfile makes the same for those who have an engine.
#   image/oci.sh NAME:TAG OUT.tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
reference=${1:?NAME:TAG} out=${2:?OUT.tar}
bin=${BIN:-${CARGO_TARGET_DIR:-$HOME/.cache/weir/target}/debug}
libraries=${WEIR_CACHE:-$HOME/.cache/weir}/image-libraries
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
if [ ! -d "$libraries" ]; then
  mkdir -p "$work/debs" "$work/libraries"
  (cd "$work/debs" && apt-get download -q libc6 libgcc-s1 libstdc++6 >/dev/null)
  for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/libraries"; done
  rm -rf "$work"/libraries/usr/share "$work"/libraries/usr/lib/*/gconv
  mv "$work/libraries" "$libraries"
fi
root=$work/root
mkdir -p "$root"/{usr/local/bin,etc,tmp,data} && cp -a "$libraries"/. "$root"/
# authorities' certificates, for pushes over https
if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
  mkdir -p "$root/etc/ssl/certs" && cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
fi
# group 0 may write: where the platform chooses the user, that is its group
chmod 1777 "$root/tmp"; chmod 775 "$root/data"; chown 65532:0 "$root/data" 2>/dev/null || true
for program in weir weir-broker weir-operator; do
  strip -o "$root/usr/local/bin/$program" "$bin/$program"
done
echo 'weir:x:65532:65532::/data:/sbin/nologin' > "$root/etc/passwd"
echo 'weir:x:65532:' > "$root/etc/group"
"$here/archive.sh" "$root" "$reference" "$out" 65532:65532 /usr/local/bin/weir
