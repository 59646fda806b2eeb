"""Changes of valid files: flipped bits, cuts and splices of bytes, and changes of what the bytes mean, by the file's format."""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import pickle
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_longpo.runtime.json_lines import encode_line

Value = Any
Change = Callable[[random.Random, bytes], bytes]

# Folder that code from an input would make, and a file outside of every input's folder; both are watched. Relative names are in
# the inputs, so that a seed is the same on every machine.
CANARY = "/tmp/megatron_longpo_fuzz_canary"
OUTSIDE = "/tmp/megatron_longpo_fuzz_outside.txt"

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 64, 127, 128, 255, 256, 1000, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**18, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, -0.5, 1e-300, 1e-5, 1e5, 1e38, 1e39, 1e300, -1e300, math.inf, -math.inf, math.nan),
)
TEXTS: tuple[str, ...] = (
    *(
        "",
        " ",
        "\0",
        "\n",
        "\r\n",
        "\u2028",
        "\ud800",
        "\ufeff",
        "\x1b[31m",
        "x" * 70,
        "y" * 100_000,
        "é" * 3000,
        "塔",
        "-",
        "--help",
    ),
    *(
        "..",
        "/",
        "../" * 12 + OUTSIDE.lstrip("/"),
        OUTSIDE,
        CANARY,
        "a/b",
        "~",
        "$HOME",
        "%s%n",
        "{}",
        "{0}",
        "null",
        "1e5",
        "nan",
        "true",
    ),
    *(
        "<script>alert(1)</script>",
        "]]>",
        "<|im_start|>",
        "<|im_end|>",
        "modeling_evil.Evil",
        "1" * 5000,
        "9" * 400,
        "-1",
        "0x10",
    ),
    *(
        "__class__",
        "os.system",
        "!!python/object/apply:os.mkdir",
        "*a",
        "&a",
        "<<",
        "float32",
        "int64",
        "bfloat16",
        "llama",
        "auto_map",
    ),
)
_DEPTHS = (3, 63, 64, 65, 66, 200, 990, 3000)


def plain_value(rng: random.Random) -> Value:
    """A number, text or container that a file would not hold."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.choice((None, True, False))
    if kind == 8:
        return rng.choice(
            ([], {}, [[]], [None], {"": None}, [0] * 5000, {str(i): i for i in range(2000)}, ["x"], {"a": {"b": {}}})
        )
    value: Value = plain_value(rng) if rng.random() < 0.5 else 1
    for _ in range(rng.choice(_DEPTHS)):
        value = [value] if rng.random() < 0.7 else {"a": value}
    return value


def _places(value: Value, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything within a value, itself included; not deeper than the seeds are."""
    found = [path]
    if len(path) < 12:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, child in list(items)[:300]:
            found += _places(child, (*path, key))
    return found


