"""Measure compiled models against onnxruntime, torch, llama.cpp and the machine, and write docs/bench-tvm.md.

What options cut short goes to build/bench-tvm.md.

    python tools/bench compiled [OUTPUT] [--quick] [--only NAME ...] [--layers N] [--threads 1,2] …

One candidate at a time is measured, each in processes of its own. This takes an hour and a half and 65 GB of disk, and
with --quick some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compiled.other_load import Watch
from compiled.report import LIMITS, Run, report
from compiled.shapes import LAYERS, PASTS, PREFILLS, WHOLE, WHOLE_LABEL, Shape

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ROOT / "tools" / "bench" / "compiled"
WHOLE_REPORT, PARTIAL = ROOT / "docs" / "bench-tvm.md", ROOT / "build" / "bench-tvm.md"
PEERS = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
TIMEOUT = 900
#: Share of the machine that others may use while a candidate runs; beyond it is launched again.
DISTURBED = 0.1
#: Seconds after which a launch is not repeated for being disturbed, and a candidate not launched in later rounds.
PATIENCE = 45.0
SLOW = 90.0
#: Large memory of every candidate's malloc comes in huge pages: of glibc's, and of torch's.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """`width` is how many bytes a weight takes; `whole`: whether the whole model is measured, or layers only.

    `mapped` weights stay in the page cache, wherever that lies, which only decode shows; others are in memory of the
    process.
    """

    name: str
    program: str
    variant: str
    width: float
    whole: bool = True
    mapped: bool = False

    @property
    def quick(self) -> bool:
        """Whether a long prefill of the whole model takes seconds instead of minutes, on one thread too."""
        return self.variant in {"W8A8", "W8A8 fp16", "dynamic", "integer"}

    @property
    def folder(self) -> str:
        """Two of onnxruntime's have the same weights, and so one folder."""
        variant = "dynamic" if self.variant == "integer" else self.variant
        return f"{self.program}-{variant}".replace(" ", "")


CANDIDATES = (
    Candidate("passopt fp32", "passopt", "fp32", 4, whole=False),
    Candidate("passopt int8", "passopt", "int8", 1),
    Candidate("passopt W8A8", "passopt", "W8A8", 1),
    Candidate("passopt W8A8, mapped", "passopt", "W8A8", 1, mapped=True),
    Candidate("passopt W8A8, fp16 cache", "passopt", "W8A8 fp16", 1),
    Candidate("onnxruntime fp32", "onnxruntime", "fp32", 4, whole=False),
    Candidate("onnxruntime DynamicQuantizeMatMul", "onnxruntime", "dynamic", 1),
    Candidate("onnxruntime MatMulIntegerToFloat", "onnxruntime", "integer", 1),
    Candidate("onnxruntime MatMulNBits 8, blocks of 32", "onnxruntime", "nbits 32", 1.125, whole=False),
    Candidate("onnxruntime MatMulNBits 8, blocks of 128", "onnxruntime", "nbits 128", 1.03),
    Candidate("torch fp32", "torch", "fp32", 4, whole=False),
    Candidate("torch bf16", "torch", "bf16", 2, whole=False),
    Candidate("llama.cpp Q8_0", "llama", "q8_0", 1.0625),
)


