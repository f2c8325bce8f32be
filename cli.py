"""Cross-Layer Injection (CLI) in one file: many vision levels into many decoder layers, each through a learned gate.

Paper: "From One-to-One to Many-to-Many: Dynamic Cross-Layer Injection for Deep Vision-Language Fusion", ECCV 2026,
https://arxiv.org/abs/2601.10710. A usual vision-language model hands the decoder only the last vision level, once, at
its input. CLI taps several levels of the vision encoder, makes them comparable with low-rank adapters (AMP), and adds
them to the hidden states at the input of several decoder layers, each through a gate that has looked at the picture
and at the prompt (AGF). Everything else is LLaVA-OneVision, or LLaVA-1.5.

    eq. 1    V = ImageEncoder(I)                                   VisionEncoder
    eq. 2    V_hat = MLP(V)                                        CLI.projector
    eq. 3    next token from LLM([V_hat; T])                       Decoder, CLI.forward
    eq. 4-5  V_hat_k = MLP(V_k) + alpha/r B_k A_k V_k              CLI.see (the MLP), AMP; the paper has no alpha/r
    eq. 6-7  v_att, h_att = two learned queries read V_hat_k, h    fold, read
    eq. 8    W = sigmoid(Gate([v_att; h_att]))                     AGF.forward
    eq. 9    h' = h (1 - mask) + (h mask + W V_hat_k)              CLI.inject

Legend: I a picture; V_k hidden states of vision level k (0 = patch embeddings, i = after block i), V_hat_k the same in
the decoder's width (v_hat in the code); A_k, B_k, r, alpha an adapter's matrices, rank and scale; h the decoder's
hidden states, h' after an injection; mask 1 at visual positions; l a decoder layer (from 0); W the weight of a gate.
Sizes: T tokens of the stream (in eq. 3 the text), T_prompt before its pictures are put in, R of T whose output is
wanted, N visual tokens, B sequences, M tokens of the longest one, P patches of a crop, n crops, S crop side in pixels,
D and Dv widths of decoder and vision encoder, C any width, V words of the vocabulary (in eq. 1-2 the last level), H
heads, K key/value heads, hd head size; (W, H) also a picture's pixels.
Sequences lie end to end in one flat stream (T, D) without padding.

    model = CLI.from_pretrained("assets/nano")                     # a folder or a hub id
    prompt, _ = encode_chat(model.tokenizer, model.config.template, [("user", user_content("What is this?", 1))])
    picture = load_image("assets/pictures/single.png")
    for step in model.generate([prompt], [[picture]]): print(model.tokenizer.decode(step), end="")
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
# cuDNN's attention plans anew for every length, so for every token decoded, and is wrong for Qwen2's grouped heads on
# some GPUs (PyTorch issue 193893).
torch.backends.cuda.enable_cudnn_sdp(False)

IMAGE_TOKEN = -200  # stands in a prompt where a picture goes; LLaVA's number
IGNORE = -100  # label of a position that is not supervised
FORMAT = "cross-layer-injection"  # what a config.json of ours says it is
NEARLY_SHUT = -4.0  # a fresh gate's bias on a trained one-to-one base, which is to start near what it was: W = 0.018
MAX_PIXELS = 128_000_000  # a larger picture is refused before it is decoded (decompression bombs)
MAX_PATCHES = 6000  # encoded at once where no gradient is wanted, to keep the activations small: 8 crops of SigLIP's
MAX_ROWS = 512  # that a CPU takes through a decoder layer's MLP at once, there too: what is wide stays in its cache
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of Pillow's limit, which is lower
CPU_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """A user's mistake, told in one line: what, got against expected, which file or key, what to do."""


def first_line(e):
    """What another's exception says, in one line; its kind, if it says nothing."""
    return (getattr(e, "strerror", None) or str(e).strip() or type(e).__name__).splitlines()[0]


def did_you_mean(name, known):
    """The nearest of the known names, as the end of a message; nothing where none is near."""
    near = difflib.get_close_matches(name, known, 1, 0.75)
    return f": did you mean {near[0]}?" if near else ""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def build(cls, d):
    """One of the classes below from fields as JSON has them, lists for tuples. Raises TypeError for a wrong type."""
    d = {k: tuple(tuple(x) if isinstance(x, list) else x for x in v) if isinstance(v, list) else v
         for k, v in d.items()}
    for f in dataclasses.fields(cls):
        if f.name in d and not isinstance(d[f.name], (int, float) if f.type is float else f.type):
            raise TypeError(f"{f.name} is {d[f.name]!r}, expected {f.type}")
    return cls(**d)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP or CLIP encoder; the defaults are SigLIP so400m/14-384 as LLaVA-OneVision uses it."""

    kind: str = "siglip"  # "clip": class token, norm before the blocks, quick GELU, no bias in the patch embedding
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26  # blocks that are run; LLaVA drops the last one of SigLIP's 27 and of CLIP-L's 24
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)

    @property
    def side(self):
        """Patches along one side of a crop: 384 // 14 = 27."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen2 or LLaMA decoder; the defaults are Qwen2-0.5B."""

    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True  # Qwen2 has biases on q, k and v; LLaMA has none
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768


@dataclass(frozen=True)
class FusionConfig:
    """What is let in where: routes (decoder layer <- vision levels), a projector and a gate. No routes: one-to-one.

    "Paper silent": our reading. "Table 4 fits x": x gives the parameter counts of the paper's Table 4. "Differs": not
    what the paper says (README, "Choices").
    """

    routes: tuple = ()  # ((l, (k, k, ...)), ...)
    projector: str = "shared"  # "shared" MLP | "lora": MLP + B A (AMP, eq. 5) | "full": an MLP of each level's own
    gate: str = "none"  # "none": W = 1 | "scalar" | "vector": one weight a channel. Paper silent; Table 4 fits scalar
    lora_rank: int = 128  # paper silent: rank and alpha as in LLaVA's LoRA script; Table 4 fits 128
    lora_alpha: float = 256.0
    lora_per: str = "pair"  # an adapter per (decoder layer, level), or per "level"; paper silent, Table 4 fits pair
    agf_attention: str = "shared"  # one attention for eq. 6 and 7, or "split"; paper silent, Table 4 fits shared
    agf_heads: int = 0  # paper silent: 0 = as many as the decoder
    agf_order: str = "sequential"  # each gate sees h as the levels before it left it, or "parallel"; paper silent
    agf_context: str = "prompt"  # what eq. 7 reads: "prompt" | "visual" | "all" (literal: in training it sees answers)
    inject_at: str = "input"  # or "output" of decoder layer l; paper silent
    gate_bias_init: float = 0.0  # paper silent: 0 from scratch, NEARLY_SHUT on a trained one-to-one base
    agf_norm: bool = False  # Differs: RMSNorm on both inputs of eq. 6-7, against saturated gates
    level_norm: bool = False  # Differs: every level brought to the RMS of the final one, crop by crop

    def __post_init__(self):
        object.__setattr__(self, "routes", tuple((int(l), tuple(map(int, ks))) for l, ks in self.routes))
        allowed = dict(projector=("shared", "lora", "full"), gate=("none", "scalar", "vector"),
                       lora_per=("pair", "level"), agf_attention=("shared", "split"), inject_at=("input", "output"),
                       agf_order=("sequential", "parallel"), agf_context=("prompt", "visual", "all"))
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"fusion field {name}={getattr(self, name)!r}: expected one of {', '.join(values)}")
        if self.lora_rank < 1:
            raise InputError(f"fusion field lora_rank={self.lora_rank}: expected at least 1")

    @property
    def levels(self):
        """Every vision level some route uses, ascending."""
        return sorted({k for _, ks in self.routes for k in ks})


@dataclass(frozen=True)
class Config:
    """The whole model. Vision None is a text model."""

    vision: VisionConfig | None = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    fusion: FusionConfig = FusionConfig()
    image_aspect_ratio: str = "anyres_max_9"  # tokens of about 9 crops at most | "anyres": of any number | "pad": one
    grid_pinpoints: tuple = ()  # canvases (w, h), in pixels, for anyres to choose from; empty: 1x1 to 6x6 crops
    newline: bool = True  # LLaVA-OneVision ends every row of tiles with a learned vector; LLaVA-1.5 has none
    template: str = "qwen_1_5"  # or "vicuna_v1": TEMPLATES
    eos_token_ids: tuple = (151645, 151643)
    repetition_penalty: float = 1.0  # default of generate(); LLaVA-OneVision's own checkpoints ship 1.1 and 1.05

    def __post_init__(self):
        v, d = self.vision, self.decoder
        for name, size in (*vars(d).items(), *(vars(v).items() if v else ())):
            if type(size) is int and size < 1:
                raise InputError(f"config field {name}={size}: expected at least 1")
        if not re.fullmatch(r"pad|anyres(_max_[1-9]\d*)?", self.image_aspect_ratio):
            raise InputError(f"image_aspect_ratio {self.image_aspect_ratio!r}: expected pad, anyres or anyres_max_N")
        if self.template not in TEMPLATES:
            raise InputError(f"template {self.template!r}: expected one of {', '.join(TEMPLATES)}")
        if v:
            if v.kind not in ("siglip", "clip"):
                raise InputError(f"vision field kind={v.kind!r}: expected siglip or clip")
            S = v.image_size
            canvases = self.grid_pinpoints or tuple((w * S, h * S) for w in range(1, 7) for h in range(1, 7))
            object.__setattr__(self, "grid_pinpoints", canvases)
            if not 1 <= v.patch_size <= S:
                raise InputError(f"patch_size {v.patch_size} in crops of {S} pixels")
            colours = (v.image_mean, v.image_std)
            if any(len(x) != 3 or not all(map(math.isfinite, x)) for x in colours) or 0 in v.image_std:
                raise InputError(f"image_mean and image_std {colours}: expected three numbers each")
            if any(len(x) != 2 or {*map(type, x)} != {int} or min(x) < S or x[0] % S or x[1] % S for x in canvases):
                raise InputError(f"grid_pinpoints {canvases}: expected pairs of multiples of a crop's {S} pixels")
        depth, levels = d.num_hidden_layers, v.num_hidden_layers if v else -1
        for l, ks in self.fusion.routes:
            if not ks or not 0 <= l < depth or not all(0 <= k <= levels for k in ks):
                raise InputError(f"route {l} <- {list(ks)}: decoder layers are 0..{depth - 1}, levels 0..{levels}")
        if len(dict(self.fusion.routes)) < len(self.fusion.routes):
            raise InputError(f"routes {list(self.fusion.routes)}: a decoder layer stands in two of them")
        heads = 1 if self.fusion.gate == "none" else self.fusion.agf_heads or d.num_attention_heads
        for name, part, whole in (("agf_heads", heads, d.hidden_size),
                                  ("num_key_value_heads", d.num_key_value_heads, d.num_attention_heads),
                                  ("vision heads", v.num_attention_heads if v else 1, v.hidden_size if v else 1),
                                  ("rotary pairs of", 2, d.head_dim)):
            if part < 1 or whole % part:
                raise InputError(f"{name} {part} does not divide {whole}")

    @property
    def max_tiles(self):
        """N of anyres_max_N, or None: packed tiles of more than 1.21 N crops' tokens are shrunk to about N crops'."""
        return int(self.image_aspect_ratio[11:]) if self.image_aspect_ratio.startswith("anyres_max_") else None

    def to_dict(self):
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(d):
        """Inverse of to_dict, from parsed JSON. Raises InputError on an unknown field."""
        parts = {"vision": VisionConfig, "decoder": DecoderConfig, "fusion": FusionConfig}
        try:
            d = {k: build(parts[k], v) if isinstance(v, dict) else v for k, v in d.items() if k != "format"}
            return build(Config, d)
        except (ArithmeticError, LookupError, TypeError, ValueError) as e:
            raise InputError(f"config.json: {e}") from e


