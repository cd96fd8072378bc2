"""The bar of batches: it follows what it is told, one piece of work after another."""

from __future__ import annotations

import pytest

from babyllama_ds import console
from babyllama_ds.console import BatchBar


class Bar:
    """tqdm's, as far as it is used."""

    made: list[Bar]

    def __init__(self, total: int, **_: object) -> None:
        self.total, self.n, self.closed = total, 0, False
        self.made.append(self)

    def update(self, by: int) -> None:
        self.n += by

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    monkeypatch.setattr(console, "tqdm", Bar)
    return Bar.made


def test_a_bar_for_each_piece_of_work(bars: list[Bar]) -> None:
    """What is told twice is no other piece."""
    with BatchBar() as tell:
        for done, of in ((1, 2), (2, 2), (2, 2), (1, 2), (2, 2), (1, 9)):
            tell(done, of)
    assert [(bar.n, bar.total) for bar in bars] == [(2, 2), (2, 2), (1, 9)]


def test_no_bar_stays_open(bars: list[Bar]) -> None:
    def fail() -> None:
        with BatchBar() as tell:
            tell(1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [bar.closed for bar in bars] == [True]
    with BatchBar():
        pass
    assert len(bars) == 1


def test_nothing_is_shown_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    with BatchBar() as tell:
        tell(1, 2)
        tell(2, 2)
    assert capsys.readouterr().err == ""
