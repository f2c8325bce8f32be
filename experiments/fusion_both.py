"""Both at once: a thing's name and the colour behind it in one answer, for every way to let vision levels in.

    python experiments/fusion.py run --results out/study                 its encoder, pre-trained models and rates
    python experiments/fusion_both.py --study out/study

The last level knows the name and hardly the background, the first one the reverse (experiments/fusion.md). Here some
questions ask for the one, some for the other, and some for both, of one thing and of the four things of a scene, so
that a gate has reason to differ from question to question, and an answer may need all levels. Everything else is as in
experiments/fusion.py: the frozen encoder, the pre-trained one-to-one decoder of the same seed, Muon, and each variant's
rate as it was chosen there, so nothing is tuned here. One JSON file a run; the same command goes on with those that are
missing. experiments/fusion_report.py makes the tables.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
import train  # noqa: E402
from assets.emoji import scenes  # noqa: E402
from cli import InputError  # noqa: E402
from experiments import fusion as study  # noqa: E402

KINDS = {  # of one thing, and in a scene: phrasings
    "name": scenes.QUESTIONS["name"][1], "background": scenes.QUESTIONS["background"][1],
    "both": ("What is this, and on which colour?", "Name the thing and the colour behind it."),
    "name_at": scenes.QUESTIONS["name_at"][1], "background_at": scenes.QUESTIONS["background_at"][1],
    "both_at": ("What is in the {where}, and on which colour?",
                "Name the thing in the {where} and the colour behind it."),
}
# The study's, and CLI with its gates further open at the start (there: -4), at CLI's rate.
VARIANTS = study.VARIANTS | {"cli_bias-2": ("CLI, gate bias -2", "cli", {"gate_bias_init": -2.0}),
                             "cli_bias0": ("CLI, gate bias 0", "cli", {"gate_bias_init": 0.0})}
LEVELS = study.LEVELS[1:]  # routes may name any of them


def make_question(rng, seed, pools, split, kind):
    """-> (cells of the picture's recipe, question, answer, the concept it is about). As scenes.py's questions: what is
    asked about is of the split's part of the corpus, what stands around a held-out drawing is of training's."""
    part = "train" if split == "train" else scenes.VALIDATION[split][0]
    pool, others = (pools["train" if p == "scene" else p]["things"] for p in (part, part.replace("pair", "train")))
    count = 4 if kind.endswith("_at") else 1
    target, at = rng.choice(pool), rng.randrange(count)
    beside = rng.sample([c for c in others if c["id"] != target["id"]], count - 1)
    cells = [scenes.make_cell(rng, seed, c, held_out=part == "scene") for c in [*beside[:at], target, *beside[at:]]]
    name, colour = target["name"], cells[at][5]
    answer = {"name": name, "background": colour, "both": f"{name}, {colour}"}[kind.removesuffix("_at")]
    where = scenes.POSITIONS[2][at].split("/")[0]
    return cells, rng.choice(KINDS[kind]).format(where=where), answer, target.get("base", target["id"])


class Questions:
    """Questions of a split in memory, with the encoder's levels instead of pixels, as train.py's functions want them.
    New concepts, whose names nobody can know, are asked about by background alone."""

    def __init__(self, args, split, count, model):
        data = train.read_manifest(args.data, "train")
        seed, rng = data["seed"], random.Random(f"{data['seed']}/both/{split}")
        pools = scenes.emoji_pools(seed, data["source"].get("per_kind", 16))
        kinds = [k for k in KINDS if split != "val_concept" or k.startswith("background")]
        self.kinds = [kinds[i % len(kinds)] for i in range(count)]
        cells, asked, answers, self.concepts = zip(*(make_question(rng, seed, pools, split, k) for k in self.kinds))
        self.items, recipes = [], [scenes.make_recipe(c) for c in cells]
        for question, answer in zip(asked, answers):
            turns = [("user", cli.user_content(question, 1)), ("assistant", answer)]
            ids, marks = cli.encode_chat(model.tokenizer, model.config.template, turns)
            self.items.append((torch.tensor(ids), torch.tensor(marks, dtype=torch.uint8), []))
        self.pictures = self.encode(args, split, recipes, [len(c) for c in cells], model)
        self.supervised = [int(marks.sum()) for _, marks, _ in self.items]
        self.costs = [len(ids) - 1 + cli.visual_tokens(picture, model.config)
                      for (ids, *_), picture in zip(self.items, self.pictures)]

    def encode(self, args, split, recipes, cells, model):
        """Pictures whose crops are bfloat16[n, levels, patches, width]; computed once and mapped from then on."""
        weights = study.file_hash(args.encoder / "model.safetensors")
        key = train.sha256("\n".join([weights, *map(bytes.decode, recipes)]))[:16]
        path = args.work / "both" / f"{split}-{key}.safetensors"
        sizes = [scenes.recipe_size(recipe) for recipe in recipes]
        grids = [(math.isqrt(n), math.isqrt(n)) for n in cells]
        crops = [cli.count_crops(grid, grid) for grid in grids]
        if not path.exists():
            levels = []
            with torch.inference_mode():
                for start in tqdm(range(0, len(recipes), 64), desc=f"levels of {split}"):
                    some = map(scenes.open_picture, recipes[start : start + 64])
                    pictures = [cli.prepare_image(picture, model.config) for picture in some]
                    taps = model.vision(torch.cat([p.crops for p in pictures]).to(model.device), LEVELS)
                    levels.append(torch.stack([taps[k] for k in LEVELS], 1).to(torch.bfloat16).cpu())
            path.parent.mkdir(parents=True, exist_ok=True)
            cli.write_whole(path, functools.partial(save_file, {"levels": torch.cat(levels)}))
        levels = load_file(path)["levels"].split(crops)
        return [cli.Picture(*facts) for facts in zip(levels, sizes, grids)]

    def __len__(self):
        return len(self.items)

    def batch(self, chosen):
        return {**train.flat_stream([self.items[i] for i in chosen]), "pictures": [self.pictures[i] for i in chosen]}


def open_questions(args):
    """{split: Questions}, training's among them"""
    model = cli.CLI.from_pretrained(args.encoder, device=args.device, dtype="float32", quiet=True)
    model.config = dataclasses.replace(model.config, image_aspect_ratio="anyres_max_9")
    counts = {"train": args.steps * args.batch_rows, **dict.fromkeys(scenes.VALIDATION, args.questions)}
    return {split: Questions(args, split, count, model) for split, count in counts.items()}


def run_one(args, spec):
    """One run from start to its JSON file -> a line about it"""
    began = time.time()
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    sets = open_questions(args)
    cfg, _ = study.config_of(args, {**spec, "regime": "tuned"})
    model, _, parameters = study.build(args, cfg, LEVELS)
    curve, step_seconds = study.fit(args, model, sets["train"], cfg)
    found = {split: study.score(model, sets[split], range(len(sets[split]))) for split in scenes.VALIDATION}
    result = {"spec": spec, "commit": args.commit, "torch": torch.__version__, "device": args.device_name,
              "seconds": round(time.time() - began, 1), "step_seconds": round(step_seconds, 4),
              "parameters": parameters, "curve": curve,
              "right": {split: study.pack(x["right"]) for split, x in found.items()}}
    if model.agf:
        result["gates"] = study.describe_gates(found, sets)
    study.write_json(args.results / f"{spec['name']}.json", result)
    return f"{spec['name']}: {result['seconds'] / 60:.1f} min, loss {curve[-1]['loss']:.3f}"


def make_specs(args):
    """Settings of every run: from its seed's pre-trained model, at the rate that fusion.py chose for its variant."""
    chosen, bases, specs = study.load_results(argparse.Namespace(results=args.study)), {}, []
    own = {"encoder": study.file_hash(args.encoder / "model.safetensors"), "data": study.data_hash(args.data),
           "dtype": args.dtype}
    plan = cli.read_json(args.study / "plan.json")
    for seed in args.seeds:
        folder = args.work / f"pretrain-{seed}"
        made = cli.read_json(folder / "spec.json", {})
        if not made:
            raise InputError(f"{folder} is missing: experiments/fusion.py run --seeds {seed} makes it")
        if wrong := [f"{k}={made[k]!r}" for k in own if made[k] != own[k]]:
            raise InputError(f"{folder} was made with {', '.join(wrong)}, not {', '.join(str(own[k]) for k in own)}")
        bases[seed] = study.file_hash(folder / "model.safetensors")
    for variant, seed in itertools.product(args.variants, args.seeds):
        rate = study.best_rate(chosen, "tuned", variant.split("_bias")[0])
        if not rate:
            raise InputError(f"{args.study} has no run of {variant}, whose learning rate this takes: fusion.py run")
        _, preset, fields = VARIANTS[variant]
        specs.append({"name": f"both-{variant}-{seed}", "regime": "both", "variant": variant, "seed": seed,
                      "rate": rate, "steps": study.steps_of(variant, args.steps, plan), "preset": preset,
                      "fields": fields, "batch_rows": args.batch_rows, "rows": args.steps * args.batch_rows,
                      "questions": args.questions, "base": bases[seed], **own})
    return specs


def missing(args, specs):
    """Those without a file. Raises InputError if a file is of other settings, or of runs that do not compare."""
    others = study.load_results(args)
    for spec, other in itertools.product(specs, (r["spec"] for r in others)):
        keys = ["regime", "data", "rows", "questions"]  # alike in a study; within a seed, too
        keys += ["encoder", "base", "dtype"] if spec["seed"] == other["seed"] else []
        if wrong := [k for k in (spec if spec["name"] == other.get("name") else keys) if other.get(k) != spec[k]]:
            raise InputError(f"{args.results} holds {other.get('name')} with {wrong[0]}={other.get(wrong[0])!r}: give "
                             "another --results")
    done = {r["spec"]["name"] for r in others}
    return [spec for spec in specs if spec["name"] not in done]


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=HERE / "data/emoji", help="what prepare_data.py wrote (default: data/emoji)")
    add("--encoder", type=Path, default=HERE / "out/nano/encode", help="fusion.py's (default: out/nano/encode)")
    add("--work", type=Path, default=HERE / "out/fusion", help="fusion.py's, with its pre-trained models (default: "
        "out/fusion); gets the levels, 1.6 GB")
    add("--study", type=Path, default=HERE / "experiments/results/fusion",
        help="fusion.py's --results, for its rates (default: experiments/results/fusion)")
    add("--results", type=Path, help="one JSON file a run (default: --study's name, with _both)")
    add("--seeds", type=int, nargs="+", default=study.SEEDS, help="default: 0 to 4")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    add("--steps", type=int, default=1800, help="of every run (default: %(default)s)")
    add("--batch-rows", type=int, default=12, help="rows of a step (default: %(default)s)")
    add("--questions", type=int, default=600, help="of every validation split (default: %(default)s)")
    add("--log-every", type=int, default=50, help="steps between points of a curve (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs at a time, one CPU thread each (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of training; scores are in float32")
    args = parser.parse_args()
    args.seeds, args.variants = sorted(set(args.seeds)), list(dict.fromkeys(args.variants))
    for name in ("steps", "batch_rows", "questions", "log_every", "jobs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("data", "encoder", "work", "study"):
        setattr(args, name, getattr(args, name).absolute())
    args.results = (args.results or args.study.with_name(args.study.name + "_both")).absolute()
    if not (args.encoder / "model.safetensors").exists():
        raise InputError(f"{args.encoder} holds no encoder: experiments/fusion.py run trains it")
    device, _ = cli.pick_device(args.device)
    args.device, args.dtype = str(device), str(train.training_dtype(args.dtype, device)[0]).removeprefix("torch.")
    args.device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, one thread a run"
    args.commit = train.commit()
    todo = missing(args, make_specs(args))
    print(f"{len(todo)} runs of {args.steps} steps of {args.batch_rows} rows, {args.jobs} at a time")
    sets = open_questions(args)
    questions = {split: {"concept": list(sets[split].concepts), "kind": sets[split].kinds}
                 for split in scenes.VALIDATION}
    if cli.read_json(args.results / "questions.json", questions) != questions:
        raise InputError(f"the runs in {args.results} were asked other questions: give another --results")
    study.write_json(args.results / "questions.json", questions)
    if todo:
        study.work_off(args, todo, run_one)


if __name__ == "__main__":
    cli.run_program(main)
