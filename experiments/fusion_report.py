"""Tables and figures of experiments/fusion.py, from the files of its finished runs alone.

    python experiments/fusion_report.py          rewrites experiments/fusion.md and README.md between their marks

Needs matplotlib once there are runs.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
from experiments import fusion_both  # noqa: E402
from experiments.fusion import INTERVENED, REACH, SEEDS, SWEEPS, VARIANTS, best_rate, load_results, unpack  # noqa: E402
from train import markdown, put_between_marks  # noqa: E402

NEEDS = {  # what a question takes: its kinds; probe.json says which levels show a background, an artist, a name
    "the background": ("background", "background_at"),
    "the artist": ("artist", "artist_at"),
    "the thing": ("name", "kind", "name_at"),
    "both at once": ("on_colour",),
}
SEEN = {"known drawings": ("val_seen", "val_scene"), "new ones": ("val_concept", "val_pair")}
CLAIMS = (  # a claim of the paper, or a control: the first minus the second should have this sign
    ("several levels, gated, help", "cli", "none", 1), ("... even at equal or more time", "cli", "none_long", 1),
    ("DeepStack hurts", "deepstack", "none", -1), ("SLI is better than DeepStack", "sli", "deepstack", 1),
    ("SLI is below one-to-one (in three sums of four)", "sli", "none", -1), ("CLI is better than SLI", "cli", "sli", 1),
    ("the gate is critical: CLI beats W = 1", "cli", "amp", 1), ("AGF alone beats AMP alone", "agf", "amp", 1),
    ("AMP alone helps (in the paper a quarter of what CLI gains)", "amp", "none", 1),
    ("it is the levels, not the parameters", "cli", "cli_final", 1),
    ("CLI beats all levels once at the input", "cli", "input", 1),
    ("depth beats the input, both without gates", "amp", "input", 1),
)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


def interval(values, clusters, draws=2000, seed=0):
    """Mean and 95 % interval of values float[seeds, questions] -> (mean, low, high), nan for the latter two from one
    seed; bootstrap in which seeds and clusters of questions (int[questions]) are both drawn with replacement.

    Draws of few seeds hardly leave their range (of three, such an interval would hold the mean in 74 of 100 cases):
    what sets a seed apart is stretched first, by what Student's t is wider than the normal distribution and by
    sqrt(S / (S - 1)).
    """
    values, (_, index) = np.asarray(values, dtype=float), np.unique(clusters, return_inverse=True)
    S, C = len(values), index.max() + 1
    if S == 1:
        return values.mean(), np.nan, np.nan
    stretch = T_975[min(S, 10) - 2] / 1.96 * np.sqrt(S / (S - 1))
    apart = values.mean(1, keepdims=True) - values.mean()
    sums, sizes = np.zeros((S, C)), np.bincount(index, minlength=C)
    for s, row in enumerate(values + (stretch - 1) * apart):
        sums[s] = np.bincount(index, row, C)
    rng = np.random.default_rng(seed)
    of_seed, of_cluster = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in (S, C))
    means = ((of_seed @ sums) * of_cluster).sum(1) / (S * of_cluster @ sizes)
    return values.mean(), *np.percentile(means, (2.5, 97.5))


class Answers:
    """The answers of all runs, beside what was asked."""

    def __init__(self, results, questions):
        self.questions = questions
        asked = [(split, c, kind) for split, q in questions.items() for c, kind in zip(q["concept"], q["kind"])]
        self.splits, self.concepts, self.kinds = np.array(asked, dtype=str).reshape(-1, 3).T
        self.runs, variants = {}, {(r["spec"]["regime"], r["spec"]["variant"]) for r in results}
        for regime, variant in variants:  # only at the chosen rate
            rate = best_rate(results, regime, variant)
            self.runs[regime, variant] = {r["spec"]["seed"]: r for r in results if (
                r["spec"]["regime"], r["spec"]["variant"], r["spec"]["rate"]) == (regime, variant, rate)}
        # Seeds that one-to-one lacks are there for the sweeps alone, no part of the main table.
        for variant in VARIANTS:
            found = self.runs["sweeps", variant] = self.runs.get(("tuned", variant), {})
            if both := found.keys() & self.runs.get(("tuned", "none"), {}):
                self.runs["tuned", variant] = {seed: found[seed] for seed in sorted(both)}

    def of(self, result, right=None):  # -> float[questions]
        right = right or result["right"]
        return np.concatenate([unpack(right[split], len(q["kind"])) for split, q in self.questions.items()])

    def right(self, key, seeds=None):  # -> float[seeds, questions]
        return np.stack([self.of(self.runs[key][s]) for s in seeds or sorted(self.runs[key])])

    def accuracy(self, key, where=slice(None)):
        mean, *bounds = interval(self.right(key)[:, where], self.concepts[where])
        return mean, *np.clip(bounds, 0, 1)  # few seeds far apart are stretched beyond what an accuracy can be

    def paired(self, key, other):
        """One minus the other, same seeds, same questions -> float[seeds, questions], or None without a common seed."""
        if seeds := sorted(self.runs.get(key, {}).keys() & self.runs.get(other, {}).keys()):
            return self.right(key, seeds) - self.right(other, seeds)

    def difference(self, key, other, where=slice(None)):
        found = self.paired(key, other)
        return None if found is None else interval(found[:, where], self.concepts[where])


# ---------------------------------------------------------------------------------------------------------------------
# Report


def percent(found, sign=False):
    if not found:
        return ""
    mean, low, high = (100 * x for x in found)
    return f"{mean:{'+' if sign else ''}.1f}" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def by_seed(values, sign="+"):
    """float[seeds, questions] or None -> each seed's mean in %, or in points"""
    return "" if values is None else " / ".join(f"{100 * x:{sign}.1f}" for x in values.mean(1))


