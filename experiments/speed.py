"""Speed and memory of cli.py and of transformers on the same random weights, beside what the machine can do at most.

    python experiments/speed.py --size nano                 under two minutes: to see that it runs
    python experiments/speed.py --size 0.5b --dtype bfloat16 --readme README.md
    python experiments/speed.py --size 7b --device cuda --dtype bfloat16 --readme README.md

Needs transformers. Each round starts four processes in turn: the machine's limits, cli.py without fusion, transformers,
cli.py with a fresh `cli` fusion; so noise meets all of them, and peak memory is each one's own. A process takes medians
of its repeats, the table medians of the rounds, of a ratio too: the median of what it was in each round, with the
lowest and the highest. transformers runs with SDPA and, figure by figure, with its dynamic or its static cache,
whichever was faster (pictures of other sizes, cold start and memory: the dynamic one). Both sides go through
generate(), greedy.

The picture is of 384 x 384 pixels, 1,485 visual tokens, with 30 tokens of text; its crops are prepared beforehand. Its
only tile is the whole picture again: cli.py encodes it once, transformers twice. Only square pictures of one tile save
that, so one of 384 x 192 pixels (1,093 visual tokens, two crops on both sides) is read too. Decoding at 7,000 tokens
and in batches (of unequal lengths, the longest 1,500) runs on caches that were filled with random values. "Cold" is
from the start of loading to the first token: a file that is mapped into memory is only read when it is used. Peak
memory covers loading, the first picture and the tokens behind it.

The limits: copy bandwidth (bytes read and written), the bandwidth of one matrix-vector product over as many bytes as a
decode step reads of the weights (by the faster of PyTorch's kernels), and the rate of a product of two square matrices.
A figure's share of the limit is the least time that its bytes or its operations take by these, over the time that it
took: decoding must read every weight once a step (embeddings only as the head) and every cached key and value; prefill
and the vision encoder must multiply every weight with every token (those behind the last layer's attention with the
last one alone), and every query with the keys before it. On CUDA decoding is held against the copy bandwidth, a picture
of 1152 x 1152 pixels (7,371 visual tokens) is read too, and cli.py's ways to attend (flash-attn, varlen_attn, SDPA) are
compared on it.

Writes speed-SIZE-DEVICE-DTYPE.jsonl in out/speed, with --readme in experiments/results: the machine, then a line a
process as it ends, then a line a figure and a line a target. A run that was stopped starts anew.
"""
import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
from cli import CLI, IMAGE_TOKEN, InputError, KVCache, Stream  # noqa: E402
from experiments.random_checkpoint import SIZES, write_checkpoint  # noqa: E402
from train import commit, markdown, put_between_marks  # noqa: E402

TEXT = list(range(10, 40))  # the prompt's ids, half before the picture and half behind it
LONG = 7000  # cached tokens of the long decode; the batches' longest sequence is BATCHED
BATCHED = 1500
SMALL, WIDE, LARGE = (384, 384), (384, 192), (1152, 1152)  # pictures, in pixels
SIDES = ("limits", "none", "transformers", "cli")
# figure: (what it is, unit, what limits it: mm = matrix products, read = reading weights and cache)
FIGURES = {
    "load": ("load from disk, warm", "s", None),
    "cold": ("cold: load and first token", "s", None),
    "vision": ("vision encoding, 384 x 384", "s", "mm"),
    "vision_wide": ("vision encoding, 384 x 192", "s", "mm"),
    "prefill": ("prefill to the first token, 384 x 384", "s", "mm"),
    "prefill_wide": ("prefill to the first token, 384 x 192", "s", "mm"),
    "prefill_large": ("prefill to the first token, 1152 x 1152", "s", "mm"),
    "decode": ("decode at 1,500 cached tokens", "tokens/s", "read"),
    "decode_long": ("decode at 7,000 cached tokens", "tokens/s", "read"),
    "batch_8": ("decode, batch of 8, up to 1,500 cached", "tokens/s", "read"),
    "batch_32": ("decode, batch of 32, up to 1,500 cached", "tokens/s", "read"),
    "peak": ("peak memory", "GiB", None),
    "parameters": ("parameters", "million", None),
}


