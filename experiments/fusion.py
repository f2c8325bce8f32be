"""The paper's controlled comparison at small scale: the same data for every way to let vision levels in, over seeds.

    python prepare_data.py emoji
    python experiments/fusion.py run --results out/study                     the main table: plan and estimate, then all
    python experiments/fusion.py run --results out/study --part scratch      the same, decoder without pre-training
    python experiments/fusion.py run --results out/study --part sweeps       what the paper leaves open, three seeds
    python experiments/fusion.py plan --results out/study                    the estimate (first trains the encoder)

A run writes one JSON file into --results once it is done; the same command goes on with those that are missing. The
default, experiments/results/fusion, holds the published runs, and takes more of their encoders' alone. The question,
the protocol, what came out, and how tables and figures are made of it: experiments/fusion.md.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
import train  # noqa: E402
from assets.emoji.scenes import POSITIONS, VALIDATION, load_emoji, open_picture  # noqa: E402
from cli import InputError  # noqa: E402

# Where the fusions reach, unless a variant says otherwise; all other fields are FusionConfig's defaults, that is the
# paper's equations as written, and a gate bias of -4 on a pre-trained decoder, 0 from scratch.
REACH = {"decoder_layers": "0,1,2", "vision_levels": "1,2,4,6", "lora_rank": 16, "lora_alpha": 32.0}
VARIANTS = {  # name: (label, preset of cli.py, fields that differ from REACH)
    "none": ("none (one-to-one)", "none", {}),
    "none_long": ("none, CLI's time", "none", {}),  # as many more steps as CLI's take longer
    "deepstack": ("DeepStack", "deepstack", {}),
    "sli": ("SLI", "sli", {}),
    "input": ("all levels at the input", "full_amp", {"decoder_layers": "0"}),
    "cli": ("CLI", "cli", {}),
    "amp": ("AMP only, W = 1", "amp", {}),
    "agf": ("AGF only, no low rank", "agf", {}),
    "full_amp_agf": ("Full AMP + AGF", "full_amp_agf", {}),
    "cli_norm": ("CLI, gate inputs normalised", "cli", {"agf_norm": True}),
    "cli_final": ("CLI, every level the final", "cli", {"vision_levels": "6,6,6,6"}),
}
# What the paper leaves open, around CLI: topic: (what the main table's CLI has, {label: fields}). gate_start and
# sqrt_k are not FusionConfig's: train.py's share of the steps for which gates wait, and W / sqrt(levels).
SWEEPS = {
    "gate bias": ("-4", {"0": {"gate_bias_init": 0.0}, "-2": {"gate_bias_init": -2.0}}),
    "gates wait": ("0", {"30 %": {"gate_start": 0.3}}),
    "levels normalised": ("no", {"yes": {"level_norm": True}}),
    "gate inputs and levels normalised": ("neither", {"both": {"agf_norm": True, "level_norm": True}}),
    "scaling": ("1", {"1/sqrt(K)": {"sqrt_k": True}}),
    "levels in turn or at once": ("sequential", {"parallel": {"agf_order": "parallel"}}),
    "gate": ("scalar", {"vector": {"gate": "vector"}}),
    "adapters": ("per pair", {"per level": {"lora_per": "level"}}),
    "rank": ("16", {"4": {"lora_rank": 4, "lora_alpha": 8.0}, "64": {"lora_rank": 64, "lora_alpha": 128.0}}),
    "place": ("before the layer", {"after": {"inject_at": "output"}}),
    "gate reads": ("prompt", {"visual": {"agf_context": "visual"}, "all": {"agf_context": "all"}}),
    "density": ("medium: 3 x 4", {
        "single: 1 x 1": {"decoder_layers": "1", "vision_levels": "4"},
        "sparse: 2 x 2": {"decoder_layers": "0,2", "vision_levels": "2,6"},
        "dense: 4 x 6": {"decoder_layers": "0,1,2,3", "vision_levels": "1,2,3,4,5,6"}}),
}
RATES = {"tuned": (2e-4, 6e-4), "scratch": (6e-4, 2e-3)}  # tried for every variant, with the first seed
# Asked in English: of one thing, and of the four things of a scene.
KINDS = ["name", "kind", "artist", "background", "name_at", "artist_at", "background_at", "on_colour"]
LEVELS = tuple(range(train.NANO["vision"]["num_hidden_layers"] + 1))
INTERVENED = ("cli", "cli_norm")  # variants whose gates are also changed at inference
PRETRAIN_ROWS = 24_000
SEEDS = [0, 1, 2, 3, 4]  # of the main table


# ---------------------------------------------------------------------------------------------------------------------
# Data: the frozen encoder's levels, computed once


def concept_of(kind, question, recipe):
    """The concept that a question is about, from its text and its picture's recipe. Questions about one concept are not
    independent: the interval draws them together."""
    cells = recipe["cells"]
    if len(cells) > 1:  # the one whose colour or place is named
        marks = [c[5] for c in cells] if kind == "on_colour" else [p.split("/")[0] for p in POSITIONS[recipe["grid"]]]
        cells = [c for c, mark in zip(cells, marks) if mark in question]
    concept = load_emoji()[1][cells[0][0]]
    return concept.get("base", concept["id"])


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def data_hash(folder):
    return train.sha256(json.dumps(train.read_manifest(folder, "train")))[:16]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


@torch.inference_mode()
def cache(args, split, count, levels):
    """The encoder's levels of the first `count` rows of a split that the study asks about -> SPLIT.bin, bfloat16
    (crops, levels, patches, width) a row, and SPLIT.json."""
    path = args.work / f"{split}.json"
    key = {"encoder": file_hash(args.encoder / "model.safetensors"), "data": args.data_hash, "count": count,
           "levels": list(levels), "kinds": KINDS}
    if cli.read_json(path, {}).get("key") == key:
        return
    args.work.mkdir(parents=True, exist_ok=True)
    model = cli.CLI.from_pretrained(args.encoder, device=args.device, dtype="float32", quiet=True)
    config = dataclasses.replace(model.config, image_aspect_ratio="anyres_max_9")
    rows = train.Rows(args.data, split, config)
    asked = [i for i, kind in enumerate(rows.kinds) if kind in (*KINDS, "naming")]
    recipes = ((i, json.loads(rows[i][2][0])) for i in asked)
    chosen = list(itertools.islice(((i, recipe) for i, recipe in recipes if recipe["grid"] <= 2), count))

    def concept(i, recipe):
        tokens, marks, _ = rows[i]
        prompt = tokens[(marks == 0) & (tokens >= 0)].tolist()
        return concept_of(rows.kinds[i], model.tokenizer.decode(prompt), recipe)

    def write(file):
        with open(file, "wb") as f:
            for start in tqdm(range(0, len(chosen), 64), desc=f"levels of {split}"):
                pictures = [open_picture(rows[i][2][0]) for i, _ in chosen[start : start + 64]]
                pictures = [cli.prepare_image(picture, config) for picture in pictures]
                pixels = torch.cat([p.crops for p in pictures]).to(model.device)
                taps = model.vision(pixels, levels)
                found = torch.stack([taps[k] for k in levels], 1).to(torch.bfloat16).cpu()
                f.write(found.view(torch.int16).numpy().tobytes())

    path.unlink(missing_ok=True)  # it says what the levels are: never those of other levels
    cli.write_whole(args.work / f"{split}.bin", write)
    write_json(path, {"key": key, "rows": [i for i, _ in chosen], "grids": [r["grid"] for _, r in chosen],
                      "concepts": [concept(*x) for x in chosen] if split.startswith("val") else None})


class Cached:
    """Rows as train.py's functions want them, whose pictures are the encoder's levels instead of pixels."""

    def __init__(self, args, split, config):
        facts = cli.read_json(args.work / f"{split}.json")
        found = {"encoder": file_hash(args.encoder / "model.safetensors"), "data": data_hash(args.data)}
        if wrong := [name for name in found if facts["key"][name] != found[name]]:
            raise InputError(f"{args.work} holds levels of another {wrong[0]}: give another --work")
        self.levels, self.chosen, self.grids = facts["key"]["levels"], facts["rows"], facts["grids"]
        self.rows = train.Rows(args.data, split, config)
        # Costs are lengths, as no encoder runs.
        self.costs, self.supervised, self.kinds = ([getattr(self.rows, name)[i] for i in self.chosen]
                                                   for name in ("lengths", "supervised", "kinds"))
        self.shape = (len(self.levels), config.vision.side**2, config.vision.hidden_size)
        self.crops = [cli.count_crops((grid, grid), (grid, grid)) for grid in self.grids]
        self.starts = [0, *itertools.accumulate(self.crops)]
        # Read, not mapped: mapped pages would count as this process's memory.
        self.file = open(args.work / f"{split}.bin", "rb", buffering=0)

    def __len__(self):
        return len(self.chosen)

    def picture(self, i):
        size, grid = 2 * math.prod(self.shape), self.grids[i]
        self.file.seek(self.starts[i] * size)
        data = torch.frombuffer(bytearray(self.file.read(self.crops[i] * size)), dtype=torch.bfloat16)
        levels = data.view(-1, *self.shape)
        side = load_emoji()[0]["cell"] * grid
        return cli.Picture(levels, (side, side), (grid, grid))

    def batch(self, chosen):
        items = [self.rows[self.chosen[i]] for i in chosen]
        return {**train.flat_stream(items), "pictures": [self.picture(i) for i in chosen]}


class Levels(torch.nn.Module):
    """In the encoder's place: its levels were computed before and come in where the crops would."""

    def __init__(self, levels):
        super().__init__()
        self.place = {k: i for i, k in enumerate(levels)}

    def forward(self, crops, levels):
        return {k: crops[:, self.place[k]] for k in levels}


