"""The pipeline: a validated job enters; a run directory, from tokenizer to report, leaves.

    prepare (corpus → tokenizer → tokens) → check → teachers → (cache) → student → control
    → evaluate → report

Read `stages` first: the stages in order, each skipped when its outputs already stand. `running`
holds what surrounds them, `making` how a model is made. Every rank walks through every stage.
What one rank does alone goes through `ranks.on_rank_zero`, so that its result, or its error,
reaches all.
"""

from babyllama_ds.pipeline.running import run_job
from babyllama_ds.pipeline.stages import Pipeline

__all__ = ["Pipeline", "run_job"]
