"""Training: an engine, windows, targets and a loss enter; a trained model and metrics leave.

Read `step` first: one optimizer step. `loop` runs it, `stage` is what it is given, `batches` cuts
the data, `objective` is what the engine wraps, `step_log` says what came of a step, `metrics` is
what people watch.
"""
