"""The INT4 plugin, through vLLM's own loader: every weight of the model against its checkpoint.

vLLM runs in child processes (this file, run with the name of a function), because it changes too
much of the process it is imported in to share one with other tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest

HERE = Path(__file__).parent
PLUGIN = HERE.parent / "vllm_plugin"
NF4_ERROR = 0.12  # relative; measured 0.09 to 0.10, and above 1 for rows in the wrong order

SERVER = "needs the server's packages: ./setup.sh"
torch = pytest.importorskip("torch", reason=SERVER)
safetensors = pytest.importorskip("safetensors.torch", reason=SERVER)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=SERVER)]


# In the child processes

MISTRAL = {"tokenizer_mode": "mistral", "config_format": "mistral", "load_format": "mistral"}


def new_config(model: str, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model, quantization="bitsandbytes", dtype="bfloat16", max_model_len=1024, **options
    ).create_engine_config()


def load(config, loader) -> dict[str, torch.Tensor]:
    """All parameters as loaded, the quantized ones as float32: with NF4's error, in a type no other has.

    Taken before vLLM packs them: how it does, and what it leaves in their place, depends on the CPU
    (AMX, AVX-512 BF16; `dispatch_cpu_unquantized_gemm` in vllm/model_executor/layers/utils.py).
    """
    from bitsandbytes.functional import dequantize_4bit
    from vllm.config import set_current_vllm_config

    weights = {}

    def note(model, *_) -> None:
        for name, parameter in model.named_parameters():
            weights[name] = parameter.data.clone()
            if states := getattr(parameter, "bnb_quant_state", None):
                packed = parameter.data.split(parameter.bnb_shard_offsets.diff().tolist())
                parts = [dequantize_4bit(p, states[i]) for i, p in enumerate(packed)]
                weights[name] = torch.cat(parts).float()

    instead = mock.patch("vllm.model_executor.model_loader.base_loader.process_weights_after_loading", note)
    # vLLM's CPU worker, too, does without empty_cache: PyTorch raises where there is no accelerator.
    with set_current_vllm_config(config), mock.patch("torch.accelerator.empty_cache"), instead:
        loader.load_model(config, config.model_config)
    return weights


def save_llama(folder: str) -> None:
    """A model of random weights in the format of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).to(torch.bfloat16).save_pretrained(folder)


def load_models(voxtral: str, out: str) -> None:
    """Voxtral with and without its encoder in INT4, and another model by this loader and by the parent."""
    import voxtral_int4
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.models import voxtral as vllm_voxtral
    from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

    config = new_config(voxtral, **MISTRAL)
    voxtral_int4.register()  # vLLM may call it again; what it has registered stays
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{out}/rendezvous", 0, "gloo")
        initialize_model_parallel(1)
    sizes = {}  # of all that vLLM loads, after it has added the key biases it misses
    add_biases = vllm_voxtral._create_fake_bias_for_k_proj

    def note_sizes(weights, *args):
        for name, weight in add_biases(weights, *args):
            sizes[name] = weight.shape
            yield name, weight

    with mock.patch.object(vllm_voxtral, "_create_fake_bias_for_k_proj", note_sizes):
        weights = load(config, get_model_loader(config.load_config))
    key_biases = [name for name in sizes if name.endswith(".wk.bias")]
    assert key_biases and all(sizes[name] == sizes[name.replace(".wk.", ".wq.")] for name in key_biases)
    safetensors.save_file(weights, f"{out}/int4.safetensors")

    config = new_config(voxtral, **MISTRAL)
    with mock.patch.dict(os.environ, VOXTRAL_INT4_ENCODER="0"):
        before = config.compute_hash()
        weights = load(config, get_model_loader(config.load_config))
        assert config.compute_hash() != before, "the graphs compiled for the two would be confused"
    safetensors.save_file(weights, f"{out}/decoder_only.safetensors")

    refuse_to_load(voxtral)
    save_llama(f"{out}/llama")
    # Unknown versions must not keep any other model from loading.
    with mock.patch("voxtral_int4.version", return_value="9.9"):
        for name, make in ("llama", get_model_loader), ("llama_by_parent", BitsAndBytesModelLoader):
            config = new_config(f"{out}/llama", skip_tokenizer_init=True)
            loader = make(config.load_config)
            weights = load(config, loader)
            assert getattr(loader, "voxtral", None) is None  # not taken for one
            safetensors.save_file(weights, f"{out}/{name}.safetensors")
            print(name, "loaded by", type(loader).__name__)


