"""A collector of TorchRL for actors and critics with recurrent states."""

from __future__ import annotations

from typing import Any

from torchrl.collectors import Collector


class ActorCriticCollector(Collector):
    """Collector whose policy is an actor followed by a critic, for TorchRL's on-policy trainers.

    The critic runs while collecting, so that its recurrent states are stored, too. A trainer sends
    the weights of the actor alone, which do not fit such a policy; this collector takes the weights
    of the whole policy, which the loss updates in place, instead.

    Args:
        *args: as for TorchRL's ``Collector``; ``policy`` is ``TensorDictSequential(actor, critic)``
            of the same modules that the loss has.
        **kwargs: as for TorchRL's ``Collector``.
    """

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Take the weights that the policy has now, on every device that plays it.

        Args:
            *args: are not read.
            **kwargs: are not read.
        """
        super().update_policy_weights_()
