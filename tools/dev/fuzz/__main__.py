"""Call every command on damaged files, and report what ends in anything but a message: `python tools/dev/fuzz`.

Each call runs in a process of its own, forked from this one, so that a crash of a library is one more finding. A call
must end soon, in bounded memory, with a documented exit code; if it fails, with a message on stderr, no output folder
and no leftovers; and it never changes its input. A fault is printed with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import hashlib
import importlib
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from damage import damage
from subjects import OF_MODELS, Subject, subjects

#: The exit codes that the documentation names; 130 is for people who interrupt.
_DOCUMENTED = range(5)
#: Texts by which a message says that passopt or one of its passes is wrong, and not what it was given.
_DEFECTS = ("Traceback (most", "a defect of passopt", "defect of the pass", "the rewrite failed", "the pass failed")
#: What differs between faults of one kind.
_NAMES = re.compile(r"\d+|'[^']*'|/[\w/.-]*/|passopt [\w-]+:")
#: The CPU seconds and the bytes that a call may take, and the seconds after which it is taken to hang.
_CPU_SECONDS, _BYTES, _SECONDS = 60.0, 3 << 30, 900.0
#: These rooms are imported once, before the forks. torch, tvm and what needs them are left out.
_ROOMS = ("api", "commands", "ir", "passes", "reporting", "targets.folders", "targets.onnxruntime", "verification")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one call ended.

    `code` is the exit code, or the number of the signal that ended it as a negative number; `seconds` are of the CPU.
    """

    code: int
    printed: str
    said: str
    seconds: float
    peak: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz as the arguments say; return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="number of damaged files (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=3, help="commands to call on each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first damaged file (default: %(default)s)")
    parser.add_argument("--subject", action="append", help="damage only this subject; may be repeated")
    parser.add_argument("--whole", metavar="DIR", help="damage nothing: call commands on the models below this folder")
    parser.add_argument("--compiler", action="store_true", help="compile, and generate with what was compiled, too")
    parser.add_argument("--exporter", action="store_true", help="export checkpoints, too")
    parser.add_argument("--keep", metavar="DIR", help="keep the inputs of faults in this folder")
    options = parser.parse_args(arguments)
    chosen = subjects(compiler=options.compiler, exporter=options.exporter)
    names = options.subject or list(chosen)
    _import_all(["passopt.frontends"] if options.exporter else [])
    gc.freeze()  # what is collected in a fork would copy all that was imported before
    seeds = range(options.seed, options.seed + options.count)
    counts: collections.Counter[int] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    done = 0
    with tempfile.TemporaryDirectory(prefix="passopt-fuzz-") as room:
        originals, work = Path(room) / "originals", Path(room) / "work"
        if options.whole:
            found = sorted(path for path in Path(options.whole).rglob("*") if path.suffix in {".onnx", ".onnxtxt"})
            random.Random(options.seed).shuffle(found)
            cases = [(seed, partial(_whole, path.absolute())) for seed, path in enumerate(found[: options.count])]
        else:
            _make(chosen, originals)
            cases = [(seed, partial(_damaged, chosen, names, originals)) for seed in seeds]
        with contextlib.suppress(KeyboardInterrupt):  # what was found until then is still told
            for seed, case in cases:
                for code, fault in _calls(case, work, seed, options.calls):
                    counts[code] += 1
                    if not fault:
                        continue
                    kind = _NAMES.sub("…", "".join(fault.partition("\n")[2:]))
                    kinds[kind] += 1
                    if kinds[kind] == 1:
                        print(fault, flush=True)
                        _keep(work, options.keep, seed)
                shutil.rmtree(work)
                done += 1
    codes = ", ".join(f"{count} × {code}" for code, count in sorted(counts.items()))
    print(
        f"{done} {'models' if options.whole else 'damaged files'}, {sum(counts.values())} calls ({codes}), "
        f"{sum(kinds.values())} faults of {len(kinds)} kinds"
    )
    return 1 if kinds else 0


def _import_all(more: Sequence[str]) -> None:
    """Import what commands would import one by one in every fork."""
    for room in (*(f"passopt.{name}" for name in _ROOMS), *more):
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            with contextlib.suppress(ModuleNotFoundError):  # a guest that is not installed
                importlib.import_module(module.name)
    catalog = importlib.import_module("passopt.passes.framework.catalog")
    catalog.catalog()  # reads the sources of all passes, and remembers what it found


def _make(chosen: dict[str, Subject], originals: Path) -> None:
    """Write all subjects, in their order, since some are made of earlier ones; in a process of its own.

    Threads of libraries, such as those of a compiler, would not survive the forks that follow.
    """
    originals.mkdir()

    def make() -> int:
        for name, subject in chosen.items():
            (originals / name).mkdir()
            subject.make(originals / name)
        return 0

    outcome = _forked(make, originals.parent, 900.0)
    if outcome.code:
        raise SystemExit(f"the originals could not be made:\n{outcome.printed}{outcome.said}")


