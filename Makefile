# The developer's door. `make demo` and `make test` need only Rust and root on Debian 12: they install the rest.

.PHONY: help setup build demo test soak bench check clean

help:
	@echo 'make demo    convert a real image, run it lazily on nodes alone, in pairs and in a swarm, print what came from where'
	@echo 'make test    all tests (installs what they need)'
	@echo 'make soak    the long tests: large images, fuzzing, an hour of faults; a summary at the end (three hours)'
	@echo 'make bench   what a user waits for and pays, beside plain containerd, as ratios (ten minutes)'
	@echo 'make check   the quick look before a push: format, lints, documents'
	@echo 'make build   release binaries in target/release'

setup:
	@tests/setup.sh

build: setup
	cargo build --release --workspace --bins

demo: build
	$(or $(CARGO_TARGET_DIR),target)/release/shoal-demo

# Binaries first: the whole-system tests start them from the folder in which they themselves lie.
test: setup
	cargo fmt --all -- --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo build --workspace --bins --locked
	cargo test --workspace --locked

# Times and steps can be changed: see the top of the script.
soak: setup
	tests/soak.sh

bench: build
	$(or $(CARGO_TARGET_DIR),target)/release/shoal-bench

check:
	cargo fmt --all -- --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test --workspace --doc
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo 'cargo-deny is not installed: skipped'; fi
	@if command -v typos >/dev/null; then typos; else echo 'typos is not installed: skipped'; fi
	@if command -v cargo-machete >/dev/null; then cargo machete; else echo 'cargo-machete is not installed: skipped'; fi

clean:
	cargo clean