# ---------------------------------------------------------------------------------------------------------------------
# One run


def precision(args):
    device, _ = cli.pick_device(args.device)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def build(args, cfg, levels):
    """The model of a run, fresh parts drawn with its seed -> model, its encoder, number of parameters."""
    model = train.build_model(cfg, train.read_manifest(cfg.data, cfg.split))
    model.config = dataclasses.replace(model.config, image_aspect_ratio="anyres_max_9")
    if not cfg.init_from:  # parameters are drawn in order: these apart from AMP's and AGF's, alike in all variants
        model.init_weights(("decoder", "projector", "image_newline"), cfg.seed)
    model.init_weights(("amp", "agf"), cfg.seed)
    count = sum(p.numel() for p in model.parameters())
    encoder, model.vision = model.vision, Levels(levels)
    return model.to(cli.pick_device(args.device)[0]), encoder, count


def hook_gates(model, change):
    """Let change(l, j, W) replace the weight of the j-th level of decoder layer l -> handles to remove it again."""
    handles = []
    for l, levels in model.config.fusion.routes:
        if str(l) in model.agf:
            turn = itertools.cycle(range(len(levels)))  # a layer's gate is asked once a level, in the route's order
            hook = lambda _, __, W, l=l, turn=turn: change(l, next(turn), W)  # noqa: E731
            handles.append(model.agf[str(l)].register_forward_hook(hook))
    return handles


@torch.no_grad()
def score(model, rows, chosen, autocast=None):
    """Answer questions and look at the gates -> {"right": bool[Q], "loss": mean cross-entropy of a supervised token,
    "gates": {l: float[Q, K]}, "size": mean |h| of a visual token on its way into every decoder layer}.

    An answer is right if every token of it, end mark included, is the likeliest after the right ones before it: then,
    and only then, greedy decoding says exactly this. The gate never reads the answer, even if it did in training.
    """
    config, autocast = model.config, autocast or contextlib.nullcontext()
    model.config = dataclasses.replace(config, fusion=dataclasses.replace(
        config.fusion, agf_context=config.fusion.agf_context.replace("all", "prompt")))
    right, gates, loss, count, norms = torch.zeros(len(chosen), dtype=torch.bool), {}, 0.0, 0, {}
    visual = None

    def note(_, inputs, l):
        norms.setdefault(l, []).append(inputs[0][visual].float().norm(dim=-1).mean().item())

    hooks = [layer.register_forward_pre_hook(functools.partial(note, l=l))
             for l, layer in enumerate(model.decoder.layers)]
    place = {i: n for n, i in enumerate(chosen)}
    try:
        for numbers in train.micro_batches(rows, chosen, 4096):
            batch = rows.batch(numbers)
            tokens, labels = batch["tokens"].to(model.device), batch["labels"].to(model.device)
            seqlens, pictures, context = batch["seqlens"], batch["pictures"], batch["context"].to(model.device)
            stream = cli.Stream(tokens, pictures, seqlens, context, model.config)
            visual = stream.visual
            with autocast:
                logits, new = model(tokens, pictures, seqlens, context)
            at, targets = stream.supervised(labels)
            said = logits[at].float()
            loss += F.cross_entropy(said, targets, reduction="sum").item()
            count += len(at)
            row = torch.arange(len(seqlens), device=tokens.device).repeat_interleave(stream.lens)[at + 1]
            missed = (said.argmax(-1) != targets).float()
            wrong = torch.zeros(len(seqlens), device=tokens.device).index_add(0, row, missed)
            where = torch.tensor([place[i] for i in numbers])
            right[where] = (wrong == 0).cpu()
            for l, W in new.items():
                gates.setdefault(l, torch.zeros(len(chosen), W.shape[1]))[where] = W.cpu()
    finally:
        model.config = config
        for hook in hooks:
            hook.remove()
    size = [round(sum(norms[l]) / len(norms[l]), 3) for l in sorted(norms)]
    return {"right": right, "loss": loss / max(1, count), "gates": gates, "size": size}


