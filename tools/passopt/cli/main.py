"""Run the command line: find the command, call it, and turn errors into messages and exit codes.

Results go to stdout, messages and progress to stderr. The exit code is 0 for success, 1 for a check that failed, 2 for
wrong usage or input, 3 for an error of a pass or a defect of passopt, 4 for an expectation that does not hold, and 130
for an interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from passopt.ir.errors import PassoptError, PluginWarning, UsageError
from passopt.ir.version import __version__
from passopt.terminal.flags import flags_of, with_flags

_INTERRUPTED = 128 + signal.SIGINT

#: The modules of `passopt.commands`, in the order of the help. Each has SUMMARY, EXAMPLE, add_arguments and main.
COMMANDS = (
    "export",
    "materialize",
    "calibrate",
    "run",
    "export-checkpoint",
    "verify",
    "eval",
    "list",
    "new-pass",
    "explain",
    "print",
    "plan",
    "why",
    "replay",
    "compile",
    "generate",
)

#: The extra of passopt that installs a package, by the name of its module.
_EXTRAS = {
    "accelerate": "export",
    "onnxscript": "export",
    "torch": "export",
    "transformers": "export",
    "jinja2": "run",
    "numba": "fast",
    "onnx_graphsurgeon": "guests",
    "gguf": "gguf",
    "onnxsim": "guests",
    "sentencepiece": "run",
    "tokenizers": "run",
    "tvm": "run",
    "tvm_ffi": "run",
}

_DESCRIPTION = "Ordered graph passes for ONNX graphs of language models."
_EPILOG = """examples:
  passopt export Baichuan2-13B-Chat -o baichuan2 --trust-remote-code
  passopt run baichuan2/model.onnx --passes 'tp{degree=4},int8'
  passopt verify baichuan2 baichuan2/model.tp4.int8
  passopt list
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `passopt`; None for those of the process.

    Returns:
        The exit code.
    """
    commands = parser()
    options = commands.parse_args(arguments)
    options.flags = flags_of(commands, options.command)

    def say(message: str) -> None:
        print(f"passopt {options.command}: {with_flags(message, options.flags)}", file=sys.stderr)

    try:
        with _plugin_warnings_as_lines(say):
            code: int = options.main(options)
    except KeyboardInterrupt as interrupt:
        writes = getattr(options, "output", None) is not None
        say(str(interrupt) or ("interrupted; nothing half-written was kept" if writes else "interrupted"))
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone, as in `| head`. Without this, Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message, code = _described(error)
        say(message)
        if options.traceback:
            traceback.print_exception(error, file=sys.stderr)
    return code


def _described(error: Exception) -> tuple[str, int]:
    """Return what to say of an error that ended a command, and the exit code."""
    if isinstance(error, PassoptError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return _missing(error), UsageError.exit_code
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {error}' if str(error) else ''}", UsageError.exit_code
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", UsageError.exit_code
    file, line, function, _ = traceback.extract_tb(error.__traceback__)[-1]
    defect = f"{type(error).__name__}: {error}, at {file}:{line} in {function}"
    advice = "Please report it with the command, the input, and what --traceback adds"
    return f"a defect of passopt: {defect}. {advice}", PassoptError.exit_code


@contextlib.contextmanager
def _plugin_warnings_as_lines(say: Callable[[str], None]) -> Iterator[None]:
    """Say every warning about a plug-in in one line and once; other warnings are shown as ever."""
    said: set[str] = set()
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, PluginWarning):
                shown(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                say(f"warning: {message}")

        warnings.simplefilter("always", PluginWarning)
        warnings.showwarning = show
        yield


def _missing(error: ModuleNotFoundError) -> str:
    """Return what to install: an extra of passopt only for packages that it brings."""
    package = (error.name or "").partition(".")[0]
    if not package:
        return f"needs a package that is not installed: {error}"
    extra = _EXTRAS.get(package)
    source = f"'passopt[{extra}]' brings it" if extra else f"{package}, or the package that has this module"
    return f"needs {error.name}, which is not installed; pip install {source}"


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Importing a command imports neither onnx nor numpy; only calling it does.
    """
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser("passopt", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    found.add_argument("--version", action="version", version=f"passopt {__version__}")
    commands = found.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"passopt.commands.{name.replace('-', '_')}")
        examples = f"example{'s' if chr(10) in module.EXAMPLE else ''}:\n  {module.EXAMPLE}"
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, epilog=examples, formatter_class=raw
        )
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="print the Python traceback of an error, too")
        command.set_defaults(main=module.main)
    return found


if __name__ == "__main__":
    sys.exit(main())
