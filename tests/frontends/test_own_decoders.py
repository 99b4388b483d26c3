"""Classes that a checkpoint brings: of known model types, and of kinds that passopt has never seen."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from passopt.api.export import clean_up
from passopt.cli import main
from passopt.frontends.checkpoint import Checkpoint, open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.open_family import refuse_passed_over
from passopt.frontends.options import ExportOptions
from passopt.frontends.self_check import self_check
from passopt.frontends.stock_errors import stock_errors
from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType
from passopt.testing.families import CONFIGS, make_family_checkpoint

OPTIONS = ExportOptions(dtype=DataType.FLOAT, trust_remote_code=True)

#: A fine-tuned Llama that bounds its logits.
BOUNDED = """
import torch, transformers

class BoundedLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["logits"] = 0.1 * torch.tanh(output["logits"] / 0.1)
        return output
"""

#: A decoder of its own, with a cache of tuples [batch, length, heads, width] and learned positions.
TOY = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class ToyConfig(PretrainedConfig):
    model_type = "toy"
    def __init__(self, vocab_size=40, n_embd=30, n_head=3, n_layer=2, n_positions=90, **kwargs):
        self.vocab_size, self.n_embd, self.n_head, self.n_layer = vocab_size, n_embd, n_head, n_layer
        self.n_positions = n_positions
        super().__init__(**kwargs)

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.norm = config.n_head, nn.LayerNorm(config.n_embd)
        self.qkv, self.out = nn.Linear(config.n_embd, 3 * config.n_embd), nn.Linear(config.n_embd, config.n_embd)
    def forward(self, x, mask, past):
        b, q, d = x.shape
        query, key, value = (t.view(b, q, self.heads, d // self.heads) for t in self.qkv(self.norm(x)).chunk(3, -1))
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / (d // self.heads) ** 0.5
        found = torch.einsum("bhqk,bkhd->bqhd", (scores + mask).softmax(-1), value)
        return x + self.out(found.reshape(b, q, d)), (key, value)

class Toy(PreTrainedModel):
    config_class = ToyConfig
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.places = nn.Embedding(config.n_positions, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
    def forward(self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, use_cache=None):
        past = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        q = input_ids.shape[1]
        columns, rows = torch.arange(past + q), torch.arange(past, past + q)
        seen = (columns[None] <= rows[:, None]) & attention_mask[:, None, None].bool()
        mask = torch.where(seen, 0.0, -1e9)
        x, present = self.tokens(input_ids) + self.places(position_ids), ()
        for number, layer in enumerate(self.layers):
            x, state = layer(x, mask, None if past_key_values is None else past_key_values[number])
            present += (state,)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=present)
"""

#: A class without forward, as of an encoder or of a base of something else.
OTHER = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OtherConfig(PretrainedConfig):
    model_type = "other"

class Other(PreTrainedModel):
    config_class = OtherConfig
    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(4, 5)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_family_checkpoint(tmp_path_factory.mktemp("llama") / "checkpoint", "llama"))


def with_class(checkpoint: Checkpoint, directory: Path, code: str, name: str) -> Checkpoint:
    """Return the checkpoint with a class of its own, in files of another folder."""
    (directory / "modeling_own.py").write_text(code)
    config = {**checkpoint.config, "auto_map": {"AutoModelForCausalLM": f"modeling_own.{name}"}}
    return dataclasses.replace(checkpoint, directory=directory, config=config)


def toy(directory: Path, code: str = TOY, name: str = "Toy", **config: Any) -> Checkpoint:
    """Write a checkpoint of a decoder of its own kind, with random weights."""
    import torch
    from safetensors.torch import save_file

    (directory / "modeling_own.py").write_text(code)
    auto_map = {"AutoConfig": f"modeling_own.{name}Config", "AutoModelForCausalLM": f"modeling_own.{name}"}
    sizes = {"vocab_size": 40, "n_embd": 30, "n_head": 3, "n_layer": 2, "n_positions": 90}
    stated = {"model_type": name.lower(), "architectures": [name], "auto_map": auto_map, **sizes, **config}
    (directory / "config.json").write_text(json.dumps(stated))
    shapes = {"tokens.weight": (40, 30), "places.weight": (90, 30), "head.weight": (40, 30)}
    for layer in range(2):
        for part, shape in (("norm", (30,)), ("qkv", (90, 30)), ("out", (30, 30))):
            bias = shape[:1]
            shapes |= {f"layers.{layer}.{part}.weight": shape, f"layers.{layer}.{part}.bias": bias}
    random = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(shape, generator=random) / 5 for key, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(directory)


@pytest.mark.slow
def test_a_class_of_a_known_type_is_exported_as_it_is(llama: Checkpoint, tmp_path: Path) -> None:
    """By both exporters: the graph of one, the numbers of the other."""
    checkpoint = with_class(llama, tmp_path, BOUNDED, "BoundedLlama")
    graph = export_graph(checkpoint, OPTIONS, tmp_path)
    assert "Tanh" in [node.op_type for node in graph.graph]
    assert graph.graph.initializers["lm_head.weight"].const_value is not None
    legacy = dataclasses.replace(OPTIONS, exporter="torchscript")
    assert self_check(checkpoint, legacy, finish=clean_up) < 1e-4


