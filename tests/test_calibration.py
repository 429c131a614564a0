"""Calibration: a line for each axis, and a checkpoint that gives its scores by it."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import labelled_pairs, public_beats_file, random_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from aesanet.axes import AXES
from aesanet.errors import CheckpointError, InputError
from aesanet.hashing import file_sha256
from aesanet.models.aesanet import TRUNK_PREFIX
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint
from aesanet.models.config import Affine, Calibration
from aesanet.models.public_beats import read_public
from aesanet.training.calibration import apply_calibration, calibrate_checkpoint, fit_calibration


def test_the_line_is_the_least_squares_one():
    pairs = labelled_pairs()
    true = pairs.true.copy()
    true[::7, 2] = math.nan
    found = fit_calibration(true, pairs.scores)
    for a, axis in enumerate(AXES):
        labelled = ~np.isnan(true[:, a])
        scale, offset = np.polyfit(pairs.scores[labelled, a], true[labelled, a], 1)
        assert getattr(found, axis).scale == pytest.approx(scale)
        assert getattr(found, axis).offset == pytest.approx(offset)
    moved = apply_calibration(found, pairs.scores)
    before, after = (np.nanmean((true - s) ** 2, axis=0) for s in (pairs.scores, moved))
    assert (after < before).all()


def test_an_axis_without_labels_is_left_as_it_is():
    pairs = labelled_pairs()
    true = pairs.true.copy()
    true[:, 2] = math.nan
    assert Affine() == fit_calibration(true, pairs.scores).PC
    assert fit_calibration(true, pairs.scores).PQ == fit_calibration(pairs.true, pairs.scores).PQ


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, s: t.__setitem__((slice(9, None), 1), math.nan), r"CU \(Content Usefulness\): 9 clips have a label"),
        (lambda t, s: s.__setitem__((slice(None), 0), 4.0), "CE .*: all 40 scores are 4"),
        (lambda t, s: t.__setitem__((slice(None), 3), 0.1), r"PQ .*: all 40 labels are 0\.1"),
        (lambda t, s: np.negative(s, out=s), "CE .*: the best line has the slope -.*ranks clips the wrong way"),
    ],
)
def test_what_cannot_be_calibrated_is_told_in_words(change, told):
    pairs = labelled_pairs()
    true, scores = pairs.true.copy(), pairs.scores.copy()
    change(true, scores)
    with pytest.raises(InputError, match=told):
        fit_calibration(true, scores)


def scores_of(model):
    """Scores of 12 unequal clips, float64 [12, 4]."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([2_800 + 400 * i for i in range(12)])
    with torch.inference_mode():
        return model(0.1 * torch.randn(12, 8_000, generator=generator), lengths).double().numpy()


LINES = st.builds(lambda scale, offset: Affine(scale=scale, offset=offset), st.floats(0.2, 5), st.floats(-5, 5))


@settings(max_examples=20)  # each runs a network
@given(calibration=st.builds(Calibration, CE=LINES, CU=LINES, PC=LINES, PQ=LINES))
def test_a_calibrated_checkpoint_gives_the_line_of_its_scores_and_keeps_ranks(
    tiny_model, tiny_checkpoint, tmp_path_factory, calibration
):
    out = tmp_path_factory.mktemp("calibrated") / "new.safetensors"
    calibrate_checkpoint(tiny_checkpoint, out, calibration)
    old, new = scores_of(tiny_model), scores_of(load_checkpoint(out))
    np.testing.assert_allclose(new, apply_calibration(calibration, old), rtol=1e-5, atol=1e-5)
    for i, j in itertools.combinations(range(len(old)), 2):
        np.testing.assert_array_equal(np.sign(new[i] - new[j]), np.sign(old[i] - old[j]))


def contents(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_calibrating_a_head_changes_its_config_alone(tmp_path):
    config, beats = tiny_config(), tmp_path / "beats.pt"
    public_beats_file(beats, config.beats, seed=3)
    model = random_model(config, seed=4)
    trunk = {TRUNK_PREFIX + key: value for key, value in read_public(beats)[1].items()}
    model.load_state_dict(trunk, strict=False)
    head, out = tmp_path / "head.safetensors", tmp_path / "new.safetensors"
    save_checkpoint(model, head, file_sha256(beats))
    line = Affine(scale=2.0, offset=-1.0)
    calibrate_checkpoint(head, out, Calibration(CU=line, PC=line))

    (old_header, old), (header, new) = contents(head), contents(out)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert old_header.keys() == header.keys()
    changed = {key for key in header if header[key] != old_header[key]}
    assert changed == {"aesanet_config"}
    # The tiny model has CU = 0.875 s and PC = 1.25 s - 0.5 already.
    found = json.loads(header["aesanet_config"])["head"].pop("calibration")
    assert found["CU"] == {"scale": 1.75, "offset": -1.0}
    assert found["PC"] == {"scale": 2.5, "offset": -2.0}
    assert found["CE"] == {"scale": 1.0, "offset": 0.25}
    before, after = json.loads(old_header["aesanet_config"]), json.loads(header["aesanet_config"])
    del before["head"]["calibration"], after["head"]["calibration"]
    assert before == after
    np.testing.assert_allclose(
        scores_of(load_checkpoint(out, beats)), scores_of(model) * [1, 2, 2, 1] + [0, -1, -1, 0], rtol=1e-5
    )


def test_a_checkpoint_that_cannot_be_calibrated_leaves_nothing(tiny_checkpoint, tmp_path):
    training, torn = tmp_path / "a.pt", tmp_path / "torn.safetensors"
    torch.save({"config": {}, "state_dict": {}}, training)
    torn.write_bytes(tiny_checkpoint.read_bytes()[:-10])
    before = sorted(tmp_path.iterdir())
    for checkpoint, told in (
        (training, r"a\.pt: not one of aesanet's \.safetensors"),
        (torn, "torn.safetensors: not a safetensors file"),
        (tmp_path / "none.safetensors", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=told):
            calibrate_checkpoint(checkpoint, tmp_path / "new.safetensors", Calibration())
    with pytest.raises(InputError, match=r"torn\.safetensors: exists; give another name"):
        calibrate_checkpoint(tiny_checkpoint, torn, Calibration())
    with pytest.raises(InputError, match="its suffix is ''; a checkpoint is known by"):
        calibrate_checkpoint(tiny_checkpoint, tmp_path / "new", Calibration())
    with pytest.raises(InputError, match="is no folder; make it first"):
        calibrate_checkpoint(tiny_checkpoint, tmp_path / "none" / "new.safetensors", Calibration())
    assert sorted(tmp_path.iterdir()) == before
