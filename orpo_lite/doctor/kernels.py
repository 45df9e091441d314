"""Test the kernels that a training step uses: bitsandbytes' 4-bit product, and attention."""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from orpo_lite.doctor.check import Check
from orpo_lite.errors import first_line

if TYPE_CHECKING:
    import torch

TORCH_PAGE = "https://pytorch.org/get-started/locally"


def used_device() -> "torch.device":
    """Return the device that a training would use: the first GPU, or the CPU if there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def check_four_bit() -> Iterator[Check]:
    """Multiply by a 4-bit matrix with bitsandbytes and with torch, and compare the two products.

    For torch's product, the 4-bit numbers are unpacked by torch, not by bitsandbytes. So a wrong
    kernel of bitsandbytes changes only the product of bitsandbytes, and the two products differ.
    """
    import bitsandbytes as bnb
    import torch

    from orpo_lite.model.load import choose_dtype
    from orpo_lite.ops.devices import device_kind, dtype_name

    device = used_device()
    dtype = choose_dtype("auto", device_kind(device))
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 256, generator=generator)
    x_TI = torch.randn(8, 256, generator=generator)
    layer = bnb.nn.Linear4bit(
        256, 96, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight_OI.to(dtype), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    layer = layer.to(device)
    unpacked_OI = unpack_nf4(layer.weight).to(torch.float64).cpu()
    rounding = relative_error(unpacked_OI, weight_OI)
    x = x_TI.to(device, dtype).requires_grad_()
    out = layer(x)
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        one = layer(x[:1])  # bitsandbytes has another kernel for one row
    exact = x.detach().double().cpu() @ unpacked_OI.T
    gradient = unpacked_OI.sum(0).expand(8, -1)
    errors: dict[str, float] = {
        "its product": relative_error(out, exact),
        "its product of one row": relative_error(one, exact[:1]),
        "its gradient": relative_error(x.grad, gradient),
    }
    where = f"{device.type}, {dtype_name(dtype)}"
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    wrong = [f"{name} is off by {error:.1%}" for name, error in errors.items() if error > limit]
    if not rounding < ROUNDING_OF_NF4:
        wrong.append(f"its rounding is off by {rounding:.0%}")
    if wrong:
        found = f"bitsandbytes is wrong on {where}: {'; '.join(wrong)}"
        fix = "pip install --force-reinstall bitsandbytes; or set quantization.load_in_4bit=false"
        yield Check("4-bit product", "fault", found, fix)
    else:
        found = f"bitsandbytes is correct on {where} (error at most {max(errors.values()):.0e})"
        yield Check("4-bit product", "ok", found)


ROUNDING_OF_NF4 = 0.3
"""Largest accepted rounding error of NF4, relative to the largest weight, for normal weights.

The widest gap between two of the 16 numbers of NF4 is 0.30. Rounding errs by at most half a gap."""


def unpack_nf4(parameter: Any) -> "torch.Tensor":
    """Unpack a 4-bit parameter with torch, and return the matrix. The scales must be float32.

    A byte contains two 4-bit numbers, the first one in the high half of the byte. Each block of
    numbers has one scale.
    """
    import torch

    state = parameter.quant_state
    packed = parameter.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    values = state.code.to(codes.device)[codes].view(-1, state.blocksize)
    matrix: torch.Tensor = (values * state.absmax.view(-1, 1)).view(state.shape)
    return matrix


def relative_error(found: Any, exact: Any) -> float:
    """Return max |found - exact| / max |exact|, computed in float64."""
    exact = exact.detach().double().cpu()
    difference = (found.detach().double().cpu() - exact).abs().max()
    return float(difference / exact.abs().max())


def check_attention() -> Iterator[Check]:
    """Compare each attention back-end of this device with the softmax formula in float64.

    Outputs and gradients are compared, on a row of two segments.
    """
    import torch

    from orpo_lite.model.load import choose_dtype
    from orpo_lite.ops.attention import BACKENDS, choose_backend, flash_attn
    from orpo_lite.ops.devices import device_kind
    from orpo_lite.ops.segments import AttentionOptions, Segment

    device = used_device()
    kind = device_kind(device)
    dtype = choose_dtype("auto", kind)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 24, 64), (1, 2, 24, 64), (1, 2, 24, 64))  # grouped heads
    leaves = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    segments = (Segment(0, 14), Segment(14, 24, 0, 6))
    options = AttentionOptions(64**-0.5, None, None)
    exact = _with_gradients(_plain_attention, leaves, torch.float64, segments, options)
    names = {
        "cpu": ["flash_cpu", "sdpa", "maths"],
        "cuda": ["efficient", "sdpa", "maths"],
        "ampere": ["varlen", "efficient", "sdpa", "maths"],
    }[kind]
    if find_spec("flash_attn") and flash_attn() is None:
        fix = "pip uninstall flash-attn (it only makes models with a softcap faster)"
        yield Check("attention", "warning", "flash-attn is installed, but cannot be imported", fix)
    elif kind == "ampere" and flash_attn() is not None:
        names.append("flash_attn")
    used = choose_backend(leaves[0], leaves[2], None)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    right = []
    for name in names:
        try:
            found = _with_gradients(BACKENDS[name], leaves, dtype, segments, options)
            error = max(relative_error(*pair) for pair in zip(found, exact, strict=True))
            text = "" if error <= limit else f"is off by {error:.1%}"
        except Exception as failure:
            text = f"fails ({type(failure).__name__}: {first_line(failure)[:200]})"
        label = f"{name} (used)" if name == used else name
        if not text:
            right.append(label)
            continue
        fix = f"install the build of torch for this GPU ({TORCH_PAGE})"
        if name == "flash_attn":
            fix = "pip uninstall flash-attn, or build it for this torch"
        yield Check("attention", "fault" if name == used else "warning", f"{label} {text}", fix)
    if right:
        yield Check("attention", "ok", f"correct on {device.type}: {', '.join(right)}")


def _with_gradients(
    function: Callable[..., Any],
    leaves: Sequence["torch.Tensor"],
    dtype: "torch.dtype",
    segments: Any,
    options: Any,
) -> list["torch.Tensor"]:
    """Return the output of an attention function, and the gradients of its sum of squares."""
    copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = function(*copies, segments, options)
    out.float().square().sum().backward()
    return [out, *(copy.grad for copy in copies if copy.grad is not None)]


def _plain_attention(query: Any, key: Any, value: Any, segments: Any, options: Any) -> Any:
    """Return softmax(q k^T * scale) v per segment. A segment attends to its prefix and itself."""
    import torch

    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    outs = []
    for segment in segments:
        own = torch.arange(segment.start, segment.stop, device=query.device)
        prefix = torch.arange(segment.prefix_start, segment.prefix_stop, device=query.device)
        seen = torch.cat([prefix, own])
        scores = query[:, :, own] @ key[:, :, seen].transpose(-1, -2) * options.scale
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + segment.prefix_length)
        outs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, :, seen])
    return torch.cat(outs, 2)
