#!/usr/bin/env python3
"""The work is in voxtral_measure/benchmark.py."""

from voxtral_measure.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
