#!/usr/bin/env python3
"""The work is in voxtral_measure/benchmark.py."""

from voxtral_client.script import benchmark

if __name__ == "__main__":
    benchmark()