# ---------------------------------------------------------------------------------------------------------------------
# What both sides are given


def picture(size):
    """A picture (W, H) of random pixels, prepared -> (Picture, number of its visual tokens)."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    prepared = cli.prepare_image(Image.fromarray(pixels), cli.Config())
    return prepared, cli.visual_tokens(prepared, cli.Config())


def cached(batch, length):
    """Cached tokens of each sequence: one has `length`, others down to half of it."""
    return [length - i * length // (2 * batch) for i in range(batch)]


def random_keys(heads, length, hd):  # -> (1, heads, length, hd): for every layer and sequence the same
    return torch.randn(1, heads, length, hd, generator=torch.Generator().manual_seed(0))


def timed(f, device, repeats=3):
    """Median seconds of f(), after one call that is not counted."""
    times = []
    for _ in range(1 + repeats):
        start = now(device)
        f()
        times.append(now(device) - start)
    return median(times[1:])


def now(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def rate(times, batch=1):
    """Tokens a second from the seconds of each step; the first two hold the prompt and what is set up for it."""
    return batch / median(times[2:])


# ---------------------------------------------------------------------------------------------------------------------
# The processes that measure: each returns {figure: value}


def load_ours(args, device, dtype, fusion="none"):
    model = CLI.from_pretrained(args.folder, fusion=fusion, device=device, dtype=dtype, quiet=True)
    model.config = dataclasses.replace(model.config, eos_token_ids=())  # noise must not stop early
    return model


def clocked(model, prompts, images, steps, device, cache=None):
    """Greedy decoding -> seconds of each step, with the first one's prefill, and the first sequence's ids."""
    times, ids, last = [], [], now(device)
    for step in model.generate(prompts, images, steps, repetition_penalty=1, cache=cache):
        times.append(now(device) - last)
        ids.append(step[0])
        last = now(device)
    return times, ids


def decode_rate(model, lengths, steps):
    """Tokens/s of a batch with so many random keys and values cached of each sequence."""
    cache = KVCache(model.config.decoder, len(lengths), max(lengths) + steps + 1, model.device, model.dtype)
    for x in (cache.k, cache.v):
        x[..., : max(lengths), :] = random_keys(x.shape[2], max(lengths), x.shape[4])
    cache.lengths = list(lengths)
    times, _ = clocked(model, [[TEXT[0]]] * len(lengths), None, steps, model.device, cache)
    return rate(times, len(lengths))


def work(model, lengths=(), tokens=0, crops=0):
    """-> bytes that a decode step at these cached lengths reads, operations of prefill and of vision encoding"""
    def size(module):  # of its matrices
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    d, v = model.config.decoder, model.config.vision
    keys = 2 * d.num_hidden_layers * d.num_key_value_heads * d.head_dim
    head = size(model.lm_head or model.decoder.embed_tokens)
    read = (size(model.decoder.layers) + head + keys * sum(lengths)) * model.dtype.itemsize
    P = v.side**2
    last = model.decoder.layers[-1]  # its output is wanted for one token alone
    saved = 2 * (tokens - 1) * (size(last.self_attn.o_proj) + size(last.mlp))
    vision = crops * P * (2 * size(model.vision.layers) + 4 * P * v.hidden_size * v.num_hidden_layers)
    vision += 2 * crops * P * (size(model.vision.patch_embedding) + size(model.projector))
    attention = 2 * tokens**2 * d.num_attention_heads * d.head_dim * d.num_hidden_layers  # causal: half of the square
    return read, vision + 2 * tokens * size(model.decoder.layers) - saved + attention + 2 * head, vision


def fusion_work(model, tokens, crops):
    """-> operations that a `cli` fusion adds to prefill, and bytes of the levels that it holds until the last
    injection: of each the encoder's hidden states and their MLP's output"""
    f, d, v = model.config.fusion, model.config.decoder, model.config.vision
    a, b = (sum(p.numel() for name, p in model.amp.named_parameters() if f".{x}." in name) for x in "AB")
    mlps = sum(p.numel() for p in model.projector.parameters() if p.ndim > 1)
    mlps *= len({*f.levels} - {v.num_hidden_layers})  # the last level's is the base's
    pairs, patches = sum(len(levels) for _, levels in f.routes), crops * v.side**2
    read = 2 * 2 * 2 * tokens * d.hidden_size * d.num_attention_heads  # two queries: their scores, then their pooling
    held = len(f.levels) * (patches * v.hidden_size + tokens * d.hidden_size) * model.dtype.itemsize
    return 2 * patches * (mlps + a) + 2 * tokens * b + pairs * read, held


class Head:
    """A matrix for decode_products: a model that is nothing but its head."""

    def __init__(self, weight):
        self.head_weight, self.device, self.dtype = weight, weight.device, weight.dtype
        self.decoder = torch.nn.Module()

    def head(self, h):
        return F.linear(h, self.head_weight)


def measure_limits(args, device, dtype):
    model = load_ours(args, device, dtype)
    read, D, result = work(model)[0], model.config.decoder.hidden_size, {}
    for figure, lengths in lengths_of(args.steps).items():
        result["read " + figure] = work(model, lengths)[0]
    for name, size in (("", SMALL), ("_wide", WIDE), ("_large", LARGE)):
        image, count = picture(size)
        _, prefill, vision = work(model, (), count + len(TEXT), len(image.crops))
        result |= {"operations prefill" + name: prefill, "operations vision" + name: vision}
    del model  # what follows takes as much memory as its weights do
    floor = 2**28 if args.size != "nano" else 2**26  # more than any cache holds
    # random values: on constant ones a GPU draws less power and runs faster
    a = torch.randn(max(read, floor) // dtype.itemsize // D, D, device=device, dtype=dtype)
    x, (to, of, *_) = torch.randn(1, D, device=device, dtype=dtype), a.split(len(a) // 2)
    n = 8192 if device.type == "cuda" else 2048
    square = torch.randn(n, n, device=device, dtype=dtype)
    matvec, head = [], Head(a)
    for rows in (1, 2):  # every kernel that decoding takes
        for products in ((), cli.decode_products(head, rows)):
            with cli.decode_kernels(rows, dtype, products), torch.inference_mode():
                matvec.append(a.nbytes / timed(lambda: head.head(x), device, 5))
    return {**result, "copy": 2 * of.nbytes / timed(lambda: to.copy_(of), device, 5), "matvec": max(matvec),
            "matmat": 2 * n**3 / timed(lambda: square @ square, device, 5)}


def lengths_of(steps):
    """Cached lengths of each decode figure."""
    return {"decode": [picture(SMALL)[1] + len(TEXT) + steps // 2], "decode_long": [LONG],
            "batch_8": cached(8, BATCHED), "batch_32": cached(32, BATCHED)}


def peak_memory(device):
    """A figure, where the system tells it (Windows does not)."""
    peak = cli.peak_memory(device)
    return {"peak": peak} if peak else {}


def measure_ours(args, device, dtype, fusion):
    start = now(device)
    model = load_ours(args, device, dtype, fusion)
    result = {"load": now(device) - start, "parameters": sum(p.numel() for p in model.parameters()) / 1e6}
    prompt = [*TEXT[:15], IMAGE_TOKEN, *TEXT[15:]]

    small, wide = picture(SMALL)[0], picture(WIDE)[0]
    if fusion != "none":
        result["added"], result["held"] = fusion_work(model, picture(SMALL)[1] + len(TEXT), len(small.crops))
    runs = [clocked(model, [prompt], [[small]], args.steps, device) for _ in range(3)]
    result |= {"cold": result["load"] + runs[0][0][0], **peak_memory(device), "first": runs[0][1][0],
               "prefill": median(times[0] for times, _ in runs[1:]),
               "decode": median(rate(times) for times, _ in runs[1:])}
    with torch.inference_mode():
        tokens = torch.tensor(prompt, device=device)
        for figure, image in (("vision", small), ("vision_wide", wide)):
            stream = Stream(tokens, [image], [len(prompt)], None, model.config)
            result[figure] = timed(functools.partial(model.see, [image], stream), device)
        result["prefill_wide"] = timed(lambda: generate_one(model, prompt, wide), device)
        if device.type == "cuda":
            large = picture(LARGE)[0]
            result["prefill_large"] = timed(lambda: generate_one(model, prompt, large), device)
            result |= compare_attention(model, tokens, large, device)
    for figure, lengths in list(lengths_of(args.steps).items())[1:]:
        result[figure] = decode_rate(model, lengths, args.steps)
        gc.collect()
    return result


def generate_one(model, prompt, image):
    return list(model.generate([prompt], [[image]], 1, repetition_penalty=1))


def compare_attention(model, tokens, image, device):
    """Prefill of the large picture through every way to attend that is installed: seconds, and the largest difference
    of the logits from SDPA's, as a share of the largest logit."""
    package, built = cli.flash_attn_varlen_func, torch.backends.cuda.is_flash_attention_available  # what attend() asks
    result, reference = {}, None
    for name, way in {"sdpa": (None, False), "varlen_attn": (None, built()), "flash_attn": (package, False)}.items():
        if name != "sdpa" and (not any(way) or model.dtype == torch.float32):
            continue
        cli.flash_attn_varlen_func, torch.backends.cuda.is_flash_attention_available = way[0], lambda own=way[1]: own
        logits = model(tokens, [image], select="last")[0].float()
        reference = logits if reference is None else reference
        result[f"attend {name}"] = timed(lambda: model(tokens, [image], select="last"), device)
        result[f"difference {name}"] = ((logits - reference).abs().max() / reference.abs().max()).item()
    cli.flash_attn_varlen_func, torch.backends.cuda.is_flash_attention_available = package, built
    return result


