#!/usr/bin/env python3
"""The work is in voxtral_client/files.py."""

from voxtral_client.script import start

if __name__ == "__main__":
    start("voxtral_client.files")
