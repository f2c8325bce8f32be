"""Why the nano model fails some kinds of question: each of them trained alone, from the same pre-trained model.

    python prepare_data.py emoji && python train.py
    python train.py --evaluate out/nano/tune --blind_model out/nano/blind
    python experiments/one_kind.py --results out/one_kind/results

The recipe's last stage (`tune`) with questions of a single kind, several times as many of it as the recipe has time
for, everything else as it is: what is learned then failed for want of practice, what is not, for another reason. One
JSON file a kind; the same command goes on with those that are missing. Where a thing of a scene is to be named, a
second table tells how often any thing of it was named, and how often that was the right one: whether drawings are not
recognised, or not found. The files in experiments/results/one_kind are of the run in float32 that the README tells of,
those in one_kind_long of a later run, with --steps 1000; the README got its tables from them with --readme.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402
from assets.emoji.scenes import QUESTIONS, SINGLE, load_emoji  # noqa: E402
from cli import CLI, InputError  # noqa: E402
from experiments.fusion import file_hash  # noqa: E402

SHORT = 20  # points above the blind twin and the most frequent answer: what a kind is to reach
TUNE = train.RECIPES["nano"]["tune"]
ROWS = train.TrainConfig().batch_rows  # of a step
BY_NAME = ("name_at", "by_artist", "on_colour")  # answered by the name of one of several things


def percent(counts, *who):
    """The best of some answerers, in %."""
    return 100 * max(counts[name] for name in who) / counts["n"]


def failing(scores):
    """Kinds of question that miss the mark in some split of an eval.json."""
    return [kind for kind in QUESTIONS if any(
        percent(kinds[kind], "model") < percent(kinds[kind], "blind", "majority") + SHORT
        for kinds in scores.values() if kind in kinds)]


def make_rows(kind, rows, folder, tokenizer, manifest):
    """Training rows of one kind alone, by the command that makes all: the other kinds' weights are 0 meanwhile. With
    the seed of the validation data, whose held-out things it decides."""
    kept = dict(QUESTIONS)
    QUESTIONS.update({other: (0, *rest) for other, (_, *rest) in kept.items() if other != kind})
    try:
        prepare_data.main(["emoji", "--out", str(folder), "--tokenizer", str(tokenizer), "--encode", "0",
                           "--pretrain", "0", "--train", str(rows), "--val", "0", "--seed", str(manifest["seed"]),
                           "--per-kind", str(manifest["source"].get("per_kind", 16))])
    finally:
        QUESTIONS.update(kept)


def names_drawn(rows, i):
    """Names of all that is drawn in a row's picture, in the language of its question."""
    _, concepts, _ = load_emoji()
    language = "zh" if rows.kinds[i].endswith("-zh") else "name"
    return [concepts[key][language] for key, *_ in json.loads(rows[i][2][0])["cells"]]


def score(model, kind, data, splits):
    """{split: {"n", "model"}}: questions of this kind, and how many are answered right. Of BY_NAME also "drawn", how
    many answers name a thing of the scene, and "chance", how many would be right if each of these took any of its
    things."""
    scores = {}
    for split in splits:
        rows = train.Rows(data, split, model.config)
        chosen = [i for i, k in enumerate(rows.kinds) if k.removesuffix("-zh") == kind]
        for field in ("where", "lengths", "costs", "supervised", "kinds"):
            setattr(rows, field, [getattr(rows, field)[i] for i in chosen])
        given = train.answers(model, rows, f"{kind}, {split}")
        scores[split] = {"n": len(given), "model": sum(right == answer for _, right, answer, _ in given)}
        if kind in BY_NAME:
            scenes = [(answer, names_drawn(rows, i)) for i, (_, _, answer, _) in enumerate(given)]
            drawn = [len(names) for answer, names in scenes if answer in names]
            scores[split] |= {"drawn": len(drawn), "chance": sum(1 / n for n in drawn)}
    return scores


