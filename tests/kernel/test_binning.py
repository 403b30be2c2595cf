"""Tests every binning: the reference against the rule in words, the kernels against the reference.

The kernels run in the interpreter. Ids, sets, order and sizes are equal; scores and weights are equal up to
rounding.
"""

import re
from dataclasses import fields, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jmoe_kernels.binning import Binned, BinningNeeds, KernelChoice, Rule, bin_experts, pick, why_not
from jmoe_kernels.binning.cases import CASES, SMALL, Case, make_inputs
from jmoe_kernels.binning.reference import cast_votes
from jmoe_kernels.topk import route_softmax
from support.oracles import binning as binning_oracle

METHODS = ("affinity", "oea", "budget", "popularity")
KERNELS = ("pallas_tpu", "pallas_gpu")
BY_NAME = {case.name: case for case in CASES}
ALIKE = [case for case in CASES if (case.tokens, case.experts, case.k) == SMALL]
OTHERS = [BY_NAME[name] for name in ("one token", "k = E", "odd sizes", "several tiles")]
PAIRS = [(case, m) for case in ALIKE for m in METHODS] + [(case, "affinity") for case in OTHERS]
FAST = {
    "xla_backend_optimization_level": 0
}  # each shape and rule is compiled, which is nearly all of the time


def rule_of(method: str, k: int) -> Rule:
    return Rule(method, k, bin_width=0.5, k0=min(2, k), keep=0.6)


@cache
def binning(implementation: str, rule: Rule, renormalize: bool = True, others: bool = False):
    """Returns one compiled program per shape.

    It maps (logits, valid, lossy, votes of other ranks if ``others``) to Binned.
    """

    def run(logits, valid, lossy, votes=None):
        return bin_experts(
            logits,
            valid,
            lossy,
            rule,
            KernelChoice(implementation, "cpu", interpret=implementation != "xla"),
            renormalize=renormalize,
            total=(lambda own: own + votes) if others else None,
        )

    return jax.jit(run, compiler_options=FAST)


@cache
def by_reference(case: Case, method: str) -> Binned:
    return binning("xla", rule_of(method, case.k))(*make_inputs(case))


def assert_same(got: Binned, want: Binned | dict[str, np.ndarray], only: np.ndarray | None = None) -> None:
    """Asserts that two results are equal.

    only: tokens whose rows are compared; the fields of the whole batch are always compared.
    """
    for field in fields(Binned):
        a = np.asarray(getattr(got, field.name))
        b = np.asarray(want[field.name] if isinstance(want, dict) else getattr(want, field.name))
        if only is not None and field.name[-3:-1] == "_T":
            a, b = a[only], b[only]
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=field.name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


# ---- the reference


WORDED = [(case, method) for case, method in PAIRS if case.name != "a NaN token"]  # no rule for NaN in words


@pytest.mark.parametrize(("case", "method"), WORDED, ids=lambda x: getattr(x, "name", x))
def test_reference_is_the_rule_in_words(case: Case, method: str):
    rule = rule_of(method, case.k)
    want = binning_oracle.bin_experts(*make_inputs(case), rule, renormalize=True)
    assert_same(by_reference(case, method), want)


@pytest.mark.parametrize("seed", range(4))
def test_reference_without_renormalizing(seed: int):
    inputs = make_inputs(BY_NAME["exact among lossy"], seed)
    rule = replace(rule_of("affinity", SMALL[2]), bin_width=0.2)
    want = binning_oracle.bin_experts(*inputs, rule, renormalize=False)
    assert_same(binning("xla", rule, renormalize=False)(*inputs), want)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.7, 1.0])
def test_a_budget_of_whole_numbers_is_not_rounded_up(keep: float):
    rule, logits = replace(rule_of("popularity", 1), keep=keep), np.eye(20, dtype=np.float32)
    everyone = np.ones(20, bool)
    assert int(binning("xla", rule)(logits, everyone, everyone).active_E.sum()) == round(20 * keep)


def test_cases_reach_what_they_are_named_for():
    def active(name: str, method: str = "affinity") -> np.ndarray:
        return np.asarray(by_reference(BY_NAME[name], method).active_E)

    assert not active("all padding").any() and active("all padding").shape == (20,)
    assert active("unanimous in bin 1")[3]
    gaps, *_ = make_inputs(BY_NAME["gaps on the edges of bins"])
    assert not (gaps % 0.5).any() and np.signbit(gaps[gaps == 0]).any()
    assert list(np.flatnonzero(active("equal logits"))) == [0, 1, 2, 3]
    for method in METHODS:
        result = by_reference(BY_NAME["normal"], method)
        assert (result.plain_ids_TK != result.ids_TK).any(), method


