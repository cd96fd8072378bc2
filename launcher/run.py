#!/usr/bin/env python
"""What the `deepspeed` launcher starts on every rank of a checkout: arguments in, `run_job` out.

deepspeed --num_gpus 2 launcher/run.py JOB.yaml [key=value ...] [--runs DIR] [--check]
"""

import sys

from babyllama_ds.cli.launch import main

if __name__ == "__main__":
    sys.exit(main())
