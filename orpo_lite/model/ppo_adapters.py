"""Add the adapters of PPO to a model: a reward model, a value model, and perhaps a reference model.

All of them and the policy share one base. The policy is peft's adapter "default".
"""

import copy
from pathlib import Path
from typing import Any

from orpo_lite.base.adapter import SEQ_CLS, read_adapter_config
from orpo_lite.model.adapter import adapter_tensors, read_adapter, set_adapter
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.score_head import SCORE

POLICY, REFERENCE, REWARD, VALUE = "default", "ppo_reference", "ppo_reward", "ppo_value"


def add_ppo_adapters(
    model: PairModel, reward: Path | None, reference: Path | None, *, has_reference: bool
) -> None:
    """Add the adapters. Policy and value model are trained from now on.

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
        wrapped.add_adapter(name, config)
        if tensors:
            set_adapter(model, tensors, name)
    if has_reference:
        config = read_adapter_config(reference) if reference else _like_policy(wrapped)
        wrapped.add_adapter(REFERENCE, config)
        if reference:
            set_adapter(model, read_adapter(reference), REFERENCE)
    wrapped.set_adapter(POLICY)
    model.trained_adapters = (POLICY, VALUE)


def value_tensors(model: PairModel) -> dict[str, Any]:
    """Return peft's name of each tensor of the value model -> the tensor on the CPU."""
    return adapter_tensors(model, VALUE)


def _like_policy(wrapped: Any) -> Any:
    config = copy.deepcopy(wrapped.peft_config[POLICY])
    config.inference_mode = False
    return config
