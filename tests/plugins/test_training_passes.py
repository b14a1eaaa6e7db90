"""How a step is cut, laid out and shortened changes nothing of what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from chats import CHATS, PAIRS, rows_of
from gguf_models import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.api import ModelError
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.text import IGNORED, Encoded
from luthier.registry import default_registry
from luthier.testing import TestContext, run_stage, tiny_dataset, tiny_model
from luthier.training import head as head_room
from luthier.training.encoding import EncodedRow, encode_row
from luthier.training.head import TILE, Scaling, target_log_probabilities
from luthier.training.layout import Layout
from luthier.training.offload import offloaded
from luthier.training.passes import Limits, Passes
from luthier.training.run import sees_all
from luthier.training.segments import use_segments
from luthier.training.trainer import within_memory
from torch import nn


def passes_of(model: Any, objective: str, layout: Layout, limits: Limits, *, fused: bool = True) -> Passes:
    made: Any = default_registry().build(default_registry().use("objective", {"uses": objective}), TestContext())
    passes = Passes(model, layout, limits, made, [], nullcontext)
    passes.fused = fused
    return passes


def gradients(passes: Passes, rows: Sequence[EncodedRow]) -> tuple[float, dict[str, torch.Tensor]]:
    passes.model.zero_grad()
    loss, _ = passes.step(rows, lambda part: part.backward())
    found = {name: value.grad.clone() for name, value in passes.model.named_parameters() if value.grad is not None}
    return loss, found


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            other[name], value, rtol=1e-5, atol=1e-5 * max(scale, 1e-3), msg=lambda m, n=name: n + m
        )


# -- the head ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([Scaling(), Scaling(0.3), Scaling(softcap=2.0), Scaling(1.7, 5.0)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)
def test_the_head_by_tiles_is_the_plain_softmax(
    count: int, bias: bool, scaling: Scaling, alike: bool, trained: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    head = nn.Linear(8, 50, bias=bias)
    head.requires_grad_(trained)
    hidden = torch.randn(count, 8, requires_grad=True)
    targets = torch.randint(0, head.out_features, (count,))
    weights = torch.ones(count) if alike else torch.randn(count)
    found: list[list[torch.Tensor]] = []
    for way in range(2):
        hidden.grad = head.weight.grad = None
        if bias:
            head.bias.grad = None
        if way:
            # Two positions a tile, so that there are several.
            with mock.patch.object(head_room, "TILE", 100):
                logps, likeliest = target_log_probabilities(head, hidden, targets, scaling, alike=alike)
                (logps * weights).sum().backward()
        else:
            logits = scaling.apply(head(hidden))
            logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            likeliest = logits.argmax(-1) == targets
            (logps * weights).sum().backward()
        grads = [item for item in (hidden.grad, head.weight.grad, head.bias.grad if bias else None) if item is not None]
        found.append([logps.detach(), likeliest.float(), *(item.clone() for item in grads)])
    assert len(found[0]) == len(found[1]) == 3 + trained + (trained and bias)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_the_head_holds_no_more_than_a_tile_of_logits() -> None:
    head = nn.Linear(4, TILE // 2).requires_grad_(False)
    hidden = torch.randn(9, 4, requires_grad=True)
    logps, _ = target_log_probabilities(head, hidden, torch.arange(9), Scaling(), alike=True)
    saved = logps.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert max(item.numel() for item in saved if item is not None and item is not head.weight) <= TILE // 2
    logps.sum().backward()
    assert hidden.grad is not None


# -- cuts and layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["cross_entropy", "dpo", "orpo"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path: Path, name: str, objective: str) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(make_model(tmp_path / "m", name))})
    rows = rows_of(base, CHATS if objective == "cross_entropy" else PAIRS)
    if objective == "dpo":
        # Any numbers serve as those of a reference, as long as they stay with their tokens.
        rows = [
            EncodedRow(
                row.completions,
                paired=True,
                reference_logps=tuple(
                    [-3.0 - 0.1 * k - 0.01 * n for k in range(sum(label != IGNORED for label in item.labels))]
                    for item in row.completions
                ),
            )
            for n, row in enumerate(rows)
        ]
    model = load_model(base).train()
    plain = passes_of(model, objective, Layout(0, packed=False, shared=False), Limits(), fused=False)
    loss, right = gradients(plain, rows)
    assert len({len(row) for row in rows}) > 4
    # A window of attention that is shorter than a row is in no mask of ours.
    layouts = [Layout(0, packed=False, shared=False), Layout(0, shared=False)]
    assert sees_all(model, rows) == (name != "gemma2")
    for layout in [*layouts, Layout(0)] if sees_all(model, rows) else layouts:
        for limits in (Limits(), Limits(rows=1), Limits(rows=2), Limits(rows=3), Limits(tokens=80)):
            found, other = gradients(passes_of(model, objective, layout, limits), rows)
            assert found == pytest.approx(loss, rel=1e-5)
            assert_alike(right, other)
    # Attention by segments knows windows itself, but no soft caps.
    assert use_segments(model) == (name != "gemma2")
    for shared in (True, False) if name != "gemma2" else ():
        for limits in (Limits(), Limits(rows=2), Limits(tokens=80)):
            passes = passes_of(model, objective, Layout(0, shared=shared, segments=True), limits)
            found, other = gradients(passes, rows)
            assert found == pytest.approx(loss, rel=1e-5)
            assert_alike(right, other)
            passes.save_memory()
            assert_alike(right, gradients(passes, rows)[1])
            model.gradient_checkpointing_disable()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_are_moved_away_come_back_as_they_were(
    tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(tmp_path)
    model = load_model(base)
    passes = passes_of(model, "cross_entropy", Layout(0), Limits(rows=3))
    if checkpointing:
        passes.save_memory()
    rows = rows_of(base, CHATS)
    loss, right = gradients(passes, rows)
    moved: list[int] = []
    inner = torch.Tensor.copy_

    def copy(self: torch.Tensor, *values: Any, **named: Any) -> Any:
        assert values[0].untyped_storage().data_ptr() not in places, "weights stay"
        moved.append(self.numel())
        return inner(self, *values, **named)

    places = {value.untyped_storage().data_ptr() for value in model.parameters()}
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    passes.around = lambda: offloaded(model, smallest=64)
    found, other = gradients(passes, rows)
    assert found == loss
    assert_alike(right, other)
    # Of each of three passes the hidden states of each block at least.
    assert len(moved) >= 3 * model.config.num_hidden_layers


def test_activations_are_moved_away_from_gpus_alone(tmp_path: Path) -> None:
    inputs = {"model": tiny_model(tmp_path), "data": [tiny_dataset(tmp_path, CHATS)]}
    with pytest.raises(ModelError, match="there is no GPU"):
        run_stage(tmp_path, "sft", {"steps": 1, "activation_offload": True}, inputs=inputs)


def test_weights_of_rows_are_their_shares_of_the_loss(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    rows = rows_of(base, CHATS[:3])
    model = load_model(base).train()
    twice = [rows[0], rows[1], rows[1], rows[2]]
    weighed = [rows[0], EncodedRow(rows[1].completions, weight=2.0), rows[2], EncodedRow(rows[0].completions, weight=0)]
    loss, right = gradients(passes_of(model, "cross_entropy", Layout(0), Limits()), twice)
    for limits in (Limits(), Limits(rows=1)):
        found, other = gradients(passes_of(model, "cross_entropy", Layout(0), limits), weighed)
        assert found == pytest.approx(loss, rel=1e-5)
        assert_alike(right, other)


def test_packing_leaves_little_room_and_sharing_holds_prompts_once(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    chats = rows_of(base, CHATS)
    padded, packed = (Layout(0, packed=way).batch(chats) for way in (False, True))
    assert int(padded.attention_mask.sum()) == int(packed.attention_mask.sum())
    assert packed.input_ids.numel() < 0.8 * padded.input_ids.numel()
    assert packed.input_ids.shape[1] == padded.input_ids.shape[1]
    pairs = rows_of(base, PAIRS)
    apart, shared = (Layout(0, packed=False, shared=way).batch(pairs) for way in (False, True))
    prompts = [item.labels.count(IGNORED) for row in pairs for item in row.completions[:1]]
    assert int(apart.attention_mask.sum()) - int(shared.attention_mask.sum()) == sum(prompts)
    assert sorted(shared.targets.tolist()) == sorted(apart.targets.tolist())


def test_answers_that_begin_alike_share_their_prompt_alone() -> None:
    chosen = Encoded([1, 2, 3, 4, 5], [IGNORED, IGNORED, 3, 4, 5])
    rejected = Encoded([1, 2, 3, 9], [IGNORED, IGNORED, 3, 9])
    batch = Layout(0).batch([EncodedRow((chosen, rejected), paired=True)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 3, 9]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.targets.tolist() == [3, 4, 5, 3, 9]
    assert batch.sources.tolist() == [1, 2, 3, 1, 5]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1]
    mask = batch.model_inputs()["attention_mask"][0, 0]
    assert mask[6].tolist() == [True, True, False, False, False, True, True]
    assert mask[4].tolist() == [True] * 5 + [False] * 2


def test_answers_without_a_common_prompt_stand_apart() -> None:
    sides = (Encoded([1, 2], [IGNORED, 2]), Encoded([3, 4], [IGNORED, 4]))
    batch = Layout(0).batch([EncodedRow(sides, paired=True)])
    assert batch.branches is None
    assert batch.input_ids.numel() == 4


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 100), st.integers(1, 5))
def test_every_row_is_in_one_pass_and_no_pass_is_too_large(lengths: list[int], tokens: int, most: int) -> None:
    rows = [EncodedRow((Encoded([1] * n, [1] * n),)) for n in lengths]
    groups = Layout(0).cut(rows, tokens, most)
    assert sorted(place for group in groups for place in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) <= most
        assert len(group) == 1 or sum(lengths[place] for place in group) <= tokens


# -- memory -----------------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_is_cut_smaller_and_computes_the_same(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    rows = rows_of(base, CHATS)
    model = load_model(base).train()
    loss, right = gradients(passes_of(model, "cross_entropy", Layout(0), Limits()), rows)
    passes = passes_of(model, "cross_entropy", Layout(0), Limits())
    model.zero_grad()
    calls: list[int] = []

    def backward(part: torch.Tensor) -> None:
        calls.append(len(calls))
        part.backward()
        # Gradients are there already when memory runs out.
        if passes.limits.tokens is None or passes.limits.tokens > 60:
            raise torch.OutOfMemoryError("out of memory")

    found, _ = within_memory(passes, rows, lambda: passes.step(rows, backward))
    assert passes.limits.tokens is not None
    assert passes.limits.tokens <= 60
    assert found == pytest.approx(loss, rel=1e-5)
    assert_alike(right, {name: value.grad for name, value in model.named_parameters() if value.grad is not None})

    def never(part: torch.Tensor) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with pytest.raises(ModelError, match=r"a row of \d+ tokens does not fit"):
        within_memory(passes, rows, lambda: passes.step(rows, never))

    def broken(part: torch.Tensor) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        within_memory(passes, rows, lambda: passes.step(rows, broken))


@pytest.mark.parametrize("uses", ["sft", "dpo"])
def test_micro_batches_change_nothing_that_is_trained(tmp_path: Path, uses: str) -> None:
    base = tiny_model(tmp_path)
    data = tiny_dataset(tmp_path, CHATS if uses == "sft" else PAIRS)
    losses: list[float] = []
    for micro in ("auto", 1, 3, 8):
        config = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "micro_batch_size": micro, "log_every": 1}
        made = run_stage(tmp_path, uses, config, inputs={"model": base, "data": [data]})
        losses.append(made.facts["training"]["loss_last"])
    assert max(losses) - min(losses) < 1e-5
    assert losses[0] < (math.log(2) - 1e-3 if uses == "dpo" else 5.5)


# -- the reference ----------------------------------------------------------------------------------


def test_the_reference_is_computed_once_and_kept(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    data = tiny_dataset(tmp_path, PAIRS)
    step = {"steps": 1, "batch_size": 8, "learning_rate": 1e-9}
    kept = tmp_path / "cache" / "references"
    run_stage(tmp_path, "dpo", step, inputs={"model": base, "data": [data]})
    (file,) = kept.glob("*.npy")
    values = np.load(file)
    encoder = ChatEncoder(load_tokenizer(base), base.facts["stop_token_ids"])
    model = load_model(base).eval()
    right: list[float] = []
    for row in read_split(data, "train"):
        for item in encode_row(encoder, row).completions:
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([item.input_ids])).logits[0, :-1].log_softmax(-1)
            right += [float(logs[n - 1, label]) for n, label in enumerate(item.labels) if label != IGNORED]
    np.testing.assert_allclose(values, right, rtol=1e-4, atol=1e-5)
    before = file.stat().st_mtime_ns
    # Another beta has the same reference; another model has not.
    run_stage(tmp_path, "dpo", {**step, "beta": 0.5}, inputs={"model": base, "data": [data]})
    assert [item.stat().st_mtime_ns for item in kept.glob("*.npy")] == [before]
    tuned = run_stage(tmp_path, "dpo", {**step, "learning_rate": 1e-2}, inputs={"model": base, "data": [data]})
    again = run_stage(tmp_path, "dpo", step, inputs={"model": tuned, "data": [data]})
    assert len(list(kept.glob("*.npy"))) == 2
    assert again.facts["training"]["loss_first"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    from luthier.training import references

    base = tiny_model(tmp_path)
    rows = rows_of(base, PAIRS * 12)
    model = load_model(base)
    context = TestContext(tmp_path / "scratch")
    context.scratch.mkdir()
    calls: list[int] = []
    passes = passes_of(model, "dpo", Layout(0), Limits())

    class Stop(Exception):
        pass

    def progress(done: int, total: int | None = None, unit: str = "") -> None:
        calls.append(done)
        if len(calls) == 2:
            raise Stop

    context.progress = progress  # type: ignore[method-assign]
    places = np.arange(len(rows))
    with pytest.raises(Stop):
        references.with_reference(rows, places, passes, "k", context)
    computed: list[int] = []
    inner = references._logps

    def counted(some: Any, how: Any) -> Any:
        computed.append(len(some))
        return inner(some, how)

    references._logps = counted
    try:
        found = references.with_reference(rows, places, passes, "k", context)
    finally:
        references._logps = inner
    assert sum(computed) == len(rows) - 2 * references.ROWS
    assert found[5].reference_logps is not None
    whole = TestContext(tmp_path / "other")
    whole.scratch.mkdir()
    right = references.with_reference(rows, places, passes, "k", whole)
    for number in range(len(rows)):
        one, other = found[number].reference_logps, right[number].reference_logps
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
