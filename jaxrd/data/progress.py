"""What a preparation says while it runs: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

_SECONDS = 10  # between two lines


class Progress:
    """Counts the images of one stage of the work.

    Args:
      say: is given the lines; None: neither lines nor a bar.
      title: what is done, "cifar10: writing".
      total: how many images there are.
      done: how many of them need not be done again.
    """

    def __init__(self, say: Callable[[str], object] | None, title: str, total: int, done: int = 0):
        self._say, self._title, self._total, self._done = say, title, total, done
        self._bar = tqdm(desc=title, total=total, initial=done, unit=" images", leave=False,
                         disable=not (say and sys.stderr.isatty()))
        self._said = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def add(self, images: int) -> None:
        """So many more images are done."""
        self._done += images
        self._bar.update(images)
        if self._say and self._bar.disable and time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            self._say(f"{self._title}, {self._done:,} of {self._total:,} images")
