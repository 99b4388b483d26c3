"""Run one of the benchmarks of passopt.

    python tools/bench NAME [options]

The options are those of the benchmark; `python tools/bench NAME --help` shows them. Benchmarks run one at a time, and
what they measure runs in processes of its own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from passopt.passes.framework.suggestions import unknown_name

#: Name → the module whose `main` takes the options, and what it measures.
BENCHES = {
    "rewriting": ("rewriting.bench", "measure the speed of rewriting against other tools"),
    "weights": ("weights.bench", "measure how fast full-size weights are written against the speed of the disk"),
    "peers": ("weights.peers", "measure how fast other tools write the same weights under a cap of memory"),
    "compiled": ("compiled.bench", "measure the speed of compiled models against other runtimes and the machine"),
    "full-size": ("full_size", "measure time, memory and exact bytes on the published sizes, without weights"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first of `arguments` names; without one, list them all."""
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
    """Return how to call this, and one line for each benchmark."""
    lines = [f"  {name:9}  {what}" for name, (_, what) in BENCHES.items()]
    return "\n".join(["usage: python tools/bench NAME [options]", "", *lines, "", "NAME --help shows its options."])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
