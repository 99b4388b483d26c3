"""The command line: parsing, help and exit codes. Commands live in `passopt.commands` and are imported when called.

Results go to stdout, logs and progress to stderr. Exit 0 ok, 1 check failed, 2 usage or input, 3 pass error,
4 expectation unmet, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from passopt import __version__
from passopt.ir.errors import PassoptError, UsageError

_INTERRUPTED = 128 + signal.SIGINT

#: Which extra brings a package; `export` brings all others.
_EXTRAS = {
    "onnx_graphsurgeon": "guests",
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
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)

    def say(message: str) -> None:
        print(f"passopt {options.command}: {message}", file=sys.stderr)

    try:
        command = importlib.import_module(f"passopt.commands.{options.module}")
        code: int = getattr(command, options.function)(options)
    except PassoptError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        writes = getattr(options, "output", None) is not None
        say(str(interrupt) or ("interrupted; nothing half-written was kept" if writes else "interrupted"))
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name), "export")
        say(f"needs {error.name}, which is not installed; pip install 'passopt[{extra}]' brings it")
        return UsageError.exit_code
    except BrokenPipeError:
        # The reader of stdout went away (`| head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"{error.filename or 'a file'}: {error.strerror or error}")
        return UsageError.exit_code
    return code


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("passopt", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"passopt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, module: str, summary: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=raw
        )
        command.set_defaults(module=module, function=_FUNCTIONS.get(name, name.replace("-", "_")))
        return command

    _add_export(add)
    _add_run(add)
    _add_verify(add)
    _add_looking(add)
    _add_why(add)
    _add_replay(add)
    _add_compile(add)
    _add_generate(add)
    return parser


#: Commands whose names are Python's own.
_FUNCTIONS = {"print": "print_", "compile": "compile_"}


def _positive(text: str) -> int:
    return _whole(text, 1, "is not a positive number")


def _count(text: str) -> int:
    return _whole(text, 0, "is negative")


def _whole(text: str, least: int, complaint: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} {complaint}")
    return number


_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _size(text: str) -> int:
    """Bytes of `1GiB`, `750MB`, `1073741824`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text}: not a size; write it like 1GiB, 750MB or 1073741824")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no memory at all")
    return size


def _add_streaming(command: Any) -> None:
    """Options of commands that write weights."""
    command.add_argument("--memory", type=_size, metavar="SIZE", help="of the whole process (default: 1GiB)")
    command.add_argument(
        "--workers", type=_positive, metavar="N", help="threads that write weights (default: two per core, at most 8)"
    )


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a tolerance")
    return number


def _add_export(add: Any) -> None:
    command = add(
        "export",
        "export",
        "Export a stock Hugging Face checkpoint, its code unmodified, to model.onnx.",
        "passopt export Baichuan2-7B-Base -o baichuan2 --dtype fp16 --trust-remote-code",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, code and weights")
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="new folder for model.onnx and weights")
    command.add_argument("--dtype", choices=["fp16", "fp32", "bf16"], default="fp16", help="default: %(default)s")
    command.add_argument(
        "--alibi", choices=["formula", "baked"], default="formula", help="ALiBi as slopes or as mask constant"
    )
    command.add_argument("--opset", type=int, choices=range(18, 24), help=_OPSET_HELP, metavar="N")
    command.add_argument("--exporter", choices=["dynamo", "torchscript"], default="dynamo", help=_EXPORTER_HELP)
    command.add_argument("--attention", choices=["eager", "sdpa"], help=_ATTENTION_HELP)
    command.add_argument("--phase", choices=["merged", "prefill", "decode"], default="merged", help=_PHASE_HELP)
    command.add_argument("--weights", choices=["copy", "reference"], default="copy", help=_WEIGHTS_HELP)
    command.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own Python files")
    command.add_argument("--no-self-check", action="store_true", help="skip the comparison with eager torch")
    _add_streaming(command)

    command = add(
        "materialize",
        "export",
        "Write out a model whose weights are a plan (--weights=reference, --dump-dir), self-contained.",
        "passopt materialize dump/03-shard -o model.sharded",
    )
    command.add_argument("model", metavar="DIR", help="folder with model.onnx and weights.plan.json")
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="new folder")
    _add_streaming(command)


_OPSET_HELP = "18 to 23, default 21 (torchscript: ≤ 20); int8 of 16-bit weights needs 19"
_EXPORTER_HELP = "of torch (default: %(default)s); torchscript runs the model once, in about the memory of its weights"
_ATTENTION_HELP = "which implementation of transformers is traced (default: eager; not for code of the checkpoint)"
_PHASE_HELP = "one graph for everything, or for a prefill without past, or for single tokens (default: %(default)s)"
_EACH_HELP = "structure after every pass, or each rewrite by sampled numbers (default: %(default)s)"
_WEIGHTS_HELP = "copy them into the output, or only refer to where they lie (default: %(default)s)"


_EMIT_HELP = "text: only the canonical text, on stdout; nothing is written (default: %(default)s)"


