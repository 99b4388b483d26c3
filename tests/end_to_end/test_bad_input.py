"""What goes wrong is said: file, node or option, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.cli import main
from passopt.testing.checkpoints import ODD, make_checkpoint


@pytest.fixture
def model(alibi: Path, tmp_path: Path) -> Path:
    """A copy of an exported model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(alibi, folder)
    return folder


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str, says: tuple[str, ...]) -> None:
    """The command ends with `code`, and its message holds every text of `says`."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    for text in says:
        assert text in captured.err, captured.err
    assert "Traceback" not in captured.err


def run(model: Path, passes: str, *options: str) -> tuple[str, ...]:
    return ("run", str(model / "model.onnx"), "--passes", passes, "-o", str(model.parent / "out"), *options)


def nothing_written(model: Path) -> bool:
    return [entry.name for entry in model.parent.iterdir() if "out" in entry.name or "partial" in entry.name] == []


def test_not_a_model(model: Path, capsys):
    (model / "model.onnx").write_bytes(b"\x00\x01 this is no model")
    fails(capsys, 2, *run(model, "tp"), says=("model.onnx", "not an ONNX model"))
    assert nothing_written(model)


def test_no_such_model(tmp_path: Path, capsys):
    fails(capsys, 2, *run(tmp_path / "none", "tp"), says=("no such model", "passopt export"))


def test_truncated_model(model: Path, capsys):
    data = (model / "model.onnx").read_bytes()
    (model / "model.onnx").write_bytes(data[: len(data) // 2])
    fails(capsys, 2, *run(model, "tp"), says=("model.onnx", "truncated"))


def test_missing_external_data(model: Path, capsys):
    (model / "weights.safetensors").unlink()
    fails(capsys, 2, *run(model, "tp"), says=("weights.safetensors", "missing"))


def test_truncated_external_data(model: Path, capsys):
    os.truncate(model / "weights.safetensors", 5000)
    fails(capsys, 2, *run(model, "tp"), says=("weights.safetensors", "truncated", "ends at byte"))


def test_external_data_outside_of_the_folder(model: Path, capsys):
    move_data(model, "../weights.safetensors")
    fails(capsys, 2, *run(model, "tp"), says=("outside of the model's folder",))


def test_external_data_behind_a_link(model: Path, capsys):
    (model / "weights.safetensors").rename(model.parent / "elsewhere")
    (model / "weights.safetensors").symlink_to(model.parent / "elsewhere")
    fails(capsys, 2, *run(model, "tp"), says=("behind the link", "Copy the file"))


def move_data(model: Path, location: str) -> None:
    proto = onnx.load(model / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (model / "model.onnx").write_bytes(proto.SerializeToString())


def test_unknown_pass(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp,int9"), says=("unknown pass 'int9'", "did you mean"))


def test_unknown_option(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp{degre=2}"), says=("unknown option 'degre'", "degree"))


def test_option_of_the_wrong_type(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp{degree=two}"), says=("degree=two", "integer"))


def test_bad_pipeline_text(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp int8"), says=("position 0", "^"))


def test_wrong_order(model: Path, capsys):
    fails(capsys, 2, *run(model, "shard,split-packed-qkv"), says=("shard", "must come after it", "order given"))


def test_indivisible_degree_names_the_legal_ones(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp{degree=4}"), says=("degree 4", "6 units", "2, 3, 6", "pad=true"))
    assert nothing_written(model)


@pytest.mark.parametrize("degree", ["0", "-2"])
def test_degrees_below_one(model: Path, capsys, degree: str):
    fails(capsys, 2, *run(model, f"tp{{degree={degree}}}"), says=(f"degree {degree}", "not a positive number"))
    assert nothing_written(model)


def test_unmet_expectation(model: Path, capsys):
    fails(
        capsys, 4, *run(model, "tp,int8", "--expect", "quantize-weights==3"), says=("quantize-weights==3", "10 times")
    )
    assert nothing_written(model)


def test_activations_that_no_linear_takes(model: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("passopt.passes.precision.quantize_activations._LONGEST", 1)
    says = ("expected quantize-activations>=1", "MatMulInteger", "int32 holds sums of 1")
    fails(capsys, 4, *run(model, "int8{activations=dynamic}"), says=says)
    assert nothing_written(model)
    assert main([*run(model, "int8{activations=none}")]) == 0


def test_a_fusion_that_matches_nothing_says_so(model: Path, capsys):
    """Of the ALiBi family, which has no angles; a pipeline that expects a number says nothing besides."""
    assert main([*run(model, "fuse")]) == 0
    told = capsys.readouterr().err
    command = f"passopt why fuse-rotary {model / 'model.onnx'} --in fuse"
    assert f"fuse-rotary matched nothing; what came near: {command}\n" in told
    assert main(command.split()[1:]) == 0
    assert "fuse-rms-norm" not in told
    assert main(["run", str(model), "--passes", "baichuan2", "--dry-run"]) == 0
    assert "matched nothing" not in capsys.readouterr().err


def test_expectation_of_a_pass_that_does_not_run(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp", "--expect", "quantize-weights==3"), says=("quantize-weights", "unknown pass of"))


def test_nan_under_int8_names_the_tensor(model: Path, capsys):
    poke(model, "model.layers.1.mlp.up_proj.weight", np.float32("nan"))
    fails(capsys, 2, *run(model, "int8"), says=("model.layers.1.mlp.up_proj.weight", "NaN or Inf in row 0"))
    assert nothing_written(model)


def test_infinity_under_int8_names_the_tensor(model: Path, capsys):
    poke(model, "model.layers.0.self_attn.o_proj.weight", np.float32("inf"))
    fails(capsys, 2, *run(model, "tp,int8"), says=("model.layers.0.self_attn.o_proj.weight", "NaN or Inf"))
    assert nothing_written(model)


def poke(model: Path, name: str, value: np.float32) -> None:
    """Overwrite the first element of a weight."""
    tensor = onnx_ir.load(model / "model.onnx").graph.initializers[name].const_value
    with (model / "weights.safetensors").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(value.tobytes())


def test_one_rank_alone_is_no_model(model: Path, capsys):
    assert main(list(run(model, "tp"))) == 0
    rank = model.parent / "out" / "rank0"
    for arguments in (
        ("run", str(rank), "--passes", "int8", "-o", str(model.parent / "wrong")),
        ("materialize", str(rank), "-o", str(model.parent / "wrong")),
        ("verify", str(model), str(rank)),
    ):
        fails(capsys, 2, *arguments, says=("one rank of 2", "folder that holds all"))
    assert not (model.parent / "wrong").exists()


def test_an_option_given_twice(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp{degree=2,degree=3}"), says=("tp: option degree is given twice",))


def test_print_after_a_pass_that_does_not_run(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp", "--print-after=nope"), says=("unknown pass of this pipeline 'nope'",))


def test_dump_folder_that_cannot_be_made(model: Path, capsys):
    (model.parent / "file").write_text("in the way")
    fails(capsys, 2, *run(model, "tp", f"--dump-dir={model.parent / 'file' / 'dump'}"), says=("file",))
    assert nothing_written(model)


def test_text_that_is_not_text(model: Path, capsys):
    (model / "noise").write_bytes(bytes(range(128, 256)))
    fails(capsys, 2, "verify", str(model), str(model), "--text", str(model / "noise"), says=("noise", "not UTF-8"))


def test_tokenizer_that_is_none(root: Path, model: Path, capsys):
    (model / "none.model").write_text("no tokenizer")
    arguments = ("--text", str(root / "text.txt"), "--tokenizer", str(model / "none.model"))
    fails(capsys, 2, "verify", str(model), str(model), *arguments, says=("none.model", "not a sentencepiece model"))


def test_a_folder_without_a_tokenizer(root: Path, model: Path, capsys):
    (model / "empty").mkdir()
    arguments = ("--text", str(root / "text.txt"), "--tokenizer", str(model / "empty"))
    fails(capsys, 2, "verify", str(model), str(model), *arguments, says=("empty: no tokenizer", "--tokenizer"))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--max-tokens=0", "0 is not a positive number"),
        ("--max-positions=-3", "-3 is not a positive number"),
        ("--max-tokens=many", "'many' is not a whole number"),
        ("--tolerance=-1", "-1 is not a tolerance"),
        ("--tolerance=1e", "'1e' is not a number"),
    ],
)
def test_numbers_that_are_none_or_out_of_range(model: Path, capsys, option: str, says: str):
    with pytest.raises(SystemExit) as end:
        main(["verify", str(model), str(model), option])
    assert end.value.code == 2
    assert f"argument {option.partition('=')[0]}: {says}" in capsys.readouterr().err


def test_output_exists(model: Path, capsys):
    (model.parent / "out").mkdir()
    fails(capsys, 2, *run(model, "tp"), says=("output exists", "-o"))
    assert list((model.parent / "out").iterdir()) == []


def test_full_disk(model: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    fails(capsys, 2, *run(model, "tp"), says=("needs", "1,000 free", "nothing was written"))
    assert nothing_written(model)


def test_a_weight_file_that_changed_since_its_plan(model: Path, capsys):
    assert main([*run(model, "split-packed-qkv"), "--weights=reference"]) == 0
    os.utime(model / "weights.safetensors", ns=(1, 1))
    out = model.parent / "out"
    arguments = ("materialize", str(out), "-o", str(model.parent / "whole"))
    fails(capsys, 2, *arguments, says=("weights.safetensors", "modification time", "expected"))
    assert not (model.parent / "whole").exists()


def test_export_without_consent(root: Path, tmp_path: Path, capsys):
    arguments = ("export", str(root / "alibi"), "-o", str(tmp_path / "out"))
    fails(capsys, 2, *arguments, says=("modeling_baichuan.py", "--trust-remote-code"))
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_config_without_weights(tmp_path: Path, capsys):
    make_checkpoint(tmp_path / "bare", ODD, trained=False, weights=False)
    arguments = ("export", str(tmp_path / "bare"), "-o", str(tmp_path / "out"), "--trust-remote-code")
    fails(capsys, 2, *arguments, says=("bare", "model.safetensors", "pytorch_model.bin"))
    assert not (tmp_path / "out").exists()


def test_export_of_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys):
    fails(capsys, 2, "export", str(tmp_path), "-o", str(tmp_path / "out"), says=("config.json",))


def test_verify_of_models_with_different_interfaces(model: Path, rotary: Path, capsys):
    fails(capsys, 2, "verify", str(model), str(rotary), says=("reference", "candidate"))


def test_interrupt_leaves_nothing(model: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("passopt.targets.folders.output.write_weight_files", interrupted)
    fails(capsys, 130, *run(model, "tp"), says=("interrupted",))
    assert nothing_written(model)


def test_too_little_memory_says_how_much_it_takes(model: Path, capsys):
    fails(capsys, 2, *run(model, "tp", "--memory", "50MiB"), says=("--memory 50MiB is too little", "Give --memory"))
    assert nothing_written(model)


@pytest.mark.parametrize("size", ["much", "1TiB", "-1", "0", "1 G iB"])
def test_memory_that_is_no_size(model: Path, capsys, size: str):
    with pytest.raises(SystemExit, match="2"):
        main([*run(model, "tp"), f"--memory={size}"])
    assert "--memory" in capsys.readouterr().err


def test_an_interrupted_write_says_how_to_go_on(model: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from passopt.ir.weights.streaming import write_weights

    def interrupted(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    real = write_weights._Run._finish
    monkeypatch.setattr(write_weights._Run, "_finish", interrupted)
    fails(capsys, 130, *run(model, "tp"), says=("interrupted", ".out.partial", "run the same command again"))
    monkeypatch.undo()
    assert main([*run(model, "tp"), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["stream"]["resumed"] > 0
    assert not (model.parent / ".out.partial").exists()


def test_interrupt_by_signal_leaves_nothing(model: Path):
    """A real Ctrl-C, sent when the temporary output exists."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it\n"
        "import passopt.targets.folders.output as files\n"
        "real = files.write_weight_files\n"
        "def slow(*args, **kw):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args, **kw)\n"
        "files.write_weight_files = slow\n"
        "from passopt.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *run(model, "tp")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_written(model)


def test_plan_of_a_graph_without_linears(tmp_path: Path, capsys):
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) {y = Relu(x)}'
    )
    onnx.save(graph, tmp_path / "model.onnx")
    fails(capsys, 3, *run(tmp_path, "tp"), says=("no linear to shard",))


def test_help_and_list_import_nothing_heavy():
    heavy = "('onnx', 'onnx_ir', 'torch', 'numpy', 'onnxruntime', 'transformers')"
    for command in ("['list']", "['--help']"):
        script = (
            "import sys\n"
            "from passopt.cli import main\n"
            f"try: main({command})\n"
            "except SystemExit: pass\n"
            f"found = [name for name in {heavy} if name in sys.modules]\n"
            "sys.exit(', '.join(found) or 0)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_manifest_names_the_resolved_pipeline(model: Path, capsys):
    assert main(list(run(model, "tp{degree=3},int8"))) == 0
    manifest = json.loads((model.parent / "out" / "manifest.json").read_text())
    assert "shard{degree=3,pad=false}" in manifest["pipeline"]
    assert manifest["degree"] == 3
