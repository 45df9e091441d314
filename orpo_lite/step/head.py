"""From the model's logits to :class:`PairLogps`: the plain form, which holds all logits and is the reference."""

import torch
from torch import Tensor

from orpo_lite.step.losses import PairLogps


def pair_logps(logits_RTV: Tensor, input_ids_RT: Tensor, response_RT: Tensor, counted_RT: Tensor) -> PairLogps:
    """Log-probabilities of P pairs from the logits of their 2P padded rows.

    Args:
        logits_RTV: position t predicts token t + 1.
        input_ids_RT: chosen rows first, then rejected rows in the same order.
        response_RT: True at the tokens of the response. The first token of a row is predicted by nothing and ignored.
        counted_RT: True at the tokens that the NLL counts; only the chosen rows are read.

    A response without tokens would be 0/0; such pairs are dropped before they get here.
    """
    dtype = torch.float64 if logits_RTV.dtype == torch.float64 else torch.float32
    logits_RTV, targets_RT = logits_RTV[:, :-1].to(dtype), input_ids_RT[:, 1:]
    response_RT, counted_RT = response_RT[:, 1:], counted_RT[:, 1:]
    picked_RT = logits_RTV.gather(-1, targets_RT.unsqueeze(-1)).squeeze(-1)
    logps_RT = picked_RT - logits_RTV.logsumexp(-1)
    mean_R = (logps_RT * response_RT).sum(-1) / response_RT.sum(-1)
    pairs = len(mean_R) // 2
    nll_P = -(logps_RT * counted_RT)[:pairs].sum(-1)
    return PairLogps(mean_R[:pairs], mean_R[pairs:], nll_P, counted_RT[:pairs].sum(-1))
