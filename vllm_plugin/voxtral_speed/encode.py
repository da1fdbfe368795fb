"""The mel spectrogram and the two convolutions are computed for all frames of a step at once.

vLLM: `VoxtralRealtimeGeneration.embed_multimodal` does it for one frame after the other: some 28 small kernels each.
Cost: 0.12 to 0.18 ms a session and step; a third of the engine's main thread with 32 live streams on an H100.
Relies on: frames of equal length, which are all but a session's first; those of another length make a batch of their
own.
Needless with: a batched `embed_multimodal` in vLLM (no issue known).
"""

from . import expect

EMBED, MELSPEC, CONV = "f90a7704ed77", "48e3cfb17880", "ffaf5c13b146"


def apply_to_engine() -> None:
    """Raises Unexpected."""
    import torch
    from torch import nn
    from vllm.model_executor.models.voxtral import VoxtralEncoderModel
    from vllm.model_executor.models.voxtral_realtime import VoxtralRealtimeGeneration
    from vllm.model_executor.models.whisper_causal import WhisperCausalEncoder

    expect(VoxtralRealtimeGeneration.embed_multimodal, EMBED)
    expect(VoxtralEncoderModel.compute_whisper_melspec, MELSPEC)
    expect(WhisperCausalEncoder.forward_conv, CONV)
    embed = VoxtralRealtimeGeneration.embed_multimodal

    def embed_batch(self, audio: torch.Tensor) -> list[torch.Tensor]:
        """Embed `audio`, (frames, samples), as (tokens, width) each."""
        whisper = self.whisper_encoder
        mel = whisper.compute_whisper_melspec(audio).to(whisper.dtype)
        mel = mel[..., mel.shape[-1] % 2 :]
        encoder = whisper.whisper_encoder
        hidden = nn.functional.gelu(encoder.conv1(mel))
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(-1, -2)
        pool = self.config.audio_config.block_pool_size
        hidden = hidden[:, hidden.shape[1] % pool :]
        frames, length, width = hidden.shape
        return list(hidden.reshape(frames, length // pool, width * pool).unbind(0))

    def embed_multimodal(self, **kwargs):
        audio = kwargs.get("audio_arrays")
        if isinstance(audio, torch.Tensor) and audio.ndim == 2:
            return embed_batch(self, audio)
        if not isinstance(audio, list) or not all(isinstance(frame, torch.Tensor) for frame in audio):
            return embed(self, **kwargs)
        embedded: list[torch.Tensor | None] = [None] * len(audio)
        lengths: dict[int, list[int]] = {}
        for number, frame in enumerate(audio):
            lengths.setdefault(len(frame), []).append(number)
        for numbers in lengths.values():
            for number, tokens in zip(
                numbers, embed_batch(self, torch.stack([audio[n] for n in numbers])), strict=True
            ):
                embedded[number] = tokens
        return embedded

    VoxtralRealtimeGeneration.embed_multimodal = embed_multimodal
