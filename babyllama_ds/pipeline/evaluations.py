"""A run's evaluations: its models and a corpus enter; what they measure at leaves, as JSON.

    evaluation/<model>.json
    evaluation/milestones/<stage>/<milestone>.json     where `evaluation.milestones` asks for them

A file with the fingerprint of what is asked for stands; any other goes before anything is
measured: a report of a run that ends in between would set it beside the new.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.fingerprints import evaluation_fingerprint
from babyllama_ds.pipeline.equal import check_same_benchmarks
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.rundir import MILESTONES_NAME
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store
from babyllama_ds.training.milestones import kept_milestones
from babyllama_ds.training.out_of_memory import memory_needed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One measurement."""

    name: str
    """Of a model; of a milestone with its folders, `milestones/student/chck_1M`."""
    path: Path
    setup: JobSetup
    """With the evaluation that is its own."""
    fingerprint: str


class Evaluations:
    """Those of one run."""

    def __init__(
        self, setup: JobSetup, run_dir: Path, store: Store, storages: Storages, stop: StopRequest
    ) -> None:
        self.setup = setup
        self.run_dir = run_dir
        self.store = store
        self.storages = storages
        self.stop = stop

    def make(self, models: Mapping[str, Path], corpus: Corpus) -> None:
        """Measure finished models by name, and what was kept on their way, but for what stands
        here or in the store. A collective."""
        wanted = [*self._of_models(models, corpus), *self._of_milestones(corpus)]
        ranks.on_rank_zero(lambda: self._forget_others(wanted))
        for one in wanted:
            self._evaluate(one, corpus)

    def _of_models(self, models: Mapping[str, Path], corpus: Corpus) -> Iterator[_Wanted]:
        for name, path in models.items():
            yield self._wanted(self.setup, name, path, corpus)

    def _of_milestones(self, corpus: Corpus) -> Iterator[_Wanted]:
        setup = self.setup.of_milestones()
        if setup is None:
            return
        for stage in ("student", "control"):
            # Those of the first node; whole on each, whose ranks measure what lies there.
            kept, *_ = self.storages.on_each(partial(self._kept, stage))
            for name, path in kept.items():
                yield self._wanted(setup, f"{MILESTONES_NAME}/{stage}/{name}", path, corpus)

    def _kept(self, stage: str) -> dict[str, Path]:
        """The milestones of a stage that are there, and whole."""
        kept = kept_milestones(self.run_dir, stage)
        for path in kept.values():
            hint = f"delete the folder {path}: it is then left out, and not made anew"
            files.verify_manifest(path, hint=hint)
        return kept

    def _wanted(self, setup: JobSetup, name: str, path: Path, corpus: Corpus) -> _Wanted:
        of_each = self.storages.on_each(
            lambda: evaluation_fingerprint(
                path,
                setup.job,
                corpus.entries.tokens_key,
                corpus.entries.pairs_dir,
                teacher=name in {spec.name for spec in setup.job.teachers},
            )
        )
        check_same_benchmarks(self.storages, of_each)
        return _Wanted(name=name, path=path, setup=setup, fingerprint=of_each[0])

    def _forget_others(self, wanted: Sequence[_Wanted]) -> None:
        for one in wanted:
            path = self._result_path(one.name)
            if path.exists() and not _stands(path, one.fingerprint):
                path.unlink()
        # Milestones that are gone, or no longer asked for: nobody knows how theirs were measured.
        names = {self._result_path(one.name) for one in wanted}
        for path in (self.run_dir / "evaluation" / MILESTONES_NAME).glob("*/*.json"):
            if path not in names:
                path.unlink()

    def _evaluate(self, wanted: _Wanted, corpus: Corpus) -> None:
        result_path = self._result_path(wanted.name)
        if ranks.on_rank_zero(lambda: _stands(result_path, wanted.fingerprint)):
            log.info("evaluation of %s: done before", wanted.name)
            return
        measurer = Measurer(wanted.setup, self.store, self.stop)
        with memory_needed("evaluation.batch_tokens", hint="fewer tokens in a pass"):
            result = measurer.measure(wanted.name, wanted.path, corpus, wanted.fingerprint)
        result |= {"fingerprint": wanted.fingerprint}
        ranks.on_rank_zero(lambda: files.write_json(result_path, result))

    def _result_path(self, name: str) -> Path:
        return self.run_dir / "evaluation" / f"{name}.json"


def _stands(result_path: Path, fingerprint: str) -> bool:
    return result_path.exists() and files.read_json(result_path).get("fingerprint") == fingerprint