def one_product(voxtral: str, out: str) -> None:
    """Voxtral as the engine loads it with `products` and `conditioning`, against the plugin's own code."""
    import voxtral_int4
    from bitsandbytes.functional import dequantize_4bit
    from torch.utils._python_dispatch import TorchDispatchMode
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import base_loader, get_model_loader
    from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod
    from voxtral_speed import conditioning, products

    class Products(TorchDispatchMode):
        """Counts the products of a step."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.bitsandbytes.gemm_4bit.default
            assert "apply_bnb_4bit" not in str(func)
            return func(*args, **(kwargs or {}))

    config = new_config(voxtral, **MISTRAL)
    voxtral_int4.register()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{out}/rendezvous_products", 0, "gloo")
        initialize_model_parallel(1)
    before = config.compute_hash()
    products.apply_to_engine()
    conditioning.apply_to_engine()
    process, parents = base_loader.process_weights_after_loading, {}
    torch.manual_seed(0)

    def note(model, *args) -> None:
        delay = torch.full((1,), model.n_delay_tokens, dtype=torch.bfloat16)
        embedded = model.time_embedding(delay)
        parents["time"] = []
        for layer in model.language_model.model.layers:
            first, gelu, last = layer.ada_rms_norm_t_cond
            inner = torch.nn.functional.linear(embedded, first.weight.data)
            parents["time"].append(torch.nn.functional.linear(gelu(inner), last.weight.data))
        for name, layer in model.named_modules():
            if isinstance(getattr(layer, "quant_method", None), products.OneProduct):
                weight = layer.weight
                parts = weight.data.split(weight.bnb_shard_offsets.diff().tolist())
                whole = torch.cat([dequantize_4bit(p, weight.bnb_quant_state[i]) for i, p in enumerate(parts)])
                x = torch.randn(3, whole.shape[1], dtype=torch.bfloat16)
                product = BitsAndBytesLinearMethod.apply(layer.quant_method, layer, x, layer.bias)
                parents[name] = (len(parts), whole, x, product)
        process(model, *args)

    instead = mock.patch.object(base_loader, "process_weights_after_loading", note)
    with set_current_vllm_config(config), mock.patch("torch.accelerator.empty_cache"), instead:
        model = get_model_loader(config.load_config).load_model(config, config.model_config)
    assert config.compute_hash() != before, "the graphs compiled for the two would be confused"
    for layer, value in zip(model.language_model.model.layers, parents.pop("time"), strict=True):
        assert error(layer.ada_rms_norm_t_cond(None), value) < 0.01
    with torch.inference_mode():
        for name, (parts, whole, x, product) in parents.items():
            layer = model.get_submodule(name)
            assert not hasattr(layer.weight, "bnb_quant_state"), "the scales are held twice"
            packed = torch.ops.bitsandbytes.dequantize_4bit(
                layer.weight, layer.absmax, 64, "nf4", layer.shape, torch.bfloat16
            )
            assert torch.equal(packed, whole), name
            with Products() as step:
                mine = layer.quant_method.apply(layer, x, layer.bias)
            assert step.count == 1, name
            if parts == 1 and layer.bias is None:
                assert torch.equal(mine, product), name  # the same arithmetic
            assert error(mine, product) < 0.01, name  # another order of additions, one rounding less
    print("one product:", len(parents), sorted({parts for parts, *_ in parents.values()}))


def refuse_to_load(voxtral: str) -> None:
    """The second check, in another vLLM, which would not have asked for the first."""
    from vllm.model_executor.model_loader import get_model_loader

    with mock.patch("voxtral_int4.version", lambda name: "0.33.0+cpu" if name == "vllm" else version(name)):
        with mock.patch("voxtral_int4.loader.check_versions"):
            config = new_config(voxtral, **MISTRAL)
        try:
            get_model_loader(config.load_config).load_weights(None, config.model_config)
        except RuntimeError as refusal:
            print("refused:", refusal)


# In the test's process


def child(*command, path=()) -> subprocess.CompletedProcess:
    """Run a command of Python with the plugin of this tree and no way to any hub."""
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, path), str(PLUGIN), os.getenv("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return Path(os.getenv("TINY_CHECKPOINT") or HERE / "tiny_checkpoint").resolve()


@pytest.fixture(scope="module")
def loaded(checkpoint, tmp_path_factory) -> Path:
    """A folder with the parameters of the four loaded models."""
    out = tmp_path_factory.mktemp("loaded")
    voxtral = out / "voxtral"
    voxtral.mkdir()
    for file in checkpoint.iterdir():
        (voxtral / file.name).symlink_to(file)
    # As in the published repository, but garbage: what is read from it cannot pass for a weight.
    garbage = {
        name: torch.full_like(w, 1e4)
        for name, w in safetensors.load_file(checkpoint / "consolidated.safetensors").items()
    }
    safetensors.save_file(garbage, voxtral / "model.safetensors")

    result = child(__file__, "load_models", voxtral, out)
    assert result.returncode == 0, result.stderr[-5000:]
    (out / "stdout").write_text(result.stdout)
    assert "llama loaded by VoxtralInt4Loader" in result.stdout
    return out


@pytest.fixture(scope="module")
def expected(checkpoint) -> dict[str, torch.Tensor]:
    """What each parameter of vLLM's model should hold, from the names in the checkpoint."""
    shape = json.loads((checkpoint / "params.json").read_text())
    encoder_layers = shape["multimodal"]["whisper_model_args"]["encoder_args"]["n_layers"]
    w = safetensors.load_file(checkpoint / "consolidated.safetensors")
    audio = "mm_streams_embeddings.embedding_module"
    whisper = f"{audio}.whisper_encoder"
    out = {
        "language_model.model.embed_tokens.weight": w[f"{audio}.tok_embeddings.weight"],
        "language_model.model.norm.weight": w["norm.weight"],
        "audio_language_adapter.w_in.weight": w[f"{audio}.audio_language_projection.0.weight"],
        "audio_language_adapter.w_out.weight": w[f"{audio}.audio_language_projection.2.weight"],
        "whisper_encoder.whisper_encoder.layer_norm.weight": w[f"{whisper}.transformer.norm.weight"],
    }
    for conv in 0, 1:
        for kind in "weight", "bias":
            there = f"{whisper}.conv_layers.{conv}.conv.{kind}"
            out[f"whisper_encoder.whisper_encoder.conv{conv + 1}.{kind}"] = w[there]

    def layer(there: str, here: str, heads: tuple[int, int], names: tuple[str, str, str]) -> None:
        wo, norm, ffn_norm = names
        wq, wk, wv = (w[f"{there}.attention.{x}.weight"] for x in ("wq", "wk", "wv"))
        if heads != (0, 0):
            wq, wk = halves(wq, heads[0]), halves(wk, heads[1])
        out[f"{here}.self_attn.qkv_proj.weight"] = torch.cat([wq, wk, wv])
        out[f"{here}.self_attn.{wo}.weight"] = w[f"{there}.attention.wo.weight"]
        w1, w2, w3 = (w[f"{there}.feed_forward.{x}.weight"] for x in ("w1", "w2", "w3"))
        out[f"{here}.mlp.gate_up_proj.weight"] = torch.cat([w1, w3])
        out[f"{here}.mlp.down_proj.weight"] = w2
        out[f"{here}.{norm}.weight"] = w[f"{there}.attention_norm.weight"]
        out[f"{here}.{ffn_norm}.weight"] = w[f"{there}.ffn_norm.weight"]

    for i in range(shape["n_layers"]):
        there, here = f"layers.{i}", f"language_model.model.layers.{i}"
        names = ("o_proj", "input_layernorm", "post_attention_layernorm")
        layer(there, here, (shape["n_heads"], shape["n_kv_heads"]), names)
        for k in 0, 2:
            out[f"{here}.ada_rms_norm_t_cond.{k}.weight"] = w[f"{there}.ada_rms_norm_t_cond.{k}.weight"]
    for i in range(encoder_layers):
        there = f"{whisper}.transformer.layers.{i}"
        here = f"whisper_encoder.whisper_encoder.layers.{i}"
        layer(there, here, (0, 0), ("out_proj", "self_attn_layer_norm", "final_layer_norm"))
        bq, bv = w[f"{there}.attention.wq.bias"], w[f"{there}.attention.wv.bias"]
        out[f"{here}.self_attn.qkv_proj.bias"] = torch.cat([bq, torch.zeros_like(bq), bv])
        out[f"{here}.self_attn.out_proj.bias"] = w[f"{there}.attention.wo.bias"]
        out[f"{here}.mlp.down_proj.bias"] = w[f"{there}.feed_forward.w2.bias"]
    return out


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Mistral's rotary pairs are rows 0 and 1, 2 and 3, …; vLLM wants them half a head apart."""
    return torch.cat([torch.cat([head[0::2], head[1::2]]) for head in weight.chunk(heads)])