def groups(answers):
    """{what a question takes, and of what: bool[questions]}"""
    found = {(need, seen): np.isin(answers.kinds, kinds) & np.isin(answers.splits, splits)
             for need, kinds in NEEDS.items() for seen, splits in SEEN.items()}
    return {group: where for group, where in found.items() if where.any()}


def titles(answers, regime, names):
    """Columns of variants that may have unequal numbers of seeds."""
    return [f"{VARIANTS[v][0]} ({len(answers.runs[regime, v])})" for v in names]


def main_table(answers, regime):
    rows = []
    for variant, (label, *_) in VARIANTS.items():
        key, runs = (regime, variant), answers.runs.get((regime, variant), {})
        if runs:
            first = runs[min(runs)]
            cost = [f"{1000 * first['step_seconds']:.0f}", f"{first['gib']:.2f}"]
            beside = [percent(answers.difference(key, (regime, other)), True) if variant != other else ""
                      for other in ("none", "sli")]
            # Seed 0 was run on one machine (but for what fusion.md says): only its times can be compared.
            rows.append([label, percent(answers.accuracy(key)), *beside, f"{first['parameters'] / 1e6:.2f}",
                         *(cost if first["spec"]["seed"] == SEEDS[0] else ["", ""]), f"{first['spec']['steps']:,}",
                         f"{first['spec']['rate']:g}", len(runs)])
    head = "variant|accuracy %|minus none|minus SLI|M parameters|ms a step|GiB|steps|rate|seeds"
    return markdown(head.split("|"), rows)


def needs_table(answers, regime):
    """One-to-one's accuracy and every other variant's difference to it, by what a question takes."""
    names, rows = [v for v in VARIANTS if (regime, v) in answers.runs and v != "none"], []
    if (regime, "none") not in answers.runs:
        return []
    for group, where in groups(answers).items():
        beside = (percent(answers.difference((regime, v), (regime, "none"), where), True) for v in names)
        rows.append([*group, where.sum(), percent(answers.accuracy((regime, "none"), where)), *beside])
    return markdown(["a question about", "of", "questions", *titles(answers, regime, ["none", *names])], rows)


