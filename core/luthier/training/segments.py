"""Attention over runs of tokens that lie one behind the other in a single sequence, each seeing only what it may."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.api.training import Segments, TokenBatch

NAME = "luthier_segments"
"""What transformers knows this attention by."""
WIDEST = 256
"""Features of a head that the kernel takes at most."""
_entered: ContextVar[bool] = ContextVar("segments", default=False)


def use_segments(model: Any) -> bool:
    """Let a model compute attention by segments where a batch has some, and as before where it has none.

    Returns:
        Whether it can: it has to compute scaled dot-product attention now, and give windows to what computes attention,
        as those models do that transformers runs with flash attention.
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = inside.config.get_text_config()
    known = getattr(text, "_attn_implementation", None)
    if known == NAME:
        return True
    able = known == "sdpa" and getattr(inside, "_supports_flash_attn", False)
    if not able or getattr(text, "attention_chunk_size", None) is not None:
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    inside.set_attn_implementation(NAME)
    return getattr(text, "_attn_implementation", None) == NAME


def leave_segments(model: Any) -> None:
    """Compute attention as before again."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inside.config.get_text_config(), "_attn_implementation", None) == NAME:
        inside.set_attn_implementation("sdpa")


@contextmanager
def around(batch: TokenBatch) -> Iterator[None]:
    """While a model is called with a batch: no masks are made where segments say what is seen."""
    token = _entered.set(batch.segments is not None)
    try:
        yield
    finally:
        _entered.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _entered.get() else sdpa_mask(*args, **kwargs)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention: query of shape (1, heads, tokens, features), key and value with as many heads
    or fewer; the result's is (1, tokens, heads, features).

    Raises:
        NotImplementedError: the model wants something that is not computed here.
    """
    if segments is None:
        if _entered.get():
            raise NotImplementedError("the model does not tell its attention what it may see")
        more = {} if sliding_window is None else {"sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more, **kwargs)
    odd = [name for name in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if odd or attention_mask is not None or len(query) != 1:
        raise NotImplementedError(f"attention by segments has no {', '.join(odd) or 'mask'}")
    if segments.seen is not None:
        key, value = key.index_select(2, segments.seen), value.index_select(2, segments.seen)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _has_kernel(query, dropout):
        return _by_kernel(query, key, value, segments, scale, sliding_window), None
    return _one_by_one(query, key, value, segments, scale, sliding_window, dropout), None


def _has_kernel(query: Tensor, dropout: float) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= WIDEST
        and dropout == 0
        and _varlen() is not None
    )


def _varlen() -> Any:
    """torch's kernel for sequences of different lengths, where this version has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    features = value.shape[-1]
    groups = query.shape[1] // key.shape[1]
    more: dict[str, Any] = {}
    kernel = _varlen()
    if groups > 1:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            more["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # The kernel wants values as wide as queries.
    value = pad(value, (0, query.shape[-1] - features))
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    made = kernel(
        *flat,
        segments.query_ends,
        segments.key_ends,
        max(segments.queries),
        max(segments.keys),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **more,
    )
    return made[None, ..., :features]


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None, dropout: float
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts: list[Tensor] = []
    for some, seen, values, mine, theirs in zip(
        query.split(segments.queries, 2),
        key.split(segments.keys, 2),
        value.split(segments.keys, 2),
        segments.queries,
        segments.keys,
        strict=True,
    ):
        mask = None
        if mine != theirs or (window is not None and theirs > window):
            mask = torch.ones(mine, theirs, dtype=torch.bool, device=query.device).tril(theirs - mine)
            if window is not None:
                mask = mask.triu(theirs - mine - window + 1)
        parts.append(
            scaled_dot_product_attention(
                some, seen, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)
