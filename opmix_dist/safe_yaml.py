"""YAML of unknown origin: plain values, no more of them than such a text may hold.

``yaml.safe_load`` makes plain values only, but a few lines of aliases of aliases stand for billions of them
as soon as anybody walks over the result, and merge keys expand them at once.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_NODES = 100_000
"""Values, with each counted as often as aliases repeat it."""
MAX_NUMBER_CHARACTERS = 400
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def load_yaml(text: str | bytes) -> Any:
    """As ``yaml.safe_load``.

    Raises:
        ValueError: it is not valid YAML, stands for more than ``MAX_NODES`` values, contains itself or is too
            deep, or has a number or date that is none; one line.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _count(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Values that ``node`` stands for.

    Args:
        counted: by node's identity, of what was counted before; None of what is being counted.
    """
    if id(node) in counted:
        known = counted[id(node)]
        if known is None:
            raise ValueError("an alias contains itself")
        return known
    counted[id(node)] = None
    total = 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARACTERS:
            raise ValueError(f"a number has {len(node.value)} characters")
    else:
        children = [part for pair in node.value for part in pair] if _is_mapping(node) else node.value
        total += sum(_count(child, counted) for child in children)
    if total > MAX_NODES:
        raise ValueError(f"it stands for more than {MAX_NODES} values")
    counted[id(node)] = total
    return total


def _is_mapping(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode)