def seeds_table(answers, regime):
    """Accuracy of every seed, by what a question takes."""
    rows = [[label, ", ".join(map(str, sorted(answers.runs[regime, v]))), by_seed(answers.right((regime, v)), ""),
             *(by_seed(answers.right((regime, v))[:, where], "") for where in groups(answers).values())]
            for v, (label, *_) in VARIANTS.items() if (regime, v) in answers.runs]
    return markdown(["variant", "seeds", "all", *(", ".join(group) for group in groups(answers))], rows)


def rates_table(answers, regime, results):
    """What the higher of the two learning rates changes, in points, in the first seed, which alone has both."""
    rows = []
    for v, (label, *_) in VARIANTS.items():
        both = {r["spec"]["rate"]: answers.of(r) for r in results
                if (r["spec"]["regime"], r["spec"]["variant"], r["spec"]["seed"]) == (regime, v, SEEDS[0])}
        if len(both) > 1:
            more = both[max(both)] - both[min(both)]
            rows.append([label, *(f"{100 * more[where].mean():+.1f}"
                                  for where in (slice(None), *groups(answers).values()))])
    return markdown(["variant", "all", *(", ".join(group) for group in groups(answers))], rows)


def probe_table(found):
    """What every level of the encoder holds (fusion_probe.py)."""
    rows = []
    for attribute, facts in found.items():
        rows.append([attribute, "share of the variance", *(f"{100 * x:.1f}" for x in facts["between"]), ""])
        rows += [["", f"correct, {split}", *(f"{100 * x:.1f}" for x in [*told["levels"], told["majority"]])]
                 for split, told in facts["right"].items()]
    levels = range(len(next(iter(found.values()))["between"])) if found else ()
    return markdown(["attribute", "in %", *(f"level {k}" for k in levels), "majority"], rows)


def kinds_table(answers, regime, split):
    names = [v for v in VARIANTS if (regime, v) in answers.runs]
    rows = []
    for kind in [*dict.fromkeys(answers.kinds[answers.splits == split]), "all"]:
        where = (answers.splits == split) & ((answers.kinds == kind) | (kind == "all"))
        rows.append([kind, where.sum(), *(f"{100 * answers.right((regime, v))[:, where].mean():.1f}" for v in names)])
    return markdown([split, "questions", *titles(answers, regime, names)], rows if names else [])


def claims_table(answers, regime):
    rows = []
    for claim, first, second, sign in CLAIMS:
        if found := answers.difference((regime, first), (regime, second)):
            seeds = len(answers.paired((regime, first), (regime, second)))
            clear = found[1] > 0 or found[2] < 0
            verdict = ("holds" if found[0] * sign > 0 else "the opposite") if clear else "undecided"
            rows.append([claim, f"{VARIANTS[first][0]} minus {VARIANTS[second][0]}", percent(found, True), seeds,
                         verdict if seeds >= 3 else "too few seeds"])
    return markdown(["claim", "difference", "points", "seeds", "verdict here"], rows)


STATES = ("q: they depend on the question (W, a mean over questions of a kind, differs by more than 0.25 between two "
          "kinds), o: they do not and some W is above 0.25, s: shut")


def state(gates):
    """What became of the gates of a layer in a run: a letter of STATES."""
    W = np.array(list(gates["kinds"].values()))  # (kinds, levels)
    return "q" if np.ptp(W, 0).max() > 0.25 else "o" if W.max() > 0.25 else "s"


def gates_table(answers, regime):
    rows = []
    for variant in VARIANTS:
        runs = [r for r in answers.runs.get((regime, variant), {}).values() if "gates" in r]
        for l in runs[0]["gates"] if runs else ():
            cells = [" ".join(f"{x:.3f}" for x in np.mean([r["gates"][l][what] for r in runs], 0))
                     for what in ("mean", "sd", "saturated")]
            seeds = " / ".join(f"{np.mean(r['gates'][l]['mean']):.2f} {state(r['gates'][l])}" for r in runs)
            rows.append([VARIANTS[variant][0], l, *cells, seeds, f"{np.mean([r['size'][int(l)] for r in runs]):.1f}"])
    return markdown(["variant", "decoder layer", "mean W, level by level", "its spread over questions",
                     "share below 0.01 or above 0.99", "mean W of each seed, in order", "mean norm of h"], rows)


