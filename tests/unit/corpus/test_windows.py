"""Windows: pure functions of (seed, epoch, index) that cover the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.windows import DevWindows, TrainWindows
from babyllama_ds.errors import DataError
from babyllama_ds.spec.corpus import Offsets, Phases

LENGTH = 5


def shards(num_tokens: int, split: str = "train") -> TokenShards:
    """A stream in which each token's id is its position."""
    stream: npt.NDArray[Any] = np.arange(num_tokens, dtype="<u4")
    index: dict[str, Any] = {"vocab_size": num_tokens, "splits": {split: {}}}
    return TokenShards(index, {split: [stream[:17], stream[17:]]})


def train(num_tokens: int = 203, offsets: Offsets = "random", seed: int = 7) -> TrainWindows:
    return TrainWindows(shards(num_tokens), length=LENGTH, offsets=offsets, seed=seed)


# -- an independent reference of the hash, in Python's own integers -------------------------------

MASK = (1 << 64) - 1


def splitmix64(counter: int) -> int:
    z = (counter * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_draw(seed: int, purpose: int, epoch: int, index: int) -> int:
    key = 0
    for part in (seed, purpose, epoch):
        key = splitmix64((key + part + 1) & MASK)
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_is_splitmix64() -> None:
    # The first outputs for seed 0 of the authors' generator.
    assert [splitmix64(i) for i in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("seed", [0, 7, (1 << 63) - 1])
@pytest.mark.parametrize("epoch", [0, 1, 1_000_003])
def test_order_and_offsets_are_the_documented_hash(seed: int, epoch: int) -> None:
    windows = train(seed=seed)
    indices = range(windows.num_windows)
    order = sorted(indices, key=lambda i: reference_draw(seed, 1, epoch, i))
    starts = [i * LENGTH + reference_draw(seed, 2, epoch, i) % LENGTH for i in indices]
    assert windows.order(epoch).tolist() == order
    assert windows.starts(epoch, np.arange(windows.num_windows)).tolist() == starts


# -- the published order --------------------------------------------------------------------------


class Indices(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """As many examples as there are windows, each its own number."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index])}


def test_the_published_order_is_that_of_transformers_trainer(tmp_path: Path) -> None:
    """Its own loader with its default seed, epoch after epoch, whatever the seed of the stage."""
    from transformers import Trainer, TrainingArguments

    windows = published(seed=9)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=7,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    with torch.random.fork_rng(devices=[]):
        # Their seed is set when the trainer is made, as it was for the published models.
        trainer = Trainer(
            torch.nn.Linear(1, 1), arguments, train_dataset=Indices(windows.num_windows)
        )
        loader = trainer.get_train_dataloader()
        for epoch in range(3):
            loader.set_epoch(epoch)  # type: ignore[attr-defined]
            visited = torch.cat([batch["input_ids"].flatten() for batch in loader])
            assert visited.tolist() == windows.order(epoch).tolist()


def test_it_is_accelerates_sampler(tmp_path: Path) -> None:
    from accelerate.data_loader import SeedableRandomSampler

    windows = published()
    sampler = SeedableRandomSampler(range(windows.num_windows), data_seed=42)
    for epoch in range(3):
        assert list(sampler) == windows.order(epoch).tolist()


def published(seed: int = 7, offsets: Offsets = "random") -> TrainWindows:
    return TrainWindows(shards(203), length=LENGTH, offsets=offsets, seed=seed, order="published")


@pytest.mark.parametrize("offsets", ["random", "fixed", Phases(phases=2)])
def test_in_the_published_order_all_models_see_the_same(offsets: Offsets) -> None:
    one, other = published(1, offsets), published(2, offsets)
    seeded = [train(203, offsets, seed) for seed in (1, 2, 42)]
    for epoch in (0, 1, 5):
        assert np.array_equal(one.batch(epoch, 3, 4), other.batch(epoch, 3, 4))
        everything = np.arange(one.num_windows)
        assert np.array_equal(one.windows(epoch, everything), other.windows(epoch, everything))
        # Offsets are ours, of seed 42; the order is not.
        assert np.array_equal(one.starts(epoch, everything), seeded[2].starts(epoch, everything))
        assert sorted(one.order(epoch).tolist()) == everything.tolist()
        for windows in seeded:
            assert not np.array_equal(one.order(epoch), windows.order(epoch))


# -- what a window holds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "offsets", "expected"),
    [
        (5, Phases(phases=1), 1),
        (12, Phases(phases=2), 2),
        (11, Phases(phases=2), 1),
        (5, "fixed", 1),
        (9, "fixed", 1),
        (10, "fixed", 2),
        (10, "random", 1),
        (14, "random", 1),
        (15, "random", 2),
    ],
)
def test_number_of_windows(num_tokens: int, offsets: Offsets, expected: int) -> None:
    assert train(num_tokens, offsets).num_windows == expected


def test_fixed_windows_are_the_stream_cut_up() -> None:
    windows = train(203, "fixed")
    for epoch in (0, 3):
        got = windows.windows(epoch, np.arange(40))
        assert got.dtype == np.int64
        assert np.array_equal(got, np.arange(200).reshape(40, LENGTH))


@pytest.mark.parametrize("phases", [2, 3, 5, 8])
@pytest.mark.parametrize("num_tokens", [9, 10, 11, 200, 203])
def test_phases_shift_every_window_alike_and_come_again(num_tokens: int, phases: int) -> None:
    windows = train(num_tokens, Phases(phases=phases))
    everything = np.arange(windows.num_windows)
    offsets = [epoch % phases * LENGTH // phases for epoch in range(3 * phases)]
    for epoch, offset in enumerate(offsets):
        expected = offset + everything[:, None] * LENGTH + np.arange(LENGTH)
        assert np.array_equal(windows.windows(epoch, everything), expected)
    # No window beyond the stream, and not one too few: another would not fit the last phase.
    assert max(offsets) + (windows.num_windows + 1) * LENGTH > num_tokens


def test_phases_are_the_same_for_every_seed_but_their_order_is_not() -> None:
    one, two = (train(offsets=Phases(phases=3), seed=seed) for seed in (1, 2))
    everything = np.arange(one.num_windows)
    assert np.array_equal(one.windows(4, everything), two.windows(4, everything))
    assert not np.array_equal(one.order(4), two.order(4))


# Of three phases, length does not divide, and offsets are 0, 1 and 3.
@pytest.mark.parametrize("offsets", ["fixed", *(Phases(phases=k) for k in (2, 3, 4))])
def test_a_number_is_a_windows_tokens(offsets: Offsets) -> None:
    windows = train(offsets=offsets)
    everything = np.arange(windows.num_windows)
    assert windows.num_phases is not None
    assert windows.num_distinct == windows.num_phases * windows.num_windows
    seen = {}
    for epoch in range(2 * windows.num_phases):
        numbers = windows.numbers(epoch, everything)
        tokens = windows.windows(epoch, everything)
        assert np.array_equal(windows.numbered(numbers), tokens)
        for number, window in zip(numbers.tolist(), tokens.tolist(), strict=True):
            assert seen.setdefault(number, window) == window
    assert sorted(seen) == list(range(windows.num_distinct))
    shuffled = np.random.default_rng(0).permutation(windows.num_distinct)  # phases mixed
    assert windows.numbered(shuffled).tolist() == [seen[number] for number in shuffled.tolist()]


def test_random_windows_have_other_numbers_in_every_epoch() -> None:
    windows = train()
    everything = np.arange(windows.num_windows)
    numbers = {n for epoch in range(3) for n in windows.numbers(epoch, everything).tolist()}
    assert len(numbers) == 3 * windows.num_windows
    assert windows.num_distinct is None


def test_random_windows_are_runs_of_the_stream_near_their_place() -> None:
    windows = train(200)
    indices = np.arange(windows.num_windows)
    for epoch in range(50):
        got = windows.windows(epoch, indices)
        offsets = got[:, 0] - indices * LENGTH
        assert got.shape == (39, LENGTH)
        assert np.array_equal(got, got[:, :1] + np.arange(LENGTH))
        assert offsets.min() >= 0
        assert offsets.max() < LENGTH
        assert got.max() < 200


def test_a_window_depends_on_nothing_but_seed_epoch_and_index() -> None:
    windows, again = train(), train()
    backwards = {i: again.windows(2, np.array([i]))[0] for i in reversed(range(again.num_windows))}
    indices = windows.batch(2, 1, 8)
    for index, window in zip(indices, windows.windows(2, indices), strict=True):
        assert np.array_equal(window, backwards[int(index)])
        assert np.array_equal(window, windows.windows(2, np.array([index]))[0])


# -- what an epoch holds -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_windows", [1, 7, 39, 100])
def test_each_epoch_has_every_window_once(batch_windows: int) -> None:
    windows = train()
    for epoch in range(4):
        batches = [
            windows.batch(epoch, k, batch_windows)
            for k in range(-(-windows.num_windows // batch_windows))
        ]
        assert all(len(batch) == batch_windows for batch in batches[:-1])
        assert 0 < len(batches[-1]) <= batch_windows
        assert np.array_equal(np.concatenate(batches), windows.order(epoch))
        assert sorted(np.concatenate(batches)) == list(range(windows.num_windows))


def test_a_caller_cannot_spoil_the_order() -> None:
    windows = train()
    with pytest.raises(ValueError, match="read-only"):
        windows.batch(0, 0, 4)[0] = 0


def test_epochs_and_seeds_differ_and_do_not_share_their_draws() -> None:
    orders = [tuple(train(seed=s).order(e)) for s in range(6) for e in range(6)]
    offsets = [tuple(train(seed=s).starts(e, np.arange(39))) for s in range(6) for e in range(6)]
    assert len(set(orders)) == len(set(offsets)) == 36


def test_offsets_are_uniform_over_windows_and_over_epochs() -> None:
    length, num_windows = 128, 64_000
    windows = TrainWindows(
        shards((num_windows + 1) * length), length=length, offsets="random", seed=3
    )
    across = windows.starts(0, np.arange(num_windows)) % length
    one = np.array([windows.starts(e, np.array([11]))[0] for e in range(6400)]) % length
    for draws in (across, one):
        counts = np.bincount(draws, minlength=length)
        expected = len(draws) / length
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 70 < chi_square < 200  # 127 degrees of freedom: mean 127, deviation 16
    # Neighbouring windows are as good as independent.
    assert abs(np.corrcoef(across[:-1], across[1:])[0, 1]) < 0.02


def test_order_mixes_near_and_far() -> None:
    order = train(5 * 10_001).order(0)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03


# -- too little text -----------------------------------------------------------------------------


def test_a_corpus_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        train(4, "fixed")
    (problem,) = caught.value.problems
    assert problem.got == "4 tokens, not enough for one window"
    assert problem.expected == "at least 5 tokens for windows.length 5"
    with pytest.raises(DataError, match=r"10 tokens .* 5, which windows\.offsets shift"):
        train(9, "random")
    with pytest.raises(DataError, match="expected at least 8 tokens"):
        train(7, Phases(phases=3))  # offsets 0, 1, 3
    assert train(8, Phases(phases=3)).num_windows == 1


@pytest.mark.parametrize(("tokens", "lower"), [(4, True), (0, False)])
def test_too_little_development_text_is_more_to_be_held_out(tokens: int, lower: bool) -> None:
    """No window is so short that nothing at all would fill it."""
    with pytest.raises(DataError, match=rf"corpus \(dev\): got {tokens} tokens") as caught:
        DevWindows(shards(tokens, "dev"), LENGTH)
    hint = caught.value.problems[0].hint or ""
    assert "`split: {kind: tail}`, a larger fraction" in hint
    assert hint.endswith("or set windows.length lower") is lower


# -- development ---------------------------------------------------------------------------------


def test_dev_windows_are_all_but_the_last_few_tokens() -> None:
    windows = DevWindows(shards(203, "dev"), LENGTH)
    assert windows.num_windows == 40
    assert np.array_equal(windows.windows(np.arange(40)).ravel(), np.arange(200))
    assert np.array_equal(windows.windows(np.array([3, 1]))[:, 0], [15, 5])


@pytest.mark.parametrize("limit", [1, 2, 7, 39, 40, 41, 1000])
def test_a_limit_keeps_evenly_spaced_windows(limit: int) -> None:
    windows = DevWindows(shards(203, "dev"), LENGTH, limit)
    starts = windows.windows(np.arange(windows.num_windows))[:, 0]
    assert windows.num_windows == min(limit, 40)
    gaps = np.diff([*starts, 200]) // LENGTH
    assert starts[0] == 0
    assert gaps.max() - gaps.min() <= 1


def test_each_token_is_of_the_file_that_it_comes_from() -> None:
    """A file without tokens, two files of one domain, borders within windows and between them."""
    lengths = [("diary", 12), ("empty", 0), ("letters", 8), ("diary", 1), ("plays", 30)]
    stream, spans, start = np.arange(51, dtype="<u4"), [], 0
    for domain, tokens in lengths:
        spans.append({"domain": domain, "start": start, "stop": start + tokens})
        start += tokens
    index: dict[str, Any] = {"vocab_size": 51, "splits": {"dev": {"domains": spans}}}
    shards = TokenShards(index, {"dev": [stream[:17], stream[17:]]})
    of_token = [domain for domain, tokens in lengths for _ in range(tokens)]
    for limit in (None, 3, 1):
        windows = DevWindows(shards, LENGTH, limit)
        assert windows.domains == ("diary", "empty", "letters", "plays")
        indices = np.arange(windows.num_windows)[::-1]
        numbers = windows.domain_numbers(indices)
        assert numbers.shape == (len(indices), LENGTH)
        tokens = windows.windows(indices)  # an id is its position
        for number, token in zip(numbers.ravel(), tokens.ravel(), strict=True):
            assert windows.domains[number] == of_token[token]


# -- more tokens than 32 bits count ----------------------------------------------------------------

SHARD_TOKENS = 2**31 + 77
"""Of two shards in files with holes: they take no room on the disk."""
MARKED_FROM = (0, 2**31 - 10, SHARD_TOKENS - 40, 2 * SHARD_TOKENS - 90)
"""Places of the stream from which on 90 tokens are no zeros."""


@pytest.fixture
def vast(tmp_path: Path) -> tuple[TokenShards, dict[int, int]]:
    """The shards, as train and dev; and the tokens that are marked. Each mark begins a document."""
    marks = {at + i: (at + 7 * i) % 9_973 + 1 for at in MARKED_FROM for i in range(90)}
    paths = [tmp_path / f"both-{number}.bin" for number in range(2)]
    for number, path in enumerate(paths):
        with path.open("wb") as stream:
            stream.truncate(2 * SHARD_TOKENS)
            for at, token in marks.items():
                if at // SHARD_TOKENS == number:
                    stream.seek(2 * (at % SHARD_TOKENS))
                    stream.write(token.to_bytes(2, "little"))
        begins = [at % SHARD_TOKENS for at in MARKED_FROM if at // SHARD_TOKENS == number]
        path.with_suffix(".starts").write_bytes(b"".join(at.to_bytes(4, "little") for at in begins))
    split = {
        "files": [{"name": path.name, "tokens": SHARD_TOKENS} for path in paths],
        "documents": [3, 1],
    }
    index = {"dtype": "uint16", "vocab_size": 9_974, "splits": {"train": split, "dev": split}}
    (tmp_path / "shards.json").write_text(json.dumps(index))
    return TokenShards.open(tmp_path), marks


@pytest.mark.parametrize("offsets", ["fixed", "random", Phases(phases=3)])
def test_places_beyond_32_bits(offsets: Offsets, vast: tuple[TokenShards, dict[int, int]]) -> None:
    tokens, marks = vast
    windows = TrainWindows(tokens, length=64, offsets=offsets, seed=3, within_documents=True)
    spare = {"fixed": 0, "random": 64}.get(str(offsets), 2 * 64 // 3)
    assert windows.num_windows == (2 * SHARD_TOKENS - spare) // 64
    near = {at // 64 + by for at in MARKED_FROM for by in range(-2, 3)}
    indices = np.array(sorted(i for i in near if 0 <= i < windows.num_windows), np.int64)
    starts = windows.starts(2, indices)
    if offsets != "random":
        phase = 2 if isinstance(offsets, Phases) else 0
        assert starts.tolist() == [64 * int(i) + phase * 64 // 3 for i in indices]
        numbers = windows.numbers(2, indices)
        assert numbers.tolist() == [phase * windows.num_windows + int(i) for i in indices]
        assert np.array_equal(windows.numbered(numbers), windows.windows(2, indices))
        assert np.array_equal(windows.numbered_begins(numbers), windows.begins(2, indices))
    places = [range(start, start + 64) for start in starts.tolist()]
    expected = [[marks.get(at, 0) for at in place] for place in places]
    assert windows.windows(2, indices).tolist() == expected
    if offsets == "fixed":  # all that is marked was looked at, but for the rest of a window
        seen = {at for place in places for at in place}
        assert {at for at in marks if at < windows.num_windows * 64} <= seen
    begins = windows.begins(2, indices)
    assert begins is not None
    assert begins.tolist() == [
        [i == 0 or at in MARKED_FROM for i, at in enumerate(p)] for p in places
    ]


def test_development_windows_beyond_32_bits(vast: tuple[TokenShards, dict[int, int]]) -> None:
    tokens, _ = vast
    limit = 1_001
    windows = DevWindows(tokens, length=64, limit=limit)
    available = 2 * SHARD_TOKENS // 64
    expected = [i * available // limit * 64 for i in range(limit)]
    tokens.gather = lambda split, starts, length: starts  # type: ignore[method-assign]
    assert windows.windows(np.arange(limit)).tolist() == expected
