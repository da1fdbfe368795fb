"""vllm-bnb-plugin's loader, extended by the names of weights that it needs for Voxtral Realtime.

vllm-bnb-plugin 0.0.3 quantizes a weight if its name in the checkpoint is the name of a module in vLLM. Voxtral's
checkpoint has Mistral's names: without this loader its weights would stay bf16 and not fit into the packed parameters
(AssertionError in `load_qkv_weight`). Other models get the parent's code.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm_bnb_plugin.bitsandbytes import BitsAndBytesConfig
from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

from voxtral_int4 import is_voxtral_realtime, version_problem

Weight = tuple[str, str, torch.Tensor]  # name for model.load_weights, name of the vLLM module, tensor

# The encoder's linear layers: their names in consolidated.safetensors and those of the modules in
# vllm/model_executor/models/whisper_causal.py, before q, k, v and gate, up are fused.
ENCODER_WEIGHT = re.compile(
    r"mm_streams_embeddings\.embedding_module\.whisper_encoder\.transformer"
    r"\.(layers\.\d+)\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight"
)
ENCODER_MODULE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.out_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def check_versions() -> None:
    """Raise RuntimeError for untested versions, with which this loader could corrupt weights without an error."""
    if problem := version_problem():
        raise RuntimeError(problem)


class VoxtralInt4Config(BitsAndBytesConfig):
    """The parent's class with an early check of the versions. Its error is the last line that the user sees.

    vLLM calls `maybe_update_config` in the server's own process. An error while loading is raised in a worker process,
    and the tracebacks of all processes that wait for the worker follow it.
    """

    def maybe_update_config(self, *args: Any, hf_config: Any = None, **kwargs: Any) -> None:
        if is_voxtral_realtime(hf_config):
            check_versions()
        super().maybe_update_config(*args, hf_config=hf_config, **kwargs)


class VoxtralInt4Loader(BitsAndBytesModelLoader):
    """`--quantization bitsandbytes` for Voxtral Realtime in Mistral's format.

    VOXTRAL_INT4_ENCODER=0 in the environment leaves the audio encoder in bf16.
    """

    voxtral: nn.Module | None = None  # the model being loaded, if it is a Voxtral Realtime

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        if is_voxtral_realtime(model_config) and os.getenv("VOXTRAL_INT4_ENCODER") == "0":
            vllm_config.quant_config.llm_int8_skip_modules += ["whisper_encoder"]
            # The key of vLLM's cache of compiled graphs contains additional_config, but not quant_config:
            # without this, vLLM would use a graph that was compiled for the quantized encoder.
            vllm_config.additional_config["voxtral_int4_encoder"] = False
        return super().create_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        if is_voxtral_realtime(model_config):
            check_versions()  # again: another version may not call maybe_update_config
            self.voxtral = model
        super().load_weights(model, model_config)

    def _prepare_weights(self, model_name_or_path: str, revision: str | None) -> tuple[list[str], bool]:
        if self.voxtral is None:
            return super()._prepare_weights(model_name_or_path, revision)
        # The repository may also contain a model.safetensors: the same weights under other names.
        patterns = ["consolidated*.safetensors"]
        return self._get_weight_files(model_name_or_path, patterns, revision)[1], True

    def _hf_weight_iter(self, hf_weights_files: list[str], use_safetensors: bool) -> Iterable[Weight]:
        weights = super()._hf_weight_iter(hf_weights_files, use_safetensors)
        return weights if self.voxtral is None else self._voxtral_weights(weights)

    def _voxtral_weights(self, weights: Iterable[Weight]) -> Iterator[Weight]:
        """Yield all weights. Linear layers of decoder and encoder get module names, so that they are quantized."""
        for name, _, tensor in weights:
            if name.startswith("layers."):
                # This also reorders the rows of wq and wk for vLLM's rotary embedding. vLLM itself would do it after
                # quantization, on packed bytes. It does not change weights that already have vLLM's names
                # (vllm/model_executor/models/mistral.py).
                name, tensor = self.voxtral.language_model.maybe_remap_mistral(name, tensor)
                yield name, f"language_model.{name}", tensor
            elif match := ENCODER_WEIGHT.fullmatch(name):
                layer, weight = match.groups()
                yield name, f"whisper_encoder.whisper_encoder.{layer}.{ENCODER_MODULE[weight]}.weight", tensor
                if weight == "attention.wk":
                    # The checkpoint has no key bias. vLLM adds one of zeros with as many values as the weight has rows.
                    # A packed weight has one row for each two values, so that bias would have the wrong length
                    # (`_create_fake_bias_for_k_proj` in vllm/model_executor/models/whisper.py).
                    bias = f"{name.removesuffix('.weight')}.bias"
                    yield bias, bias, tensor.new_zeros(len(tensor))
            else:
                yield name, name, tensor
