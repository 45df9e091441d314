"""Add a score head to a causal language model, which makes it a reward model.

The head is a linear layer from the hidden state of a response's last token to one number, the
reward. Its name and shape are those of transformers' class for sequence classification. Therefore
``AutoModelForSequenceClassification`` with peft loads a saved adapter, and a merged model without
peft.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.ops.devices import META

SCORE = "score"
"""Name of the head in transformers' classes for sequence classification."""
SCORE_TENSOR = f"base_model.model.{SCORE}.weight"
"""Name of the head's weight in the file of an adapter."""


def add_score_head(model: Any, seed: int) -> None:
    """Add the linear layer ``model.score`` with random weights, in at least float32.

    Args:
        model: a causal language model of transformers, without an adapter.
        seed: seed of the weights.

    Raises:
        ModelError: transformers has no class for sequence classification of this model, or its
            class has other layers than the causal language model.
    """
    config = model.config
    try:
        with META:
            like = AutoModelForSequenceClassification.from_config(reward_config(config))
    except Exception as error:  # ValueError: no such class; a class may raise other errors
        raise _unsupported(config, "transformers has no class for it") from error
    layer = getattr(like, SCORE, None)
    own, other = ({*dict(part.named_parameters())} for part in (model.base_model, like.base_model))
    if type(layer) is not nn.Linear or layer.bias is not None or own != other:
        raise _unsupported(config, "transformers' class for it has other layers")
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    embedding = model.get_output_embeddings().weight
    score = nn.Linear(layer.in_features, 1, bias=False, device=embedding.device, dtype=dtype)
    if embedding.device != META:
        generator = torch.Generator().manual_seed(seed)
        deviation = getattr(config.get_text_config(), "initializer_range", None) or 0.02
        values = torch.randn(score.weight.shape, generator=generator, dtype=dtype) * deviation
        with torch.no_grad():
            score.weight.copy_(values)
    setattr(model, SCORE, score.requires_grad_(False))


def reward_config(config: Any) -> Any:
    """Return a copy of a transformers configuration for a model with one label, the reward."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def is_classifier(config: Any) -> bool:
    """Return whether a transformers configuration is that of a sequence classifier."""
    names = getattr(config, "architectures", None) or [""]
    return str(names[0]).endswith("ForSequenceClassification")


def refuse_classifier(base: Base) -> None:
    """Raise ModelError if a base is a reward model or another classifier."""
    if is_classifier(base.config):
        raise ModelError(
            where=f"model {base.name}",
            found=f"is a {base.config.architectures[0]}, which has no output head",
            expected="a language model",
            fix="to train a reward model further, set model.model_name_or_path to its base and "
            "model.adapter_name_or_path to its adapter",
        )


def is_reward_model(config: Any) -> bool:
    """Return whether a transformers configuration is that of a merged reward model."""
    return is_classifier(config) and config.num_labels == 1


def output_head_names(model: Any) -> list[str]:
    """Return the names of the output head's parameters that belong to no other layer.

    A merged reward model has a score head in place of these parameters.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    of_head = (owners[id(parameter)] for parameter in model.get_output_embeddings().parameters())
    return [names[0] for names in of_head if len(names) == 1]


def merged_reward_config(config: Any, pad_id: int | None) -> dict[str, Any]:
    """Return the entries of config.json that make a merged model a reward model.

    transformers reads the reward at the last token that is not the pad token.

    Args:
        config: the configuration of the base.
        pad_id: the id of the pad token, which must not be the token that ends a reply; None if the
            tokenizer has no such token. Then only single sequences can be scored by transformers.
    """
    kind = AutoModelForSequenceClassification._model_mapping[type(config)]
    return {
        "architectures": [kind.__name__],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "pad_token_id": pad_id,
    }


def _unsupported(config: Any, found: str) -> ModelError:
    return ModelError(
        where=f"model {config.model_type}",
        found=f"cannot be a reward model: {found}",
        expected="a model with a class for sequence classification, such as Llama, Mistral, Qwen, "
        "Gemma, Phi or OPT",
        fix=Overrides({"loss.type": "orpo"}, ", or another base"),
    )
