# Every target sets up what it needs: .venv with the exact versions of constraints.txt, this package editable.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check stock full-size why-docs bench-rewrite bench-tvm bench-scale bench-scale-peers drift clean

demo: $(INSTALLED)  ## the main job end to end on two tiny models
	$(BIN)/python tools/demo.py

test: $(INSTALLED)  ## all tests; warnings are errors
	$(BIN)/python -m pytest -q

check: $(INSTALLED)  ## format, lint, types, import rules
	$(BIN)/python tools/check.py

stock: $(INSTALLED)  ## make stock STOCK=DIR: the same on published remote code in DIR
	$(BIN)/python tools/stock.py "$(STOCK)"

full-size: $(INSTALLED)  ## time, memory and exact bytes on the published sizes, without weights
	$(BIN)/python tools/full_size.py

why-docs: $(INSTALLED)  ## docs/why.md, from what `passopt why` prints
	$(BIN)/python tools/why_docs.py

bench-rewrite: $(INSTALLED)  ## speed of rewriting against other tools, to docs/bench-rewrite.md
	$(BIN)/python tools/bench_rewrite.py

bench-tvm: $(INSTALLED)  ## speed of compiled models against other runtimes, to docs/bench-tvm.md (BENCH=--quick: a part, to build/)
	$(BIN)/python tools/bench_tvm.py $(BENCH)

bench-scale: $(INSTALLED)  ## full-size weights against the disk's speed, to docs/bench-scale.md; 60 GB of disk
	$(BIN)/python tools/bench_scale.py $(BENCH)

bench-scale-peers: $(INSTALLED)  ## weights of other tools under a cap of memory, to docs/bench-scale-peers.md
	$(BIN)/python tools/bench_scale_peers.py $(BENCH)

drift: $(INSTALLED)  ## what the fusions find, families × exporters, to docs/drift.md; fails on any miss
	$(BIN)/python tools/drift.py --write docs/drift.md

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "setting up $(VENV), a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[export,run,guests,fast,dev]' > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
