"""Draw the pictures of the documentation that show graphs and ideas; those of rooms are drawn by room_pictures.

    python tools/docs/graph_pictures.py [DIR]      (default: docs/pictures)

Data flows down. What a picture says is written here by hand, as lists of boxes and of arrows between them.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "docs"))

from layered import Layout, layered  # noqa: E402
from passopt.reporting.svg import SIZE, Picture, Point, Tone, width_of  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
_PAD, _HEAD = 24.0, 62.0


@dataclasses.dataclass(frozen=True)
class Graph:
    """A small graph.

    Attributes:
        title: What stands above it.
        boxes: Name → its lines and its colours. A box without lines shows its name.
        arrows: From upper to lower, such as `"x → Pow → ReduceMean"`; several in one text are separated by `;`.
    """

    title: str
    boxes: Mapping[str, tuple[Sequence[str], Tone]]
    arrows: str

    @property
    def edges(self) -> list[tuple[str, str]]:
        """The arrows as pairs."""
        chains = [[part.strip() for part in chain.split("→")] for chain in self.arrows.split(";")]
        return sorted({pair for chain in chains for pair in itertools.pairwise(chain)})

    def lines(self, name: str) -> Sequence[str]:
        """Return what is written in a box."""
        return self.boxes[name][0] or (name,)

    def sizes(self) -> dict[str, Point]:
        """Return the width and height of every box."""
        found = {}
        for name in self.boxes:
            lines = self.lines(name)
            width = max(width_of(line, SIZE if not index else SIZE - 1.5) for index, line in enumerate(lines))
            found[name] = (max(width + 24, 54.0), 14 + 16.5 * len(lines))
        return found


def side_by_side(title: str, graphs: Sequence[Graph], *, rise: float = 34.0) -> str:
    """Return a picture of several graphs beside each other.

    Args:
        title: What it shows.
        graphs: From left to right.
        rise: The distance of rows.
    """
    layouts = [layered(graph.sizes(), graph.edges, rise=rise, gap=16, from_top=True, widest=560) for graph in graphs]
    widths = [max(layout.width, width_of(graph.title) + 10) + 2 * _PAD for graph, layout in zip(graphs, layouts)]
    inner = max(layout.height for layout in layouts) + _HEAD - 10
    picture = Picture(title, sum(widths) + _PAD * (len(graphs) + 1), inner + 2 * _PAD)
    left = _PAD
    for graph, layout, width in zip(graphs, layouts, widths):
        picture.panel((left, _PAD), (width, inner))
        picture.text((left + width / 2, _PAD + 20), graph.title, bold=True)
        middle = (inner - 44 - layout.height) / 2
        _draw(picture, graph, layout, (left + (width - layout.width) / 2, _PAD + 38 + max(0.0, middle)))
        left += width + _PAD
    return picture.svg()


def _draw(picture: Picture, graph: Graph, layout: Layout, corner: Point) -> None:
    for way in layout.ways.values():
        picture.arrow([(x + corner[0], y + corner[1]) for x, y in way])
    sizes = graph.sizes()
    for name, (x, y) in layout.places.items():
        tone = graph.boxes[name][1]
        round_ = sizes[name][1] / 2 if tone == "value" else 5.0
        picture.box((x + corner[0], y + corner[1]), sizes[name], graph.lines(name), tone, round_=round_)


def _boxes(**tones: str) -> dict[str, tuple[Sequence[str], Tone]]:
    """Return boxes by colour: `old="Pow, Add|+ 1"` makes two; `|` begins a line, and `Add 2=Add` shows Add."""
    found: dict[str, tuple[Sequence[str], Tone]] = {}
    for tone, text in tones.items():
        for item in text.split(","):
            name, *lines = [part.strip() for part in item.split("|")]
            key, _, label = name.partition("=")
            found[key] = ((label or key, *lines), tone)  # type: ignore[assignment]
    return found


RMS_NORM = (
    Graph(
        "before: as exporters write it",
        _boxes(
            value="x, w, y",
            old="Pow|x², ReduceMean|over the last axis, Add|+ epsilon, Sqrt, Reciprocal, Mul, Mul 2=Mul|· w",
        ),
        "x → Pow → ReduceMean → Add → Sqrt → Reciprocal → Mul → Mul 2 → y; x → Mul; w → Mul 2",
    ),
    Graph(
        "after fuse-rms-norm",
        _boxes(value="x, w, y", new="RMSNormalization|epsilon"),
        "x → RMSNormalization → y; w → RMSNormalization",
    ),
)

ROTARY = (
    Graph(
        "before: rotate_half",
        _boxes(
            value="x|[b; heads; s; 2h], cos|[b; 1; s; 2h], sin|[b; 1; s; 2h], y",
            old="Slice|second half, Slice 2=Slice|first half, Neg, Concat, Mul|x · cos, Mul 2=Mul|· sin, Add",
        ),
        "x → Slice → Neg → Concat; x → Slice 2 → Concat → Mul 2 → Add → y; x → Mul → Add; cos → Mul; sin → Mul 2",
    ),
    Graph(
        "after fuse-rotary",
        _boxes(value="x, cos.half|[positions; h], sin.half|[positions; h], position_ids, y", new="RotaryEmbedding"),
        "x → RotaryEmbedding → y; cos.half → RotaryEmbedding; sin.half → RotaryEmbedding; "
        "position_ids → RotaryEmbedding",
    ),
)

ATTENTION = (
    Graph(
        "before",
        _boxes(
            value="q, past k, new k, past v, new v, mask, y, present k, present v",
            old="Concat, Concat 2=Concat, Transpose, MatMul|q · kᵀ, Mul|· scale, Add|+ mask, Softmax, "
            "MatMul 2=MatMul|· v",
        ),
        "past k → Concat; new k → Concat → Transpose → MatMul → Mul → Add → Softmax → MatMul 2 → y; q → MatMul; "
        "mask → Add; past v → Concat 2; new v → Concat 2 → MatMul 2; Concat → present k; Concat 2 → present v",
    ),
    Graph(
        "after fuse-attention",
        _boxes(
            value="q, new k, new v, mask, past k, past v, y, present k, present v",
            new="Attention|scale; the cache goes in and comes out",
        ),
        "q → Attention → y; new k → Attention; new v → Attention; mask → Attention; past k → Attention → present k; "
        "past v → Attention → present v",
    ),
)

ALIBI = (
    Graph(
        "before: a baked mask",
        _boxes(
            weight="mask|a constant [heads; n; n]",
            value="q, k, past length, scores + bias",
            old="Slice|rows of this step, Slice 2=Slice|columns so far, MatMul|q · kᵀ · scale, Add",
        ),
        "mask → Slice → Slice 2 → Add → scores + bias; past length → Slice; q → MatMul; k → MatMul → Add",
    ),
    Graph(
        "after dematerialize-alibi",
        _boxes(
            weight="slopes|[heads; 1; 1]",
            value="positions|0 … n, mask|0 or −inf, q, k, scores + bias",
            plain="Mul|slopes · positions, Add|in fp32, MatMul|q · kᵀ · scale, Add 2=Add",
        ),
        "slopes → Mul → Add → Add 2 → scores + bias; positions → Mul; mask → Add; q → MatMul; k → MatMul → Add 2",
    ),
    Graph(
        "after fuse-attention",
        _boxes(
            value="q, kv=k; v; past, mask, positions, y, present=present k; v",
            weight="slopes|[heads; 1; 1]",
            new="passopt.AlibiAttention|a local function of standard operators",
        ),
        "q → passopt.AlibiAttention → y; kv → passopt.AlibiAttention; slopes → passopt.AlibiAttention; "
        "positions → passopt.AlibiAttention; mask → passopt.AlibiAttention; passopt.AlibiAttention → present",
    ),
)

SHARDING = (
    Graph(
        "before: one model",
        _boxes(
            value="x|[b; s; 8], y|[b; s; 8]",
            weight="w1|[8; 12], w2|[12; 8]",
            plain="MatMul|→ [b; s; 12], Relu, MatMul 2=MatMul|→ [b; s; 8]",
        ),
        "x → MatMul → Relu → MatMul 2 → y; w1 → MatMul; w2 → MatMul 2",
    ),
    Graph(
        "after shard{degree=2}: the graph of every rank",
        _boxes(
            value="x|replicated [b; s; 8], y|replicated [b; s; 8]",
            weight="w1.shard|columns: [8; 6], w2.shard|rows: [6; 8]",
            plain="MatMul|→ sharded [b; s; 6], Relu, MatMul 2=MatMul|→ partial sums",
            new="AllReduce",
        ),
        "x → MatMul → Relu → MatMul 2 → AllReduce → y; w1.shard → MatMul; w2.shard → MatMul 2",
    ),
)

LAZY = (
    Graph(
        "what the passes build: expressions, no bytes",
        _boxes(
            weight="W_pack|source: 101 MB of a file, q|slice 0:4096, k|slice 4096:8192, v|slice 8192:12288",
            plain="codes|quantize_codes, scales|quantize_scales, codes of rank r|shard axis=0 degree=4, "
            "scales of rank r|shard axis=0 degree=4",
        ),
        "W_pack → q → codes → codes of rank r; W_pack → k; W_pack → v; q → scales → scales of rank r",
    ),
    Graph(
        "what the writer does: one reading for all",
        _boxes(
            weight="checkpoint files",
            plain="rows of W_pack|read once; a few MB at a time, quantise|absmax/127 per row, hash|blake3",
            new="rank0, rank1, rank2, rank3",
        ),
        "checkpoint files → rows of W_pack → quantise → hash → rank0; hash → rank1; hash → rank2; hash → rank3",
    ),
)


def _semicolons(graphs: Sequence[Graph]) -> list[Graph]:
    """Commas separate boxes above, so texts have `;` where a comma is meant."""
    return [
        dataclasses.replace(
            graph,
            boxes={
                name: ([line.replace(";", ",") for line in graph.lines(name)], tone)
                for name, (_, tone) in graph.boxes.items()
            },
        )
        for graph in graphs
    ]


def pipeline_picture() -> str:
    """Return the picture of the way from a checkpoint to a library."""
    stations: list[tuple[str, Sequence[str], Tone]] = [
        ("checkpoint", ("config.json", "remote code", "*.safetensors"), "weight"),
        ("graph", ("model.onnx", "weights stay lazy"), "plain"),
        ("passes", ("fuse, split q k v", "shard, quantise", "declines are counted"), "new"),
        ("ranks", ("rank0 … rankN", "one graph each,", "its own weights"), "plain"),
        ("library", ("lib.so", "packed weights", "no torch needed"), "folder"),
    ]
    width, height, gap = 146.0, 96.0, 44.0
    total = len(stations) * width + (len(stations) - 1) * gap + 2 * _PAD
    picture = Picture("From a checkpoint to a compiled library", total, 236)
    top = 92.0
    names = {0: "passopt export", 2: "passopt run", 3: "passopt compile"}
    for index, (title, lines, tone) in enumerate(stations):
        left = _PAD + index * (width + gap)
        picture.box((left + width / 2, top + height / 2), (width, height), (title, *lines), tone)
        if index + 1 < len(stations):
            picture.arrow([(left + width + 4, top + height / 2), (left + width + gap - 4, top + height / 2)], wide=True)
    for index, command in names.items():
        left = _PAD + index * (width + gap)
        middle = left + width + gap / 2 if index in {0, 3} else left + width / 2
        picture.text((middle, top - 26), command, size=12.5, bold=True, ink="#1b3559")
    for index, check in {
        0: "self-check against eager torch",
        2: "expectations; verify each rewrite",
        3: "verify against the original",
        4: "verify, generate",
    }.items():
        left = _PAD + index * (width + gap)
        middle = left + width + gap / 2 if index == 0 else left + width / 2
        picture.text((middle, top + height + 26), check, size=11.5, ink="#596373")
    picture.text((_PAD, 28), "what a model goes through, and what checks it", size=16, bold=True, anchor="start")
    return picture.svg()


def driver_picture() -> str:
    """Return the picture of how rules are applied."""
    picture = Picture("How the driver applies the rules of a pass", 760, 330)
    picture.text((_PAD, 28), "one pass of rules on one graph", size=16, bold=True, anchor="start")
    places: dict[str, tuple[Point, Point, Sequence[str], Tone]] = {
        "index": ((130, 90), (190, 56), ("candidates", "nodes whose operator is", "the root of some rule"), "plain"),
        "match": ((380, 90), (190, 56), ("match", "walk up from the root;", "bind variables"), "plain"),
        "rewrite": ((630, 90), (190, 56), ("rewrite", "builds nodes, reads", "small constants"), "plain"),
        "decline": ((630, 190), (190, 42), ("Decline(reason)", "counted, nothing changes"), "old"),
        "apply": ((380, 190), (190, 56), ("apply", "names, order, types,", "provenance, dead nodes"), "new"),
        "new": ((130, 190), (190, 42), ("new nodes", "are tried at once"), "plain"),
        "end": (
            (380, 282),
            (330, 42),
            ("sweep again until nothing matches", "so a second run of the pass changes nothing"),
            "folder",
        ),
    }
    for middle, size, lines, tone in places.values():
        picture.box(middle, (size[0], size[1] + 8), lines, tone)
    picture.arrow([(227, 90), (282, 90)])
    picture.arrow([(477, 90), (532, 90)])
    picture.arrow([(630, 123), (630, 163)])
    picture.arrow([(580, 123), (580, 140), (450, 140), (450, 156)])
    picture.arrow([(283, 190), (228, 190)])
    picture.arrow([(130, 164), (130, 124)])
    picture.arrow([(380, 223), (380, 255)])
    return picture.svg()


def planes_picture() -> str:
    """Return the picture of how a row of fp32 numbers becomes three rows of bytes."""
    picture = Picture("int8 weights with fp32 activations, in three planes of bytes", 820, 300)
    picture.text((_PAD, 28), "one row of activations, times int8 weights", size=16, bold=True, anchor="start")
    picture.box((110, 150), (150, 62), ("row of x", "fp32 numbers"), "value", round_=5)
    picture.box((300, 150), (150, 62), ("integers", "23 bits, one scale"), "plain")
    for index, (name, what) in enumerate(
        [("plane 0", "bits 16 … 22"), ("plane 1", "bits 8 … 15"), ("plane 2", "bits 0 … 7")]
    ):
        y = 76 + index * 74
        picture.box((490, y), (120, 46), (name, what), "new")
        picture.arrow([(375, 150), (402, 150), (402, y), (428, y)] if y != 150 else [(375, 150), (428, y)])
        picture.arrow([(550, y), (590, y), (590, 150), (616, 150)] if y != 150 else [(550, y), (616, 150)])
    picture.box(
        (706, 150), (176, 78), ("three byte dots", "exact in int32, then", "· scale · scale of w, fp32"), "folder"
    )
    picture.arrow([(185, 150), (223, 150)])
    picture.text(
        (410, 280), "every number is rounded to 2⁻²² of the largest one of its row; the weights stay bytes", size=12
    )
    return picture.svg()


def pictures() -> dict[str, str]:
    """Return all pictures by their file names."""
    return {
        "pipeline.svg": pipeline_picture(),
        "driver.svg": driver_picture(),
        "int8-planes.svg": planes_picture(),
        "fuse-rms-norm.svg": side_by_side("RMS norm before and after fusion", _semicolons(RMS_NORM)),
        "fuse-rotary.svg": side_by_side("Rotary embedding before and after fusion", _semicolons(ROTARY)),
        "fuse-attention.svg": side_by_side("Attention before and after fusion", _semicolons(ATTENTION)),
        "alibi.svg": side_by_side("ALiBi from a baked mask to slopes", _semicolons(ALIBI)),
        "sharding.svg": side_by_side("An MLP before and after sharding", _semicolons(SHARDING)),
        "lazy-weights.svg": side_by_side("Lazy weights, built and written", _semicolons(LAZY)),
    }


def main(arguments: Sequence[str]) -> int:
    """Write the pictures.

    Args:
        arguments: The folder, if it is another one.

    Returns:
        The exit code, 0.
    """
    folder = Path(arguments[0]) if arguments else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
