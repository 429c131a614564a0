"""Parity: what an engine is held to, by engines that are made to fail it."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from machines import Simulated
from scipy import stats

from aesanet.benchmarks.layers import compare_layers
from aesanet.benchmarks.parity import SRCC_FROM, SRCC_LIMIT, _axis, _edges, verify
from aesanet.benchmarks.parity_page import parity_page
from aesanet.benchmarks.reference import Reference, Window, reference_scores
from aesanet.bundle import GRAPH_NAMES, Verification, read_manifest
from aesanet.runtime.backends.base import Backend, BundleFiles


class Odd(Backend):
    """An engine that gives the scores it is told to, by the clip's first sample, and does one thing wrong."""

    name = kind = "odd"
    device, form = "cpu", "fp32"

    def __init__(self, scores, wrong="nothing", precision="fp16"):
        self.answers, self.wrong, self.calls, self.precision = scores, wrong, 0, precision

    def scores(self, waveform, num_samples):
        self.calls += 1
        if self.wrong == "raise" and len(waveform) > 1:
            raise RuntimeError("no kernel for this batch")
        which = np.round(np.abs(waveform[:, 0]) * 1000).astype(int) % len(self.answers)
        found = self.answers[which].astype(np.float32)
        if self.wrong == "batch" and len(waveform) > 1:
            found = found + 0.03
        if self.wrong == "repeat":
            found = found + 0.03 * (self.calls > len(self.answers))
        return found


def held(backend, reference):
    return verify(backend, SimpleNamespace(half=None, graphs={}), reference)


def odd_reference(scores, rounding=0.0):
    windows = [Window(f"clip {n}", np.full(3_000 + n, n / 1000, np.float32)) for n in range(len(scores))]
    return Reference(windows, scores, np.full(len(scores), rounding))


@pytest.mark.parametrize(
    ("wrong", "rounding", "told"),
    [
        ("nothing", 0.0, None),
        ("batch", 0.0, "a window's scores change by 3.0e-02 with what else is in its batch (limit 2.0e-02)"),
        # More is allowed by what FP32 itself moves the window's scores, alone and among others.
        ("batch", 0.002, "a window's scores change by 3.0e-02 with what else is in its batch (limit 2.8e-02)"),
        ("batch", 0.003, None),
        ("repeat", 0.003, "a window's scores change by 3.0e-02 when it is scored again (limit 2.0e-02)"),
        ("raise", 0.0, "it cannot score what it is given: no kernel for this batch"),
    ],
)
def test_scores_that_depend_on_company_or_chance_fail(wrong, rounding, told):
    scores = np.random.default_rng(0).uniform(0, 10, (6, 4))
    found, _ = held(Odd(scores, wrong), odd_reference(scores, rounding))
    assert (told in found.failures) if told else (found.failures == ())


def test_scores_that_are_no_numbers_fail_and_can_be_kept_and_shown(half_bundle):
    scores = np.random.default_rng(0).uniform(0, 10, (6, 4))
    broken = scores.copy()
    broken[2:4, 1] = np.nan
    reference = odd_reference(scores)
    found, _ = held(Odd(broken), reference)
    assert found.failures == (
        "2 of 6 windows have scores that are no numbers, as where FP16 overflows; --layers says where",
    )
    assert found.axes["CU"].max_abs is None
    assert found.axes["CE"].max_abs < 1e-6
    assert msgspec.json.decode(msgspec.json.encode(found), type=Verification) == found
    page = parity_page("b", read_manifest(half_bundle), reference, {"odd": (found, broken)}, (), ())
    assert "<td>none</td>" in page


@pytest.mark.parametrize(("rounding", "factor", "passes"), [(1e-3, 1.5, True), (1e-3, 3.0, False), (0.1, 1.5, False)])
def test_the_limit_is_wider_by_what_fp32_moves_the_reference_up_to_an_end(rounding, factor, passes):
    scores = np.random.default_rng(0).uniform(1, 9, (5, 4))
    found, _ = held(Odd(scores + factor * rounding, precision="fp32"), odd_reference(scores, rounding))
    assert (not found.failures) == passes


