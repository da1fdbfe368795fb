#!/usr/bin/env python3
"""The work is in voxtral_client/captions.py."""

from voxtral_client.captions import main

if __name__ == "__main__":
    raise SystemExit(main())
