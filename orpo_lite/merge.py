"""Merge: the adapter's product added to the base's weights, block by block, as a plain transformers folder."""

import math
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orpo_lite import run
from orpo_lite.base import Base, check_disk, load_tokenizer, read_adapter_config
from orpo_lite.errors import CheckpointError, FitError, ModelError, RecipeError
from orpo_lite.model import bare_base, is_transposed, quantisable
from orpo_lite.recipe import QuantizationSection, Recipe
from orpo_lite.run import FOLDERS, Update, Weights
from orpo_lite.weights import (
    Rows,
    Stored,
    ahead,
    in_blocks,
    read_header,
    read_rows,
    read_tensor,
    shards,
    stored_tensors,
    write_model,
)

SHARD = 5 * 10**9  # bytes of a file; transformers' max_shard_size has long been so
KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|base_layer)(\.weight)?"
)


class UnchangedError(ModelError):
    """The merged model would be the base."""


@dataclass(frozen=True)
class MergeResult:
    """A merged model on disk."""

    folder: Path
    base: Base
    weights: Weights
    bytes: int
    changed: int
    """Matrices that the adapter changed."""
    targets: int
    """Matrices that it is trained for."""
    note: str
    """Why the model was merged in memory; "" where it was streamed."""


def merge(run_folder: str | Path, *, weights: Weights = "original", max_shard_size: int = SHARD) -> MergeResult:
    """Merge the adapter of a run into the base it was trained on; writes ``RUN/merged``, whole or not at all.

    No more of a model is held than some blocks of a tensor. The sum is made in float32 and rounded once, to the dtype
    of the base, never to 4 bit: that loses the adapter.

    Args:
        run_folder: of a training that has ended.
        weights: see :data:`orpo_lite.run.Weights`; ``dequantized`` is written to ``RUN/merged-dequantized``.
        max_shard_size: bytes of a file, unless one tensor is larger.

    Raises:
        CheckpointError: no finished run there.
        ModelError: the base is not the one that was trained on, the adapter fits nothing or changes nothing.
        FitError: not enough disk space or memory.
        HubError: the base cannot be fetched.
    """
    return run.drain(merging(run_folder, weights=weights, max_shard_size=max_shard_size), lambda _: None)


def merging(
    run_folder: str | Path, *, weights: Weights = "original", max_shard_size: int = SHARD
) -> Generator[Update, None, MergeResult]:
    """:func:`merge` as a generator of what is being done."""
    path = Path(run_folder)
    recipe, adapter, base = run.read_recipe(path), run.find_result(path), run.find_trained_base(path)
    if weights not in FOLDERS:
        raise RecipeError("--base", f"{weights!r}", f"one of {', '.join(FOLDERS)}")
    if weights == "dequantized" and not recipe.quantization.load_in_4bit:
        found = "this run was trained on 16-bit weights"
        raise CheckpointError(f"run {path}", found, "quantization.load_in_4bit", "merge onto the original ones")
    stored = stored_tensors(base.path)
    check_disk(path, sum(tensor.nbytes for tensor in stored.values()), f"merging {path}")
    folder = path / FOLDERS[weights]
    with run.locked(path), run.new_folder(folder) as temporary, _enough_memory(path):
        left = run.read_lock(path).get("not_quantised", [])
        plan = _make_plan(base, adapter, stored, recipe, weights, left)
        if isinstance(plan, str):
            yield Update("stage", "merging in memory")
            how = recipe.quantization if weights == "dequantized" else None
            changed, targets, note = *_merge_in_memory(base, adapter, temporary, how, left), plan
        else:
            changed = yield from _stream(plan, temporary, max_shard_size)
            targets, note = len(plan.deltas), ""
            shutil.copyfile(base.path / "config.json", temporary / "config.json")
        if not changed:
            found = f"changes nothing: none of its {targets} matrices differs after rounding"
            raise UnchangedError(f"adapter {adapter}", found, "an adapter that has learnt something")
        _copy_texts(base.path, adapter, temporary)
        record = {
            "weights": weights,
            "base": base.name if base.revision else None,  # where a folder of somebody's lies is their business
            "revision": base.revision,
            "fingerprint": base.fingerprint,
            "adapter_sha256": run.sha256(adapter / "adapter_model.safetensors"),
            "changed": changed,
            "targets": targets,
        }
        run.write_text(temporary / "merge.json", run.to_json(record))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return MergeResult(folder, base, weights, size, changed, targets, note)


