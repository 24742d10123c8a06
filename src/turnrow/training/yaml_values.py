"""Values in a recipe file and on the command line, as YAML 1.2 reads them."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jsonargparse import set_loader

__all__ = ["YAML_MODE", "load_yaml"]

YAML_MODE = "turnrow-recipe"
"""The `parser_mode` of jsonargparse that reads values with `load_yaml`."""


_OPEN_SLICE = re.compile(r"[\d.%:]+:")
"""As ``--method.blocks 50%:`` gives it, where no quotes are left; to YAML a mapping."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``2e-3`` is a number; ``no``, a strategy and a label, and ``8:16``, a slice, are text. PyYAML keeps to
    YAML 1.1, where the last is 496, in sixties.
    """


_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.removeprefix("tag:yaml.org,2002:") not in ("bool", "int", "float")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0[0-7_]+|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Read one YAML document into plain values; raises yaml.YAMLError. A word that ends in a colon, a slice, is text."""
    if _OPEN_SLICE.fullmatch(text):
        return text
    # The loader is a SafeLoader: it builds nothing but plain values.
    return yaml.load(text, Loader=_Loader)


set_loader(YAML_MODE, load_yaml, exceptions=(yaml.YAMLError,))
