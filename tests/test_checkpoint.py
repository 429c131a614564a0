import json
import pickle

import msgspec
import pytest
import torch
from helpers import public_beats_file, random_model, tiny_config
from safetensors.torch import load_file, save_file

from aesanet.errors import CheckpointError
from aesanet.hashing import file_sha256
from aesanet.models.beats import BEATs
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert a.config == b.config
    assert not b.training
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def rewritten(path, out, change_state=lambda s: s, change_config=lambda c: c):
    """A copy of one of our checkpoints with its content changed."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    config = change_config(json.loads(header["aesanet_config"]))
    save_file(change_state(load_file(path)), out, metadata=header | {"aesanet_config": json.dumps(config)})
    return out


def test_a_whole_checkpoint_comes_back_as_it_was(tiny_model, tiny_checkpoint):
    assert same(tiny_model, load_checkpoint(tiny_checkpoint))


def test_a_training_checkpoint_loads(tiny_model, tmp_path):
    content = {"config": msgspec.to_builtins(tiny_model.config), "state_dict": tiny_model.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "train.pt")
    assert same(tiny_model, load_checkpoint(tmp_path / "train.pt"))


def test_head_only_takes_the_very_beats_file_that_it_was_trained_on(tmp_path):
    model = random_model(tiny_config(), seed=1)
    beats = tmp_path / "beats.pt"
    public_beats_file(beats, model.config.beats, seed=2)
    model.encoder.beats.load_state_dict(BEATs.from_checkpoint(beats).state_dict())
    head = tmp_path / "head.safetensors"
    save_checkpoint(model, head, beats_sha256=file_sha256(beats))
    assert not any(key.startswith("encoder.beats.") for key in load_file(head))
    assert same(model, load_checkpoint(head, beats))

    with pytest.raises(CheckpointError, match=f"head alone.*{file_sha256(beats)}"):
        load_checkpoint(head)

    def other_distances(config):
        return config | {"beats": config["beats"] | {"max_distance": 15}}

    with pytest.raises(CheckpointError, match=r"config\.beats is .*max_distance=15"):
        load_checkpoint(rewritten(head, tmp_path / "x.safetensors", change_config=other_distances), beats)
    public_beats_file(tmp_path / "other.pt", model.config.beats, seed=3)
    with pytest.raises(CheckpointError, match=f"is not the {file_sha256(beats)}"):
        load_checkpoint(head, tmp_path / "other.pt")


def test_a_whole_checkpoint_takes_no_beats_file(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="must be left out"):
        load_checkpoint(tiny_checkpoint, tmp_path / "beats.pt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "head.adapter.bias"},
            r"1 of \d+ keys are missing: head.adapter.bias",
        ),
        (lambda s: s | {"head.extra": torch.zeros(1)}, "1 keys are unknown: head.extra"),
        (lambda s: s | {"head.adapter.bias": torch.zeros(3)}, r"head.adapter.bias has shape \[3\]; .* \[20\]"),
        (lambda s: s | {"head.adapter.bias": torch.full((20,), torch.nan)}, "head.adapter.bias holds NaN"),
        (lambda s: s | {"head.adapter.bias": torch.ones(20, dtype=torch.int32)}, "head.adapter.bias is torch.int32"),
    ],
)
def test_wrong_weights_are_named(tiny_checkpoint, tmp_path, change, told):
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(rewritten(tiny_checkpoint, tmp_path / "x.safetensors", change_state=change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c | {"colour": "red"}, "colour"),
        (lambda c: c | {"beats": c["beats"] | {"encoder_layers": "three"}}, r"\$\.beats\.encoder_layers"),
        (lambda c: c | {"beats": c["beats"] | {"encoder_attention_heads": 5}}, "encoder_attention_heads is 5"),
        (lambda c: c | {"head": c["head"] | {"score_range": [10, 0]}}, "score_range"),
        (lambda c: c | {"weights": "splendid"}, r"\$\.weights"),
        (lambda c: c | {"beats": c["beats"] | {"encoder_layers": 10**9}}, "encoder_layers is 1000000000"),
        (lambda c: c | {"beats": c["beats"] | {"encoder_ffn_embed_dim": 60_000}}, "fc1.weight has shape"),
        (lambda c: c | {"head": c["head"] | {"shared_width": 48_000}}, "shape"),
        (lambda c: c | {"window": {"window_seconds": 1e308, "hop_seconds": 1.0}}, "window_seconds is 1e[+]308"),
        (lambda c: c | {"window": {"window_seconds": 0.01, "hop_seconds": 0.01}}, "window_seconds is 0.01"),
        (lambda c: c | {"head": c["head"] | {"calibration": {"PQ": {"scale": -1}}}}, "scale is -1"),
    ],
)
def test_wrong_configs_are_named(tiny_checkpoint, tmp_path, change, told):
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(rewritten(tiny_checkpoint, tmp_path / "x.safetensors", change_config=change))


def test_files_of_another_kind(tmp_path, tiny_model):
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "text.pt").write_text("not tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    (tmp_path / "bytes.pt").write_bytes(bytes(range(256)))
    public_beats_file(tmp_path / "beats.pt", tiny_model.config.beats, seed=0)
    for name, told in {
        "none.pt": "no such file",
        ".": "not a regular file",
        "text.pt/x.safetensors": "cannot be read: Not a directory",
        f"{'x' * 300}.pt": "cannot be read: File name too long",
        "text.safetensors": "not a safetensors file",
        "text.pt": "not a PyTorch file",
        "bytes.pt": "not a PyTorch file",
        "foreign.safetensors": "not written by aesanet",
        "list.pt": "holds a list",
        "foreign.pt": "expected 'config' and 'state_dict'",
        "beats.pt": "the trunk alone",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            load_checkpoint(tmp_path / name)


def test_a_memory_that_is_full_is_not_the_files_fault(tmp_path, monkeypatch):
    def full(*given, **options):
        raise MemoryError

    torch.save({"weights": {}}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        load_checkpoint(tmp_path / "a.pt")


class Trap:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_but_tensors_is_unpickled(tmp_path, capsys):
    with open(tmp_path / "trap.pt", "wb") as file:
        pickle.dump({"config": Trap()}, file)
    torch.save({"config": Trap(), "state_dict": {}}, tmp_path / "trap2.pt")
    for name in ("trap.pt", "trap2.pt"):
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["cfg"].update(layer_norm_first=True), "layer_norm_first is True; only False"),
        (lambda c: c["cfg"].update(input_patch_size=8), "input_patch_size is 8; only 16"),
        (lambda c: c["cfg"].update(activation_fn="glu"), "activation_fn is 'glu'; only 'gelu'"),
        (lambda c: c["cfg"].pop("gru_rel_pos"), "gru_rel_pos is False; only True"),
        (lambda c: c["cfg"].update(encoder_layers=2.5), "encoder_layers"),
        (lambda c: c["model"].pop("layer_norm.bias"), "missing: layer_norm.bias"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "unknown: extra"),
        (
            lambda c: c["model"].update(
                {"encoder.layers.1.self_attn.relative_attention_bias.weight": torch.zeros(20, 4)}
            ),
            "encoder.layers.1.self_attn.relative_attention_bias.weight differs",
        ),
        (lambda c: c.pop("cfg"), "expected 'cfg' and 'model'"),
        (lambda c: c.update(model=[]), "the weights are a list"),
    ],
)
def test_beats_files_that_do_not_fit_are_named(tmp_path, change, told):
    content = public_beats_file(tmp_path / "beats.pt", tiny_config().beats, seed=0)
    change(content)
    torch.save(content, tmp_path / "beats.pt")
    with pytest.raises(CheckpointError, match=told):
        BEATs.from_checkpoint(tmp_path / "beats.pt")