@dataclasses.dataclass(frozen=True)
class Points:
    """What is measured of one model: lengths of prefill, pasts of decode, for each number of threads."""

    threads: tuple[int, ...]
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A candidate in a shape. The first plan is measured in every round, the others in the first one."""

    candidate: Candidate
    shape: Shape
    plans: Sequence[Points]


class Bench:
    """Where models and peers lie, and what has been measured."""

    def __init__(self, work: Path, peers: Path, options: argparse.Namespace) -> None:
        self.work, self.peers, self.options = work, peers, options
        self.threads = tuple(int(item) for item in options.threads.split(","))
        self.candidates = [item for item in CANDIDATES if self._wanted(item.name)]
        self.run = Run(threads=self.threads)

    def _wanted(self, name: str) -> bool:
        return not self.options.only or any(part.lower() in name.lower() for part in self.options.only)

    # Processes.

    def python(self, program: str) -> Path:
        return self.peers / "bin" / "python" if program == "llama" else Path(sys.executable)

    def call(self, task: str, candidate: Candidate, job: dict[str, Any]) -> dict[str, Any]:
        """The result of one process. Raises Failure with the last line of its log."""
        program = "with_llama_cpp.py" if candidate.program == "llama" else "candidates.py"
        file = self.work / "job.json"
        file.write_text(json.dumps({"candidate": candidate.program, "variant": candidate.variant, **job}))
        count = str(max(job.get("threads", [1])))
        environment = {**os.environ, **HUGE_PAGES, "OMP_NUM_THREADS": count, "TVM_NUM_THREADS": count}
        command = [str(self.python(candidate.program)), str(PROGRAMS / program), task, str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise Failure(f"not done in {TIMEOUT} s") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise Failure(lines[-1] if lines else f"exit code {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def install_peers(self) -> None:
        """llama.cpp in an environment of its own, built where there is no wheel; without it the others are measured."""
        if not any(candidate.program == "llama" for candidate in self.candidates):
            return
        python = self.python("llama")
        try:
            if not python.exists():
                print(f"installing {', '.join(PEERS)} in {self.peers}, some minutes", flush=True)
                subprocess.run([sys.executable, "-m", "venv", str(self.peers)], check=True, capture_output=True)
            if subprocess.run([str(python), "-c", "import llama_cpp, gguf"], capture_output=True).returncode:
                install = [str(python), "-m", "pip", "install", "--quiet", *PEERS]
                subprocess.run(install, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or b"").decode().strip().splitlines()
            self.run.notes.append(f"llama.cpp is missing: it did not install ({(lines or [str(error)])[-1][:200]}).")
            self.candidates = [candidate for candidate in self.candidates if candidate.program != "llama"]

    # Measurements.

    def machine(self) -> None:
        """Read bandwidth and arithmetic, before and after everything else; the best counts."""
        for threads in self.threads:
            result = self.call("measure", Candidate("", "machine", "", 0), {"threads": [threads], "seconds": 0.7})
            self.run.machine(threads, {name: best[0] for name in LIMITS if (best := result.get(f"{name} 0 {threads}"))})
        print(f"machine: {self.run.limits}", flush=True)

    def model(self, label: str, jobs: Sequence[Job], rounds: int) -> None:
        """All candidates of one model, side by side on the disk: launches are interleaved, as memory's speed varies."""
        ready = [job for job in jobs if self._write(label, job.shape, job.candidate)]
        slow: set[str] = set()
        for number in range(rounds):
            for job in ready:
                if job.candidate.name in slow:
                    continue
                first, *others = job.plans
                start = time.monotonic()
                self._measure(label, job.shape, job.candidate, first)
                if time.monotonic() - start > SLOW:
                    slow.add(job.candidate.name)
                for plan in others if number == 0 else ():
                    self._measure(label, job.shape, job.candidate, plan)
        if not self.options.work:
            for job in jobs:
                self._remove(self._path(label, job.shape, job.candidate))

    def forget(self, label: str, shape: Shape) -> None:
        """Remove what the candidates share: the checkpoint and its export."""
        if not self.options.work:
            self._remove(self._folder(label, shape))

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _folder(self, label: str, shape: Shape) -> Path:
        return self.work / f"{label}-{shape.layers}".replace(" ", "-").replace(",", "")

    def _path(self, label: str, shape: Shape, candidate: Candidate) -> Path:
        name = f"{candidate.folder}.gguf" if candidate.program == "llama" else candidate.folder
        return self._folder(label, shape) / name

    def _write(self, label: str, shape: Shape, candidate: Candidate) -> bool:
        path = self._path(label, shape, candidate)
        if candidate.program == "torch" or path.exists():
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        self._remove(partial)
        start = time.monotonic()
        try:
            self.call("write", candidate, {"model": str(partial), "shape": dataclasses.asdict(shape)})
            partial.rename(path)
        except Failure as failure:
            self._failed(label, candidate, str(failure))
            return False
        print(
            f"{label}: {candidate.name}, {shape.layers} layers: written in {time.monotonic() - start:.0f} s", flush=True
        )
        return True

    def _failed(self, label: str, candidate: Candidate, failure: str) -> None:
        print(f"{label}: {candidate.name}: {failure}", flush=True)
        self.run.of(label, candidate.name).failure = failure

    def _measure(self, label: str, shape: Shape, candidate: Candidate, plan: Points) -> None:
        if self.run.of(label, candidate.name).failure:
            return
        model = {"model": str(self._path(label, shape, candidate)), "shape": dataclasses.asdict(shape)}
        model["mapped"] = candidate.mapped
        for variant in self._variants(candidate, shape, plan):
            job = {**model, "seconds": plan.seconds, **variant}
            others: list[float] = []
            spent = 0.0
            # A launch that takes long is not repeated: it has averaged over its own disturbance.
            while not others or (others[-1] > DISTURBED and len(others) <= self.options.retries and spent < PATIENCE):
                watch = Watch()
                try:
                    result = self.call("measure", candidate, job)
                    check_memory(candidate, shape, result["memory"])
                except Failure as failure:
                    self._failed(label, candidate, str(failure))
                    return
                others.append(watch.others())
                spent = watch.seconds()
                measured = self.run.of(label, candidate.name)
                measured.add(result, shape)
                line = f"{label}: {candidate.name}: {measured.line(result, shape)}"
                print(f"{line} in {watch.seconds():.0f} s, others {others[-1]:.0%}", flush=True)
            measured.others = max(measured.others, min(others))

    def _variants(self, candidate: Candidate, shape: Shape, plan: Points) -> Iterator[dict[str, Any]]:
        """The processes of one candidate: one per number of threads; of llama.cpp per kind of attention."""
        points: dict[str, Any] = {"prefill": plan.prefill, "decode": plan.decode}
        if candidate.program == "llama":
            # Filling the cache is slow, so that one process serves all numbers of threads; most threads first.
            threads = sorted(plan.threads, reverse=True)
            yield {**points, "threads": threads, "flash": True}
            if not plan.decode and not shape.is_whole:
                yield {**points, "threads": threads, "flash": False}
            return
        for threads_ in plan.threads:
            yield {**points, "threads": [threads_]}

    # The whole.

    def layers(self) -> None:
        """Decode in as many layers as fill 1 GiB, prefill in one layer: arithmetic bounds it, and it is slow."""
        quick = self.options.quick
        for label, shape in LAYERS.items():
            if quick and label != "7B":
                continue
            lengths = (128,) if quick else PREFILLS if "tp4" not in label else (512,)
            pasts = (128,) if quick else PASTS if "tp4" not in label else (128, 2000)
            rounds = 1 if quick else self.options.rounds
            decode, prefill = [Points(self.threads, (), pasts, 1.0)], [Points(self.threads, lengths, (), 1.0)]
            deep = [shape.with_layers(shape.enough_layers(item.width)) for item in self.candidates]
            self.model(label, [Job(item, of, decode) for item, of in zip(self.candidates, deep, strict=True)], rounds)
            for of in set(deep):
                self.forget(label, of)
            self.model(label, [Job(item, shape, prefill) for item in self.candidates if not item.mapped], rounds)
            self.forget(label, shape)

    def whole(self) -> None:
        """The model that fits into memory in 8 bits only. Long prefills are timed once; where slow, by all threads."""
        shape = WHOLE.with_layers(self.options.layers) if self.options.layers else WHOLE
        label = f"{WHOLE_LABEL}, {shape.layers} layers"
        jobs = [Job(item, shape, self._whole_plans(item)) for item in self.candidates if item.whole]
        self.model(label, jobs, self.options.rounds)
        self.forget(label, shape)

    def _whole_plans(self, candidate: Candidate) -> list[Points]:
        if candidate.mapped:
            return [Points(self.threads, (), PASTS, 2.0)]
        plans = [Points(self.threads, PREFILLS[:1], PASTS, 2.0)]
        if candidate.quick:
            plans.append(Points(self.threads, PREFILLS[1:], (), 2.0))
        elif "MatMulNBits" not in candidate.name:
            plans.append(Points((max(self.threads),), PREFILLS[1:], (), 2.0))
        return plans


