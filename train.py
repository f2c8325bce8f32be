"""Train a CLI model on shards that prepare_data.py wrote: one flat loop.

    python train.py                                 the bundled nano model again: encode, pretrain, tune, blind, scores
    python train.py --recipe quick                  the same in a few minutes, to see it work
    python train.py --recipe paper                  the paper's protocol, from a LLaVA-OneVision checkpoint
    python train.py --config run.json --seed 1      your own: a JSON object of the settings below, or a list of stages
    python train.py --evaluate assets/nano          accuracy by kind of question on the validation splits
    torchrun --nproc_per_node=2 train.py ...        several ranks share every step's rows, with --shard the weights too

A setting on the command line holds for every stage, but --fusion and --fusion_fields only for stages that have a
fusion, where the fields given replace the recipe's one by one. The defaults below are those of --config: the recipes
(RECIPES in this file) set many of them differently.
A run that was killed goes on from its last checkpoint when the same command is given again: on a CPU with the same
losses to the last bit. Its folder: train.json (the settings; at the end the loss too), state.pt (weights, optimiser,
position; at the end replaced by the model) and log.jsonl, a line a step: loss, AdamW's highest learning rate, norm of
the gradient, mean W of each injected layer, tokens/s, MFU (0: not known), GiB, seconds.
"""

import argparse
import atexit
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# oneDNN keeps the last 1,024 kernels that it compiled; with a new shape at nearly every step they grew to some GiB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import cli
from assets.emoji.scenes import open_picture
from cli import CLI, IGNORE, IMAGE_TOKEN, Config, DecoderConfig, InputError, VisionConfig

PEAK_FLOPS = {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
              "NVIDIA H200": 989e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}  # dense bf16
NANO = {  # the bundled model's sizes: 64-pixel crops of 4 x 4 patches
    "vision": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
               "image_size": 64, "patch_size": 16},
    "decoder": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 48, "rope_theta": 1e4, "max_position_embeddings": 2048},
}


def setting(default, text):
    return field(default_factory=lambda: default, metadata={"help": text})


@dataclass
class TrainConfig:
    """The settings of one stage: every field is a flag, its text the help."""

    data: str = setting("data/emoji", "folder that prepare_data.py wrote")
    split: str = setting("train", "split of the data to train on")
    out: str = setting("out/nano", "folder of the run (recipe or file NAME: out/NAME); in it one for each named stage")
    init_from: str = setting("", "model to start from, a folder or hub id; empty: a fresh one of the sizes in --model")
    vision: str = setting("", "separate vision encoder for init_from (bare SigLIP or CLIP)")
    model: dict = setting(NANO, "sizes of a fresh model: JSON with VisionConfig's and DecoderConfig's fields")
    fusion: str = setting("none", f"preset: {', '.join(cli.PRESETS)}; none: what init_from has")
    fusion_fields: dict = setting({}, "JSON with decoder_layers, vision_levels and other fields of FusionConfig")
    image_aspect_ratio: str = setting("", "pad, anyres or anyres_max_N (1x1 to 6x6 tiles); empty: as init_from has it")
    objective: str = setting("answers", "answers: predict them; contrast: tell which answers go with which picture")
    blind: bool = setting(False, "no pictures, the decoder alone: the baseline that every accuracy is compared with")
    steps: int = setting(0, "optimiser steps; 0: as many as the epochs take")
    epochs: float = setting(1.0, "passes over the split, where steps is 0")
    batch_rows: int = setting(64, "rows (conversations) of a step, over all micro-batches and ranks")
    batch_tokens: int = setting(8192, "tokens, pictures included, and patches that one micro-batch may hold")
    max_length: int = setting(32768, "rows of more tokens are left out")
    lr_decoder: float = setting(1e-3, "learning rate of the decoder; 0 freezes a part")
    lr_projector: float = setting(1e-3, "learning rate of the projector and the newline vector")
    lr_fusion: float = setting(1e-3, "learning rate of AMP and AGF")
    lr_vision: float = setting(1e-3, "learning rate of the vision encoder")
    muon: float = setting(0.0, "train the matrices of the blocks with Muon at so many times their rate; 0: with AdamW")
    gate_start: float = setting(0.0, "share of the steps for which the gates stay as they are while AMP learns")
    warmup: float = setting(0.03, "share of the steps over which the learning rate rises; then cosine to 0")
    weight_decay: float = setting(0.0, "decoupled, on matrices only")
    beta2: float = setting(0.99, "AdamW's second beta")
    clip: float = setting(1.0, "largest norm of the gradient; 0: any")
    checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third more time")
    shard: bool = setting(False, "split weights, gradients and optimiser states over the ranks, as 7B needs")
    save_minutes: float = setting(5.0, "minutes between checkpoints")
    eval_every: int = setting(250, "steps between losses on the dev (or val) split, if there is one; 0: never")
    seed: int = setting(0, "of the initial values and the order of the data")
    device: str = setting("auto", "cpu, cuda, mps or auto")
    dtype: str = setting("auto", "of the computation (float32 or bfloat16); the weights being trained stay float32")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), int(f.name == "batch_rows")
            if type(value) is not f.type and not (f.type is float and type(value) is int):
                raise InputError(f"setting {f.name}: got {value!r}, expected {f.type.__name__}")
            if f.type in (int, float) and not least <= value < math.inf:  # nan neither
                raise InputError(f"setting {f.name}: got {value}, expected at least {least}, finite")
        if self.fusion == "none" and self.fusion_fields:
            raise InputError("setting fusion_fields: of which fusion? Name its preset with fusion")
        if self.objective not in ("answers", "contrast"):
            raise InputError(f"setting objective: got {self.objective}, expected answers or contrast")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"setting dtype: got {self.dtype}, expected auto, float32 or bfloat16")
        if self.beta2 >= 1 or self.seed >= 2**32 or self.warmup > 1 or self.gate_start > 1:
            raise InputError("setting beta2 must be below 1, seed below 2**32, warmup and gate_start at most 1")
        make_fusion(self, 99, 99)  # names and values; whether a model has the layers is seen when it is built