def parse_layers(spec):
    """"RANGE-a-b-s" (the paper's notation: range(a, b, s)), "0,2,5" or a list -> list[int]. Raises InputError."""
    if not isinstance(spec, str):
        return [int(i) for i in spec]
    if m := re.fullmatch(r"RANGE-(\d+)-(\d+)-([1-9]\d*)", spec):
        return list(range(*map(int, m.groups())))
    if re.fullmatch(r"\d+(,\d+)*", spec):
        return [int(i) for i in spec.split(",")]
    raise InputError(f"layers {spec!r}: expected RANGE-start-stop-step or numbers like 0,2,5")


# The family the paper compares (section 4 and its ablations): how layers and levels are paired, projector, gate.
PRESETS = {
    "none": ("none", "shared", "none"),  # one-to-one, the baseline
    "deepstack": ("final", "shared", "none"),  # one-to-many: the final level into the first layers
    "sli": ("each", "full", "none"),  # static one-to-one: i-th sampled level into decoder layer i
    "amp": ("all", "lora", "none"),
    "agf": ("all", "shared", "scalar"),
    "cli": ("all", "lora", "scalar"),  # many-to-many: AMP + AGF
    "full_amp": ("all", "full", "none"),
    "full_amp_agf": ("all", "full", "scalar"),
}


def fusion_preset(name, depth, levels, decoder_layers=None, vision_levels=None, **fields):
    """A row of PRESETS for a decoder of `depth` layers and an encoder of `levels` blocks -> FusionConfig.

    decoder_layers, vision_levels: as parse_layers takes them. The defaults, RANGE-1-depth-4 and RANGE-1-levels-2, give
    the parameter counts of Table 4; the released CLI-7B has RANGE-1-28-4 for both. Further fields: FusionConfig's.
    DeepStack and SLI use as many of the first decoder layers as CLI has injection points (paper silent).
    """
    if name not in PRESETS:
        raise InputError(f"unknown fusion preset {name!r}: expected one of {', '.join(PRESETS)}")
    if name == "none":
        return FusionConfig()
    pairing, projector, gate = PRESETS[name]
    ls = parse_layers(f"RANGE-1-{depth}-4" if decoder_layers is None else decoder_layers)
    ks = parse_layers(f"RANGE-1-{levels}-2" if vision_levels is None else vision_levels)
    if not (ls and ks):
        raise InputError(f"fusion {name}: decoder layers {ls} <- vision levels {ks}: neither may be empty")
    routes = {"all": [(l, ks) for l in ls], "final": [(l, (levels,)) for l in range(len(ls))],
              "each": [(l, (k,)) for l, k in enumerate(ks[: len(ls)])]}[pairing]
    return build(FusionConfig, {"routes": routes, "projector": projector, "gate": gate, **fields})


# ---------------------------------------------------------------------------------------------------------------------
# Shared pieces


def rotary(positions, hd, theta, dtype):
    """positions int[T] -> cos and signed sin, dtype[T, 1, hd], of rotate(); angles in fp32 as in Qwen2 and LLaMA."""
    freqs = 1.0 / theta ** (torch.arange(0, hd, 2, device=positions.device).float() / hd)
    angles = positions.float()[:, None, None] * freqs
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, cos, sin):
    """x (T, H, hd): channels a = i and b = i + hd/2 become a cos - b sin and b cos + a sin ("rotate half").
    Under autocast x is narrower than the stream, whose dtype cos and sin have."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


def attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(hd)) v: q (B, H, T, hd), k and v (B, K, T, hd) -> (B, H, T, hd)."""
    T = q.shape[2]
    blocks_pay = q.dtype == torch.bfloat16 and CPU_BFLOAT16 and (T <= 1024 if torch.is_grad_enabled() else not causal)
    if q.device.type != "cpu" or not blocks_pay:
        if q.shape[1] != k.shape[1]:  # without flash, CUDA's only kernel for enable_gqa makes all T x T scores
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mask = None
        if causal and q.device.type == "mps":  # whose is_causal can let float16 see what follows: PyTorch issue 195910
            causal, mask = False, torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    # In bfloat16 a CPU has it spelled out, 128 queries at a time, whose scores stay in its cache: where that was
    # measured, the fused kernel took 1.3 times as long for pictures, 1.6 to 8 times in training. A decoder's prompt
    # goes to the fused kernel all the same, which keeps the scores in float32: Qwen2's keys have biases too large for
    # less (Qwen2-7B's perplexity is 8.00 then instead of 7.13: transformers PR 33317).
    q, k, v, blocks = q / math.sqrt(q.shape[-1]), k.contiguous(), v.contiguous(), []
    q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, T, hd)
    for start, rows in zip(range(0, T, 128), q.split(128, 3)):
        end = start + rows.shape[3] if causal else k.shape[2]
        scores = (rows.flatten(2, 3) @ k[:, :, :end].transpose(-1, -2)).view(*rows.shape[:4], end)
        if causal:
            scores += scores.new_full(scores.shape[-2:], -math.inf).triu(1 + start)
        blocks.append((scores.softmax(-1).to(v.dtype).flatten(2, 3) @ v[:, :, :end]).view(rows.shape))
    return torch.cat(blocks, 3).flatten(1, 2)


def put(numbers, device, dtype=torch.long):
    """A list of numbers as a tensor on a device, on CUDA without waiting for what the device has to do before."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=device.type == "cuda")


def decode_products(model, rows):
    """[(module, its method, what takes its place)]: the decoder's linear layers and the head, where oneDNN, called
    directly, multiplies `rows` sequences' new tokens faster than PyTorch's choice. In float32, which PyTorch gives to
    MKL, from the weights as they are; in bfloat16 from a copy laid out once, not anew for every product."""
    x86 = model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    pays = model.dtype == torch.float32 or model.dtype == torch.bfloat16 and CPU_BFLOAT16 and rows > 1
    if not (x86 and usable and pays) or torch.is_autocast_enabled("cpu"):
        return []
    onednn = torch.ops.mkldnn  # what torch.compile calls; there is no public name

    def product(weight, bias=None):
        if weight.dtype == torch.bfloat16:
            weight = onednn._reorder_linear_weight(weight, rows)
        return lambda x: onednn._linear_pointwise(x, weight, bias, "none", [], "")

    layers = [m for m in model.decoder.modules() if isinstance(m, nn.Linear)]
    return [(model, "head", product(model.head_weight)), *((m, "forward", product(m.weight, m.bias)) for m in layers)]


@contextlib.contextmanager
def decode_kernels(rows, dtype, products):
    """Within it decode_products' are in their places, and a CPU multiplies one row in bfloat16 by PyTorch's own kernel:
    oneDNN's took twice as long where that was measured. The latter is a switch of the whole process."""
    onednn = torch.backends.mkldnn
    before = onednn.enabled
    onednn.enabled = before and not (rows == 1 and dtype == torch.bfloat16)
    for module, method, product in products:
        vars(module)[method] = product
    try:
        yield
    finally:
        onednn.enabled = before
        for module, method, _ in products:
            del vars(module)[method]


def keep_freed_memory():
    """Have glibc keep what a layer frees for the next one, up to 62 MiB, instead of returning its pages and faulting
    them in again: its limit is twice the largest block of at most 32 MiB that it has freed. Elsewhere without effect.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")  # never touched


def by_sequence(x, seqlens):
    """A flat stream (T, ...) -> (B, M, ...): each sequence in a row of its own, zeros behind it."""
    if len(seqlens) == 1:
        return x[None]
    lens = put(seqlens, x.device)
    row = torch.arange(len(seqlens), device=x.device).repeat_interleave(lens, output_size=len(x))
    column = torch.arange(len(x), device=x.device) - (lens.cumsum(0) - lens)[row]
    out = x.new_zeros(len(seqlens), max(seqlens), *x.shape[1:])
    out[row, column] = x
    return out


def attend(q, k, v, seqlens):
    """Causal attention, every sequence of the flat stream alone: q (T, H, hd), k and v (T, K, hd) -> (T, H, hd).
    seqlens: how many tokens each has."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    kernel = flash_attn_varlen_func or torch.backends.cuda.is_flash_attention_available()  # Windows builds lack it
    flash = q.is_cuda and half and kernel and torch.cuda.get_device_capability(q.device)[0] >= 8
    if flash and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        ends = put([0, *itertools.accumulate(seqlens)], q.device, torch.int32)
        if flash_attn_varlen_func:
            return flash_attn_varlen_func(q, k, v, ends, ends, max(seqlens), max(seqlens), causal=True)
        return varlen_attn(q, k, v, ends, ends, max(seqlens), max(seqlens), window_size=(-1, 0), enable_gqa=True)
    q, k, v = (by_sequence(x, seqlens).transpose(1, 2) for x in (q, k, v))  # the padding is behind: no query sees it
    out = attention(q, k, v, causal=True).transpose(1, 2)
    return torch.cat([x[:n] for x, n in zip(out, seqlens)])


