"""Train a character-level transformer on the pages of docs/ with an attention of the gallery.

    python examples/train_characters.py --attention softcap

Nobody wrote a backward: the gradient of each attention is derived from its text, that of what it learns as well, the
sink of `sink`, the slopes of `alibi`. It takes under two minutes on a CPU; a GPU is used if there is one.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import einsumcascade as ec

ATTENTIONS = ("softmax_attention", "softcap", "sigmoid", "relu", "sink", "alibi")
TEXTS = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
LAYERS, HEADS, WIDTH, LENGTH, BATCH = 2, 4, 64, 64, 16


def attention(name: str) -> nn.Module:
    """An attention of the gallery, made causal; what it reads beside queries, keys and values is learned, per head."""
    op = ec.compile(ec.load(name).constrain("m <= p"))
    learned = [i.tensor for i in op.cascade.inputs if i.tensor not in ("Q", "K", "V")]
    return op.module(**{tensor: nn.Parameter(0.1 * torch.arange(1.0, HEADS + 1)) for tensor in learned})


class Block(nn.Module):
    """Attention and a perceptron, each with a norm before it and a sum around it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention = attention(name)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P, WIDTH)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Characters and their places in, logits of the next character out."""

    def __init__(self, name: str, characters: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(name) for _ in range(LAYERS)))
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P)
        places = torch.arange(x.shape[1], device=x.device)
        return self.last(self.blocks(self.characters(x) + self.places(places)))


def main() -> None:
    """Train, and print the loss as it falls."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", choices=ATTENTIONS, default="softcap")
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Tensors this small gain nothing from threads that wait for each other.
    torch.set_num_threads(1)
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
    alphabet = sorted(set(text))
    number = {c: n for n, c in enumerate(alphabet)}
    data = torch.tensor([number[c] for c in text], device=device)

    torch.manual_seed(0)
    model = Model(chosen.attention, len(alphabet)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    start = time.perf_counter()
    for step in range(chosen.steps):
        at = torch.randint(len(data) - LENGTH, (BATCH, 1), device=device)
        batch = data[at + torch.arange(LENGTH + 1, device=device)]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == chosen.steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    assert chosen.steps < 5 or losses[-1] < losses[0], "the loss does not fall"


if __name__ == "__main__":
    main()