def fit(args, model, rows, cfg, dev=None):
    """train.py's loop on cached rows -> [{"step", "loss", and at times "dev_loss"}], seconds of the median step."""
    device, autocast = precision(args)
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # a busy machine does not count
    optimizers, curve, losses, took = train.make_optimizers(model, cfg), [], [], []
    for step in range(1, cfg.steps + 1):
        order = train.rows_of_step(step - 1, range(len(rows)), cfg)
        batches = [rows.batch(batch) for batch in train.micro_batches(rows, order, cfg.batch_tokens)]
        total, began = sum(rows.supervised[i] for i in order), clock()
        loss, *_ = train.take_step(model, optimizers, batches, total, step, cfg.steps, cfg, autocast)
        took.append(clock() - began)
        losses.append(loss)
        if step % args.log_every == 0 or step == cfg.steps:
            curve.append({"step": step, "loss": round(sum(losses) / len(losses), 4)})
            losses = []
            if dev and (step % (5 * args.log_every) == 0 or step == cfg.steps):
                curve[-1]["dev_loss"] = round(score(model, dev, range(min(256, len(dev))), autocast)["loss"], 4)
    return curve, float(np.median(took))


def config_of(args, spec):
    """A run's settings for train.py."""
    fields, rate = {**REACH, **spec["fields"]}, spec["rate"]
    start, sqrt_k = fields.pop("gate_start", 0.0), fields.pop("sqrt_k", False)
    rates = dict.fromkeys(("lr_decoder", "lr_projector", "lr_fusion"), rate)
    cfg = train.TrainConfig(
        data=str(args.data), out=spec["name"], split="pretrain" if spec["regime"] == "pretrain" else "train",
        init_from={"pretrain": str(args.encoder), "scratch": ""}.get(spec["regime"],
                                                                   str(args.work / f"pretrain-{spec['seed']}")),
        fusion=spec["preset"], fusion_fields=fields if spec["preset"] != "none" else {}, gate_start=start,
        steps=spec["steps"], batch_rows=spec["batch_rows"], **rates, lr_vision=0.0, seed=spec["seed"],
        muon=10.0, device=args.device, dtype=args.dtype)
    return cfg, sqrt_k


def pretrain(args, spec):
    """The one-to-one model that all variants of a seed start from -> its folder."""
    cfg, _ = config_of(args, spec)
    model, encoder, _ = build(args, cfg, [LEVELS[-1]])
    # The encoder's own training drew these once and left them alone: another seed, another decoder.
    model.init_weights(("decoder.layers", "decoder.norm"), cfg.seed)
    curve, _ = fit(args, model, Cached(args, "pretrain", model.config), cfg)
    model.vision = encoder
    model.save_pretrained(args.work / spec["name"])
    write_json(args.work / spec["name"] / "spec.json", spec)  # what starts from it looks here
    return {"curve": curve}


def base_hash(args, spec):
    """Of the model that a run starts from; None from scratch."""
    path = args.work / f"pretrain-{spec['seed']}" / "model.safetensors"
    return file_hash(path) if spec["regime"] == "tuned" and path.exists() else None


