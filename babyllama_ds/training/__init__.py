"""Training: an engine, windows, targets and a loss enter; a trained model and metrics leave.

Read `step` first: one optimizer step. `loop` runs it, `batches` cuts the data, `objective` is
what the engine wraps, `metrics` is what people watch.
"""