# Which layers take which levels, and agf_norm and level_norm, which differ from the paper (README, "Choices").
NANO_FUSION = {"decoder_layers": "0,1,2", "vision_levels": "1,2,4,6", "lora_rank": 16, "lora_alpha": 32,
               "agf_norm": True, "level_norm": True, "gate_bias_init": -2.0}


# The paper at small scale. What SigLIP brings along is made first: an encoder that tells drawings apart by their names.
# Then a one-to-one model learns to name them, alone and in scenes, and from it starts the instruction tuning, with the
# fusion. Muon, as AdamW taught the same encoder much less in the same time.
NANO_STAGES = {
    "encode": {"split": "encode", "steps": 1200, "objective": "contrast", "image_aspect_ratio": "pad", "muon": 10.0,
               "batch_rows": 256, "batch_tokens": 32768, "lr_vision": 2e-3, "eval_every": 0},
    "pretrain": {"split": "pretrain", "steps": 780, "init_from": "encode", "image_aspect_ratio": "anyres_max_9",
                 "muon": 10.0, "lr_decoder": 2e-3, "eval_every": 0},
    # The gates wait: in early runs they shut while the early levels were of no use yet, and stayed shut.
    "tune": {"split": "train", "steps": 1120, "init_from": "pretrain", "fusion": "cli", "fusion_fields": NANO_FUSION,
             "gate_start": 0.3, "muon": 10.0, "lr_vision": 0.0},
    "blind": {"split": "train", "steps": 500, "blind": True, "muon": 10.0},
}
QUICK_STEPS = {"encode": 240, "pretrain": 80, "tune": 80, "blind": 80}
RECIPES = {
    "nano": NANO_STAGES, "quick": {name: {**NANO_STAGES[name], "steps": n} for name, n in QUICK_STEPS.items()},
    "paper": {"cli": {  # LLaVA-OneVision's single-image stage with fresh AMP and AGF
        "init_from": "lmms-lab/llava-onevision-qwen2-0.5b-mid-stage-a4", "image_aspect_ratio": "anyres_max_9",
        "fusion": "cli", "data": "data/onevision", "epochs": 1.0, "batch_rows": 256, "batch_tokens": 32768,
        "max_length": 32768, "lr_decoder": 1e-5, "lr_projector": 1e-5, "lr_fusion": 1e-5, "lr_vision": 2e-6,
        "warmup": 0.03, "weight_decay": 0.0, "beta2": 0.999, "checkpointing": True, "save_minutes": 30.0}},
}


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_manifest(folder, split):
    """What prepare_data.py says about the data in a folder."""
    manifest = cli.read_json(Path(folder) / "manifest.json", {})
    if not manifest.get("splits"):
        raise InputError(f"{folder}: no manifest.json with splits: make the data with prepare_data.py first")
    if manifest.get("format") != 1:  # prepare_data.FORMAT
        raise InputError(f"{folder}: shards of format {manifest.get('format')}, expected 1: make the data again")
    if split not in manifest["splits"]:
        raise InputError(f"{folder} has no split {split!r}, only {', '.join(manifest['splits'])}")
    return manifest


class Rows:
    """The rows of one split, memory-mapped. rows[i] -> tokens int64[T], marks uint8[T], bytes of its pictures; marks: 1
    is part of an answer, 2 is supervised all the same (prepare_data.py --labels llava), 0 is not. costs: the tokens of
    a row or, if there are more, its pictures' patches, which the encoder and AMP take one by one."""

    def __init__(self, folder, split, config, blind=False):
        self.config, self.blind = config, blind
        self.where, self.lengths, self.costs, self.supervised, self.kinds = [], [], [], [], []  # of each row
        manifest = read_manifest(folder, split)
        for file in (Path(folder) / facts["file"] for facts in manifest["splits"][split]["shards"]):
            try:
                with safe_open(file, "pt") as f:
                    shard = {name: f.get_tensor(name) for name in f.keys()}
            except (OSError, SafetensorError) as e:
                raise InputError(f"{file}: missing or damaged ({e}): make the data again") from e
            ends, pictures, sizes = (shard[name].tolist() for name in ("row_offsets", "row_pictures", "picture_sizes"))
            marked = shard["answer"].numpy() > 0  # the first token of a row has nothing before it to be predicted from
            counts = (np.add.reduceat(marked, ends[:-1], dtype=np.int64) - marked[ends[:-1]]).tolist()
            for i, kind in enumerate(shard["kind"].tolist()):
                start, end, first, last = *ends[i : i + 2], *pictures[i : i + 2]
                seen = [tokens_and_patches(config, w, h, last - first > 1) for w, h in sizes[first:last] if not blind]
                self.where.append((shard, start, end, first, last))
                self.lengths.append(end - start - (last - first) + sum(tokens for tokens, _ in seen))
                self.costs.append(max(self.lengths[-1], sum(patches for _, patches in seen)))
                self.supervised.append(counts[i])
                self.kinds.append(manifest["kinds"][kind])

    def __len__(self):
        return len(self.where)

    def __getitem__(self, i):
        shard, start, end, first, last = self.where[i]
        tokens, marks = shard["tokens"][start:end].long(), shard["answer"][start:end]
        if self.blind:
            text = tokens != IMAGE_TOKEN
            return tokens[text], marks[text], []
        offsets = shard["picture_offsets"][first : last + 1].tolist()
        # clone() lets other threads run while the disk is read
        return tokens, marks, [shard["pictures"][a:b].clone().numpy().tobytes() for a, b in zip(offsets, offsets[1:])]

    def batch(self, rows):
        """Row numbers -> arguments of CLI.forward: tokens, pictures, seqlens, labels and context of one flat stream."""
        items = [self[i] for i in rows]
        pictures = [cli.prepare_image(open_picture(p), self.config, len(ps) > 1) for *_, ps in items for p in ps]
        return {**flat_stream(items), "pictures": pictures}


