# What CI and people both call. `make run` and `make test` install what they need; the second time they are quick.
SHELL := /bin/bash
export CARGO_TARGET_DIR ?= $(HOME)/.cache/weir/target
# RocksDB's C++ takes ten minutes: it is compiled once for each version, whatever else is built beside it
ROCKSDB_VERSION := $(shell sed -n '/^name = "librocksdb-sys"$$/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)
export ROCKSDB_LIB_DIR ?= $(HOME)/.cache/weir/rocksdb-$(ROCKSDB_VERSION)
export ROCKSDB_STATIC ?= 1
PACKAGES := clang libclang-dev cmake make g++ pkg-config
RUNS ?= 300
# one selection everywhere: cargo unites features over what is selected, and another set would compile much again
SELECTION := --workspace --all-targets

.PHONY: run test e2e sim generate check-generated fmt lint deps rocksdb

run: deps rocksdb
	cargo build --locked $(SELECTION)
	./examples/run.sh

# fails fast: format, lint, then units, simulation and processes
test: deps rocksdb
	cargo fmt --all --check
	cargo clippy --locked $(SELECTION) -- -D warnings
	RUNS=$(RUNS) cargo test --locked --workspace -- --nocapture

e2e:
	@echo "e2e on a real Kubernetes is not there yet (see README.md): 0 tests"

# SEED=n runs one schedule again, RUNS=n that many from 0
sim:
	cargo test --locked --workspace --test seeds -- --nocapture

# regenerates what is generated and committed
generate:
	WEIR_BLESS=1 cargo test --locked --workspace --test generated
check-generated:
	cargo test --locked --workspace --test generated

fmt:
	cargo fmt --all

lint:
	cargo clippy --locked $(SELECTION) -- -D warnings

deps:
	@missing=""; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; \
	  else echo "please install these packages first:$$missing"; exit 1; fi; fi

rocksdb: $(ROCKSDB_LIB_DIR)/librocksdb.a

$(ROCKSDB_LIB_DIR)/librocksdb.a: | deps
	@echo "compiling RocksDB, once: about ten minutes on two cores"
	ROCKSDB_COMPILE=1 cargo build --locked -p librocksdb-sys --target-dir $(HOME)/.cache/weir/rocksdb-build
	@mkdir -p $(ROCKSDB_LIB_DIR)
	@cp "$$(ls -t $(HOME)/.cache/weir/rocksdb-build/debug/build/librocksdb-sys-*/out/librocksdb.a | head -1)" $@.tmp && mv $@.tmp $@
	@rm -rf $(HOME)/.cache/weir/rocksdb-build