class KVCache:
    """Keys and values of B sequences, (layers, B, K, length, hd), and how many positions of each are filled."""

    def __init__(self, cfg, batch, length, device="cpu", dtype=torch.float32):
        shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, length, cfg.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = [0] * batch

    def reserve(self, length):
        """Room for `length` positions, keeping what is there."""
        if (more := length - self.k.shape[3]) > 0:  # flat: PyTorch pads five dimensions wrongly on MPS (issue 194922)
            longer = (F.pad(x.flatten(0, 2), (0, 0, 0, more)) for x in (self.k, self.v))
            self.k, self.v = (x.unflatten(0, self.k.shape[:3]) for x in longer)

    def attend(self, layer, positions, q, k, v, seqlens):
        """As attend() above, behind what is cached of each sequence; positions int64[T]: those of q in their sequences.
        Writes k and v, but leaves `lengths` alone."""
        keys, values = self.k[layer], self.v[layer]  # (B, K, length, hd)
        if max(seqlens) == 1:  # one new token each: all sequences at once
            shortest, longest, mask = min(self.lengths) + 1, max(self.lengths) + 1, None
            if shortest == longest:  # a slice takes less than the index below
                keys[:, :, longest - 1], values[:, :, longest - 1] = k, v
            else:
                rows = torch.arange(len(seqlens), device=q.device)
                keys[rows, :, positions], values[rows, :, positions] = k, v
                mask = torch.arange(longest, device=q.device) <= positions[:, None, None, None]  # (B, 1, 1, longest)
            # The H/K queries of a key/value head stand side by side as if they were positions: no key is copied.
            grouped = q.view(len(seqlens), k.shape[1], -1, q.shape[-1])  # (B, K, H/K, hd)
            out = F.scaled_dot_product_attention(grouped, keys[:, :, :longest], values[:, :, :longest], mask)
            return out.reshape(q.shape)
        out = []
        for b, (qb, kb, vb) in enumerate(zip(q.split(seqlens), k.split(seqlens), v.split(seqlens))):
            start, end = self.lengths[b], self.lengths[b] + len(kb)
            keys[b, :, start:end], values[b, :, start:end] = kb.transpose(0, 1), vb.transpose(0, 1)
            if start:  # is_causal would align the mask with the first key, not the last: spell it out
                groups = q.shape[1] // k.shape[1]
                mask = torch.ones(len(qb), end, dtype=torch.bool, device=q.device).tril(start).repeat(groups, 1)
                grouped = qb.transpose(0, 1).reshape(1, k.shape[1], -1, q.shape[-1])  # (1, K, H/K T, hd), as above
                new = F.scaled_dot_product_attention(grouped, keys[b, :, :end][None], values[b, :, :end][None], mask)
                out.append(new.reshape(q.shape[1], len(qb), -1).transpose(0, 1))
            else:
                out.append(attend(qb, kb, vb, [len(qb)]))
        return torch.cat(out)


# ---------------------------------------------------------------------------------------------------------------------
# Vision encoder (eq. 1): SigLIP https://arxiv.org/abs/2303.15343, CLIP https://arxiv.org/abs/2103.00020


