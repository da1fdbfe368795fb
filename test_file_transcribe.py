#!/usr/bin/env python3
"""The work is in voxtral_client/files.py."""

from voxtral_client.files import main

if __name__ == "__main__":
    raise SystemExit(main())