def run(kind, given, args):
    """Train and score one kind -> what its file holds. given: its "steps", and of the model of all kinds "together",
    {split: counts}, and "steps_together"."""
    base = args.nano / "pretrain"
    work = args.work / file_hash(base / "model.safetensors") / kind  # never go on with what another base became
    rows = given["steps"] * ROWS
    make_rows(kind, rows, work / "data", base, train.read_manifest(args.data, "train"))
    cfg = train.TrainConfig(**{**TUNE, "init_from": str(base), "data": str(work / "data"),
                               "out": str(work / "model"), "steps": given["steps"]})
    train.train(cfg)
    seconds = cli.read_json(Path(cfg.out) / "train.json")["seconds"]
    model = CLI.from_pretrained(cfg.out, dtype="float32", quiet=True)
    return {"kind": kind, "rows": rows, "commit": train.commit(), "seconds": seconds,
            "scores": score(model, kind, args.data, given["together"]), **given}


def table(results):
    """Lines of Markdown: every kind and split, in % right, and of how many questions a kind was learned."""
    weights, lines = {kind: weight for kind, (weight, *_) in QUESTIONS.items()}, []
    for kind in (kind for kind in QUESTIONS if kind in results):
        seen = results[kind]["steps_together"] * ROWS * weights[kind] / sum(weights.values())
        for split, counts in results[kind]["scores"].items():
            known = results[kind]["together"][split]
            lines.append([kind, split, f"{seen:,.0f}", f"{results[kind]['rows']:,}",
                          *(f"{x:.0f}" for x in (percent(known, "blind", "majority"), percent(known, "model"),
                                                 percent(counts, "model")))])
    return train.markdown(["question", "split", "rows of it in training, with all kinds", "rows, alone",
                           "blind or most frequent, % right", "with all kinds, % right", "alone, % right"], lines)


def table_of_names(results):
    """Lines of Markdown: how often a thing of the scene was named, and how often the right one of these."""
    lines = []
    for kind in (kind for kind in BY_NAME if kind in results):
        for split, counts in results[kind]["scores"].items():
            if counts.get("drawn"):
                lines.append([kind, split, f"{percent(counts, 'drawn'):.0f}",
                              *(f"{100 * counts[who] / counts['drawn']:.0f}" for who in ("model", "chance"))])
    return train.markdown(["question", "split", "answers that name a thing of the scene, %",
                           "of these the right one, %", "by chance, %"], lines)


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=list(QUESTIONS), help="default: all that miss the mark in NANO/tune/eval.json")
    add("--steps", type=int, default=0, help="of 64 questions (default: 400 about single things, 200 about scenes)")
    add("--data", type=Path, default=HERE / "data/emoji", help="for validation, as prepare_data.py wrote it")
    add("--nano", type=Path, default=HERE / "out/nano", help="folder that train.py wrote")
    add("--work", type=Path, default=HERE / "out/one_kind", help="rows and models (default: out/one_kind)")
    add("--results", type=Path, default=HERE / "experiments/results/one_kind", help="one JSON file a kind")
    add("--readme", help="write the tables into this file too, between <!-- NAME --> and <!-- end -->, where NAME is "
                         "that of the results' folder with spaces")
    args = parser.parse_args()
    among = cli.read_json(args.nano / "tune/eval.json")["scores"]
    if not all("blind" in counts for kinds in among.values() for counts in kinds.values()):
        raise InputError(f"{args.nano / 'tune/eval.json'} has no blind twin: give train.py --evaluate a --blind_model")
    args.results.mkdir(parents=True, exist_ok=True)
    practice, todo = cli.read_json(args.nano / "tune/train.json")["steps"], []
    for kind in args.kinds or failing(among):
        path, steps = args.results / f"{kind}.json", args.steps or (400 if kind in SINGLE else 200)  # a scene is slower
        together = {split: kinds[kind] for split, kinds in among.items() if kind in kinds}
        given = {"steps": steps, "together": together, "steps_together": practice}
        if not path.exists():
            todo.append((path, kind, given))
        elif (found := cli.read_json(path)) | given != found:
            raise InputError(f"{path} is of another model or other steps: give another --results")
    for path, kind, given in todo:
        cli.write_text(path, json.dumps(run(kind, given, args), indent=1) + "\n")
    results = {path.stem: cli.read_json(path) for path in args.results.glob("*.json")}
    lines = [*table(results), *([""] + names if (names := table_of_names(results)) else [])]
    print("\n".join(lines))
    if args.readme:
        train.put_between_marks(args.readme, {args.results.name.replace("_", " "): lines})


if __name__ == "__main__":
    cli.run_program(main)