def measure_transformers(args, device, dtype):
    import transformers
    from transformers import DynamicCache, GenerationConfig, LlavaOnevisionForConditionalGeneration, StaticCache

    _ = transformers.Qwen2Model, transformers.SiglipVisionModel  # so that their import is no part of loading

    torch.backends.cuda.enable_cudnn_sdp(True)  # as they have it; cli.py turns it off
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = now(device)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        args.folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    result = {"load": now(device) - start, "parameters": sum(p.numel() for p in model.parameters()) / 1e6}
    text = model.config.text_config
    # as ours: greedy, no penalty, no stop
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def inputs(size):
        image, count = picture(size)
        ids = [*TEXT[:15], *[model.config.image_token_id] * count, *TEXT[15:]]
        crops = image.crops if len(image.crops) > 1 else image.crops.expand(2, -1, -1, -1)
        return {"input_ids": torch.tensor([ids], device=device),
                "pixel_values": crops[None].to(device, dtype),
                "image_sizes": torch.tensor([image.size[::-1]], device=device)}

    def new_cache(static, length):
        return StaticCache(text, max_cache_len=length) if static else DynamicCache(config=text)

    def generate(inputs, cache, steps=args.steps):
        ticks, ids = [now(device)], []

        class Clock:
            def put(self, value):
                ticks.append(now(device))
                ids.append(value.flatten()[0].item())

            def end(self):
                pass

        mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        model.generate(**inputs, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, streamer=Clock())
        ticks.pop(1)  # the prompt
        return [b - a for a, b in zip(ticks, ticks[1:])], ids[1:]

    def on_filled_cache(lengths, static):
        longest, batch = max(lengths), len(lengths)
        cache = new_cache(static, longest + args.steps + 1)
        keys = random_keys(text.num_key_value_heads, longest, text.hidden_size // text.num_attention_heads)
        keys = keys.to(device, dtype).expand(batch, -1, -1, -1)
        for l in range(text.num_hidden_layers):
            cache.update(keys, keys, l)
        behind = torch.arange(longest + 1, device=device) >= longest - torch.tensor(lengths, device=device)[:, None]
        ids = torch.full((batch, longest + 1), TEXT[0], device=device)
        return rate(generate({"input_ids": ids, "attention_mask": behind.long()}, cache)[0], batch)

    with torch.inference_mode():
        small, wide = inputs(SMALL), inputs(WIDE)
        length = small["input_ids"].shape[1] + args.steps
        runs = [generate(dict(small), new_cache(False, length)) for _ in range(3)]
        result |= {"cold": result["load"] + runs[0][0][0], **peak_memory(device), "first": runs[0][1][0]}
        static = [generate(dict(small), new_cache(True, length)) for _ in range(2)]
        both = (runs[1:], static[1:])
        result["prefill"] = min(median(times[0] for times, _ in some) for some in both)
        result["decode"] = max(median(rate(times) for times, _ in some) for some in both)
        for figure, given in (("vision", small), ("vision_wide", wide)):
            pixels = {key: given[key] for key in ("pixel_values", "image_sizes")}
            result[figure] = timed(functools.partial(model.get_image_features, **pixels), device)
        result["prefill_wide"] = timed(lambda: generate(dict(wide), new_cache(False, 0), 1), device)
        if device.type == "cuda":
            large = inputs(LARGE)
            result["prefill_large"] = timed(lambda: generate(dict(large), new_cache(False, 0), 1), device)
        for figure, lengths in list(lengths_of(args.steps).items())[1:]:
            result[figure] = max(on_filled_cache(lengths, static) for static in (False, True))
            gc.collect()
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The run


def processor():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def least_time(figure, limits, device):
    """The seconds (of a decode step: all its sequences) that the limits allow, or None."""
    kind = FIGURES[figure][2]
    if kind == "mm":
        return limits["operations " + figure] / limits["matmat"]
    return kind and limits["read " + figure] / limits["copy" if device.type == "cuda" else "matvec"]


def ratios(samples, figure, a="none", b="transformers"):
    """What a figure of side a is to side b's, in each round."""
    return [x[figure] / y[figure] for x, y in zip(samples[a], samples[b])]


def targets(samples, m, device):
    """[(what, value, bound)]: value must be at least bound, or at most -bound where bound is negative."""
    def ratio(*of):
        return median(ratios(samples, *of))

    ours, both, cuda = m["none"], m["cli"], device.type == "cuda"
    added = (both["parameters"] - ours["parameters"]) * 1e6 * m["itemsize"] / 2**30
    rows = [("decode at 1,500: x transformers", ratio("decode"), 2 if cuda else 1.8),
            ("decode at 1,500: % of the limit", m["share"]["decode"], 85 if cuda else 75)]
    if cuda:
        rows += [("large prefill: x transformers", 1 / ratio("prefill_large"), 1.2),
                 ("large prefill: % of the limit", m["share"]["prefill_large"], 60)]
    else:
        rows += [("prefill: time / transformers'", ratio("prefill"), -0.8),
                 ("prefill of 384 x 192: time / transformers'", ratio("prefill_wide"), -0.8),
                 ("batch of 8: x single sequence", ours["batch_8"] / ours["decode"], 3)]
    rows += [("load: time / transformers'", ratio("load"), -0.5),
             ("cli over none: prefill", ratio("prefill", "cli", "none"), -1.05),
             ("cli over none: decode (2 % noise)", ratio("decode", "cli", "none"), 0.98)]
    if "peak" in ours:
        rows += [("peak memory / transformers'", ratio("peak"), -1),
                 ("cli over none: peak memory without the added parameters", (both["peak"] - added) / ours["peak"],
                  -1.013)]
    return rows


def show(value):
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def targets_table(samples, m, device):
    """Markdown: what of it was reached."""
    rows = [[what, show(value), f"{'at most' if bound < 0 else 'at least'} {abs(bound):g}",
             "met" if (value <= -bound if bound < 0 else value >= bound) else "not met"]
            for what, value, bound in targets(samples, m, device)]
    lines = markdown(["our target", "reached", "wanted", ""], rows)
    both, ours = m["cli"], m["none"]
    told = f"What `--fusion cli` adds is at least {100 * both['added'] / m['limits']['operations prefill']:.1f} % "
    told += "of prefill's operations"
    if "peak" in ours:
        told += (f" and, beyond its parameters, the levels that it holds until the last injection: "
                 f"{100 * both['held'] / 2**30 / ours['peak']:.1f} % of the peak memory")
    return [*lines, "", told + "."]


def table(samples, m, head):
    """Markdown: the figures, and what they were measured on."""
    rows, noise = [], []
    for figure, (what, unit, _) in FIGURES.items():
        if figure not in m["none"]:
            continue
        ours, theirs, both = (m[side][figure] for side in ("none", "transformers", "cli"))
        better = ratios(samples, figure)
        better = sorted(better if unit == "tokens/s" else [1 / x for x in better])
        if unit == "tokens/s":
            noise += ratios(samples, figure, "cli", "none")
        low, middle, high = (f"{x:.2f}" for x in (better[0], median(better), better[-1]))
        share = f"{m['share'][figure]:.0f}" if figure in m["share"] else ""
        rows.append([what, unit, show(ours), show(theirs), middle if low == high else f"{middle} ({low} to {high})",
                     share, show(both)])
    lines = markdown(["figure", "unit", "`cli.py`", "transformers", "ratio (lowest to highest)", "% of the limit",
                      "with `--fusion cli`"], rows)
    for name in ("sdpa", "varlen_attn", "flash_attn"):
        if f"attend {name}" in m["none"]:
            lines += ["", f"1152 x 1152 through {name}: {show(m['none'][f'attend {name}'])} s, logits at most "
                          f"{m['none'][f'difference {name}']:.1e} of the largest one from SDPA's."]
    limits, same = m["limits"], m["none"]["first"] == m["transformers"]["first"]
    return [*lines, "", described(head) + f" Limits: copy {limits['copy'] / 1e9:.1f} GB/s, "
            f"matrix-vector {limits['matvec'] / 1e9:.1f} GB/s, matrix-matrix {limits['matmat'] / 1e9:,.0f} GFLOP/s. "
            f"{'The same' if same else 'Not the same'} first token on both sides. Decoding is the same code with and "
            f"without fusion; in one round its rates differed by a factor of {min(noise):.2f} to {max(noise):.2f}."]


def described(head):
    """What was measured on what, for people to read."""
    packages = ", ".join(f"{name} {head[name]}" for name in ("torch", "transformers") if name in head)
    return (f"{head['size']}, {head['dtype']}, {head['machine']}, {head['threads']} threads; {packages}, Python "
            f"{head['python']}; commit {head['commit'][:16]}{head['commit'][40:]}; {head['rounds']} rounds.")


def in_process(script, args, flag, value):
    """What a process of its own prints in its last line, as JSON: it gets our flags and one hidden one."""
    command = [sys.executable, script, "--size", args.size, "--device", args.device, "--dtype", args.dtype,
               "--folder", str(args.folder), flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{flag} {value}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare(args):
    """The checkpoint, in llava-hf's layout, which both sides read, in the page cache."""
    size = SIZES["tiny" if args.size == "nano" else args.size]
    if not args.folder.is_dir():
        write_checkpoint(size, args.folder, HERE / "assets/nano/tokenizer.json", layout="llava-hf")
    found = cli.read_json(args.folder / "config.json").get("text_config", {}).get("hidden_size")
    if found != size.hidden:
        raise InputError(f"{args.folder}: a decoder of width {found}, but --size {args.size} has {size.hidden}")
    for path in args.folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


def medians(samples, device, dtype):
    """What every round measured -> {side: {figure: median}}, with "share": {figure: % of the limit}."""
    m = {side: {key: median(x[key] for x in some) for key in some[0]} for side, some in samples.items()}
    for side in SIDES[1:]:
        m[side]["first"] = [x["first"] for x in samples[side]]  # an id has no median
    m |= {"share": {}, "itemsize": dtype.itemsize}
    for figure, (_, unit, _) in FIGURES.items():
        if figure in m["none"] and (least := least_time(figure, m["limits"], device)):
            value = m["none"][figure]
            steps = value / len(lengths_of(0)[figure]) if unit == "tokens/s" else 1 / value
            m["share"][figure] = 100 * least * steps  # of these a second
    return m


def about(args, device, dtype, *packages):
    """The machine and what is measured on it, as JSON."""
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return {"size": args.size, "device": device.type, "dtype": str(dtype).removeprefix("torch."), "machine": machine,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{name: version(name) for name in packages}, "commit": commit(), "rounds": args.rounds}


@contextlib.contextmanager
def results_file(name, args, head):
    """Yields write(line) for NAME-SIZE-DEVICE-DTYPE.jsonl, where the head stands already; a run that is killed leaves
    the file of the one before."""
    folder = HERE / ("experiments/results" if args.readme else "out/speed")  # a published table's file, or another
    path = folder / f"{name}-{args.size}-{head['device']}-{head['dtype']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        def write(line):
            print(json.dumps(line), file=file, flush=True)

        write(head)
        yield write
    part.replace(path)


def run(args, device, dtype):
    """All rounds -> (machine and settings, {side: [figures of a round]}, their medians); every line goes to the results
    as it comes."""
    head = about(args, device, dtype, "torch", "transformers")
    with results_file("speed", args, head) as write:
        samples = {side: [] for side in SIDES}
        for n in range(args.rounds):
            for side in SIDES:
                samples[side].append(in_process(__file__, args, "--side", side))
                write({"round": n, "side": side, **samples[side][-1]})
                print(f"round {n + 1} of {args.rounds}: {side} done", file=sys.stderr)
        m = medians(samples, device, dtype)
        for figure, (what, unit, _) in FIGURES.items():
            if figure in m["none"]:
                write({"figure": figure, "what": what, "unit": unit, **{side: m[side][figure] for side in SIDES[1:]},
                       "percent_of_limit": m["share"].get(figure)})
        for what, value, bound in targets(samples, m, device):
            write({"target": what, "reached": value, "at most" if bound < 0 else "at least": abs(bound)})
    return head, samples, m


def add_flags(parser, hidden, **kwargs):
    parser.add_argument("--size", choices=("nano", "0.5b", "7b"), default="0.5b",
                        help="of the random model (nano: two narrow layers each)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    parser.add_argument("--dtype", choices=("auto", *cli.DTYPES), default="auto", help="default: what the device likes")
    parser.add_argument("--rounds", type=int, default=3, help="each round measures everything once (default 3)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be (default: made, then removed)")
    parser.add_argument("--readme", help="write the table there, between <!-- NAME DEVICE DTYPE --> and <!-- end -->")
    parser.add_argument(hidden, help=argparse.SUPPRESS, **kwargs)  # for the processes that measure


def settle(args, name):
    """Flags of add_flags, checked -> (device, dtype, the table's mark: name, device and dtype); sets args.steps."""
    device, _ = cli.pick_device(args.device)
    dtype, _ = cli.pick_dtype(args.dtype, device)
    if args.rounds < 1:
        raise InputError("--rounds must be at least 1")
    args.steps = 100 if device.type == "cuda" else 32
    mark = f"{name} {device.type} {str(dtype).removeprefix('torch.')}"
    if args.readme and (args.size == "nano" or f"<!-- {mark} -->" not in Path(args.readme).read_text(encoding="utf-8")):
        raise InputError(f"--readme {args.readme}: it has no line <!-- {mark} -->, or --size is nano")
    return device, dtype, mark


def main():
    parser = cli.Parser(description=__doc__)
    add_flags(parser, "--side", choices=SIDES)
    args = parser.parse_args()
    device, dtype, mark = settle(args, "speed")
    if args.side:
        measures = {"limits": measure_limits, "transformers": measure_transformers}
        f = measures.get(args.side) or functools.partial(measure_ours, fusion=args.side)
        return print(json.dumps(f(args, device, dtype)))
    if not importlib.util.find_spec("transformers"):
        raise InputError("transformers is not installed: pip install transformers")
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / args.size
        prepare(args)
        head, samples, m = run(args, device, dtype)
    lines = [*table(samples, m, head), "", *targets_table(samples, m, device)]
    print("\n".join(lines))
    if args.readme:
        put_between_marks(args.readme, {mark: lines})


if __name__ == "__main__":
    cli.run_program(main)
