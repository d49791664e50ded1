"""Files that are no configuration: (what is wrong, what the message must say, the bytes)."""

from itertools import pairwise

from configs.load import PRESETS

_PRESET = (PRESETS / "quickstart.yaml").read_bytes()
_NAMES = "abcdefghij"
_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise(_NAMES)
)
_MERGES = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in pairwise(_NAMES)
)

_TEXTS: tuple[tuple[str, str, str], ...] = (
    ("a tab as indentation", "line 2", "run:\n\tname: x\n"),
    ("an unclosed bracket", "line 2", "run: {name: [\n"),
    ("an unclosed quotation", "not valid YAML", "run: {name: 'x}\n"),
    ("a bracket too many", "line 1", "run: {name: x}}\n"),
    ("a key twice", "duplicate key", "run: {name: a}\nrun: {name: b}\n"),
    ("a nested key twice", "duplicate key", "run:\n  name: a\n  name: b\n"),
    ("a number and the same as text", "comes twice", "rounds: {overrides: {1: {}, '1': {}}}\n"),
    ("two colons", "line 1", "run: name: x\n"),
    ("a wrong indentation", "line 3", "run:\n    name: x\n  seed: 1\n"),
    ("a list and a mapping mixed", "line 2", "run: 1\n- a\n"),
    ("an alias of nothing", "undefined alias", "run: *nothing\n"),
    ("billion laughs", "more than", _LAUGHS),
    ("billion laughs by merging", "more than", _MERGES),
    ("a list in itself", "contains itself", "run: &a [*a]\n"),
    ("a mapping in itself", "contains itself", "run: &a {name: x, more: {deep: *a}}\n"),
    ("a thousand open brackets", "levels", "run: " + "[" * 1000),
    ("a thousand open braces", "levels", "run: " + "{a: " * 1000),
    ("a hundred indentations", "levels", "\n".join(" " * depth + "a:" for depth in range(100))),
    ("a hundred dashes", "levels", "- " * 100 + "x"),
    ("a Python object", "tag", "run: !!python/object/apply:os.system ['true']\n"),
    ("a number by tag", "tag", "run: {seed: !!int abc}\n"),
    ("a truth by tag", "tag", "learner: {gradient_checkpointing: !!bool maybe}\n"),
    ("bytes by tag", "tag", "run: {name: !!binary aGVsbG8=}\n"),
    ("a tag of one's own", "tag", "run: !mine {name: x}\n"),
    ("two documents", "single document", "run: {name: x}\n---\nrun: {name: y}\n"),
    ("an unknown directive", "not valid YAML", "%YAML nine\n---\nrun: {name: x}\n"),
    ("a control character", "not valid YAML", "run: {name: x\x07}\n"),
    ("a NUL", "not valid YAML", "run: {name: x\x00}\n"),
    ("a NUL as escape", "run.dir", 'run: {name: x, dir: "a\\0b"}\n'),
    ("half a character", "run.name", 'run: {name: "\\ud83d"}\n'),
    ("a list as key", "not text", "run: {? [a, b] : 1}\n"),
    ("null as key", "not text", "run: {null: 1}\n"),
    ("a truth as key", "not text", "run: {true: 1}\n"),
    ("a fraction as key", "not text", "run: {1.5: 1}\n"),
    ("a number of ten thousand digits", "digits", "run: {name: x, seed: " + "9" * 10_000 + "}\n"),
    ("a hexadecimal number of ten thousand digits", "digits", "run: {name: x, seed: 0x" + "f" * 10_000 + "}\n"),
    ("a number without digits", "not valid YAML", "run: {name: ._}\n"),
    ("nothing", "no sections", ""),
    ("comments alone", "no sections", "# run:\n# name: x\n"),
    ("a list at the top", "no sections", "- run\n- models\n"),
    ("a word at the top", "no sections", "quickstart\n"),
    ("a number at the top", "no sections", "42\n"),
    ("ten megabytes of a list", "KiB", "run: [" + "1, " * 3_500_000 + "]\n"),
    ("ten megabytes of one word", "KiB", "run: " + "x" * 10_000_000),
    ("ten megabytes of lines", "KiB", "run: 1\n" * 1_500_000),
    ("a list of 100 000", "more than", "run: [" + "1, " * 100_000 + "]\n"),
    ("a JSON Lines file", "not valid YAML", '{"prompt": "a"}\n{"prompt": "b"}\n'),
)

BROKEN: tuple[tuple[str, str, bytes], ...] = (
    *((name, says, text.encode()) for name, says, text in _TEXTS),
    ("Latin-1", "not valid YAML", "run: {name: größer}\n".encode("latin-1")),
    ("UTF-16", "not valid YAML", "run: {name: x}\n".encode("utf-16")),
    ("a Parquet file", "not valid YAML", b"PAR1\x15\x04\x15\x80\xff\xfePAR1"),
    ("gzip", "not valid YAML", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
    *((f"a preset cut at byte {cut}", "error:", _PRESET[:cut]) for cut in range(100, 1800, 170)),
    *(
        (f"a byte that is no UTF-8 at {at}", "not valid YAML", _PRESET[:at] + b"\xff" + _PRESET[at + 1 :])
        for at in range(7, 2000, 199)
    ),
)
