"""Damage files in seeded ways: bytes, lengths, JSON of wrong types, fields of protobuf messages, what is no file."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What a value of JSON is replaced with: every type, and numbers that no size or place can be.
_WRONG_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 40,
    1 << 70,
    -(1 << 63),
    1e308,
    float("nan"),
    "",
    "x",
    "../../etc/passwd",
    "\x00",
    "é\ud7ff" * 50,
    [],
    [[]],
    [None],
    {},
    {"a": {"b": []}},
)
_WRONG_NUMBERS = (0, 1, -1, 2, 7, 99, 1 << 31, -(1 << 31), (1 << 62), -(1 << 62))
_WRONG_TEXTS = ("", "x", "no.such", "a/b", "../up", "/etc/passwd", "\x00", "é" * 40, "0", "-1", "18446744073709551616")

Damage = Callable[[Path, random.Random], None]


def damage(path: Path, chance: random.Random) -> str:
    """Damage one file in place.

    Args:
        path: The file, which is replaced.
        chance: The source of randomness.

    Returns:
        The name of the way in which it was damaged.
    """
    ways: list[Damage] = [*_ANY_FILE]
    if path.suffix == ".json":
        ways += [wrong_json] * 2 * len(ways)
    if path.suffix == ".onnx":
        ways += [wrong_message] * 4 * len(ways)
    if path.suffix == ".safetensors":
        ways += [wrong_header] * 2 * len(ways)
    if path.suffix in {".onnxtxt", ".py", ".txt"}:
        ways += [wrong_text] * 2 * len(ways)
    way = chance.choice(ways)
    way(path, chance)
    return way.__name__


def truncated(path: Path, chance: random.Random) -> None:
    """Cut the end off."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content) or 1)])


def emptied(path: Path, chance: random.Random) -> None:
    """Leave nothing."""
    path.write_bytes(b"")


