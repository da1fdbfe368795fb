"""The mel spectrogram and the two convolutions are computed for all frames of a step at once, on a GPU as one graph.

vLLM: `VoxtralRealtimeGeneration.embed_multimodal` handles one frame after the other, with about 28 small kernels each.
It puts the results into a cache, from which the same step gathers them one by one.
Cost: 0.12 to 0.18 ms a session and step, a third of the engine's main thread with 32 live streams on an H100. As a
batch without the graph and with the cache it is a fifth with 128 streams.
Relies on: frames of equal length. All frames but a session's first have it; frames of another length are a separate
batch. If each request of a step on a GPU is one frame of a session, the frame is written directly into the model's
input. That relies on a frame being used in the step that encodes it, which `release` and `ended` ensure.
Unnecessary with: a batched `embed_multimodal` in vLLM (no issue known).
"""

from voxtral_int4 import is_voxtral_realtime

from . import active, expect, logger

CHECKED = {
    "vllm.model_executor.models.voxtral_realtime:VoxtralRealtimeGeneration.embed_multimodal": "f90a7704ed77",
    "vllm.model_executor.models.voxtral:VoxtralEncoderModel.compute_whisper_melspec": "48e3cfb17880",
    "vllm.model_executor.models.whisper_causal:WhisperCausalEncoder.forward_conv": "ffaf5c13b146",
}
IN_FLIGHT = 4  # copies to the GPU that may run at once; vLLM has at most two steps in flight


def apply_to_engine() -> None:
    """Encode frames as a batch, and on a GPU by `encode_on_gpu`. Raises Unexpected."""
    from vllm.model_executor.models.voxtral_realtime import VoxtralRealtimeGeneration
    from vllm.platforms import current_platform

    embed = VoxtralRealtimeGeneration.embed_multimodal

    def embed_multimodal(self, **kwargs):
        import torch

        audio = kwargs.get("audio_arrays")
        if isinstance(audio, torch.Tensor) and audio.ndim == 2:
            return list(embed_batch(self, audio).unbind(0))
        if not isinstance(audio, list) or not all(isinstance(frame, torch.Tensor) for frame in audio):
            return embed(self, **kwargs)
        embedded: list[torch.Tensor | None] = [None] * len(audio)
        lengths: dict[int, list[int]] = {}
        for number, frame in enumerate(audio):
            lengths.setdefault(len(frame), []).append(number)
        for numbers in lengths.values():
            batch = embed_batch(self, torch.stack([audio[number] for number in numbers]))
            for number, tokens in zip(numbers, batch, strict=True):
                embedded[number] = tokens
        return embedded

    VoxtralRealtimeGeneration.embed_multimodal = embed_multimodal
    if not current_platform.is_cpu() and active("release"):
        encode_on_gpu()


