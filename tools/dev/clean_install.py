"""Build the wheel and the source distribution, install each in a clean environment, and use it as others would.

    python tools/dev/clean_install.py [--keep DIR]

In each environment, far from the checkout: the tour (export, run, verify, why, compile, generate) by the command line,
and a script of another project, which must run and pass `mypy --strict` against the installed package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"

#: What another project may write; it uses every part of the public interface.
SCRIPT = '''"""Fuse and shard a model with a pass of our own, from outside of passopt."""

import dataclasses
from pathlib import Path
from typing import Any

import passopt
from passopt.ir import print_model
from passopt.passes import EXACT, Decline, RewritePass, resolve
from passopt.testing import check


@dataclasses.dataclass(frozen=True)
class DropDoubleNegation(RewritePass):
    """Drop two negations that cancel each other.

    Before: ``y = Neg(Neg(x))``
    After:  ``y = Identity(x)``
    """

    name = "drop-double-negation"
    accuracy = EXACT

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        if x.dtype is None:
            raise Decline(f"{x.name} has no dtype")
        return op.Identity(x)


def main(folder: Path) -> None:
    model = passopt.load(folder)
    result = passopt.run(model, "baichuan2,tp{degree=2},int8", folder.with_name("sharded"))
    report: passopt.VerifyReport = passopt.verify(model, result.output or folder)
    assert report.ok, str(report)
    assert passopt.why("fuse-attention", model, within="baichuan2").matched == 2
    assert [item.name for item in resolve("int8").passes][-1] == "dead-code"
    header = '<ir_version: 10, opset_import: ["" : 21]> '
    graph = "g (float[2] x) => (float[2] y) { n = Neg(x) p = Neg(n) y = Abs(p) }"
    changed, _ = check(DropDoubleNegation(), header + graph, matches=1)
    assert "Identity" in print_model(changed)
    print(result)


if __name__ == "__main__":
    main(Path("exported"))
'''

CHECKPOINT = """
from passopt.testing import ALIBI, make_checkpoint
from passopt.testing.checkpoints import evaluation_text
from pathlib import Path
make_checkpoint(Path("checkpoint"), ALIBI)
Path("text.txt").write_text(evaluation_text())
"""

TOUR = (
    ("export", "checkpoint", "-o", "exported", "--dtype", "fp32", "--trust-remote-code"),
    ("plan", "exported"),
    ("run", "exported/model.onnx", "--passes", "tp,int8"),
    ("verify", "exported", "exported/model.tp2.int8", "--text", "text.txt", "--max-tokens", "1000"),
    ("why", "fuse-attention", "exported", "--in", "baichuan2"),
    ("compile", "exported", "--passes", "baichuan2,int8", "-o", "compiled"),
    ("verify", "exported", "compiled"),
    ("generate", "compiled", "--prompt", "The expression list", "--max-new-tokens", "8", "--greedy"),
    ("list",),
)


def main() -> int:
    """Build, install and use both distributions; an error ends it with what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="DIR", help="a new folder that is kept, with both environments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="passopt-clean-") as temporary:
        folder = Path(options.keep or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=ROOT)
        for kind in ("*.whl", "*.tar.gz"):
            (archive,) = (folder / "dist").glob(kind)
            _use(archive, folder / kind.rpartition(".")[2])
    return 0


def _use(archive: Path, folder: Path) -> None:
    """Install one archive into an environment of its own, and take the tour there."""
    print(f"== {archive.name}", flush=True)
    _run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    _run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{archive}[export,run,fast]", "mypy"
    )
    work = folder / "work"
    work.mkdir()
    found = _run(python, "-c", "import passopt; print(passopt.__version__, passopt.__file__)", cwd=work)
    assert str(ROOT) not in found, f"the checkout is used, not the archive: {found}"
    _run(python, "-c", CHECKPOINT, cwd=work)
    for arguments in TOUR:
        _run(python.with_name("passopt"), *arguments, cwd=work)
    (work / "outside.py").write_text(SCRIPT, encoding="utf-8")
    _run(python, "outside.py", cwd=work)
    _run(python, "-m", "mypy", "--strict", "outside.py", cwd=work)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run one command, and return what it prints; if it fails, show that and end."""
    shown = " ".join(Path(word).name if isinstance(word, Path) else word.partition("\n")[0] for word in command)
    print(f"$ {shown}", flush=True)
    environment = {**os.environ, "PIP_CONSTRAINT": str(CONSTRAINTS)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}clean-install: {shown} failed with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
