"""Files and directories that a kill leaves either old or new, never half, and arrays read from .npz files of anybody's.

And a lock, for what several processes would rather do once than each.
"""

import contextlib
import errno
import glob
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from jaxrd.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STARTED = time.time()

# What a file system says where something cannot be written to it.
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextlib.contextmanager
def disk_explained(what: str, state: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns the complaint of a full disk, or of one that takes nothing, into one line; for what an unfinished run writes.

    Args:
      what: is written in the block.
      state: returns what else to say, such as what is saved.

    Raises:
      InputError: in place of whatever exception has such a complaint among its causes, Python's or tensorstore's.
    """
    try:
        yield
    except Exception as error:
        if (reason := _disk_complaint(error)) is None:
            raise
        raise InputError(f"{what} cannot be written ({reason}){f'; {state()}' if state else ''}; make room there, or have it "
                         "writable, and give the same command again") from None


def _disk_complaint(error: BaseException | None) -> str | None:
    while error is not None:
        found = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's, in an exception of any type
        number = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
        if number in NOT_WRITTEN:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def replacing(path: pathlib.Path, mode: str = "wb", **options) -> Iterator[IO]:
    """Opens a temporary file beside `path`, which takes its place once the block has ended; an exception leaves nothing of it.

    Its name, which ends in ".tmp", is nobody else's, so that of several writers at once the last one's file stands, whole.

    Args:
      path: the file; its directory exists.
      mode, **options: as for `open`.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_arrays(path: str | pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the named arrays of an .npz file; never unpickles.

    Raises:
      FileNotFoundError: no such file.
      Exception: whatever zip and NumPy raise where it is damaged.
    """
    with open(path, "rb") as opened:
        if not zipfile.is_zipfile(opened):  # NumPy would take it for a pickle, and advise to load it unsafely
            raise ValueError("it is no .npz file")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in names}


def array_shapes(path: str | pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of each array in an .npz file, from its headers alone.

    Raises:
      FileNotFoundError: no such file.
      Exception: whatever zip and NumPy raise where it is damaged.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                shapes[name.removesuffix(".npy")], _, _ = readers[np.lib.format.read_magic(file)](file)
    return shapes


@contextlib.contextmanager
def appearing(target: pathlib.Path, *, directory: bool = False) -> Iterator[pathlib.Path]:
    """Yields a path beside `target`, which takes its name once the block has ended; where that fails nothing is left of it.

    Args:
      target: a file that does not exist, or a directory that does not or is empty; where it is a link, what that leads to.
      directory: yield an empty directory, not the path of a file to be written.

    Raises:
      InputError: `target` cannot be written, or has come to exist meanwhile.
    """
    place = pathlib.Path(os.path.realpath(target))
    prefix = f".{place.name}.unfinished-{socket.gethostname()}-"
    workplace = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_left(place.parent, prefix)
        with termination_raised():
            workplace = pathlib.Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place.parent))
            temporary = workplace / place.name
            if directory:
                temporary.mkdir()
            yield temporary
            try:
                if directory:
                    os.replace(temporary, place)
                else:
                    temporary.chmod(0o666 & ~_umask())  # safetensors' own files are their owner's alone
                    _name(temporary, place)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise InputError(f"{target} has come to exist meanwhile; choose another place") from None
                raise
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        if workplace:
            _remove(workplace)


@contextlib.contextmanager
def alone(lock: pathlib.Path, waiting: Callable[[str], object] = lambda holder: None) -> Iterator[bool]:
    """Lets one at a time into the block, of all threads and processes, on every machine that sees the file.

    Whoever dies inside lets the next one in. The file is gone when nobody is inside.

    Args:
      lock: path of a file that serves for nothing else; its directory is made where it does not exist.
      waiting: is told who is inside before this one waits for them: "process 17 on tpu-3".

    Yields:
      False where the file system knows no locks, so that somebody else may be inside as well; True elsewhere.

    Raises:
      OSError: the file cannot be made.
    """
    descriptor, held = _locked(lock, waiting)
    try:
        yield held
    finally:
        if held:
            lock.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not suffice where a forked process has it open too
        os.close(descriptor)


def _locked(lock: pathlib.Path, waiting: Callable[[str], object]) -> tuple[int, bool]:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            lock.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            try:
                if fcntl is None:
                    return descriptor, False
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting(_holder(descriptor))
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                return descriptor, False
            # The one who was inside has removed the file, perhaps: then a newer one of that name counts.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                    return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Returns who is inside; that one writes it a moment after it has come in."""
    for _ in range(50):
        if text := os.pread(descriptor, 300, 0):
            return text.decode(errors="replace")
        time.sleep(0.01)
    return "another process"


def sha256(path: str | pathlib.Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_left(parent: pathlib.Path, prefix: str) -> None:
    """Removes what dead processes of this machine have left.

    Args:
      parent: the directory that they worked in.
      prefix: of the names of their directories, with the name of this machine; then come a process, "-" and one more word.
    """
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        # Of a machine whose name goes on after ours there is one more "-".
        found = re.fullmatch(r"(\d+)-[^-]+", left.name.removeprefix(prefix))
        if found and not _in_use(left, int(found[1])):
            shutil.rmtree(left, ignore_errors=True)


def _remove(directory: pathlib.Path) -> None:
    """Removes a directory, in which threads of a write that failed may still be making files."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)


def _name(file: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file, where nothing has the name yet; file systems without links cannot tell."""
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:
        os.replace(file, target)


def _in_use(left: pathlib.Path, process: int) -> bool:
    """Returns whether a process of this machine may still be writing there."""
    try:
        if process == os.getpid():  # of an earlier process with this number, in a container that was started again
            return left.stat().st_mtime >= _STARTED
        os.kill(process, 0)
    except (OverflowError, ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def termination_raised() -> Iterator[None]:
    """Makes SIGTERM an exception, so that what is half-written is removed; in the main thread, the only one that may."""
    def leave(number, _):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C wait for the end of the block: for seconds of writing by threads that outlive an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    old = {number: signal.signal(number, lambda number, _: received.append(number))
           for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    for number in received[:1]:
        signal.raise_signal(number)


def _umask() -> int:
    """Returns the rights that new files are made without; to read them is to set them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