def run_one(args, spec):
    """One run from start to its JSON file."""
    device, began = cli.pick_device(args.device)[0], time.time()
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    result = pretrain(args, spec) if spec["regime"] == "pretrain" else tune(args, spec)
    facts = {"spec": spec, "base": base_hash(args, spec), "commit": args.commit, "torch": torch.__version__,
             "device": args.device_name, "seconds": round(time.time() - began, 1),
             "gib": round(cli.peak_memory(device), 3)}
    write_json(args.results / (spec["name"] + ".json"), {**facts, **result})
    return f"{spec['name']}: {facts['seconds'] / 60:.1f} min, loss {result['curve'][-1]['loss']:.3f}"


def tune(args, spec):
    cfg, sqrt_k = config_of(args, spec)
    model, _, parameters = build(args, cfg, LEVELS)
    if sqrt_k:  # what is added is scaled, gradients too; the weights noted in the file are the scaled ones
        routes = dict(model.config.fusion.routes)
        hook_gates(model, lambda l, j, W: W / math.sqrt(len(routes[l])))
    device, autocast = precision(args)
    sets = {split: Cached(args, split, model.config) for split in ("train", "dev", *VALIDATION)}
    curve, step_seconds = fit(args, model, sets["train"], cfg, sets["dev"])
    found = {split: score(model, rows, range(len(rows))) for split, rows in sets.items() if split != "train"}
    paths = ("data", "init_from")  # of this machine; spec has the hashes
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in paths}
    result = {"config": settings, "parameters": parameters, "step_seconds": round(step_seconds, 4),
              "curve": curve, "dev_loss": round(found["dev"]["loss"], 4),
              "right": {split: pack(x["right"]) for split, x in found.items()},
              "size": found["val_seen"]["size"]}
    if cfg.fusion_fields.get("agf_context") == "all":  # how much lower the loss looks while the gate sees the answer
        result["dev_loss_gate_sees_answer"] = round(train.mean_loss(model, sets["dev"], range(len(sets["dev"])), cfg,
                                                                    contextlib.nullcontext()), 4)
    if model.agf:
        result["gates"] = describe_gates(found, sets)
    if spec["variant"] in INTERVENED:
        result["interventions"] = intervene(model, sets, found)
    return result


def describe_gates(found, sets):
    """W over the validation questions -> {l: {"kinds": {kind: [mean per level]}, "mean", "sd", "saturated"}}."""
    kinds = np.array([kind for split in VALIDATION for kind in sets[split].kinds])
    out = {}
    for l in found["val_seen"]["gates"]:
        W = torch.cat([found[split]["gates"][l] for split in VALIDATION]).numpy().astype(float)

        def shown(x):
            return [round(float(v), 4) for v in x]

        out[l] = {"kinds": {str(kind): shown(W[kinds == kind].mean(0)) for kind in dict.fromkeys(kinds)},
                  "mean": shown(W.mean(0)), "sd": shown(W.std(0)),
                  "saturated": shown(((W < 0.01) | (W > 0.99)).mean(0))}
    return out


def intervene(model, sets, found):
    """Other weights at inference -> {what: {split: packed answers}}: every W at its mean over the development split,
    every W at 1, and one vision level at a time at 0 in all layers."""
    means = {l: W.mean(0).tolist() for l, W in found["dev"]["gates"].items()}
    routes = dict(model.config.fusion.routes)

    def without(level):
        return lambda l, j, W: W * 0 if routes[l][j] == level else W

    changes = {"W = mean": lambda l, j, W: torch.full_like(W, means[l][j]), "W = 1": lambda l, j, W: torch.ones_like(W),
               **{f"level {k} shut": without(k) for k in model.config.fusion.levels}}
    out = {}
    for name, change in changes.items():
        handles = hook_gates(model, change)
        out[name] = {s: pack(score(model, sets[s], range(len(sets[s])))["right"]) for s in VALIDATION}
        for handle in handles:
            handle.remove()
    return out


def pack(right):
    """bool[Q] -> hexadecimal text; unpack(text, Q) is its inverse."""
    return np.packbits(np.asarray(right, dtype=np.uint8)).tobytes().hex()


def unpack(text, count):
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(float)


# ---------------------------------------------------------------------------------------------------------------------
# The study


