# What CI and people both call. `make run` and `make test` install what they need; the second time they are quick.
SHELL := /bin/bash
export CARGO_TARGET_DIR ?= $(HOME)/.cache/weir/target
PACKAGES := clang libclang-dev cmake make g++ pkg-config
RUNS ?= 300

.PHONY: run test e2e sim generate check-generated fmt lint deps

run: deps
	cargo build --locked -p weir-cli
	./examples/run.sh

test: deps
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo test --locked --workspace --exclude weir-sim
	RUNS=$(RUNS) cargo test --locked -p weir-sim -- --nocapture

e2e:
	@echo "e2e on a real Kubernetes is not there yet (see README.md): 0 tests"

# SEED=n runs one schedule again, RUNS=n that many from 0
sim:
	cargo test --locked -p weir-sim -- --nocapture

# regenerates what is generated and committed
generate:
	WEIR_BLESS=1 cargo test --locked -p weir-proto --test generated
check-generated:
	cargo test --locked -p weir-proto --test generated

fmt:
	cargo fmt --all

lint:
	cargo clippy --locked --workspace --all-targets -- -D warnings

deps:
	@missing=""; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; \
	  else echo "please install these packages first:$$missing"; exit 1; fi; fi
