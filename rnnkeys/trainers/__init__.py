"""Parts for TorchRL's trainers: a collector, minibatches of sequences, configs for Hydra.

``rnnkeys.trainers.configs`` needs ``pip install 'rnnkeys[hydra]'``.
"""

from __future__ import annotations

from .collector import ActorCriticCollector as ActorCriticCollector
from .hooks import SequenceMinibatchesHook as SequenceMinibatchesHook