# ---- the kernels


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("case", "method"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_kernel_equals_reference(case: Case, method: str, implementation: str):
    got = binning(implementation, rule_of(method, case.k))(*make_inputs(case))
    assert_same(got, by_reference(case, method))


@pytest.mark.parametrize(("method", "implementation"), [("affinity", "pallas_tpu"), ("budget", "pallas_gpu")])
def test_two_ranks_choose_as_one(method: str, implementation: str):
    rule = rule_of(method, SMALL[2])
    for case in ALIKE:
        logits, valid, lossy = make_inputs(case)
        halves = [tuple(x[i : i + 6] for x in (logits, valid, lossy)) for i in (0, 6)]
        votes = [votes_of(*half, rule) for half in halves]
        whole = by_reference(case, method)
        for own, half in enumerate(halves):
            got = binning(implementation, rule, others=True)(*half, votes[1 - own])
            np.testing.assert_array_equal(got.active_E, whole.active_E)
            np.testing.assert_array_equal(got.ids_TK, whole.ids_TK[6 * own : 6 * own + 6])
            np.testing.assert_allclose(got.weights_TK, whole.weights_TK[6 * own : 6 * own + 6], atol=1e-6)
            assert int(got.group_sizes_E.sum()) == half[1].sum() * rule.k


def votes_of(logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray, rule: Rule) -> jax.Array:
    ids, *_ = route_softmax(jnp.asarray(logits), rule.k, renormalize=True)
    return cast_votes(ids, jnp.asarray(logits), jnp.asarray(valid), jnp.asarray(lossy), rule)


def test_a_lone_rank_of_several_tiles_is_its_own_total():
    case = BY_NAME["several tiles"]
    nobody = jnp.zeros((7, case.experts), jnp.int32)
    got = binning("pallas_gpu", rule_of("affinity", case.k), others=True)(*make_inputs(case), nobody)
    assert_same(got, by_reference(case, "affinity"))


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_what_stands_in_padding_does_not_matter(implementation: str):
    case = BY_NAME["padding between tokens"]
    logits, valid, lossy = make_inputs(case)
    run = binning(implementation, rule_of("affinity", case.k))
    for content in (np.nan, np.inf, 3e38):
        other = np.where(valid[:, None], logits, np.float32(content))
        assert_same(run(other, valid, lossy), run(logits, valid, lossy), only=valid)


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_a_nan_stays_with_its_token(implementation: str):
    case = BY_NAME["a NaN token"]
    result = binning(implementation, rule_of("affinity", case.k))(*make_inputs(case))
    healthy = np.setdiff1d(np.arange(case.tokens), [4, 6, 8])
    for values in (result.scores_TE, result.weights_TK, result.plain_weights_TK):
        assert np.isfinite(np.asarray(values)[healthy]).all()
        assert np.isnan(np.asarray(values)[4]).any()
    for ids in np.asarray(result.ids_TK):
        assert len(set(ids)) == case.k and ids.min() >= 0 and ids.max() < case.experts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("platform", "device"),
    [
        ("tpu", AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")),
        ("cuda", AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")),
    ],
)
def test_lowers_where_no_plugin_is_installed(platform: str, device: AbstractDevice, method: str):
    kind = device.platform
    rule, tokens, experts = rule_of(method, 8), 100, 128

    def both(logits, valid, lossy):
        choice = KernelChoice(f"pallas_{kind}", kind)
        run = partial(bin_experts, logits, valid, lossy, rule, choice, renormalize=True)
        return run(), run(total=lambda votes: 2 * votes)

    mask = jax.ShapeDtypeStruct((tokens,), jnp.bool)
    logits = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(both).trace(logits, mask, mask).lower(lowering_platforms=(platform,))
    assert len(re.findall(r"custom_call @(tpu_custom_call|__gpu\$xla.gpu.triton)", lowered.as_text())) == 3


# ---- what is refused


def test_limits_are_named():
    affinity = rule_of("affinity", 8)
    assert why_not("xla", "cpu", 5000, affinity) is None
    for kernel, platform in (("pallas_tpu", "tpu"), ("pallas_gpu", "gpu")):
        assert why_not(kernel, platform, 128, affinity) is None
        assert "5000 experts; the kernel takes 2 to" in str(why_not(kernel, platform, 5000, affinity))
        too_many = replace(affinity, k=9)
        assert "k = 9; it must be between 1 and the 8" in str(why_not(kernel, platform, 8, too_many))
        assert "needs a" in str(why_not(kernel, "cpu", 8, affinity))


@pytest.mark.parametrize(("kernel", "platform"), [("pallas_tpu", "tpu"), ("pallas_gpu", "gpu")])
def test_a_kernel_is_picked_if_it_has_what_the_model_needs(kernel: str, platform: str):
    needs = BinningNeeds(128, rule_of("affinity", 8))
    assert pick(platform, needs)[0] == kernel
    assert pick(platform, replace(needs, num_experts=5000))[0] == "xla"
    assert pick(platform, replace(needs, rule=rule_of("random", 8)))[0] == "xla"
    bonus, router = replace(needs, has_bonus=True), replace(needs, has_plain_router=False)
    assert pick(platform, bonus) == ("xla", "portable XLA: no kernel knows a bonus")
    assert pick(platform, router) == ("xla", "portable XLA: kernels know the softmax router alone")


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_random_draws_are_refused(implementation: str):
    with pytest.raises(ValueError, match="'random' is a baseline; no implementation in one call has its"):
        binning(implementation, rule_of("random", 4))(*make_inputs(CASES[0]))


def test_the_portable_form_has_no_interpreter():
    assert why_not("xla", "cpu", 8, rule_of("affinity", 4), interpret=True) == (
        "binning 'xla' has no interpreter"
    )


@pytest.mark.parametrize(
    ("implementation", "tokens", "experts", "reason"),
    [
        ("pallas_tpu", 2000, 8, "2000 tokens; it takes 1024 with 8 experts and k = 8"),
        ("pallas_tpu", 1000, 1000, "1000 tokens; it takes 524 with 1000 experts"),
        ("pallas_gpu", 5000, 16, "5000 tokens; it takes 512"),
        ("pallas_gpu", 4, 5000, "5000 experts; the kernel takes 2 to 512"),
    ],
)
def test_a_batch_beyond_the_limits_raises(implementation: str, tokens: int, experts: int, reason: str):
    case = replace(CASES[0], tokens=tokens, experts=experts)
    rule = rule_of("affinity", 8 if experts == 8 else 2)
    with pytest.raises(ValueError, match=reason):
        binning(implementation, rule)(*make_inputs(case))
