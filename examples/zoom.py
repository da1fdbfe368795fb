"""Captions in a Zoom meeting: `python stream_microphone.py | python examples/zoom.py CAPTION_URL [LANGUAGE]`.

The host copies the URL in the meeting's caption settings. Zoom numbers the captions; a number is sent until it arrives.
"""

import codecs
import signal
import sys
import time
import urllib.request

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C ends the microphone, whose last words are still to come
if len(sys.argv) not in (2, 3):
    print(__doc__, file=sys.stderr)
    sys.exit(2)
url, language = [*sys.argv[1:], "en-US"][:2]


def ask(url: str, text: str | None = None) -> bytes | None:
    """Return the answer; None after five failures."""
    for _ in range(5):
        try:
            request = urllib.request.Request(url, text and text.encode(), {"Content-Type": "text/plain; charset=utf-8"})
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.read()
        except (OSError, ValueError) as error:
            print(f"zoom: {error}", file=sys.stderr)
            time.sleep(1)


sent = ask(url.replace("?", "/seq?", 1))
if sent is None:
    sys.exit("error: Zoom does not accept captions at this URL: has the meeting begun?")
number, decoder = int(sent or 0) + 1, codecs.getincrementaldecoder("utf-8")()
while chunk := sys.stdin.buffer.read1(4096):  # the words that came while the last ones were sent
    text = decoder.decode(chunk)
    if text.strip() and ask(f"{url}&seq={number}&lang={language}", text) is not None:
        number += 1
