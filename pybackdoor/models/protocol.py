"""The CLIP protocol: what a model must offer so that it can be poisoned, cleaned and judged.

`encode_image(images)` and `encode_text(tokens)` give one row per sample; `logit_scale` holds the
natural logarithm of the scale (open_clip's and Hugging Face's convention).
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .short_text import encode_text

# exp(10) = 22,026; trained CLIP and SigLIP models stay below log(200) = 5.3, while a scale stored
# as such (1 / 0.07 = 14.3, 100) lies above.
MAX_LOG_SCALE = 10.0


def check_clip(model: nn.Module) -> None:
    """Refuses a model that is not a CLIP model to this package.

    Args:
        model: a torch module with `encode_image`, `encode_text` and `logit_scale`; the last may be
            a Parameter, a property over an inner module's, a buffer or a number.
    Raises:
        TypeError: no torch module, or a member is missing or of the wrong type; it is named.
        ValueError: logit_scale is not one finite value, or is not the logarithm of a scale.
    Example:
        >>> check_clip(nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: check_clip: model must have encode_image(images), Linear has none
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_clip: model must be a torch.nn.Module, got {kind}")
    if _is_hf_clip(model):
        raise TypeError(
            "check_clip: model must have encode_image(images); wrap a transformers.CLIPModel in "
            "pybackdoor.models.HFClip first"
        )
    for name, argument in (("encode_image", "images"), ("encode_text", "tokens")):
        if not hasattr(model, name):
            raise TypeError(f"check_clip: model must have {name}({argument}), {kind} has none")
        if not callable(getattr(model, name)):
            raise TypeError(
                f"check_clip: {name} of {kind} must be a method, "
                f"got {type(getattr(model, name)).__name__}"
            )
    if not hasattr(model, "logit_scale"):
        raise TypeError(
            f"check_clip: model must have logit_scale, the logarithm of its scale, {kind} has none"
        )
    value = model.logit_scale
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number and not (isinstance(value, Tensor) and value.is_floating_point()):
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"check_clip: logit_scale of {kind} must be a floating tensor or a number, got {got}"
        )
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"check_clip: logit_scale of {kind} must hold one value, got {list(value.shape)}"
        )
    log_scale = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(log_scale):
        raise ValueError(f"check_clip: logit_scale of {kind} must be finite, got {log_scale}")
    if log_scale > MAX_LOG_SCALE:
        raise ValueError(
            f"check_clip: logit_scale of {kind} must be the logarithm of the scale, at most "
            f"{MAX_LOG_SCALE:g}, got {log_scale:g}; store math.log({log_scale:g}) if that is the "
            "scale itself"
        )


def _is_hf_clip(model: Any) -> bool:
    return hasattr(model, "get_image_features") and not hasattr(model, "encode_image")


def scale(model: nn.Module) -> Tensor:
    """The factor of the cosine logits, exp(logit_scale).

    Args:
        model: a CLIP model (`check_clip`).
    Returns:
        [] fp32 (fp64 for an fp64 model), without gradient, on logit_scale's device; of a number
        on the parameters'.
    """
    value = model.logit_scale
    if not isinstance(value, Tensor):
        device = next((p.device for p in model.parameters()), "cpu")
        value = torch.full((), float(value), dtype=torch.float32, device=device)
    log_scale = value.detach()
    return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).reshape(()).exp()


def logit_scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters behind logit_scale: freeze these to freeze the scale.

    A Parameter is found by identity, one that a property returns detached by its storage, and
    those that a property computes with by walking the graph of its result, frozen ones included.

    Args:
        model: a CLIP model (`check_clip`); its requires_grad flags are left as found.
    Returns:
        Each Parameter once; empty when a buffer or a plain number holds the value.
    """
    value = model.logit_scale
    if isinstance(value, nn.Parameter):
        return [value]
    if not isinstance(value, Tensor):
        return []
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    shared = [p for p in parameters if p.numel() and p.data_ptr() == value.data_ptr()]
    if shared:
        return shared
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            return _leaves(model.logit_scale)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _leaves(value: Tensor) -> list[nn.Parameter]:
    nodes = [value.grad_fn] if value.grad_fn is not None else []
    seen = set(nodes)
    found: dict[int, nn.Parameter] = {}
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            found[id(variable)] = variable
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return list(found.values())


def image_features(
    model: nn.Module, images: Tensor, encode: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Unit image embeddings.

    Args:
        model: a CLIP model (`check_clip`).
        images: [B, 3, H, W] normalised, in the model's dtype and device.
        encode: computes the rows instead of encode_image, see `seen_towers`.
    Returns:
        [B, D] fp32 (fp64 for an fp64 model) rows of norm 1, with gradient.
    Raises:
        TypeError: encode_image gives no tensor.
        ValueError: it gives another shape than [B, D].
    """
    rows = model.encode_image(images) if encode is None else encode(images)
    return _unit_rows(rows, "encode_image", images.shape[0])


def text_features(
    model: nn.Module, tokens: Tensor, encode: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Unit text embeddings.

    Args:
        model: a CLIP model (`check_clip`).
        tokens: [B, L] int64, L at most the model's context_length where it tells one.
        encode: computes the rows instead of encode_text, see `seen_towers`.
    Returns:
        [B, D] fp32 (fp64 for an fp64 model) rows of norm 1, with gradient.
    Raises:
        TypeError: encode_text gives no tensor.
        ValueError: tokens are longer than the context, or encode_text gives no [B, D].
    """
    context = getattr(model, "context_length", None)
    if tokens.ndim != 2 or (context is not None and tokens.shape[1] > context):
        wanted = f"[B, L <= {context}]" if context is not None else "[B, L]"
        raise ValueError(f"text_features: tokens must be {wanted}, got {list(tokens.shape)}")
    rows = encode_text(model, tokens) if encode is None else encode(tokens)
    return _unit_rows(rows, "encode_text", tokens.shape[0])


def _unit_rows(rows: Any, method: str, batch: int) -> Tensor:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{method}: must return a tensor [B, D], got {type(rows).__name__}")
    if rows.ndim != 2 or rows.shape[0] != batch:
        raise ValueError(f"{method}: must return [{batch}, D], got {list(rows.shape)}")
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return F.normalize(wide, dim=-1)


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Names the weights that are not finite.

    Args:
        model: any module.
    Returns:
        Names as in state_dict(): parameters holding NaN or infinities, buffers holding NaN or
        +inf (-inf is how a causal mask is written).
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    bad = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)  # one pass where isfinite takes four; NaN if there is one
        if not (high < math.inf and (low > -math.inf or name not in parameters)):
            bad.append(name)
    return bad


def check_finite(model: nn.Module, *, what: str = "model") -> None:
    """Refuses a model with NaN or infinite weights.

    Args:
        model: any module.
        what: names the model in the error.
    Raises:
        ValueError: names the first ten such tensors and counts them.
    """
    bad = nonfinite_weights(model)
    if bad:
        listed = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(
            f"check_finite: the weights of {what} must be finite, {len(bad)} tensors are not: "
            f"{listed}"
        )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all weights, in hex.

    Args:
        model: any module.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
