"""Lines of a preparation that is not watched: at intervals, with what is done and what there is."""

import types

from jaxrd.data import progress


def lines_of(monkeypatch, times, done=0):
    clock, lines = iter(times), []
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.Progress(lines.append, "mine: writing", 5000, done) as count:
        for _ in range(3):
            count.add(1000)
    return lines


def test_short_work_says_nothing_and_long_work_a_line_now_and_then(monkeypatch):
    assert lines_of(monkeypatch, [0, 1, 2, 3]) == []
    assert lines_of(monkeypatch, [0, 9, 11, 11, 12]) == ["mine: writing, 2,000 of 5,000 images"]
    assert lines_of(monkeypatch, [0, 20, 20, 29, 31, 31], 2000)[0] == "mine: writing, 3,000 of 5,000 images"


def test_nobody_listens():
    with progress.Progress(None, "mine", 10) as count:
        count.add(10)