def _add_run(add: Any) -> None:
    command = add(
        "run",
        "run",
        "Run a pipeline of passes over a model and write the result: one folder per rank if it is sharded.",
        "passopt run model.onnx --passes 'tp{degree=4},int8' --time-passes",
    )
    command.add_argument("model", metavar="MODEL", help="model.onnx, its folder, or graph.onnxtxt")
    command.add_argument("--passes", metavar="PIPELINE", required=True, help="such as tp,int8 (see passopt list)")
    command.add_argument("-o", "--output", metavar="DIR", help="default: beside the model, named by the pipeline")
    command.add_argument("--emit", choices=["files", "text"], default="files", help=_EMIT_HELP)
    command.add_argument("--weights", choices=["copy", "reference"], default="copy", help=_WEIGHTS_HELP)
    command.add_argument("--verify-each", choices=["off", "structure", "numeric"], default="structure", help=_EACH_HELP)
    command.add_argument("--print-after", metavar="PASS", nargs="?", const="", action="append", help="all, if no PASS")
    command.add_argument("--print-after-change", action="store_true", help="print after passes that changed the text")
    command.add_argument("--dump-dir", metavar="DIR", help="save the model after every pass, without its weights")
    command.add_argument("--time-passes", action="store_true", help="CPU time per pass")
    command.add_argument(
        "--stats", choices=["table", "json"], nargs="?", const="table", help="per rule: tries, hits, declines, CPU time"
    )
    command.add_argument("--stop-after", metavar="PASS", help="end the pipeline at the first PASS, and write that")
    command.add_argument(
        "--rewrite-limit", type=_count, metavar="N", help="apply the first N rewrites only; a whole-graph pass is one"
    )
    command.add_argument("--expect", metavar="PASS==N", action="append", default=[], help="exit 4 if it does not hold")
    command.add_argument("--reproducer", metavar="DIR", help="if a pass fails (default: beside the output)")
    command.add_argument("--dry-run", action="store_true", help="write nothing; print the exact bytes of the output")
    _add_streaming(command)
    command.add_argument("--json", action="store_true", help="the result as JSON")


def _add_verify(add: Any) -> None:
    command = add(
        "verify",
        "verify",
        "Compare two models in onnxruntime: prefill, left padding, decode with cache, chunked prefill.",
        "passopt verify model.onnx model.tp2.int8 --text corpus.txt",
    )
    command.add_argument("reference", metavar="A", help="the original: model.onnx or a folder")
    command.add_argument(
        "candidate", metavar="B", help="the result: model.onnx, a folder, a folder of ranks, or a compiled folder"
    )
    command.add_argument("--text", metavar="FILE", help="also compare perplexity on this text")
    command.add_argument(
        "--tokenizer", metavar="PATH", help="a folder, tokenizer.json or tokenizer.model; default: beside A"
    )
    command.add_argument("--max-tokens", type=_positive, default=2048, help="of the text (default: %(default)s)")
    command.add_argument("--tolerance", type=_tolerance, help="largest relative error; default by dtype")
    command.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    command.add_argument(
        "--max-positions",
        type=_positive,
        help="longest sequence to run; default: the length of the tables of positions",
    )
    command.add_argument("--layerwise", action="store_true", help="one decoder layer at a time, in little memory")
    command.add_argument("--json", action="store_true", help="the report as JSON")


def _add_looking(add: Any) -> None:
    command = add("list", "look", "List passes and named pipelines with their options.", "passopt list --json")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command = add(
        "new-pass",
        "new_pass",
        "Write a new pass and its tests, which run at once: in a checkout of passopt, or as a package of its own.",
        "passopt new-pass fuse-silu",
    )
    command.add_argument("name", metavar="NAME", help="verb-object, such as fuse-silu")
    command.add_argument("--directory", metavar="DIR", help="default: this checkout, or a new folder called NAME")
    command.add_argument(
        "--room", metavar="ROOM", help="folder of passes/ in a checkout (default: by the verb of NAME)"
    )
    command = add(
        "explain",
        "explain",
        "Show what a pass or a pipeline is for: options, what it looks for and what it makes, where it declines.",
        "passopt explain fuse-rms-norm",
    )
    command.add_argument("name", metavar="PASS", help="a pass or a named pipeline")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command = add(
        "print", "look", "Print the canonical text of a model; equal layers are shown once.", "passopt print model.onnx"
    )
    command.add_argument("model", metavar="MODEL", help="model.onnx or a folder")
    command.add_argument("--no-fold", action="store_true", help="print every layer")
    command.add_argument("--canonical", action="store_true", help="name values by operator and place")
    command.add_argument("--provenance", action="store_true", help="which passes made each node, of what, and where")
    command.add_argument("--json", action="store_true", help="the provenance as JSON, every layer")
    command = add(
        "plan", "look", "Show legal tensor-parallel degrees and what blocks others.", "passopt plan model.onnx"
    )
    command.add_argument("model", metavar="MODEL", help="model.onnx or a folder")
    command.add_argument("--json", action="store_true", help="the same as JSON")


