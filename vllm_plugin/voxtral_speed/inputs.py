"""A frame's input for the engine is built directly.

vLLM: each frame passes through the complete multimodal processor (tokens, Hugging Face's processor, hashes,
placeholders), in one thread for all sessions.
Cost: 0.39 ms a frame, 80 % of the API process's work.
Relies on: the processor's output for a frame is its samples in the model's dtype and one placeholder for all its tokens
(`VoxtralRealtimeMultiModalProcessor`). Samples and tokens are the same bit for bit. Identifiers are sequence numbers,
not hashes of the audio, so each of several equal frames (silence) is computed.
Unnecessary with: vllm#44364.
"""

import uuid

from voxtral_int4 import is_voxtral_realtime

CHECKED = {"vllm.entrypoints.speech_to_text.realtime.serving:OpenAIServingRealtime.transcribe_realtime": "ab4b39ac28d3"}


def apply_to_server() -> None:
    """Build the inputs of Voxtral Realtime."""
    import torch
    from vllm.entrypoints.speech_to_text.realtime import serving
    from vllm.inputs.engine import mm_input
    from vllm.multimodal import inputs

    realtime = serving.OpenAIServingRealtime
    transcribe, field = realtime.transcribe_realtime, inputs.MultiModalBatchedField()

    async def transcribe_directly(self, audio_stream, input_stream):
        config = self.model_config
        if not is_voxtral_realtime(config):
            async for prompt in transcribe(self, audio_stream, input_stream):
                yield prompt
            return
        session, number = uuid.uuid4().hex, 0
        async for prompt in self.model_cls.buffer_realtime_audio(audio_stream, input_stream, config):
            tokens, (samples, _) = prompt["prompt_token_ids"], prompt["multi_modal_data"]["audio"]
            audio = inputs.MultiModalFieldElem(data=torch.from_numpy(samples).to(config.dtype), field=field)
            item = inputs.MultiModalKwargsItem({"audio_arrays": audio})
            number += 1
            yield serving.StreamingInput(
                prompt=mm_input(
                    prompt_token_ids=tokens,
                    mm_kwargs=inputs.MultiModalKwargsItems({"audio": [item]}),
                    mm_hashes={"audio": [f"{session}-{number}"]},
                    mm_placeholders={"audio": [inputs.PlaceholderRange(offset=0, length=len(tokens))]},
                )
            )

    realtime.transcribe_realtime = transcribe_directly
