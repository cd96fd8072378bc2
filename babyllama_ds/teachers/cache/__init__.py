"""Teachers computed once: windows and models enter, records on disk or in memory leave.

key → layout → build (shards, by all ranks) → tiers → records → members of the ensemble
"""
