"""Run onnxsim in a process of its own, because its C++ core ends the whole process on some models.

The process starts with the first model and serves all later ones, so that importing onnxsim, which takes seconds, is
paid for once; it ends with this process. On a pipe, a request is a line of JSON with the number of bytes of the model,
and then the model; so is an answer.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import IO, Any

import onnx


class OnnxsimError(Exception):
    """Say what onnxsim raised, or how its process died."""


class _Death(OnnxsimError):
    """Say how the process died; another one must be started."""


class _Process:
    """The process that serves this one, and the models that cross to it one after another."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - it lives as long as the process
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        path = os.pathsep.join(item for item in sys.path if item)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, proto: onnx.ModelProto, options: Mapping[str, Any]) -> tuple[onnx.ModelProto, bool]:
        """Return what onnxsim makes of a model, and whether it calls that valid."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _write(self._process.stdin, {"options": dict(options)}, proto.SerializeToString())
            answer, data = _read(self._process.stdout)
        except (OSError, EOFError):
            raise _Death(self._death()) from None
        if "error" in answer:
            raise OnnxsimError(answer["error"])
        return onnx.ModelProto.FromString(data), bool(answer["valid"])

    def close(self) -> None:
        """End the process; the parent's copy only, if a fork made this one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        if self.owner == os.getpid():
            self._process.wait()
        self.log.close()

    def _death(self) -> str:
        code = self._process.wait()
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["it printed nothing"])[-1]
        return f"the death of its process (exit code {code}): {last}"


_LOCK = threading.Lock()
_RUNNING: list[_Process] = []


def simplified(proto: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, bool]:
    """Return what `onnxsim.simplify` makes of a model with these options, and whether it calls that valid.

    Raises:
        OnnxsimError: If onnxsim raises, or ends its process; the next model gets a new one.
    """
    with _LOCK:
        if _RUNNING and _RUNNING[0].owner != os.getpid():
            _stop()
        if not _RUNNING:
            _RUNNING.append(_Process())
        try:
            return _RUNNING[0].ask(proto, options)
        except BaseException as error:
            # After an interrupt, too: an answer to this model may still come, and would be taken for that to the next.
            if isinstance(error, _Death) or not isinstance(error, OnnxsimError):
                _stop()
            raise


@atexit.register
def _stop() -> None:
    while _RUNNING:
        _RUNNING.pop().close()


def _write(stream: IO[bytes], head: Mapping[str, Any], data: bytes) -> None:
    stream.write(json.dumps({**head, "size": len(data)}).encode() + b"\n" + data)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    data = stream.read(head["size"])
    if len(data) < head["size"]:
        raise EOFError
    return head, data


def serve() -> None:
    """Answer models on the standard streams until they end; whatever libraries print goes to stderr."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # onnxsim copies the operators that it does not know from onnx in every call; the first call copies all there are.
    knows_operators = False
    while True:
        try:
            head, data = _read(requests)
        except EOFError:
            return
        try:
            import onnxsim  # type: ignore[import-untyped]

            proto = onnx.ModelProto.FromString(data)
            made, valid = onnxsim.simplify(proto, import_custom_schemas=not knows_operators, **head["options"])
            knows_operators = True
            _write(answers, {"valid": bool(valid)}, made.SerializeToString())
        except Exception as error:  # onnxsim raises whatever its C++ core, the checker or onnxruntime raise
            _write(answers, {"error": f"{type(error).__name__}: {error}"}, b"")