def error(actual: torch.Tensor, right: torch.Tensor) -> float:
    right = right.float()
    return ((actual.float() - right).norm() / right.norm()).item()


def equal(actual: torch.Tensor, right: torch.Tensor) -> bool:
    """The same values; vLLM fills the embeddings up with rows of zeros to a multiple of 64 tokens."""
    rows = len(right)
    return torch.equal(actual[:rows], right) and not actual[rows:].any()


def quantized(weights: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in weights.items() if weight.dtype == torch.float32}


def linear(names, start: str) -> set[str]:
    return {n for n in names if n.startswith(start) and n.endswith("_proj.weight")}


def test_decoder_and_encoder_are_quantized_and_nothing_else(loaded, expected):
    weights = safetensors.load_file(loaded / "int4.safetensors")
    assert set(weights) == set(expected)
    decoder, encoder = linear(expected, "language_model."), linear(expected, "whisper_encoder.")
    assert decoder and encoder
    assert quantized(weights) == decoder | encoder


def test_quantized_weights_are_the_checkpoints(loaded, expected):
    weights = safetensors.load_file(loaded / "int4.safetensors")
    errors = {name: error(weights[name], expected[name]) for name in quantized(weights)}
    print({name: round(e, 4) for name, e in errors.items()})
    assert max(errors.values()) < NF4_ERROR
    assert min(errors.values()) > 0.01  # below that they were not quantized at all


