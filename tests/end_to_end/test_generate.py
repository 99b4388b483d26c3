"""Text from compiled models: the ids that the stock code chooses, whatever the batch, the output or the position."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from passopt.cli import main
from passopt.frontends.checkpoint import open_checkpoint
from passopt.frontends.quiet import quiet
from passopt.frontends.remote_code import build_stock, stock_classes
from passopt.generation.loop import generate
from passopt.generation.open_engine import open_engine
from passopt.generation.sampling import Sampling
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.weights.evaluator import Evaluator
from passopt.targets.tvm.engine.engine import PREFILL_COLUMNS
from passopt.testing.checkpoints import ALIBI, ROTARY, evaluation_text, make_checkpoint

SPECS = {"rotary": ROTARY, "alibi": ALIBI}
PASSES = "baichuan2,fold-norm-head"
PROMPTS = ("The lexical structure of", "A class", "If the statement is not found, then the name")


@dataclasses.dataclass(frozen=True)
class Compiled:
    checkpoint: Path
    folder: Path


def compiled(root: Path, exported: Path, name: str, passes: str = PASSES) -> Compiled:
    folder = root / f"{exported.name}.compiled-{passes.replace(',', '-')}"
    assert main(["compile", str(exported), "--passes", passes, "-o", str(folder)]) == 0
    return Compiled(root / name, folder)


@pytest.fixture(scope="module", params=list(SPECS))
def model(request: pytest.FixtureRequest, root: Path) -> Compiled:
    return compiled(root, request.getfixturevalue(request.param), request.param)


@pytest.fixture(scope="module", params=list(SPECS))
def long_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """As many positions as the published models have; random weights."""
    root = tmp_path_factory.mktemp("long")
    spec = dataclasses.replace(SPECS[request.param], max_positions=4096)
    make_checkpoint(root / "model", spec, trained=False)
    options = ["--dtype=fp32", "--no-self-check", "--trust-remote-code"]
    assert main(["export", str(root / "model"), "-o", str(root / "exported"), *options]) == 0
    return compiled(root, root / "exported", "model")


def eager_ids(directory: Path, prompt: list[int], count: int) -> list[int]:
    """What the stock code in fp32 finds most likely, step by step."""
    checkpoint = open_checkpoint(directory)
    with (
        quiet(),
        stock_classes(checkpoint, trust_remote_code=True) as classes,
        torch.no_grad(),
        Evaluator() as evaluator,
    ):
        model = build_stock(checkpoint, classes, torch.float32, {}).eval()
        weights = {
            name: torch.from_numpy(evaluator.array(source).astype(np.float32))
            for name, source in checkpoint.tensors.items()
        }
        model.load_state_dict(weights, strict=False, assign=True)
        fed, past, found = torch.tensor([prompt]), None, []
        while len(found) < count:
            mask = torch.ones(1, len(prompt) + len(found), dtype=torch.int64)
            positions = (
                {}
                if "position_ids" not in model.forward.__code__.co_varnames
                else {"position_ids": torch.arange(mask.shape[1] - fed.shape[1], mask.shape[1])[None]}
            )
            result = model(input_ids=fed, attention_mask=mask, past_key_values=past, use_cache=True, **positions)
            found.append(int(result.logits[0, -1].argmax()))
            fed, past = torch.tensor([[found[-1]]]), result.past_key_values
    return found


def ids_of(model: Compiled, prompts: list[list[int]], count: int) -> list[list[int]]:
    result = generate(open_engine(model.folder), prompts, Sampling(), max_new_tokens=count)
    return [list(row.ids) for row in result.rows]


def encoded(model: Compiled, *texts: str) -> list[list[int]]:
    tokenizer = load_tokenizer(model.folder)
    return [tokenizer.encode(text) for text in texts]


def run(capsys, model: Compiled, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(model.folder), *arguments]) == 0
    return str(capsys.readouterr().out)


def test_greedy_ids_are_those_of_the_stock_code(model: Compiled):
    for prompt in encoded(model, *PROMPTS):
        assert ids_of(model, [prompt], 40) == [eager_ids(model.checkpoint, prompt, 40)]


def test_a_padded_batch_gives_what_its_prompts_give_alone(model: Compiled):
    prompts = encoded(model, *PROMPTS)
    assert ids_of(model, prompts, 40) == [ids_of(model, [prompt], 40)[0] for prompt in prompts]


def test_ids_up_to_the_last_position_are_those_of_the_stock_code(model: Compiled):
    bound = open_engine(model.folder).max_positions
    assert bound is not None
    prompt = load_tokenizer(model.folder).encode(evaluation_text())[: bound - 9]
    # Nine are fed after the prompt, the tenth is chosen from the logits of the last position.
    found = ids_of(model, [prompt], 100)[0]
    assert len(found) == 10
    assert found == eager_ids(model.checkpoint, prompt, 10)


def test_ids_near_position_4095_are_those_of_the_stock_code(long_model: Compiled):
    prompt = [5 + index * 37 % 500 for index in range(4090)]
    found = ids_of(long_model, [prompt], 100)[0]
    assert len(found) == 7
    assert found == eager_ids(long_model.checkpoint, prompt, 7)


def test_a_part_of_a_prefill_that_is_all_padding_changes_nothing(long_model: Compiled):
    prompts = [[5 + index * 37 % 500 for index in range(2 * PREFILL_COLUMNS + 20)], [7, 8, 9]]
    assert ids_of(long_model, prompts, 12) == [ids_of(long_model, [prompt], 12)[0] for prompt in prompts]


def test_streamed_and_printed_text_are_the_same(model: Compiled, capsys):
    arguments = [word for text in PROMPTS for word in ("--prompt", text)] + ["--max-new-tokens", "30", "--seed", "4"]
    plain = run(capsys, model, *arguments)
    assert run(capsys, model, *arguments, "--stream") == plain
    rows = json.loads(run(capsys, model, *arguments, "--json"))["rows"]
    assert plain == "".join(f"== {number}\n{row['text']}\n" for number, row in enumerate(rows, 1))


def test_a_chat_is_answered(model: Compiled, capsys):
    report = json.loads(run(capsys, model, "--chat", "--prompt", "What is a class?", "--greedy", "--json"))
    (question,) = encoded(model, "What is a class?")
    (row,) = report["rows"]
    assert row["prompt_ids"] == [3, *question, 4]
    count = report["new_tokens"]
    expected = eager_ids(model.checkpoint, row["prompt_ids"], count)
    assert row["ids"] == (expected[:-1] if row["end"] == "eos" else expected)
    assert count == SPECS[model.checkpoint.name].max_positions // 2 or row["end"] == "eos"


def test_caches_take_the_bytes_of_the_arithmetic(model: Compiled, capsys):
    spec = SPECS[model.checkpoint.name]
    report = json.loads(
        run(capsys, model, "--ids", "--prompt", "5 6 7", "--capacity", "50", "--max-new-tokens", "4", "--json")
    )
    assert report["cache_bytes"] == 2 * spec.layers * 1 * spec.heads * 64 * spec.head_dim * 4


def test_int8_and_the_logits_of_the_last_position_only(root: Path, rotary: Path, capsys):
    model = compiled(root, rotary, "rotary", "baichuan2,slice-last-token,int8")
    text = run(capsys, model, "--prompt", PROMPTS[0], "--max-new-tokens", "20", "--greedy")
    assert len(text.split()) > 5
    prompts = encoded(model, *PROMPTS)
    assert ids_of(model, prompts, 20) == [ids_of(model, [prompt], 20)[0] for prompt in prompts]


def test_an_fp16_cache_in_place_and_one_that_grows_give_the_same(root: Path, alibi_fp16: Path):
    in_place = compiled(root, alibi_fp16, "alibi")
    folder = root / "alibi.grows"
    command = ["compile", str(alibi_fp16), "--passes", "fold-norm-head", "--allow-fallback", "-o", str(folder)]
    assert main(command) == 0
    kinds = [json.loads((item / "library.json").read_text())["cache"] for item in (in_place.folder, folder)]
    assert [(kind["kind"], kind["dtype"]) for kind in kinds] == [("in-place", "fp16"), ("functional", "fp16")]
    prompts = encoded(in_place, *PROMPTS)
    assert ids_of(in_place, prompts, 20) == ids_of(Compiled(root / "alibi", folder), prompts, 20)


def test_a_fresh_process_needs_neither_torch_nor_transformers_nor_onnx(model: Compiled):
    code = f"""
import sys
blocked = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tvm")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
from passopt.cli import main
code = main(["generate", {str(model.folder)!r}, "--chat", "--prompt", "The", "--max-new-tokens", "5", "--stream"])
raise SystemExit(code)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr


def test_a_fresh_process_says_what_is_not_installed(model: Compiled):
    code = f"""
import sys
sys.modules["tvm_ffi"] = None
from passopt.cli import main
raise SystemExit(main(["generate", {str(model.folder)!r}, "--ids", "--prompt", "5"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "passopt[run]" in done.stderr
