"""The model in PyTorch: Voxtral Realtime's architecture at any size, and its streaming decoder.

Parameters have the names of the published checkpoint, so `state_dict` is the checkpoint. The sizes come from a
params.json. A position is 80 ms: four encoder frames of 20 ms, one decoder token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from words import BOS, PAD

SAMPLES = 1280  # of audio in one position
LEFT_PAD, PROMPT = 32, 39  # positions of silence before the audio; BOS, the padding and the delay
DELAY = PROMPT - 1 - LEFT_PAD


def mel_filters(warp: float = 1.0) -> Tensor:
    """Return Slaney's mel filter bank, [201 frequencies, 128 bands]. `warp` > 1 lowers a voice's formants."""

    def to_hz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))

    top = 15 + 27 * math.log(8) / math.log(6.4)
    edges = to_hz(torch.linspace(0, top, 130, dtype=torch.float64))
    frequency = torch.linspace(0, 8000, 201, dtype=torch.float64)[:, None] * warp
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (edges[2:] - edges[:-2])).float()


def log_mel(audio: Tensor, filters: Tensor) -> Tensor:
    """Return the log-mel spectrogram [batch, 128, frames] of [batch, samples], without normalisation by utterance."""
    window = torch.hann_window(400, device=audio.device)
    spectrum = torch.stft(audio, 400, 160, window=window, return_complex=True)[..., :-1]
    power = spectrum.real.square() + spectrum.imag.square()
    return (torch.log10((filters.mT @ power).clamp(min=10**-6.5)) + 4) / 4


NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
       0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip


def nf4(weight: Tensor) -> Tensor:
    """Return a weight as bitsandbytes rounds it: 4 bits a value, one scale for 64. The gradient passes unchanged."""
    levels = torch.tensor(NF4, device=weight.device)
    blocks = weight.detach().float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    quantized = (levels[codes] * scale).reshape(weight.shape).to(weight.dtype)
    return weight + (quantized - weight).detach()


class Linear(nn.Linear):
    quantized = False  # set on instances to train or run with NF4 weights

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, nf4(self.weight) if self.quantized else self.weight, self.bias)


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight.to(x.dtype)


def rotary(positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = positions[:, None].float() * 1e6 ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    (cos, sin), (a, b) = turn, x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Return causal attention to the last `window` positions, [batch, heads, length, dim].

    It is computed in blocks, so that the cost grows linearly with length.
    """
    batch, heads, length, _ = q.shape
    window, full = min(window, length), window
    blocks = -(-length // window)
    pad = blocks * window - length

    def block(x: Tensor) -> Tensor:
        return x.unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)

    def with_previous(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, window, pad))
        return torch.cat((block(x[:, :, :-window]), block(x[:, :, window:])), 2)

    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    allowed = (column <= row + window) & (column > row + window - full)
    first = allowed & (column >= window)
    mask = torch.cat((first[None], allowed.expand(blocks - 1, -1, -1)))[:, None].repeat(batch, 1, 1, 1)
    repeat = heads // k.shape[1]
    k, v = (with_previous(x).repeat_interleave(repeat, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(block(F.pad(q, (0, 0, 0, pad))), k, v, attn_mask=mask)
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


class Cache:
    """Keys and values of the last `window` positions of one layer, in a ring buffer."""

    def __init__(self, window: int) -> None:
        self.window, self.position = window, 0
        self.keys = self.values = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keys is None:
            shape = (*k.shape[:2], self.window, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        slot = self.position % self.window
        self.keys[:, :, slot], self.values[:, :, slot] = k[:, :, 0], v[:, :, 0]
        self.position += 1
        held = min(self.position, self.window)
        repeat = q.shape[1] // k.shape[1]
        k, v = (x[:, :, :held].repeat_interleave(repeat, 1) for x in (self.keys, self.values))
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, window: int, biases: bool) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.wq = Linear(dim, heads * head_dim, bias=biases)
        self.wk = Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = Linear(dim, kv_heads * head_dim, bias=biases)
        self.wo = Linear(heads * head_dim, dim, bias=biases)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Cache | None = None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turn), rotate(k, turn)
        out = cache.attend(q, k, v) if cache else windowed_attention(q, k, v, self.window)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, biases: bool) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, p: dict, time_dim: int | None = None) -> None:
        super().__init__()
        dim, biases = p["dim"], p["use_biases"]
        self.attention_norm, self.ffn_norm = Norm(dim), Norm(dim)
        self.attention = Attention(dim, p["n_heads"], p["n_kv_heads"], p["head_dim"], p["sliding_window"], biases)
        self.feed_forward = FeedForward(dim, p["hidden_dim"], biases)
        if time_dim:
            self.ada_rms_norm_t_cond = nn.Sequential(
                nn.Linear(dim, time_dim, bias=False), nn.GELU(), nn.Linear(time_dim, dim, bias=False)
            )

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], time: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, cache)
        h = self.ffn_norm(x)
        if time is not None:
            h = h * (1 + self.ada_rms_norm_t_cond(time))
        return x + self.feed_forward(h)


