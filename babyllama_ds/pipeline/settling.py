"""What a job leaves open (`auto`): a stage enters; its micro-batch and what is compiled leave.

What the first start on such ranks finds is kept in the run directory. Later starts do the same,
also where memory is less: another micro-batch rounds otherwise. Where a compiler is gone they end.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.engine.compiling import Compiled, choose_compiled
from babyllama_ds.pipeline.ensembles import cache_to_come, live_ensemble
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.speed import Speed
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.storages import Storages
from babyllama_ds.teachers.cache.tiers import measure_room
from babyllama_ds.training.micro_batch import find_micro_batch
from babyllama_ds.training.objective import objective_of

log = logging.getLogger(__name__)


class Settling:
    """Settles what one run's job leaves open; the run's directory remembers what was found."""

    def __init__(
        self, setup: JobSetup, directory: RunDirectory, storages: Storages, speed: Speed
    ) -> None:
        self.setup = setup
        self.directory = directory
        self.storages = storages
        self.speed = speed

    def settle(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        teachers: dict[str, Path] | None,
    ) -> tuple[TrainingSpec, Compiled]:
        """The training with its micro-batch, and what is compiled in it. A collective.

        Raises:
            MachineError: not even one window fits, or a compiler is missing that was asked for by
                name or used at the first start.
        """
        where = f"{stage} on {ranks.world_size()} {self.setup.device.type} ranks"
        known = ranks.on_rank_zero(self.directory.settled).get(where, {})
        if training.micro_batch == "auto":
            windows = known.get("micro_batch") or self._find_micro_batch(
                stage, model, training, corpus, teachers
            )
            log.info("%s: micro_batch auto: %d windows", stage, windows)
            known = {**known, "micro_batch": windows}
            training = training.model_copy(update={"micro_batch": windows})
        asked = self.setup.job.deepspeed.compile
        products_s = self.speed.products_s(stage, training, corpus)
        shapes_vary = ranks.on_every_rank(self.setup.shapes_vary)
        chosen = ranks.on_every_rank(
            lambda: choose_compiled(
                asked if asked != "auto" else known.get("compile", asked),
                device=self.setup.device_kind,
                products_s=products_s,
                shapes_vary=shapes_vary,
            )
        )
        # Of `auto`, each rank looks for a compiler, anew at every start: what one of them goes
        # without, all do, and for good.
        of_ranks = ranks.gather_objects(chosen)
        compiled, why = next((one for one in of_ranks if one[0] == "none"), of_ranks[0])
        if asked == "auto":
            if "compile" in known:
                why = "as at the first start"
            known = {**known, "compile": compiled}
        log.info("%s: torch.compile %s: %s", stage, compiled, why)
        self.storages.on_each(lambda: self._keep(where, known))
        return training, compiled

    def _find_micro_batch(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        teachers: dict[str, Path] | None,
    ) -> int:
        """Found by trying, with live teachers: those of a cache run once in the same shape.

        What the cache will take beside the student is not there yet, and spared.
        """
        setup = self.setup
        distillation = setup.job.distillation if teachers else None
        cached = distillation is not None and distillation.cache != "none"
        room = measure_room(self.directory.path, setup.device, self.storages) if cached else None
        ensemble = live_ensemble(setup, teachers, compiled=False) if teachers else None
        objective = objective_of(
            model,
            ensemble,
            vocab_size=len(corpus.tokenizer),
            training=training,
            distillation=distillation,
            seed=setup.job.stage_seed(stage),
        )
        try:
            to_come = 0
            if ensemble is not None and room is not None:
                to_come = cache_to_come(setup, model, corpus, ensemble, room)
            return find_micro_batch(
                objective,
                ensemble,
                training=training,
                deepspeed=setup.deepspeed_config(stage, training),
                share=setup.micro_batch(stage, training),
                length=setup.job.windows.length,
                device=setup.device,
                where=setup.job.training_key(stage),
                within_documents=setup.within_documents,
                cache_bytes=to_come,
            )
        finally:
            objective.release()
            if ensemble is not None:
                ensemble.destroy()

    def _keep(self, where: str, found: dict[str, Any]) -> None:
        """Keep it for later starts, and for the report among the facts of where a run is made."""
        self.directory.settle(where, found)
        path = self.directory.path / "environment.json"
        files.write_json(path, files.read_json(path) | {"settled": self.directory.settled()})
