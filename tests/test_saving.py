"""When checkpoints are written: often, but never so that a run does little else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlbench.train import watchers
from vlbench.train.watchers import Interrupts, Saving


class Disk(Saving):
    """Saving that takes `slow` seconds of a clock that is set by hand."""

    def __init__(self, clock: SimpleNamespace, slow: float) -> None:
        super().__init__(None, (0, "chat"), [], 60.0, 2, Interrupts(), lambda: 0.0)
        self.clock, self.slow, self.saved = clock, slow, []

    def save(self, training):
        self.saved.append(training.position)
        began = self.clock.time
        self.clock.time += self.slow
        self.saved_at, self.took = self.clock.time, self.clock.time - began


@pytest.mark.parametrize(("slow", "share"), [(0.5, 0.01), (30.0, 0.05)])
def test_saving_takes_a_small_share_of_the_time(slow, share, monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(watchers.time, "monotonic", lambda: clock.time)
    saving = Disk(clock, slow)
    training = SimpleNamespace(steps=10**6, position=0, trainer=SimpleNamespace())
    while training.position < 5000:
        clock.time += 1.0
        training.position += 1
        saving.after(training, None)
    assert len(saving.saved) > 3
    assert slow * len(saving.saved) / clock.time < share * 1.01
