"""Prepare a step on the meta device: pairs of given lengths, and functions for meta tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils

from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.devices import is_on_host
from orpo_lite.ops.meta_attention import meta_flash_attention

META_ATTENTION = "orpo_lite_scoreless"  # attention of padded rows on meta


def meta_attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Return a meta tensor in the shape of attention's output. No scores are computed.

    Five tensors are kept for the backward pass: the queries, keys, values and output, and a tensor
    with one number per query and head.
    """
    return meta_flash_attention(query, key, value).transpose(1, 2), None


AttentionInterface.register(META_ATTENTION, meta_attention)


def held_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return a dict: the name of a part of the model, such as "adapter" -> the part's tensors.

    Only tensors on the model's device are in the dict. Each storage appears once.
    """
    parts: dict[str, list[Tensor]] = {"base": [], "embeddings, head, norms": [], "adapter": []}
    own: Any = model.causal if isinstance(model, PairModel) else model
    ends = [
        module.weight
        for module in (own.get_input_embeddings(), own.get_output_embeddings())
        if module
    ]
    trained = {id(parameter) for _, parameter in trained_parameters(model)}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts["base"] += [parameter, state.absmax, state.code, state.offset]
            if state.nested:
                parts["base"] += [state.state2.absmax, state.state2.code]
        elif id(parameter) in trained or ".lora_" in name:  # PPO has adapters that are not trained
            parts["adapter"].append(parameter)
        else:
            is_end = parameter.ndim < 2 or any(parameter is end for end in ends)
            parts["embeddings, head, norms" if is_end else "base"].append(parameter)
    parts["embeddings, head, norms"] += model.buffers()
    seen: set[torch.UntypedStorage] = set()
    for name, tensors in parts.items():
        parts[name] = []
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or (tensor.is_meta and is_on_host(tensor)):
                continue
            storage = tensor.untyped_storage()
            if storage not in seen:
                seen.add(storage)
                parts[name].append(tensor)
    return parts


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of each trained parameter of a model."""
    if isinstance(model, PairModel):
        return model.trained()
    return [(name, one) for name, one in model.named_parameters() if one.requires_grad]


@contextmanager
def patched_for_meta() -> Iterator[None]:
    """Replace two functions that do not work on meta tensors, inside the ``with`` block.

    - ``torch.autocast`` fails for the device type meta. peft calls it for adapters of experts. The
      replacement uses the device type cpu instead of meta.
    - ``find_packed_sequence_indices`` of transformers reads the values of positions, but meta
      tensors have no values. The replacement returns None: "each row is one sequence".
    """
    plain: Any = torch.autocast
    search = masking_utils.find_packed_sequence_indices

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return plain("cpu" if device_type == "meta" else device_type, *args, **options)

    torch.autocast = autocast  # type: ignore[misc,assignment]
    masking_utils.find_packed_sequence_indices = lambda _positions: None
    try:
        yield
    finally:
        torch.autocast = plain  # type: ignore[misc]
        masking_utils.find_packed_sequence_indices = search


Triples = NDArray[np.int64]
"""Token counts of pairs: (common prefix, chosen, rejected), shape (pairs, 3)."""


def worst_case(max_length: int, pairs: int, *, has_rejected: bool = True) -> Triples:
    """Return the token counts of ``pairs`` pairs of maximal length.

    Both sequences of a pair have ``max_length`` tokens. The sequences have no common prefix.
    ``has_rejected=False``: the pairs have no rejected sequences.
    """
    rejected = max_length if has_rejected else 0
    return np.tile(np.array([[0, max_length, rejected]]), (pairs, 1))


def blank_pairs(triples: Triples) -> list[TokenizedPair]:
    """Return pairs with the given token counts. The token ids mean nothing on the meta device."""
    pairs = []
    for prefix, chosen, rejected in triples.tolist():
        chosen_ids = np.zeros(chosen, np.int32)
        rejected_ids = np.r_[np.zeros(prefix, np.int32), np.ones(rejected - prefix, np.int32)]
        shorter = min(chosen, rejected) if rejected else chosen
        start = max(1, min(prefix, shorter - 1))
        pairs.append(TokenizedPair(chosen_ids, rejected_ids, start, start, "plan"))
    return pairs
