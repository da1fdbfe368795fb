#!/usr/bin/env python3
"""The work is in voxtral_measure/benchmark.py."""

from voxtral_client.script import start

if __name__ == "__main__":
    start("voxtral_measure.benchmark")
