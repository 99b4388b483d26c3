"""Define the options of `python tools/bench compiled`."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def is_partial(options: argparse.Namespace) -> bool:
    """Return whether the options leave out something that the committed page has."""
    whole = parser(None).parse_args([])
    if set(options.parts) != set(whole.parts) or options.rounds < whole.rounds or options.retries < whole.retries:
        return True
    return any(getattr(options, name) != getattr(whole, name) for name in ("quick", "only", "layers", "threads"))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    found = argparse.ArgumentParser(
        prog="python tools/bench compiled",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "output",
        nargs="?",
        help="default: docs/measured/bench-tvm.md, or build/bench-tvm.md if options leave something out",
    )
    found.add_argument("--quick", action="store_true", help="one 7B-shaped layer, one point of each kind")
    found.add_argument("--only", nargs="+", metavar="NAME", help="candidates whose name contains one of these")
    found.add_argument("--parts", nargs="+", choices=("layers", "whole"), default=("layers", "whole"))
    found.add_argument("--layers", type=int, metavar="N", help="cut the whole model to N layers")
    found.add_argument("--threads", default="1,2", help="default: 1,2")
    found.add_argument("--rounds", type=int, default=2, help="interleaved launches of each candidate (default: 2)")
    found.add_argument(
        "--retries",
        type=int,
        default=2,
        help="how often a launch that other programs disturbed is repeated (default: 2)",
    )
    found.add_argument(
        "--work", metavar="DIR", help="keep the models there, and use those that an earlier run of this version left"
    )
    found.add_argument(
        "--peers", metavar="DIR", default=str(ROOT / "build" / "peers"), help="Python environment of llama.cpp"
    )
    return found