@contextmanager
def _enough_memory(path: Path) -> Iterator[None]:
    """Memory that runs out is the machine's fault: FitError instead of a traceback."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        found = f"memory ran out ({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
        raise FitError(f"merging {path}", found, "", "close other programs, or raise the limit") from error


# --- what is to be added where


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one matrix: ``scale * B @ A``; with a magnitude (DoRA) each row is rescaled to it."""

    a_RI: Stored
    b_OR: Stored
    magnitude_O: Stored | None
    scale: float
    transposed: bool
    """The matrix is stored as (I, O), as GPT-2's are."""

    def load(self) -> "LoadedDelta":
        """With its tensors in memory, float32."""
        a, b = read_tensor(self.a_RI).float(), read_tensor(self.b_OR).float()
        magnitude = None if self.magnitude_O is None else read_tensor(self.magnitude_O).float().flatten()
        for stored, tensor in ((self.a_RI, a), (self.b_OR, b), (self.magnitude_O, magnitude)):
            if stored and tensor is not None and not tensor.isfinite().all():
                raise ModelError(str(stored.file), f"{stored.name} holds numbers that are none", "finite ones")
        return LoadedDelta(a, b, magnitude, self.scale, self.transposed)


@dataclass(frozen=True)
class LoadedDelta:
    """A :class:`Delta` in memory."""

    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None
    scale: float
    transposed: bool

    def added_to(self, block: Tensor, start: int) -> Tensor:
        """Rows of the matrix, the first being row ``start``, with the adapter; float32, or float64 as they are.

        As peft merges: ``W + s B A`` (arXiv 2106.09685, Eq. 3), or ``m (W + s B A) / ||W + s B A||`` with the norm of
        each row (arXiv 2402.09353, Eq. 5).
        """
        precise = torch.float64 if block.dtype == torch.float64 else torch.float32
        sums = block.to(precise, copy=True)
        rows = slice(start, start + len(block))
        left, right = self.b_OR[rows], self.a_RI
        if self.transposed:
            left, right = self.a_RI[:, rows].t(), self.b_OR.t()
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype), alpha=self.scale)
        if self.magnitude_O is not None:
            sums.mul_((self.magnitude_O[rows] / sums.norm(dim=1)).unsqueeze(1))
        return sums


@dataclass(frozen=True)
class _Plan:
    """What a streamed merge does."""

    stored: Mapping[str, Stored]
    deltas: Mapping[str, Delta]
    """By the name of the stored tensor."""
    quantised: frozenset[str]
    """Stored tensors that go through 4 bit first."""
    settings: QuantizationSection


def _make_plan(
    base: Base, adapter: Path, stored: Mapping[str, Stored], recipe: Recipe, weights: Weights, left: Sequence[str]
) -> _Plan | str:
    """Which tensors get what; or why this base cannot be streamed.

    Raises:
        ModelError: keys of the adapter that match nothing, shapes that differ, a tied head.
    """
    config = read_adapter_config(adapter)
    plain = recipe.override({"quantization.load_in_4bit": False})
    if config.target_parameters:
        return "experts are adapted, which lie in one tensor in memory and not in the files"
    model = bare_base(plain, base.config, torch.float32)
    modules = dict(model.named_modules())
    parts = _adapter_parts(adapter, modules, config)
    prefix = _prefix(stored, [name for name, _ in model.named_parameters()])
    deltas: dict[str, Delta] = {}
    for name, part in parts.items():
        module = modules[name]
        transposed = is_transposed(module)
        if module is model.get_output_embeddings() and base.config.get_text_config().tie_word_embeddings:
            found = f"{name} is adapted and tied to the input embedding, which would change too"
            raise ModelError(f"adapter {adapter}", found, "an adapter of other layers")
        if not transposed and not isinstance(module, nn.Linear):
            return f"{name} is a {type(module).__name__}, and merged by peft"
        if prefix is None or (key := _moved(f"{name}.weight", prefix)) not in stored:
            return f"the base's files name their tensors otherwise ({name})"
        if transposed and "lora_magnitude_vector" in part:
            return f"{name} is stored transposed"
        shape = (part["lora_B"].shape[0], part["lora_A"].shape[1])
        ranks_differ = part["lora_A"].shape[0] != part["lora_B"].shape[1]
        if stored[key].shape != (shape[::-1] if transposed else shape) or ranks_differ:
            found = f"{name} is {shape[0]}x{shape[1]}, the base's {stored[key].shape}"
            raise ModelError(f"adapter {adapter}", found, "the shapes of the base that it was trained on")
        magnitude = part.get("lora_magnitude_vector")
        scale = _scale(config, name, part["lora_A"].shape[0])
        deltas[key] = Delta(part["lora_A"], part["lora_B"], magnitude, scale, transposed)
    quantised = frozenset[str]()
    if weights == "dequantized":
        layers = {name: layer for name, layer in quantisable(model).items() if name not in left}
        if stored_otherwise := next((name for name, layer in layers.items() if is_transposed(layer)), None):
            return f"{stored_otherwise} is stored transposed"
        quantised = frozenset(_moved(f"{name}.weight", prefix or ("", "")) for name in layers)
        if not quantised <= stored.keys():
            return "the base's files name their tensors otherwise"
    return _Plan(stored, deltas, quantised, recipe.quantization)


