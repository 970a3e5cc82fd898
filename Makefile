# What CI and people both call. `make run` and `make test` install what they need; the second time they are quick.
SHELL := /bin/bash
export CARGO_TARGET_DIR ?= $(HOME)/.cache/weir/target
# RocksDB's C++ takes ten minutes: it is compiled once for each version, whatever else is built beside it
ROCKSDB_VERSION := $(shell sed -n '/^name = "librocksdb-sys"$$/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)
# with the processor's own CRC-32C: without it the checksums of what is written cost more than the writing
ROCKSDB_FLAGS_x86_64 := -C target-feature=+sse4.2,+pclmulqdq
ROCKSDB_FLAGS_aarch64 := -C target-feature=+crc,+aes
export ROCKSDB_LIB_DIR ?= $(HOME)/.cache/weir/rocksdb-$(ROCKSDB_VERSION)-crc
export ROCKSDB_STATIC ?= 1
PACKAGES := clang libclang-dev cmake make g++ pkg-config iproute2 iptables valgrind
PACKAGES_E2E := containerd runc containernetworking-plugins etcd-server conntrack iptables iproute2 prometheus openssl curl
RUNS ?= 1000
# one selection everywhere: cargo unites features over what is selected, and another set would compile much again
SELECTION := --workspace --all-targets

.PHONY: run test examples e2e image chart sim sim-nightly mutants fuzz soak memory away bench bench-share bench-peers generate check-generated fmt lint deps deps-e2e rocksdb

run: deps rocksdb
	cargo build --locked $(SELECTION)
	./examples/run.sh

# fails fast: format, lint, then units, simulation and processes
test: deps rocksdb
	cargo fmt --all --check
	cargo clippy --locked $(SELECTION) -- -D warnings
	RUNS=$(RUNS) cargo test --locked --workspace -- --nocapture
	cargo build --locked $(SELECTION)
	./examples/stories/run.sh

# the five stories people use a message queue for, each a program against brokers of its own
examples: deps rocksdb
	cargo build --locked $(SELECTION)
	./examples/stories/run.sh

# Weir on a real Kubernetes: the one of KUBECONFIG with the image WEIR_IMAGE, else one brought up here (needs root)
e2e: deps rocksdb $(if $(KUBECONFIG),,deps-e2e)
	cargo build --locked $(SELECTION)
	./e2e/run.sh

# the image as an OCI archive, weir.tar, without a container engine
image: deps rocksdb
	cargo build --locked $(SELECTION)
	./image/oci.sh weir:0.1.0 weir.tar
	@echo "weir.tar holds weir:0.1.0; load it with: kind load image-archive weir.tar, or: ctr -n k8s.io images import weir.tar"

# SEED=n runs one schedule again, RUNS=n that many from 0
sim:
	cargo test --locked --workspace --test seeds -- --nocapture

# ten thousand schedules, or as many as RUNS says
sim-nightly: deps rocksdb
	RUNS=$(if $(filter command environment,$(origin RUNS)),$(RUNS),10000) cargo test --locked --workspace --test seeds -- --nocapture

# breaks each promise in a scratch copy: the suite must go red
mutants:
	./broker/mutants.sh

# each decoder of bytes from elsewhere under libFuzzer, beginning with the kept corpus; SECONDS_EACH=n for longer
fuzz: deps rocksdb
	./broker/fuzz/run.sh

# load, faults and checks for MINUTES (2), with memory, open files and disk drawn into OUT (soak/)
soak: deps rocksdb
	cargo build --locked $(SELECTION)
	OUT=$(abspath $(or $(OUT),soak)) cargo test --locked --workspace --test soak -- --ignored --nocapture

# a broker's memory beside slow readers and batches that hold much, and another client's latency
memory: deps rocksdb
	cargo test --locked --workspace --test memory -- --nocapture

# a broker that was away for AWAY seconds (90) under full load: until it is in sync again, and disk sizes
away: deps rocksdb
	cargo build --locked $(SELECTION)
	AWAY=$(or $(AWAY),90) cargo test --locked --workspace --test away -- --ignored --nocapture

# how long the paths take that every message takes, and how often they ask for memory (criterion)
bench: deps rocksdb
	cargo bench --locked --workspace --profile dev --bench paths

# a shared subscription beside RabbitMQ (Debian's rabbitmq-server, a JVM and Maven for its PerfTest)
bench-share: deps rocksdb
	cargo build --locked $(SELECTION)
	./bench/share.sh

# Weir beside Kafka, NATS, RabbitMQ, RocketMQ and ActiveMQ, in turns, ROUNDS times (5), then what Weir's work costs, into
# docs/benchmarks.md; SCALE=0.2 for a fifth of the records (installs a JDK, Maven and rabbitmq-server; Go 1.21 or newer must be there)
bench-peers: PACKAGES += default-jdk-headless maven rabbitmq-server
bench-peers: deps rocksdb
	cargo build --locked $(SELECTION)
	$(CARGO_TARGET_DIR)/debug/weir-bench-peers --weir $(CARGO_TARGET_DIR)/debug/weir --cache $(HOME)/.cache/weir/peers --out docs --costs --rounds $(or $(ROUNDS),5) --scale $(or $(SCALE),1)

# regenerates what is generated and committed, and counts anew what the paths take
generate:
	WEIR_BLESS=1 cargo test --locked --workspace --test generated --test instructions
check-generated:
	cargo test --locked --workspace --test generated

# records how the chart renders; needs Helm, of the system or as `make e2e` builds it
chart:
	WEIR_BLESS=1 HELM=$$(command -v helm || echo $(HOME)/.cache/weir/e2e/helm) cargo test --locked --workspace --test chart -- --ignored

fmt:
	cargo fmt --all

lint:
	cargo clippy --locked $(SELECTION) -- -D warnings

deps-e2e: PACKAGES := $(PACKAGES_E2E)
deps deps-e2e:
	@missing=""; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; \
	  else echo "please install these packages first:$$missing"; exit 1; fi; fi

rocksdb: $(ROCKSDB_LIB_DIR)/librocksdb.a

$(ROCKSDB_LIB_DIR)/librocksdb.a: | deps
	@echo "compiling RocksDB, once: about ten minutes on two cores"
	ROCKSDB_COMPILE=1 RUSTFLAGS="$(ROCKSDB_FLAGS_$(shell uname -m))" cargo build --locked -p librocksdb-sys --target-dir $(HOME)/.cache/weir/rocksdb-build
	@mkdir -p $(ROCKSDB_LIB_DIR)
	@cp "$$(ls -t $(HOME)/.cache/weir/rocksdb-build/debug/build/librocksdb-sys-*/out/librocksdb.a | head -1)" $@.tmp && mv $@.tmp $@
	@rm -rf $(HOME)/.cache/weir/rocksdb-build
