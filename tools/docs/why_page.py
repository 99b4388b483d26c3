"""Write docs/measured/why.md, which shows what `passopt why` prints, word for word.

    python tools/docs/why_page.py [FILE]

FILE is docs/measured/why.md unless it is given. The script makes a checkpoint, exports its graph and runs the commands
of the page on it.
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

`passopt why PASS MODEL` runs a pass on a copy of the model, and explains place by place why a rule came near but did
not match. The model file is never changed.

This page shows examples. `make why-docs` runs the commands and writes the page, so each block is what the command
really prints. The model is a tiny Baichuan2 with {layers} layers (rotary, fp16). It was exported by

```
{export}
```

How to read the output: places that the rule itself declined come first. The others are ranked by how many nodes of the
rule's pattern fit. Places that are equal, such as one in every layer, are shown as one kind with an example.
`--limit 0` shows all kinds. `--json` gives every single place, with all differences and with the origin of the nodes.
"""

_SPELLING = """
## The exporter wrote it in another way

`--after` runs the given passes first. `--in PIPELINE` runs the passes that come before this one in a pipeline. In the
first example, `cse` has not run:

```
$ {command}
{output}
```

All nodes of the norm fit but one. A norm reads the same `x` twice, but the exporter cast it to fp32 twice, under two
names. The last line of the place gives the source line that the node was exported from, its module, the rule and where
it is written, and the alternative of the rule that came closest. "found A with B behind it" means that A stands between
two nodes of the pattern. "no B in between" means that B is missing there.

With `--in`, the same pass runs after the passes that it needs, and matches:

```
$ {fixed}
{fixed_output}
```

## Everything that the rules say about one node

`--node` takes the name of a node or of a value, as `passopt print` shows it. It prints every rule, every difference and
every alternative for this node:

```
$ {node}
{node_output}
```
"""

_DECLINE = """
## The rule declines

Here the whole pattern fits, but the rule itself declines. The reason is printed as the rule gives it, word for word:

```
$ {command}
{output}
```
"""

_EXPECTATION = """
## An expectation is not met

A pipeline can state how often a pass must match, and `--expect PASS==N` states it on the command line; N may be a
formula such as `2*num_layers+1`. If an expectation is not met, `passopt run` ends with exit code 4 and writes nothing.
It prints the same explanation of the graph as the pass left it:

```
$ {command}
{output}
```

For a pass that declares which operators it makes (`makes`), these operators are counted in the final graph. So the
expectation is also met by a model in which the exporter has already fused them.
"""


class Shell:
    """Run commands in one folder, as a user would."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, command: str, code: int = 0) -> str:
        """Run a command, and return the results and messages that it prints.

        Raises SystemExit if its exit code is not `code`.
        """
        words = [word.strip("'") for word in command.split()][1:]
        line = [sys.executable, "-m", "passopt", *words]
        done = subprocess.run(
            line, cwd=self._folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode != code:
            raise SystemExit(f"why-docs: {command!r} ended with {done.returncode}, expected {code}:\n{done.stdout}")
        return done.stdout.rstrip()


def page(folder: Path) -> str:
    """Make and export a checkpoint in `folder`, run the commands there, and return the page."""
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
    """Write the page to the file that the command line names."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "measured" / "why.md"
    with tempfile.TemporaryDirectory(prefix="passopt-why-") as folder:
        text = page(Path(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"→ {target}")


if __name__ == "__main__":
    main()
