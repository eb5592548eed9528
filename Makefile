# Two commands matter to a newcomer: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ORACLES := qemu-utils qemu-system-common qemu-system-x86 libnbd-bin python3-libnbd fio
# $(call pytest,FOLDERS,MARKS): tests beside each other, then those that bear nothing beside them; both in any case.
pytest = $(BIN)/pytest -q -n auto --dist loadgroup $(1) -m "not serial$(2)"; beside=$$?; \
	$(BIN)/pytest -q $(1) -m "serial$(2)"; alone=$$?; [ $$alone = 5 ] || [ $$alone = 0 ] && exit $$beside || exit $$alone
# As root in a container pip would warn about nothing useful.
export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check unit conformance crash fuzz sim kill docs bench oracles venv clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: venv mke2fs  ## back up a real disk that it makes itself, under the eyes of a QMP client (a minute, with set-up)
	$(BIN)/python -m blockjobs.cli.demo

test: venv oracles check  ## everything: lint, types, and all tests with the real QEMU tools as oracles
	@$(call pytest,tests)

check: venv  ## lint, format and types only
	$(BIN)/ruff check src tests bench docs
	$(BIN)/ruff format --check src tests bench docs
	$(BIN)/mypy --strict src

unit: venv  ## the tests that need no other program
	@$(call pytest,tests/unit tests/property, and not qemu)

conformance: venv oracles  ## every recorded transcript, against the installed qemu-storage-daemon too
	@export BLOCKJOBS_ALL_LIVE=1; $(call pytest,tests/conformance)

SECONDS ?= 600
crash: venv oracles  ## crash replay: ten times the seeds, then random longer runs for SECONDS=600
	BLOCKJOBS_CRASH_SEEDS=10 $(BIN)/pytest -q tests/crash --timeout 3600
	BLOCKJOBS_CRASH_SECONDS=$(SECONDS) $(BIN)/pytest -q -s tests/crash/test_replay_exhaustive.py


fuzz: venv  ## spoiled images, always new ones (SECONDS=60)
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

SEED ?=
sim: venv  ## live disks in simulated time, seed after seed until one fails (SEED=7 plays one again)
	@if [ -n "$(SEED)" ]; then BLOCKJOBS_SIM_FIRST=$(SEED) BLOCKJOBS_SIM_SEEDS=1 $(BIN)/pytest -q tests/sim; exit; fi; \
	first=0; while BLOCKJOBS_SIM_FIRST=$$first BLOCKJOBS_SIM_SEEDS=1000 $(BIN)/pytest -q tests/sim --maxfail 1; do \
	    first=$$((first + 1000)); done; exit 1

kill: venv oracles  ## kill -9 under a writing guest, in the middle of every type of job, fifty times each
	BLOCKJOBS_KILL_SEEDS=50 $(BIN)/pytest -q tests/e2e/test_kill_live.py

docs: venv  ## the reference pages and the picture, made anew from the code
	$(BIN)/python docs/generate.py

bench: venv oracles  ## every comparison with the QEMU tools in ten minutes: one table, one picture (BENCH=--quick, --thorough)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python bench/everything.py $(BENCH)

# Debian's tools are oracles for the tests; without them (and without root) those tests are skipped by name.
oracles:
	@missing=""; for each in qemu-img qemu-storage-daemon qemu-system-x86_64 nbdinfo fio; do \
	    command -v $$each >/dev/null || missing=1; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(ORACLES) >/dev/null; \
	fi

.PHONY: mke2fs
mke2fs:
	@PATH="$$PATH:/sbin:/usr/sbin"; command -v mke2fs >/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends e2fsprogs >/dev/null; \
	fi; }

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blockjobs needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; \
	else echo "Python's venv module is missing: install python3-venv"; exit 1; fi; }
	@echo "setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -e '.[test,demo]'
	@touch $@

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis
