"""The laws of the merge methods, on random parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.api import ModelError
from luthier.merging import parts as merging_parts
from luthier.merging.api import MergedParameter
from luthier.merging.parts import Grid, Noise, merge_tensors
from luthier.registry import default_registry
from luthier_plugins.merge_methods import selection
from luthier_plugins.merge_methods.selection import largest
from torch import Tensor

seeds = st.integers(0, 10_000)
ALL = [name for name in default_registry().names("merge_method") if name != "mergekit"]


def method(name: str, **values: object):
    """A method with its config, as a recipe makes it."""
    registry = default_registry()
    component = registry.get("merge_method", name)
    return registry.impl_class(component)(config_of(name, **values), None)


def config_of(name: str, **values: object):
    """A method's config."""
    registry = default_registry()
    if name in ("fisher", "regmean"):
        values = {"data": "rows", **values}
    return registry.config_class(registry.get("merge_method", name)).model_validate(
        values, context={"components": registry}
    )


def tensors(seed: int, count: int, *shape: int) -> list[Tensor]:
    """Random parameters of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape or (7, 5), generator=generator) for _ in range(count)]


def near(seed: int, count: int, *shape: int) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it."""
    base, *changes = tensors(seed, count + 1, *shape)
    return base, [base + 0.3 * change for change in changes]


def needs(name: str) -> tuple[int, bool]:
    """How many models to give a method, and whether it takes a base."""
    config = config_of(name)
    least, most = config.models
    return max(least, min(3, most or 3)), config.base == "required"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(6,), (1, 1), (5, 4), (3, 4, 5)], ids=str)
def test_every_method_takes_every_shape(name: str, shape: tuple[int, ...]) -> None:
    count, takes_base = needs(name)
    base, models = near(1, count, *shape)
    merged = merge_tensors(method(name), models, base=base if takes_base else None)
    assert merged.shape == shape
    assert bool(torch.isfinite(merged).all())


@given(seeds, st.integers(2, 4), st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_linear_of_equal_models_is_the_model_bit_for_bit(seed: int, count: int, weights: list[float]) -> None:
    (one,) = tensors(seed, 1)
    assert torch.equal(merge_tensors(method("linear"), [one] * count, weights[:count]), one)


@given(seeds)
def test_linear_with_one_hot_weights_is_that_model(seed: int) -> None:
    a, b = tensors(seed, 2)
    torch.testing.assert_close(merge_tensors(method("linear"), [a, b], [0.0, 1.0]), b)
    torch.testing.assert_close(merge_tensors(method("linear", normalize=False), [a, b], [2.0, 1.0]), 2 * a + b)


@given(seeds)
def test_slerp_ends_at_its_models_and_is_symmetric(seed: int) -> None:
    a, b = tensors(seed, 2)
    assert torch.equal(merge_tensors(method("slerp", t=0), [a, b]), a)
    assert torch.equal(merge_tensors(method("slerp", t=1), [a, b]), b)
    there = merge_tensors(method("slerp", t=0.3), [a, b])
    torch.testing.assert_close(there, merge_tensors(method("slerp", t=0.7), [b, a]))


@given(seeds, st.floats(0.1, 0.9), st.floats(0.01, 50))
def test_slerp_follows_a_common_scale_and_keeps_the_length_on_the_sphere(seed: int, t: float, scale: float) -> None:
    a, b = tensors(seed, 2)
    merged = merge_tensors(method("slerp", t=t), [a, b])
    torch.testing.assert_close(merge_tensors(method("slerp", t=t), [scale * a, scale * b]), scale * merged)
    left, right = a / a.norm(), b / b.norm()
    assert float(merge_tensors(method("slerp", t=t), [left, right]).norm()) == pytest.approx(1, abs=1e-3)


@given(seeds, st.floats(0, 1), st.floats(0.05, 20))
def test_slerp_of_collinear_antipodal_and_zero_tensors_is_a_straight_line(seed: int, t: float, factor: float) -> None:
    (a,) = tensors(seed, 1)
    for sign in (1, -1):
        expected = (1 - t + sign * factor * t) * a
        torch.testing.assert_close(
            merge_tensors(method("slerp", t=t), [a, sign * factor * a]), expected, rtol=1e-4, atol=1e-5 * factor
        )
    zero = torch.zeros_like(a)
    assert torch.equal(merge_tensors(method("slerp", t=t), [zero, zero]), zero)
    assert torch.equal(merge_tensors(method("slerp", t=t), [a, a]), a)


@given(seeds, st.floats(0.05, 0.95))
def test_nuslerp_is_slerp_by_weights_and_karcher_its_middle(seed: int, t: float) -> None:
    a, b = tensors(seed, 2)
    merged = merge_tensors(method("nuslerp"), [a, b], [1 - t, t])
    torch.testing.assert_close(merged, merge_tensors(method("slerp", t=t), [a, b]))
    one, two = a / a.norm(), b / b.norm()
    middle = merge_tensors(method("slerp"), [one, two])
    torch.testing.assert_close(merge_tensors(method("karcher"), [one, two]), middle, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge_tensors(method("multislerp"), [one, two]), middle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "sce"]
)
@given(seeds)
def test_density_zero_is_the_base(name: str, seed: int) -> None:
    base, models = near(seed, 2)
    assert torch.equal(merge_tensors(method(name, density=0), models, base=base), base)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
@given(seeds, st.floats(0.1, 2), st.floats(0.1, 2))
def test_density_one_is_task_arithmetic(name: str, seed: int, one: float, two: float) -> None:
    base, models = near(seed, 2)
    extra = {"gamma": 0} if name == "breadcrumbs" else {}
    merged = merge_tensors(method(name, density=1, **extra), models, [one, two], base)
    torch.testing.assert_close(merged, merge_tensors(method("task_arithmetic"), models, [one, two], base))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 0.8))
def test_dropping_at_random_keeps_the_expectation(name: str, first: int, density: float) -> None:
    base, models = near(first, 2, 20, 10)
    trials = 400
    total = torch.zeros_like(base)
    for seed in range(first, first + trials):
        total += merge_tensors(method(name, density=density), models, base=base, noise=Noise(seed, ["a", "b"], "w"))
    exact = merge_tensors(method("task_arithmetic"), models, base=base)
    # An entry's standard error: sqrt((1 - p) / p / trials) of its change, p the least probability; six of them.
    least = density - (0.15 if name == "della_linear" else 0.0)
    bound = 6 * ((1 - least) / least / trials) ** 0.5 * sum((model - base).abs() for model in models) + 1e-5
    assert bool(((total / trials - exact).abs() <= bound).all())


@given(seeds)
def test_model_stock_of_equal_models_is_the_model_of_opposite_ones_the_base(seed: int) -> None:
    base, (one,) = near(seed, 1)
    for rows in (False, True):
        stock = method("model_stock", filter_wise=rows)
        torch.testing.assert_close(merge_tensors(stock, [one, one, one], base=base), one)
        torch.testing.assert_close(merge_tensors(stock, [one, 2 * base - one], base=base), base)


SYMMETRIC = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
    "sce",
    "ram",
    "multislerp",
    "karcher",
    "iso_c",
    "tsv_m",
    "fisher",
    "regmean",
]


@pytest.mark.parametrize("name", SYMMETRIC)
@given(seeds, st.permutations([0, 1, 2]))
def test_the_order_of_the_models_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    base, models = near(seed, 3)
    _, takes_base = needs(name)
    weights = [1.0, 2.0, 0.5] if config_of(name).weighted else [1.0] * 3
    contents = ["a", "b", "c"]
    # What data methods have learned of each model: Fisher information, and inner products of a layer's inputs.
    learned = {
        "fisher": [extra.square() for extra in tensors(seed + 1, 3)],
        "regmean": [inputs.T @ inputs for inputs in tensors(seed + 1, 3, 20, 5)],
    }.get(name)
    made = method(name)
    merged = [
        merge_tensors(
            made,
            [models[i] for i in places],
            [weights[i] for i in places],
            base if takes_base else None,
            noise=Noise(3, [contents[i] for i in places], "w"),
            extras=[learned[i] for i in places] if learned else (),
        )
        for places in ([0, 1, 2], order)
    ]
    torch.testing.assert_close(merged[0], merged[1], rtol=1e-4, atol=1e-5)


def test_ties_keeps_what_agrees_with_the_elected_sign() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([4.0, 1.0, -3.0, 0.1]), torch.tensor([2.0, -5.0, -1.0, 0.2])
    merged = merge_tensors(method("ties", density=0.75), [a, b], base=base)
    assert torch.allclose(merged, torch.tensor([3.0, -5.0, -2.0, 0.0]))


class Walk:
    """A scan over one tensor in parts of some rows."""

    def __init__(self, tensor: Tensor, height: int, on_gpu: bool) -> None:
        self.parameter = MergedParameter("w", tuple(tensor.shape), models=1)
        self.on_gpu = on_gpu
        self.weights = [1.0]
        self._parts = [tensor[first : first + height] for first in range(0, len(tensor), height)]
        self._starts = [first * tensor.shape[1] for first in range(0, len(tensor), height)]

    def each(self, look, every=1):
        from luthier.merging.api import MergePart

        return [
            look(MergePart(self.parameter, start, [part], [1.0]))
            for part, start in zip(self._parts[::every], self._starts[::every], strict=True)
        ]

    def __call__(self, look):
        return sum(self.each(look)[1:], self.each(look)[0])


values = st.sampled_from([0.0, 1.0, 0.5, 2.0, 1e-30, 3.0, 1.0000001])


@pytest.mark.parametrize(
    ("in_memory", "held", "on_gpu"), [(0, 0, False), (0, 1 << 24, False), (1 << 22, 0, False), (1 << 22, 1 << 24, True)]
)
@given(st.lists(values, min_size=12, max_size=12), st.integers(0, 12), st.integers(1, 4))
def test_selection_is_a_stable_sort_by_size_lowest_index_first(
    in_memory: int, held: int, on_gpu: bool, items: list[float], count: int, height: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "IN_MEMORY", in_memory)
        patch.setattr(selection, "HELD", held)
        check_selection(items, count, height, on_gpu)


def check_selection(items: list[float], count: int, height: int, on_gpu: bool) -> None:
    """All ways to select have to give what sorting gives."""
    tensor = torch.tensor(items).view(4, 3) + 0.0
    scan = Walk(tensor, height, on_gpu)
    ((cut,),) = largest(scan, lambda part: part.tensors, [[count]])
    held = torch.cat(scan.each(lambda part: cut.holds(part.tensors[0], part.start))).flatten()
    order = sorted(range(12), key=lambda index: (-items[index], index))
    assert held.nonzero().flatten().tolist() == sorted(order[:count])


def test_threads_hold_no_more_together_than_there_is_room_and_select_the_same_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = selection.Room(100)
    with room.taken(60) as first, room.taken(60) as second, room.taken(40) as third:
        assert (first, second, third) == (True, False, True)
    with pytest.raises(RuntimeError), room.taken(100):
        raise RuntimeError
    assert room.left == 100
    base, models = near(1, 3, 40, 30)
    found = []
    for size in (1 << 20, 0):
        monkeypatch.setattr(selection, "_room", selection.Room(size))
        found.append(merge_tensors(method("ties", density=0.3), models, base=base))
    assert torch.equal(*found)


def test_parts_are_whole_rows_whatever_the_shape() -> None:
    for shape in [(3,), (1000, 1000), (4, 700, 900), (2, 1 << 19), (), (0, 5)]:
        grid = Grid.of(shape)
        spans = list(grid.spans())
        assert list(grid.spans(3)) == [
            (some[0][0], some[-1][1]) for some in (spans[n : n + 3] for n in range(0, len(spans), 3))
        ]
        assert [first for first, _ in spans[1:]] == [last for _, last in spans[:-1]]
        assert (spans[-1][1] if spans else 0) == grid.rows


def test_random_numbers_are_a_matter_of_the_place() -> None:
    noise = Noise(1, ["x", "y"], "w")
    whole = noise(0, 0, 1000)
    assert torch.equal(noise(0, 137, 50), whole[137:187])
    assert not torch.equal(noise(1, 0, 1000), whole)
    assert not torch.equal(Noise(2, ["x"], "w")(0, 0, 1000), whole)
    assert 0.45 < float(whole.mean()) < 0.55


def test_settings_follow_layers_and_filters() -> None:
    config = config_of("ties", density={"per_model": [[0.2, 0.6], [{"filter": "mlp", "value": 0.1}, {"value": 1.0}]]})
    place = MergedParameter("model.layers.1.mlp.up_proj.weight", (2, 2), depth=0.25, models=2)
    assert place.values(config.density) == pytest.approx([0.3, 0.1])
    other = MergedParameter("model.layers.1.self_attn.q_proj.weight", (2, 2), depth=1.0, models=2)
    assert other.values(config.density) == pytest.approx([0.6, 1.0])


DEEP = "model.layers.9.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "parameter", "values"),
    [
        ("ram", "threshold", (0.1, 0.5)),
        ("ram", "r", (0.0, 0.6)),
        ("ram", "alpha", (0.1, 0.4)),
        ("tsv_m", "share", (0.2, 0.9)),
        ("fisher", "floor", (0.1, 3.0)),
        ("regmean", "alpha", (0.1, 0.9)),
        ("karcher", "tolerance", (1e-6, 3.0)),
    ],
)
def test_parameters_follow_layers_and_filters(name: str, parameter: str, values: tuple[float, float]) -> None:
    base, models = near(2, 2)
    extras = {"fisher": [model.square() for model in models], "regmean": [model.T @ model for model in models]}
    also = {"r": 0.5, "threshold": 0.3} if name == "ram" else {}

    def merged(setting: object, depth: float) -> Tensor:
        return merge_tensors(
            method(name, **{**also, parameter: setting}),
            models,
            [1.0, 0.4],
            None if config_of(name).base == "unused" else base,
            name=DEEP,
            depth=depth,
            extras=extras.get(name, ()),
        )

    first, last = (merged(value, 0.0) for value in values)
    assert not torch.equal(first, last)
    for depth, expected in ((0.0, first), (1.0, last)):
        assert torch.equal(merged(list(values), depth), expected)
    assert torch.equal(merged([{"filter": "mlp", "value": values[1]}, {"value": values[0]}], 0.0), last)
    assert torch.equal(merged([{"filter": "attn", "value": values[1]}, {"value": values[0]}], 0.0), first)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ram", {"threshold": -1.0}, "-1 is less than 0"),
        ("ram", {"r": [0.0, -0.5]}, "-0.5 is less than 0"),
        ("karcher", {"tolerance": 0.0}, "0 is not above 0"),
        ("fisher", {"floor": [1.0, 0.0]}, "0 is not above 0"),
        ("tsv_m", {"share": [0.5, 1.5]}, "1.5 is not between 0 and 1"),
        ("tsv_m", {"share": 0}, "0 is not above 0"),
    ],
)
def test_parameters_out_of_their_limits_are_refused(name: str, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(name, **values)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (1.5, "1.5 is not between 0 and 1"),
        ([0.5, 2], "2 is not between 0 and 1"),
        ([], "empty list"),
        ([{"filter": "mlp", "value": 0.5}], "needs no filter"),
    ],
)
def test_settings_that_say_nothing_or_too_much_are_refused(setting: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of("ties", density=setting)


def test_della_names_probabilities_that_are_none() -> None:
    base, models = near(0, 2)
    densities = [{"filter": "nothing", "value": 0.5}, {"value": 0.9}]
    with pytest.raises(ModelError, match="probabilities from"):
        merge_tensors(method("della", density=densities, epsilon=0.2), models, base=base)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0,), (5, 0), ()])
def test_tensors_without_entries_and_scalars_are_merged_too(name: str, shape: tuple[int, ...]) -> None:
    count, takes_base = needs(name)
    models = [torch.full(shape, 1.0 + place) for place in range(count)]
    merged = merge_tensors(method(name), models, base=torch.zeros(shape) if takes_base else None)
    assert merged.shape == shape


def test_model_stock_of_small_changes_is_no_less_sure() -> None:
    base, (one,) = near(4, 1)
    small = base + 1e-5 * (one - base) / (one - base).norm()
    for rows in (False, True):
        merged = merge_tensors(method("model_stock", filter_wise=rows), [small, small], base=base)
        torch.testing.assert_close(merged - base, small - base, rtol=1e-2, atol=1e-8)


def test_ram_takes_what_no_other_model_changed_at_any_threshold() -> None:
    base = torch.zeros(2, 2)
    models = [torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    merged = merge_tensors(method("ram", threshold=0, r=0.1), models, base=base)
    assert bool(torch.isfinite(merged).all())


def test_regmean_of_inputs_that_never_occur_is_the_mean() -> None:
    a, b = tensors(0, 2, 4, 3)
    merged = merge_tensors(method("regmean"), [a, b], extras=[torch.zeros(3, 3)] * 2)
    torch.testing.assert_close(merged, (a + b) / 2)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("della", {"density": 0.9, "epsilon": 0.2}, "make probabilities from"),
        ("della", {"density": 0.5, "epsilon": -0.9}, "`epsilon` is -0.9"),
        ("ties", {"density": [{"value": []}]}, "at least 1 item"),
    ],
)
def test_configs_that_cannot_work_are_refused(name: str, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(name, **values)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_multislerp_of_models_that_did_not_change_is_their_base(count: int) -> None:
    (base,) = tensors(3, 1, 4, 6)
    assert torch.equal(merge_tensors(method("multislerp"), [base.clone() for _ in range(count)], base=base), base)


@given(st.integers(0, 1000))
def test_iso_c_gives_all_directions_of_the_sum_one_length(seed: int) -> None:
    base, models = near(seed, 3, 9, 6)
    found = merge_tensors(method("iso_c", scale=0.7), models, [1.0, 2.0, 0.5], base=base) - base
    total = sum(weight * (model - base) for weight, model in zip([1.0, 2.0, 0.5], models, strict=True))
    sizes = torch.linalg.svdvals(total)
    torch.testing.assert_close(found.T @ found, (0.7 * sizes.mean()).square() * torch.eye(6), rtol=1e-3, atol=1e-4)
    # Of all matrices with equal singular values, none points more along the sum.
    assert float((found * total).sum()) == pytest.approx(float(0.7 * sizes.mean() * sizes.sum()), rel=1e-3)


@given(st.integers(0, 1000))
def test_tsv_m_keeps_the_singular_values_of_every_task(seed: int) -> None:
    base, models = near(seed, 2, 9, 6)
    found = merge_tensors(method("tsv_m", scale=0.5), models, base=base) - base
    kept = torch.cat([torch.linalg.svdvals(model - base)[:3] for model in models])
    torch.testing.assert_close(
        torch.linalg.svdvals(found), 0.5 * kept.sort(descending=True).values, rtol=1e-3, atol=1e-4
    )


def test_tsv_m_of_tasks_that_do_not_meet_is_their_sum() -> None:
    base, _ = near(0, 1, 8, 6)
    (left, right), sizes = (torch.linalg.qr(tensor)[0] for tensor in (*tensors(1, 1, 8, 6), *tensors(2, 1, 6, 6))), 2.0
    jobs = [sizes * left[:, first : first + 3] @ right[:, first : first + 3].T for first in (0, 3)]
    found = merge_tensors(method("tsv_m"), [base + job for job in jobs], base=base)
    torch.testing.assert_close(found, base + sum(jobs), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000))