def change_value(rng: random.Random, value: Value, other: Value = None) -> Value:
    """A copy of a plain value with some of its parts replaced, removed, doubled, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        places = _places(value)
        path = rng.choice(places)
        if not path:
            if rng.random() < 0.15:
                return plain_value(rng) if other is None or rng.random() < 0.5 else copy.deepcopy(other)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key, old = path[-1], None
        if isinstance(parent, tuple) or (isinstance(parent, list) and key >= len(parent)):
            continue
        old = parent[key]
        action = rng.randrange(12)
        if action < 5:
            parent[key] = plain_value(rng)
        elif action == 5:
            del parent[key]
        elif action == 6:
            parent[key] = rng.choice(([old], {"value": old}, str(old), [old, old], None))
        elif action == 7:
            source = other if other is not None and rng.random() < 0.5 else value
            chosen = source
            for step in rng.choice(_places(source)):
                chosen = chosen[step]
            parent[key] = copy.deepcopy(chosen) if chosen is not value else None
        elif action == 8 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        elif action == 9 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = plain_value(rng)
        elif action == 10 and isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(old)] * rng.choice((1, 2, 100))
        elif isinstance(old, bool) or old is None:
            parent[key] = plain_value(rng)
        elif isinstance(old, int | float):
            parent[key] = rng.choice((-old, old + 1, old - 1, old * 1000, old * 10**9, old / 3, str(old), float(old)))
        elif isinstance(old, str):
            parent[key] = text(rng, old)
        else:
            parent[key] = plain_value(rng)
    return value


def text(rng: random.Random, old: str) -> str:
    """A text with something put in, taken out or doubled."""
    start = rng.randrange(len(old) + 1)
    end = min(len(old), start + rng.choice((0, 1, 2, 10, len(old))))
    middle = rng.choice((rng.choice(TEXTS), old[start:end] * rng.choice((0, 2, 50)), chr(rng.randrange(0x110000))))
    return old[:start] + middle + old[end:]


# --------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------


def flip(rng: random.Random, content: bytes) -> bytes:
    """One bit, or a few bytes, flipped: what a disk or a cable does."""
    if not content:
        return content
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    """The beginning only, or with zeros instead of a part: what a full disk or a killed writer leaves."""
    place = rng.randrange(len(content) + 1)
    if rng.random() < 0.6:
        return content[:place]
    length = rng.choice((1, 8, 512, 4096))
    return content[:place] + bytes(min(length, len(content) - place)) + content[place + length :]


def havoc(rng: random.Random, content: bytes) -> bytes:
    """Bytes replaced, inserted, removed, doubled and moved."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 2, 4, 8, 16, 100))
        action = rng.randrange(7)
        if action == 0:
            changed[place : place + size] = rng.randbytes(size)
        elif action == 1:
            del changed[place : place + size]
        elif action == 2:
            changed[place:place] = changed[place : place + size] * rng.choice((1, 3, 100))
        elif action == 3:
            number = rng.choice([n for n in NUMBERS if isinstance(n, int) and -(2**63) <= n < 2**64])
            kind = rng.choice("<>") + rng.choice("bhiq" if number < 0 else "BHIQ")
            raw = struct.pack(
                kind,
                number % 256 ** struct.calcsize(kind)
                if number >= 0
                else max(number, -(256 ** struct.calcsize(kind) // 2)),
            )
            changed[place : place + len(raw)] = raw
        elif action == 4:
            changed[place:place] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif action == 5:
            source = rng.randrange(len(changed) + 1)
            changed[place : place + size] = changed[source : source + size]
        else:
            changed[place:place] = rng.choice(
                (b"[", b"{", b'"', b"\\", b"(", b"{%", b"\xff\xfe", b"\x80")
            ) * rng.choice((1, 50, 2000))
    return bytes(changed)


# --------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------


def _json(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    value = change_value(rng, json.loads(content), rng.choice(made) if made and rng.random() < 0.3 else None)
    return json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


def _json_lines(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    lines = content.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 5))):
        number = rng.randrange(len(lines))
        action = rng.randrange(8)
        if action == 0:
            del lines[number]
        elif action == 1:
            lines.insert(number, rng.choice(lines))
        elif action == 2:
            lines[number] = havoc(rng, lines[number])
        elif action == 3 and made:
            lines.insert(number, json.dumps(rng.choice(made)).encode() + b"\n")
        else:
            try:
                row = json.loads(lines[number])
            except ValueError:
                continue
            checked = isinstance(row, dict) and row.pop("crc32", None) is not None
            row = change_value(rng, row)
            fits = checked and isinstance(row, dict) and row
            lines[number] = encode_line(row) if fits else json.dumps(row).encode("utf-8", "surrogatepass") + b"\n"
        lines = lines or [b"\n"]
    return b"".join(lines)


_YAML_PIECES = (
    *(
        "!!python/object/apply:os.mkdir ['" + CANARY + "']",
        "!!python/name:os.system",
        "&a [*a]",
        "*a",
        "&a [1]\n",
        "<<: *a",
        "!!binary x",
    ),
    *(
        "? [x]",
        "!!set {a}",
        "1e400",
        "2001-01-01",
        "0o17",
        "0x1p3",
        "190:20:30",
        "[" * 3000,
        "{a: " * 300,
        "| \n  x",
        "!!int x",
        "---\n",
    ),
    *(
        "a: &x [1,1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y,*y]\n"
        "d: [*z,*z,*z,*z,*z,*z]\n",
    ),
)


def _yaml(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    if rng.random() < 0.4:
        lines = content.decode().split("\n")
        number = rng.randrange(len(lines))
        piece = rng.choice(_YAML_PIECES)
        head = lines[number].split(":")[0]
        lines[number] = rng.choice((f"{head}: {piece}", piece, lines[number] + " " + piece))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    value = change_value(rng, yaml.safe_load(content), rng.choice(made) if made and rng.random() < 0.2 else None)
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError, ValueError):
        return havoc(rng, content)


_TEMPLATE_PIECES = (
    *(
        "{% for a in range(99999) %}",
        "{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ),
    *(
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('" + CANARY + "') }}",
        "{{ lipsum.__globals__ }}",
    ),
    *(
        "{% set x = namespace(v='x') %}",
        "{% set x.v = x.v ~ x.v %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 9 ** 9 }}",
    ),
    *(
        "{{ raise_exception('no') }}",
        "{{ messages | tojson }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ 1 / 0 }}",
    ),
    *(
        "{{ strftime_now('%Y') }}",
        "{% generation %}",
        "{{ (range(99999) | list) * 99999 }}",
        "{{ '%*d' | format(999999999, 1) }}",
    ),
    *(
        "{{ messages | sort }}",
        "{{ self }}",
        "{% call f() %}{% endcall %}",
        "{{ [1, 2][10 ** 3] }}",
        "{{ x.y.z }}",
        "{%- if",
        "}}",
        "{#",
    ),
    *(
        "{{ '<|im_start|>' }}",
        "{{ bos_token }}",
        "{{ messages[0]['content'][::-1] }}",
        "{{ loop }}",
        "{{ messages.pop() }}",
        "{% break %}",
    ),
    *(
        "{{ ''.join(messages) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ messages | batch(0) | list }}",
    ),
)


