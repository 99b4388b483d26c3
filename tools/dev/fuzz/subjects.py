"""Make the folders that are damaged, each with the commands that read them."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

#: In the words of a command: the damaged copy, the whole original beside it, and a folder that is not there yet.
MODEL, WHOLE, OUT = "{model}", "{whole}", "{out}"

_PIPELINES = (
    "dead-code",
    "canonicalize,fold-constants,cse",
    "fuse",
    "tp",
    "int8",
    "cast{dtype=fp16}",
    "legalize{opset=23}",
    "legalize{opset=18}",
    "inline-functions,simplify",
    "baichuan2,tp{degree=3,pad=true},int8{activations=dynamic,head=true}",
)

#: Commands that take a model.
OF_MODELS = (
    ("print", MODEL),
    ("print", MODEL, "--canonical", "--no-fold"),
    ("print", MODEL, "--provenance"),
    ("why", "fuse-attention", MODEL),
    ("why", "fold-constants", MODEL, "--json"),
    ("why", "shard", MODEL),
    ("plan", MODEL, "--json"),
    ("run", MODEL, "--passes", "dead-code", "--emit", "text"),
    ("run", MODEL, "--passes", "int8,tp", "--dry-run", "--json"),
    ("run", MODEL, "--passes", "dead-code", "--weights", "reference", "-o", OUT),
    ("run", MODEL, "--passes", "canonicalize", "--verify-each", "numeric", "-o", OUT),
    *(("run", MODEL, "--passes", passes, "-o", OUT) for passes in _PIPELINES),
    ("verify", WHOLE, MODEL),
    ("verify", MODEL, WHOLE, "--json"),
    ("verify", WHOLE, MODEL, "--layerwise"),
    ("eval", WHOLE, MODEL, "--text", __file__, "--window", "16", "--max-tokens", "64"),
    ("generate", MODEL, "--ids", "--prompt", "3 4 5"),
    ("materialize", MODEL, "-o", OUT),
    ("replay", MODEL),
)
_COMPILE = (
    ("compile", MODEL, "-o", OUT, "--passes", "fuse", "--allow-fallback"),
    ("compile", MODEL, "-o", OUT, "--target", "cuda"),
)
_OF_LIBRARIES = (
    ("generate", MODEL, "--ids", "--prompt", "3 4 5", "--max-new-tokens", "3"),
    ("generate", MODEL, "--prompt", "of the", "--max-new-tokens", "3", "--copy-weights"),
    ("generate", MODEL, "--prompt", "of the", "--chat", "--max-new-tokens", "3", "--verify-weights"),
    ("verify", WHOLE, MODEL),
    ("print", MODEL),
)
_OF_CHECKPOINTS = (
    ("export", MODEL, "-o", OUT, "--trust-remote-code"),
    ("export", MODEL, "-o", OUT, "--trust-remote-code", "--dtype", "fp32", "--no-check"),
    ("print", MODEL),
)

_GRAPHS = {
    "mlp": """<ir_version: 10, opset_import: ["" : 21]>
        g (float[batch,6] x) => (float[batch,5] y) <float[6,12] up = random, float[12,5] down = random> {
            h = MatMul(x, up)
            s = Sigmoid(h)
            a = Mul(h, s)
            n = MatMul(a, down)
            shape = Shape(x)
            first = Gather<axis = 0>(shape, index)
            five = Constant<value_ints = [5]>()
            target = Concat<axis = 0>(first, five)
            r = Reshape(n, target)
            y = Softmax<axis = -1>(r)
        }""",
    "bodies": """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[3,n] x, bool c) => (float[3,n] y, float[3,n] z) <float[3,1] w = random> {
            y = If (c) <
                then_branch = yes () => (float[3,n] t) { t = Mul(x, w) },
                else_branch = no () => (float[3,n] e) { e = own.twice(x) }
            >
            z = Where(c, x, y)
        }
        <domain: "own", opset_import: ["" : 21]>
        twice (a) => (b) { b = Add(a, a) }""",
    "quantized": """<ir_version: 10, opset_import: ["" : 21]>
        g (float[batch,4] x) => (float[batch,3] y)
        <int8[4,3] codes = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] scales = {0.5, 0.25, 2}> {
            w = DequantizeLinear<axis = 1>(codes, scales)
            y = MatMul(x, w)
        }""",
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A folder to damage.

    Attributes:
        name: Its name.
        make: Writes the folder.
        commands: The commands that read it, as words.
        whole: The name of the subject that `verify` compares with.
    """

    name: str
    make: Callable[[Path], None]
    commands: Sequence[Sequence[str]]
    whole: str = ""

    def command(self, chance: random.Random, model: Path, whole: Path, out: Path) -> list[str]:
        """Return one of the commands, with the paths filled in."""
        places = {MODEL: str(model), WHOLE: str(whole), OUT: str(out)}
        return [places.get(word, word) for word in chance.choice(self.commands)]


