"""Nothing published goes unchecked: every key of every reference vector, and every invariant, is named by a test."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reference_vectors import VECTORS

ROOT = Path(__file__).parents[1]
FILES = [path for path in sorted(ROOT.rglob("test_*.py")) if path != Path(__file__)]
NOT_BY_NAME = {
    ("V7b_ppo_paper_controller", "rule"): "prose; the cases are checked",
    ("V10b_dpo_at_init", "accuracy_note"): "prose; the loss is checked",
    ("V14b_bon_unbiased", "n_to_goldmean_proxymean", "*"): "iterated: its keys are the n",
}
INVARIANTS = range(1, 25)


def words_by_test(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield each test with the strings that it, and what it uses of its own module, are written with."""
    definitions: dict[str, ast.stmt] = {}
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            definitions |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
    for test in definitions:
        if test.startswith("test_"):
            words, seen, left = set(), set(), [test]
            while left:
                seen.add(name := left.pop())
                for node in ast.walk(definitions[name]):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        words.add(node.value)
                    elif isinstance(node, ast.Name) and node.id in definitions and node.id not in seen:
                        left.append(node.id)
            yield test, words


TESTS = [(path.name, *test) for path in FILES for test in words_by_test(path)]


def key_paths(content: dict[str, Any], *parents: str) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*parents, key)
        if isinstance(value, dict):
            yield from key_paths(value, *parents, key)


@pytest.mark.parametrize("name", VECTORS)
def test_every_key_of_a_vector_is_named_where_the_vector_is_used(name: str) -> None:
    users = [words for _, _, words in TESTS if name in words]
    assert users, f"no test uses {name}"
    excused = [pattern for pattern in NOT_BY_NAME if pattern[0] == name]
    forgotten = [
        path
        for path in key_paths(VECTORS[name], name)
        if not any(path[-1] in words for words in users)
        and not any(path == p or (p[-1] == "*" and path[:-1] == p[:-1]) for p in excused)
    ]
    assert not forgotten


def test_every_excuse_is_of_a_key_that_exists() -> None:
    paths = {path for name in VECTORS for path in key_paths(VECTORS[name], name)}
    assert {pattern[:-1] if pattern[-1] == "*" else pattern for pattern in NOT_BY_NAME} <= paths


@pytest.mark.parametrize("number", INVARIANTS)
def test_every_invariant_has_a_test_of_its_name(number: int) -> None:
    assert [test for _, test, _ in TESTS if re.search(rf"_i{number}_", test)]