def spec_of(args, regime, variant, seed, rate, steps, preset, fields, batch_rows):
    name = re.sub(r"[^\w.=-]+", "_", f"{regime}-{variant}" + (f"-{rate:g}" if rate else "") + f"-{seed}")
    return {"name": name if regime != "pretrain" else f"pretrain-{seed}", "regime": regime, "variant": variant,
            "seed": seed, "rate": rate, "steps": steps, "preset": preset, "fields": fields, "batch_rows": batch_rows,
            "rows": args.rows, "questions": args.questions, "pretrain_steps": args.pretrain_steps,
            "encoder": file_hash(args.encoder / "model.safetensors"), "data": args.data_hash,
            "dtype": args.dtype}


def pretrain_specs(args, seeds):
    return [spec_of(args, "pretrain", "none", seed, 2e-3, args.pretrain_steps, "none", {}, 32) for seed in seeds]


def steps_of(variant, steps, plan):
    """Of a run: as many as asked for, of none_long as many as take CLI's time."""
    seconds = plan["step_seconds"]
    return round(steps * seconds["cli"] / seconds["none"]) if variant == "none_long" else steps


def main_spec(args, plan, regime, variant, seed, rate):
    _, preset, fields = VARIANTS[variant]
    steps = steps_of(variant, args.steps, plan)
    return spec_of(args, regime, variant, seed, rate, steps, preset, fields, args.batch_rows)


def sweep_specs(args, rate):
    return [spec_of(args, "tuned", f"{topic}={label}", seed, rate, args.steps, "cli", fields,
                    args.batch_rows)
            for seed in args.seeds for topic, (_, labels) in SWEEPS.items() for label, fields in labels.items()]


def finished(args, spec):
    """Whether a run is done. Raises InputError if its file is of a run with other settings."""
    found = cli.read_json(args.results / (spec["name"] + ".json"), {})
    if found and (wrong := [f"{k}={found['spec'].get(k)!r}" for k in spec if found["spec"].get(k) != spec[k]]):
        raise InputError(f"{args.results}/{spec['name']}.json is of a run with other settings, {', '.join(wrong)}: "
                         "leave its seed out of --seeds, give another --results, or delete it")
    made = cli.read_json(args.work / spec["name"] / "spec.json", {})
    return bool(found) and (spec["regime"] != "pretrain" or made == spec)


def execute(args, specs):
    """Work off the missing runs, args.jobs at a time. Raises InputError once all others are done, if some failed."""
    todo = [spec for spec in specs if not finished(args, spec)]
    bases = {spec["seed"]: base_hash(args, spec) for spec in todo}
    for spec, other in itertools.product(todo, load_results(args)):
        # All runs of a study, of a seed (differences are taken within it), and of a variant have these in common.
        keys = ["data", "rows", "questions", "pretrain_steps"]
        keys += ["encoder", "dtype"] if spec["seed"] == other["spec"]["seed"] else []
        base = other.get("base") if spec["seed"] == other["spec"]["seed"] else None
        if base and bases[spec["seed"]] not in (None, base):
            raise InputError(f"{args.results} holds {other['spec']['name']}, which started from another model than "
                             f"{args.work}/pretrain-{spec['seed']}: leave seed {spec['seed']} out of --seeds")
        same = (spec["regime"], spec["variant"]) == (other["spec"]["regime"], other["spec"]["variant"])
        keys += ["steps", "batch_rows", "fields"] if same else []
        if wrong := [f"{k}={other['spec'][k]!r}" for k in keys if spec[k] != other["spec"][k]]:
            raise InputError(f"{args.results} holds {other['spec']['name']} with {', '.join(wrong)}: give another "
                             f"--results, or leave seed {spec['seed']} out of --seeds")
    if todo:
        work_off(args, todo, run_one)


def work_off(args, todo, run_one):
    """run_one(args, spec) of every spec in processes of their own. Raises InputError at the end if some failed."""
    children, failed = [], []
    with ThreadPoolExecutor(args.jobs) as threads:
        try:
            runs = [threads.submit(in_process, args, spec, run_one, children) for spec in todo]
            for run in (bar := tqdm(as_completed(runs), total=len(todo), desc="runs")):
                try:
                    bar.write(run.result())
                except InputError as e:
                    bar.write(f"failed: {e}")
                    failed.append(e)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} runs failed; the same command tries again: {failed[0]}")


