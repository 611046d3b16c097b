"""Reading checkpoints: never executed, whole, and told apart from what only looks like one.

A checkpoint from somewhere else is a program until proven otherwise: PyTorch's format is a pickle.
Here it is read with `weights_only=True` or not at all. The tensors of a large one stay on disk
until they are used, so reading the 10 GB of DynamiCrafter costs nothing. Memory-mapping trusts an
archive where it should not, however: its checksums are compared first (for a large file once: the
verified size and time are remembered), and every tensor must lie whole where the archive says.
"""
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support.errors import CheckpointError, reading, stand_in
from support.options import cache_folder

UNET = "model.diffusion_model."  # a checkpoint's name for the U-Net
SMALL = 256 * 2**20  # bytes: a file up to this size is checked at every reading, and copied


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content, PyTorch's or .safetensors; a file above SMALL is mapped, not read.

    Raises CheckpointError if it is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder without a checkpoint.pt; name a checkpoint file")
    with reading(path, CheckpointError), open(path, "rb") as file:
        start = file.read(9)
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return {"state_dict": own_memory(path, read_safetensors(path, file))}
    if start[:2] != b"PK":
        fault = stand_in(path) or "is no PyTorch checkpoint and no .safetensors file"
        if start[:1] == b"\x80":  # a pickle without an archive around it: PyTorch before 1.6
            fault = ("is of PyTorch's old format or a bare pickle: load it with torch and save it "
                     "again")
        raise CheckpointError(f"{path} {fault if start else 'is empty: fetch it again'}")
    check_archive(path)
    try:
        with reading(path, CheckpointError):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            check_storages(path, content)
    except CheckpointError as error:
        if "UnpicklingError" not in str(error):
            raise
        raise CheckpointError(
            f"{path} holds more than tensors and plain values (a Lightning file keeps its "
            "callbacks, for instance); unpickling it would execute code from the file, so it is "
            "refused: on a machine where you trust it, load it with torch and save "
            "{'state_dict': …} alone") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return own_memory(path, content)


def map_tensors(change: Callable[[str, Tensor], Tensor], content: object, name: str = "") -> object:
    """A copy of dictionaries and lists in which every tensor is what `change` makes of it."""
    if isinstance(content, Tensor):
        return change(name, content)
    if isinstance(content, dict):
        return {key: map_tensors(change, value, f"{name}.{key}") for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map_tensors(change, value, name) for value in content)
    return content


def check_storages(path: Path, content: object) -> None:
    """Each tensor lies in the archive as it says: the storages in memory are, one after the other,
    as long as the members of the file. Raises CheckpointError."""
    storages: dict[int, tuple[str, int]] = {}  # address -> a tensor in it, and how long it is

    def note(name: str, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name[1:]} is not an ordinary tensor (but sparse, "
                                  "quantised or without values)")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = name[1:], storage.nbytes()
        return tensor

    map_tensors(note, content)
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path} was packed again with compression, so its tensors are not "
                              "to be found in it: save it again with torch where it was made")
    stored = iter([member.file_size for member in members if "/data/" in member.filename])
    for _, (name, needed) in sorted(storages.items()):
        if needed and needed not in stored:  # which advances to the next of this length
            raise CheckpointError(f"{path} is damaged: {name} is not there with its {needed} "
                                  "bytes; fetch it again")


def own_memory(path: Path, content: dict) -> dict:
    """The content of a small file, copied: whoever writes over the file changes nothing here."""
    small = path.stat().st_size <= SMALL
    return map_tensors(lambda _, tensor: tensor.clone(), content) if small else content


def check_archive(path: Path) -> None:
    """Compare every member of an archive with its checksum. Raises CheckpointError."""
    verified = remembered_checks(path)
    if verified is not None and verified.exists():
        return
    try:
        with reading(path, CheckpointError), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            with tqdm(total=size, unit="B", unit_scale=True, desc="checking",
                      disable=size < SMALL) as bar:
                for member in members:
                    with archive.open(member) as file:  # which compares the checksum at its end
                        while chunk := file.read(2**20):
                            bar.update(len(chunk))
    except CheckpointError as error:
        words = "a checksum does not match" if "CRC" in str(error) else "it is truncated"
        words = words if "BadZipFile" in str(error) else str(error).removeprefix(f"{path} ")
        raise CheckpointError(f"{path} is damaged: {words}; fetch it again") from None
    if verified is not None:
        with suppress(OSError):  # then it will be checked again
            verified.parent.mkdir(parents=True, exist_ok=True)
            verified.touch()