class Encoder(nn.Module):
    def __init__(self, p: dict) -> None:
        super().__init__()
        dim = p["dim"]
        self.head_dim = p["head_dim"]
        channels = ((128, dim, 1), (dim, dim, 2))
        self.conv_layers = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv1d(a, b, 3, stride)}) for a, b, stride in channels
        )
        self.transformer = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(p) for _ in range(p["n_layers"])), "norm": Norm(dim)}
        )

    def convolve(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv_layers[0].conv(F.pad(mel, (2, 0))))
        return F.gelu(self.conv_layers[1].conv(F.pad(x, (1, 0)))).mT

    def forward(self, first: Tensor, later: Tensor, offset: Tensor | int = 0) -> Tensor:
        """Return [batch, frames, dim]. `first` and `later`: mel frames of the first chunk, and of later ones."""
        start = self.convolve(first)
        x = torch.cat((start, self.convolve(later)[:, start.shape[1] :]), 1)
        turn = rotary(torch.arange(x.shape[1], device=x.device) + 4 * offset, self.head_dim, x.dtype)
        for layer in self.transformer["layers"]:
            x = layer(x, turn)
        return self.transformer["norm"](x)


class Model(nn.Module):
    def __init__(self, params: dict) -> None:
        super().__init__()
        whisper = params["multimodal"]["whisper_model_args"]
        encoder, factor = whisper["encoder_args"], whisper["downsample_args"]["downsample_factor"]
        dim, self.head_dim, self.window = params["dim"], params["head_dim"], params["sliding_window"]
        self.mm_streams_embeddings = nn.ModuleDict(
            {
                "embedding_module": nn.ModuleDict(
                    {
                        "tok_embeddings": nn.Embedding(params["vocab_size"], dim),
                        "whisper_encoder": Encoder(encoder),
                        "audio_language_projection": nn.Sequential(
                            nn.Linear(factor * encoder["dim"], dim, bias=False),
                            nn.GELU(),
                            nn.Linear(dim, dim, bias=False),
                        ),
                    }
                )
            }
        )
        self.layers = nn.ModuleList(Layer(params, params["ada_rms_norm_t_cond_dim"]) for _ in range(params["n_layers"]))
        self.norm = Norm(dim)
        half = dim // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half) / half).bfloat16()
        angle = DELAY * frequency
        self.register_buffer("time", torch.cat((angle.cos(), angle.sin())).float(), persistent=False)

    @property
    def parts(self) -> nn.ModuleDict:
        return self.mm_streams_embeddings["embedding_module"]

    def quantize(self, quantized: bool) -> None:
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantized = quantized

    def audio(self, first: Tensor, later: Tensor, offset: Tensor | int = 0) -> Tensor:
        x = self.parts["whisper_encoder"](first, later, offset)
        return self.parts["audio_language_projection"](x.unflatten(1, (-1, 4)).flatten(2))

    def decode(self, audio: Tensor, tokens: Tensor, turn: tuple[Tensor, Tensor], caches: list | None = None) -> Tensor:
        x = audio + self.parts["tok_embeddings"](tokens).to(audio.dtype)
        time = self.time.to(audio.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, time, caches[i] if caches else None)
        return F.linear(self.norm(x), self.parts["tok_embeddings"].weight.to(x.dtype))

    def forward(self, first: Tensor, later: Tensor, tokens: Tensor, offset: Tensor | int = 0) -> Tensor:
        """Return the logits for all positions after the prompt. `tokens`: the token before each position."""
        audio = self.audio(first, later, offset)
        turn = rotary(torch.arange(tokens.shape[1], device=tokens.device) + offset, self.head_dim, audio.dtype)
        return self.decode(audio, tokens, turn)[:, PROMPT - 1 :]

    @torch.no_grad()
    def transcribe(self, audio: Tensor, filters: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the greedy tokens [batch, frames] for [batch, samples], position by position, as the server does."""
        first, later = features(audio, filters)
        embedded = self.audio(first.to(dtype), later.to(dtype))
        batch, length = embedded.shape[:2]
        tokens = torch.full((batch, length + 1), PAD, device=audio.device)
        tokens[:, 0] = BOS
        caches = [Cache(self.window) for _ in self.layers]
        cos, sin = rotary(torch.arange(length, device=audio.device), self.head_dim, embedded.dtype)
        for i in range(length):
            turn = cos[i : i + 1], sin[i : i + 1]
            logits = self.decode(embedded[:, i : i + 1], tokens[:, i : i + 1], turn, caches)
            if i >= PROMPT - 1:
                tokens[:, i + 1] = logits[:, 0].argmax(-1)
        return tokens[:, PROMPT:]


def features(audio: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mel frames of the first chunk, and of all. In later chunks, frame centres are 40 samples earlier."""
    padded = F.pad(audio, (LEFT_PAD * SAMPLES, 0))
    first = log_mel(padded[:, : PROMPT * SAMPLES + 40], filters)[..., : PROMPT * 8]
    return first, log_mel(F.pad(padded, (40, 0)), filters)
