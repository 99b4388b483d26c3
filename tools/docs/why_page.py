"""Write docs/why.md: what `passopt why` prints on graphs that this command exports first, word for word.

python tools/docs/why_page.py [FILE]      (default: docs/why.md)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from passopt.testing.checkpoints import ROTARY, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]

_INTRODUCTION = """\
# Why did it not match?

`passopt why PASS MODEL` runs a pass on a copy of the model and explains every place that it left. This page is made by
`make why-docs`: each block is what the command prints on a tiny Baichuan2 of {layers} layers (rotary, fp16), exported
by

```
{export}
```

A place is ranked by how many nodes of the rule's pattern fit; places that the rule itself declined come first. Equal
places, one per layer, are one kind with an example. `--limit 0` shows all kinds, `--json` every place of them, with all
differences and where the nodes come from. The model file is never changed.
"""

_SPELLING = """
## An exporter spells it differently

`--after` runs passes first, `--in PIPELINE` what stands before the pass in a pipeline. Here `cse` has not run:

```
$ {command}
{output}
```

All nodes of the norm fit but one: a norm reads the same `x` twice, and the exporter cast it to fp32 twice, under two
names. The last line gives the source line that the node was exported from, its module, the rule and where it is
written, and which of the rule's alternatives came farthest. "found A with B behind it" means that A stands between two
nodes of the pattern; "no B in between" that B is missing there.

With `--in`, the same pass where it belongs:

```
$ {fixed}
{fixed_output}
```

## All that the rules say about one node

By the node's name or a value's, as `passopt print` shows them: every rule, every difference, every alternative.

```
$ {node}
{node_output}
```
"""

_DECLINE = """
## The rule declines

The pattern fits whole, and the rule's own guard says no: the reason is the rule's, word for word.

```
$ {command}
{output}
```
"""

_EXPECTATION = """
## An expectation that does not hold

Pipelines state how often their passes must match (`--expect PASS==N`, N such as `2*num_layers+1`). An unmet one ends
`passopt run` with exit code 4, prints the same explanation of the graph as the pass left it, and writes nothing:

```
$ {command}
{output}
```

Of a pass that says which operators it makes (`makes`), these are counted in the final graph, so that a model in which
the exporter has fused them holds as well.
"""


class Shell:
    """Runs commands as a user would, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, command: str, code: int = 0) -> str:
        """What a command prints, results and messages, without its exit code, which must be `code`."""
        words = [word.strip("'") for word in command.split()][1:]
        line = [sys.executable, "-m", "passopt", *words]
        done = subprocess.run(
            line, cwd=self._folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode != code:
            raise SystemExit(f"why-docs: {command!r} ended with {done.returncode}, expected {code}:\n{done.stdout}")
        return done.stdout.rstrip()


def page(folder: Path) -> str:
    """The page, from commands run in `folder`."""
    shell = Shell(folder)
    make_checkpoint(folder / "checkpoint", ROTARY)
    export = "passopt export checkpoint -o rotary --dtype fp16 --trust-remote-code"
    shell(export + " --no-self-check")
    spelling = "passopt why fuse-rms-norm rotary --after 'legalize{opset=23}'"
    fixed = "passopt why fuse-rms-norm rotary --in baichuan2 --limit 1"
    node = f"{spelling} --node pow_1"
    decline = "passopt why fuse-attention rotary --limit 1"
    passes = "legalize{opset=23},fold-constants,cse,fuse-rotary"
    expectation = f"passopt run rotary --passes '{passes}' --expect 'fuse-rotary==2*num_layers'"
    return (
        _INTRODUCTION.format(layers=ROTARY.layers, export=export)
        + _SPELLING.format(
            command=spelling,
            output=shell(spelling),
            fixed=fixed,
            fixed_output=shell(fixed),
            node=node,
            node_output=shell(node),
        )
        + _DECLINE.format(command=decline, output=shell(decline))
        + _EXPECTATION.format(command=expectation, output=shell(expectation, code=4))
    )


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "why.md"
    with tempfile.TemporaryDirectory(prefix="passopt-why-") as folder:
        text = page(Path(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"→ {target}")


if __name__ == "__main__":
    main()
