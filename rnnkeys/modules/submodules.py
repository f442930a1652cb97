"""The modules inside a network, a loss or a value estimator."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase


def find_networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield every module inside, once; losses and estimators keep networks outside ``modules()``.

    Examples:
        >>> from torchrl.objectives.value import TD0Estimator
        >>> net = nn.Linear(1, 1)
        >>> net in list(find_networks(TD0Estimator(gamma=0.9, value_network=net)))
        True
    """
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        for one in waiting.pop().modules():
            if id(one) in seen:
                continue
            seen.add(id(one))
            yield one
            if isinstance(one, (LossModule, ValueEstimatorBase)):
                waiting += [v for v in vars(one).values() if isinstance(v, nn.Module)]
