# Everything a person or CI runs. Each target makes its own .venv; only Python 3.11 or newer is needed
# (the package itself takes 3.10; the pinned versions of constraints.txt do not).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FILE ?=
GALLERY := $(basename $(notdir $(wildcard gallery/models/[a-z]*.py)))

PAIRS ?=
ARGS ?=

.PHONY: help demo test matrix dist lint types pytest architecture docs soak overhead growth ray-cluster bench correctness gallery clean

help:  ## these targets
	@sed -n 's/^\([a-z-]*\):.*## */\1\t/p' Makefile | expand -t 14

demo: $(VENV)/.plain  ## five Conv1d layers and an audio encoder, tapped (FILE=speech.wav for your own sound)
	$(BIN)/convtap demo $(FILE)

test: lint types pytest  ## everything CI runs: lint, types and pytest

matrix: .venv-matrix/.tools/bin/uv  ## every Python here and several torches, written to docs/versions.md (PAIRS=python3.14-torch2.13.0)
	.venv-matrix/.tools/bin/python -m matrix $(PAIRS) $(ARGS)

.venv-matrix/.tools/bin/uv: constraints.txt
	$(PYTHON) -m venv .venv-matrix/.tools
	.venv-matrix/.tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	touch $@

dist: .venv-dist/.ready  ## the sdist and the wheel, checked, and the wheel run in an empty environment
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python -m tests.dist -c $(CURDIR)/constraints.txt torch

.venv-dist/.ready: constraints.txt
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	touch $@

lint: $(VENV)/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## mypy --strict
	$(BIN)/mypy

pytest: $(VENV)/.test  ## the tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

architecture: $(VENV)/.test  ## writes the picture and the lists of docs/architecture.md anew
	$(BIN)/python -m docs.make_architecture

docs: $(VENV)/.docs  ## the documentation as a site, in site/; a broken link or an undocumented public name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

soak: $(VENV)/.test  ## ten times as many random networks
	CONVTAP_SOAK=20000 $(BIN)/python -m pytest tests/test_properties.py

overhead: $(VENV)/.test  ## what a capture costs on this machine, written to benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.overhead

growth: $(VENV)/.test  ## how costs grow with layers, calls and stack depth, written to benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.growth

ray-cluster: $(VENV)/.test  ## the Ray example on two nodes of this machine, one of them killed, written to benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.ray_cluster

bench: .venv-bench/.ready  ## what this library and others cost, written to benchmarks/RESULTS.md and benchmarks/peers.png
	.venv-bench/bin/python -m benchmarks.peers
	.venv-bench/bin/python -m benchmarks.growth_store

correctness: .venv-bench/.ready  ## which cases this library and others get right, written to benchmarks/CORRECTNESS.md
	.venv-bench/bin/python -m benchmarks.correctness

.venv-bench/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

# a package that does not install is a row of the page, so make goes on without it
gallery: $(VENV)/.plain  ## models with their trained weights, each in an environment of its own, written to docs/gallery.md
	-$(MAKE) --keep-going $(GALLERY:%=.venv-gallery-%/.ready)
	$(BIN)/python -m gallery.run

# torchaudio's compiled part is built for one torch, and raises an error over another; its Python part works without it
.venv-gallery-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gallery-$*
	.venv-gallery-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-gallery-$*/bin/python -m pip install --disable-pip-version-check -c constraints.txt \
		$(subst _,-,$*) -e . > .venv-gallery-$*/install.log 2>&1
	rm -f .venv-gallery-$*/lib/python*/site-packages/torchaudio/lib/*.so
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: asked for by another package it would come as the newest, with CUDA
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	touch $@

$(VENV)/.plain: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[plot]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.plain

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[docs]'
	touch $@

clean:  ## removes what these targets made beside the sources
	rm -rf site $(VENV) dist .venv-dist .venv-matrix .venv-bench .venv-gallery-* .mypy_cache .ruff_cache .pytest_cache
