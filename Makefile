# Every target sets up what it needs: .venv with the exact versions of constraints.txt, this package editable.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= logical
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test check stock full-size why-docs bench-rewrite bench-tvm bench-scale bench-scale-peers drift clean

demo: $(INSTALLED)  ## Do the main job from end to end on two tiny models.
	$(BIN)/python tools/demo.py

# As many workers as there are cores, each with one thread for linear algebra, so that they do not compete.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)  ## Run all tests, with warnings as errors; FAST=1 leaves out those that are marked slow.
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal $(if $(FAST),-m "not slow")

check: $(INSTALLED)  ## Check format, lint, types and import rules.
	$(BIN)/python tools/dev/check.py

stock: $(INSTALLED)  ## Do the main job on published remote code; say where it is by STOCK=DIR.
	$(BIN)/python tools/dev/stock.py "$(STOCK)"

full-size: $(INSTALLED)  ## Measure time, memory and exact bytes on the published sizes, without weights.
	$(BIN)/python tools/bench full-size

why-docs: $(INSTALLED)  ## Write docs/why.md from what `passopt why` prints.
	$(BIN)/python tools/docs/why_page.py

bench-rewrite: $(INSTALLED)  ## Measure the speed of rewriting against other tools, and write docs/bench-rewrite.md.
	$(BIN)/python tools/bench rewriting

# BENCH=--quick measures a part of it, and writes to build/.
bench-tvm: $(INSTALLED)  ## Measure the speed of compiled models against other runtimes, and write docs/bench-tvm.md.
	$(BIN)/python tools/bench compiled $(BENCH)

bench-scale: $(INSTALLED)  ## Measure full-size weights against the disk's speed (60 GB), and write docs/bench-scale.md.
	$(BIN)/python tools/bench weights $(BENCH)

bench-scale-peers: $(INSTALLED)  ## Measure other tools' weights under a cap of memory; write docs/bench-scale-peers.md.
	$(BIN)/python tools/bench peers $(BENCH)

drift: $(INSTALLED)  ## Write docs/drift.md, what the fusions find by family and exporter, and fail on any miss.
	$(BIN)/python tools/docs/drift.py --write docs/drift.md

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) tools/dev/install.py $(VENV) '.[export,run,guests,fast,dev]'
	@touch $@

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

clean:  ## Remove the environment and everything that was built.
	rm -rf $(VENV) build dist *.egg-info