def interventions_of(answers, variant):
    """-> {what was done to W: differences to the model as trained, float[seeds, questions]}"""
    runs = list(answers.runs.get(("tuned", variant), {}).values())
    return {name: np.stack([answers.of(r, r["interventions"][name]) - answers.of(r) for r in runs])
            for name in (runs[0]["interventions"] if runs else ())}


def interventions_table(answers):
    rows = [[VARIANTS[v][0], name, percent(interval(found, answers.concepts), True), by_seed(found)]
            for v in INTERVENED for name, found in interventions_of(answers, v).items()]
    return markdown(["variant", "W at inference", "points of accuracy", "each seed"], rows)


def sweeps(answers):
    """Yields (topic, its choice in the main table, another, that one's key) where there are runs of it."""
    for topic, (usual, labels) in SWEEPS.items():
        keys = {label: ("tuned", f"{topic}={label}") for label in labels}
        if topic == "gate":
            keys["none, W = 1"] = ("sweeps", "amp")  # the main table's, and further seeds
        yield from ((topic, usual, label, key) for label, key in keys.items() if answers.runs.get(key))


def sweeps_table(answers):
    rows = []
    for topic, usual, label, key in sweeps(answers):
        runs = [answers.runs[key][seed] for seed in sorted(answers.runs[key])]
        dev = f"{np.mean([r['dev_loss'] for r in runs]):.3f}"
        if "dev_loss_gate_sees_answer" in runs[0]:
            leaky = np.mean([r["dev_loss_gate_sees_answer"] for r in runs])
            dev += f" ({leaky:.3f} if the gate sees the answer)"
        states = ["".join(map(state, r["gates"].values())) for r in runs if r.get("gates")]
        rows.append([topic, usual, label, percent(answers.accuracy(key)),
                     percent(answers.difference(key, ("sweeps", "cli")), True),
                     by_seed(answers.paired(key, ("sweeps", "cli"))),
                     f"{np.mean([r['curve'][-1]['loss'] for r in runs]):.3f}", dev, " / ".join(states),
                     ", ".join(map(str, sorted(answers.runs[key])))])
    return markdown(["choice", "in the main table", "here", "accuracy %", "minus CLI", "each seed", "training loss",
                     "dev loss", "gates, layer by layer, of each seed", "seeds"], rows)


def sweeps_by_need_table(answers):
    """Every seed's difference to CLI, by what a question is about."""
    found, rows = groups(answers), []
    for topic, _, label, key in sweeps(answers):
        if (beside := answers.paired(key, ("sweeps", "cli"))) is not None:
            rows.append([topic, label, *(by_seed(beside[:, where]) for where in found.values())])
    return markdown(["choice", "here", *(", ".join(group) for group in found)], rows)


def load_both(folder):
    """Answers of the runs of fusion_both.py, whose regime is "both"."""
    answers = Answers([], cli.read_json(folder / "questions.json", {}))
    for result in load_results(argparse.Namespace(results=folder)):
        answers.runs.setdefault(("both", result["spec"]["variant"]), {})[result["spec"]["seed"]] = result
    return answers


