"""Finds what `seen` and `seen_resnet` compute, by exact class; every other tower computes itself.

Exact classes, because a subclass may compute something else; no hooks, because they would see
other values or none; nothing random; no gradient checkpointing, which is asked for to save memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hf import HFClip
from .seen import Affine, Block, ImageTower, Map, TextTower, patches
from .seen_resnet import ResNetTower, blocks, norms

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OUT = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")
_TOKENWISE = {nn.Linear, nn.LayerNorm, nn.Identity, nn.Sequential, nn.ModuleList}
_TOKENWISE |= {nn.GELU, nn.ReLU, nn.SiLU}
# Block's project and maps.
Projections = tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[[], tuple[Affine, ...]]]


def image_tower(model: nn.Module) -> Map | None:
    """The function of a model's image tower, or None: its own is the only one.

    Args:
        model: a CLIP model; the tower uses its modules and parameters as they are now.
    """
    if not _own(model, "encode_image"):
        return None
    clip, transformer = _open_clip()
    if clip is not None and type(model) in (clip.CLIP, clip.CustomTextCLIP):
        return _open_clip_image(transformer, model.visual) or _resnet(model.visual)
    return _hf_image(model.model) if type(model) is HFClip else None


def text_tower(model: nn.Module) -> TextTower | None:
    """The same of a text tower. Whether its mask is causal is for the caller to find out."""
    if not _own(model, "encode_text"):
        return None
    clip, transformer = _open_clip()
    if clip is not None and type(model) is clip.CLIP:
        return _open_clip_text(transformer, model, model.text_pool_type, model.text_eos_id)
    if clip is not None and type(model) is clip.CustomTextCLIP:
        text = model.text
        if not _usable([text], {transformer.TextTransformer}) or text.cls_emb is not None:
            return None
        if text.use_pad_mask or text.output_tokens:
            return None
        return _open_clip_text(transformer, text, text.pool_type, text.eos_id)
    return _hf_text(model.model) if type(model) is HFClip else None


def _open_clip() -> tuple[Any, Any]:
    """Its modules where it has been imported, as it has where there is a model of its."""
    return sys.modules.get("open_clip.model"), sys.modules.get("open_clip.transformer")


def _own(model: nn.Module, method: str) -> bool:
    """Whether a method is its class's, as the class was written."""
    written = getattr(getattr(type(model), method, None), "__module__", None)
    return method not in vars(model) and written == type(model).__module__


def _usable(modules: Iterable[nn.Module], known: set[type]) -> bool:
    """Whether all are of known classes and nothing has been hung on them."""
    for module in modules:
        members = vars(module)  # looked up here, as this is done at every step
        if type(module) not in known or "forward" in members:
            return False
        if any(members[name] for name in _HOOKS) or any(map(members.get, _CHECKPOINTING)):
            return False
    return True


def _all(module: nn.Module) -> list[nn.Module]:
    """It and what it holds; faster than modules(), which looks for doubles."""
    found = [module]
    for one in found:
        found += [child for child in one._modules.values() if child is not None]
    return found


def _leaves(library: ModuleType) -> set[type]:
    """open_clip's classes that treat every token alike, and torch's."""
    own = (library.LayerNorm, library.LayerNormFp32, library.LayerScale, library.QuickGELU)
    return _TOKENWISE.union(own)


def _open_clip_blocks(library: ModuleType, stack: nn.Module) -> tuple[Block, ...] | None:
    known = {library.Transformer, library.ResidualAttentionBlock, nn.MultiheadAttention, _OUT}
    if not _usable(_all(stack), known | _leaves(library)) or not len(stack.resblocks):
        return None
    for block in stack.resblocks:
        attn = block.attn
        extras = attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn
        packed = attn.in_proj_weight is not None and attn.in_proj_bias is not None
        if extras or attn.dropout or not packed or hasattr(block, "ln_1_kv"):
            return None
    return tuple(
        Block(
            block.ln_1, *_packed(block.attn), block.attn.num_heads, block.attn.out_proj, block.ln_2,
            block.mlp, block.ls_1, block.ls_2,
        )
        for block in stack.resblocks
    )  # fmt: skip


def _packed(attn: nn.MultiheadAttention) -> Projections:
    def project(x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)

    def maps() -> tuple[Affine, ...]:
        parts = zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
        return tuple(parts)

    return project, maps


def _open_clip_image(library: ModuleType, visual: nn.Module) -> ImageTower | None:
    if not _usable([visual], {library.VisionTransformer}) or visual.pool_type != "tok":
        return None
    around = [visual.conv1, visual.patch_dropout, visual.ln_pre, visual.ln_post]
    blocks = _open_clip_blocks(library, visual.transformer)
    if blocks is None or not _usable(around, {nn.Conv2d} | _leaves(library)):
        return None
    if visual.attn_pool is not None or visual.output_tokens:
        return None

    def embed(images: Tensor) -> Tensor:
        x = patches(visual.conv1, images)
        first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return visual.ln_pre(torch.cat([first, x], 1) + visual.positional_embedding.to(x.dtype))

    return ImageTower(embed, blocks, lambda x: _projected(visual.ln_post(x), visual.proj))


def _resnet(visual: nn.Module) -> ResNetTower | None:
    library = sys.modules.get("open_clip.modified_resnet")
    if library is None or type(visual) is not library.ModifiedResNet:
        return None
    known = {library.ModifiedResNet, library.Bottleneck, library.AttentionPool2d, nn.Conv2d}
    known |= {nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.Identity, nn.Sequential, nn.Linear}
    if not _usable(_all(visual), known) or type(visual.attnpool) is not library.AttentionPool2d:
        return None
    every = [*blocks(visual)]
    if {type(block) for block in every} != {library.Bottleneck}:
        return None
    if not all(map(_convolutions, [visual, *every])) or len({n.eps for n in norms(visual)}) > 1:
        return None
    return ResNetTower(visual)