def check_memory(candidate: Candidate, shape: Shape, held: dict[str, int]) -> None:
    """Raises Failure where a process held less than its weights take: equal ones once, or in mapped files."""
    least = candidate.width * shape.read_parameters
    found = held["other"] + (held["mapped"] if candidate.mapped else 0)
    if found < least:
        kind = "or of mapped files" if candidate.mapped else "of its own"
        raise Failure(f"held {found / 1e9:.2f} GB of memory {kind} beside caches, weights take {least / 1e9:.2f} GB")


class Failure(Exception):
    """A process that did not deliver; the message says why."""


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    # Asked to stop, it still removes its models: they are tens of gigabytes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(options.work) if options.work else Path(tempfile.mkdtemp(prefix="passopt-bench-tvm-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, Path(options.peers), options)
    if _is_partial(options):
        bench.run.notes.append(f'This is a part: `make bench-tvm BENCH="{shlex.join(arguments)}"`.')
    start = time.monotonic()
    try:
        bench.install_peers()
        bench.machine()
        if "layers" in options.parts:
            bench.layers()
        if "whole" in options.parts and not options.quick:
            bench.whole()
        bench.machine()
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    output = Path(options.output or (PARTIAL if _is_partial(options) else WHOLE_REPORT))
    output.parent.mkdir(exist_ok=True)
    bench.run.seconds = time.monotonic() - start
    output.write_text(report(bench.run), encoding="utf-8")
    print(f"→ {output} in {bench.run.seconds:.0f} s")
    failed = [f"{label}: {name}" for label, name in bench.run.failures() if name.startswith("passopt")]
    if failed:
        raise SystemExit(f"bench-tvm: {', '.join(failed)} failed")


