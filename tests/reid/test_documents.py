"""YAML and JSON of any shape: read, or refused at once in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mrcn_fast.reid.documents import DocumentError, read_json, read_yaml

BOMB = b"a: &a [x, x]\n" + b"".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n".encode()
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "\ufeffa: 1e-3\nb: 010\nc: 1:30\nd: yes\ne: 2024-01-01\nf: .5\ng: ~\nh: ~/x\ni: -7\nj: [1, 2]\n"
        "k: &k true\nl: *k\nm: '3'\nn:\n<<: {a: 2}\n",
        encoding="utf-8",
    )
    assert read_yaml(path, "values") == {
        "a": 1e-3, "b": 10, "c": "1:30", "d": "yes", "e": "2024-01-01", "f": 0.5, "g": None, "h": "~/x",
        "i": -7, "j": [1, 2], "k": True, "l": True, "m": "3", "n": None, "<<": {"a": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "found an empty file"),
        (b"# a note\n", "found an empty file"),
        (b"- 1\n", "found a list"),
        (b"abc\n", "found text"),
        (b"7\n", "found a number"),
        (b"a: [\n", "this is no YAML: "),
        (b"a:\n\t- 1\n", "in line 2, column 1"),
        (b"a: *b\n", "undefined alias"),
        (b"? [a]\n: 1\n", "this is no YAML: "),
        (b"&a {? *a : 1}\n", "this is no YAML: "),
        (b'a: "\\Uffffffff"\n', "an escaped character that there is not"),
        (b"a: 1\nb: 2\na: 3\n", "found 'a' a second time in line 3"),
        (b"---\na: 1\n---\nb: 2\n", "a second document (---) in line 3"),
        (b"a: !!python/name:os.system\n", "python/name:os.system in line 1; leave it out"),
        (b"a: !!timestamp foo\n", "the tag"),
        (b"a: b\x00c\n", "the character 0x00 at 4"),
        (b"a: \xff\n", "in UTF-8; found the byte 0xff at 3"),
        ("a: 1\n".encode("utf-16"), "in UTF-8; found UTF-16. Save the file as UTF-8"),
        (b"#" * 70_000, "of at most 65536 bytes; found a larger file"),
        (b"a: " + b"1" * 60_000, "a number of 60000 digits"),
        (b"[" * 60_000, "nested more than 8 deep, the limit"),
        (b"- " * 30_000, "nested more than 8 deep, the limit"),
        (b"{a: " * 15_000, "nested more than 8 deep, the limit"),
        (BOMB, "more than 16 aliases (*name), the limit"),
        (b"a: [" + b"*a, " * 9000, "more than 16 aliases"),
    ],
)
def test_other_yaml_is_refused_at_once(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    begun = time.perf_counter()
    with pytest.raises(DocumentError) as error:
        read_yaml(path, "values by name")
    assert time.perf_counter() - begun < 10
    message = str(error.value)
    assert message.startswith(f"{path}: expected values by name") and expected in message
    assert len(message) < 500 and "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "this is no JSON from line 1, column 1 on"),
        (b'{"a": 1,\n}', "this is no JSON from line 2"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b"1" * 5000, "this is no JSON"),
        (b"\xff\xfe", "found UTF-16"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError) as error:
        read_json(path, "a table")
    assert str(error.value).startswith(f"{path}: expected a table") and expected in str(error.value)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_places_without_a_file_are_named(tmp_path: Path, read: object) -> None:
    assert callable(read)
    for path, found in ((tmp_path / "absent.yaml", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(DocumentError, match=f"{path}: expected values; found {found}"):
            read(path, "values")