def both_table(answers):
    """Name and background in one answer. Of known drawings beside it each alone and their product, which the two in one
    answer would have if a mistake in the one said nothing about the other; mean over one thing and a scene's."""
    def of(split, *kinds):
        return np.isin(answers.kinds, kinds) & (answers.splits == split)

    def mean(x):
        return f"{100 * x.mean():.1f}"

    rows, known = [], of("val_seen", "both", "both_at")
    for variant, (label, *_) in fusion_both.VARIANTS.items():
        key = ("both", variant)
        if key in answers.runs:
            right = answers.right(key)
            one, scene = ({kind: right[:, of("val_seen", kind + at)].mean(1) for kind in ("name", "background", "both")}
                          for at in ("", "_at"))
            beside = [percent(answers.difference(key, ("both", other), known), True) if variant != other else ""
                      for other in ("none", "sli", "amp")]
            apart = [(one[kind] + scene[kind]) / 2 for kind in ("name", "background")]
            product = (one["name"] * one["background"] + scene["name"] * scene["background"]) / 2
            new = [of("val_scene", "both", "both_at"), of("val_pair", "both", "both_at")]
            rows.append([label, percent(answers.accuracy(key, known)), *beside, mean(one["both"]), mean(scene["both"]),
                         *map(mean, (product, *apart)), *(percent(answers.accuracy(key, where)) for where in new),
                         mean(right[:, answers.splits == "val_concept"]), by_seed(right[:, known], ""),
                         ", ".join(map(str, sorted(answers.runs[key])))])
    return markdown(["variant", "both, known drawings", "minus none", "minus SLI", "minus W = 1", "of one thing",
                     "in a scene", "product of the two alone", "name alone", "background alone",
                     "both, on a new colour", "both, new drawings", "background, new concepts",
                     "both, known, each seed", "seeds"], rows)


def both_sentence(answers):
    """For the README, like sentences(): both of known drawings, in the seeds that these have in common."""
    shown = [v for v in ("none", "sli", "amp", "cli") if ("both", v) in answers.runs]
    seeds = sorted(set.intersection(*({*answers.runs["both", v]} for v in shown))) if shown else []
    if not seeds:
        return ""
    known = (answers.splits == "val_seen") & np.isin(answers.kinds, ("both", "both_at"))
    said = (f"{VARIANTS[v][0]} {by_seed(answers.right(('both', v), seeds)[:, known], '')}" for v in shown)
    return (f" Name and background of known drawings in one answer, % right in seeds {', '.join(map(str, seeds))}: "
            f"{'; '.join(said)}.")


def both_gates_table(answers):
    """Mean W, level by level, of every kind of question."""
    rows, kinds = [], list(dict.fromkeys(answers.kinds.tolist()))
    for variant, (label, *_) in fusion_both.VARIANTS.items():
        runs = sorted((seed, r["gates"]) for seed, r in answers.runs.get(("both", variant), {}).items() if "gates" in r)
        for l, (seed, gates) in ((l, run) for l in (runs[0][1] if runs else ()) for run in runs):
            rows.append([label, l, seed, state(gates[l]),
                         *(" ".join(f"{x:.2f}" for x in gates[l]["kinds"][kind]) for kind in kinds)])
    return markdown(["variant", "decoder layer", "seed", "gate", *kinds], rows)


