"""Baichuan's conversations as ids, and chat templates."""

import json
from pathlib import Path

import pytest

from passopt.generation.chat import Message, baichuan_ids, chat_ids
from passopt.generation.sampling import Sampling
from passopt.generation.settings import Settings, read_settings
from passopt.ir.errors import ModelError, UsageError

USER, ASSISTANT = 195, 196


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def ids(*turns: str, room: int | None = None) -> str:
    """Roles by their first letter; `<` and `>` for the role tokens of user and assistant."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [Message(roles[turn[0]], turn[1:]) for turn in turns]
    found = baichuan_ids(messages, encode, user=USER, assistant=ASSISTANT, room=room)
    return "".join({USER: "<", ASSISTANT: ">"}.get(index, chr(index)) for index in found)


@pytest.mark.parametrize(
    ("turns", "room", "expected"),
    [
        (("uhello",), None, "<hello>"),
        (("sbe", "uhi"), None, "be<hi>"),
        (("ua", "ab", "uc"), None, "<a>b<c>"),
        (("ua", "ab"), None, "<a>b"),
        (("ab", "uc"), None, ">b<c>"),
        (("ua", "ub"), None, "<a<b>"),
        # Rounds take 4, 4 and 2: the oldest ones go first, whole.
        (("ua", "ab", "uc", "ad", "ue"), 10, "<a>b<c>d<e>"[-10:]),
        (("uab", "ac", "ude", "af", "ug"), 12, "<ab>c<de>f<g>"[1:]),
        (("uab", "ac", "ude", "af", "ug"), 8, "<de>f<g>"),
        (("uab", "ac", "ude", "af", "ug"), 7, "de>f<g>"),
        (("uab", "ac", "ude", "af", "ug"), 6, "<g>"),
        (("sxy", "uab", "ac", "ug"), 8, "xy<g>"),
        (("sxy", "uab", "ac", "ug"), 9, "xy<ab>c<g>"[-9:]),
    ],
)
def test_rounds_that_fit_are_kept(turns, room, expected):
    assert ids(*turns, room=room) == expected


@pytest.mark.parametrize(("turns", "room"), [(("sxy", "uabcdef"), 8), (("sxyz", "ua"), 2), (("ua", "ab", "ucd"), 2)])
def test_a_last_message_that_does_not_fit_is_refused(turns, room):
    with pytest.raises(UsageError, match=rf"last message takes .* there is room for {room} beside"):
        ids(*turns, room=room)


def test_no_room_is_refused():
    with pytest.raises(UsageError, match="no room"):
        ids("ua", room=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


class Letters:
    def encode(self, text: str) -> list[int]:
        return [0, *encode(text)]

    def encode_template(self, text: str) -> list[int]:
        return encode(text)

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))


def settings(**changes) -> Settings:
    fields = {"eos": frozenset({2}), "pad": 0, "user": None, "assistant": None} | changes
    return Settings(Sampling(), 9, **fields)


def test_role_tokens_mean_the_format_of_baichuan(folder: Path):
    found = chat_ids([Message("user", "a")], folder, Letters(), settings(user=USER, assistant=ASSISTANT), 9)
    assert found == [USER, 0, ord("a"), ASSISTANT]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'assistant' and loop.first %}{{ raise_exception('starts') }}{% endif %}\n"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("place", ["string", "named", "file"])
def test_a_template_is_rendered(folder: Path, place: str):
    config: dict = {"bos_token": {"content": "<s>"}}
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        config["chat_template"] = TEMPLATE if place == "string" else named
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    turns = [Message("system", "be"), Message("user", "hi")]
    text = Letters().decode(chat_ids(turns, folder, Letters(), settings(), None))
    assert "".join(text.split()) == "<s>[system]be[user]hi[assistant]"
    with pytest.raises(ModelError, match="starts"):
        chat_ids([Message("assistant", "x"), Message("user", "y")], folder, Letters(), settings(), None)


def test_a_template_cannot_reach_out(folder: Path):
    config = {"chat_template": "{{ messages.__class__.__mro__ }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="template fails"):
        chat_ids([Message("user", "y")], folder, Letters(), settings(), None)


def test_a_model_without_a_format_is_told(folder: Path):
    with pytest.raises(ModelError, match="no chat format"):
        chat_ids([Message("user", "y")], folder, Letters(), settings(), None)


def test_a_conversation_needs_a_user_and_one_system_text_at_its_begin(folder: Path):
    with pytest.raises(UsageError, match="no message of a user"):
        chat_ids([Message("system", "y")], folder, Letters(), settings(), None)
    with pytest.raises(UsageError, match="message 1 is of the system"):
        chat_ids([Message("user", "y"), Message("system", "x")], folder, Letters(), settings(), None)
    with pytest.raises(UsageError, match="role 'tool'"):
        Message("tool", "x")


def test_settings_are_read_in_order(folder: Path):
    assert read_settings(folder).sampling == Sampling()
    (folder / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 5}')
    assert (read_settings(folder).eos, read_settings(folder).pad) == (frozenset({2}), 5)
    own = {"eos_token_id": [2, 7], "user_token_id": 3, "assistant_token_id": 4, "do_sample": True, "temperature": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(own | {"top_k": 5, "max_new_tokens": 33}))
    found = read_settings(folder)
    assert found.sampling == Sampling(do_sample=True, temperature=0.3, top_k=5)
    assert (found.eos, found.user, found.assistant, found.max_new_tokens) == (frozenset({2, 7}), 3, 4, 33)


@pytest.mark.parametrize("text", ["{", "[]", '{"top_k": "many"}', '{"top_p": 1.5}'])
def test_damaged_settings_are_told(folder: Path, text: str):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_settings(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"max_new_tokens": 1e400', "max_new_tokens is Infinity, expected a number of tokens"),
        ('"max_new_tokens": -5', "max_new_tokens is -5, expected a number of tokens"),
        ('"max_new_tokens": 0', "max_new_tokens is 0, expected a number of tokens"),
        ('"temperature": 1e400', "temperature is Infinity, expected a number"),
        ('"temperature": NaN', "temperature is NaN, expected a number"),
        ('"temperature": true', "temperature is true, expected a number"),
        ('"repetition_penalty": 1' + 400 * "0", "repetition_penalty is 10+…, expected a number"),
        ('"top_k": 5.5', r"top_k is 5\.5, expected a whole number"),
        ('"top_p": "0.9"', 'top_p is "0.9", expected a number'),
        ('"do_sample": "false"', 'do_sample is "false", expected true or false'),
        ('"eos_token_id": -1', "eos_token_id is -1, expected a token id"),
        ('"eos_token_id": [2, true]', "eos_token_id is true, expected a token id"),
        ('"pad_token_id": [0]', r"pad_token_id is \[0\], expected a token id"),
        ('"pad_token_id": 1000000000000', "pad_token_id is 1000000000000, expected a token id"),
        ('"user_token_id": "195"', 'user_token_id is "195", expected a token id'),
        ('"assistant_token_id": 196.0', r"assistant_token_id is 196\.0, expected a token id"),
    ],
)
def test_settings_of_another_kind_are_named(folder: Path, text: str, says: str):
    (folder / "generation_config.json").write_text(f"{{{text}}}")
    with pytest.raises(ModelError, match=rf"generation_config\.json: {says}"):
        read_settings(folder)


def test_settings_of_another_kind_in_config_json_are_named(folder: Path):
    (folder / "config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ModelError, match=r'[^_]config\.json: eos_token_id is "2", expected a token id'):
        read_settings(folder)


def test_no_pad_token_is_written_as_null_or_as_minus_one(folder: Path):
    (folder / "config.json").write_text('{"eos_token_id": 2, "pad_token_id": -1}')
    assert read_settings(folder).pad == 2
    (folder / "generation_config.json").write_text('{"pad_token_id": null, "top_k": null, "do_sample": null}')
    assert (read_settings(folder).pad, read_settings(folder).sampling) == (2, Sampling(top_k=0))


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("zero", [0, 0.0])
def test_sampling_of_the_most_likely_token_alone_is_greedy(folder: Path, name: str, zero: float):
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, name: zero, "top_k": 5}))
    assert read_settings(folder).sampling == Sampling(do_sample=False, top_k=5)


@pytest.mark.parametrize(
    ("own", "ignored"),
    [
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, ("no_repeat_ngram_size", "num_beams")),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": []}, ()),
        ({"min_p": 0.1, "typical_p": 0.9}, ()),
        ({"min_p": 0.1, "typical_p": 1.0, "do_sample": True}, ("min_p",)),
        ({"max_length": 512}, ("max_length",)),
        ({"max_length": 512, "max_new_tokens": 9}, ()),
        ({"user_token_id": 3, "transformers_version": "4.29.2", "chat_format": "chatml"}, ()),
    ],
)
def test_options_that_are_not_implemented_are_known(folder: Path, own: dict[str, object], ignored: tuple[str, ...]):
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert read_settings(folder).ignored == ignored


def test_a_template_gets_the_begin_token_of_either_file(folder: Path):
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert chat_ids([Message("user", "y")], folder, Letters(), settings(), None) == Letters().encode_template("<s>y")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (5, "chat_template is 5, expected a text"),
        ({"default": "x"}, 'chat_template is {"default": "x"}, expected a text'),
        (["x"], 'chat_template is "x", expected an object'),
        ([{"name": "default", "template": 5}], "chat_template is 5, expected a text"),
    ],
)
def test_a_template_of_another_kind_is_named(folder: Path, template: object, says: str):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {says}"):
        chat_ids([Message("user", "y")], folder, Letters(), settings(), None)
