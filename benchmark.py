#!/usr/bin/env python3
"""The work is in voxtral_measure/benchmark.py."""

import sys

from voxtral_measure.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