def subjects(*, compiler: bool, exporter: bool) -> dict[str, Subject]:
    """Return the subjects by name.

    Args:
        compiler: Compile models too, which takes seconds for each.
        exporter: Export checkpoints too, which takes longer still.
    """
    commands = (*OF_MODELS, *_COMPILE) if compiler else OF_MODELS
    found = [
        *(Subject(name, _graph(name), commands) for name in _GRAPHS),
        Subject("text", _text, commands),
        Subject("external", _external, commands),
        Subject("decoder", _decoder, commands),
        Subject("ranks", _ranks, commands, "decoder"),
        Subject("reference", _reference, commands, "decoder"),
        Subject("reproducer", _reproducer, (("replay", MODEL), ("print", MODEL)) * 3 + tuple(commands[:4])),
    ]
    if compiler:
        found.append(Subject("library", _library, _OF_LIBRARIES, "decoder"))
    if exporter:
        found.append(Subject("checkpoint", _checkpoint, _OF_CHECKPOINTS))
    return {item.name: item for item in found}


def _graph(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import onnx_ir

        from passopt.testing.checking import read_model

        onnx_ir.save(read_model(_filled(_GRAPHS[name])), folder / "model.onnx")

    return make


def _filled(text: str) -> str:
    """Complete the graph whose constants are written as such."""
    return text.replace("down = random>", "down = random, int64[1] index = {0}>")


def _text(folder: Path) -> None:
    from passopt.ir.serialization.text import print_model
    from passopt.testing.checking import read_model

    (folder / "graph.onnxtxt").write_text(print_model(read_model(_filled(_GRAPHS["mlp"]))), encoding="utf-8")


def _external(folder: Path) -> None:
    """Write a model whose weights lie in one file as onnx writes it."""
    import onnx
    import onnx_ir

    from passopt.testing.decoders import tiny_decoder

    proto = onnx_ir.to_proto(tiny_decoder())
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)


def _decoder(folder: Path) -> None:
    """Write an output of passopt with all that lies beside one."""
    from passopt.ir.serialization.model_files import save_materialized
    from passopt.testing.decoders import tiny_decoder

    save_materialized(tiny_decoder(), folder)
    _companions(folder)
    _letters(folder)


def _companions(folder: Path) -> None:
    from passopt.testing.checkpoints import ROTARY, make_checkpoint

    other = folder.parent / f"{folder.name}.companions"
    make_checkpoint(other, ROTARY, weights=False)
    for item in other.iterdir():
        if item.suffix in {".json", ".model"}:
            shutil.copy(item, folder / item.name)
    shutil.rmtree(other)


def _letters(folder: Path) -> None:
    """Write a tokenizer whose tokens are letters, as few as the decoder has."""
    import tokenizers

    vocab = {letter: index for index, letter in enumerate(["<unk>", *"\n abcdefghijklmnopqrstuvwxyz"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))


def _ranks(folder: Path) -> None:
    _run(folder, "tp{degree=3,pad=true}")


def _reference(folder: Path) -> None:
    _run(folder, "tp{degree=3,pad=true},int8", weights="reference")


def _run(folder: Path, passes: str, **settings: str) -> None:
    """Run passes on the decoder, which stays beside the result."""
    import passopt

    folder.rmdir()
    passopt.run(folder.parent / "decoder", passes, folder, **settings)  # type: ignore[arg-type]


def _reproducer(folder: Path) -> None:
    from passopt.ir.errors import PassError
    from passopt.passes.pipeline.text import resolve
    from passopt.testing.decoders import tiny_decoder
    from passopt.verification.reproducer import write_reproducer

    folder.rmdir()
    write_reproducer(folder, tiny_decoder(), resolve("fuse").passes, PassError("an error"), "structure")


def _library(folder: Path) -> None:
    import passopt

    folder.rmdir()
    passopt.compile(folder.parent / "decoder", folder, passes="fuse", allow_fallback=True)


def _checkpoint(folder: Path) -> None:
    from passopt.testing.checkpoints import ROTARY, make_checkpoint

    folder.rmdir()
    make_checkpoint(folder, ROTARY)