@dataclasses.dataclass(frozen=True)
class _Case:
    """What commands are called on: the folder or file, what `verify` compares it with, and how it came about."""

    subject: Subject
    model: Path
    whole: Path
    what: str


def _damaged(
    chosen: dict[str, Subject], names: Sequence[str], originals: Path, work: Path, chance: random.Random
) -> _Case:
    """Copy a subject and damage one of its files."""
    subject = chosen[chance.choice(names)]
    model = work / "model"
    shutil.copytree(originals / subject.name, model, symlinks=True)
    file = chance.choice(sorted(path for path in model.rglob("*") if path.is_file()))
    way = damage(file, chance)
    what = f"{subject.name}/{file.relative_to(model)} {way}"
    return _Case(subject, model, originals / (subject.whole or subject.name), what)


def _whole(path: Path, work: Path, chance: random.Random) -> _Case:
    """Copy a model as it is, with what lies beside it under its name."""
    model = work / "model"
    model.mkdir()
    for file in path.parent.glob(f"{path.stem}*"):
        if file.is_file():
            shutil.copy(file, model)
    return _Case(Subject(path.name, lambda _: None, OF_MODELS), model / path.name, model / path.name, path.name)


def _calls(
    make: Callable[[Path, random.Random], _Case], work: Path, seed: int, calls: int
) -> Iterator[tuple[int, str]]:
    """Make a case and call commands on it; yield the exit code and the fault of each, "" if there is none."""
    chance = random.Random(seed)
    work.mkdir()
    case = make(work, chance)
    before = _digest(work / "model")
    for number in range(calls):
        out = work / f"out{number}"
        words = case.subject.command(chance, case.model, case.whole, out)
        outcome = _forked(lambda: _command(words), work, _SECONDS)  # noqa: B023 # called at once
        wrong = list(_faults(outcome, out))
        if _digest(work / "model") != before:
            wrong.append("the input was changed")
        shown = " ".join(words).replace(str(work), "…").replace(str(case.whole.parent), "…")
        what = f"seed {seed}: {case.what}; passopt {shown}"
        yield outcome.code, f"{what}\n    {'; '.join(wrong)}\n{_indented(outcome)}" if wrong else ""


def _command(words: Sequence[str]) -> int:
    from passopt.cli import main as command

    try:
        return command(words)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


def _faults(outcome: Outcome, out: Path) -> Iterator[str]:
    """Yield what is wrong with how a call ended."""
    if outcome.code < 0:
        yield f"ended by signal {-outcome.code} after {outcome.seconds:.0f} s of the CPU"
    elif outcome.code not in _DOCUMENTED:
        yield f"exit code {outcome.code}"
    defects = [text for text in _DEFECTS if text in outcome.said or text in outcome.printed]
    if defects:
        yield f"says {defects[0]!r}"
    if outcome.code and not outcome.said.strip():
        yield "says nothing"
    if outcome.peak > _BYTES:
        yield f"took {outcome.peak >> 20} MiB"
    if outcome.seconds > _CPU_SECONDS:
        yield f"took {outcome.seconds:.0f} s of the CPU"
    allowed = {"model", "stdout", "stderr"} | {item.name for item in out.parent.glob("out*.reproducer")}
    left = {item.name for item in out.parent.iterdir()} - allowed
    if outcome.code:
        if left:
            yield f"left {', '.join(sorted(left))}"
    elif left - {out.name}:
        yield f"left {', '.join(sorted(left - {out.name}))}"
    for name in left:
        shutil.rmtree(out.parent / name, ignore_errors=True)
    for folder in out.parent.glob("out*.reproducer"):
        shutil.rmtree(folder)


def _forked(action: object, work: Path, seconds: float) -> Outcome:
    """Call `action` in a forked process, with its output in files and its memory bounded."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        _be_the_child(action, work)
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() - start > seconds:
            os.kill(child, signal.SIGKILL)
            found, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.002)
    texts = []
    for name in ("stdout", "stderr"):
        texts.append((work / name).read_text(encoding="utf-8", errors="replace"))
        (work / name).unlink()
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), *texts, seconds, usage.ru_maxrss << 10)


def _be_the_child(action: object, work: Path) -> None:
    code = 70
    try:
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        assert callable(action)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _digest(folder: Path) -> str:
    """Return a digest over the names, kinds and contents of everything in a folder."""
    found = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".verified":  # the stamp that a compiled folder gets when its weights were hashed
            continue
        content = (
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else path.lstat().st_mode
        )
        found.update(repr((str(path), content)).encode())
    return found.hexdigest()


def _indented(outcome: Outcome) -> str:
    lines = (outcome.said.strip() or outcome.printed.strip()).splitlines()
    return "\n".join(f"        {line[:400]}" for line in lines[-6:])


def _keep(work: Path, folder: str | None, seed: int) -> None:
    if folder and not (Path(folder) / str(seed)).exists():
        with contextlib.suppress(shutil.Error):  # of a pipe, nothing can be kept
            shutil.copytree(work / "model", Path(folder) / str(seed), symlinks=True)


if __name__ == "__main__":
    sys.exit(main())