def figures(args, answers):
    """Draw what there are runs for -> {name: path}."""
    try:
        import matplotlib
    except ImportError as e:
        raise cli.InputError(f"{e}: pip install matplotlib") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, names = {}, [v for v in VARIANTS if ("tuned", v) in answers.runs]

    def save(name, fig):
        drawn[name] = args.results / f"{name}.png"
        fig.savefig(drawn[name], dpi=80, bbox_inches="tight")
        plt.close(fig)
        Image.open(drawn[name]).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(
            drawn[name], optimize=True)  # a third of the bytes

    def bars(ax, found, text):  # {label: (mean, low, high)}
        for i, values in enumerate(found.values()):
            mean, low, high = (100 * x for x in values)
            ax.errorbar(mean, i, xerr=[[max(0, mean - low)], [max(0, high - mean)]], fmt="o", color="C0")
        ax.set(yticks=range(len(found)), yticklabels=list(found), xlabel=text)
        ax.invert_yaxis()

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    bars(left, {VARIANTS[v][0]: answers.accuracy(("tuned", v)) for v in names}, "accuracy %, 95 % interval; |: a seed")
    for i, variant in enumerate(names):
        seeds = 100 * answers.right(("tuned", variant)).mean(1)
        left.plot(seeds, [i] * len(seeds), "|", color="C3", markersize=12)
        curves = [{p["step"]: p["dev_loss"] for p in r["curve"] if "dev_loss" in p}
                  for r in answers.runs["tuned", variant].values()]
        steps = sorted(set.intersection(*map(set, curves)))
        means = [np.mean([curve[step] for curve in curves]) for step in steps]
        right.plot(steps, means, label=VARIANTS[variant][0], linestyle="-" if i < 6 else "--")
    right.set(xlabel="step", ylabel="loss on the development split")
    right.legend(fontsize=7)
    save("main", fig)

    for variant in (v for v in INTERVENED if v in names):
        runs = answers.runs["tuned", variant]  # {seed: run}
        layers, levels = list(next(iter(runs.values()))["gates"]), cli.parse_layers(REACH["vision_levels"])
        places = [(seed, l) for seed in runs for l in layers]  # a row each: a mean over seeds would hide what they do
        fig, axes = plt.subplots(2, 4, figsize=(9, 1.5 + 0.35 * len(places)), sharex=True, sharey=True)
        for ax, kind in zip(axes.flat, runs[places[0][0]]["gates"][layers[0]]["kinds"]):
            W = [runs[seed]["gates"][l]["kinds"][kind] for seed, l in places]
            image = ax.imshow(W, vmin=0, vmax=1, aspect="auto")
            ax.hlines(np.arange(1, len(runs)) * len(layers) - 0.5, -0.5, len(levels) - 0.5, color="white", linewidth=2)
            ax.set_title(kind, fontsize=9)
            ax.set(xticks=range(len(levels)), xticklabels=levels, yticks=range(len(places)),
                   yticklabels=[f"{seed}: {l}" for seed, l in places])
        fig.supxlabel("vision level")
        fig.supylabel("seed: decoder layer")
        fig.colorbar(image, ax=axes, label="mean W")
        save(f"gates_{variant}", fig)
        fig, ax = plt.subplots(figsize=(7, 3))
        changed = interventions_of(answers, variant)
        bars(ax, {name: interval(found, answers.concepts) for name, found in changed.items()},
             "points of accuracy against the gates as trained")
        ax.axvline(0, color="gray", linewidth=0.8)
        save(f"interventions_{variant}", fig)
    return drawn


def sentences(answers):
    """A few sentences for the README, from the numbers."""
    done, whole = sum(len(answers.runs.get(("tuned", v), ())) for v in VARIANTS), len(SEEDS) * len(VARIANTS)
    interim = f"**Interim: {done} of {whole} runs.** " if done < whole else ""

    def said(a, b):
        if found := answers.difference(("tuned", a), ("tuned", b)):
            return f"{percent(found, True)} points (seeds: {len(answers.paired(('tuned', a), ('tuned', b)))})"
        return "not run yet"

    return (f"{interim}CLI minus the one-to-one model: {said('cli', 'none')}; minus one that trained for CLI's time "
            f"or more: {said('cli', 'none_long')}. The gate (CLI minus W = 1): {said('cli', 'amp')}; the levels (CLI "
            f"minus CLI whose levels are all the final one): {said('cli', 'cli_final')}. Against SLI: "
            f"{said('cli', 'sli')}, and DeepStack minus one-to-one: {said('deepstack', 'none')}.")


