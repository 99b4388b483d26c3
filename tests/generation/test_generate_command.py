"""`passopt generate` on a checkpoint's tokenizer and an engine that is a formula."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from passopt.cli import main
from passopt.generation.open_engine import ModelFacts
from passopt.generation.tokenizer import load_tokenizer
from passopt.targets.tvm.compiled_folder import CacheLayout, RankFolders
from passopt.testing.checkpoints import ROTARY, make_checkpoint

#: How engines were asked for.
OPENED: list[dict] = []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch, make_engine) -> Path:
    """A checkpoint's companions; the engine has its vocabulary. Texts of these tokens are legible."""
    make_checkpoint(tmp_path / "model", ROTARY, weights=False)

    class Engine(make_engine):
        vocab = 520

        def forward(self, ids, mask):
            narrow = super().forward(np.asarray(ids), mask)
            logits = np.full((*narrow.shape[:2], self.vocab), -50, np.float32)
            logits[..., 300 : 300 + narrow.shape[-1]] = narrow
            return logits

    def open_engine(folder, **how):
        OPENED.append(how)
        return Engine(128)

    OPENED.clear()
    facts = ModelFacts(Engine.vocab, 128, 0, (CacheLayout(3, 4, 16, "fp32"),))
    monkeypatch.setattr("passopt.api.generate.open_engine", open_engine)
    monkeypatch.setattr("passopt.api.generate.read_facts", lambda folder: facts)
    return tmp_path / "model"


def test_how_weights_are_loaded_is_passed_on(capsys, folder: Path):
    for flags, verify, copy in (((), False, False), (("--verify-weights", "--copy-weights"), True, True)):
        OPENED.clear()
        run(capsys, folder, "--prompt", "a", "--max-new-tokens", "1", *flags)
        assert [(how["verify_weights"], how["copy_weights"]) for how in OPENED] == [(verify, copy)]


def run(capsys, folder: Path, *arguments: str) -> tuple[str, str]:
    assert main(["generate", str(folder), *arguments]) == 0
    return capsys.readouterr()


def report(capsys, folder: Path, *arguments: str) -> dict:
    return json.loads(run(capsys, folder, *arguments, "--json")[0])


def test_text_on_stdout_figures_on_stderr(folder: Path, capsys):
    out, err = run(capsys, folder, "--prompt", "The lexical", "--greedy", "--max-new-tokens", "7")
    found = report(capsys, folder, "--prompt", "The lexical", "--greedy", "--max-new-tokens", "7")
    assert out == found["rows"][0]["text"] + "\n"
    assert "7 new tokens" in err
    assert "tokens/s" in err
    assert "first new token after" in err
    assert f"cache {found['cache_bytes']:,} bytes" in err


@pytest.mark.parametrize("prompts", [["The lexical"], ["The lexical", "a", "statement is"]])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_streamed_output_is_the_same(folder: Path, capsys, prompts: list[str], form: str):
    if form == "ids":
        encode = load_tokenizer(folder).encode
        prompts = [" ".join(map(str, encode(prompt))) for prompt in prompts]
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    arguments += ["--greedy", "--max-new-tokens", "9", *(["--ids"] if form == "ids" else [])]
    plain = run(capsys, folder, *arguments)[0]
    assert run(capsys, folder, *arguments, "--stream")[0] == plain
    assert plain.count("== ") == (len(prompts) if len(prompts) > 1 else 0)


def test_ids_in_and_out(folder: Path, capsys):
    encoded = load_tokenizer(folder).encode("The lexical")
    found = report(capsys, folder, "--prompt", "The lexical", "--greedy", "--max-new-tokens", "5")
    text = " ".join(map(str, encoded))
    out, _ = run(capsys, folder, "--ids", "--prompt", text, "--greedy", "--max-new-tokens", "5")
    assert [int(word) for word in out.split()] == found["rows"][0]["ids"]
    assert found["rows"][0]["prompt_ids"] == encoded


def test_chat_wraps_the_question_in_role_tokens(folder: Path, capsys):
    encode = load_tokenizer(folder).encode
    found = report(capsys, folder, "--chat", "--system", "Be", "--prompt", "Why", "--max-new-tokens", "2")
    assert found["rows"][0]["prompt_ids"] == [*encode("Be"), 3, *encode("Why"), 4]


def test_a_conversation_from_a_file_is_cut_to_the_positions(folder: Path, capsys, tmp_path: Path):
    turns = [{"role": role, "content": "the statement " * 6} for role in ("user", "assistant") * 4]
    turns.append({"role": "user", "content": "why"})
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    found = report(capsys, folder, "--messages", str(tmp_path / "turns.json"), "--max-new-tokens", "28")
    prompt = found["rows"][0]["prompt_ids"]
    assert 50 < len(prompt) <= 100
    assert prompt[-1] == 4
    assert prompt[0] == 3


def test_prompts_from_a_file_and_from_stdin(folder: Path, capsys, tmp_path: Path, monkeypatch):
    (tmp_path / "prompts").write_text("one\ntwo\n")
    options = ("--greedy", "--max-new-tokens", "3")
    rows = report(capsys, folder, "--prompt-file", str(tmp_path / "prompts"), *options)["rows"]
    encode = load_tokenizer(folder).encode
    assert [row["prompt_ids"] for row in rows] == [encode("one"), encode("two")]
    monkeypatch.setattr("sys.stdin", io.StringIO("two"))
    assert report(capsys, folder, *options)["rows"][0]["ids"] == rows[1]["ids"]


