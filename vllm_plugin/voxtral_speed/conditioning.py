"""The conditioning on the model's delay is computed once.

vLLM (models/mistral.py, models/voxtral_realtime.py): each step computes the embedding of the delay, and each layer of
the decoder its two small products of it. The delay is the server's, and constant.
Cost: about 100 kernels in each step.
Relies on: vLLM calls `process_weights_after_loading` of a model that has it, after that of its layers.
Unnecessary with: the same in vLLM (no issue known).
"""

import torch

from . import new_graphs

CHECKED = {
    "vllm.model_executor.model_loader.utils:process_weights_after_loading": "815c0f6b5a55",
    "vllm.model_executor.models.mistral:MistralDecoderLayer.forward": "3e31c233b1d1",
    "vllm.model_executor.models.voxtral_realtime:VoxtralRealtimeGeneration.forward": "912bed9b0453",
    "vllm.model_executor.models.voxtral_realtime:TimeEmbedding": "23e76ddc52af",
}


class Constant(torch.nn.Module):
    """Returns `value` for any input."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value


@torch.no_grad()
def make_constant(model: torch.nn.Module) -> None:
    """Replace the time embedding, and what the layers make of it, by their values."""
    weight = model.language_model.model.norm.weight
    delay = torch.full((1,), fill_value=model.n_delay_tokens, device=weight.device, dtype=weight.dtype)
    embedded = model.time_embedding(delay)
    for layer in model.language_model.model.layers:
        layer.ada_rms_norm_t_cond = Constant(layer.ada_rms_norm_t_cond(embedded))
    model.time_embedding = Constant(embedded)


def apply_to_engine() -> None:
    """Let vLLM call `make_constant`."""
    from vllm.model_executor.models.voxtral_realtime import VoxtralRealtimeGeneration

    new_graphs("conditioning")
    VoxtralRealtimeGeneration.process_weights_after_loading = make_constant
