"""What each level of the fusion study's encoder still knows: one linear classifier per level and attribute.

    python experiments/fusion_probe.py      after fusion.py has computed the levels; writes probe.json beside its runs

Of every level, the mean over the patches of a drawing: how often softmax regression, trained on the study's training
pictures of one thing, tells an attribute of the single things in two validation splits; and the share of the level's
variance that lies between the classes. The first says whether something is still there, with every feature scaled to
unit variance (100 steps of L-BFGS, a fixed ridge); the second, how much of what a projector sees it makes up.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
from assets.emoji.scenes import load_emoji  # noqa: E402
from experiments.fusion import Cached, file_hash, write_json  # noqa: E402

ATTRIBUTES = {  # how a cell of a picture's recipe says it
    "background": lambda cell, concept: cell[5],
    "artist": lambda cell, concept: cell[1],
    "kind": lambda cell, concept: concept["kind"],
    "name": lambda cell, concept: concept["name"],
}
TESTS = ("val_seen", "val_concept")  # known drawings, and concepts that training never shows
RIDGE = 1e-4  # of the squared weights; the same for every level and attribute


def single_things(rows):
    """Pictures of one thing -> float[rows, levels, width] means over the patches, and the cell of each recipe."""
    one = [i for i, grid in enumerate(rows.grids) if grid == 1]
    means = torch.stack([rows.picture(i).crops[0].float().mean(1) for i in one])
    return means, [json.loads(rows.rows[rows.chosen[i]][2][0])["cells"][0] for i in one]


def classify(x, y, tests, classes):
    """Softmax regression of y int[n] on x float[n, width], standardised -> share right on each of tests, [(x, y)]."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    x = (x - mean) / std

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + RIDGE * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return [(((a - mean) / std @ weight + bias).argmax(1) == b).float().mean().item() for a, b in tests]


def share_between(x, y):
    """Share of the variance of x float[n, width] that lies between the classes y int[n]: 1 if they tell all of it."""
    classes, index, counts = y.unique(return_inverse=True, return_counts=True)
    centres = x.new_zeros(len(classes), x.shape[1]).index_add(0, index, x) / counts[:, None]
    return ((centres - x.mean(0)).square().sum(1) @ counts.float() / (x - x.mean(0)).square().sum()).item()


def probe(args):
    """-> {attribute: {"between": [share of the variance, level 0 first], "right": {split: {"pictures", "majority",
    "levels": [share told right]}}}}"""
    config = cli.CLI.from_pretrained(args.encoder, quiet=True).config
    found = {split: single_things(Cached(args, split, config)) for split in ("train", *TESTS)}
    concepts, out = load_emoji()[1], {}
    for attribute, says in tqdm(ATTRIBUTES.items(), desc="probes"):
        values = {split: [says(cell, concepts[cell[0]]) for cell in cells] for split, (_, cells) in found.items()}
        names = sorted({v for v in values["train"] if v})
        data = {}
        for split, (means, _) in found.items():
            keep = [i for i, v in enumerate(values[split]) if v in names]  # has the attribute, as in training
            if keep:
                data[split] = means[keep], torch.tensor([names.index(values[split][i]) for i in keep])
        x, y = data.pop("train")
        right = [classify(x[:, k], y, [(a[:, k], b) for a, b in data.values()], len(names)) for k in range(x.shape[1])]
        usual = y.bincount().argmax()
        told = {split: {"pictures": len(b), "majority": round((b == usual).float().mean().item(), 4),
                        "levels": [round(r[n], 4) for r in right]} for n, (split, (_, b)) in enumerate(data.items())}
        between = [round(share_between(x[:, k], y), 4) for k in range(x.shape[1])]
        out[attribute] = {"between": between, "right": told}
    return out


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=HERE / "data/emoji", help="what prepare_data.py wrote (default: data/emoji)")
    add("--encoder", type=Path, default=HERE / "out/nano/encode", help="the study's encoder (default: out/nano/encode)")
    add("--work", type=Path, default=HERE / "out/fusion", help="where the levels are (default: out/fusion)")
    add("--results", type=Path, default=HERE / "experiments/results/fusion",
        help="gets probe.json (default: experiments/results/fusion)")
    args = parser.parse_args()
    encoder = file_hash(args.encoder / "model.safetensors")
    if (there := cli.read_json(args.results / "probe.json", {})) and there["encoder"] != encoder:
        raise cli.InputError(f"{args.results}/probe.json is of another encoder: give another --results")
    found = probe(args)
    write_json(args.results / "probe.json", {"encoder": encoder, "attributes": found})
    for attribute, facts in found.items():
        print(f"{attribute}: share of the variance {' '.join(f'{100 * x:.1f}' for x in facts['between'])} %")
        for split, told in facts["right"].items():
            print(f"    {split}: told right {' '.join(f'{100 * x:.1f}' for x in told['levels'])} %, majority "
                  f"{100 * told['majority']:.1f} %, {told['pictures']} pictures")


if __name__ == "__main__":
    cli.run_program(main)
