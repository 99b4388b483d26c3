"""Measure compiled models against onnxruntime, torch, llama.cpp and the machine; write docs/measured/bench-tvm.md.

If options leave out a part of the measurement, the page is written to build/bench-tvm.md.

    python tools/bench compiled [OUTPUT] [--quick] [--only NAME ...] [--layers N] [--threads 1,2] …

One candidate at a time is measured, each in processes of its own. This takes an hour and a half and 65 GB of disk; with
--quick it takes some minutes.
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

from compiled.options import is_partial, parser
from compiled.other_load import Watch
from compiled.report import LIMITS, Run, report
from compiled.shapes import LAYERS, PASTS, PREFILLS, WHOLE, WHOLE_LABEL, Shape

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ROOT / "tools" / "bench" / "compiled"
WHOLE_REPORT, PARTIAL = ROOT / "docs" / "measured" / "bench-tvm.md", ROOT / "build" / "bench-tvm.md"
PEERS = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
#: Seconds after which a process is stopped, and its candidate has failed.
TIMEOUT = 900
#: If other programs use more than this share of the machine while a candidate runs, it is launched again.
DISTURBED = 0.1
#: A launch that took more seconds than this is not repeated, even if it was disturbed.
PATIENCE = 45.0
#: A candidate whose first measurement took more seconds than this is not launched again in later rounds.
SLOW = 90.0
#: Environment variables that make glibc's and torch's allocators take large memory in huge pages.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A runtime in one form that is measured.

    Attributes:
        name: The name in the tables.
        program: The runtime: passopt, onnxruntime, torch, llama or machine.
        variant: The form of the runtime, such as its number type, as the program calls it.
        width: Bytes that a weight takes.
        whole: Measure the whole model too, and not only layers.
        mapped: Leave the weights in the page cache, wherever that lies, instead of in memory of the process. Only
            decode shows the difference, so prefill is not measured.
    """

    name: str
    program: str
    variant: str
    width: float
    whole: bool = True
    mapped: bool = False

    @property
    def quick(self) -> bool:
        """Return whether a long prefill of the whole model takes seconds instead of minutes, even on one thread."""
        return self.variant in {"W8A8", "W8A8 fp16", "W8A8 int8-cache", "dynamic", "integer"}

    @property
    def folder(self) -> str:
        """Return the folder's name; two candidates of onnxruntime have the same weights and share one."""
        variant = "dynamic" if self.variant == "integer" else self.variant
        return f"{self.program}-{variant}".replace(" ", "")


