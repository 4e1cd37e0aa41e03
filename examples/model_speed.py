r"""Measure a model of transformers with packed weights: tokens/s and peak memory.

    python examples/model_speed.py --model model.gguf --device cpu --mode eager --unfused --fused
    python examples/model_speed.py --random llama-8b --device cuda --dtype bfloat16 \
        --mode eager compile graph --account

Each case is a row of the table: `eager` runs the model as it is; `compile` is torch.compile with
mode="reduce-overhead"; `graph` captures one step of the compiled model in a CUDA graph by hand, and
`eager-graph` one of the eager model. All but eager use a static cache. Before fused rows are
measured, the logits of a short text are compared with those of the unfused model.
"""

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from q4jit import Q4JitError, QuantizedTensor
from q4jit.torch import Embedding, Linear, Weight, fuse, replace_linears
from q4jit.torch.fusion.attention import DECODING

__all__ = ["main", "random_llama"]

# vocabulary, width, feed-forward, layers, heads, heads of keys
RANDOM: Final = {
    "tiny": (256, 64, 96, 2, 4, 2),
    "llama-8b": (128256, 4096, 14336, 32, 32, 8),
}
MODES: Final = ("eager", "compile", "graph", "eager-graph")
CHECKED: Final = 12  # tokens whose logits are compared
WARM_UP: Final = 3  # steps before a capture; the first compiles
# of a kernel's name, in this order: the first match decides
GROUPS: Final = (
    ("linear layers", ("q4jit",)),
    ("attention", ("softmax", "attention", "fmha", "flash", "gemm", "gemv", "bmm", "cutlass")),
    ("RoPE and cache", ("index", "scatter", "roll", "cat", "addcmul", "neg")),
)