def _add_replay(add: Any) -> None:
    command = add(
        "replay",
        "replay",
        "Run the failing pass of a reproducer again: exit 1 if it still fails, 0 if it does not.",
        "passopt replay model.int8.reproducer",
    )
    command.add_argument("directory", metavar="DIR", help="what passopt run left where a pass failed")


def _add_compile(add: Any) -> None:
    command = add(
        "compile",
        "compile",
        "Compile a fused model, or the models of all ranks, to native code, weights laid out for its kernels.",
        "passopt compile model.onnx --passes baichuan2,slice-last-token,int8 -o compiled",
    )
    command.add_argument("model", metavar="MODEL", help="model.onnx, its folder, or a folder of ranks")
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="new folder for code and weights")
    command.add_argument("--passes", metavar="PIPELINE", help="run these first, in memory")
    command.add_argument("--target", choices=["llvm", "cuda"], default="llvm", help="default: %(default)s")
    command.add_argument("--arch", default="sm_80", help="of a GPU, for cuda (default: %(default)s)")
    command.add_argument("--mcpu", default="native", help="LLVM's name of a CPU (default: this machine's)")
    command.add_argument("--allow-fallback", action="store_true", help="where there is no native kernel, TVM's own")
    command.add_argument("--print-after", metavar="STEP", nargs="?", const="", action="append", help="all, if no STEP")
    command.add_argument("--json", action="store_true", help="the report as JSON")
    _add_streaming(command)


def _add_why(add: Any) -> None:
    command = add(
        "why",
        "why",
        "Explain where the rules of a pass came near and what kept them from matching, nearest first.",
        "passopt why fuse-attention model.onnx --in baichuan2",
    )
    command.add_argument("name", metavar="PASS", help="with its options, such as quantize-weights{head=true}")
    command.add_argument("model", metavar="MODEL", help="model.onnx or its folder; it is not changed")
    command.add_argument("--node", metavar="NAME", help="explain all rules at this node, or the node of this value")
    command.add_argument("--after", metavar="PIPELINE", help="run these passes first")
    command.add_argument("--in", dest="pipeline", metavar="PIPELINE", help="run what stands before PASS in it first")
    command.add_argument(
        "--limit", type=_count, default=4, metavar="K", help="kinds shown, 0 all (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="everything, as JSON")


_GENERATE_EXAMPLES = """passopt generate baichuan2.lib --prompt 'The lexical structure of' --max-new-tokens 64 --stream
  passopt generate baichuan2.lib --chat --prompt 'What is a compiler?' --temperature 0.3 --seed 1
  passopt generate baichuan2.lib --prompt-file questions.txt --chat --greedy --json
  echo '5 17 203' | passopt generate baichuan2.lib --ids"""


def _add_generate(add: Any) -> None:
    command = add(
        "generate",
        "generate",
        "Continue prompts by a compiled model. Text on stdout; tokens/s, time to first token and memory on stderr.",
        _GENERATE_EXAMPLES,
    )
    command.add_argument("directory", metavar="DIR", help="what passopt compile has written")
    command.add_argument("--prompt", metavar="TEXT", action="append", help="may be repeated; default: stdin")
    command.add_argument("--prompt-file", metavar="FILE", help="one prompt per line")
    command.add_argument("--messages", metavar="FILE", help='a conversation: JSON list of {"role": …, "content": …}')
    command.add_argument("--chat", action="store_true", help="prompts are questions, in the model's chat format")
    command.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    command.add_argument(
        "--ids", action="store_true", help="token ids, separated by spaces, instead of text: in and out"
    )
    command.add_argument("--max-new-tokens", type=_positive, metavar="N", help=_DEFAULT_HELP)
    command.add_argument(
        "--greedy", action="store_true", help="always the most likely token; no penalty unless you ask for one"
    )
    command.add_argument("--temperature", type=float, metavar="T", help="sample; smaller is closer to greedy")
    command.add_argument("--top-k", type=_count, metavar="K", help="sample from the K most likely tokens; 0: all")
    command.add_argument("--top-p", type=float, metavar="P", help="sample from those that together have probability P")
    command.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: less of what was said already")
    command.add_argument("--seed", type=int, metavar="N", help="sample, the same every time")
    command.add_argument("--stream", action="store_true", help="print while tokens come")
    command.add_argument("--threads", type=_positive, metavar="N", help="default: the cores of this machine")
    command.add_argument("--capacity", type=_positive, metavar="N", help="columns of the cache; default: as needed")
    command.add_argument(
        "--verify-weights", action="store_true", help="hash all weights again (default: once per file)"
    )
    command.add_argument(
        "--copy-weights",
        action="store_true",
        help="copy weights to memory, instead of mapping the file: faster where the page cache lies on another NUMA "
        "node, as in some virtual machines, but shared with no other process",
    )
    command.add_argument("--json", action="store_true", help="ids, text and figures as JSON")


_DEFAULT_HELP = "default: generation_config.json's, as for all of sampling; without one 256, greedy"


if __name__ == "__main__":
    sys.exit(main())
