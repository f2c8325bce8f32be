"""Why the nano model fails some kinds of question: each of them trained alone, from the same pre-trained model.

    python prepare_data.py emoji && python train.py
    python train.py --evaluate out/nano/tune --blind_model out/nano/blind
    python experiments/one_kind.py --readme README.md

The recipe's last stage (`tune`) with questions of a single kind, several times as many of it as the recipe has time
for, everything else as it is: what is still not learned then is not a matter of practice. --train-encoder lets the
vision encoder, frozen in the recipe, learn too: what is learned only then was not in it. One JSON file a run; the same
command goes on with those that are missing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402
from assets.emoji.scenes import QUESTIONS  # noqa: E402
from cli import CLI, InputError  # noqa: E402

SHORT = 20  # points above the blind twin and the most frequent answer: what a kind is to reach


def others(counts):
    """The better of the blind twin and the most frequent answer, in %."""
    return 100 * max(counts["blind"], counts["majority"]) / counts["n"]


def failing(scores):
    """Kinds of question that miss the mark in some split of an eval.json."""
    return [kind for kind in QUESTIONS if any(
        100 * kinds[kind]["model"] / kinds[kind]["n"] < others(kinds[kind]) + SHORT
        for kinds in scores.values() if kind in kinds)]  # fmt: skip


def make_rows(kind, rows, folder, nano):
    """Training rows of one kind alone, by the command that makes all: the other kinds' weights are 0 meanwhile."""
    kept = dict(QUESTIONS)
    QUESTIONS.update({other: (0, *rest) for other, (_, *rest) in kept.items() if other != kind})
    try:
        prepare_data.main(["emoji", "--out", str(folder), "--tokenizer", str(nano / "pretrain"), "--encode", "0",
                           "--pretrain", "0", "--train", str(rows), "--val", "0"])  # fmt: skip
    finally:
        QUESTIONS.update(kept)


def score(model, kind, data, splits):
    """{split: {"n", "model"}}: questions of this kind, and how many are answered right."""
    scores = {}
    for split in splits:
        rows = train.Rows(data, split, model.config)
        chosen = [i for i, k in enumerate(rows.kinds) if k.removesuffix("-zh") == kind]
        for field in ("where", "lengths", "supervised", "kinds"):
            setattr(rows, field, [getattr(rows, field)[i] for i in chosen])
        given = train.answers(model, rows, f"{kind}, {split}")
        scores[split] = {"n": len(given), "model": sum(right == answer for _, right, answer, _ in given)}
    return scores


def run(kind, args, among):
    """Train and score one kind -> what its file holds."""
    name = kind + "-encoder" * args.train_encoder
    stage = train.RECIPES["nano"]["tune"]
    cfg = train.TrainConfig(**{
        **stage, "init_from": str(args.nano / "pretrain"), "data": str(args.work / kind),
        "out": str(args.work / f"{name}-model"), "steps": args.steps, "eval_every": 0,
        "lr_vision": 1e-3 if args.train_encoder else 0.0})  # fmt: skip
    make_rows(kind, args.steps * cfg.batch_rows, args.work / kind, args.nano)
    start = time.time()
    train.train(cfg)
    seconds = round(time.time() - start)
    model = CLI.from_pretrained(cfg.out, dtype="float32", quiet=True)
    splits = [split for split, kinds in among.items() if kind in kinds]
    return {"kind": kind, "steps": args.steps, "rows": args.steps * cfg.batch_rows, "lr_vision": cfg.lr_vision,
            "commit": train.commit(), "seconds": seconds, "scores": score(model, kind, args.data, splits)}  # fmt: skip


def table(results, among):
    """Lines of Markdown: every kind and split, in % right."""
    lines = []
    for kind in QUESTIONS:
        alone, encoder = results.get(kind), results.get(f"{kind}-encoder")
        for split, kinds in among.items():
            if kind not in kinds or not (alone or encoder):
                continue

            def percent(r, split=split):
                return f"{100 * r['scores'][split]['model'] / r['scores'][split]['n']:.0f}" if r else ""

            counts = kinds[kind]
            lines.append([kind, split, f"{others(counts):.0f}", f"{100 * counts['model'] / counts['n']:.0f}",
                          percent(alone), percent(encoder)])  # fmt: skip
    return train.markdown(["question", "split", "blind or most frequent", "all kinds together", "alone",
                           "alone, encoder too"], lines)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=list(QUESTIONS), help="default: all that miss the mark in NANO/tune/eval.json")
    add("--train-encoder", action="store_true", help="the vision encoder learns too")
    add("--steps", type=int, default=400, help="of 64 questions (default: %(default)s)")
    add("--data", type=Path, default=HERE / "data/emoji", help="folder that prepare_data.py wrote, for validation")
    add("--nano", type=Path, default=HERE / "out/nano", help="folder that train.py wrote")
    add("--work", type=Path, default=HERE / "out/one_kind", help="rows and models (default: out/one_kind)")
    add("--results", type=Path, default=HERE / "experiments/results/one_kind", help="one JSON file a run")
    add("--readme", help="write the table between the marks in this file too")
    args = parser.parse_args()
    among = cli.read_json(args.nano / "tune/eval.json")["scores"]
    if not all("blind" in counts for kinds in among.values() for counts in kinds.values()):
        raise InputError(f"{args.nano / 'tune/eval.json'}: no blind twin in it: train.py --evaluate ... --blind_model")
    args.results.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds or failing(among):
        path = args.results / (kind + "-encoder" * args.train_encoder + ".json")
        if path.exists():
            print(f"{path}: there already")
            continue
        cli.write_text(path, json.dumps(run(kind, args, among), indent=1) + "\n")
    results = {path.stem: cli.read_json(path) for path in sorted(args.results.glob("*.json"))}
    lines = table(results, among)
    print("\n".join(lines))
    if args.readme:
        train.put_between_marks(args.readme, {"one kind": lines})


if __name__ == "__main__":
    cli.run_program(main)