def in_process(args, spec, run_one, children):
    """A run in a process of its own, so that its memory is its own -> a line about it. Raises InputError."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=tell_run, args=(sender, args, spec, run_one, os.getpid()))
    child.start()
    children.append(child)
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        child.join()
        why = "killed, for want of memory? Fewer --jobs" if child.exitcode == -9 else "see above"
        raise InputError(f"{spec['name']}: its process ended with status {child.exitcode} ({why})") from None
    if isinstance(found, InputError):
        raise found
    return found


def tell_run(sender, args, spec, run_one, parent):  # the parent may be gone before this one can ask for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=train.end_with, args=[parent], daemon=True).start()  # not to outlive it
    try:
        sender.send(run_one(args, spec))
    except InputError as e:
        sender.send(InputError(f"{spec['name']}: {e}"))


def make_plan(args):
    """Seconds of a step of every variant, measured once and kept: how long none_long trains depends on them."""
    path = args.results / "plan.json"
    plan = cli.read_json(path, {})
    if plan:
        return plan
    cache(args, "dev", args.questions, LEVELS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = {"device": args.device_name, "step_seconds": {}}
    for variant in tqdm(VARIANTS, desc="timing"):
        spec = {**main_spec(args, {"step_seconds": {"cli": 1, "none": 1}}, "pretrain", variant, 0, 1e-3), "steps": 30}
        cfg, _ = config_of(args, spec)
        model, _, _ = build(args, cfg, LEVELS)
        plan["step_seconds"][variant] = round(fit(args, model, Cached(args, "dev", model.config), cfg)[1], 4)
    torch.set_num_threads(threads)
    write_json(path, plan)
    return plan


def tell_plan(args, plan):
    """Print what the part consists of and how long it may take."""
    seconds, each = plan["step_seconds"], len(args.seeds) + (SEEDS[0] in args.seeds and not args.rate)
    if args.part == "sweeps":
        runs = len(sweep_specs(args, 1e-3))
        work = runs * args.steps * seconds["cli"]
    else:
        runs = each * len(args.variants)
        work = each * sum(main_spec(args, plan, args.part, v, 0, 1e-3)["steps"] * seconds[v] for v in args.variants)
    if args.part == "tuned":
        work += len(args.seeds) * args.pretrain_steps * seconds["none"] * 32 / args.batch_rows
    hours = 1.2 * work / args.jobs / 3600  # a fifth for scoring, reading and start-up
    print(f"part {args.part}: {runs} runs of {args.steps} steps of {args.batch_rows} rows, {args.jobs} at a time\n"
          "seconds of a step: " + ", ".join(f"{v} {s:.3f}" for v, s in seconds.items()) + "\n"
          f"estimate: {hours:.1f} h in all, if the cores are free; before that, once, the encoder (9 min on one "
          f"core) and its levels ({(args.rows + PRETRAIN_ROWS + 5 * args.questions) * 8e-3 / 60:.0f} min, "
          f"{(args.rows + 5 * args.questions) * 75e-6 + PRETRAIN_ROWS * 11e-6:.1f} GB on disk)")


def best_rate(results, regime, variant):
    """The learning rate with more right answers on the development split, by the first seed there is; None without a
    run."""
    runs = [r for r in results if (r["spec"]["regime"], r["spec"]["variant"]) == (regime, variant)]
    if not runs:
        return None
    first = min(r["spec"]["seed"] for r in runs)
    right = {r["spec"]["rate"]: int(r["right"]["dev"], 16).bit_count() for r in runs if r["spec"]["seed"] == first}
    return max(right, key=right.get)


def load_results(args):
    paths = sorted(args.results.glob("*.json")) if args.results.is_dir() else []
    found = [cli.read_json(path) for path in paths]  # of other files too: plan, questions, probes
    return [r for r in found if r.get("spec", {"regime": "pretrain"})["regime"] != "pretrain"]


def run(args):
    if not (args.encoder / "model.safetensors").exists():  # as train.py's recipe makes it
        train.train(train.TrainConfig(**{**train.RECIPES["nano"]["encode"], "out": str(args.encoder),
                                         "data": str(args.data), "device": args.device, "dtype": args.asked}))
    for spec in pretrain_specs(args, args.seeds):
        finished(args, spec)  # refuses another encoder's results before anything else takes time
    plan = make_plan(args)
    tell_plan(args, plan)
    if args.command == "plan":
        return
    cache(args, "pretrain", min(PRETRAIN_ROWS, 32 * args.pretrain_steps), LEVELS[-1:])
    cache(args, "train", args.rows, LEVELS)
    for split in ("dev", *VALIDATION):
        cache(args, split, args.questions, LEVELS)
    config = cli.CLI.from_pretrained(args.encoder, quiet=True).config
    questions = {split: {"concept": cli.read_json(args.work / f"{split}.json")["concepts"],
                         "kind": Cached(args, split, config).kinds} for split in VALIDATION}
    if cli.read_json(args.results / "questions.json", questions) != questions:
        raise InputError(f"the runs in {args.results} were asked other questions: give another --results")
    write_json(args.results / "questions.json", questions)
    if args.part != "scratch":
        execute(args, pretrain_specs(args, args.seeds))
    regime = "tuned" if args.part == "sweeps" else args.part
    if args.part == "sweeps":
        rate = args.rate or best_rate(load_results(args), "tuned", "cli")
        if not rate:
            raise InputError("the sweeps take CLI's learning rate from the main table: run that first, or give --rate")
        execute(args, sweep_specs(args, rate))
    else:
        if SEEDS[0] in args.seeds:
            rates = [args.rate] if args.rate else RATES[regime]
            execute(args, [main_spec(args, plan, regime, v, SEEDS[0], rate) for v in args.variants for rate in rates])
        results = load_results(args)
        chosen = {v: args.rate or best_rate(results, regime, v) for v in args.variants}
        tried = {(r["spec"]["regime"], r["spec"]["variant"], r["spec"]["rate"]) for r in results
                 if r["spec"]["seed"] == SEEDS[0]}
        if missing := [v for v in args.variants if not args.rate and {(regime, v, r) for r in RATES[regime]} - tried]:
            raise InputError(f"the learning rate of {', '.join(missing)} is chosen with seed {SEEDS[0]}: run that "
                             "first, or give --rate")
        execute(args, [main_spec(args, plan, regime, v, seed, chosen[v])
                       for seed in args.seeds if seed != SEEDS[0] for v in args.variants])


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("command", choices=("plan", "run"))
    add("--part", choices=("tuned", "scratch", "sweeps"), default="tuned", help="what to run (default: %(default)s)")
    add("--data", type=Path, default=HERE / "data/emoji", help="what prepare_data.py wrote (default: data/emoji)")
    add("--encoder", type=Path, default=HERE / "out/nano/encode",
        help="trained as train.py does it if it is not there (default: out/nano/encode)")
    add("--work", type=Path, default=HERE / "out/fusion", help="levels and pre-trained models (default: out/fusion)")
    add("--results", type=Path, default=HERE / "experiments/results/fusion",
        help="one JSON file a run (default: experiments/results/fusion)")
    add("--seeds", type=int, nargs="+", help="default: 0 to 4; of sweeps 0 to 2")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="of the main table")
    add("--rate", type=float, help="learning rate of every run, instead of the better of two")
    add("--steps", type=int, default=2500, help="of every run (default: %(default)s)")
    add("--batch-rows", type=int, default=12, help="rows of a step (default: %(default)s)")
    add("--pretrain-steps", type=int, default=1200, help="of 32 rows (default: %(default)s)")
    add("--rows", type=int, default=30_000, help="training rows whose levels are kept (default: %(default)s)")
    add("--questions", type=int, default=800, help="of every validation split (default: %(default)s)")
    add("--log-every", type=int, default=50, help="steps between points of a curve (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs at a time, one CPU thread each (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of training; scores are in float32")
    args = parser.parse_args()
    args.seeds = sorted(set(args.seeds or (SEEDS[:3] if args.part == "sweeps" else SEEDS)))
    if args.rate is not None and not 0 < args.rate < math.inf:
        raise InputError("--rate must be above 0")
    for name in ("steps", "batch_rows", "pretrain_steps", "rows", "questions", "log_every", "jobs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("data", "encoder", "work", "results"):
        setattr(args, name, getattr(args, name).absolute())
    args.data_hash, args.commit = data_hash(args.data), train.commit()
    device, _ = cli.pick_device(args.device)
    args.asked = args.dtype  # what the encoder's own settings say, as train.py's recipe has them
    args.device, args.dtype = str(device), str(train.training_dtype(args.dtype, device)[0]).removeprefix("torch.")
    args.device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, one thread a run"
    run(args)


if __name__ == "__main__":
    cli.run_program(main)
