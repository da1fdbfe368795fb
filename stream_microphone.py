#!/usr/bin/env python3
"""The work is in voxtral_client/live.py."""

from voxtral_client.script import live

if __name__ == "__main__":
    live()