def flipped(path: Path, chance: random.Random) -> None:
    """Flip a few bits, most of them near the beginning, where structure is."""
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3, 10))):
        within = chance.choice((64, 1024, len(content)))
        if content:
            content[chance.randrange(min(within, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def overwritten(path: Path, chance: random.Random) -> None:
    """Write random bytes over a part."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content) or 1)
    content[start : start + chance.choice((4, 64, 4096))] = chance.randbytes(chance.choice((4, 64, 4096)))
    path.write_bytes(bytes(content))


def all_random(path: Path, chance: random.Random) -> None:
    """Replace all bytes."""
    path.write_bytes(chance.randbytes(chance.choice((1, 8, 9, 100, 5000))))


def repeated(path: Path, chance: random.Random) -> None:
    """Write a part of the file twice."""
    content = path.read_bytes()
    start = chance.randrange(len(content) or 1)
    stop = start + chance.choice((1, 16, 500))
    path.write_bytes(content[:stop] + content[start:])


def cut_out(path: Path, chance: random.Random) -> None:
    """Remove a part from the middle."""
    content = path.read_bytes()
    start = chance.randrange(len(content) or 1)
    path.write_bytes(content[:start] + content[start + chance.choice((1, 16, 500)) :])


def lengthened(path: Path, chance: random.Random) -> None:
    """Add bytes at the end."""
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.choice((1, 100))))


def an_archive(path: Path, chance: random.Random) -> None:
    """Put the file into an archive of its name, as a download may."""
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name, content)


def a_folder(path: Path, chance: random.Random) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def missing(path: Path, chance: random.Random) -> None:
    """Remove it."""
    path.unlink()


def a_circle_of_links(path: Path, chance: random.Random) -> None:
    """Put a symbolic link to itself in its place."""
    path.unlink()
    path.symlink_to(path.name)


def a_dangling_link(path: Path, chance: random.Random) -> None:
    """Put a symbolic link to nothing in its place."""
    path.unlink()
    path.symlink_to(f"{path.name}.gone")


def a_pipe(path: Path, chance: random.Random) -> None:
    """Put a named pipe in its place, from which reading would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def forbidden(path: Path, chance: random.Random) -> None:
    """Take the right to read it away, which has no effect for root."""
    path.chmod(0)


_ANY_FILE: tuple[Damage, ...] = (
    truncated,
    emptied,
    flipped,
    overwritten,
    all_random,
    repeated,
    cut_out,
    lengthened,
    an_archive,
    a_folder,
    missing,
    a_circle_of_links,
    a_dangling_link,
    a_pipe,
    forbidden,
)


def wrong_json(path: Path, chance: random.Random) -> None:
    """Give one or two places of a JSON file another type or value, or nest it deeply."""
    text = path.read_text(encoding="utf-8")
    form = chance.randrange(12)
    if form == 0:
        path.write_text("[" * 100_000, encoding="utf-8")
    elif form == 1:
        path.write_text(json.dumps(chance.choice(_WRONG_VALUES)), encoding="utf-8")
    elif form == 2:
        path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    else:
        body = json.loads(text)
        for _ in range(chance.choice((1, 1, 2))):
            body = _mutated(body, chance)
        path.write_text(json.dumps(body), encoding="utf-8")


def _mutated(body: Any, chance: random.Random) -> Any:
    """Return JSON in which one place is replaced, removed or renamed."""
    place, parents = body, []
    while isinstance(place, (dict, list)) and place and (not parents or chance.random() < 0.7):
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        parents.append((place, key))
        place = place[key]
    if not parents:
        return chance.choice(_WRONG_VALUES)
    holder, key = parents[-1]
    form = chance.randrange(4)
    if form == 0:
        del holder[key]
    elif form == 1 and isinstance(holder, dict):
        holder[f"{key}.other"] = holder.pop(key)
    elif form == 1:
        holder.append(holder[key])
    else:
        holder[key] = chance.choice(_WRONG_VALUES)
    return body


def wrong_header(path: Path, chance: random.Random) -> None:
    """Damage the header of a safetensors file: its length, its JSON, or offsets that are swapped."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    form = chance.randrange(4)
    if form == 0:
        wrong = chance.choice((0, 1, length - 1, length + 1, len(content), 1 << 40, (1 << 64) - 1))
        path.write_bytes(struct.pack("<Q", wrong) + content[8:])
        return
    body = json.loads(header)
    names = [name for name in body if name != "__metadata__"]
    if form == 1 and len(names) > 1:
        one, other = chance.sample(names, 2)
        body[one]["data_offsets"], body[other]["data_offsets"] = body[other]["data_offsets"], body[one]["data_offsets"]
    else:
        body = _mutated(body, chance)
    written = json.dumps(body).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data)


def wrong_text(path: Path, chance: random.Random) -> None:
    """Damage a text: a line lost, doubled or moved, a number or a bracket changed."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for _ in range(chance.choice((1, 1, 3))):
        place = chance.randrange(len(lines))
        form = chance.randrange(6)
        line = lines[place]
        if form == 0:
            lines.insert(chance.randrange(len(lines)), lines.pop(place))
        elif form == 1:
            lines.insert(place, line)
        elif form == 2:
            digits = [index for index, letter in enumerate(line) if letter.isdigit()]
            at = chance.choice(digits or [0])
            lines[place] = line[:at] + chance.choice(("0", "-1", "99999999999999999999", "x")) + line[at + 1 :]
        else:
            at = chance.randrange(len(line) + 1)
            lines[place] = line[:at] + chance.choice("(){}<>[],=:\"';\\\x00é") + line[at + (form % 2) :]
    path.write_text("\n".join(lines), encoding="utf-8")


def wrong_message(path: Path, chance: random.Random) -> None:
    """Change one to three fields somewhere in a model: names, dtypes, shapes, offsets, operators, what is repeated."""
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(path.read_bytes())
    for _ in range(chance.choice((1, 1, 2, 3))):
        _change_field(model, chance)
    path.write_bytes(model.SerializeToString())


def _change_field(model: Any, chance: random.Random) -> None:
    """Walk down to a random message, and change one of its fields."""
    message = model
    while True:
        inner = [field for field, _ in message.ListFields() if field.message_type is not None]
        if not inner or (message is not model and chance.random() < 0.25):
            break
        found = getattr(message, chance.choice(inner).name)
        if hasattr(found, "add"):
            found = chance.choice(list(found)) if len(found) else None
        if found is None:
            break
        message = found
    fields = message.ListFields() if chance.random() < 0.85 else [(item, None) for item in message.DESCRIPTOR.fields]
    if fields:
        _change(message, chance.choice(list(fields))[0], chance)


def _change(message: Any, field: Any, chance: random.Random) -> None:
    value = getattr(message, field.name)
    if hasattr(value, "add") or hasattr(value, "append"):
        _change_repeated(value, field, chance)
    elif field.message_type is not None or chance.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _wrong_scalar(field, value, chance))


def _change_repeated(value: Any, field: Any, chance: random.Random) -> None:
    form = chance.randrange(4)
    place = chance.randrange(len(value)) if len(value) else None
    if place is None:
        if field.message_type is None:
            value.append(_wrong_scalar(field, None, chance))
        else:
            value.add()
    elif form == 0:
        del value[place]
    elif form == 1:
        value.extend([value[place]])
    elif form == 2 and field.message_type is None:
        value[place] = _wrong_scalar(field, value[place], chance)
    else:
        items = list(value)
        chance.shuffle(items)
        copies = [type(item).FromString(item.SerializeToString()) for item in items] if field.message_type else items
        del value[:]
        value.extend(copies)


def _wrong_scalar(field: Any, value: Any, chance: random.Random) -> Any:
    kind = field.cpp_type
    if kind in {field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE}:
        return chance.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if kind == field.CPPTYPE_ENUM:
        return chance.choice([item.number for item in field.enum_type.values])
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            content = bytes(value or b"")
            return chance.choice((b"", content[:-1], content + b"x", chance.randbytes(8), b"\xff\xfe"))
        return chance.choice((*_WRONG_TEXTS, f"{value}x", f"{value}"[:-1]))
    if kind in {field.CPPTYPE_INT32, field.CPPTYPE_UINT32}:
        return chance.choice([number for number in _WRONG_NUMBERS if 0 <= number < 1 << 31] + [16, 23])
    if kind == field.CPPTYPE_UINT64:
        return abs(chance.choice(_WRONG_NUMBERS))
    return chance.choice(_WRONG_NUMBERS)
