"""Run one of the benchmarks of passopt.

    python tools/bench NAME [options]

Each benchmark has its own options; `python tools/bench NAME --help` shows them. One call runs one benchmark. The
programs that a benchmark measures run in processes of their own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from passopt.passes.framework.suggestions import unknown_name

#: For each name: the module whose `main` takes the options, and one line that says what is measured.
BENCHES = {
    "rewriting": ("rewriting.bench", "measure the speed of rewriting against other tools"),
    "weights": ("weights.bench", "measure how fast full-size weights are written against the speed of the disk"),
    "peers": ("weights.peers", "measure how fast other tools write the same weights under a cap of memory"),
    "compiled": ("compiled.bench", "measure the speed of compiled models against other runtimes and the machine"),
    "real": ("real.bench", "measure what the passes do to a trained model, against transformers"),
    "calibrate": ("calibrating", "measure what calibrating one 13B-shaped layer takes, against its arithmetic"),
    "quality": ("quality.bench", "measure what each way of quantising costs a trained model, and draw it"),
    "startup": ("startup", "measure how long passopt takes to start, against goals"),
    "full-size": ("full_size", "measure time, memory and exact bytes on the published sizes, without weights"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first of `arguments` names, or list all of them; return the exit code."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(listing())
        return 0
    name, *options = arguments
    if name not in BENCHES:
        message = unknown_name("benchmark", name, list(BENCHES), "python tools/bench --help")
        print(f"bench: {message}", file=sys.stderr)
        return 2
    importlib.import_module(BENCHES[name][0]).main(options)
    return 0


def listing() -> str:
    """Return the usage text, with one line for each benchmark."""
    lines = [f"  {name:9}  {what}" for name, (_, what) in BENCHES.items()]
    return "\n".join(["usage: python tools/bench NAME [options]", "", *lines, "", "NAME --help shows its options."])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
