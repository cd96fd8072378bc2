"""The engine: the only room that imports `deepspeed`.

Modules and numbers enter; a ZeRO-2 training engine, a frozen bf16 inference engine, learning
rates and checkpoints leave.
"""