def test_fisher_is_the_formula(seed: int) -> None:
    models, extras = tensors(seed, 3, 4, 5), [extra.square() for extra in tensors(seed + 1, 3, 4, 5)]
    given_weights = [1.0, 0.5, 2.0]
    found = merge_tensors(method("fisher", floor=1e-3), models, given_weights, extras=extras)
    shares = [weight * (extra.double() + 1e-3) for weight, extra in zip(given_weights, extras, strict=True)]
    expected = sum(share * model for share, model in zip(shares, models, strict=True)) / sum(shares)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 1000))
def test_regmean_is_the_least_squares_solution(seed: int) -> None:
    models, inputs = tensors(seed, 2, 4, 3), tensors(seed + 1, 2, 20, 3)
    found = merge_tensors(method("regmean", alpha=1), models, [1.0, 3.0], extras=[x.T @ x for x in inputs])
    rows = torch.cat([math.sqrt(weight) * x for weight, x in zip([1.0, 3.0], inputs, strict=True)])
    wanted = torch.cat(
        [math.sqrt(weight) * x @ model.T for weight, x, model in zip([1.0, 3.0], inputs, models, strict=True)]
    )
    expected = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


SETTINGS: dict[str, list[dict]] = {
    "ties": [{"density": 0.3}, {"density": 0.5}],
    "sce": [{"density": 0.4}, {}],
    "ram": [{"threshold": 0.05, "r": 0.1}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}],
    "breadcrumbs_ties": [{"density": 0.5, "gamma": 0.1}],
    "model_stock": [{}, {"filter_wise": True}],
    "nuslerp": [{}, {"flatten": False}],
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("coarse", [False, True], ids=["any numbers", "many equal numbers"])
def test_a_parameter_in_many_parts_is_merged_like_one_in_one_part(
    name: str, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, _ = needs(name)
    config = config_of(name)
    for values in SETTINGS.get(name, [{}]):
        for shape in ((40, 30), (7, 9, 11), (500,)):
            base, models = near(3, count, *shape)
            if coarse:
                base, models = (base * 4).round() / 4, [(model * 4).round() / 4 for model in models]
            given_weights = [1.0, 2.0, 0.5][:count] if config.weighted else None
            found = []
            for block, memory in ((1 << 18, 1 << 22), (50, 1 << 22), (50, 0)):
                monkeypatch.setattr(merging_parts, "BLOCK", block)
                monkeypatch.setattr(selection, "IN_MEMORY", memory)
                found.append(
                    merge_tensors(
                        method(name, **values),
                        models,
                        given_weights,
                        None if config.base == "unused" else base,
                        name="model.layers.0.mlp.up_proj.weight",
                        noise=Noise(1, ["a", "b", "c"], "w"),
                    )
                )
            for other in found[1:]:
                torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000))
def test_directions_in_which_nothing_changed_are_left_alone(seed: int) -> None:
    base, _ = near(seed, 1, 9, 7)
    (a, b), (c, d) = tensors(seed + 1, 2, 9, 2), tensors(seed + 2, 2, 2, 7)
    models = [base + a @ c, base + b @ d]
    left, right = torch.linalg.qr(torch.cat([a, b], dim=1))[0], torch.linalg.qr(torch.cat([c, d]).T)[0]
    for name in ("iso_c", "tsv_m"):
        found = merge_tensors(method(name), models, base=base) - base
        inside = left @ (left.T @ found @ right) @ right.T
        torch.testing.assert_close(found, inside, rtol=1e-3, atol=1e-4)
    sizes = torch.linalg.svdvals(merge_tensors(method("iso_c"), models, base=base) - base)
    expected = torch.linalg.svdvals(a @ c + b @ d)[:4].mean()
    torch.testing.assert_close(sizes[:4], expected.expand(4), rtol=1e-3, atol=1e-3)