def test_sampling_defaults_are_those_of_the_model(folder: Path, capsys):
    given = ("--prompt", "The", "--max-new-tokens", "12")
    seeded = report(capsys, folder, *given, "--seed", "5")["rows"]
    assert report(capsys, folder, *given, "--seed", "5")["rows"] == seeded
    assert report(capsys, folder, *given, "--seed", "6")["rows"] != seeded
    spelled = ("--temperature", "0.3", "--top-k", "5", "--top-p", "0.85", "--repetition-penalty", "1.05")
    assert report(capsys, folder, *given, "--seed", "5", *spelled)["rows"] == seeded
    assert report(capsys, folder, *given, "--seed", "5", "--temperature", "9")["rows"] != seeded
    assert report(capsys, folder, "--prompt", "The", "--seed", "5")["new_tokens"] == 64  # generation_config.json


def test_without_a_generation_config_it_is_greedy(folder: Path, capsys):
    (folder / "generation_config.json").unlink()
    given = ("--prompt", "The", "--max-new-tokens", "6")
    assert report(capsys, folder, *given)["rows"] == report(capsys, folder, *given, "--greedy")["rows"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--prompt-file", "f"], "--prompt and --prompt-file both"),
        (["--ids", "--prompt", "1 x"], "--ids: expected token ids"),
        (["--ids", "--prompt", "1 520"], "token id 520 is outside of the vocabulary (0 to 519)"),
        (["--ids", "--chat", "--prompt", "1"], "--ids takes token ids as they are"),
        (["--system", "x", "--prompt", "a"], "--system belongs to --chat"),
        (["--stream", "--json", "--prompt", "a"], "cannot --stream"),
        (["--greedy", "--seed", "3", "--prompt", "a"], "--seed says otherwise"),
        (["--temperature", "0", "--prompt", "a"], "temperature is 0.0"),
        (["--prompt", "word " * 200], "tokens, the model 128 positions"),
        (["--prompt", "a", "--capacity", "2"], "--capacity is 2"),
        (["--prompt-file", "/does/not/exist"], "cannot be read"),
        (["--chat", "--prompt", "a", "--max-new-tokens", "128"], "no room for a prompt"),
    ],
)
def test_wrong_use_is_told(folder: Path, capsys, arguments: list[str], says: str):
    assert main(["generate", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert not OPENED  # before weights are read


@pytest.mark.parametrize("flags", [[], ["--chat"], ["--ids"]])
def test_nothing_on_standard_input_is_told(folder: Path, capsys, monkeypatch, flags: list[str]):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["generate", str(folder), *flags]) == 2
    assert "standard input is empty" in capsys.readouterr().err
    assert not OPENED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"role": "user"}]', "is no list of"),
        ('[{"role": "user", "content": null}]', "content of type NoneType, expected text"),
        ('[{"role": "user", "content": [{"type": "text", "text": "Why"}]}]', "content of type list, expected text"),
        ('[{"role": "user", "content": " "}]', "a message of the user is empty"),
        ('[{"role": "tool", "content": "x"}]', "has the role 'tool'"),
    ],
)
def test_messages_that_are_none_are_told(folder: Path, capsys, tmp_path: Path, text: str, says: str):
    path = tmp_path / "turns.json"
    path.write_text(text)
    assert main(["generate", str(folder), "--messages", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count(str(path)) == 1
    assert not OPENED


def test_caches_that_do_not_fit_are_told_before_weights_are_read(folder: Path, capsys, monkeypatch):
    prompts = ["--prompt", "a", "--prompt", "b", "--max-new-tokens", "60"]
    columns = 16 * -(-(len(load_tokenizer(folder).encode("a")) + 59) // 16)
    needed = 2 * 3 * 2 * 4 * columns * 16 * 4
    monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed - 1)
    assert main(["generate", str(folder), *prompts]) == 2
    assert f"no memory for caches of {needed:,} bytes" in capsys.readouterr().err
    assert not OPENED
    monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed)
    assert main(["generate", str(folder), *prompts]) == 0


def test_a_folder_that_was_not_compiled_is_told(tmp_path: Path, capsys):
    make_checkpoint(tmp_path / "model", ROTARY, weights=False)
    for folder in ("model", "nothing"):
        assert main(["generate", str(tmp_path / folder), "--prompt", "a"]) == 2
        assert "passopt compile" in capsys.readouterr().err


def test_a_rank_that_is_not_there_is_told(tmp_path: Path, capsys):
    make_checkpoint(tmp_path / "model", ROTARY, weights=False)
    RankFolders(2, ("rank0", "rank1"), ("a", "b")).write(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--prompt", "a"]) == 2
    assert "rank0: has no library.json" in capsys.readouterr().err


def test_options_of_the_model_that_are_not_implemented_are_named_once(folder: Path, capsys):
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | {"num_beams": 4, "min_p": 0.1}))
    said = run(capsys, folder, "--prompt", "a", "--prompt", "b", "--max-new-tokens", "2").err
    assert said.count("generation_config.json sets what passopt does not have: num_beams, min_p") == 1


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("tvm", "needs tvm, which is not installed; pip install 'passopt[run]' brings it"),
        ("transformers.models.x", "pip install 'passopt[export]' brings it"),
        ("einops", "needs einops, which is not installed; pip install einops, or the package that has this module"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(folder: Path, capsys, monkeypatch, module: str, says: str):
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("passopt.api.generate.open_engine", missing)
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert says in capsys.readouterr().err
