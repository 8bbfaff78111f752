# Everything a person or CI runs. Each target makes its own .venv; only Python 3.11 or newer is needed
# (the package itself takes 3.10; the pinned versions of constraints.txt do not).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FILE ?=
GALLERY := $(basename $(notdir $(wildcard gallery/models/[a-z]*.py)))
TORCH ?= 2.6.0

.PHONY: help demo test test-torch lint types pytest architecture docs soak overhead bench correctness gallery clean

help:  ## these targets
	@sed -n 's/^\([a-z-]*\):.*## */\1\t/p' Makefile | expand -t 14

demo: $(VENV)/.plain  ## five Conv1d layers and an audio encoder, tapped (FILE=speech.wav for your own sound)
	$(BIN)/convtap demo $(FILE)

test: lint types pytest  ## everything CI runs: lint, types and pytest

test-torch: .venv-torch-$(TORCH)/.ready  ## what needs no large packages, on another torch (TORCH=2.6.0, the oldest)
	.venv-torch-$(TORCH)/bin/python -m pytest --core -rs

# constraints.txt holds for all but torch and what torch itself pins
.venv-torch-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch-$*
	grep -vE '^(torch|torchvision|sympy)==' constraints.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-torch-$*/constraints.txt torch==$* -e '.[test-core]'
	touch $@

lint: $(VENV)/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## mypy --strict
	$(BIN)/mypy

pytest: $(VENV)/.test  ## the tests
	$(BIN)/python -m pytest

architecture: $(VENV)/.test  ## writes the picture and the lists of docs/architecture.md anew
	$(BIN)/python -m docs.make_architecture

docs: $(VENV)/.docs  ## the documentation as a site, in site/; a broken link or an undocumented public name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

soak: $(VENV)/.test  ## ten times as many random networks
	CONVTAP_SOAK=20000 $(BIN)/python -m pytest tests/test_properties.py

overhead: $(VENV)/.test  ## what a capture costs on this machine, written to benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.overhead

bench: .venv-bench/.ready  ## what this library and others cost, written to benchmarks/RESULTS.md and benchmarks/peers.png
	.venv-bench/bin/python -m benchmarks.peers

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
	rm -rf site $(VENV) .venv-bench .venv-torch-* .venv-gallery-* .mypy_cache .ruff_cache .pytest_cache
