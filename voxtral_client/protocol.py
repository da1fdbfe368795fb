"""Constants of the realtime protocol (vLLM 0.32.0 with Voxtral Mini 4B Realtime 2602). This module imports nothing."""

RATE = 16_000  # samples a second, mono PCM16: the model accepts no other rate
FRAME = 1280  # samples of audio that one delta transcribes: 80 ms
DEFAULT_URL = "ws://localhost:8000/v1/realtime"
