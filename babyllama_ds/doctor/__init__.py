"""Whether this machine can be trusted: its devices, versions, disk and ranks are tried out.

A directory for runs and a device enter; findings leave, each ok, a warning or a failure with its
remedy. `examine` does all checks, `table` shows them; `rank` is what every rank of the proof runs.
"""