def flat_stream(items):
    """Rows end to end -> tokens, seqlens, labels and context, which ends before a row's first answer."""
    tokens, marks = torch.cat([t for t, _, _ in items]), torch.cat([m for _, m, _ in items])
    return {"tokens": tokens, "seqlens": [len(t) for t, _, _ in items],
            "labels": tokens.masked_fill(marks == 0, IGNORE),
            "context": torch.cat([(m == 1).cumsum(0) == 0 for _, m, _ in items])}


@functools.cache
def tokens_and_patches(config, width, height, several):
    """Visual tokens and patches of a picture of that size, before it is read."""
    size = (width, height)
    try:
        tiles = cli.choose_tiles(size, config, several)
    except InputError:
        return 1 << 40, 1 << 40  # too large to be prepared: more than any row may have
    patches = cli.count_crops(size, tiles) * config.vision.side**2
    return cli.visual_tokens(cli.Picture(None, size, tiles), config), patches


def micro_batches(rows, order, budget):
    """Row numbers of a step -> lists of them, each of at most `budget` tokens and patches (a longer row stands alone);
    sorted by cost, which keeps the padding of the gates' pooling small."""
    batches, size = [], 0
    for i in sorted(order, key=lambda i: (rows.costs[i], i)):
        if not batches or size + rows.costs[i] > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += rows.costs[i]
    return batches


def share_of_step(rows, order, rank, world, cfg):
    """A rank's micro-batches of a step, equal work for every rank. Sharded ranks meet in every forward pass: all must
    have as many, and those with fewer cut theirs up."""
    shares = [sorted(order, key=lambda i: rows.costs[i])[r::world] for r in range(world)]
    shares = [micro_batches(rows, share, cfg.batch_tokens) for share in shares]
    batches, most = shares[rank], max(map(len, shares))
    while cfg.shard and len(batches) < most:
        longest = batches.pop(batches.index(max(batches, key=len)))
        batches += [longest[::2], longest[1::2]]
    return batches


def rows_of_step(step, usable, cfg):
    """The rows of a step, a function of the seed and the step alone: every epoch is a permutation of its own."""
    first = step * cfg.batch_rows
    rows = []
    while len(rows) < cfg.batch_rows:
        epoch, at = divmod(first + len(rows), len(usable))
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch))
        rows += [usable[i] for i in order[at : at + cfg.batch_rows - len(rows)].tolist()]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_model(cfg, manifest):
    """A fresh or a pre-trained model, float32, with the data's tokenizer."""
    if cfg.init_from:
        fusion = None if cfg.fusion == "none" else cfg.fusion  # None: what the base has
        model = CLI.from_pretrained(cfg.init_from, vision=cfg.vision or None, fusion=fusion, dtype="float32",
                                    fusion_fields=cfg.fusion_fields, seed=cfg.seed,
                                    quiet=dist.is_initialized() and dist.get_rank() > 0)
        if not model.vision:
            raise InputError(f"{cfg.init_from} has no vision encoder: name one with --vision")
        check_tokenizer(model.tokenizer, cfg.init_from, cfg.data, manifest)
        if model.config.template != manifest["template"]:  # it learns the one of the data, and where that ends answers
            end = model.tokenizer.id(cli.TEMPLATES[manifest["template"]][3])
            stops = tuple({*model.config.eos_token_ids, end})
            model.config = dataclasses.replace(model.config, template=manifest["template"], eos_token_ids=stops)
        return model
    tokenizer = cli.Tokenizer.from_folder(cfg.data)
    check_tokenizer(tokenizer, cfg.data, cfg.data, manifest)
    try:
        vision = cli.build(VisionConfig, cfg.model["vision"])
        decoder = cli.build(DecoderConfig, {**cfg.model["decoder"], "vocab_size": len(tokenizer)})
    except (AttributeError, KeyError, TypeError) as e:
        raise InputError(f"setting model: {e}") from e
    template, fusion = manifest["template"], make_fusion(cfg, decoder.num_hidden_layers, vision.num_hidden_layers)
    config = Config(vision=vision, decoder=decoder, fusion=fusion, template=template,
                    eos_token_ids=(tokenizer.id(cli.TEMPLATES[template][3]),))
    model = CLI(config).init_weights(seed=cfg.seed)
    model.tokenizer = tokenizer
    return model


def make_fusion(cfg, depth, levels):
    """-> FusionConfig of the settings. Raises InputError."""
    try:
        return cli.fusion_preset(cfg.fusion, depth, levels, **cfg.fusion_fields)
    except (TypeError, ValueError) as e:
        raise InputError(f"settings fusion and fusion_fields: {e}") from e


def check_tokenizer(tokenizer, source, data, manifest):
    """Raises InputError for data that were made with another tokenizer.json than that of `source`."""
    if tokenizer is None:
        raise InputError(f"{source} has no tokenizer.json: put the one of the decoder's family beside the weights")
    if sha256(tokenizer.json) != manifest["tokenizer_sha256"]:
        raise InputError(f"{data} was made with another tokenizer than {source} has: make the data with "
                         f"--tokenizer {source}")


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def part_of_parameter(name):
    """-> the TrainConfig field that holds its learning rate"""
    part = name.split(".")[0]
    return {"vision": "lr_vision", "projector": "lr_projector", "image_newline": "lr_projector",
            "amp": "lr_fusion", "agf": "lr_fusion"}.get(part, "lr_decoder")


