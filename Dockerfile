# The image with all three programs: weir, weir-broker, weir-operator. `image/oci.sh` makes the same without an engine.
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends clang libclang-dev cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/target \
    case $(uname -m) in x86_64) export RUSTFLAGS="-C target-feature=+sse4.2,+pclmulqdq" ;; aarch64) export RUSTFLAGS="-C target-feature=+crc,+aes" ;; esac && \
    ROCKSDB_COMPILE=1 CARGO_TARGET_DIR=/target cargo build --release --locked --workspace --bins && \
    mkdir -p /out/data && cp /target/release/weir /target/release/weir-broker /target/release/weir-operator /out/

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /out/weir /out/weir-broker /out/weir-operator /usr/local/bin/
COPY --from=build --chown=65532:0 --chmod=775 /out/data /data
USER 65532:65532
WORKDIR /data
ENTRYPOINT ["/usr/local/bin/weir"]
