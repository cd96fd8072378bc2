"""Distil small LLaMA models from ensembles of teachers, on little text, with DeepSpeed ZeRO-2."""

__version__ = "0.1.0"