def remembered_checks(path: Path) -> Path | None:
    """The file whose existence says that this large checkpoint has been checked."""
    stat = path.stat()
    if stat.st_size <= SMALL:
        return None
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()
    return cache_folder() / f"checked-{zlib.crc32(identity):08x}-{stat.st_size}-{stat.st_mtime_ns}"


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                     "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
                     "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
                     "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def read_safetensors(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a .safetensors file that is open, left on disk.

    The format is 8 bytes with the length of the header, the header (JSON), the data. It has no
    checksums, so only the header can be checked.
    """
    file.seek(0)
    length, = struct.unpack("<Q", file.read(8))
    if length > min(path.stat().st_size - 8, 100 * 2**20):
        raise ValueError("its header is longer than the file")
    header = json.loads(file.read(length))
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size,
                           dtype=torch.uint8)[8 + length :]
    tensors, end_of_data = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = data[start:end]
        if not 0 <= start <= end <= len(data):
            raise ValueError("it is truncated")
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise CheckpointError(f"{path}: {name} is stored as {entry['dtype']!r:.20}; read are "
                                  f"{', '.join(SAFETENSORS_TYPES)}")
        dtype = SAFETENSORS_TYPES[entry["dtype"]]
        if (8 + length + start) % dtype.itemsize:
            tensor = tensor.clone()  # a view needs an aligned start
        tensors[name] = tensor.view(dtype).view(entry["shape"])
        end_of_data = max(end_of_data, end)
    if end_of_data != len(data):
        raise ValueError("it is truncated")
    return tensors


def read_lightning(path: str | Path | dict) -> dict[str, Tensor]:
    """The weights of a DynamiCrafter or released Vid2World checkpoint: full name -> tensor. What it
    has read already it gives back.

    Files that others pruned, halved or wrapped come out alike: names lose a wrapper's prefix
    (`module.`, `ema.`), and a copy under such a prefix beside the weights themselves is passed
    over. Raises CheckpointError as `read_checkpoint` does, and for the 256 model.
    """
    if isinstance(path, dict):
        return path
    content = read_checkpoint(path)
    content = content.get("state_dict", content.get("module", content))
    weights = {}
    if isinstance(content, dict):
        weights = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    wrappers = {name.partition(UNET)[0] for name in weights if UNET in name}
    if not wrappers:
        raise CheckpointError(f"{path} holds no {UNET}* weights: it is not a DynamiCrafter or "
                              "Vid2World checkpoint")
    if "" not in wrappers:  # wrapped whole, as `module.` or `ema.`
        if len(wrappers) > 1:
            raise CheckpointError(f"{path} holds several models ({', '.join(sorted(wrappers))}); "
                                  "save one of them alone")
        weights = select(weights, wrappers.pop())
    if any(name.endswith("attn2.alpha") or "framestride_embed" in name for name in weights):
        raise CheckpointError(f"{path} is DynamiCrafter-256, which predicts noise instead of "
                              "velocity and weighs its image attention; use the 512 or the 1024 "
                              "model")
    return weights


def select(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a checkpoint whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()
            if name.startswith(prefix)}


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: str) -> nn.Module:
    """`load_state_dict` whose problems a person can read; nothing missing, left over, misshapen
    or not a finite number is accepted.

    The network takes the tensors over as they are (in float32) and copies none, so it may be built
    on the meta device, and loading needs no memory beyond what is kept.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    misshapen = [f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}"
                 for name in wanted
                 if name in weights and weights[name].shape != wanted[name].shape]
    # "within" of `Model.action_statistics` is infinite where a number never varies
    infinite = [name for name in wanted if name in weights and name != "action_statistics"
                and not is_finite(weights[name])]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen,
                "not of finite numbers": infinite}
    problems = [f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                  for what, names in problems.items() if names]
    if problems:
        raise CheckpointError(f"{source} does not fit this {type(network).__name__}: "
                              f"{'; '.join(problems)}")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return network


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds real numbers, and neither NaN nor an infinity."""
    if not tensor.is_floating_point():
        return False
    low, high = tensor.float().aminmax() if tensor.numel() else (tensor.new_zeros(()),) * 2
    return bool(low.isfinite() and high.isfinite())


def build_unfilled(network_class: type[nn.Module], config: object, weights: dict[str, Tensor]
                   ) -> nn.Module:
    """A network that these weights will fill: a large one without memory, on the meta device; a
    small one on the CPU, because PyTorch imports its compiler to initialise on meta, for a second.
    """
    large = sum(tensor.numel() for tensor in weights.values()) > 1e8
    with torch.device("meta" if large else "cpu"):
        return network_class(config)


def load_part(network_class: type[nn.Module], config: object, weights: dict[str, Tensor],
              prefix: str, source: str | Path) -> nn.Module:
    """One frozen part of a checkpoint that has been read: its network, filled from `prefix`."""
    part = select(weights, prefix)
    part.pop("logit_scale", None)  # the temperature of CLIP's training loss, which no network uses
    return load_weights(build_unfilled(network_class, config, part), part, source=str(source))
