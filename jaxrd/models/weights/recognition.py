"""What a file of weights is, by its content: suffixes are whatever the last download or rename made of them."""

import codecs
import os
import pathlib
import re
import zipfile

import numpy as np

from jaxrd.errors import InputError
from jaxrd.models.weights import haiku_file, torch_file, unpickling

_EXPECTED = (
    "a PyTorch file of a state_dict (torch.save), a safetensors file or an .npy file of DeepMind's (params, state) is expected")
_LEGACY_MAGIC = torch_file.LEGACY_MAGIC.to_bytes(10, "little")
_ARCHIVES = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "Zstandard", b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "RAR"}
_LARGEST_HEADER = 100_000_000  # of a safetensors file, as the format bounds it


def kind(path: str | os.PathLike) -> str:
    """Returns what a file of weights is: "torch", "torch_legacy", "safetensors", or "haiku", an .npy file of Python objects.

    "torch" is the zip archive of PyTorch 1.6 and newer, "torch_legacy" what it wrote before. That the rest of the file is
    sound is for its reader to find out.

    Raises:
      InputError: the file is something else, or cannot be read; the line says what it is, and what to do.
    """
    location = pathlib.Path(path)
    with unpickling.reading(path):
        if location.is_dir():
            if (location / "config.json").is_file() or (location / "checkpoints").is_dir():
                raise InputError(f"{path}: this is already a run directory of jaxrd; use it as it is, without importing it")
            raise InputError(f"{path}: a directory; give the file of weights in it: {_EXPECTED}")
        if not location.exists():
            raise InputError(f"{path}: there is no such file; {_EXPECTED}")
        if not location.is_file():
            raise InputError(f"{path}: neither a file nor a directory; {_EXPECTED}")
        size = location.stat().st_size
        with open(location, "rb") as file:
            head = file.read(4096)
        if not head:
            raise InputError(f"{path}: it is empty; download it again")
        if head.startswith(b"PK"):
            return _zip(path)
        if head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]:
            return "torch_legacy"
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
            if 8 + int.from_bytes(head[:8], "little") > size:
                raise InputError(
                    f"{path}: it begins like a safetensors file but is truncated after {size} bytes; download it again")
            return "safetensors"
        if head.startswith(np.lib.format.MAGIC_PREFIX):
            return _npy(path)
        raise InputError(f"{path}: {_foreign(head, size)}")


def _zip(path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise InputError(
            f"{path}: truncated: it begins like a zip archive, as torch.save makes, but its end is missing; download it again"
        ) from None
    roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)][:2]
    if any(root + "constants.pkl" in names or any(name.startswith(root + "code/") for name in names) for root in roots):
        raise InputError(
            f"{path}: a TorchScript program (torch.jit.save); save its state_dict() with torch.save and give that file")
    if roots:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(f"{path}: a NumPy archive (.npz); {_EXPECTED}")
    shown = ", ".join(map(unpickling.printable, names[:3])) + (", ..." if len(names) > 3 else "")
    raise InputError(f"{path}: a zip archive of {shown or 'nothing'}, not a PyTorch file; unpack it, and give the file in it")


def _npy(path) -> str:
    with open(path, "rb") as file:
        shape, dtype = haiku_file.header(file)
    if dtype == np.dtype(object):
        return "haiku"
    raise InputError(f"{path}: an .npy file of a plain {dtype} array of shape {list(shape)}; {_EXPECTED}")


def _foreign(head: bytes, size: int) -> str:
    """Returns what a file that begins so is, and what to do."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--|script|meta|title)", text, re.IGNORECASE):
        return (
            "an HTML page, such as a download page or the warning that Google Drive shows for large files, not what it leads "
            "to; download the file itself")
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "a pointer of git-lfs to the file, not the file; fetch it with: git lfs pull"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"compressed by {name}; decompress it, and give the file in it"
    if head[257:262] == b"ustar":
        return (
            "a tar archive: of files, or from PyTorch before 0.1.10; unpack it and give the file in it, or, where it is "
            "PyTorch's own, load it with an old PyTorch and save it again")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"an HDF5 file, such as Keras writes; {_EXPECTED}"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a bare pickle, not made by torch.save; {_EXPECTED}: save its content as one of these"
    if not head.strip(b"\x00"):
        return f"it begins with {len(head)} bytes of 0, as a download that has not finished does; download it again"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character that the 4096 bytes cut off is no error
        if not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
            name = "JSON" if text[:1] in (b"{", b"[") else "text"
            return f"{name} that begins {text[:40].decode('utf-8', 'replace')!a}; {_EXPECTED}"
    except UnicodeDecodeError:
        pass
    return f"{size} bytes of an unknown format that begin with {head[:8].hex(' ')}; {_EXPECTED}"
