"""Progress without a terminal."""

import logging
from collections import Counter

from llava_twophase.extract import progress
from llava_twophase.extract.progress import Progress


def test_progress_logs_lines_without_a_terminal(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with caplog.at_level(logging.INFO), Progress(1000, 10**9) as shown:
        shown.show(Counter(images=250, quarantined=1))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("250 of 1,000 images, ") and "249.00 GB, 1 quarantined" in line and " left, " in line
