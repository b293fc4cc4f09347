"""A key that stands twice is refused at any depth; everything else is as YAML reads it."""

from __future__ import annotations

import pytest
import yaml

from heterosync.data.unique_yaml import PlainLoader, TextLoader


@pytest.mark.parametrize("loader", [PlainLoader, TextLoader])
@pytest.mark.parametrize(
    ("text", "key", "line"),
    [("a: 1\nb: 2\na: 1\n", "a", 3), ("x:\n  - {b: 1, c: 2}\n  - {b: 1,\n     b: 2}\n", "b", 4)],
    ids=["top", "below"],
)
def test_a_key_that_stands_twice_is_named_with_its_line(loader: type, text: str, key: str, line: int) -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.load(text, Loader=loader)
    assert f"'{key}' stands twice" in caught.value.problem and caught.value.problem_mark.line + 1 == line


def test_the_rest_is_as_yaml_reads_it() -> None:
    text = "base: &base {a: 1, b: [no, 2.5, null]}\nown: {<<: *base, a: 2}\nk: x\n"
    assert yaml.load(text, Loader=PlainLoader) == yaml.safe_load(text)
    assert yaml.load("labels: [no, yes]\nn: 0\n", Loader=TextLoader) == {"labels": ["no", "yes"], "n": "0"}