CANDIDATES = (
    Candidate("passopt fp32", "passopt", "fp32", 4, whole=False),
    Candidate("passopt int8", "passopt", "int8", 1),
    Candidate("passopt W8A8", "passopt", "W8A8", 1),
    Candidate("passopt W8A8, mapped", "passopt", "W8A8", 1, mapped=True),
    Candidate("passopt W8A8, fp16 cache", "passopt", "W8A8 fp16", 1),
    Candidate("passopt W8A8, int8 cache", "passopt", "W8A8 int8-cache", 1),
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
    """The points to measure, for each number of threads: lengths of prompts, and numbers of tokens in the cache.

    Each point is repeated for about `seconds`.
    """

    threads: tuple[int, ...]
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A candidate in a shape; the first of `plans` is measured in every round, the others in the first one only."""

    candidate: Candidate
    shape: Shape
    plans: Sequence[Points]


class Bench:
    """Measure candidates one by one, knowing where models and other runtimes lie, and collect the results."""

    def __init__(self, work: Path, peers: Path, options: argparse.Namespace) -> None:
        self.work, self.peers, self.options = work, peers, options
        self.threads = tuple(int(item) for item in options.threads.split(","))
        self.candidates = [item for item in CANDIDATES if self._wanted(item.name)]
        self.run = Run(threads=self.threads)

    def _wanted(self, name: str) -> bool:
        return not self.options.only or any(part.lower() in name.lower() for part in self.options.only)

    # Processes.

    def python(self, program: str) -> Path:
        """Return the Python interpreter of a runtime; llama.cpp has an environment of its own."""
        return self.peers / "bin" / "python" if program == "llama" else Path(sys.executable)

    def call(self, task: str, candidate: Candidate, job: dict[str, Any]) -> dict[str, Any]:
        """Write or measure (`task`) a candidate in a process of its own, and return the JSON that it prints.

        Raises Failure with the last line of its stderr, or if it takes longer than `TIMEOUT`.
        """
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
        """Install llama.cpp in an environment of its own if a candidate needs it, and build it if there is no wheel.

        If it does not install, the page says so and the others are measured.
        """
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
        """Measure the machine's read bandwidth and arithmetic; of several calls, the best result counts."""
        for threads in self.threads:
            result = self.call("measure", Candidate("", "machine", "", 0), {"threads": [threads], "seconds": 0.7})
            self.run.machine(threads, {name: best[0] for name in LIMITS if (best := result.get(f"{name} 0 {threads}"))})
        print(f"machine: {self.run.limits}", flush=True)

    def model(self, label: str, jobs: Sequence[Job], rounds: int) -> None:
        """Measure all candidates of one model, and launch each of them once per round.

        Launches are interleaved because the speed of a shared machine's memory varies, so all models are kept on disk.
        """
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
        """Remove what the candidates share, the checkpoint and its export, unless `--work` asks to keep the models."""
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
            # A launch that takes long is not repeated: the disturbance has averaged out within it.
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
        """Yield the job of each process: one per number of threads, or for llama.cpp one per kind of attention."""
        points: dict[str, Any] = {"prefill": plan.prefill, "decode": plan.decode}
        if candidate.program == "llama":
            # Filling the cache is slow, so one process measures all numbers of threads. The largest comes first.
            threads = sorted(plan.threads, reverse=True)
            yield {**points, "threads": threads, "flash": True}
            if not plan.decode and not shape.is_whole:
                yield {**points, "threads": threads, "flash": False}
            return
        for threads_ in plan.threads:
            yield {**points, "threads": [threads_]}

    # Models.

    def layers(self) -> None:
        """Measure decode in as many layers as fill 1 GiB; prefill in one, since it is slow and bound by arithmetic."""
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
        """Measure the whole model, which fits into memory in 8 bits only.

        Long prefills are timed in the first round only; where they are slow, only with the largest number of threads.
        """
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
    """Raise Failure if a process held less memory than its weights take; `held` comes from `Memory.held`.

    Then it kept equal weights only once, or left them in mapped files, which only a `mapped` candidate may do.
    """
    least = candidate.width * shape.read_parameters
    found = held["other"] + (held["mapped"] if candidate.mapped else 0)
    if found < least:
        kind = "or mapped files" if candidate.mapped else "of its own"
        raise Failure(
            f"held {found / 1e9:.2f} GB in memory {kind} besides its caches, but weights take {least / 1e9:.2f} GB"
        )


class Failure(Exception):
    """Raised when a process gives no result that can be used; the message says why."""


def main(arguments: Sequence[str]) -> None:
    """Measure what the options ask for and write the page; raise SystemExit if a candidate of passopt failed."""
    options = parser(__doc__).parse_args(arguments)
    # When it is asked to stop, it must still remove its models, which are tens of gigabytes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(options.work) if options.work else Path(tempfile.mkdtemp(prefix="passopt-bench-tvm-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, Path(options.peers), options)
    if is_partial(options):
        bench.run.notes.append(
            f'This page holds a part of the measurement only: `make bench-tvm BENCH="{shlex.join(arguments)}"`.'
        )
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
    output = Path(options.output or (PARTIAL if is_partial(options) else WHOLE_REPORT))
    output.parent.mkdir(exist_ok=True)
    bench.run.seconds = time.monotonic() - start
    output.write_text(report(bench.run), encoding="utf-8")
    print(f"→ {output} in {bench.run.seconds:.0f} s")
    failed = [f"{label}: {name}" for label, name in bench.run.failures() if name.startswith("passopt")]
    if failed:
        raise SystemExit(f"bench-tvm: {', '.join(failed)} failed")