def report(args):
    """Rewrite what stands between the marks in experiments/fusion.md and README.md from the files of the runs."""
    results = load_results(args)
    answers = Answers(results, cli.read_json(args.results / "questions.json", {}))
    drawn = figures(args, answers) if any(regime == "tuned" for regime, _ in answers.runs) else {}

    def shown(table):
        return [*(table or ["Not run yet."]), ""]

    def pictures(page, **texts):
        paths = {name: Path(os.path.relpath(drawn[name], page.parent)).as_posix() for name in texts if name in drawn}
        return [line for name, path in paths.items() for line in (f"![{texts[name]}]({path})", "")]

    caption, main = "Accuracy of every variant, and learning curves", main_table(answers, "tuned")
    both = load_both(args.both)
    said = [sentences(answers) + both_sentence(both)] if main else []
    put_between_marks(args.readme, {"fusion": [*shown(main), *pictures(args.readme, main=caption), *said]})
    probes = probe_table(cli.read_json(args.results / "probe.json", {}).get("attributes", {}))
    lines = ["### What the levels of the encoder hold", "", *shown(probes)]
    for regime, title in (("tuned", "From a pre-trained one-to-one model"), ("scratch", "From scratch")):
        table = main_table(answers, regime)
        lines += [f"### {title}", "", *shown(table)]
        if not table:
            continue
        lines += [*(pictures(args.page, main=caption) if regime == "tuned" else []),
                  "The paper's claims, and controls of our own:", "", *shown(claims_table(answers, regime)),
                  "Points of accuracy against one-to-one, by what a question is about (in brackets the seeds; every "
                  "difference is one of equal seeds):", "",
                  *shown(needs_table(answers, regime)),
                  "Accuracy in % of every seed:", "", *shown(seeds_table(answers, regime)),
                  f"What the higher of the two learning rates changes, in points (seed {SEEDS[0]}, one run each):", "",
                  *shown(rates_table(answers, regime, results)),
                  "Accuracy in % by kind of question, means over a variant's own seeds (in brackets: how many; columns "
                  "of unequal seeds do not compare):", ""]
        for table in filter(None, (kinds_table(answers, regime, split) for split in answers.questions)):
            lines += shown(table)
        lines += ["What the gates let in (means over seeds and, as a gate may be open in one seed and shut in another, "
                  f"each seed's mean over levels, with a letter; {STATES}):", "", *shown(gates_table(answers, regime))]
    lines += ["### Other weights at inference", "", *shown(interventions_table(answers))]
    for v in INTERVENED:
        lines += pictures(args.page, **{f"gates_{v}": f"{VARIANTS[v][0]}: mean W per kind of question, seed by seed",
                                        f"interventions_{v}": f"{VARIANTS[v][0]}: other weights at inference"})
    lines += ["### Where the paper is silent", "", f"Gates: {STATES}.", "", *shown(sweeps_table(answers)),
              "Points of accuracy against CLI, each of these seeds, by what a question is about:", "",
              *shown(sweeps_by_need_table(answers))]
    lines += ["### Both at once: name and background in one answer", "", *shown(both_table(both)),
              f"Mean W, level by level, by kind of question (gate: {STATES}):", "",
              *shown(both_gates_table(both))]
    put_between_marks(args.page, {"fusion": lines})
    used = len({r["spec"]["name"] for runs in answers.runs.values() for r in runs.values()})
    print(f"{len(results)} runs, {len(results) - used} of them at a rate that was not chosen -> {args.readme}, "
          f"{args.page}")


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--results", type=Path, default=HERE / "experiments/results/fusion",
        help="files of the runs (default: experiments/results/fusion)")
    add("--page", type=Path, default=HERE / "experiments/fusion.md", help="gets all tables (default: this project's)")
    add("--readme", type=Path, default=HERE / "README.md", help="gets the main one (default: this project's)")
    add("--both", type=Path, help="files of fusion_both.py's runs (default: --results' name, with _both)")
    args = parser.parse_args()
    if args.both and not args.both.is_dir():
        raise cli.InputError(f"--both {args.both}: no such folder")
    args.both = args.both or args.results.with_name(args.results.name + "_both")
    for name in ("results", "both", "page", "readme"):
        setattr(args, name, getattr(args, name).absolute())
    if not args.results.is_dir():
        raise cli.InputError(f"--results {args.results}: no such folder")
    report(args)


if __name__ == "__main__":
    cli.run_program(main)
