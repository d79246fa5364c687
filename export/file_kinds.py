"""What a file of weights is that is not what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_BEGINNINGS: Final = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights themselves; fetch them with git lfs pull"),
    (b"oid sha256:", "is a Git LFS pointer, not the weights themselves; fetch them with git lfs pull"),
    (b"GGUF", "is a GGUF file; give the checkpoint that it was made from"),
    (b"PK\x03\x04", "is a zip archive, as torch.save writes; name it pytorch_model.bin if it is one"),
    (b"\x80\x02", "is a pickle, as old versions of torch.save write; name it pytorch_model.bin if it is one"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes; convert it with transformers"),
    (b"<", "is a web page or XML, not weights; was the download refused?"),
    (b"{", "is a JSON file, not weights; was the download refused?"),
)


def mistaken(file: Path, *, pickles: bool = False) -> str | None:
    """What a file is, and what to do about it; ``None`` if that is not known.

    Args:
        file: that could not be read.
        pickles: it was meant to be what ``torch.save`` writes, otherwise a safetensors file.
    """
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        return "is empty; is the download complete?"
    if pickles and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:
        return "is a safetensors file; name it model.safetensors"
    if start[4:8] == bytes(4):  # a safetensors file begins with a length of 8 bytes, which may look like a letter
        return None
    for beginning, what in _BEGINNINGS:
        if start.lstrip().startswith(beginning) and not (pickles and beginning in (b"PK\x03\x04", b"\x80\x02")):
            return what
    return None


__all__ = ["mistaken"]
