"""Data sets of TFDS's catalogue, which TFDS downloads and prepares itself, and needs TensorFlow for."""

import contextlib
import fnmatch
import http.client
import importlib.util
import logging
import os
import pathlib
import shlex
import ssl
import sys

from jaxrd.data import digits, tfds_reader, tiny_imagenet
from jaxrd.data.publication import Origin, Say, publish
from jaxrd.errors import InputError, one_line
from jaxrd.files import NOT_WRITTEN

_TIMEOUT = 15  # seconds until a server that does not answer counts as not reachable


def prepare_catalogue(
    name: str, directory: str | os.PathLike | None = None, source: str | os.PathLike | None = None, say: Say = print
) -> list[pathlib.Path]:
    """Prepares a data set that TFDS or this library knows, as array_record.

    Args:
      name: "cifar10", "cifar10_1/v6", or with a pattern for all configs of a data set, "cifar10_corrupted/*".
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      source: an archive that was downloaded by hand, or the directory of several, under the names that TFDS has
        registered; by default TFDS downloads. What it has downloaded before it takes in either case.
      say: is given what happens, line by line.

    Returns:
      The directories of the prepared data sets.

    Raises:
      InputError: TFDS does not know the data set, it holds something else than labelled images of one size, or it can be
        neither downloaded nor written; TensorFlow is missing.
    """
    # Before anything imports TensorFlow, which writes to stderr while it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    import tensorflow_datasets as tfds

    root = tfds_reader.root_of(directory)
    base, _, config = name.partition("/")
    if base == tfds_reader.DIGITS:
        return [digits.prepare(root, say)]
    if base == tfds_reader.TINY_IMAGENET:
        if source is None:
            raise InputError(f"--source is missing; {name} is not downloaded: get {tiny_imagenet.URL} and give "
                             f"--source={tiny_imagenet.ARCHIVE}")
        return [tiny_imagenet.prepare_tiny_imagenet(source, directory, say=say)]
    if base.partition(":")[0] not in tfds_reader.catalogue():
        raise tfds_reader.not_prepared(name, root, "--npz=train.npz,test.npz")
    names = [name]
    if set("*?[") & set(config):
        configs = tfds.builder_cls(base).builder_configs
        names = [f"{base}/{each}" for each in configs if fnmatch.fnmatchcase(each, config)]
        if not names:
            raise InputError(f'dataset is "{name}"; {base} has the configs {", ".join(configs) or "none"}')
    if source is not None:
        source = pathlib.Path(source).expanduser()
        if not source.exists():
            raise InputError(f"--source={source}: no such file; give the archive of {name} or the directory that it is in")
    return [_prepare(each, root, source, say) for each in names]


def _prepare(name: str, root: pathlib.Path, source: pathlib.Path | None, say: Say) -> pathlib.Path:
    with_config, version = _full_name(name, root)

    def build(empty, kept):
        del kept
        _need_tensorflow(name)
        builder = _builder(name, empty)
        _refuse_archive_of_another_name(source, builder, name)
        _download_and_prepare(builder, root, source, say)
        return pathlib.Path(builder.data_dir), {}

    return publish(with_config, version, root, Origin("catalogue", f"{with_config}/{version}"), build, say)


def _builder(name: str, root: pathlib.Path):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
    except Exception as error:
        base = name.split("/")[0].split(":")[0]
        known = list(tfds.builder_cls(base).builder_configs)
        reason = f"the configs of {base} are {', '.join(known)}" if known else one_line(error)
        raise InputError(f'dataset is "{name}", which TFDS does not have; {reason}') from error


def _full_name(name: str, root: pathlib.Path) -> tuple[str, str]:
    """Returns a data set's name with its config, and its version, where it holds what can be read."""
    builder = _builder(name, root / ".nothing")  # where there is something, TFDS reads it, damaged or not
    tfds_reader.described(name, root, builder, {}, mocked=False)
    with_config, _, version = builder.info.full_name.rpartition("/")
    return with_config, version


def _need_tensorflow(name: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(f"data set {name}: TFDS needs TensorFlow to prepare it, though not to read it; "
                         "pip install 'jaxrd[prepare]', or in a checkout pip install -e '.[prepare]'")


def _refuse_archive_of_another_name(source: pathlib.Path | None, builder, name: str) -> None:
    if source is None or source.is_dir():
        return
    registered = [info.filename for info in (builder.url_infos or {}).values() if info.filename]
    if source.name not in registered:
        raise InputError(f"--source={source}: {name} is made from {', '.join(registered) or 'no archive'}; give the file under "
                         "that name, or the directory that it is in")


def _download_and_prepare(builder, root: pathlib.Path, source: pathlib.Path | None, say: Say) -> None:
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder._log_download_bytes = builder._log_download_done = lambda: None  # they print
    make = builder._make_download_manager
    builder._make_download_manager = lambda **options: _guarded(make(**options), builder.name, source, say)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    if source is not None:
        config.manual_dir = source if source.is_dir() else source.parent
    try:
        builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    except Exception as error:
        for left in (root / "downloads" / "extracted", root / "downloads"):
            with contextlib.suppress(OSError):  # where something has been downloaded
                left.rmdir()
        chain = [error]
        while below := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(below)
        for cause in chain:
            if isinstance(cause, InputError):
                raise cause from None
        for cause in chain:
            if _is_of_the_network(cause):
                raise InputError(f"data set {builder.name}: the download broke off ({one_line(cause)}); the same command goes "
                                 "on, or give the archive as --source=FILE") from error
            if isinstance(cause, OSError) and cause.errno in NOT_WRITTEN:
                raise cause from None
        raise InputError(f"data set {builder.name}: TFDS cannot prepare it ({one_line(error)})") from error


def _guarded(manager, name: str, source: pathlib.Path | None, say: Say):
    """Makes a download manager answer with one line where its own is a page, or minutes of attempts."""
    compare, download = manager._register_or_validate_checksums, manager._download

    def checked(url, url_info, path):
        expected = manager._url_infos.get(url)
        if expected and expected != url_info:
            raise InputError(
                f"{path} is not the file that TFDS knows: it has {int(url_info.size)} bytes and SHA-256 {url_info.checksum}, "
                f"not {int(expected.size)} and {expected.checksum}; get it again from {url}")
        compare(url=url, url_info=url_info, path=path)

    def fetched(resource):
        url, expected = resource.url, manager._url_infos.get(resource.url)
        file = expected.filename if expected and expected.filename else url.rpartition("/")[2]
        what = f"{file} ({int(expected.size)} bytes, SHA-256 {expected.checksum})" if expected else file
        if source is not None:
            raise InputError(f"--source={source}: {name} needs {what}, which is not there; get it from {url}")
        if reason := _unreachable(url):
            raise InputError(
                f"{url} cannot be reached ({reason}); get {what} elsewhere, and give it as --source={shlex.quote(file)}")
        say(f"{name}: downloading {url}")
        return download(resource)

    manager._register_or_validate_checksums, manager._download = checked, fetched
    return manager


def _is_of_the_network(error: BaseException) -> bool:
    """Tells errors of a connection from those of a disk; both are OSErrors, and SSL's have the number of EPERM."""
    import requests
    import urllib3

    return isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException,
                              requests.RequestException, urllib3.exceptions.HTTPError))


def _unreachable(url: str) -> str:
    """Returns why a server does not answer, or "" where it does."""
    import requests

    if not url.startswith("http"):
        return ""
    try:
        requests.head(url, timeout=_TIMEOUT, allow_redirects=True)
    except requests.RequestException as error:
        return type(error).__name__
    return ""
