"""Train the tiny checkpoint and write it in the layout of Voxtral Mini 4B Realtime 2602.

    python train.py CLIPS OUT

CLIPS is the folder of make_data.py. The script writes params.json (a copy of the one in this folder), tekken.json and
consolidated.safetensors to OUT. All random choices have fixed seeds: on a CPU, the same command with the same number
of threads gives the same weights. On a GPU it does not.
"""

import argparse
import base64
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from model import DELAY, PROMPT, Model, Tensor
from rapidfuzz.distance import Levenshtein
from safetensors.torch import load_file, save_file
from streams import Batch, Streams
from words import BOS, PAD, PIECE_TOKEN, PIECES, SPECIAL_TOKENS, VOCABULARY

MEL = {"sampling_rate": 16000, "num_mel_bins": 128, "hop_length": 160, "window_size": 400}
PARAMS = json.loads((Path(__file__).parent / "params.json").read_text())  # the model's sizes


def tekken() -> dict:
    """Return the tokenizer: 1000 special tokens, the 256 bytes, and the pieces of the words."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
             "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
             "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]  # fmt: skip
    names += [f"<SPECIAL_{i}>" for i in range(len(names), SPECIAL_TOKENS)]
    for i, name in ((24, "[AUDIO]"), (25, "[BEGIN_AUDIO]"), (PAD, "[STREAMING_PAD]"), (33, "[STREAMING_WORD]"),
                    (34, "[TRANSCRIBE]")):  # fmt: skip
        names[i] = name
    texts = [bytes([i]) for i in range(256)] + [piece.encode() for piece in PIECES]
    return {
        "config": {"pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "num_vocab_tokens": len(texts),
                   "default_vocab_size": VOCABULARY, "default_num_special_tokens": SPECIAL_TOKENS, "version": "v7"},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(text).decode(),
                   "token_str": text.decode(errors="replace")} for i, text in enumerate(texts)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
        "audio": {"sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": None,
                  "audio_encoding_config": {k: MEL[k] for k in ("num_mel_bins", "hop_length", "window_size")},
                  "transcription_format": "streaming", "transcription_delay_ms": 80 * DELAY,
                  "streaming_look_ahead_ms": 2.5, "streaming_look_back_ms": 52.5, "streaming_n_left_pad_tokens": 32},
    }  # fmt: skip


def export(model: Model, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS, indent=1))
    (folder / "tekken.json").write_text(json.dumps(tekken()) + "\n")
    tensors = {name: tensor.detach().bfloat16().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "consolidated.safetensors")


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for the matrices of the layers. Equal shapes are updated together."""

    def __init__(self, parameters: list, lr: float = 0.02, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                gradient = torch.stack([p.grad for p in parameters])
                state = self.state[parameters[0]]
                mean = state.setdefault("mean", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(mean, group["momentum"])) * max(1, shape[0] / shape[1]) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """Return approximately the closest orthogonal matrix to each of [count, rows, columns] (Newton-Schulz)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def initialize(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            continue
        if parameter.dim() == 1 or ".wo." in name or ".w2." in name or "t_cond.2" in name:
            torch.nn.init.zeros_(parameter)  # a layer begins as the identity
        elif "tok_embeddings" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        else:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ("attention.w" in n or "forward.w" in n)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)]


def loss_of(model: Model, batch: Batch, known: Tensor, pad_weight: float, offset: Tensor) -> Tensor:
    """Return the cross entropy of the frames' tokens. Some of the tokens that are fed back are wrong, as in use."""
    targets = batch.targets
    fed = F.pad(targets, (PROMPT, -1), value=PAD)
    fed[:, 0] = BOS
    wrong = torch.rand(fed.shape, device=fed.device)
    fed = torch.where((wrong < 0.03) & (fed != BOS), PAD, fed)
    fed = torch.where(
        (wrong > 0.995) & (fed != BOS), known[torch.randint(len(known), fed.shape, device=fed.device)], fed
    )
    logits = model(batch.first, batch.later, fed, offset)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    weights = batch.weights * torch.where(targets == PAD, pad_weight, 1.0)
    return (losses * weights).sum() / weights.sum()


def read(tokens: list[int]) -> tuple[list[str], list[float]]:
    """Return the words of a stream's tokens, and the time of each word's first piece in seconds."""
    text = {token: piece for piece, token in PIECE_TOKEN.items()}
    words, times = [], []
    for i, token in enumerate(tokens):
        piece = text.get(token, "")
        if piece.startswith(" ") or (piece and not words):
            words.append(piece.strip())
            times.append(0.08 * (i + 1))
        elif piece:
            words[-1] += piece
    return words, times


@torch.no_grad()
def evaluate(model: Model, batch: Batch, plain: Tensor, quantized: bool = False) -> str:
    """Return the word error rate of a batch, decoded as the server does, and the lag of its words in seconds."""
    model.quantize(quantized)
    cuda = batch.audio.is_cuda
    with torch.autocast(batch.audio.device.type, torch.bfloat16, enabled=cuda):
        tokens = model.transcribe(F.pad(batch.audio, (0, 17 * 1280)), plain, torch.bfloat16 if cuda else torch.float32)
    model.quantize(False)
    errors = words = 0
    late = []
    for said, ends, line in zip(batch.texts, batch.ends, tokens.tolist(), strict=True):
        recognized, times = read(line)
        errors, words = errors + Levenshtein.distance(said, recognized), words + len(said)
        if said == recognized:
            late += [t - e for t, e in zip(times, ends, strict=True)]
    lag = torch.tensor(late or [0.0]).quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
    return f"{100 * errors / words:.2f} % of {words}, lag {lag[0]:.2f} {lag[1]:.2f} {lag[2]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4575)
    parser.add_argument("--streams", type=int, default=48, help="in a batch")
    parser.add_argument("--frames", type=int, default=450, help="of 80 ms in a stream")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="start from this checkpoint")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--pad-weight", type=float, default=1.0, help="of a blank frame, in the second half")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    streams = Streams(options.clips, options.device, seed=1)
    print(f"{len(streams.length)} clips, {streams.samples.numel() / 16000:.0f} s, {len(streams.voice_names)} voices")
    size = options.streams, options.frames
    tests = Streams(options.clips, options.device, held_out=True, seed=2).batch(*size, plain=True)
    seen = streams.batch(*size, plain=True)
    model = Model(PARAMS).to(options.device)
    initialize(model)
    if options.init:
        model.load_state_dict(load_file(options.init / "consolidated.safetensors"))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    chosen = optimizers(model)
    rates = [options.rate * optimizer.param_groups[0]["lr"] for optimizer in chosen]
    begin, losses = time.time(), []
    for step in range(options.steps):
        done = step / options.steps
        factor = min(1, (step + 1) / 100) * (min(1, (1 - done) / 0.55) * 0.99 + 0.01)
        for optimizer, rate in zip(chosen, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        batch = streams.batch(*size)
        late = done > 0.65 or options.init is not None
        model.quantize(late and step % 2 == 0)  # every second step with weights rounded to NF4
        # Every second step has positions from later in a session, because rotary angles are exact only near zero.
        offset = (10 ** (4.7 * torch.rand((), device=options.device)) * (step % 2)).long()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = loss_of(model, batch, streams.known, 0.3 if done < 0.5 else options.pad_weight, offset)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) == 10:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite")
            print(f"{time.time() - begin:.0f} s, step {step + 1}, loss {mean:.4f}", flush=True)
            losses.clear()
        if (step + 1) % 500 == 0:
            print(f"  held out {evaluate(model, tests, streams.plain)}", flush=True)
            export(model, options.out)
    export(model, options.out)
    for quantized in (False, True):
        for name, batch in (("held out", tests), ("seen", seen)):
            kind = "nf4" if quantized else "bf16" if options.device == "cuda" else "fp32"
            print(f"{kind}, {name}: {evaluate(model, batch, streams.plain, quantized)}")


if __name__ == "__main__":
    main()
