#!/usr/bin/env python3
"""The work is in voxtral_client/files.py."""

from voxtral_client.script import transcribe

if __name__ == "__main__":
    transcribe()
