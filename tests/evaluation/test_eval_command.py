"""`passopt eval` as it is typed: table, JSON, plot, exit codes."""

from __future__ import annotations

import itertools
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import passopt
from passopt.cli import main
from passopt.evaluation.plot import Panel, Spot, draw_plot
from passopt.evaluation.report import shown
from passopt.predictions.standard_errors import Estimate


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["eval", *map(str, words), "--threads", "1"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table_json_and_plot(lab, tmp_path: Path, capsys):
    plot = tmp_path / "plot.svg"
    words = [lab.one, lab.int8, lab.other, "--text", lab.text, "--window", 48]
    code, out, err = run(capsys, *words, "--plot", plot)
    assert (code, err) == (0, "")
    assert re.search(r"int8 +\d,\d{3} +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +\S+ ± ", out)
    assert f"± one standard error, over blocks of 128 tokens; KL in nats, from {lab.one} as fp16" in out
    tree = ET.fromstring(plot.read_text(encoding="utf-8"))
    texts = [item.text for item in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {str(lab.int8), str(lab.other), f"{lab.one}, the reference"} <= set(texts)
    code, out, _ = run(capsys, *words, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["reference"] == str(lab.one)
    assert [model["name"] for model in report["models"]] == [str(lab.one), str(lab.int8), str(lab.other)]
    kl = report["models"][1]["texts"][0]["kl_mean"]
    assert 0 < kl["error"] < kl["value"] < 0.01
    assert report["models"][1]["weight_bytes"] < report["models"][0]["weight_bytes"]


def test_progress_has_a_rate_and_the_time_left(lab, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("passopt.terminal.progress._INTERVAL", 0.0)
    _, _, err = run(capsys, lab.one, lab.int8, "--text", lab.text, "--window", 48)
    assert re.search(r"int8, tokens █+·* +\d+%  \d+/564  [\d,.]+/s  \d+ s left", err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{one}"], "nothing to evaluate on: give a --text, --c4, --data, --ceval or --choices"),
        (["{one}", "--text", "{text}", "--plot", "x.svg"], "give two models or more, and a --text"),
        (["{one}", "{int8}", "--text", "{text}", "--plot", "no/x.svg"], "there is no such folder for --plot"),
        (["{one}", "--text", "{text}", "--window", "4096"], "--window is 4096, and .*one has 48 positions"),
        (["{one}", "--reference", "{root}/none", "--text", "{text}"], "none: no such model"),
        (["{one}", "--c4", "{text}"], "line 1: is not JSON"),
        (["{one}", "--data", "nosuch:{text}"], "unknown calibration format 'nosuch'"),
        (["{one}", "--text", "{text}", "--tokenizer", "{root}"], "no tokenizer"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_to_do(lab, tmp_path: Path, capsys, monkeypatch, words, message: str):
    monkeypatch.chdir(tmp_path)
    places = {"one": lab.one, "int8": lab.int8, "text": lab.text, "root": lab.root}
    code, out, err = run(capsys, *(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_no_decoder_is_refused(lab, tmp_path: Path, capsys):
    (tmp_path / "g.onnxtxt").write_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,3] x) => (float[2,3] y) { y = Sigmoid(x) }'
    )
    code, _, err = run(capsys, tmp_path / "g.onnxtxt", "--text", lab.text, "--tokenizer", lab.one)
    assert code == 2
    assert "g.onnxtxt: not an exported decoder" in err


@pytest.mark.slow
def test_a_compiled_folder_gives_what_its_graph_gives(lab, tmp_path: Path, capsys):
    pytest.importorskip("tvm")
    passopt.compile(lab.int8, tmp_path / "compiled", passes="fuse", allow_fallback=True)
    lab.save_tokenizer(tmp_path / "compiled")
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"query": "the text", "choices": ["says", "reads"], "gold": 0}\n')
    words = [lab.int8, tmp_path / "compiled", "--text", lab.text, "--window", 40, "--choices", questions, "--json"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    graph, compiled = json.loads(out)["models"]
    assert compiled["runs_in"] == "compiled"
    assert compiled["texts"][0]["surprise"]["value"] == pytest.approx(graph["texts"][0]["surprise"]["value"], rel=1e-5)
    assert compiled["texts"][0]["kl_mean"]["value"] < 1e-6
    assert compiled["questions"][0]["same"]["value"] == 1
    cache = ["--cache", tmp_path / "kept"]
    code, first, _ = run(capsys, tmp_path / "compiled", lab.int8, "--text", lab.text, "--window", 40, *cache)
    code, again, _ = run(capsys, tmp_path / "compiled", lab.int8, "--text", lab.text, "--window", 40, *cache)
    assert first == again


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (None, "-"),
        (Estimate(28.7712, 0.512), "28.8 ± 0.5"),
        (Estimate(28.7712, 0.1312), "28.77 ± 0.13"),
        (Estimate(0.0024113, 0.0000712), "0.00241 ± 0.00007"),
        (Estimate(0.00038412, 0.0000081), "(3.84 ± 0.08)e-4"),
        (Estimate(2e-5, 3e-4), "(0.2 ± 3.0)e-4"),
        (Estimate(1.5), "1.5 ± ?"),
        (Estimate(0.0, 0.0), "0 ± 0"),
        (Estimate(float("inf"), 1.0), "infinite"),
        (Estimate(1234.5, 200.0), "1234 ± 200"),
    ],
)
def test_figures_show_the_digits_that_their_errors_allow(estimate, text: str):
    assert shown(estimate) == text


def test_names_in_a_plot_do_not_lie_on_each_other():
    spots = [Spot(f"model {index}", 5 << 20, Estimate(0.01 + index * 1e-4, 1e-4)) for index in range(4)]
    spots += [Spot("equal", 6 << 20, Estimate(0.0, 0.0)), Spot("a very long name " * 3, 9 << 20, Estimate(0.5))]
    picture = draw_plot([Panel("text: 9 tokens", Spot("fp32", 10 << 20, Estimate(0.0)), spots)] * 2)
    tree = ET.fromstring(picture)
    texts = [item for item in tree.iter("{http://www.w3.org/2000/svg}text") if (item.text or "").startswith("model")]
    heights = sorted(float(item.get("y", "0")) for item in texts)
    assert len(heights) == 8
    assert all(later - earlier >= 14 for earlier, later in itertools.pairwise(heights[:4]))
    everything = [float(item.get(key, "0")) for item in tree.iter() for key in ("x", "x1", "cx") if key in item.attrib]
    assert all(0 <= place <= 760 for place in everything)