def _template(rng: random.Random, content: bytes, _made: Sequence[Value]) -> bytes:
    source = content.decode("utf-8")
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(source) + 1)
        end = min(len(source), start + rng.choice((0, 0, 1, 10, 40)))
        source = source[:start] + rng.choice((*_TEMPLATE_PIECES, rng.choice(TEXTS))) + source[end:]
    return source.encode("utf-8", "surrogatepass")


def _safetensors(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    (size,) = struct.unpack_from("<Q", content)
    head = json.dumps(
        change_value(rng, json.loads(content[8 : 8 + size]), rng.choice(made) if made and rng.random() < 0.2 else None)
    )
    raw = head.encode("utf-8", "surrogatepass")
    said = len(raw) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + raw + content[8 + size :]


_NUMPY_PIECES = (
    b"<f8",
    b"|O",
    b"<f4",
    b">f8",
    b"<U9",
    b"<i8",
    b"|V0",
    b"True",
    b"(6, 2)",
    b"(12,)",
    b"(0, 2)",
    b"(999999999999, 2)",
    b"(-1,)",
)


def _numpy(rng: random.Random, content: bytes, _made: Sequence[Value]) -> bytes:
    old = rng.choice([piece for piece in (b"<f8", b"False", b"(6, 2)") if piece in content] or [content[:1]])
    return content.replace(old, rng.choice(_NUMPY_PIECES), 1)


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.path,)


