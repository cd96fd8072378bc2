"""How fast this machine is at a job's products: setup and corpus enter; meters and seconds leave.

The rates are measured once for all stages, when first asked for: to ask is a collective.
"""

from __future__ import annotations

from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.engine.matmul_rate import (
    MatmulRates,
    measure_matmul_rates,
    square_product,
)
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.training.batches import total_steps
from babyllama_ds.training.meter import Meter, Work, work_of
from babyllama_ds.training.out_of_memory import memory_needed


class Speed:
    """The speed of one machine at one job."""

    def __init__(self, setup: JobSetup) -> None:
        self.setup = setup
        self._rates: MatmulRates | None = None

    def facts(self, corpus: Corpus) -> dict[str, float]:
        """FLOP/s of this machine's bf16 products: large, and at the shapes of the distillation."""
        rates = self._measured_rates(corpus)
        return {
            "square_flops_per_s": rates.square,
            "same_shapes_flops_per_s": rates.same_shapes(self._work("student", corpus).products),
        }

    def meter(self, stage: str, corpus: Corpus) -> Meter:
        """What a token of a stage costs, and the rate measured for its products."""
        work = self._work(stage, corpus)
        return Meter(
            flops_per_token=work.flops_per_token,
            matmul_flops_per_s=self._measured_rates(corpus).same_shapes(work.products),
        )

    def products_s(self, stage: str, training: TrainingSpec, corpus: Corpus) -> float:
        """Seconds of the training's matrix products at the rate measured here."""
        windows = self.setup.windows(corpus, seed=0)
        steps = total_steps(training, windows.num_windows, windows.length)
        meter, tokens = self.meter(stage, corpus), training.batch_windows * windows.length
        return steps * tokens * meter.flops_per_token / meter.matmul_flops_per_s

    def _measured_rates(self, corpus: Corpus) -> MatmulRates:
        """The rates of all stages' products, measured at the first call."""
        if self._rates is None:
            models = self.setup.models()
            stages = [where for where, _, training in models if training is not None]
            works = [self._work(stage, corpus) for stage in (*stages, "control")]
            products = dict.fromkeys(product for work in works for product in work.products)
            device = self.setup.device
            largest = max(product.bytes for product in (*products, square_product(device)))
            hint = (
                f"before any model is there, products of theirs are measured, of up to {largest:,} "
                "bytes: either another program holds the memory (on a card, nvidia-smi names it), "
                "or a model is too wide for it"
            )
            with memory_needed("deepspeed.device", hint=hint):
                self._rates = measure_matmul_rates(products, device)
        return self._rates

    def _work(self, stage: str, corpus: Corpus) -> Work:
        job = self.setup.job
        trained = {f"teachers/{teacher.name}": teacher for teacher in job.teachers}
        spec = trained.get(stage, job.student)
        training = spec.training
        if stage == "control" and job.control is not None:
            training = job.control.training or training
        assert training is not None, "a stage that trains"
        return work_of(
            spec.model,
            [teacher.model for teacher in job.teachers] if stage == "student" else [],
            length=job.windows.length,
            micro_batch=self.setup.micro_batch(stage, training),
            vocab_size=len(corpus.tokenizer),
            cache=job.distillation.cache,
            where=stage,
        )
