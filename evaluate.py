#!/usr/bin/env python3
"""The work is in voxtral_measure/evaluate.py."""

import sys

from voxtral_measure.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
