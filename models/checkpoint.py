"""AESA-Net checkpoint files: ours (`.safetensors`, whole or head only) and training ones (`.pt`)."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aesanet.errors import CheckpointError
from aesanet.hashing import file_sha256
from aesanet.models.aesanet import TRUNK_PREFIX, AESANet
from aesanet.models.config import AESANetConfig
from aesanet.models.public_beats import read_public
from aesanet.models.weights import check_tensors, existing_file, read_pickle

_CONFIG, _BEATS_SHA256 = "aesanet_config", "aesanet_beats_sha256"  # names in the safetensors header


def load_checkpoint(path: str | Path, beats: str | Path | None = None) -> AESANet:
    """Load an AESA-Net in eval mode.

    path  : our `.safetensors`, whole or head only, or a training `.pt` with `{'config', 'state_dict'}`
    beats : the public BEATs file that a head-only checkpoint was trained on; its sha256 must be the stored one

    Raises CheckpointError that names the file and what is wrong in it.
    """
    config, state, beats_sha256 = (
        _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_training(path)
    )
    if beats_sha256 is not None:
        state |= _trunk(path, config, beats_sha256, beats)
    elif beats is not None:
        raise CheckpointError(f"{path}: holds its own BEATs weights, so the BEATs file {beats} must be left out")
    with torch.device("meta"):  # shapes alone: a wrong config must not cost memory
        layout = {key: tuple(value.shape) for key, value in AESANet(config).state_dict().items()}
    check_tensors(path, state, layout)
    model = AESANet(config)
    model.load_state_dict(state)
    return model.eval()


def read_config(path: str | Path) -> AESANetConfig:
    """The config of a checkpoint, as `load_checkpoint` takes it; of a `.safetensors` nothing else is read.

    Raises CheckpointError.
    """
    if Path(path).suffix == ".safetensors":
        return _read_file(path, tensors=False)[0]
    return _read_training(path)[0]


def save_checkpoint(model: AESANet, path: str | Path, beats_sha256: str | None = None) -> None:
    """Write one `.safetensors` with the config as JSON in its header.

    With `beats_sha256`, the hash of the public file that the frozen trunk came from, the trunk is left out.
    Raises OSError.
    """
    header = {_CONFIG: msgspec.json.encode(model.config).decode()}
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    if beats_sha256 is not None:
        header[_BEATS_SHA256] = beats_sha256
        state = {key: value for key, value in state.items() if not key.startswith(TRUNK_PREFIX)}
    _write_file(path, state, header)


def rewrite_config(path: str | Path, out: str | Path, change: Callable[[AESANetConfig], AESANetConfig]) -> None:
    """Write our `.safetensors` at `path` to `out` with its config changed, and all else as it is.

    A head-only checkpoint stays one, and its BEATs file is not needed. Raises CheckpointError or OSError.
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"{path}: not one of aesanet's .safetensors, the only checkpoints that can be rewritten")
    config, state, header = _read_file(path)
    header[_CONFIG] = msgspec.json.encode(change(config)).decode()
    _write_file(out, state, header)


def _read_safetensors(path: str | Path) -> tuple[AESANetConfig, dict[str, Tensor], str | None]:
    config, state, header = _read_file(path)
    return config, state, header.get(_BEATS_SHA256)


def _read_file(path: str | Path, tensors: bool = True) -> tuple[AESANetConfig, dict[str, Tensor], dict[str, str]]:
    """Config, tensors, if they are wanted, and all text entries of the header of our `.safetensors`."""
    try:
        with safe_open(existing_file(path), framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if tensors else ()
            state = {key: file.get_tensor(key) for key in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    if _CONFIG not in header:
        raise CheckpointError(f"{path}: its header has no {_CONFIG}; it was not written by aesanet")
    config = _config(path, lambda: msgspec.json.decode(header[_CONFIG], type=AESANetConfig))
    return config, state, header


def _write_file(path: str | Path, state: dict[str, Tensor], header: dict[str, str]) -> None:
    """The same content gives the same bytes: the library orders a header's text entries anew in every process."""
    content = memoryview(save(state, metadata=header))
    tensors = 8 + int.from_bytes(content[:8], "little")
    fields = json.loads(bytes(content[8:tensors]))
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # as the format has it, so that tensors are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(content[tensors:])


def _read_training(path: str | Path) -> tuple[AESANetConfig, dict[str, Tensor], None]:
    content = read_pickle(path)
    if {"cfg", "model"} <= content.keys():
        raise CheckpointError(
            f"{path}: a BEATs file, which is the trunk alone; give an AESA-Net checkpoint, and this file as its BEATs"
        )
    if not {"config", "state_dict"} <= content.keys():
        raise CheckpointError(
            f"{path}: not a training checkpoint: it has {sorted(map(str, content))}, expected 'config' and 'state_dict'"
        )
    return _config(path, lambda: msgspec.convert(content["config"], AESANetConfig)), content["state_dict"], None


def _config(path: str | Path, read: Callable[[], AESANetConfig]) -> AESANetConfig:
    try:
        return read()
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{path}: config: {error}") from None


def _trunk(path: str | Path, config: AESANetConfig, sha256: str, beats: str | Path | None) -> dict[str, Tensor]:
    """The BEATs weights that a head-only checkpoint was trained on, from the public file."""
    if beats is None:
        raise CheckpointError(
            f"{path}: holds the head alone; give the BEATs file that it was trained on (sha256 {sha256})"
        )
    if (found := file_sha256(existing_file(beats))) != sha256:
        raise CheckpointError(f"{beats}: sha256 {found} is not the {sha256} that {path} was trained on")
    beats_config, state = read_public(beats)
    if beats_config != config.beats:
        raise CheckpointError(f"{path}: config.beats is {config.beats}, but {beats} is {beats_config}")
    return {TRUNK_PREFIX + key: value for key, value in state.items()}
