"""YAML in which no key stands twice: YAML itself takes the last one, without a word."""

from __future__ import annotations

from typing import Any

import yaml


class _UniqueKeys(yaml.constructor.BaseConstructor):
    """Raises `ConstructorError` for a mapping that names a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                problem = f"the key '{key.value}' stands twice: keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class TextLoader(_UniqueKeys, yaml.BaseLoader):
    """Every scalar is text: YAML would read the labels [no, yes] as booleans and [0, 1] as numbers."""


class PlainLoader(_UniqueKeys, yaml.SafeLoader):
    """Plain values, as `yaml.safe_load`."""
