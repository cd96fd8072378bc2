"""Proof that ZeRO-2 trains as one plain PyTorch process does.

A case (a small model and how it is trained) enters; `sharded` trains it on ranks through the
training engine, `plain` in one process with autograd and torch's AdamW alone, and `judge` says by
parameter where the two differ. The tests plant faults in it; `babyllama-ds doctor` runs it on the
user's own machine.
"""
