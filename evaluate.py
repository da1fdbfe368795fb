#!/usr/bin/env python3
"""The work is in voxtral_measure/evaluate.py."""

from voxtral_client.script import evaluate

if __name__ == "__main__":
    evaluate()