def _convolutions(part: nn.Module) -> bool:
    """Whether a stem or a bottleneck has, where they belong, convolutions and their norms."""
    pairs = [(part.conv1, part.bn1), (part.conv2, part.bn2), (part.conv3, part.bn3)]
    side = getattr(part, "downsample", None)
    if side is not None:
        if len(side) != 3 or type(side[0]) is not nn.AvgPool2d:
            return False
        pairs.append((side[1], side[2]))
    return all(
        type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and conv.padding_mode == "zeros"
        for conv, norm in pairs
    )


def _open_clip_text(
    library: ModuleType,
    text: nn.Module,  # a TextTransformer, or a CLIP, which holds the same members
    pool: str,
    eos: int,
) -> TextTower | None:
    blocks = _open_clip_blocks(library, text.transformer)
    projection = text.text_projection
    around = [text.token_embedding, text.ln_final]
    around += [projection] if isinstance(projection, nn.Module) else []
    if blocks is None or not _usable(around, {nn.Embedding} | _leaves(library)):
        return None
    if text.attn_mask is None or pool not in ("argmax", "eos"):
        return None
    dtype = text.transformer.get_cast_dtype()

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return text.token_embedding(tokens).to(dtype) + positions.to(dtype)

    return TextTower(
        _first_place(eos if pool == "eos" else None), embed, text.positional_embedding, blocks,
        lambda x: _projected(text.ln_final(x), projection),
    )  # fmt: skip


def _projected(x: Tensor, projection: Any) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _first_place(token: int | None) -> Callable[[Tensor], Tensor]:
    """[n, L] tokens -> [n] the first place of a token; None: of the largest one."""
    return lambda tokens: (tokens if token is None else (tokens == token).int()).argmax(-1)


def _hf_blocks(stack: nn.Module) -> tuple[Block, ...] | None:
    library = sys.modules[type(stack).__module__]
    names = ("CLIPEncoder", "CLIPEncoderLayer", "CLIPAttention", "CLIPMLP")
    known = _TOKENWISE.union(getattr(library, name, None) for name in names)
    activations = {
        type(layer.mlp.activation_fn)
        for layer in stack.layers
        if type(layer.mlp.activation_fn).__module__ == "transformers.activations"
    }
    if not _usable(_all(stack), known | activations) or not len(stack.layers):
        return None
    if any(layer.self_attn.dropout for layer in stack.layers):
        return None
    return tuple(
        Block(
            layer.layer_norm1, *_apart(layer.self_attn), layer.self_attn.num_heads,
            layer.self_attn.out_proj, layer.layer_norm2, layer.mlp,
        )
        for layer in stack.layers
    )  # fmt: skip


def _apart(attn: nn.Module) -> Projections:
    maps = (attn.q_proj, attn.k_proj, attn.v_proj)
    return (
        lambda x: tuple(project(x) for project in maps),
        lambda: tuple((project.weight, project.bias) for project in maps),
    )


def _hf_model(model: nn.Module, method: str) -> ModuleType | None:
    """The module of transformers' CLIP, for its own class as it is."""
    library = sys.modules.get("transformers.models.clip.modeling_clip")
    mine = library is not None and type(model) is library.CLIPModel
    return library if mine and _own(model, method) else None


def _hf_image(model: nn.Module) -> ImageTower | None:
    library = _hf_model(model, "get_image_features")
    if library is None:
        return None
    vision, project = model.vision_model, model.visual_projection
    embeddings = vision.embeddings
    kinds = {library.CLIPVisionModel, getattr(library, "CLIPVisionTransformer", None)}
    around = [vision, *_all(embeddings), vision.pre_layrnorm, vision.post_layernorm, project]
    kinds |= {library.CLIPVisionEmbeddings, nn.Conv2d, nn.Embedding}
    blocks = _hf_blocks(vision.encoder)
    if blocks is None or not _usable(around, kinds | _TOKENWISE):
        return None

    def embed(images: Tensor) -> Tensor:
        conv = embeddings.patch_embedding
        x = patches(conv, images.to(conv.weight.dtype))
        first = embeddings.class_embedding.expand(len(x), 1, -1)
        places = embeddings.position_embedding(embeddings.position_ids)
        return vision.pre_layrnorm(torch.cat([first, x], 1) + places)

    return ImageTower(embed, blocks, lambda x: project(vision.post_layernorm(x)))


def _hf_text(model: nn.Module) -> TextTower | None:
    library = _hf_model(model, "get_text_features")
    if library is None:
        return None
    text, project = model.text_model, model.text_projection
    embeddings, eos = text.embeddings, text.eos_token_id
    kinds = {library.CLIPTextModel, getattr(library, "CLIPTextTransformer", None)}
    around = [text, *_all(embeddings), text.final_layer_norm, project]
    kinds |= {library.CLIPTextEmbeddings, nn.Embedding}
    blocks = _hf_blocks(text.encoder)
    if blocks is None or not _usable(around, kinds | _TOKENWISE):
        return None
    return TextTower(
        _first_place(None if eos == 2 else eos),  # 2: configurations that say it wrongly
        lambda tokens, positions: embeddings.token_embedding(tokens) + positions,
        embeddings.position_embedding.weight,
        blocks,
        lambda x: project(text.final_layer_norm(x)),
    )
