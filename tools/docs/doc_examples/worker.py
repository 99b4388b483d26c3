"""Run the Python blocks of one page, in a process of its own: requests as JSON lines on one pipe, answers on another.

A request is `{"source": …, "name": …, "folder": …}`; the answer is `{"outputs": [[start, end, text], …], "error": …}`,
with an output for the whole block, or one for each `>>>` example of it. Start and end are offsets into the source.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import linecache
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Send the standard streams to a file, also those of native code and of child processes."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

        def text() -> str:
            sys.stdout.flush()
            sys.stderr.flush()
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def run_block(source: str, name: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run statements; an exception is an error, with its traceback."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    error = None
    with captured() as text:
        try:
            exec(compile(source, name, "exec"), namespace)
        except BaseException:
            error = traceback.format_exc()
        output = text()
    return {"outputs": [[0, 0, output]], "error": error}


def run_session(source: str, name: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run `>>>` examples; an exception is output, as in an interactive session."""
    outputs = []
    lines = source.splitlines(keepends=True)
    for example in doctest.DocTestParser().get_examples(source):
        first = example.lineno + example.source.count("\n")
        start = sum(map(len, lines[:first]))
        end = start + sum(map(len, lines[first : first + example.want.count("\n")]))
        with captured() as text:
            try:
                exec(compile(example.source, name, "single"), namespace)
            except BaseException as error:
                message = "".join(traceback.format_exception_only(error))
                print(f"Traceback (most recent call last):\n{message}", end="")
            outputs.append([start, end, text()])
    return {"outputs": outputs, "error": None}


def main() -> None:
    """Answer requests until their pipe is closed."""
    requests, answers = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[1:], "rw"))
    sys.path[0] = ""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in requests:
        request = json.loads(line)
        os.chdir(request["folder"])
        run = run_session if request["source"].lstrip().startswith(">>>") else run_block
        answers.write(json.dumps(run(request["source"], request["name"], namespace)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