@pytest.mark.parametrize(
    ("windows", "spread", "passes"), [(SRCC_FROM - 1, 8, True), (SRCC_FROM, 8, False), (SRCC_FROM, 1, True)]
)
def test_ranks_are_held_to_their_limit_where_they_can_be_kept(windows, spread, passes):
    """Half of all windows sound alike, and are ordered the other way; each score is within .02 of what it should be."""
    scores = np.concatenate(
        [np.linspace(5, 5.019, windows // 2), np.linspace(5.1, 5.1 + spread, windows - windows // 2)]
    )
    found = np.concatenate([scores[: windows // 2][::-1], scores[windows // 2 :]])
    result, _ = held(Odd(found[:, None] + np.zeros(4)), odd_reference(scores[:, None] + np.zeros(4)))
    assert result.axes["CE"].srcc < SRCC_LIMIT
    assert (not result.failures) == passes
    if not passes:
        assert result.failures[0] == f"CE ranks the windows otherwise: SRCC {result.axes['CE'].srcc:.4f}, limit 0.9995"


vectors = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[arrays(np.float64, n, elements=st.floats(0, 10, width=32))] * 2)
)


@given(vectors, st.floats(1e-4, 1))
def test_statistics_of_an_axis_against_plain_ones(pair, limit):
    expected, found = pair
    parity = _axis(expected, found, limit)
    differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    assert parity.max_abs == max(differences)
    assert parity.mean_abs == pytest.approx(sum(differences) / len(differences))
    assert parity.p99_abs == pytest.approx(np.quantile(differences, 0.99))
    swapped = 0
    for i in range(len(expected)):
        for j in range(i):
            far = abs(expected[i] - expected[j]) > limit
            swapped += far and (expected[i] > expected[j]) == (found[i] < found[j]) and found[i] != found[j]
    assert parity.swapped_pairs == swapped
    if parity.srcc is not None:
        assert parity.srcc == pytest.approx(stats.spearmanr(expected, found).statistic, nan_ok=True)


def test_an_engine_with_profiles_is_held_at_their_edges(half_bundle, tiny_model):
    backend = Simulated(half_bundle).open()
    assert _edges(backend, 64_000) == [2_800, 2_801, 16_000, 16_001, 64_000]
    assert _edges(Odd(np.zeros((1, 4))), 64_000) == [2_800, 64_000]
    rng = np.random.default_rng(0)
    windows = [Window(str(n), rng.normal(0, 0.1, n).astype(np.float32)) for n in (64_000, 16_000, 9_000, 2_800)]
    reference = reference_scores(tiny_model, windows)
    backend.precision = "fp32"  # what stands in for the plans
    found, scores = verify(backend, read_manifest(half_bundle), reference)
    assert found.failures == ()
    assert found.engine == "tensorrt 0.simulated cuda fp16"
    np.testing.assert_allclose(scores, reference.scores, atol=1e-4)


def test_the_reference_is_pytorch_window_by_window(tiny_model):
    windows = [Window("a", np.random.default_rng(n).normal(0, 0.1, 9_000 + n).astype(np.float32)) for n in range(3)]
    reference = reference_scores(tiny_model, windows)
    for window, scores in zip(windows, reference.scores, strict=True):
        with torch.no_grad():
            alone = tiny_model(torch.from_numpy(window.samples)[None], torch.tensor([len(window.samples)]))
        assert np.array_equal(scores, alone[0].numpy().astype(np.float64))
    assert (reference.rounding < 1e-4).all()


def test_every_layer_of_a_good_bundle_agrees(demo_bundle, half_bundle, tiny_model, clips):
    found = {
        (layers.graph, layers.precision): layers
        for layers in compare_layers(tiny_model, BundleFiles.open(half_bundle), clips[4])
    }
    graphs = [(name, "fp32") for name in GRAPH_NAMES]
    for place, name in ((2, "encoder"), (5, "head")):
        graphs[place:place] = [(name, "fp16"), (f"fused {name}", "fp16")]
    assert list(found) == graphs
    assert all(layers.first is None for layers in found.values())
    modules = dict(tiny_model.encoder.named_modules())
    assert found["encoder", "fp32"].compared >= len([name for name in modules if name.count(".") >= 2]) * 0.6
    for name in ("encoder", "fused encoder", "head", "fused head"):
        assert 0 < found[name, "fp16"].largest[1] < 5e-2
        assert found[name, "fp16"].compared > 30
