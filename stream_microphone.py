#!/usr/bin/env python3
"""The work is in voxtral_client/captions.py."""

import sys

from voxtral_client.captions import main

if __name__ == "__main__":
    sys.exit(main())