def _adapter_parts(adapter: Path, modules: Mapping[str, nn.Module], config: Any) -> dict[str, dict[str, Stored]]:
    """The adapter's tensors by module and part. Raises :class:`ModelError` for keys that match nothing."""
    parts: dict[str, dict[str, Stored]] = {}
    wrong = []
    file = adapter / "adapter_model.safetensors"
    for stored in read_header(file):
        key = stored.name
        match = KEY.fullmatch(key)
        if match and match["module"] in modules:
            parts.setdefault(match["module"], {})[match["part"]] = stored
        else:
            wrong.append(key)
    wrong += [name for name, part in parts.items() if not {"lora_A", "lora_B"} <= part.keys()]
    if lacking := sorted(_targets(config, modules) - parts.keys()):
        found = f"lacks {len(lacking)} of the layers that it is for ({lacking[0]} ...)"
        raise ModelError(f"adapter {adapter}", found, "A and B of each")
    if wrong:
        raise _matches_nothing(adapter, wrong)
    return parts


def _targets(config: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    """The linear layers that a configuration names, as peft finds them; none where it is for a part of them only."""
    named = config.target_modules
    if not isinstance(named, set | list) or config.layers_to_transform is not None:
        return set()

    def is_of(name: str, words: Iterable[str]) -> bool:
        return any(name == word or name.endswith(f".{word}") for word in words)

    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return {name for name in linear if is_of(name, named) and not is_of(name, config.exclude_modules or ())}


def _matches_nothing(adapter: Path, keys: Sequence[str]) -> ModelError:
    found = f"{len(keys)} of its keys match nothing in the base ({keys[0]} ...)"
    return ModelError(f"adapter {adapter}", found, "LoRA's A and B of layers of this base")


def _prefix(stored: Mapping[str, Stored], names: list[str]) -> tuple[str, str] | None:
    """(what parameters' names begin with, what stored names have in its place); None where they differ otherwise.

    Some hub files leave the base model's prefix out, as GPT-2's "transformer." and OPT's "model.".
    """
    known = [name for name in names if name in stored]
    if known:
        return "", ""
    first = {name.split(".")[0] for name in names if "lm_head" not in name}
    if len(first) == 1:
        prefix = f"{first.pop()}."
        if all(name.removeprefix(prefix) in stored for name in names if name.startswith(prefix)):
            return prefix, ""
    return None


def _moved(name: str, prefix: tuple[str, str]) -> str:
    return prefix[1] + name.removeprefix(prefix[0]) if name.startswith(prefix[0]) else name


def _scale(config: Any, module: str, rank: int) -> float:
    """peft's factor of a layer: lora_alpha over r, or over its root (rsLoRA, arXiv 2312.03732), with its patterns."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)


# --- block by block


def _stream(plan: _Plan, folder: Path, most: int) -> Generator[Update, None, int]:
    """Write the merged tensors; returns how many the adapter has changed."""
    files = shards(plan.stored.values(), most)
    total = sum(stored.nbytes for stored in plan.stored.values())
    changed: set[str] = set()
    for done in write_model(folder, files, _merged_blocks(plan, files, changed)):
        yield Update("stage", "MiB merged", done >> 20, max(total >> 20, 1))
    return len(changed)


def _merged_blocks(plan: _Plan, files: Iterable[Iterable[Stored]], changed: set[str]) -> Iterator[Tensor]:
    """The contents of all files, in order; names of tensors that the adapter changes go to ``changed``."""
    order = [stored for held in files for stored in held]
    reads = ahead(read_rows, (rows for stored in order for rows in in_blocks(stored)))
    for stored in order:
        pieces: Iterator[tuple[Rows, Tensor]] = zip(in_blocks(stored), reads)  # noqa: B905 - reads go on
        if stored.name in plan.quantised:
            pieces = dequantised(pieces, plan.settings)
        delta = plan.deltas[stored.name].load() if stored.name in plan.deltas else None
        for rows, block in pieces:
            if delta is None:
                yield block.to(stored.dtype)
                continue
            merged = delta.added_to(block, rows.start)
            if stored.name not in changed and not torch.equal(merged.to(stored.dtype), block.to(stored.dtype)):
                changed.add(stored.name)
            out = block if block.dtype == stored.dtype else torch.empty(block.shape, dtype=stored.dtype)
            out.copy_(merged)  # in the place of what was read: memory that is new to a process costs time
            if stored.dtype == torch.float16 and not out.isfinite().all():
                found = f"{stored.name} overflows float16 with the adapter"
                raise ModelError("merge", found, "", "a base whose weights are bfloat16 or float32")
            yield out


def dequantised(pieces: Iterable[tuple[Rows, Tensor]], settings: QuantizationSection) -> Iterator[tuple[Rows, Tensor]]:
    """A matrix's blocks of rows as 4 bit leaves them, in float32.

    The double quantisation rounds all of the matrix's scales together, so its codes, a quarter of its bytes, wait until
    the last block is read (``bitsandbytes.functional.quantize_4bit``).
    """
    from bitsandbytes import functional

    codes, scales = [], []
    for rows, block in pieces:
        packed, state = functional.quantize_4bit(
            block, quant_type=settings.bnb_4bit_quant_type, compress_statistics=False
        )
        codes.append((rows, packed, state))
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    if settings.bnb_4bit_use_double_quant:
        offset = absmax.mean()
        nested = functional.quantize_blockwise(absmax - offset, blocksize=256)
        absmax = functional.dequantize_blockwise(*nested) + offset
    parts = torch.split(absmax, [len(part) for part in scales])
    for (rows, packed, state), part in zip(codes, parts, strict=True):
        shape = state.shape
        # As one row: bitsandbytes' kernel for CPUs (0.50) errs on rows of an odd multiple of 32 elements.
        state.absmax, state.dtype, state.shape = part, torch.float32, torch.Size([math.prod(shape)])
        yield rows, functional.dequantize_4bit(packed, state).view(shape)


# --- in memory, for bases whose files are of another layout than the loaded model


def _merge_in_memory(
    base: Base, adapter: Path, folder: Path, how: QuantizationSection | None, left: Sequence[str]
) -> tuple[int, int]:
    """peft's own merge of the loaded model; returns how many matrices it has changed, and how many it is for.

    ``how`` its weights go through 4 bit first, if they do, but for the layers ``left``.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype="auto", use_safetensors=True)
    if how:
        for name, layer in quantisable(model).items():
            if name in left:
                continue
            matrix = layer.weight.data.t().contiguous() if is_transposed(layer) else layer.weight.data
            whole = Rows(Stored("", base.path, matrix.dtype, tuple(matrix.shape), 0), 0, len(matrix))
            ((_, values),) = dequantised([(whole, matrix)], how)
            layer.weight.data = (values.t().contiguous() if is_transposed(layer) else values).to(matrix.dtype)
    adapted = PeftModel.from_pretrained(model, adapter)
    known = get_peft_model_state_dict(adapted)
    names = [stored.name for stored in read_header(adapter / "adapter_model.safetensors")]
    if wrong := [name for name in names if name not in known]:
        raise _matches_nothing(adapter, wrong)
    layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "merged_adapters")}
    before = {name: _base_weight(layer).detach().clone() for name, layer in layers.items()}
    adapted.merge_adapter(safe_merge=True)
    changed = sum(not torch.equal(before[name], _base_weight(layer)) for name, layer in layers.items())
    merged = adapted.unload()
    merged.save_pretrained(folder)
    return changed, len(layers)


def _base_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return weight


# --- what goes beside the weights


def _copy_texts(base: Path, adapter: Path, folder: Path) -> None:
    """The adapter's tokenizer, template and generation config, and what a base that sees has for its pictures."""
    for file in adapter.iterdir():
        if file.is_file() and not file.name.startswith("adapter_") and file.name != "README.md":
            shutil.copyfile(file, folder / file.name)
    for file in base.glob("*processor*.json"):
        shutil.copyfile(file, folder / file.name)
    load_tokenizer(folder)