def embed_batch(model, audio):
    """Return the embeddings of `audio`, (frames, samples), as (frames, tokens, width)."""
    from torch.nn.functional import gelu

    whisper = model.whisper_encoder
    mel = whisper.compute_whisper_melspec(audio).to(whisper.dtype)
    mel = mel[..., mel.shape[-1] % 2 :]
    encoder = whisper.whisper_encoder
    hidden = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).transpose(-1, -2)
    pool = model.config.audio_config.block_pool_size
    hidden = hidden[:, hidden.shape[1] % pool :]
    frames, length, width = hidden.shape
    return hidden.reshape(frames, length // pool, width * pool)


def encode_on_gpu() -> None:
    """Encode steps of single frames directly into the model's input. Raises Unexpected."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    expect("vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs_embeds", "46f7bf9ab2a9")
    expect("vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model", "bad5e0346103")
    prepare, capture = DefaultModelState.prepare_inputs_embeds, GPUModelRunner.capture_model

    def prepare_directly(self, scheduled_encoder_inputs, input_batch, req_states):
        encoder = self.__dict__.get("frame_encoder")
        audio = encoder and single_frames(self.encoder_cache.mm_features, scheduled_encoder_inputs, input_batch)
        if not audio or len(audio[0]) != encoder.samples:
            return prepare(self, scheduled_encoder_inputs, input_batch, req_states)
        inputs = self.encoder_runner.inputs_embeds
        inputs[: len(audio)] = encoder(audio)
        return inputs[: input_batch.num_tokens_after_padding]

    def capture_and_more(self, *, profile_only=False):
        size = capture(self, profile_only=profile_only)
        if not profile_only and is_voxtral_realtime(self.model_config):
            self.model_state.frame_encoder = frame_encoder(self)
        return size

    DefaultModelState.prepare_inputs_embeds = prepare_directly
    GPUModelRunner.capture_model = capture_and_more


def frame_encoder(runner) -> "FrameEncoder | None":
    """Return the encoder for a worker, or None: it needs memory when vLLM has already reserved its share."""
    try:
        return FrameEncoder(runner.get_model(), runner.max_num_reqs, runner.device)
    except Exception as error:  # the server works without it
        logger.warning("frames are encoded without CUDA graphs: %s", str(error).partition("\n")[0])
        return None


def single_frames(features: dict, scheduled: dict[str, list[int]], batch) -> list | None:
    """Return the audio of a step's requests, one tensor (samples,) each, in the batch's order.

    Return None if a request is not exactly one new frame, or if the frames differ in length.
    """
    if not len(scheduled) == len(batch.req_ids) == batch.num_tokens:
        return None
    numbers = [scheduled.get(request, ()) for request in batch.req_ids]
    if any(len(new) != 1 for new in numbers):
        return None
    data = [features[request][number].data for request, (number,) in zip(batch.req_ids, numbers, strict=True)]
    if any(item is None for item in data):
        return None
    audio = [item["audio_arrays"].data for item in data]
    return audio if len({len(frame) for frame in audio}) == 1 else None


class FrameEncoder:
    """Mel and convolutions of up to `most` frames, captured as CUDA graphs."""

    def __init__(self, model, most: int, device):
        """Capture a graph for each size of batch, which takes about 20 ms. Raises RuntimeError: no memory."""
        import torch
        from vllm.utils.platform_utils import is_pin_memory_available

        audio = model.audio_config
        # A frame is 80 ms of audio plus the look-back and look-ahead of streaming.
        milliseconds = 1000 / audio.frame_rate + audio.streaming_look_back_ms + audio.streaming_look_ahead_ms
        self.samples = round(audio.sampling_rate * milliseconds / 1000)
        dtype = model.whisper_encoder.dtype
        self._sizes = [size for size in (1, 2, 4, 8) if size < most] + [*range(16, most, 16), most]
        pin = is_pin_memory_available()  # WSL2 may have none; copies to the GPU then wait
        self._pinned = [torch.zeros(most, self.samples, dtype=dtype, pin_memory=pin) for _ in range(IN_FLIGHT)]
        self._turn = 0
        self._input = torch.zeros(most, self.samples, dtype=dtype, device=device)
        self._graphs, pool = {}, None
        with torch.inference_mode():
            for size in reversed(self._sizes):
                stream = torch.cuda.Stream(device)
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    for _ in range(2):  # plans of the Fourier transform and convolutions are made outside the graph
                        embed_batch(model, self._input[:size])
                torch.cuda.current_stream(device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    output = embed_batch(model, self._input[:size])[:, 0]
                pool = pool or graph.pool()
                self._graphs[size] = graph, output
        logger.info("Captured %d graphs of mel and convolutions", len(self._graphs))

    def __call__(self, audio: list):
        """Return the embeddings (frames, width) of `audio`: for each frame a tensor (samples,) on the CPU."""
        import torch

        count = len(audio)
        size = next(size for size in self._sizes if size >= count)
        self._turn = (self._turn + 1) % IN_FLIGHT
        pinned = self._pinned[self._turn][:count]
        torch.stack(audio, out=pinned)
        self._input[:count].copy_(pinned, non_blocking=True)
        graph, output = self._graphs[size]
        graph.replay()
        return output[:count]