def random_llama(name: str, device: torch.device, dtype: torch.dtype, precision: str) -> Any:
    """Return a Llama with random weights in Q4_0, of a size in `RANDOM`.

    One weight is drawn for each shape, and copied on the device for each layer. No weight exists
    in floats.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(_config(name))
        model = model.to(dtype).requires_grad_(False).eval()
    replace_linears(model, "Q4_0", embeddings="Q4_0", precision=precision)
    drawn: dict[Any, Weight] = {}
    for module in list(model.modules()):
        if isinstance(module, Linear | Embedding):
            old = module.weight
            key = old.K, old.N, old.lookup
            if key not in drawn:
                drawn[key] = Weight(_random_weight(old.K, old.N), device=device, lookup=old.lookup)
            module.weight = copy.deepcopy(drawn[key])
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:  # gains of norms
                ones = torch.ones_like(parameter, device=device)
                setattr(module, key, nn.Parameter(ones, requires_grad=False))
    rotary = type(model.model.rotary_emb)(config=model.config)  # its frequencies were on "meta"
    model.model.rotary_emb = rotary.to(device)
    return model


def random_dense_llama(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the same Llama with random weights in floats."""
    with device:
        classes: Any = LlamaForCausalLM  # without types
        model: Any = classes._from_config(_config(name), dtype=dtype).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def _config(name: str) -> LlamaConfig:
    vocabulary, width, feed_forward, layers, heads, kv_heads = RANDOM[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def _random_weight(k: int, n: int) -> QuantizedTensor:
    """Return random blocks whose weights have the rms 1 / √K, so that activations stay finite."""
    rng = np.random.default_rng(k + n)
    blocks = rng.integers(0, 256, (n, k // 32, 18), np.uint8)
    scales = rng.uniform(0.5, 1.5, (n, k // 32, 1)) * k**-0.5 / 4.8  # of codes -8, -7, …, 7
    blocks[..., :2] = scales.astype(np.float16).view(np.uint8)
    return QuantizedTensor.from_bytes(blocks.reshape(n, -1), shape=(k, n), format="Q4_0")


def _model(options: argparse.Namespace) -> Any:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.random and options.dequantised:
        return random_dense_llama(options.random, device, dtype)
    if options.random:
        return random_llama(options.random, device, dtype, options.precision)
    if options.dequantised:
        folder, _, file = options.model.rpartition("/")
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder or ".", gguf_file=file, dtype=dtype
        )
        return model.eval().to(options.device)
    from q4jit.transformers import from_gguf  # late: random models need no tokenizer

    return from_gguf(options.model, device=device, dtype=dtype, precision=options.precision)[0]


class Decoder:
    """Runs prompts, and decodes greedily, in one of `MODES`."""

    def __init__(self, model: Any, mode: str, options: argparse.Namespace) -> None:
        self.model, self.mode, self.context = model, mode, options.context
        self.device = device = torch.device(options.device)
        self.token = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.cache: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.run = model
        if mode in {"compile", "graph"}:  # with cudagraphs, the same as mode="reduce-overhead"
            choices = {"triton.cudagraphs": mode == "compile", "combo_kernels": options.combine}
            self.run = torch.compile(model, fullgraph=True, options=choices)

    def prompt(self, ids: Tensor) -> None:
        """Start anew with a prompt [1, T]."""
        if self.mode == "eager":
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is None or self.device.type == "cpu":
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.context)
        else:
            self.cache.reset()  # in place: the graph reads this memory
        self._take(self.model(ids, cache=self.cache, logits_to_keep=1).logits)

    def step(self) -> None:
        """Decode one more token."""
        if self.graph is not None:
            self.graph.replay()
            return
        if self.mode == "compile":
            torch.compiler.cudagraph_mark_step_begin()
        self._forward()

    def _forward(self) -> None:
        self._take(self.run(self.token, cache=self.cache).logits)

    def _take(self, logits: Tensor) -> None:
        self.token.copy_(logits[:, -1:].argmax(-1))

    def warm_up(self, ids: Tensor) -> None:
        """Compile, and capture if the mode asks for it."""
        self.prompt(ids)
        for _ in range(WARM_UP):
            self.step()
        if self.mode in {"graph", "eager-graph"}:
            wait(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._forward()
            self.graph = graph


def wait(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of some work, until the device has done it."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def row(decoder: Decoder, name: str, options: argparse.Namespace) -> str:
    """Measure a case, and return its row."""
    device, vocabulary = decoder.device, decoder.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, options.prompt), generator=generator).to(device)
    decoder.warm_up(ids)

    def decode() -> None:
        for _ in range(options.tokens):
            decoder.step()

    prompts, steps = [], []
    for turn in range(options.turns):
        print(f"turn {turn + 1} of {options.turns}", file=sys.stderr)
        prompts.append(seconds(lambda: decoder.prompt(ids), device))
        steps.append(seconds(decode, device) / options.tokens)
    prompt, step = statistics.median(prompts), statistics.median(steps)
    speeds = f"{options.prompt / prompt:10.1f} {1 / step:10.1f} {step * 1e3:10.3f}"
    return f"{decoder.mode:12} {name:12} {options.dtype:9} {speeds} {peak(device) / 2**20:9.0f}"


def peak(device: torch.device) -> int:
    """Return the most bytes in use so far: of the GPU's allocator, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def account(decoder: Decoder) -> str:
    """Return the GPU's time in one step, in µs, by groups of kernels."""
    decoder.step()
    wait(decoder.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(2):  # the first starts the profiler's buffers
            decoder.step()
            wait(decoder.device)
    events: Any = profiler.events()
    kernels = [e for e in events if e.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: event.time_range.start)
    kernels = kernels[len(kernels) // 2 :]
    times: dict[str, list[float]] = {}
    for event in kernels:
        names = (g for g, parts in GROUPS if any(part in event.name.lower() for part in parts))
        times.setdefault(next(names, "rest"), []).append(event.time_range.elapsed_us())
    whole = kernels[-1].time_range.end - kernels[0].time_range.start
    times["gaps"] = [whole - sum(map(sum, times.values()))]
    parts = (f"{name} {sum(t):.0f} ({len(t)})" for name, t in times.items())
    return f"  µs of a step, and kernels: {', '.join(parts)}; in all {whole:.0f}"


def checked(model: Any, before: Tensor | None, device: torch.device) -> Tensor:
    """Return the logits of a short text; compare them with those before, and say so."""
    ids = torch.arange(CHECKED, device=device)[None]
    logits: Tensor = model(ids).logits.float()
    if not bool(logits.isfinite().all()):
        raise SystemExit("the model's logits are not finite")
    if before is not None:
        error = float((logits - before).norm() / before.norm())
        print(f"logits of {CHECKED} tokens: relative error {error:.1e} to the unfused eager model")
        if error > (2e-5 if next(model.parameters()).dtype is torch.float32 else 0.1):
            raise SystemExit("the error is too large")
    return logits


def measure(options: argparse.Namespace) -> None:
    """Load a model, and print a row for each case."""
    device = torch.device(options.device)
    start = time.perf_counter()
    model = _model(options)
    wait(device)
    print(f"loaded in {time.perf_counter() - start:.1f} s, {peak(device) / 2**20:.0f} MiB at most")
    plain = "dequantised" if options.dequantised else "unfused"
    with torch.no_grad():
        logits = checked(model, None, device)
        header = "mode         layers       dtype       prompt/s   decode/s    ms/token  peak MiB"
        names = [plain] if options.unfused or options.dequantised else []
        names += ["fused"] if not options.dequantised and (options.fused or not names) else []
        for name in names:
            if name == "fused":
                print(fuse(model, decoding=options.decoding))
                checked(model, logits, device)
            print(header)
            for mode in options.mode:
                decoder = Decoder(model, mode, options)
                print(row(decoder, name, options))
                if options.account:
                    print(account(decoder))
                del decoder
                torch.compiler.reset()


def main() -> None:
    """Measure the cases that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else "",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    add = parser.add_argument
    source.add_argument("--model", metavar="FILE.gguf")
    source.add_argument("--random", choices=RANDOM, help="a Llama with random weights")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--precision", default="f32", choices=["f32", "f16", "i8"], help="of q4jit's products")
    add("--unfused", action="store_true", help="measure the layers of transformers")
    add("--fused", action="store_true", help="measure fused layers, also if nothing is chosen")
    add("--dequantised", action="store_true", help="floats, by transformers' loader")
    add("--decoding", default="auto", choices=DECODING, help="as in q4jit.torch.fuse")
    add("--combine", action="store_true", help="let Inductor join small kernels")
    add("--mode", nargs="+", choices=MODES, default=["eager"], help="each one is a row")
    add("--tokens", type=_count, default=128, help="to decode in a turn")
    add("--prompt", type=_count, default=512, help="tokens of the prompt")
    add("--context", type=_count, default=1024, help="tokens that a static cache holds")
    add("--turns", type=_count, default=5, help="whose median is printed")
    add("--account", action="store_true", help="GPU time of one step, by groups of kernels")
    options = parser.parse_args()
    if options.prompt + options.tokens + 2 * WARM_UP > options.context:
        parser.error(f"--context must be at least --prompt + --tokens + {2 * WARM_UP}")
    on_gpu = options.device.partition(":")[0] == "cuda"
    if not on_gpu and options.device != "cpu":
        parser.error(f"--device must be cpu or cuda, not {options.device}")
    if on_gpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU for --device cuda")
    if not on_gpu and (options.account or {"graph", "eager-graph"} & {*options.mode}):
        parser.error("--account and graphs need --device cuda")
    try:
        measure(options)
    except (Q4JitError, OSError) as error:
        parser.exit(1, f"model_speed.py: {error}\n")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    main()
