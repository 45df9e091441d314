"""Quantise GGUF files, compare tokens and score pairs with the package llama-cpp-python."""

import importlib.util
import logging
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_lite.data.pair import TokenizedPair, common_prefix
from orpo_lite.errors import FitError, ModelError
from orpo_lite.exporting.gguf_family import VLLM

# Values of --outtype for which llama.cpp's quantiser converts a file in full precision.
QUANTISED = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
# Texts whose tokens are compared: words, numbers, punctuation and white space. Few are in other
# scripts, because notes already report the differences in other scripts.
PROBES = (
    "Hello, world! It's what we've said: they're here, I'll go.",
    "  two  spaces,   three,\ta tab\n\nlines \n and  an end  ",
    "1 22 333 4444 55555 3.14159 x2y3 (2024-12-31) $9.99 50%",
    "def f(x):\n    return x + 1  # why?\n",
    "https://example.com/a?b=c&d=[e]{f} user@example.org C++ a_b-c",
    "naïve café 日本語 русский 🙂",
    "aaaaaaaaaaaa ======== ........ ",
    "",
)
_callbacks: list[Any] = []  # kept here, because C code has a pointer to the callback


def is_installed() -> bool:
    """Return True if llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_llama_cpp() -> None:
    """Raise :class:`FitError` if llama-cpp-python is not installed."""
    if not is_installed():
        raise not_installed("llama-cpp-python>=0.3.36")


def not_installed(package: str) -> FitError:
    """Return the error for a Python package that is not installed, such as "gguf>=0.19"."""
    return FitError(
        where="export",
        found=f"{package} is not installed",
        expected="this package, because the export needs it",
        fix=f"pip install '{package}'",
    )


def quantise(source: Path, file: Path, outtype: str) -> None:
    """Write ``file``, a quantised copy of the GGUF file ``source``.

    Args:
        source: a GGUF file in full precision.
        file: the new file.
        outtype: the new type of the matrices, one of ``QUANTISED``.

    Raises:
        ModelError: llama.cpp's quantiser fails.
    """
    llama_cpp = _load()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), options)
    if code:
        raise ModelError(
            where=str(file),
            found=f"llama.cpp's quantiser failed with the error code {code}",
            expected="a model that llama.cpp can quantise",
        )


def check_tokens(file: Path, tokenizer: Any, texts: Sequence[str], lead: str) -> None:
    """Raise :class:`ModelError` if llama.cpp and transformers tokenise a text differently.

    ``lead``: the space that the export has added at the start of the chat template; "" if no space
    was added. llama.cpp tokenises ``lead + text``, and transformers tokenises ``text``.
    """
    where = str(file)
    model = _open(file, vocab_only=True, n_ctx=8, n_batch=8)
    try:
        for text in texts:
            found = model.tokenize((lead + text).encode(), add_bos=False, special=True)
            if found != tokenizer(text, add_special_tokens=False).input_ids:
                raise ModelError(
                    where=where,
                    found=f"llama.cpp and transformers tokenise {text!r} differently",
                    expected="the same tokens from both",
                    fix=VLLM,
                )
    finally:
        model.close()


def score_pairs(
    file: Path, pairs: Sequence[TokenizedPair]
) -> Generator[tuple[int, int], None, Tensor]:
    """Yield (pairs done, number of pairs); finally return each reply's mean log-probability.

    For P pairs, the result has shape (2, P), float64. Row 0 is for the chosen replies, row 1 for
    the rejected replies. If both sequences of a pair begin with the same tokens, these tokens are
    computed once. The logits of a whole sequence are in host memory, 4 bytes for each logit.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """
    longest = max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
    model = _open(file, n_ctx=longest, n_batch=min(longest, 512), logits_all=True)
    scores_2P = torch.empty(2, len(pairs), dtype=torch.float64)
    try:
        for number, pair in enumerate(pairs):
            yield number, len(pairs)
            chosen_T, rejected_T = np.asarray(pair.chosen_ids), np.asarray(pair.rejected_ids)
            model.reset()
            model.eval(chosen_T.tolist())
            scores_2P[0, number] = _mean_logp(model, chosen_T, pair.chosen_start)
            # The common tokens have been computed already; continue after them.
            model.n_tokens = min(common_prefix(chosen_T, rejected_T), len(rejected_T) - 1)
            model.eval(rejected_T[model.n_tokens :].tolist())
            scores_2P[1, number] = _mean_logp(model, rejected_T, pair.rejected_start)
    finally:
        model.close()
    return scores_2P


def _mean_logp(model: Any, ids_T: NDArray[np.int32], start: int) -> float:
    """Return the mean log-probability of ``ids_T[start:]``, Eq. 3 of the ORPO paper."""
    logits_RV = torch.from_numpy(model.scores[start - 1 : len(ids_T) - 1]).double()
    targets_R1 = torch.from_numpy(ids_T[start:].astype(np.int64))[:, None]
    return float(logits_RV.log_softmax(dim=-1).gather(1, targets_R1).mean())


def _open(file: Path, **options: Any) -> Any:
    """Load a file with llama.cpp. Raise :class:`ModelError` if llama.cpp cannot load it."""
    try:
        return _load().Llama(str(file), verbose=False, **options)
    except ValueError as error:
        raise ModelError(
            where=str(file),
            found=f"llama.cpp cannot load the file: {error}",
            expected="a model that llama.cpp supports",
        ) from None


def _load() -> Any:
    """Import and return the module llama_cpp. Send its log to Python's logging."""
    import llama_cpp

    # The package keeps a file open until the process ends.
    warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)
    if not _callbacks:
        logger = logging.getLogger("llama.cpp")

        def log(_level: int, text: bytes, _data: Any) -> None:
            logger.info(text.decode(errors="replace").rstrip())

        _callbacks.append(llama_cpp.llama_log_callback(log))
        llama_cpp.llama_log_set(_callbacks[0], None)
    return llama_cpp
