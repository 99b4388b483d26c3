"""Both kinds of tokenizer, and text that arrives token by token."""

import json
import shutil
from pathlib import Path

import pytest

from passopt.generation.tokenizer import TextStream, load_tokenizer
from passopt.ir.errors import ModelError
from passopt.testing.checkpoints import ROTARY, make_checkpoint

TEXTS = ["The lexical structure", "  two  spaces\n\tand 12.5", "你好，世界 🦜!", "naïve—€", "</s> <unk>", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tokenizer") / "checkpoint", ROTARY, weights=False)


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    """A byte-level tokenizer.json without merges, with a template that adds <s>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {piece: index + 2 for index, piece in enumerate(alphabet)}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    model.add_special_tokens(["<s>", "</s>"])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("fast")
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["checkpoint", "fast"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode_template(text.replace("<", "("))) == text.replace("<", "(")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_pieces_that_the_stock_code_takes(checkpoint: Path, text: str):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    pieces = model.encode(text, out_type=str)
    assert load_tokenizer(checkpoint).encode(text) == [model.piece_to_id(piece) for piece in pieces]


@pytest.mark.parametrize(("kind", "name"), [("checkpoint", "tokenizer.model"), ("fast", "tokenizer.json")])
def test_a_file_is_as_good_as_its_folder(request, kind: str, name: str):
    folder = request.getfixturevalue(kind)
    assert load_tokenizer(folder / name).encode("The") == load_tokenizer(folder).encode("The")


def test_a_part_of_a_text_gets_nothing_at_its_begin(fast: Path):
    tokenizer = load_tokenizer(fast)
    assert tokenizer.encode("The") == [0, *tokenizer.encode_text("The")]


def test_text_is_never_a_control_token_unless_a_template_wrote_it(checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint)
    assert 2 not in tokenizer.encode("a</s>b")
    assert tokenizer.encode_template("<s>a</s>b") == [1, *tokenizer.encode("a"), 2, *tokenizer.encode("b")]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_whole_characters_and_in_total_the_same(tokenizer, text: str):
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.put(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
    if text.isascii() and text.replace(" ", ""):
        assert sum(map(bool, pieces)) > 1


@pytest.mark.parametrize("cut", range(1, 9))
def test_bytes_that_are_no_character_come_at_the_end_or_when_sure(tokenizer, cut: int):
    (*whole,) = tokenizer.encode_template("é🦜世a")
    for ids in (whole[:cut], whole[cut:], [*whole[:cut], *whole], whole[::-1]):
        stream = TextStream(tokenizer)
        assert "".join([stream.put(token) for token in ids]) + stream.end() == tokenizer.decode(ids)


def test_a_character_comes_as_soon_as_it_is_whole(fast: Path):
    tokenizer = load_tokenizer(fast)
    stream = TextStream(tokenizer)
    assert [stream.put(token) for token in tokenizer.encode_template("世é!")] == ["", "", "世", "", "é", "!"]


def test_a_long_text_is_streamed_exactly(checkpoint: Path):
    from passopt.testing.checkpoints import evaluation_text

    tokenizer = load_tokenizer(checkpoint)
    text = evaluation_text()[:4000]
    stream = TextStream(tokenizer)
    assert "".join([stream.put(token) for token in tokenizer.encode(text)]) + stream.end() == text


def test_ids_that_only_pad_the_vocabulary_are_no_text(tokenizer):
    assert tokenizer.decode([10**6, *tokenizer.encode_template("ab"), 10**6]) == "ab"


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("kind", ["checkpoint", "fast"])
def test_tokens_at_begin_and_end_are_as_configured(request, tmp_path: Path, kind: str, begin: bool, end: bool):
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    plain = load_tokenizer(folder).encode_template("ab")
    config = {"add_bos_token": begin, "add_eos_token": end, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    first, last = (1, 2) if kind == "checkpoint" else (0, 1)
    assert load_tokenizer(folder).encode("ab") == [first] * begin + plain + [last] * end


def test_the_post_processor_decides_where_nothing_is_configured(fast: Path):
    assert load_tokenizer(fast).encode("a")[0] == 0


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_file_is_told(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=name):
        load_tokenizer(tmp_path)


def test_no_tokenizer_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match="`ids`"):
        load_tokenizer(tmp_path)


def test_a_begin_token_that_there_is_not_is_told(fast: Path, tmp_path: Path):
    shutil.copyfile(fast / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<none>"}')
    with pytest.raises(ModelError, match="<none>"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def widened(checkpoint: Path, tmp_path_factory) -> Path:
    """The sentencepiece model with six tokens added behind its vocabulary, each file naming some of them."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("widened") / "copy"))
    size = ROTARY.vocab
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "2": {"content": "</s>", "special": True},
        str(size): {"content": "<|im_start|>", "special": True},
        str(size + 1): {"content": "<|im_end|>", "special": True, "rstrip": True},
        str(size + 4): {"content": "tool", "special": False, "single_word": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    added = {"<|im_start|>": size, "<think>": size + 2, "<think>more": size + 3, "<|late|>": size + 5}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    roles = json.loads((folder / "special_tokens_map.json").read_text())
    (folder / "special_tokens_map.json").write_text(json.dumps({**roles, "additional_special_tokens": ["<|late|>"]}))
    return folder


@pytest.mark.parametrize("method", ["encode", "encode_text", "encode_template"])
def test_added_tokens_are_found_in_every_text(widened: Path, checkpoint: Path, method: str):
    plain, size = load_tokenizer(checkpoint), ROTARY.vocab
    found = getattr(load_tokenizer(widened), method)("<|im_start|>user<think>more<think> b<|late|>")
    parts = [[size], plain.encode_text("user"), [size + 3, size + 2], plain.encode_text(" b"), [size + 5]]
    assert found == [index for part in parts for index in part]


def test_added_tokens_keep_to_their_flags(widened: Path, checkpoint: Path):
    plain, size = load_tokenizer(checkpoint), ROTARY.vocab
    tokenizer = load_tokenizer(widened)
    assert tokenizer.encode_text("a<|im_end|> \n b") == [*plain.encode_text("a"), size + 1, *plain.encode_text("b")]
    assert tokenizer.encode_text("a tool") == [*plain.encode_text("a "), size + 4]
    assert tokenizer.encode_text("a tools") == plain.encode_text("a tools")


def test_control_tokens_are_no_added_tokens(widened: Path, checkpoint: Path):
    """Files of a checkpoint list `</s>` too; in a prompt it stays four characters."""
    tokenizer = load_tokenizer(widened)
    assert tokenizer.encode_text("a</s>") == load_tokenizer(checkpoint).encode_text("a</s>")
    assert tokenizer.encode_template("a</s>")[-1] == 2


def test_special_added_tokens_are_no_text_and_others_are(widened: Path):
    tokenizer = load_tokenizer(widened)
    ids = tokenizer.encode_template("<|im_start|>user <think> é🦜<|late|> a tool<|im_end|>")
    assert tokenizer.decode(ids) == "user <think> é🦜 a tool"
    stream = TextStream(tokenizer)
    assert "".join(stream.put(index) for index in ids) + stream.end() == "user <think> é🦜 a tool"


def test_text_around_a_special_token_is_joined(widened: Path, checkpoint: Path):
    first, *others = load_tokenizer(checkpoint).encode_text("structure of the")
    ids = [first, ROTARY.vocab, *others, ROTARY.vocab + 1]
    tokenizer = load_tokenizer(widened)
    assert tokenizer.decode(ids) == "structure of the"
    stream = TextStream(tokenizer)
    assert "".join(stream.put(index) for index in ids) + stream.end() == "structure of the"


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ({"<a>": 600, "<b>": 600}, "'<b>' as 600 and '<a>' as 600"),
        ({"<a>": 5}, "token 5 is .* add '<a>'"),
        ({"<a>": "5"}, "added_tokens.json: the id of '<a>' is \"5\", expected a token id"),
        ({"<a>": -3}, "the id of '<a>' is -3"),
        ({"<a>": True}, "the id of '<a>' is true"),
        ({"<a>": 10**12}, "the id of '<a>' is 1000000000000"),
        ({"<a>": 5.0}, r"the id of '<a>' is 5\.0"),
    ],
)
def test_added_tokens_that_contradict_are_told(checkpoint: Path, tmp_path: Path, added: object, says: str):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ModelError, match=says):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["checkpoint", "fast"])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], expected an object"),
        ({"added_tokens_decoder": {"²": {"content": "<a>"}}}, 'has the key "²", expected a token id'),
        ({"added_tokens_decoder": {"٣": {"content": "<a>"}}}, 'has the key "٣", expected a token id'),
        ({"added_tokens_decoder": {"-3": {"content": "<a>"}}}, 'has the key "-3", expected a token id'),
        ({"added_tokens_decoder": {"9999999999": {"content": "<a>"}}}, "added_tokens_decoder is 9999999999, expected"),
        ({"added_tokens_decoder": {"600": "<a>"}}, r'added_tokens_decoder\[600\] is "<a>", expected an object'),
        ({"added_tokens_decoder": {"600": {}}}, r"\[600\]: content is null, expected a text"),
        (
            {"added_tokens_decoder": {"600": {"content": "a", "special": "no"}}},
            'special is "no", expected true or false',
        ),
        ({"eos_token": 2}, "eos_token is 2, expected a text"),
        ({"eos_token": {"content": 2}}, "eos_token is 2, expected a text"),
        ({"additional_special_tokens": "<a>"}, 'additional_special_tokens is "<a>", expected a list or an object'),
        ({"extra_special_tokens": {"image": 7}}, "extra_special_tokens is 7, expected a text"),
        ({"add_bos_token": "no"}, 'add_bos_token is "no", expected true or false'),
        ({"add_eos_token": 1}, "add_eos_token is 1, expected true or false"),
    ],
)
def test_values_of_another_kind_are_named(request, tmp_path: Path, kind: str, config: dict[str, object], says: str):
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: .*{says}"):
        load_tokenizer(folder)


def test_added_tokens_beside_a_fast_tokenizer(fast: Path, tmp_path: Path):
    folder = Path(shutil.copytree(fast, tmp_path / "copy"))
    size = len(json.loads((fast / "tokenizer.json").read_text())["model"]["vocab"])
    decoder = {str(size): {"content": "<|end|>", "special": True}, str(size + 1): {"content": "<t>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_text("a<t>b<|end|>")
    assert ids[1::2] == [size + 1, size]
    assert tokenizer.decode(ids) == "a<t>b"