@pytest.mark.parametrize("name", ["BoundedLlama", "LlamaForCausalLM"])
def test_a_class_of_its_own_is_not_passed_over(llama: Checkpoint, tmp_path: Path, name: str) -> None:
    """Also one of the name that transformers' class has: that says nothing about what it computes."""
    checkpoint = with_class(llama, tmp_path, "raise SystemExit('ran')", name)
    plain = dataclasses.replace(OPTIONS, trust_remote_code=False)
    says = rf"its own class modeling_own\.{name}.*pass `trust_remote_code=True`; or remove auto_map.*LlamaForCausalLM"
    with pytest.raises(ModelError, match=says):
        export_graph(checkpoint, plain, tmp_path)
    refuse_passed_over(checkpoint, trust_remote_code=True)
    refuse_passed_over(llama, trust_remote_code=False)


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("role", ["AutoConfig", "AutoModel"])
def test_a_class_of_its_own_without_a_head_is_not_passed_over(llama: Checkpoint, role: str, trust: bool) -> None:
    checkpoint = dataclasses.replace(llama, config={**llama.config, "auto_map": {role: "own.Own"}})
    with pytest.raises(ModelError, match=rf"own\.Own \({role} of auto_map\) and no AutoModelForCausalLM.*or remove"):
        refuse_passed_over(checkpoint, trust_remote_code=trust)


def test_a_tokenizer_of_its_own_does_not_matter_to_the_graph(llama: Checkpoint) -> None:
    auto_map = {"AutoTokenizer": ["own.Tokenizer", None]}
    checkpoint = dataclasses.replace(llama, config={**llama.config, "auto_map": auto_map})
    refuse_passed_over(checkpoint, trust_remote_code=False)


@pytest.mark.parametrize(
    "how", ["sys.exit(7)", "raise SystemExit('bye')", "raise GeneratorExit('bye')", "raise Stop('bye')"]
)
@pytest.mark.parametrize(
    ("old", "subject"),
    [
        ("class ToyConfig(", "modeling_own.py: importing ToyConfig failed"),
        ("        self.post_init()\n", "Toy cannot be built from config.json"),
        ("        past = 0 if", "Toy cannot be traced"),
    ],
)
def test_code_that_would_end_python_is_told_as_its_failure(tmp_path: Path, old: str, how: str, subject: str) -> None:
    indent = " " * (len(old) - len(old.lstrip()))
    stop = "import sys\nclass Stop(KeyboardInterrupt):\n    pass\n"
    checkpoint = toy(tmp_path, stop + TOY.replace(old, f"{indent}{how}\n{old}", 1))
    with pytest.raises(ModelError, match=rf"{re.escape(subject)}: .*(7|bye) \(at modeling_own.py:\d+: "):
        export_graph(checkpoint, OPTIONS, tmp_path)


def test_an_interrupt_of_the_user_is_no_failure_of_the_code(llama: Checkpoint) -> None:
    with pytest.raises(KeyboardInterrupt), stock_errors(llama, "it"):
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_decoder_of_its_own_kind_agrees_with_its_code(tmp_path: Path, exporter: Any) -> None:
    checkpoint = toy(tmp_path)
    settings = dataclasses.replace(OPTIONS, exporter=exporter)
    graph = export_graph(checkpoint, settings, tmp_path)
    inputs = {value.name: [str(size) for size in value.shape or ()] for value in graph.graph.inputs}
    assert inputs["past.1.value"] == ["batch", "3", "past", "10"]
    assert self_check(checkpoint, settings, finish=clean_up) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("layers.append", "layers.append"), "forward takes no input_ids and no past_key_values"),
        (
            ("        super().__init__(config)\n", "        raise OSError('no such kernel')\n"),
            "OSError: no such kernel",
        ),
    ],
)
def test_a_class_that_is_no_decoder_is_refused(
    tmp_path: Path, change: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(tmp_path, OTHER.replace(*change), "Other")
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"head.weight": zeros(5, 4), "head.bias": zeros(5)}, weights, metadata={"format": "pt"})
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out"), "--trust-remote-code"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("passopt export: ")
    assert f"{tmp_path}: Other " in said
    assert says in said


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("present += (state,)", "present += (state[0][0],)", "a cache of shapes"),
        ("present += (state,)", "present = None", "without logits and past_key_values"),
        ("x, present =", "assert input_ids.max() < 3; x, present =", "(?s)Toy cannot be traced: .*modeling_own.py:"),
    ],
)
def test_a_decoder_that_cannot_be_traced_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    checkpoint = toy(tmp_path, TOY.replace(old, new))
    with pytest.raises(ModelError, match=says):
        export_graph(checkpoint, OPTIONS, tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"logit_scale": 0.5}, "logit_scale of config.json is 0.5, which transformers' class for mpt ignores"),
        ({"attn_config": {"alibi": False}}, "attn_config.alibi of config.json is False"),
        ({"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max of config.json is 16"),
        (
            {"max_seq_len": "many"},
            r"(?s)mpt with eager attention cannot be built from config.json: .*'max_seq_len'.*expected int",
        ),
    ],
)
def test_settings_that_the_stock_class_does_not_have_are_refused(
    llama: Checkpoint, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    checkpoint = dataclasses.replace(llama, config={**CONFIGS["mpt"], **changed})
    with pytest.raises(ModelError, match=says):
        export_graph(checkpoint, dataclasses.replace(OPTIONS, trust_remote_code=False), tmp_path)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rotary_angles_that_grow_are_refused(llama: Checkpoint, tmp_path: Path, key: str) -> None:
    checkpoint = dataclasses.replace(
        llama, config={**llama.config, "rope_parameters": None, "rope_scaling": {key: "dynamic", "factor": 2.0}}
    )
    with pytest.raises(ModelError, match="rope_scaling of config.json is dynamic: past 64 positions"):
        export_graph(checkpoint, dataclasses.replace(OPTIONS, trust_remote_code=False), tmp_path)