def _is_partial(options: argparse.Namespace) -> bool:
    """Whether options leave out what the committed report has."""
    whole = parser().parse_args([])
    if set(options.parts) != set(whole.parts) or options.rounds < whole.rounds or options.retries < whole.retries:
        return True
    return any(getattr(options, name) != getattr(whole, name) for name in ("quick", "only", "layers", "threads"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python tools/bench compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "output", nargs="?", help="default: docs/bench-tvm.md; where options leave something out, build/bench-tvm.md"
    )
    found.add_argument("--quick", action="store_true", help="one 7B-shaped layer, one point of each kind")
    found.add_argument("--only", nargs="+", metavar="NAME", help="candidates whose name contains one of these")
    found.add_argument("--parts", nargs="+", choices=("layers", "whole"), default=("layers", "whole"))
    found.add_argument("--layers", type=int, metavar="N", help="cut the whole model to N layers")
    found.add_argument("--threads", default="1,2", help="default: 1,2")
    found.add_argument("--rounds", type=int, default=2, help="interleaved launches of each candidate (default: 2)")
    found.add_argument(
        "--retries", type=int, default=2, help="launches again where others used the machine (default: 2)"
    )
    found.add_argument("--work", metavar="DIR", help="keep the models there, and use those that this version left")
    found.add_argument("--peers", metavar="DIR", default=str(ROOT / "build" / "peers"), help="environment of llama.cpp")
    return found