def test_rows_in_another_order_would_show(loaded, expected, checkpoint):
    weights = safetensors.load_file(loaded / "int4.safetensors")
    for name in quantized(weights):
        assert error(weights[name], expected[name].roll(1, 0)) > 0.5, name
    plain = safetensors.load_file(checkpoint / "consolidated.safetensors")
    for w, rows in ("wq", slice(None)), ("wk", slice(len(plain["layers.0.attention.wq.weight"]), None)):
        unpermuted = plain[f"layers.0.attention.{w}.weight"]
        here = weights["language_model.model.layers.0.self_attn.qkv_proj.weight"][rows][: len(unpermuted)]
        assert error(here, unpermuted) > 0.5, w


def test_everything_else_is_bf16_and_equal(loaded, expected):
    """Embeddings, norms, adapter, ada_rms_norm_t_cond, convolutions, and biases: zero for the keys."""
    weights = safetensors.load_file(loaded / "int4.safetensors")
    for name in set(weights) - quantized(weights):
        assert weights[name].dtype == torch.bfloat16, name
        assert equal(weights[name], expected[name]), name


def test_encoder_stays_bf16_if_asked(loaded, expected):
    weights = safetensors.load_file(loaded / "decoder_only.safetensors")
    assert set(weights) == set(expected)
    assert quantized(weights) == linear(expected, "language_model.")
    for name in set(weights) - quantized(weights):
        assert equal(weights[name], expected[name]), name
    assert max(error(weights[name], expected[name]) for name in quantized(weights)) < NF4_ERROR


def test_another_model_gets_the_parents_code(loaded):
    here = safetensors.load_file(loaded / "llama.safetensors")
    parents = safetensors.load_file(loaded / "llama_by_parent.safetensors")
    assert quantized(here) == linear(here, "model.layers.") != set()
    assert set(here) == set(parents)
    for name, weight in here.items():
        assert torch.equal(weight, parents[name]), name
    there = safetensors.load_file(loaded / "llama/model.safetensors")
    right = there["model.layers.1.mlp.down_proj.weight"]
    assert error(here["model.layers.1.mlp.down_proj.weight"], right) < NF4_ERROR


def test_one_product_a_layer(loaded):
    """Four products for each of the six layers, two of them of three and two weights; the values are the plugin's."""
    result = child(__file__, "one_product", loaded / "voxtral", loaded)
    assert result.returncode == 0, result.stderr[-5000:]
    assert "one product: 24 [1, 2, 3]" in result.stdout


SERVE = ["-m", "vllm.entrypoints.cli.main", "serve", "--quantization", "bitsandbytes"]


NEEDS = "INT4 for Voxtral Realtime needs vllm 0.32.0, vllm-bnb-plugin 0.0.3"


def test_unknown_version_ends_in_one_clear_line(checkpoint, tmp_path):
    info = tmp_path / "vllm_bnb_plugin-0.0.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-bnb-plugin\nVersion: 0.0.4\n")
    result = child(*SERVE, checkpoint, path=[tmp_path])
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"RuntimeError: {NEEDS}")
    assert "vllm-bnb-plugin 0.0.4" in last and "setup.sh" in last


def test_unknown_version_is_noticed_once_more_before_weights_are_read(loaded):
    (line,) = [line for line in (loaded / "stdout").read_text().splitlines() if line.startswith("refused: ")]
    assert line.startswith(f"refused: {NEEDS}")
    assert "finds vllm 0.33.0" in line and "setup.sh" in line


def test_dependencies_are_the_versions_that_are_checked():
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    source = (PLUGIN / "voxtral_int4/__init__.py").read_text()
    for pin in project["dependencies"]:
        name, version = pin.split("==")
        if name == "voxtral-at-home":  # ours, of the same version: tests/test_setup.py
            assert version == project["version"]
        else:
            assert f'"{name}": "{version}"' in source


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
