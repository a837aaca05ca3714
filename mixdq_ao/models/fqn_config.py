"""The lookup rules of torchao's FqnToConfig, for loaders that quantize one parameter at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchao.core.config import AOBaseConfig


def resolve(configs: Mapping[str, AOBaseConfig | None], parameter: str) -> tuple[str, AOBaseConfig | None]:
    """The config that torchao's FqnToConfig gives a parameter (None: none), and whether it is given to the "parameter"
    or to its "module".

    Exact names take precedence over patterns, parameters over modules.
    """
    module, _, key = parameter.rpartition(".")
    patterns = {k[3:]: c for k, c in configs.items() if k.startswith("re:")}
    for kind, name in (("parameter", parameter), ("module", module if key == "weight" else "")):
        if name and name in configs:
            return kind, configs[name]
    for kind, name in (("parameter", parameter), ("module", module if key == "weight" else "")):
        for pattern, config in patterns.items():
            if name and re.fullmatch(pattern, name):
                return kind, config
    return "module", None
