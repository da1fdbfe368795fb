#!/usr/bin/env python3
"""The work is in voxtral_measure/evaluate.py."""

from voxtral_measure.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
