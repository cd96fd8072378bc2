"""The plan: a job enters; what it will cost leaves, in seconds, with no GPU and no weights.

    corpus (tokens) → stages (steps, FLOPs) → memory, disk, time → remedies where it does not fit

Read `planner` first. `activations` and `memory` hold the formulas, docs/plan.md how far they were
found from measured peaks.
"""