def linears(**shapes):
    """Linear layers by name: name=(in, out, bias)."""
    return nn.ModuleDict({name: nn.Linear(n, m, bias) for name, (n, m, bias) in shapes.items()})


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (n, P, Dv) -> (n, P, Dv), with CLIP's class token P + 1."""

    def __init__(self, cfg):
        super().__init__()
        Dv, wide, self.cfg = cfg.hidden_size, cfg.intermediate_size, cfg
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(Dv, eps=cfg.layer_norm_eps) for _ in range(2))
        square = (Dv, Dv, True)
        self.self_attn = linears(q_proj=square, k_proj=square, v_proj=square, out_proj=square)
        self.mlp = linears(fc1=(Dv, wide, True), fc2=(wide, Dv, True))

    def forward(self, x):
        f, heads = self.self_attn, self.cfg.num_attention_heads
        y = self.layer_norm1(x)
        q, k, v = (p(y).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (f.q_proj, f.k_proj, f.v_proj))
        x = x + f.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.mlp.fc1(self.layer_norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.cfg.kind == "clip" else F.gelu(y, approximate="tanh")
        return x + self.mlp.fc2(y)


class VisionEncoder(nn.Module):
    """Crops in, the hidden states of the asked levels out; no final norm, as LLaVA reads the tower."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, Dv, clip = cfg, cfg.hidden_size, cfg.kind == "clip"
        self.patch_embedding = nn.Conv2d(3, Dv, cfg.patch_size, stride=cfg.patch_size, bias=not clip)
        self.position_embedding = nn.Embedding(cfg.side**2 + clip, Dv)
        if clip:
            self.class_embedding = nn.Parameter(torch.zeros(Dv))
        self.pre_layrnorm = nn.LayerNorm(Dv, eps=cfg.layer_norm_eps) if clip else nn.Identity()  # published spelling
        self.layers = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.checkpointing = False

    def forward(self, pixels, levels):
        """pixels float[n, 3, S, S], normalised -> {k: float[n, P, Dv]} for k in levels, class token dropped."""
        clip = self.cfg.kind == "clip"
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (n, P, Dv), row-major
        if clip:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        x = self.pre_layrnorm(x + self.position_embedding.weight)
        taps = {}
        for k in range(max(levels) + 1):
            if k > 0:
                x = maybe_checkpoint(self.checkpointing, self.layers[k - 1], x)
            if k in levels:
                taps[k] = x[:, 1:] if clip else x
        return taps


def maybe_checkpoint(on, f, *args):
    """f(*args), its activations recomputed in the backward pass when `on`: memory for time."""
    return checkpoint(f, *args, use_reentrant=False) if on and torch.is_grad_enabled() else f(*args)


def make_projector(Dv, D):
    """Eq. 2's MLP, LLaVA's mlp2x_gelu (exact GELU): Dv -> D -> D."""
    return nn.Sequential(nn.Linear(Dv, D), nn.GELU(), nn.Linear(D, D))


# ---------------------------------------------------------------------------------------------------------------------
# The layout of a stream: where the visual tokens of every picture go


@dataclass
class Picture:
    """A prepared picture: crops float32[n, 3, S, S] (the whole picture first, then tiles row by row; n: count_crops),
    the original size (W, H) in pixels, and the grid of tiles (gw, gh); grid None means one crop and no tiles."""

    crops: torch.Tensor
    size: tuple
    grid: tuple | None


def kept_area(size, grid, side, max_tiles):
    """LLaVA-OneVision's unpadding and reduction -> (top, bottom, left, right) of the tokens kept, (h, w) in the end.

    The tiles' tokens form a map of gh*side x gw*side; rows or columns that only hold padding are cut. What is left, if
    more than 1.21 * max_tiles crops' worth, is shrunk to max_tiles. int() and float floor division as in the original.
    """
    (W, H), (gw, gh) = size, grid
    width, height = gw * side, gh * side
    top = left = 0
    if W / H > width / height:
        top = (height - max(1, int(H * (width / W)))) // 2
    else:
        left = (width - max(1, int(W * (height / H)))) // 2
    h, w = height - 2 * top, width - 2 * left
    box = (top, height - top, left, width - left)
    if max_tiles and (t := math.sqrt(h * w / (max_tiles * side**2))) > 1.1:
        h, w = int(h // t), int(w // t)
    return box, (h, w)


def visual_tokens(picture, config):
    """How many tokens of the stream a picture takes: in LLaVA-OneVision 757 to 8,765, among several pictures 730."""
    if not picture.grid:
        return config.vision.side**2 + config.newline
    _, (h, w) = kept_area(picture.size, picture.grid, config.vision.side, config.max_tiles)
    return config.vision.side**2 + h * (w + config.newline)


def count_crops(size, grid):
    """How many crops of a picture (W, H) are encoded: the whole and its tiles; one where a square picture's only tile
    is the whole again."""
    return 1 if not grid or grid == (1, 1) and size[0] == size[1] else 1 + grid[0] * grid[1]


def stream_length(ids, pictures, config):
    """Positions that a prompt takes in the stream, where its placeholders are its pictures' visual tokens."""
    return len(ids) + sum(visual_tokens(p, config) - 1 for p in pictures)


def pack_picture(x, newline, picture, config):
    """One picture's crop tokens x (n, P, C) and a newline vector (C,) -> its visual tokens (N, C): the whole picture,
    then the tiles as one map without its padding, shrunk bilinearly if need be, a newline behind every row."""
    side, C = config.vision.side, x.shape[-1]
    if not picture.grid:
        return torch.cat([x[0], newline[None]]) if config.newline else x[0]
    gw, gh = picture.grid
    (top, bottom, left, right), (h, w) = kept_area(picture.size, picture.grid, side, config.max_tiles)
    tiles = x[-gw * gh :].reshape(gh, gw, side, side, C)  # of a single crop: the whole picture again
    tiles = tiles.transpose(1, 2).reshape(gh * side, gw * side, C)[top:bottom, left:right]
    if tiles.shape[:2] != (h, w):
        small = F.interpolate(tiles.permute(2, 0, 1)[None].float(), (h, w), mode="bilinear")[0]
        tiles = small.permute(1, 2, 0).to(x.dtype)
    rows = torch.cat([tiles, newline.expand(h, 1, C)], dim=1) if config.newline else tiles
    return torch.cat([x[0], rows.flatten(0, 1)])


class Stream:
    """The expanded stream of one forward pass: every placeholder replaced by its picture's visual tokens.

    From tokens int64[T_prompt], their sequences' seqlens and context bool[T_prompt] or None: repeats int64[T_prompt],
    how many positions each takes, ids int64[T], visual and context bool[T], where int64[N], the visual positions, and
    lens and ends int64[B] of the sequences (seqlens: lens as a list). Every vision level is packed and spliced alike:
    V_hat_k comes out as (T, D) and is zero at text positions, which makes eq. 9's mask a plain sum.
    """

    def __init__(self, tokens, pictures, seqlens, context, config):
        self.pictures, self.config = pictures, config
        slots = tokens == IMAGE_TOKEN
        if int(slots.sum()) != len(pictures):
            raise InputError(f"{len(pictures)} pictures for {int(slots.sum())} image placeholders in the prompt")
        self.repeats = torch.ones_like(tokens)
        self.repeats[slots] = tokens.new_tensor([visual_tokens(p, config) for p in pictures])
        self.ids = self.expand(tokens)
        self.visual = self.ids == IMAGE_TOKEN
        self.where = self.visual.nonzero()[:, 0]
        self.lens = torch.stack([r.sum() for r in self.repeats.split(seqlens)])
        self.seqlens, self.ends = self.lens.tolist(), self.lens.cumsum(0)
        self.context = self.visual if config.fusion.agf_context == "visual" else torch.ones_like(self.visual)
        if config.fusion.agf_context == "prompt" and context is not None:
            self.context = self.expand(context)

    def expand(self, x):
        """A value per token of the prompt (T_prompt, ...) -> per position of the stream (T, ...)."""
        return x.repeat_interleave(self.repeats, 0)

    def pack(self, x, newline=None):
        """All pictures' crop tokens x (n, P, C) and a newline vector (C,) (None: 0) -> (T, C), zero where text is."""
        newline = x.new_zeros(x.shape[-1]) if newline is None else newline.to(x.dtype)
        parts = zip(x.split([len(p.crops) for p in self.pictures]), self.pictures)
        packed = torch.cat([pack_picture(part, newline, picture, self.config) for part, picture in parts])
        return x.new_zeros(len(self.ids), x.shape[-1]).index_copy_(0, self.where, packed)

    def supervised(self, labels):
        """Labels int64[T_prompt] -> the positions int64[R] right before a supervised token, and those tokens int64[R].
        The first of a sequence is not among them: there is nothing before it to predict it from."""
        targets = self.expand(labels).masked_fill(self.visual, IGNORE)
        targets[self.ends - self.lens] = IGNORE
        before = (targets[1:] != IGNORE).nonzero()[:, 0]
        return before, targets[before + 1]


# ---------------------------------------------------------------------------------------------------------------------
# AMP, Adaptive Multi-Projection (eq. 4-5)


class AMP(nn.ModuleDict):
    """Vision levels made comparable: V_hat_k = MLP(V_k) + alpha/r B A V_k, the MLP shared (eq. 5).

    Adapters: self[l][j] for the j-th level of decoder layer l's route, or self[k] for one per level. With
    projector="full" self[k] is an MLP of level k's own, in the shared one's place.
    """

    def __init__(self, cfg, Dv, D):
        super().__init__()
        self.cfg = cfg

        def lora():
            return linears(A=(Dv, cfg.lora_rank, False), B=(cfg.lora_rank, D, False))

        if cfg.projector == "lora" and cfg.lora_per == "pair":
            self.update({str(l): nn.ModuleList(lora() for _ in ks) for l, ks in cfg.routes})
        elif cfg.projector != "shared":
            self.update({str(k): lora() if cfg.projector == "lora" else make_projector(Dv, D) for k in cfg.levels})

    def forward(self, taps, projected, stream, l, levels):
        """Yields pack(V_hat_k) (T, D) for the levels k of decoder layer l: taps[k] is V_k, projected[k] pack(MLP(V_k)).

        pack(MLP(V_k) + alpha/r B A V_k) = projected[k] + alpha/r B pack(A V_k): packing is linear and goes before B,
        with r channels a level instead of D; the MLP's part is packed once per level, in CLI.see.
        """
        if self.cfg.projector != "lora":
            yield from (projected[k] for k in levels)
            return
        adapters = self[str(l)] if self.cfg.lora_per == "pair" else [self[str(k)] for k in levels]
        scale = self.cfg.lora_alpha / self.cfg.lora_rank
        low = scale * torch.cat([adapter.A(taps[k]) for adapter, k in zip(adapters, levels)], -1)
        for adapter, k, x in zip(adapters, levels, stream.pack(low).chunk(len(levels), -1)):
            yield projected[k] + adapter.B(x)


# ---------------------------------------------------------------------------------------------------------------------
# AGF, Adaptive Gating Fusion (eq. 6-8)


def fold(mha, query):
    """A learned query (D,) -> (H, D), what read() multiplies x with for the scores of MultiHeadAttention(query, x, x):
    with a single query the key projection folds into it, q (wk x) = (q wk) x. The key bias adds the same to every
    score, which softmax does not see."""
    H, D = mha.num_heads, len(query)
    wq, wk, _ = mha.in_proj_weight.chunk(3)
    q = (wq @ query + mha.in_proj_bias[:D]).view(H, 1, -1) / math.sqrt(D // H)
    return (q @ wk.view(H, -1, D).to(q.dtype))[:, 0]


def read(mha, folded, x, mask, seqlens):
    """MultiHeadAttention(query, x, x) for one learned query (eq. 6-7), each sequence alone: folded (H, D) from fold(),
    x (T, D), mask bool[T] -> (B, D).

    The numbers are nn.MultiheadAttention's, the work about a hundredth: the keys are never made, and the value
    projection follows the pooling. Where the mask is empty the result is finite and meaningless.
    """
    H, D = folded.shape
    wv, bv = mha.in_proj_weight[2 * D :], mha.in_proj_bias[2 * D :]
    x = x.to(folded.dtype)  # once, before the padding: autocast would cast for each product, after the padding
    scores, mask, x = (by_sequence(y, seqlens) for y in (x @ folded.T, mask, x))
    scores = scores.transpose(1, 2).float().masked_fill(~mask[:, None], torch.finfo(torch.float32).min)  # (B, H, M)
    pooled = scores.softmax(-1).to(x.dtype) @ x  # (B, H, D)
    values = torch.einsum("bhD,hdD->bhd", pooled, wv.view(H, -1, D).to(pooled.dtype)) + bv.view(H, -1)
    return mha.out_proj(values.flatten(1))


class AGF(nn.Module):
    """The gate of one decoder layer: how much of vision level V_hat_k to let in, given V_hat_k and h (eq. 6-8)."""

    def __init__(self, cfg, D, heads):
        super().__init__()
        self.cfg, heads = cfg, cfg.agf_heads or heads
        self.query_v, self.query_h = (nn.Parameter(torch.zeros(D)) for _ in range(2))
        self.attn = nn.MultiheadAttention(D, heads)  # holds the weights; read() computes
        self.attn_h = nn.MultiheadAttention(D, heads) if cfg.agf_attention == "split" else None
        self.gate = nn.Linear(2 * D, D if cfg.gate == "vector" else 1)

    def queries(self):
        """The two learned queries as forward takes them, (H, D) each: the same for all levels of a route."""
        return fold(self.attn, self.query_v), fold(self.attn_h or self.attn, self.query_h)

    def forward(self, v_hat, h, stream, queries):
        """v_hat, h (T, D), queries() -> W float32[B, 1] in [0, 1], one per sequence, or [B, D] with gate="vector"."""
        if self.cfg.agf_norm:
            v_hat, h = (F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (v_hat, h))
        v_att = read(self.attn, queries[0], v_hat, stream.visual, stream.seqlens)  # eq. 6
        h_att = read(self.attn_h or self.attn, queries[1], h, stream.context, stream.seqlens)  # eq. 7
        # Eq. 8, the sigmoid in float32: in bfloat16 W is 1 from 0.998 on, where a gate would have no gradient left.
        return torch.sigmoid(self.gate(torch.cat([v_att, h_att], dim=-1)).float())


# ---------------------------------------------------------------------------------------------------------------------
# Decoder (eq. 3): Qwen2 https://arxiv.org/abs/2407.10671 and, without biases, LLaMA https://arxiv.org/abs/2302.13971


class DecoderLayer(nn.Module):
    """h + attention(norm(h)), then h + SwiGLU(norm(h)): (T, D) -> (R, D); K key/value heads serve H query heads."""

    def __init__(self, cfg):
        super().__init__()
        D, wide, bias, self.hd = cfg.hidden_size, cfg.intermediate_size, cfg.qkv_bias, cfg.head_dim
        q, kv = cfg.num_attention_heads * self.hd, cfg.num_key_value_heads * self.hd
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(D, cfg.rms_norm_eps) for _ in range(2))
        self.self_attn = linears(q_proj=(D, q, bias), k_proj=(D, kv, bias), v_proj=(D, kv, bias), o_proj=(q, D, False))
        self.mlp = linears(gate_proj=(D, wide, False), up_proj=(D, wide, False), down_proj=(wide, D, False))

    def forward(self, h, rope, seqlens, attend, wanted=...):
        """rope: cos and sin of rotary(); attend: attend() or this layer's KVCache.attend; wanted: int64[R], or all."""
        f, x = self.self_attn, self.input_layernorm(h)
        q, k, v = (p(x).view(len(x), -1, self.hd) for p in (f.q_proj, f.k_proj, f.v_proj))  # (T, H|K, hd)
        h = h[wanted] + f.o_proj(attend(rotate(q, *rope), rotate(k, *rope), v, seqlens).flatten(1)[wanted])
        if h.device.type != "cpu" or torch.is_grad_enabled() or len(h) <= MAX_ROWS:
            return self.feed_forward(h)
        return torch.cat([self.feed_forward(x) for x in h.split(MAX_ROWS)])

    def feed_forward(self, h):
        f, x = self.mlp, self.post_attention_layernorm(h)
        return h + f.down_proj(F.silu(f.gate_proj(x)) * f.up_proj(x))


class Decoder(nn.Module):
    """Embeddings, layers and final norm; the output head is CLI's."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.checkpointing = False

    def forward(self, h, seqlens, cache=None, inject=(), wanted=...):
        """h (T, D): embeddings of the stream -> (R, D) after the final norm.

        inject: {l: function h -> h}, applied before decoder layer l, or behind the last one; each is dropped once
        called, the last one with the vision levels that they hold. wanted: int64[R], positions whose output is read
        (default: all); behind its attention the last layer computes only these, unless an injection follows it.
        """
        past = cache.lengths if cache else [0] * len(seqlens)
        positions = torch.cat([torch.arange(p, p + n, device=h.device) for p, n in zip(past, seqlens)])
        rope = rotary(positions, self.cfg.head_dim, self.cfg.rope_theta, h.dtype)
        depth = len(self.layers)
        for l, layer in enumerate(self.layers):
            if l in inject:
                h = maybe_checkpoint(self.checkpointing, inject.pop(l), h)
            h = maybe_checkpoint(self.checkpointing, layer, h, rope, seqlens,
                                 functools.partial(cache.attend, l, positions) if cache else attend,
                                 wanted if l + 1 == depth and not inject else ...)
        if inject:  # behind the last layer, its gates read all positions
            h = maybe_checkpoint(self.checkpointing, inject.pop(depth), h)[wanted]
        if cache:
            cache.lengths = [p + n for p, n in zip(past, seqlens)]
        return self.norm(h)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class CLI(nn.Module):
    """Vision encoder, projector, AMP, AGF and decoder. Attributes: config, tokenizer (or None), gates of the last
    generate(): {l: float[B, levels]}, W per decoder layer, sequence and level of the route (the paper's Figure 1b): of
    a vector gate the mean, meaningless for a sequence without pictures."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokenizer, self.gates = config, None, {}
        v, d, f = config.vision, config.decoder, config.fusion
        D = d.hidden_size
        self.vision = VisionEncoder(v) if v else None
        self.projector = make_projector(v.hidden_size, D) if v else None
        self.image_newline = nn.Parameter(torch.zeros(D)) if v and config.newline else None
        self.amp = AMP(f, v.hidden_size if v else 0, D)
        self.agf = nn.ModuleDict({str(l): AGF(f, D, d.num_attention_heads) for l, _ in f.routes if f.gate != "none"})
        self.decoder = Decoder(d)
        self.lm_head = None if d.tie_word_embeddings else nn.Linear(D, d.vocab_size, bias=False)

    @property
    def device(self):
        return self.decoder.norm.weight.device

    @property
    def dtype(self):
        return self.decoder.norm.weight.dtype

    @property
    def head_weight(self):
        """(V, D); a tied head is the embedding matrix itself."""
        return (self.lm_head or self.decoder.embed_tokens).weight

    def see(self, pictures, stream):
        """Prepared pictures -> base visual tokens (T, D), 0 where text is, and what AMP makes V_hat_k from: taps
        {k: V_k (n, P, Dv)} and projected {k: pack(MLP(V_k)) (T, D)}, once per level however many layers take it."""
        pixels = torch.cat([p.crops for p in pictures]).to(self.device, self.dtype)
        final, fusion = self.config.vision.num_hidden_layers, self.config.fusion
        levels = {final, *fusion.levels}
        few = len(pixels) if torch.is_grad_enabled() else max(1, MAX_PATCHES // self.config.vision.side**2)
        parts = [self.vision(x, levels) for x in pixels.split(few)]
        taps = {k: torch.cat([part.pop(k) for part in parts]) for k in levels}
        if fusion.level_norm:
            rms = {k: x.float().pow(2).mean((1, 2), keepdim=True).sqrt() for k, x in taps.items()}
            taps = {k: x * (rms[final] / rms[k]).to(x.dtype) for k, x in taps.items()}
        base = stream.pack(self.projector(taps[final]), self.image_newline)
        full = fusion.projector == "full"
        projected = {}
        for k in fusion.levels:
            mlp = self.amp[str(k)] if full else self.projector
            projected[k] = base if k == final and not full else stream.pack(mlp(taps[k]), self.image_newline)
        return base, taps, projected

    def inject(self, l, levels, taps, projected, stream, gates, h):
        """Let the levels of decoder layer l's route into h (T, D), in turn; their weights W go to gates[l]."""
        new, weights = h.float(), []  # summed in float32: bfloat16 would round what small weights let in away
        gate = self.agf[str(l)] if str(l) in self.agf else None
        queries = gate and gate.queries()
        W = new.new_ones(len(stream.seqlens), 1)  # of a route without a gate
        for v in self.amp(taps, projected, stream, l, levels):
            if gate:
                W = gate(v, new.to(h.dtype) if self.config.fusion.agf_order == "sequential" else h, stream, queries)
            # Eq. 9, new + W v: v is zero at text positions. In float32: the backward pass to W sums over tokens.
            new = torch.addcmul(new, W.repeat_interleave(stream.lens, 0, output_size=len(h)), v)
            weights.append(W.detach().mean(-1))
        gates[l] = torch.stack(weights, -1)  # (B, levels)
        return new.to(h.dtype)

    def forward(self, tokens, pictures=(), seqlens=None, context=None, cache=None, select=None, labels=None):
        """A flat stream of prompts to logits or to a loss (eq. 3).

        tokens: int64[T_prompt], IMAGE_TOKEN once per picture; pictures: Picture, in order; seqlens: lengths of the
        sequences in tokens (None: one); context: bool[T_prompt], what the gates may read (None: everything; with
        labels: what comes before the first supervised token); cache: KVCache that the sequences continue, with room for
        them; select: None for all positions, "last" of every sequence; labels: int64[T_prompt], the id each token
        should be, IGNORE where unsupervised.
        Returns (logits float[T, V], with select="last" float[B, V], gates {l: float[B, levels]}), or with labels
        (sum of cross-entropies, number of supervised tokens, gates).
        """
        seqlens = seqlens or [len(tokens)]
        if labels is not None and context is None:
            context = torch.cat([(x != IGNORE).cumsum(0) == 0 for x in labels.split(seqlens)])
        stream = Stream(tokens, pictures, seqlens, context, self.config)
        longest = max(n + p for n, p in zip(stream.seqlens, cache.lengths if cache else [0] * len(seqlens)))
        if longest > self.config.decoder.max_position_embeddings:
            raise InputError(f"{longest} tokens in one sequence (pictures included), but this model's context is "
                             f"{self.config.decoder.max_position_embeddings}")
        if labels is not None:
            wanted, targets = stream.supervised(labels)
        else:
            wanted = stream.ends - 1 if select == "last" else ...
        h = self.decoder.embed_tokens(stream.ids.masked_fill(stream.visual, 0))
        gates, inject = {}, {}
        if pictures:
            base, taps, projected = self.see(pictures, stream)
            h = torch.where(stream.visual[:, None], base.to(h.dtype), h)
            behind = self.config.fusion.inject_at == "output"  # of layer l: before the next one
            inject = {l + behind: functools.partial(self.inject, l, ks, taps, projected, stream, gates)
                      for l, ks in self.config.fusion.routes}
            del base, taps, projected  # inject alone holds the levels: the last injection frees them
        h = self.decoder(h, stream.seqlens, cache, inject, wanted)
        if labels is not None:
            return self.cross_entropy(h, targets), len(targets), gates
        return self.head(h), gates

    def head(self, h):
        """Hidden states (R, D) -> logits (R, V)."""
        return F.linear(h, self.head_weight)

    def cross_entropy(self, h, targets):
        """Sum of -log p(target | everything before it in its sequence), from h (R, D) and targets int64[R]."""
        def piece(h, targets):
            return F.cross_entropy(self.head(h).float(), targets, reduction="sum")

        pieces = zip(h.split(1024), targets.split(1024))  # the logits of all, of 152k words, would be the memory peak
        return sum(maybe_checkpoint(len(targets) > 1024, piece, x, y) for x, y in pieces)

    @torch.inference_mode()
    def logits(self, tokens, images=()):
        """Logits of one prompt: tokens int64[T_prompt], IMAGE_TOKEN once per PIL image -> float[T, V]. The gates read
        all of it: an answer to be scored goes to forward, with a context that ends before it."""
        pictures = [prepare_image(x, self.config, len(images) > 1) for x in images]
        return self(tokens.to(self.device), pictures)[0]

    @torch.inference_mode()
    def generate(self, prompts, images=None, max_new_tokens=128, temperature=0.0, top_k=0, top_p=1.0,
                 repetition_penalty=None, seed=0, cache=None):
        """Decode a batch; yields a list of B ids per step, None for a sequence that is over (stop ids are not yielded).

        prompts: list of B id lists; images: list of B lists of Pictures or what load_image takes; temperature 0 greedy;
        top_k 0 and top_p 1 keep every token; repetition_penalty lowers the scores of ids generated so far (None: the
        checkpoint's). cache: a KVCache to continue (a chat: one prompt); afterwards it holds everything that was fed.
        Raises InputError for an empty prompt, an unknown id, or pictures that do not match their places.
        """
        images = [[p if isinstance(p, Picture) else prepare_image(p, self.config, len(ps) > 1) for p in ps]
                  for ps in images or [[]] * len(prompts)]
        penalty = self.config.repetition_penalty if repetition_penalty is None else repetition_penalty
        seqlens = [len(p) for p in prompts]
        if not min(seqlens, default=0):
            raise InputError("generate needs at least one prompt, and no prompt may be empty")
        vocab = self.config.decoder.vocab_size
        for n, (prompt, own) in enumerate(zip(prompts, images, strict=True), 1):
            if (places := sum(int(i) == IMAGE_TOKEN for i in prompt)) != len(own):
                raise InputError(f"prompt {n}: {len(own)} pictures for {places} image placeholders")
            if wrong := [int(i) for i in prompt if i != IMAGE_TOKEN and not 0 <= i < vocab]:
                raise InputError(f"prompt {n}: id {wrong[0]}, but the model has {vocab} words: another's tokenizer?")
        room = max_new_tokens + max(stream_length(p, ps, self.config) for p, ps in zip(prompts, images))
        cache = cache or KVCache(self.config.decoder, len(prompts), 0, self.device, self.dtype)
        cache.reserve(min(max(cache.lengths) + room, self.config.decoder.max_position_embeddings))
        tokens = torch.cat([torch.as_tensor(p, device=self.device, dtype=torch.long) for p in prompts])
        pictures = [p for ps in images for p in ps]
        self.gates = {}  # an earlier call's, should this one be interrupted
        logits, self.gates = self(tokens, pictures, seqlens, cache=cache, select="last")
        generator = torch.Generator(self.device).manual_seed(seed)
        done = [False] * len(prompts)
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)  # ids generated so far
        for step in range(max_new_tokens):
            ids = choose(logits.float(), seen, penalty, temperature, top_k, top_p, generator)
            seen.scatter_(1, ids[:, None], True)
            out = ids.tolist()
            done = [d or i in self.config.eos_token_ids for d, i in zip(done, out)]
            if all(done):
                return
            yield [None if d else i for d, i in zip(done, out)]
            done = [d or n == self.config.decoder.max_position_embeddings for d, n in zip(done, cache.lengths)]
            if step + 1 == max_new_tokens or all(done):
                return
            cache.lengths = [n - d for n, d in zip(cache.lengths, done)]  # what is over writes its last place again
            if step == 0:  # now, for the first tokens need not wait for it
                products = decode_products(self, len(prompts))
            with decode_kernels(len(prompts), self.dtype, products):
                logits = self.head(self.decoder(self.decoder.embed_tokens(ids), [1] * len(prompts), cache))

    # ------------------------------------------------------------------------------------------------ weights

    @torch.no_grad()
    def init_weights(self, prefixes=("",), seed=0):
        """Fresh values for the parameters under the given prefixes: normal, standard deviation 0.02, but 1 /
        sqrt(width) for the newline vector (as LLaVA), AGF's q, k and v and AMP's A (ours); norms 1, biases 0; AMP's B
        zero, its full MLPs copies of the projector; AGF's gate at its configured bias. The same on any device."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if not name.startswith(tuple(prefixes)):
                continue
            if name.endswith("gate.bias"):
                p.fill_(self.config.fusion.gate_bias_init)
            elif name.endswith("bias") or ".B." in name:
                p.zero_()
            elif p.ndim == 1 and "norm" in name:
                p.fill_(1.0)
            else:
                by_width = re.match(r"image_newline|agf\..*in_proj|amp\..*\.A\.", name)
                std = 1 / math.sqrt(p.shape[-1]) if by_width else 0.02
                p.copy_(torch.randn(p.shape, generator=generator).mul_(std))
        if self.config.fusion.projector == "full" and "amp".startswith(tuple(prefixes)):
            for mlp in self.amp.values():
                mlp.load_state_dict(self.projector.state_dict())
        return self

    @staticmethod
    def from_pretrained(source, *, vision=None, fusion=None, fusion_fields=None, device="cpu", dtype=None, key_map=None,
                        quiet=False, seed=0):
        """Read a model from a folder or hub id, in any layout read_layout knows -> CLI in eval mode.

        vision: folder or hub id of a separate encoder (bare SigLIP or CLIP; default: what config.json names).
        fusion: a preset's name, fusion_fields what fusion_preset takes beside it, or a FusionConfig: for a checkpoint
        without CLI's own tensors, which start fresh (seed).
        dtype: of all weights (None: that of the stored embeddings). key_map: JSON file or dict with "patterns":
        [[regex, replacement], ...] for names we do not know, and optionally "decoder_layers", "vision_levels" and
        fields of FusionConfig (see README).
        Raises InputError, for weights that do not fit with every missing, unexpected and misshapen key at once.
        """
        folder = fetch(source)
        raw, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json", {})
        key_map = read_json(key_map) if isinstance(key_map, (str, Path)) else key_map or {}
        keep_freed_memory()
        tensors, tower = read_weights(folder), None
        if not any("patch_embedding" in name for name in tensors):
            vision = vision or raw.get("mm_vision_tower")
        if vision:
            beside = fetch(str(vision))
            tower = read_json(beside / "config.json")
            tensors |= {"vision_model." + name.removeprefix("vision_model."): tensor
                        for name, tensor in read_weights(beside).items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        try:
            config, names = read_layout(raw, shapes, tower, key_map, generation)
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as e:
            raise InputError(f"{source}: malformed config.json, key map or shapes: {type(e).__name__}: {e}") from e
        if isinstance(fusion, str):
            if fusion != "none" and not config.vision:
                raise InputError(f"{source} has no vision encoder, which a fusion needs: name one with vision")
            depth, levels = config.decoder.num_hidden_layers, config.vision.num_hidden_layers if config.vision else 0
            # asked for what a checkpoint has already: trained gates count as the same whatever they started at
            bias = config.fusion.gate_bias_init if config.fusion.routes else NEARLY_SHUT
            try:
                fusion = fusion_preset(fusion, depth, levels, **{"gate_bias_init": bias, **(fusion_fields or {})})
            except TypeError as e:
                raise InputError(f"fusion_fields: {e}") from e
        elif fusion_fields:
            raise InputError("fusion_fields go with the name of a preset")
        extended = fusion not in (None, config.fusion)
        if extended:
            if config.fusion.routes:
                raise InputError(f"{source}: cannot take the fusion that was asked for: it has one of its own")
            config = dataclasses.replace(config, fusion=fusion)
        with torch.device("meta"):
            model = CLI(config).eval()
        mapping, ignored, fresh = map_keys(names, shapes, model, extended)
        notes = [f"ignored {n} tensors: {reason}" for reason, n in Counter(ignored.values()).items()]
        f = config.fusion
        if not extended and f.routes and raw.get("format") != FORMAT:
            ours, theirs = min(item for item in mapping.items() if item[0].startswith(("amp.", "agf.")))
            scale = f", alpha / rank {f.lora_alpha:g} / {f.lora_rank}" if f.projector == "lora" else ""
            notes.append("AMP and AGF as names and shapes tell them (what is wrong is the key map's to say): decoder "
                         f"layers <- levels {dict(f.routes)}{scale}; {theirs} is taken for {ours}")
        if fresh:
            notes.append(f"freshly initialised, not in {source}: {', '.join(fresh)}")
        tied, says = config.decoder.tie_word_embeddings, (raw.get("text_config") or raw).get("tie_word_embeddings")
        if says is not None and says != tied:
            notes.append(f"config.json says the output head is {'' if says else 'not '}tied, but the file holds "
                         + ("none: the embeddings are used" if tied else "a head: that one is used"))
        if notes and not quiet:
            print("\n".join(notes), file=sys.stderr)

        if isinstance(dtype, str) and dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        dtype = DTYPES.get(dtype, dtype) or tensors[mapping["decoder.embed_tokens.weight"]].dtype
        state = {}
        for name, p in model.named_parameters():  # q, k and v of a gate's attention may be stored apart, as name[0..2]
            found = [tensors[mapping[n]] for n in (name, *(f"{name}[{i}]" for i in range(3))) if n in mapping]
            parts = [t.to(device, dtype) for t in found or [torch.empty(p.shape, dtype=dtype)]]
            state[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(p.shape)
        model.load_state_dict(state, assign=True)  # no copy
        model.init_weights(fresh, seed)
        model.tokenizer = Tokenizer.from_folder(folder)
        return model

    def save_pretrained(self, folder, dtype=None, weights=None):
        """Write config.json, model.safetensors and tokenizer.json: a folder that from_pretrained reads. dtype: of the
        stored weights (None: as they are). weights: a state_dict, if not this model's own (a rank has only its share).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.to(dtype or v.dtype).contiguous() for k, v in (weights or self.state_dict()).items()}
        write_whole(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_text(folder / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")
        if self.tokenizer:
            write_text(folder / "tokenizer.json", self.tokenizer.json)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: every published layout becomes ours by a handful of rules

RENAMES = [  # published name -> ours, one after the other, behind the user's own patterns
    (r"^(model\.|language_model\.)+", ""),  # lmms-lab, llava-hf and bare decoders
    (r"^(embed_tokens|layers|norm)\.", r"decoder.\1."),
    (r"^(vision_tower\.|vision_model\.)+(embeddings\.|encoder\.)?", "vision."),
    (r"^mm_projector\.", "projector."),
    (r"^multi_modal_projector\.linear_1\.", "projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "projector.2."),
]
IGNORED = [  # on our names; beside these only vision blocks behind the level that is read are skipped
    (r".*rotary_emb\.inv_freq", "rotary frequencies are computed"),
    (r"vision\.(post_layernorm|head)\..*", "LLaVA reads the vision tower before its final norm and pooling head"),
    (r"vision\.position_ids", "positions are counted"),
    (r"vision\.(text_model\.|(text|visual)_projection\.|logit_).*", "text side of a contrastive model"),
]
BASE = (r"(vision|projector|lm_head|amp|agf)\.|image_newline$|"  # what is not to be guessed at
        r"decoder\.(embed_tokens|norm|layers\.\d+\.(self_attn|mlp|\w+norm))\.")
DECODERS = ("qwen2", "llama", "mistral")  # model_type of those that are computed as here
HEADS = {1152: 16, 1024: 16, 768: 12}  # attention heads of the SigLIP and CLIP sizes; no tensor's shape tells them


def read_layout(raw, shapes, tower=None, key_map=None, generation=None):
    """A checkpoint in any layout -> (Config, {published name: our name}).

    raw: its parsed config.json; shapes: {published name: shape}, those of a separate vision encoder under
    "vision_model."; tower: that encoder's config.json; generation: the parsed generation_config.json. What a shape
    tells is read off the shape. Raises InputError for a layout or a feature that is not supported.
    """
    names, key_map, generation = {}, key_map or {}, generation or {}
    if raw.get("format") == FORMAT:
        if key_map:
            raise InputError("a key map is for the checkpoints of others: this one has our names")
        return Config.from_dict(raw), {name: name for name in shapes}
    for name in shapes:
        names[name] = name
        for pattern, new in [*key_map.get("patterns", []), *RENAMES]:
            names[name] = re.sub(pattern, new, names[name])
    ours = {names[name]: shape for name, shape in shapes.items()}
    for name in ("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj"):
        if f"decoder.{name}.weight" not in ours:
            raise InputError(f"unknown layout (model_type {raw.get('model_type')!r}): no {name}.weight of a Qwen2 or "
                             f"LLaMA decoder among {len(shapes)} tensors, like {min(shapes, default='none')}")
    text = raw.get("text_config") or raw  # what it says of the decoder
    decoder = read_decoder(raw, text, ours)
    qwen = decoder.qkv_bias
    eos = generation.get("eos_token_id") or text.get("eos_token_id") or (151645 if qwen else 2)
    eos = tuple(eos) if isinstance(eos, list) else (151645, 151643) if qwen and eos in (151643, 151645) else (eos,)
    config = {"decoder": decoder, "template": "qwen_1_5" if qwen else "vicuna_v1", "eos_token_ids": eos,
              "repetition_penalty": generation.get("repetition_penalty") or 1.0}
    if "vision.patch_embedding.weight" not in ours:
        return build(Config, {"vision": None, **config}), names
    vision = read_vision(raw, ours, tower)
    pinpoints = raw.get("image_grid_pinpoints") or ()
    if "text_config" in raw:  # transformers keeps (height, width)
        pinpoints = [(w, h) for h, w in pinpoints]
    # A bare SigLIP and a bare decoder become a model as LLaVA-OneVision is, with a newline vector.
    newline = "image_newline" in ours or "projector.0.weight" not in ours and vision.kind == "siglip"
    aspect = raw.get("image_aspect_ratio") or raw.get("vision_aspect_ratio") or ("anyres_max_9" if newline else "pad")
    fusion = find_fusion(names, shapes, decoder.hidden_size, vision.hidden_size, key_map)
    config |= {"vision": vision, "fusion": fusion, "newline": newline, "image_aspect_ratio": aspect,
               "grid_pinpoints": list(map(tuple, pinpoints))}
    return build(Config, config), names


def count_layers(part, ours):
    return 1 + max(int(m[1]) for name in ours if (m := re.match(part + r"\.layers\.(\d+)\.", name)))


def read_decoder(raw, text, ours):
    """DecoderConfig from a parsed config.json, its part about the decoder and {our name: shape}. Raises InputError for
    what is not supported."""
    bare = text is not raw or not any(name.startswith("projector.") for name in ours)  # else it says what the whole is
    if bare and (kind := text.get("model_type", "llama")) not in DECODERS:  # same names, but other arithmetic
        raise InputError(f"config.json: a decoder of model_type {kind!r} is not supported, only {', '.join(DECODERS)}")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"config.json: rope scaling {rope} is not supported")
    qwen = "decoder.layers.0.self_attn.q_proj.bias" in ours
    window = text.get("use_sliding_window", not qwen) and text.get("sliding_window")  # Mistral's; Qwen2's is off
    if window or text.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {text.get('hidden_act')!r} with sliding_window {window!r} is not "
                         "supported, only silu without a window")
    (vocab, D), heads = ours["decoder.embed_tokens.weight"], text.get("num_attention_heads", 32)
    hd = text.get("head_dim") or D // heads
    return build(DecoderConfig, dict(
        hidden_size=D, intermediate_size=ours["decoder.layers.0.mlp.gate_proj.weight"][0], vocab_size=vocab,
        num_hidden_layers=count_layers("decoder", ours), num_attention_heads=heads, head_dim=hd, qkv_bias=qwen,
        num_key_value_heads=ours["decoder.layers.0.self_attn.k_proj.weight"][0] // hd,
        rms_norm_eps=text.get("rms_norm_eps", 1e-6), rope_theta=text.get("rope_theta") or rope.get("rope_theta", 1e4),
        tie_word_embeddings="lm_head.weight" not in ours,
        max_position_embeddings=text.get("max_position_embeddings") or (32768 if qwen else 2048)))


def read_vision(raw, ours, tower):
    """VisionConfig from a parsed config.json, {our name: shape} and a separate encoder's own config.json (or None).
    Raises InputError for what is not supported."""
    v = (tower or {}).get("vision_config") or tower or raw.get("vision_config") or {}
    Dv, _, patch, _ = ours["vision.patch_embedding.weight"]
    clip = "vision.class_embedding" in ours
    usual = "quick_gelu" if clip else "gelu_pytorch_tanh"
    if v.get("hidden_act", usual) != usual:
        raise InputError(f"vision encoder: hidden_act {v['hidden_act']!r} is not supported here, only {usual}")
    heads = v.get("num_attention_heads") or HEADS.get(Dv)
    if not heads:
        raise InputError(f'config.json does not say how many attention heads a vision encoder of width {Dv} has: add '
                         f'"vision_config": {{"num_attention_heads": ..., "image_size": ...}}')
    side = math.isqrt(ours["vision.position_embedding.weight"][0] - clip)
    size = v.get("image_size") or (384 if (side, patch) == (27, 14) else side * patch)  # 27 * 14 = 378: no shape tells
    # Which hidden state is read. LLaVA drops the last block of a CLIP or of a bare SigLIP; inside a checkpoint SigLIP's
    # is gone already, whatever mm_vision_select_layer says.
    last = raw.get("vision_feature_layer", raw.get("mm_vision_select_layer") if clip else None)
    last = (-2 if tower or clip else -1) if last is None else last
    if clip and raw.get("vision_feature_select_strategy", raw.get("mm_vision_select_feature")) in ("full", "cls_patch"):
        raise InputError("config.json: the vision encoder's class token among the visual tokens is not supported")
    return build(VisionConfig, dict(
        kind="clip" if clip else "siglip", hidden_size=Dv, intermediate_size=ours["vision.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=last if last >= 0 else count_layers("vision", ours) + 1 + last, num_attention_heads=heads,
        image_size=size, patch_size=patch, layer_norm_eps=v.get("layer_norm_eps", 1e-5 if clip else 1e-6),
        **({"image_mean": CLIP_MEAN, "image_std": CLIP_STD} if clip else {})))


def find_fusion(names, shapes, D, Dv, key_map):
    """Routes, rank, gate and sharing from the AMP and AGF tensors of a checkpoint that is not ours -> FusionConfig.

    Completes `names`: tensors under names we do not know (the released CLI checkpoints') are guessed by shape; then
    places in a list become layers, levels become places. What no tensor tells (alpha, heads, order, norms) is the key
    map's to say, by FusionConfig's names. Raises InputError where the numbers do not tell.
    """
    for name, ours in names.items():
        if not re.match(BASE, ours):
            names[name] = guess(name, shapes[name], D, Dv) or ours
    form = re.compile(r"(?:agf\.(\d+)|amp\.(\d+)\.(\d+)(?=\.[AB]\.)|amp\.(\d+))\.(.*)")
    found = {name: (m[1] or m[2], m[3] or m[4], m[5])  # the file's number of a layer, of a level (or None), the rest
             for name, ours in names.items() if (m := form.fullmatch(ours))}
    if not found:
        return FusionConfig()

    def meaning(key, numbers):
        """{number in a name: what it means}: itself, unless the names count 0, 1, 2, ... through the key map's list, or
        have no such number."""
        numbers = sorted({int(n) for n in numbers})
        given = parse_layers(key_map.get(key, numbers))
        counted = list(range(len(given)))
        if key not in key_map and numbers == counted != [0]:
            raise InputError(f"the names of the checkpoint's tensors do not tell its {key}, they have "
                             f"{numbers or 'none'}: give their list as {key!r} in the key map")
        if numbers not in ([], given, counted):
            raise InputError(f"key map: {key} is {given}, but the checkpoint has {numbers}")
        return dict(zip(numbers or given, given))

    layers = meaning("decoder_layers", {l for l, _, _ in found.values() if l})
    levels = meaning("vision_levels", {k for _, k, _ in found.values() if k})
    for name, (l, k, rest) in found.items():
        if l and k:
            names[name] = f"amp.{layers[int(l)]}.{list(levels).index(int(k))}.{rest}"
        else:
            names[name] = f"amp.{levels[int(k)]}.{rest}" if k else f"agf.{layers[int(l)]}.{rest}"
    rank = next((shapes[name][0] for name, (_, _, rest) in found.items() if rest.startswith("A.")), 0)
    gate = next((math.prod(shapes[name]) for name, (_, _, rest) in found.items() if rest == "gate.weight"), 0)
    gate //= 2 * D  # rows, also of a single one stored flat
    told = {k: v for k, v in key_map.items() if k not in ("patterns", "decoder_layers", "vision_levels")}
    return build(FusionConfig, dict(
        routes=[(l, tuple(levels.values())) for l in layers.values()], lora_rank=rank or 128, lora_alpha=2 * rank,
        lora_per="pair" if any(l and k for l, k, _ in found.values()) else "level",
        projector="lora" if rank else "full" if any(k for _, k, _ in found.values()) else "shared",
        gate="none" if not gate else "scalar" if gate == 1 else "vector",
        agf_attention="split" if any(rest.startswith("attn_h.") for _, _, rest in found.values()) else "shared") | told)


def guess(name, shape, D, Dv):
    """Our name of an AMP or AGF tensor, from its shape and the numbers in its name, or None."""
    at = ".".join(re.findall(r"(?<![a-z\d])\d+(?![a-z\d])", name))  # "5" or "5.0"
    flat = tuple(n for n in shape if n > 1)
    if re.fullmatch(r"\d+(\.\d+)?", at) and len(shape) == 2 and min(shape) < min(D, Dv):
        if shape[1] == Dv or shape[0] == D:
            return f"amp.{at}.{'A' if shape[1] == Dv else 'B'}.weight"
    leaf = {(3 * D, D): "attn.in_proj_weight", (3 * D,): "attn.in_proj_bias", (2 * D,): "gate.weight",
            (D, 2 * D): "gate.weight", (): "gate.bias"}.get(flat)
    if m := re.search(r"\b([qkv]|out)_proj\.(weight|bias)$", name):
        leaf = f"attn.out_proj.{m[2]}" if m[1] == "out" else f"attn.in_proj_{m[2]}[{'qkv'.index(m[1])}]"
    elif flat == (D,) and "quer" in name:
        leaf = "query_h" if re.search(r"hidden|text|context|lang|(?<![a-z])h(?![a-z])", name.lower()) else "query_v"
    elif flat == (D,) and "gate" in name and name.endswith("bias"):
        leaf = "gate.bias"
    return f"agf.{at}.{leaf}" if leaf and at.isdecimal() else None


def map_keys(names, shapes, model, extended=False):
    """Our names against the model's -> ({our name: published name}, {ignored name: reason}, [parts that start fresh]).

    names: {published name: our name}; shapes: {published name: shape}. Fresh may be, each only as a whole: AMP and AGF
    where the checkpoint was extended by a fusion, and beside a bare vision encoder the projector and newline. Raises
    InputError naming every missing, unexpected and misshapen key at once.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mapping, ignored, problems = {}, {}, {"missing": [], "unexpected": [], "misshapen": []}
    for name, ours in names.items():
        whole, shape = ours.split("[")[0], shapes[name]
        block = re.match(r"vision\.layers\.(\d+)\.", ours)
        unused = block and model.vision and int(block[1]) >= len(model.vision.layers)
        reason = next((why for pattern, why in IGNORED if re.fullmatch(pattern, ours)), None)
        if unused or reason:
            ignored[name] = reason or "vision blocks behind the level that LLaVA reads"
        elif whole not in expected or ours in mapping:
            problems["unexpected"].append(f"{name} {list(shape)}")
        else:
            mapping[ours] = name
            want = expected[whole] if whole == ours else (expected[whole][0] // 3, *expected[whole][1:])
            if [n for n in shape if n != 1] != [n for n in want if n != 1]:
                problems["misshapen"].append(f"{name} {list(shape)} instead of {list(want)}")
    have = {name for name in expected if name in mapping or all(f"{name}[{i}]" in mapping for i in range(3))}
    groups = [("amp.", "agf.")] if extended else []
    if any(name.startswith("vision_model.") for name in names):
        groups.append(("projector.", "image_newline"))
    absent = tuple(p for group in groups if not any(name.startswith(group) for name in mapping) for p in group)
    fresh = sorted({name.split(".")[0] for name in expected if name.startswith(absent)})
    problems["missing"] = [f"{name} {list(shape)}" for name, shape in expected.items()
                           if name not in have and not name.startswith(absent)]
    if any(problems.values()):
        raise InputError("the weights do not fit the model: " + " | ".join(
            f"{len(found)} {what}: {'; '.join(grouped(found))}" for what, found in problems.items() if found))
    return mapping, ignored, fresh


def grouped(names):
    """Lines that differ only in layer numbers as one: "decoder.layers.{0..23}.mlp.up_proj.weight"."""
    groups = {}
    for name in names:
        text = re.sub(r"(?<=\.)\d+(?=\.)", "%s", name.replace("%", "%%"))
        groups.setdefault(text, []).append(re.findall(r"(?<=\.)\d+(?=\.)", name))
    for text, numbers in groups.items():
        spans = [sorted(set(column), key=int) for column in zip(*numbers)]
        yield text % tuple(span[0] if len(span) == 1 else f"{{{span[0]}..{span[-1]}}}"
                           if int(span[-1]) - int(span[0]) < len(span) else f"{{{','.join(span)}}}" for span in spans)


def fetch(source):
    """A folder, or a hub id to download -> Path of the folder. Raises InputError."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"{source}: neither a folder nor a hub id (owner/name)")
    import huggingface_hub

    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            path = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=["*.json", weights]))
            if any(path.glob(weights)):
                break
        return path
    except Exception as e:  # the client's own errors have no common base that is not Exception
        raise InputError(f"{source}: no such folder, and the hub could not give it: {first_line(e)}") from e


def read_json(path, default=None, kind=dict):
    """What a JSON file holds: an object, or what `kind` says; `default`, if given, where there is no file."""
    try:
        if default is not None and not Path(path).exists():
            return default
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"expected a JSON {'list' if kind is list else 'object'}, got a {type(value).__name__}")
        return value
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: {first_line(e)}") from e


def read_weights(folder):
    """{published name: tensor} of all weight files of a folder, memory-mapped: nothing is read before it is used (but a
    .bin from before PyTorch 1.6)."""
    names = [whole + end for whole in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if not found:
        raise InputError(f"{folder}: no model.safetensors, no pytorch_model.bin and no index of either")
    paths, tensors = [found], {}
    if found.suffix == ".json":
        files = read_json(found).get("weight_map")
        if not (isinstance(files, dict) and files and all(Path(str(file)).name == file for file in files.values())):
            raise InputError(f"{found}: expected a weight_map of names to files beside it")
        paths = sorted({folder / file for file in files.values()})
    try:
        for path in paths:
            tensors |= (load_file(path) if path.suffix == ".safetensors"
                        else torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except pickle.UnpicklingError as e:  # PyTorch's message tells how to load it all the same
        raise InputError(f"{path}: damaged, or it holds something other than tensors") from e
    except Exception as e:  # safetensors and zip have errors of their own
        raise InputError(f"{path}: missing, damaged or not a weights file: {first_line(e)}") from e
    if odd := [k for k, v in tensors.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]:
        raise InputError(f"{path}: {odd[0]!r} is not the name of a tensor")
    return tensors


def write_whole(path, write):
    """write(temporary path), then rename: the file at `path`, or that a link there points to, is never half written."""
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with contextlib.suppress(OSError):
            temporary.chmod(mode)  # save_file would have it read by nobody else
        os.replace(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as e:  # a full disk: torch.save and save_file raise the latter two
        hint = "" if isinstance(e, OSError) else " (is the disk full?)"
        raise InputError(f"{path}: cannot be written: {first_line(e)}{hint}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """UTF-8, lines end as they do in `text`; what UTF-8 cannot hold, a lone surrogate, as JSON would escape it."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Preparation of pictures


def load_image(source):
    """A path, encoded bytes or a PIL image -> PIL image, mode RGB: upright by its EXIF tag, transparency on white,
    16 bits scaled to 8, of an animation the first frame. Raises InputError naming the file."""
    try:
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        image = source if isinstance(source, Image.Image) else Image.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, and nothing says which of them is white")
        if image.format == "EPS":
            raise ValueError("PostScript, a program that Pillow would have run")
        image.load()  # raises what is wrong with the picture; below it can only be the EXIF block, which others ignore
        with contextlib.suppress(LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except MemoryError:
        raise  # it says nothing about the picture
    except Exception as e:  # a damaged file can raise nearly anything out of a decoder
        name = "" if isinstance(source, (io.BytesIO, Image.Image)) else f"{source}: "
        why = "in no format that Pillow knows" if isinstance(e, UnidentifiedImageError) else first_line(e)
        raise InputError(f"{name}not a picture that can be read: {why}") from e


def choose_grid(size, pinpoints):
    """anyres: the canvas (w, h) of the list that keeps most of a picture (W, H), then wastes least (float64, truncated,
    in this very order of operations: the original's rounding decides borderline sizes)."""
    W, H = size

    def merit(canvas):
        w, h = canvas
        s = min(w / W, h / H)
        kept = min(int(W * s) * int(H * s), W * H)
        return kept, kept - w * h

    return max(pinpoints, key=merit)  # of equals the first


def choose_tiles(size, config, several):
    """Grid (gw, gh) of the tiles that a picture (W, H) is cut into, or None: one crop, padded to a square, as "pad" has
    it, and as always where a prompt has several pictures. Raises InputError where the square would be too large."""
    if several or config.image_aspect_ratio == "pad":
        if max(size) ** 2 > 4 * MAX_PIXELS:
            raise InputError(f"a picture of {size[0]} x {size[1]} is too long to be padded to a square")
        return None
    w, h = choose_grid(size, config.grid_pinpoints)
    return w // config.vision.image_size, h // config.vision.image_size


def normalise(image, cfg):
    """PIL RGB -> float32[3, h, w], (x * (1 / 255) - mean) / std with the product in float64 as in LLaVA."""
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]  # all values that a channel can have
    levels = ((levels - np.float32(cfg.image_mean)) / np.float32(cfg.image_std)).T.copy()
    pixels = np.asarray(image)
    return torch.from_numpy(np.stack([levels[c][pixels[..., c]] for c in range(3)]))


def prepare_image(image, config, several=False):
    """What load_image takes -> Picture: the whole picture squeezed into one crop, then the tiles of a black canvas;
    without tiles one crop, padded to a square with the mean colour. several: the prompt has others."""
    if not config.vision:
        raise InputError("this model has no vision encoder: it takes text only")
    cfg, S = config.vision, config.vision.image_size
    image = load_image(image)
    grid = choose_tiles(image.size, config, several)
    if not grid:
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), tuple(int(255 * m) for m in cfg.image_mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return Picture(normalise(square.resize((S, S), Image.BICUBIC), cfg)[None], image.size, None)
    base = normalise(image.resize((S, S), Image.BICUBIC), cfg)[None]
    if count_crops(image.size, grid) == 1:
        return Picture(base, image.size, grid)
    (gw, gh), (cw, ch) = grid, (grid[0] * S, grid[1] * S)  # tiles, pixels
    sw, sh = cw / image.width, ch / image.height
    w, h = (cw, min(math.ceil(image.height * sw), ch)) if sw < sh else (min(math.ceil(image.width * sh), cw), ch)
    canvas = Image.new("RGB", (cw, ch))
    canvas.paste(image.resize((w, h), Image.BICUBIC), ((cw - w) // 2, (ch - h) // 2))
    tiles = normalise(canvas, cfg).view(3, gh, S, gw, S).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return Picture(torch.cat([base, tiles]), image.size, grid)


# ---------------------------------------------------------------------------------------------------------------------
# Preparation of text


class Tokenizer:
    """A tokenizer.json. Text never becomes a special token; those come from encode_chat alone."""

    def __init__(self, text):
        spec = json.loads(text)
        added = spec.get("added_tokens", [])
        self.special = {token["id"] for token in added if token.get("special")}  # left out of what a model says
        for token in added:
            token["special"] = True  # else "<image>" or a tool mark in a user's text would be one token
        self.json, self.backend = text, tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.backend.encode_special_tokens = True

    @staticmethod
    def from_folder(folder):
        """The folder's tokenizer.json, or None."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return Tokenizer(path.read_bytes().decode())
        except Exception as e:  # the library raises bare Exception
            raise InputError(f"{path}: not a tokenizer: {first_line(e)}") from e

    def __len__(self):
        return self.backend.get_vocab_size()

    def encode(self, text):
        """Text alone, without special tokens -> list[int]."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError as e:  # a lone surrogate
            raise InputError(f"{text[:40]!r} is not valid Unicode") from e

    def decode(self, ids):
        """Ids (None: nothing) -> str, special tokens left out."""
        ids = [int(i) for i in ids if i is not None]
        return self.backend.decode([i for i in ids if i not in self.special], skip_special_tokens=False)

    def id(self, token):
        """Id of a special token. Raises InputError if the tokenizer has none of that name."""
        i = self.backend.token_to_id(token)
        if i is None:
            raise InputError(f"the tokenizer has no token {token!r}")
        return i


def user_content(text, images):
    """A user's turn with its pictures in front: placeholders joined by spaces, a newline, the text (as LMMs-Eval)."""
    places = ([" ", IMAGE_TOKEN] * images)[1:]
    return [*places, "\n" + text] if images else [text]


# What stands around the turns: system turn | before and behind a user's text | what ends an answer | what follows it.
TEMPLATES = {
    "qwen_1_5": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
                 "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "vicuna_v1": ("<s>A chat between a curious user and an artificial intelligence assistant. "
                  "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
                  "USER: ", " ASSISTANT:", "</s>", ""),
}


def encode_chat(tokenizer, template, turns, start=True):
    """Conversation -> (ids list[int], answer list[bool]: True on what an assistant says and its end mark).

    template: a key of TEMPLATES; turns: [("user" | "assistant", text or list of texts and IMAGE_TOKEN), ...].
    Every user's turn ends with what opens the answer. start=False continues behind a generated answer: its
    end mark instead of the system turn. Text is encoded apart from the special tokens around it, as LLaVA does.
    """
    def marks(text):  # a template's text -> list of texts and ids of special tokens
        parts = re.split(r"(<\|im_start\|>|<\|im_end\|>|</?s>)", text)
        return [tokenizer.id(part) if i % 2 else part for i, part in enumerate(parts) if part]

    system, before, behind, end, then = TEMPLATES[template]
    pieces = [(part, False) for part in marks(system if start else end + then)]  # (text or id, is answer)
    for role, content in turns:
        content = [content] if isinstance(content, str) else content
        if role == "user":
            pieces += [(part, False) for part in [*marks(before), *content, *marks(behind)]]
        else:
            pieces += [(part, True) for part in [*content, *marks(end)]] + [(part, False) for part in marks(then)]
    ids, answer = [], []
    for (is_text, is_answer), run in itertools.groupby(pieces, key=lambda piece: (isinstance(piece[0], str), piece[1])):
        parts = [part for part, _ in run]
        new = tokenizer.encode("".join(parts)) if is_text else parts  # neighbouring texts are encoded as one
        ids += new
        answer += [is_answer] * len(new)
    return ids, answer


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, devices, programs


def choose(logits, seen, penalty, temperature, top_k, top_p, generator):
    """Next ids int64[B] from logits float32[B, V]; seen bool[B, V]: ids the penalty applies to."""
    if penalty != 1:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # no overflow, and no 0 / 0
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:], -math.inf)
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    if top_p < 1:  # else rounding in the sum would drop some
        probs[:, 1:] = probs[:, 1:].masked_fill(probs.cumsum(-1)[:, :-1] >= top_p, 0)  # the first one always stays
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there, and the reason, for people to read."""
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
            if device.type == "cuda" and device.index:  # whatever asks for no GPU by its number means this one
                torch.cuda.set_device(device)
            return device, "as asked"
        except Exception as e:  # PyTorch's own differ by device
            raise InputError(f"device {name!r} cannot be used: {first_line(e).split('. ')[0]}") from e
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), "no GPU found"


def pick_dtype(name, device):
    """"auto" -> bfloat16 where the device computes in it, float16 on Apple GPUs, else float32, and the reason."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in bfloat16"
    if device.type == "mps":
        return torch.float16, "the usual choice on Apple GPUs"
    if device.type == "cpu" and CPU_BFLOAT16:
        return torch.bfloat16, "this CPU computes in bfloat16"
    return torch.float32, "no fast bfloat16 here"


def peak_memory(device):
    """GiB: what CUDA allocated at most, elsewhere the largest resident size of this process; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):  # Linux, whose getrusage starts at the size of the parent process
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Parser(argparse.ArgumentParser):
    """Help as it is written, flags in full; a wrong one is a mistake like any other: one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            commands = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            known = {flag for p in (self, *itertools.chain(*commands)) for a in p._actions for flag in a.option_strings}
            message += "" if unknown[1] in known else did_you_mean(unknown[1], known)  # one of another command's
        raise InputError(message)


def run_program(main):
    """Run main(): a user's mistake ends with status 2 and one line, Ctrl-C with 130, never with a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))
    with contextlib.suppress(AttributeError):  # IDLE and notebooks have streams of their own
        sys.stdout.reconfigure(errors="backslashreplace")  # text that its encoding cannot hold, as standard error does
    try:
        main()
        sys.stdout.flush()  # here, where what goes wrong can be told: not at exit
    except (InputError, OSError) as e:  # an OSError says what is wrong, most name their file
        left = isinstance(e, BrokenPipeError)  # whoever read our output: nobody to tell
        if not left:
            print(f"error: {e}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # nor may it be tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if left else 2)
    except (MemoryError, RuntimeError) as e:
        if not re.search(r"MemoryError|out of memory|not enough memory|allocate memory", f"{type(e).__name__}: {e}"):
            raise
        print(f"error: not enough memory (bfloat16 and smaller batches take less): {first_line(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