def shard(model, cfg, device, world):
    """FSDP: a rank keeps its share of every weight, of its gradient and of its optimiser state. A decoder layer is put
    together when it is computed, all the rest at the start of a forward pass: the vision tower too, for a rank whose
    rows have no picture must still take part in every exchange."""
    if world == 1 or cfg.batch_rows % world or cfg.muon or cfg.objective == "contrast" or not cfg.lr_decoder:
        raise InputError("--shard needs several ranks (torchrun), a --batch_rows that they share evenly, --lr_decoder "
                         "above 0, no --muon and --objective answers")
    mesh = init_device_mesh(device.type, (world,))
    for module in (*model.decoder.layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum over ranks (cf. backward), not a mean
        module.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for matrices (https://kellerjordan.github.io/posts/muon): of the momentum's singular value
    decomposition U S V^T only U V^T is kept, nearly, by five Newton-Schulz steps x <- a x + (b x x^T + c (x x^T)^2) x.

    torch.optim.Muon does the same, but always in bfloat16, on a CPU that does not compute in it many times slower than
    all the rest of training. dtype: that of the Newton-Schulz steps, float32 or bfloat16.
    """

    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, {})
        self.dtype, self.momentum = dtype, momentum

    @torch.no_grad()
    def step(self, closure=None):  # get_state_dict calls step(closure=None)
        for group in self.param_groups:
            shapes = {}  # of each shape all matrices at once
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - self.momentum)
                shapes.setdefault(p.shape, []).append((p, p.grad.lerp(mean, self.momentum)))  # Nesterov's look ahead
            for (rows, columns), pairs in shapes.items():
                for (p, _), update in zip(pairs, self.orthogonal(torch.stack([ahead for _, ahead in pairs]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def orthogonal(self, updates):  # (n, rows, columns) -> the same
        a, b, c = 3.4445, -4.7750, 2.0315
        x = updates.to(self.dtype)
        tall = x.size(1) > x.size(2)
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if tall else x).to(updates.dtype)


def training_dtype(name, device):
    """As cli.pick_dtype, but never float16, in which small gradients would be lost."""
    dtype, why = cli.pick_dtype(name, device)
    return (dtype, why) if dtype != torch.float16 else (torch.float32, "in float16 small gradients would be lost")


def make_optimizers(model, cfg):
    """-> [AdamW, and with cfg.muon Muon too]. A learning rate per part; a part whose rate is 0 is frozen. Decay on
    matrices only. Muon takes the matrices of the blocks: a small encoder that starts from nothing learns much faster
    with it."""
    groups = {}  # (for Muon?, learning rate, decay, share of the steps to wait): parameters
    for name, p in model.named_parameters():
        part, muon = part_of_parameter(name), cfg.muon > 0 and ".layers." in name and p.ndim == 2
        # What no row reaches is frozen too: of a blind model all but the decoder, and what contrast() does not compute.
        idle = cfg.blind and part != "lr_decoder" or cfg.objective == "contrast" and not name.startswith(
            ("vision.", "projector.", "decoder.embed_tokens."))
        rate = 0.0 if idle else getattr(cfg, part)
        p.requires_grad_(rate > 0)
        if rate > 0:
            wait, decay = cfg.gate_start * name.startswith("agf."), cfg.weight_decay * (p.ndim > 1)
            groups.setdefault((muon, rate * (cfg.muon if muon else 1), decay, wait), []).append(p)
    if not groups:
        raise InputError("nothing to train: every learning rate is 0, or of parts that no row reaches")
    adamw, muon = ([{"params": ps, "lr": rate, "peak": rate, "weight_decay": decay, "start": wait}
                    for (own, rate, decay, wait), ps in groups.items() if own == of_muon] for of_muon in (False, True))
    dtype, _ = training_dtype(cfg.dtype, model.device)
    return [torch.optim.AdamW(adamw, betas=(0.9, cfg.beta2), fused=model.device.type == "cuda"),
            *([Muon(muon, dtype)] if muon else [])]


def schedule(step, steps, warmup):
    """Factor of the learning rate: linear warm-up over a share of the steps, then cosine to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def feed(model, batch, autocast, objective="answers"):
    """A batch of Rows -> sum of its cross-entropies, number of supervised tokens (contrast: of pictures), gates."""
    batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with autocast:
        return contrast(model, **batch) if objective == "contrast" else model(**batch)


def contrast(model, tokens, pictures, seqlens, labels, **_):
    """How a fresh vision encoder learns to see, as SigLIP and CLIP do: the mean projected token of a row's picture
    should point where the sum of the embeddings of its own answers does, more than those of the other rows of its
    micro-batch (so --ranks and --batch_tokens change what is learnt) -> (sum of cross-entropies, number of rows, no
    gates). The decoder's loss alone taught a fresh encoder next to nothing in the same time."""
    if any((row == IMAGE_TOKEN).sum() != 1 for row in tokens.split(seqlens)):
        raise InputError("--objective contrast needs rows of one picture each")
    final = model.config.vision.num_hidden_layers
    pixels = torch.cat([p.crops[:1] for p in pictures]).to(model.device)
    seen = model.projector(model.vision(pixels, [final])[final]).mean(1)
    answer, lens = labels != IGNORE, torch.tensor(seqlens, device=model.device)
    words = model.decoder.embed_tokens(labels[answer])
    row = torch.arange(len(lens), device=model.device).repeat_interleave(lens)[answer]  # of each word
    said = words.new_zeros(seen.shape).index_add(0, row, words)
    scores = 20 * F.normalize(seen.float(), dim=-1) @ F.normalize(said.float(), dim=-1).T  # (B, B), temperature 1/20
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, own, reduction="sum"), len(own), {}


def backward(model, batches, total, autocast, objective="answers"):
    """Accumulate the gradient of sum(cross-entropy) / total over micro-batches -> (that sum, gates, tokens fed).

    total: supervised tokens of the whole step, over all micro-batches and ranks, so that every token weighs the same
    however the step is cut up (contrast: rows).
    """
    loss_sum, gates, fed = 0.0, {}, 0
    for batch in batches:
        loss, _, new = feed(model, batch, autocast, objective)
        if loss.requires_grad:  # not where only parts are trained that texts without a picture do not reach
            (loss / total).backward()
        loss_sum += loss.item()
        fed += cli.stream_length(batch["tokens"], batch["pictures"], model.config)
        seen = torch.stack([(t == IMAGE_TOKEN).any() for t in batch["tokens"].split(batch["seqlens"])])
        for l, w in new.items():  # W of a row without a picture says nothing
            gates.setdefault(l, []).append(w[seen])
    return loss_sum, {l: round(torch.cat(w).mean().item(), 4) for l, w in gates.items()}, fed


def sum_over_ranks(model, loss):
    """Add up the gradients of all ranks in place -> the summed loss. One message: many small ones would cost more. The
    gradients of sharded weights are added up already."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:  # no row of the step used it: a gradient of 0, with one rank as with several
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if not dist.is_initialized():
        return loss
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor([loss], device=model.device)])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters] + [1])):
        p.grad.copy_(grad.view(p.shape))
    return flat[-1].item()


def take_step(model, optimizers, batches, total, step, steps, cfg, autocast):
    """One optimiser step, the first being step 1 -> mean cross-entropy, norm of the gradient, gates, tokens fed."""
    rate = schedule(step - 1, steps, cfg.warmup)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * rate * (step > group["start"] * steps)
    for optimizer in optimizers:  # the model's own would miss the shares: after an evaluation FSDP shows whole weights
        optimizer.zero_grad(set_to_none=True)
    loss, gates, fed = backward(model, batches, total, autocast, cfg.objective)
    loss = sum_over_ranks(model, loss) / total
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], cfg.clip or math.inf)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise InputError(f"{cfg.out}, step {step}: loss {loss}, gradient norm {norm}: begin again with lower learning "
                         "rates in another --out")
    for optimizer in optimizers:
        optimizer.step()
    return loss, norm, gates, fed


@torch.no_grad()
def mean_loss(model, rows, chosen, cfg, autocast):
    """Cross-entropy per supervised token over the chosen rows."""
    total, count = 0.0, 0
    for batch in micro_batches(rows, chosen, cfg.batch_tokens):
        loss, n, _ = feed(model, rows.batch(batch), autocast, cfg.objective)
        total, count = total + loss.item(), count + n
    return total / max(1, count)


def commit():
    """The repository's commit, "+changes" where files differ from it, or "unknown"."""
    try:
        git = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return head + ("+changes" if git(["git", "status", "--porcelain", "-uno"]).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


FREE = ("out", "device", "save_minutes", "eval_every")  # settings that may differ when a run goes on


def earlier_run(out, settings):
    """What a run of the same settings left in its folder -> (its train.json, its checkpoint), {} for none."""
    facts, state = cli.read_json(out / "train.json", {}), {}
    ours = ("train.json", "log.jsonl", "config.json", "model.safetensors", "tokenizer.json")
    if not isinstance(facts.get("config"), dict) and any((out / name).exists() for name in ours):
        raise InputError(f"{out} holds a model or log that is no run's of train.py: give another --out")
    free = {*FREE, "data", "checkpointing", "shard"}  # the latter for memory's sake; of the data the hash is compared
    if settings["objective"] == "answers":  # contrast compares the rows of a process's micro-batch with each other
        free |= {"ranks", "batch_tokens"}
    if "loss" in facts:  # finished: later stages may have another number of processes
        free.add("ranks")
    wrong = [f"{k}={v!r}" for k, v in facts.get("config", {}).items() if k not in free and v != settings.get(k)]
    if wrong and any((out / name).exists() for name in ("state.pt", "model.safetensors")):  # else nothing would be lost
        raise InputError(f"{out} holds a run with other settings, {', '.join(wrong)}: give another --out, or delete it")
    if "loss" not in facts and (out / "state.pt").exists():  # else it is finished
        try:
            mapped = os.name != "nt"  # where a mapped file cannot be replaced by the next checkpoint
            state = torch.load(out / "state.pt", map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as e:  # pickle and zip each have errors of their own
            raise InputError(f"{out}: its checkpoint is damaged, delete it: {cli.first_line(e)}") from e
        if not facts:
            raise InputError(f"{out}: state.pt without the train.json of its run: delete it, or give another --out")
    return facts, state


def train(cfg):
    """Run one stage to its end, from its last checkpoint if there is one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = print if rank == 0 else lambda *a, **k: None
    manifest = read_manifest(cfg.data, cfg.split)
    out = Path(cfg.out)
    settings = {**dataclasses.asdict(cfg), "data_sha256": sha256(json.dumps(manifest)), "ranks": world}
    if cfg.init_from and (earlier := cli.read_json(Path(cfg.init_from) / "train.json", {})):  # trained here, and how
        before = earlier.get("config", earlier)  # the bundled model's file tells of several stages
        settings["init_sha256"] = sha256(json.dumps({k: v for k, v in before.items() if k not in FREE}))
    facts, state = earlier_run(out, settings)
    if "loss" in facts:
        return say(f"{out}: finished before, loss {facts['loss']:.4f}")
    device, why = cli.pick_device(cfg.device)
    if dist.is_initialized() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    dtype, why_dtype = training_dtype(cfg.dtype, device)
    # Sharded weights are there for one layer at a time: their copies in bfloat16 must not stay either.
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=not cfg.shard)

    model = build_model(cfg, manifest)
    shard(model, cfg, device, world) if cfg.shard else model.to(device)
    if cfg.image_aspect_ratio:
        model.config = dataclasses.replace(model.config, image_aspect_ratio=cfg.image_aspect_ratio, grid_pinpoints=())
    model.vision.checkpointing = model.decoder.checkpointing = cfg.checkpointing
    longest = min(cfg.max_length, model.config.decoder.max_position_embeddings)

    def read(split):  # -> its rows, and the numbers of those that can be trained on
        rows = Rows(cfg.data, split, model.config, cfg.blind)
        return rows, [i for i, n in enumerate(rows.lengths) if n <= longest and rows.supervised[i]]

    rows, usable = read(cfg.split)
    if not usable:
        raise InputError(f"no row of {cfg.data} ({cfg.split}) has an answer and at most {longest} tokens")
    dev_split = next((s for s in ("dev", "val") if s in manifest["splits"]), None)
    dev, dev_usable = read(dev_split) if dev_split and cfg.eval_every else (None, [])
    steps = cfg.steps or max(1, round(cfg.epochs * len(usable) / cfg.batch_rows))
    optimizers = make_optimizers(model, cfg)
    count = Counter()
    for name, p in model.named_parameters():
        count[part_of_parameter(name)[3:]] += p.numel()
    say(f"== {out}: {steps} steps of {cfg.batch_rows} rows from {len(usable)} of {cfg.data} ({cfg.split}), "
        f"{len(rows) - len(usable)} too long or without an answer\n"
        f"device {device} ({why}), computing in {str(dtype)[6:]} ({why_dtype}), {world} rank(s); parameters: "
        + ", ".join(f"{part} {n:,}" for part, n in count.items()))
    say("settings that are not the default: " + ", ".join(
        f"{f.name}={settings[f.name]!r}" for f in dataclasses.fields(cfg) if settings[f.name] != f.default_factory()))
    start = seconds = 0
    if state:
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"],
                       options=StateDictOptions(full_state_dict=True))
        start, seconds = state["step"], state["seconds"]
        state = None  # of 7B it takes 94 GiB
        say(f"going on after step {start}")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.glob(".*.[0-9]*.tmp"):  # left by a run that was killed while it saved
            path.unlink()
        facts = {"config": settings, "commit": commit(), "torch": torch.__version__, "device": str(device),
                 "steps": steps, "dtype": str(dtype)[6:]}
        cli.write_text(out / "train.json", json.dumps(facts, indent=1) + "\n")
        log = out / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        cli.write_text(log, "".join(lines[:start]))  # later steps are run again
        log = open(log, "a")
    matrix_flops = 6 * sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" and dtype == torch.bfloat16 else None
    peak = PEAK_FLOPS.get(gpu, 0)

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # put together from all ranks, for rank 0

    def save(step):
        weights, moments = get_state_dict(model, optimizers, options=whole)
        if rank == 0:
            state = {"step": step, "seconds": seconds, "model": weights, "optimizers": moments}
            cli.write_whole(out / "state.pt", lambda path: torch.save(state, path))

    def due():  # time for a checkpoint, by the clock of rank 0
        late = torch.tensor(time.time() - saved > 60 * cfg.save_minutes, device=device)
        if dist.is_initialized():
            dist.broadcast(late, 0)
        return bool(late)

    def load(step):  # this rank's share of a step, ready to be fed, and the supervised tokens of all
        order = rows_of_step(step, usable, cfg)
        batches = list(threads.map(rows.batch, share_of_step(rows, order, rank, world, cfg)))
        return batches, len(order) if cfg.objective == "contrast" else sum(rows.supervised[i] for i in order)

    saved = time.time()
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # The next step's pictures are prepared while this one is computed, those of its micro-batches at once.
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(cores) as threads:
        following = ahead.submit(load, start)
        for step in range(start + 1, steps + 1):
            began = time.time()
            batches, total = following.result()
            if step < steps:
                following = ahead.submit(load, step)
            loss, norm, gates, fed = take_step(model, optimizers, batches, total, step, steps, cfg, autocast)
            took = time.time() - began
            seconds += took
            # lr is AdamW's highest; mfu: about what share of the GPU's peak 6 x parameters x tokens make
            line = {"step": step, "loss": loss, "lr": max(group["lr"] for group in optimizers[0].param_groups),
                    "norm": norm, "gates": gates, "tokens_per_s": round(fed * world / took),
                    "mfu": matrix_flops * fed / took / peak if peak else 0.0, "gib": cli.peak_memory(device),
                    "seconds": round(seconds, 1)}
            if dev_usable and (step % cfg.eval_every == 0 or step == steps):
                line["dev_loss"] = mean_loss(model, dev, dev_usable[:256], cfg, autocast)
            if rank == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(readable(line, steps, (steps - step) * seconds / step), flush=True)
            if step < steps and due():
                save(step)
                saved = time.time()
    weights = get_model_state_dict(model, options=whole)
    if rank == 0:
        log.close()
        model.save_pretrained(out, weights=weights)
        facts |= {"loss": loss, "dev_loss": line.get("dev_loss"), "seconds": round(seconds, 1)}
        cli.write_text(out / "train.json", json.dumps(facts, indent=1) + "\n")
        (out / "state.pt").unlink(missing_ok=True)
    say(f"{out}: done in {seconds / 60:.1f} min")


def readable(line, steps, left):
    """A line of the log for people; left: seconds to go."""
    gates = " ".join(f"{l}:{w:.2f}" for l, w in line["gates"].items())
    return (f"step {line['step']}/{steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  norm {line['norm']:.2f}  "
            + (f"W {gates}  " if gates else "") + f"{line['tokens_per_s']} tok/s  MFU {100 * line['mfu']:.0f}%  "
            f"{line['gib']:.1f} GiB  {left / 60:.1f} min left"
            + (f"  dev {line['dev_loss']:.4f}" if "dev_loss" in line else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def first_answer(marks):
    """Marks of a row -> (start, end) of its first answer."""
    start = int((marks == 1).nonzero()[0])
    return start, start + int((marks[start:] == 1).cumprod(0).sum())


def answers(model, rows, name, limit=0):
    """Greedy answers to the first question of `limit` rows (0: all) -> [(kind, right answer, given answer, W)], W:
    {decoder layer: a weight per level}, none without a picture. What is longer than the model's context is answered
    with nothing."""
    out = [None] * min(limit or len(rows), len(rows))
    for chosen in tqdm(micro_batches(rows, range(len(out)), 16384), desc=name, unit="batch"):
        prompts, pictures, asked = [], [], []
        for i in chosen:
            tokens, marks, data = rows[i]
            start, end = first_answer(marks)
            out[i] = (rows.kinds[i], model.tokenizer.decode(tokens[start:end].tolist()).strip(), "", {})
            if rows.lengths[i] - len(tokens[start:]) <= model.config.decoder.max_position_embeddings:
                prompts.append(tokens[:start].tolist())
                pictures.append([open_picture(p) for p in data[: prompts[-1].count(IMAGE_TOKEN)]])
                asked.append(i)
        steps = list(model.generate(prompts, pictures, max_new_tokens=32, repetition_penalty=1.0)) if asked else []
        for b, i in enumerate(asked):
            given = model.tokenizer.decode([step[b] for step in steps]).strip()
            out[i] = (*out[i][:2], given, {l: w[b].tolist() for l, w in model.gates.items() if pictures[b]})
    return out


def majority(rows):
    """{kind: tokens of its most frequent first answer}."""
    counts = {}
    for kind, (tokens, marks, _) in zip(rows.kinds, rows):
        start, end = first_answer(marks)
        counts.setdefault(kind, Counter())[tuple(tokens[start:end].tolist())] += 1
    return {kind: c.most_common(1)[0][0] for kind, c in counts.items()}


def markdown(head, rows):
    """A table's head and rows -> its lines of Markdown; none without rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]] if rows else []


def put_between_marks(page, tables):
    """Rewrite a Markdown file: {mark: lines} go between <!-- mark --> and the next <!-- end -->."""
    text = Path(page).read_text(encoding="utf-8")
    for mark, lines in tables.items():
        new = "\n".join(lines).rstrip() + "\n"
        text, found = re.subn(rf"(?s)(<!-- {mark} -->\n).*?(<!-- end -->)", lambda m, new=new: m[1] + new + m[2], text)
        if not found:
            raise InputError(f"{page} has no lines <!-- {mark} --> and <!-- end --> to put the table between")
    cli.write_text(Path(page), text)


def accuracy_table(scores, columns):
    """{split: {kind: counts}} -> lines of Markdown."""
    rows = []
    for kind in [*dict.fromkeys(kind for kinds in scores.values() for kind in kinds), "all"]:
        cells = []
        for kinds in scores.values():
            row = sum(kinds.values(), Counter()) if kind == "all" else kinds.get(kind)
            cells.append(" / ".join(f"{100 * row[who] / row['n']:.0f}" for who in columns) if row else "")
        rows.append([kind, *cells])
    return markdown(["question", *scores], rows)


def gates_table(opened, levels):
    """{kind: W of its questions} -> {kind: mean W}, and that as lines of Markdown: what every kind lets in."""
    means = {kind: {l: torch.tensor([W[l] for W in found]).mean(0).tolist() for l in sorted(found[0])}
             for kind, found in opened.items()}
    layers = next(iter(means.values()))
    head = ["question", *(f"layer {l} <- {', '.join(map(str, levels[l]))}" for l in layers)]
    return means, markdown(head, [[kind, *(" ".join(f"{w:.2f}" for w in W) for W in mean.values())]
                                  for kind, mean in means.items()])


def evaluate(source, blind_source, data, readme=None, device="auto", limit=0):
    """Accuracy (exact match) by split and kind of the model, its blind twin and the majority answer, and the mean W by
    kind: printed as tables, and written to eval.json in the model's folder (of one that was not trained on these data:
    in out/eval/MODEL/DATA), every answer to answers.jsonl."""
    device, _ = cli.pick_device(device)
    manifest = read_manifest(data, "train")
    splits = [split for split in manifest["splits"] if split.startswith("val")]
    if not splits:
        raise InputError(f"{data} has no validation split: make it with prepare_data.py --val N")
    models = {}
    for who, path in (("model", source), ("blind", blind_source)):
        if path:
            models[who] = CLI.from_pretrained(path, device=device, dtype="float32", quiet=True)
            check_tokenizer(models[who].tokenizer, path, data, manifest)
    model = models["model"]
    if not model.vision:
        raise InputError(f"{source} has no vision encoder")
    trained = json.dumps(cli.read_json(Path(source) / "train.json", {}))
    out = Path(source)
    if sha256(json.dumps(manifest)) not in trained:
        out = Path("out/eval", "-".join(Path(os.path.abspath(source)).parts[1:][-2:]), manifest["name"])
    out.mkdir(parents=True, exist_ok=True)
    most = {kind: model.tokenizer.decode(ids).strip()
            for kind, ids in majority(Rows(data, "train", model.config, blind=True)).items()}
    scores, opened, lines = {}, {}, []
    for split in splits:
        scores[split] = {}
        for who, m in models.items():
            rows = Rows(data, split, m.config, who == "blind")
            for kind, right, given, W in answers(m, rows, f"{split} {who}", limit):
                plain = kind.removesuffix("-zh")
                row = scores[split].setdefault(plain, Counter())
                row[who] += given == right
                if who == "model":
                    row.update(n=1, majority=int(most.get(kind) == right))
                    lines.append({"split": split, "kind": kind, "right": right, "given": given})
                    if W:
                        opened.setdefault(plain, []).append(W)
    table = accuracy_table(scores, [*models, "majority"])
    print(f"\naccuracy %, {' / '.join(models)} / majority answer\n" + "\n".join(table))
    tables, means = {"accuracy": table}, {}
    if opened:
        means, tables["gates"] = gates_table(opened, dict(model.config.fusion.routes))
        print("\nmean W, decoder layer <- vision levels\n" + "\n".join(tables["gates"]))
    facts = {"model": str(source), "data_seed": manifest["seed"], "commit": commit(), "scores": scores, "gates": means}
    cli.write_text(out / "eval.json", json.dumps(facts, indent=1) + "\n")
    cli.write_text(out / "answers.jsonl", cli.json_lines(lines))
    print(f"\n{out / 'eval.json'} and answers.jsonl are written")
    if readme:
        put_between_marks(readme, {f"nano {name}": table for name, table in tables.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """-> (arguments of the program, [TrainConfig of every stage])"""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default="nano", help="ready-made stages (default: nano)")
    parser.add_argument("--config", help="JSON file of your own settings, or of a list of stages, instead of a recipe")
    parser.add_argument("--evaluate", metavar="MODEL", help="score a model on the validation splits; train nothing")
    parser.add_argument("--blind_model", help="the model trained with --blind to put beside it (with --evaluate)")
    parser.add_argument("--questions", type=int, default=0, help="score the first N of each split (0: all; quick: 250)")
    parser.add_argument("--ranks", type=int, default=0, help="processes on a CPU (0: two, on Windows or one core one)")
    parser.add_argument("--readme", help="write the tables of --evaluate between the marks in this file too")
    for name, f in fields.items():
        default = f.default_factory()
        kind = {"type": json.loads if isinstance(default, dict) else type(default), "metavar": name.upper()}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        shown = "" if isinstance(default, dict) else f" (default: {default})"
        parser.add_argument(f"--{name}", default=None, help=f.metadata["help"] + shown, **kind)
    args = parser.parse_args(argv)
    if args.questions < 0 or args.ranks < 0:
        raise InputError("--questions and --ranks cannot be negative")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.evaluate and (extra := given.keys() - {"data", "device"}):
        raise InputError(f"--evaluate takes no --{min(extra)}: it scores a model as it is, on all validation splits")
    if args.blind_model and not args.evaluate:
        raise InputError("--blind_model goes with --evaluate")
    if (args.readme or args.questions) and not args.evaluate and (args.config or args.recipe == "paper"):
        raise InputError("--readme and --questions are for scores: with --evaluate, or the recipes nano and quick")
    stages = read_stages(args.config) if args.config else RECIPES[args.recipe]
    base = Path(args.out or f"out/{Path(args.config).stem if args.config else args.recipe}")
    # A fusion is for the stages that have one, not for what others start from, nor for the blind twin.
    fusion = {key: given.pop(key) for key in ("fusion", "fusion_fields") if key in given}
    fused = {name for name, stage in stages.items() if stage.get("fusion", "none") != "none"} or {*stages}
    configs = {}
    for name, stage in stages.items():
        if wrong := [key for key in stage if key not in fields]:
            raise InputError(f"{args.config}: unknown setting {wrong[0]}" + cli.did_you_mean(wrong[0], fields))
        out = stage["out"] if "out" in stage and not args.out else str(base / name)
        own = {**given, **(fusion if name in fused else {})}
        new, old = own.get("fusion_fields", {}), stage.get("fusion_fields", {})
        if isinstance(new, dict) and isinstance(old, dict):
            own["fusion_fields"] = new if own.get("fusion") == "none" else {**old, **new}
        cfg = TrainConfig(**{**stage, **own, "out": out})
        if cfg.init_from in configs:  # an earlier stage
            cfg.init_from = configs[cfg.init_from].out
        configs[name] = cfg
    if len({cfg.out for cfg in configs.values()}) < len(configs):
        raise InputError(f"{args.config}: two stages have the same out")
    return args, list(configs.values())


def read_stages(path):
    """A JSON file of settings, or of a list of them -> {name of a stage: its settings}."""
    stages = cli.read_json(path, kind=object)
    stages = {f"stage{i}": stage for i, stage in enumerate(stages)} if isinstance(stages, list) else {"": stages}
    if not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise InputError(f"{path}: expected a JSON object of settings, or a list of such objects")
    return stages


def start_ranks(n):
    """Become rank 0 of n processes that share every step and the cores: on a CPU, a small model gains little from a
    second thread and nearly all of a second process."""
    threads = max(1, torch.get_num_threads() // n)
    with socket.socket() as s:  # a free port
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n),
                   "LOCAL_WORLD_SIZE": str(n)}
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for rank in range(1, n):  # rank 0 does the talking
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "RANK_0": str(os.getpid())}
        child = subprocess.Popen([sys.executable, *sys.argv], env=environment, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C is for rank 0
        atexit.register(child.kill)
        threading.Thread(target=end_without, args=[child], daemon=True).start()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    torch.set_num_threads(threads)


def end_with(parent):
    """Leave as soon as the process that started this one is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def end_without(child):
    """Leave when a rank fails before it has met this one, which would wait for it for hours."""
    while not dist.is_initialized():
        if child.poll():
            time.sleep(5)  # a mistake of both is told meanwhile
            print("error: another process of this run ended: with --ranks 1 and a new --out it works, or says why",
                  file=sys.stderr, flush=True)
            os._exit(2)
        time.sleep(0.1)


def main():
    args, configs = parse(sys.argv[1:])
    if args.evaluate:
        readme, device = args.readme, configs[0].device
        return evaluate(args.evaluate, args.blind_model, configs[0].data, readme, device, args.questions)
    cores = torch.get_num_threads()
    kind = cli.pick_device(configs[0].device)[0].type
    usual = 1 if os.name == "nt" else min(cores, 2)  # on Windows gloo does not find its way with every PyTorch
    if "RANK" not in os.environ and kind == "cpu" and (ranks := args.ranks or usual) > 1:
        start_ranks(ranks)
    if "RANK_0" in os.environ and os.name != "nt":  # in a Windows environment a launcher stands between
        threading.Thread(target=end_with, args=[int(os.environ["RANK_0"])], daemon=True).start()
    if "RANK" in os.environ:  # or started by torchrun
        if kind not in ("cpu", "cuda") or kind == "cuda" and not dist.is_nccl_available():
            raise InputError(f"several processes cannot share work on {kind} here: take one, or --device cpu")
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        wait = datetime.timedelta(hours=2)  # while rank 0 writes a checkpoint, of 7B some 100 GB
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=wait)
    began = time.time()
    try:
        for cfg in configs:
            train(cfg)
            if dist.is_initialized():
                dist.barrier()
    except KeyboardInterrupt:
        print("\nthe same command goes on from the last checkpoint", file=sys.stderr)
        raise
    except RuntimeError as e:
        if "by peer" in str(e):  # closed or reset: what a collective says when the other side is gone
            raise InputError("another process of this run ended; with --ranks 1 and a new --out it says why") from e
        raise
    first = not dist.is_initialized() or dist.get_rank() == 0
    if dist.is_initialized():  # by all at once: with NCCL the others would wait for rank 0's scores
        dist.destroy_process_group()
    if not args.config and args.recipe in ("nano", "quick") and first:
        print(f"training: {(time.time() - began) / 60:.1f} min")
        torch.set_num_threads(cores)
        by_name = {Path(cfg.out).name: cfg.out for cfg in configs}
        limit = args.questions or (250 if args.recipe == "quick" else 0)
        evaluate(by_name["tune"], by_name["blind"], configs[0].data, args.readme, configs[0].device, limit)


if __name__ == "__main__":
    cli.run_program(main)
