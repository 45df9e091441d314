"""Add the adapters of PPO to a model: a reward model, a value model, and perhaps a reference model.

All of them and the policy share one base. The policy is peft's adapter "default".
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from orpo_lite.base.adapter import SEQ_CLS, read_adapter_config
from orpo_lite.model.adapter import read_adapter, set_adapter
from orpo_lite.model.pair_model import POLICY, VALUE, PairModel
from orpo_lite.model.score_head import SCORE
from orpo_lite.ops.devices import META

REFERENCE, REWARD = "ppo_reference", "ppo_reward"  # peft's names of the other adapters


def add_ppo_adapters(
    model: PairModel, reward: Path | None, reference: Path | None, *, has_reference: bool
) -> None:
    """Add the adapters. :meth:`PairModel.trained` has those of policy and value model afterwards.

    Args:
        model: the model with the policy's adapter.
        reward: the folder of the reward model's adapter. The value model starts as its copy. None:
            both have the shape of the policy's adapter, for a plan.
        reference: the folder of the reference model's adapter; None for a plan.
        has_reference: False: the reference model is the base, which needs no adapter.
    """
    wrapped: Any = model.model
    tensors = read_adapter(reward) if reward else None
    for name in (REWARD, VALUE):
        config = read_adapter_config(reward) if reward else _like_policy(wrapped)
        config.task_type, config.modules_to_save = SEQ_CLS, [SCORE]
        _add(model, name, config)
        if tensors:
            set_adapter(model, tensors, name)
    if has_reference:
        config = read_adapter_config(reference) if reference else _like_policy(wrapped)
        _add(model, REFERENCE, config)
        if reference:
            set_adapter(model, read_adapter(reference), REFERENCE)
    wrapped.set_adapter(POLICY)


def use_reference(model: PairModel) -> AbstractContextManager[None]:
    """Return a context in which the model is the reference model."""
    wrapped: Any = model.model
    return model.using(REFERENCE) if REFERENCE in wrapped.peft_config else model.without_adapter()


def _add(model: PairModel, name: str, config: Any) -> None:
    wrapped: Any = model.model
    # For a model on meta, peft would otherwise allocate each matrix in memory.
    with META if model.device == META else nullcontext():
        wrapped.add_adapter(name, config)


def _like_policy(wrapped: Any) -> Any:
    config = copy.deepcopy(wrapped.peft_config[POLICY])
    config.inference_mode = False
    return config