def _index_of_checkpoint(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    """The index of a distributed checkpoint: its objects' attributes changed, or one that runs code."""
    if rng.random() < 0.1:
        return pickle.dumps(_Evil(CANARY))
    index = pickle.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        holder = index
        while True:
            parts = (
                list(holder.values()) if isinstance(holder, dict) else list(holder) if isinstance(holder, list) else []
            )
            if not parts and hasattr(holder, "__dict__"):
                name = rng.choice(sorted(vars(holder)))
                inner = vars(holder)[name]
                if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
                    holder = inner
                    continue
                old = inner
                new = rng.choice(
                    (plain_value(rng), torch.Size([2**40, 2**40]), torch.Size([0]), torch.Size([3]), _Evil(CANARY), old)
                )
                if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.6:
                    new = rng.choice((0, -1, old + 1, old - 1, 2**40, 2**63 - 1))
                object.__setattr__(holder, name, new)
                break
            if not parts:
                break
            if isinstance(holder, dict) and rng.random() < 0.15:
                key = rng.choice(list(holder))
                holder.pop(key)
                break
            if isinstance(holder, dict) and rng.random() < 0.1:
                holder[rng.choice(list(holder))] = plain_value(rng)
                break
            holder = rng.choice(parts)
    try:
        return pickle.dumps(index, protocol=rng.choice((2, 4)))
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
        return havoc(rng, content)


def _torch_file(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    """A file of torch.save: its plain values changed, or one that runs code."""
    stream = io.BytesIO()
    if rng.random() < 0.1:
        torch.save({"progress": _Evil(CANARY)}, stream)
        return stream.getvalue()
    try:
        value = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return havoc(rng, content)
    try:
        torch.save(change_value(rng, value, rng.choice(made) if made else None), stream)
    except (RuntimeError, RecursionError, pickle.PicklingError, UnicodeEncodeError):
        return havoc(rng, content)
    return stream.getvalue()


def _binary_index(rng: random.Random, content: bytes, _made: Sequence[Value]) -> bytes:
    """Numbers of an .idx file: header, lengths, pointers, ends, modes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = rng.choice((1, 4, 8))
        place = rng.choice((rng.randrange(0, 34), rng.randrange(0, max(1, len(changed) - 8))))
        if rng.random() < 0.7:
            place = 34 + (place // 4) * 4
        number = rng.choice((0, -1, 1, 2, 16, 127, 2**31 - 1, 2**40, 2**63 - 1, -(2**63), -(2**31)))
        changed[place : place + size] = struct.pack("<q", number)[:size]
    return bytes(changed)


def _compressed(
    rng: random.Random,
    content: bytes,
    inner: Callable[[random.Random, bytes, Sequence[Value]], bytes],
    made: Sequence[Value],
) -> bytes:
    return gzip.compress(inner(rng, gzip.decompress(content), made), 1)


_HEADERS = (
    *(
        b"Content-Length: 5",
        b"Content-Length: 99999999999999999999",
        b"Content-Length: -1",
        b"Content-Length: x",
        b"Retry-After: 1e400",
    ),
    *(
        b"Transfer-Encoding: chunked",
        b"Content-Encoding: gzip",
        b"Content-Encoding: deflate",
        b"Content-Encoding: br, gzip, gzip",
    ),
    *(
        b"Location: http://127.0.0.1:1/",
        b"Location: file:///etc/passwd",
        b"Location: //x",
        b"Retry-After: Fri, 31 Dec 9999 23:59:59 GMT",
    ),
    *(
        b"Retry-After: -1",
        b"Content-Type: text/html; charset=utf-7",
        b"Set-Cookie: " + b"x" * 9000,
        b"X: " + b"y" * 70000,
        b": ",
        b"\x00: \x00",
    ),
    *(
        b"Connection: keep-alive",
        b"HTTP/1.1 200 OK",
        b"Content-Length: 1\r\nContent-Length: 2",
        b" folded",
        b"Content-Type: application/json; charset=x",
    ),
)


def _reply(rng: random.Random, content: bytes, made: Sequence[Value]) -> bytes:
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    action = rng.randrange(6)
    if action == 0:
        lines[0] = (
            rng.choice((b"HTTP/1.1 ", b"HTTP/9.9 ", b"ICY ", b""))
            + rng.choice((b"200", b"100", b"204", b"301", b"307", b"400", b"413", b"429", b"500", b"999", b"-1", b"x"))
            + b" X"
        )
    elif action < 3:
        place = rng.randrange(1, len(lines) + 1)
        lines[place : place + rng.randrange(2)] = [rng.choice(_HEADERS)] * rng.choice((1, 1, 2, 150))
    elif action == 3 and body.startswith(b"{"):
        try:
            body = _json(rng, body, made)
        except ValueError:
            body = havoc(rng, body)
        lines = [
            b"Content-Length: %d" % len(body) if line.lower().startswith(b"content-length") else line for line in lines
        ]
    elif action == 4:
        body = havoc(rng, body)
    else:
        body = body * rng.choice((0, 2, 2000))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _ignore_made(change: Change) -> Callable[[random.Random, bytes, Sequence[Value]], bytes]:
    return lambda rng, content, _made: change(rng, content)


_BY_ENDING: tuple[tuple[str, Callable[[random.Random, bytes, Sequence[Value]], bytes]], ...] = (
    (".jsonl.gz", lambda rng, content, made: _compressed(rng, content, _json_lines, made)),
    (".json.gz", lambda rng, content, made: _compressed(rng, content, _json, made)),
    (".gz", lambda rng, content, made: _compressed(rng, content, _ignore_made(havoc), made)),
    (".jsonl", _json_lines),
    (".json", _json),
    (".yaml", _yaml),
    (".jinja", _template),
    (".safetensors", _safetensors),
    (".npy", _numpy),
    (".metadata", _index_of_checkpoint),
    (".pt", _torch_file),
    ("pytorch_model.bin", _torch_file),
    (".idx", _binary_index),
    (".http", _reply),
)


def change_file(rng: random.Random, name: str, content: bytes, made: Sequence[Value]) -> tuple[bytes, bool]:
    """A file with a change.

    Args:
        rng: draws the change.
        name: name of the file, whose ending gives its format.
        content: its valid content.
        made: values to splice in.

    Returns:
        The changed content, and whether it was only damaged (bits flipped), as no program would do it on purpose.
    """
    kind = rng.random()
    if kind < 0.15:
        return flip(rng, content), True
    if kind < 0.25:
        return cut(rng, content), False
    if kind < 0.40:
        return havoc(rng, content), False
    if kind < 0.43:
        return rng.choice(TEXTS).encode("utf-8", "surrogatepass"), False
    if kind < 0.46 and made:
        return json.dumps(rng.choice(made)).encode("utf-8", "surrogatepass"), False
    for ending, change in _BY_ENDING:
        if Path(name).name.endswith(ending):
            try:
                return change(rng, content, made), False
            except Exception:  # it was changed before, and is not of its format any more
                break
    return havoc(rng, content), False
