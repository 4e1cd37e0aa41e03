"""Fine-tune a packed language model: adapters learn, and its quantised weights stay as they are.

    python examples/finetune_lora.py --steps 40

A small model of characters learns a text. Its linear layers are packed, and LoRA adapters around
them learn another text. This happens in two fresh processes: one has the packed layers, the other
one the same weights as floats. The program prints the loss and the peak memory of both.
"""

import argparse
import hashlib
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from q4jit.torch import Linear, replace_linears

__all__ = ["LoRA", "Model", "Result", "add_adapters", "finetune", "main", "pretrain"]

FORMAT = "Q4_0"
WIDTH, HIDDEN, HEADS, LAYERS = 640, 2048, 8, 8
LENGTH, BATCH = 32, 2
RANK = 8

STORY = """The sun rises over the sea, and a boat leaves the harbour. The wind is cold, but the sky
is clear. On the pier an old man waits. He looks at the water, then at the clouds, and he nods."""
CAPITALS = """France: Paris. Italy: Rome. Spain: Madrid. Norway: Oslo. Japan: Tokyo. Kenya: Nairobi.
Peru: Lima. Cuba: Havana. Egypt: Cairo. Greece: Athens. Austria: Vienna. Poland: Warsaw."""


# --- the model, which does not know about q4jit ---------------------------------------------------


class Layer(nn.Module):
    """Attention and a gated feed-forward, each behind a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, T, WIDTH] after this layer."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(-2, -4)
        q, k, v = heads.unbind(-2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        y: Tensor = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return y


class Model(nn.Module):
    """Predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits [B, T, 128] of ids [B, T]."""
        x = self.embed(ids) + self.positions.weight[: ids.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# --- adapters -------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer, plus a product of two thin matrices that learn."""

    def __init__(self, base: "nn.Linear | Linear", device: str) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False, device=device)
        self.up = nn.Linear(RANK, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.up.weight)  # at first, the adapter changes nothing

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's result with what the adapter adds."""
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def add_adapters(model: Model, device: str) -> list[nn.Parameter]:
    """Freeze a model, put an adapter around each layer, and return the parameters that learn."""
    model.requires_grad_(False)
    for layer in model.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear | Linear):
                setattr(layer, name, LoRA(child, device))
    return [p for p in model.parameters() if p.requires_grad]


# --- training -------------------------------------------------------------------------------------


def encoded(text: str, device: str) -> Tensor:
    """Return the characters of a text as ids."""
    return torch.tensor(list(text.encode("ascii")), device=device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the characters of windows [B, LENGTH + 1]."""
    logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module, learning: list[nn.Parameter], rate: float, text: Tensor, steps: int
) -> None:
    """Train parameters on random windows of a text."""
    optimiser = torch.optim.Adam(learning, lr=rate)
    windows = text.unfold(0, LENGTH + 1, 1)
    for _ in range(steps):
        loss = loss_of(model, windows[torch.randint(len(windows), (BATCH,))])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def loss_on(model: nn.Module, text: Tensor) -> float:
    """Return the loss on a whole text."""
    return float(loss_of(model, text.unfold(0, LENGTH + 1, LENGTH)))


# --- the processes --------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a process reports.

    Attributes:
        base_mib: the size of the base.
        before, after: the loss on the second text.
        unchanged: whether the base has the same bytes as before.
        start_mib, peak_mib: memory before the base is loaded, and the most that there was.
        seconds: the time of training.
    """

    base_mib: float
    before: float
    after: float
    unchanged: bool
    start_mib: float
    peak_mib: float
    seconds: float


def pretrain(folder: Path, device: str, steps: int) -> None:
    """Train the base, and save it with packed layers and with the same weights as floats."""
    torch.manual_seed(0)
    model = Model().to(device)
    train(model, list(model.parameters()), 1e-3, encoded(STORY, device), steps)
    model.requires_grad_(False)
    replace_linears(model, FORMAT)
    packed = model.state_dict()
    torch.save(packed, folder / "packed.pt")
    floats = {name: entry for name, entry in packed.items() if entry.dtype != torch.uint8}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            w = module.weight.numpy().dequantize()
            floats[f"{name}.weight"] = torch.from_numpy(w).T.contiguous()
    torch.save(floats, folder / "floats.pt")


def finetune(folder: Path, name: str, device: str, steps: int) -> Result:
    """Load a base, "packed" or "floats", and train adapters."""
    start_mib = peak_mib(device)
    with torch.device("meta"):  # no memory for values that are loaded anyway
        model = Model().requires_grad_(False)
        if name == "packed":
            replace_linears(model, FORMAT)
    state = torch.load(folder / f"{name}.pt", map_location=device, mmap=True)
    model.load_state_dict(state, assign=True)
    base_mib = sum(entry.nbytes for entry in state.values()) / 2**20
    del state
    torch.manual_seed(1)
    learning = add_adapters(model, device)
    base = fingerprint(model)
    text = encoded(CAPITALS, device)
    before = loss_on(model, text)
    start = time.perf_counter()
    train(model, learning, 3e-3, text, steps)
    seconds = time.perf_counter() - start
    after, unchanged = loss_on(model, text), fingerprint(model) == base
    return Result(base_mib, before, after, unchanged, start_mib, peak_mib(device), seconds)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of everything in a model that does not learn."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256()
    for name, entry in model.state_dict().items():
        if name not in learning:
            digest.update(entry.cpu().numpy().tobytes())
    return digest.hexdigest()


def peak_mib(device: str) -> float:
    """Return the most memory that this process has used: of the GPU, or resident on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    # not getrusage, which counts the parent's memory too
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(kib) / 2**10


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function in a process of its own, so that memory starts at zero."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Train the base and both kinds of adapters, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30, help="of each training (default: 30)")
    options = parser.parse_args()
    device, steps = options.device, options.steps
    # PyTorch's threads and q4jit's take turns: they must not keep cores busy while they wait
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print("base         weights   loss before  after   memory: peak   at start   seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_fresh_process(pretrain, folder, device, steps)
        in_fresh_process(finetune, folder, "packed", device, 1)  # compiles, for the next process
        for base, file in ((FORMAT, "packed"), ("dequantised", "floats")):
            got: Result = in_fresh_process(finetune, folder, file, device, steps)
            assert got.unchanged, "training changed the base"
            print(
                f"{base:11} {got.base_mib:4.0f} MiB {got.before:13.3f} {got.after:6.3f}"
                f" {got.peak_mib:10.0f} MiB {got.start_mib:6.0f} MiB {got.seconds:9.1f}"
            )
    print("The bytes of the base did not change.")


if __name__ == "__main__":
    main()
