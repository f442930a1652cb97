"""The model card of a shared policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: rnnkeys
pipeline_tag: reinforcement-learning
tags:
- reinforcement-learning
- recurrent
- torchrl
---

# {name}

A recurrent policy of [TorchRL](https://github.com/pytorch/rl).
It was saved by rnnkeys {version} with torch {torch}.

## Result

{result}

## Use

```python
from rnnkeys import StatefulPolicy, load_pretrained

policy = load_pretrained({folder!r}{builder})
player = StatefulPolicy(policy)
```

The network is `{function}` with these arguments:

```json
{arguments}
```
"""


def write_model_card(name: str, config: Mapping[str, Any]) -> str:
    """Return a model card in Markdown, with the front matter that model hubs read.

    Args:
        name: title, and name of the folder in the example.
        config: content of ``config.json``: ``builder``, ``arguments``, ``result``, ``versions``.

    Examples:
        >>> versions = {"rnnkeys": "0.2.0", "torch": "2.13.0"}
        >>> config = {"builder": "drqn_policy", "arguments": {}, "versions": versions}
        >>> card = write_model_card("pole", {**config, "result": {"mean return": 500.0}})
        >>> print(card[card.index("| mean") : card.index("## Use")].strip())
        | mean return |
        | --- |
        | 500.0 |
    """
    function = config["builder"]
    return _CARD.format(
        name=name,
        folder=name,
        version=config["versions"]["rnnkeys"],
        torch=config["versions"]["torch"],
        result=_make_table(config["result"]),
        function=function,
        builder="" if function == "drqn_policy" else f", builder={function}",
        arguments=json.dumps(config["arguments"], indent=2),
    )


def _make_table(row: Mapping[str, Any]) -> str:
    if not row:
        return "None was recorded."
    cells = [[str(one).replace("|", "\\|") for one in part] for part in (row, row.values())]
    lines = [cells[0], ["---"] * len(row), cells[1]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
