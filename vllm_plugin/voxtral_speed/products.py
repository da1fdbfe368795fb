"""q, k and v of a layer are one NF4 product, gate and up too. The bias is added inside.

vllm-bnb-plugin (quantization/linear.py): each of them is a product of its own, into a buffer that is then copied into
the output, in an operator that changes its argument, so that torch.compile can fuse nothing with it: about 14 kernels
a layer. Every product passes bitsandbytes' autograd code too.
Cost: on an H100, with `conditioning` and in the encoder alone, a seventh of the throughput with one session, a fifth
with eight.
Relies on: blocks of NF4 lie within rows, so the packed rows of q, k and v already are one weight; its scales are the
scales of q, k and v in this order. The weights are the same bit for bit. Other kinds of layers keep the plugin's code.
Unnecessary with: merged products in vllm-bnb-plugin (no issue known).
"""

import torch
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod
from voxtral_int4 import is_voxtral_realtime
from voxtral_int4.loader import VoxtralInt4Config, VoxtralInt4Loader

from . import new_graphs

CHECKED = {
    "voxtral_int4.loader:VoxtralInt4Config.get_quant_method": "47e28efec572",
    "vllm_bnb_plugin.quantization.linear:BitsAndBytesLinearMethod": "d223f50188d4",
}


@register_weight_loader_v2_supported_method
class OneProduct(BitsAndBytesLinearMethod):
    """The parent's method with one product a layer. Its weights are loaded as the parent's."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Join the scales. The parent's quant states, which hold them too, are dropped."""
        states = getattr(layer.weight, "bnb_quant_state", None)
        states = [states[number] for number in sorted(states)] if isinstance(states, dict) else []
        columns = {state.shape[1] for state in states if len(state.shape) == 2}
        kinds = {(state.quant_type, state.blocksize, state.nested) for state in states}
        if len(columns) != 1 or kinds != {("nf4", 64, False)} or min(columns) % 64:
            return
        layer.shape = [sum(state.shape[0] for state in states), min(columns)]
        layer.register_buffer("absmax", torch.cat([state.absmax for state in states]), persistent=False)
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (..., columns) times the weight, plus the bias: (..., rows)."""
        if not hasattr(layer, "absmax"):
            return super().apply(layer, x, bias)
        return torch.ops.bitsandbytes.gemm_4bit(x, layer.weight, layer.shape, layer.absmax, 64, "nf4", bias)


def apply_to_engine() -> None:
    """Give the layers of Voxtral Realtime this method."""
    get_method, create = VoxtralInt4Config.get_quant_method, VoxtralInt4Loader.create_model
    new_graphs("products")

    def create_model(self, vllm_config, model_config, prefix=""):
        # Noted here: while the decoder is created, the current configuration is that of a text model.
        ours = is_voxtral_realtime(model_config) and model_config.dtype == torch.bfloat16
        vllm_config.quant_config.one_product = ours
        return create(self, vllm_config, model_config, prefix)

    def get_quant_method(self, layer, prefix):
        method = get_method(self, layer, prefix)
        ours = getattr(self, "one_product", False) and not self.load_in_8bit
        return OneProduct(self) if ours and type(method) is BitsAndBytesLinearMethod else method

    VoxtralInt4Loader.create_model = create_model
    VoxtralInt4Config.get_quant_method = get_quant_method
