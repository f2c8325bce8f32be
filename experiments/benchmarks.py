"""Benchmarks as the paper runs them: through LMMs-Eval, here answered by cli.py.

    pip install -r experiments/requirements.txt         LMMs-Eval; it downloads a task's data when that is first run
    python experiments/benchmarks.py --model SRC --tasks ai2d,chartqa --out out/base      SRC: a folder or a hub id
    python experiments/benchmarks.py --model SRC2 --tasks ai2d,chartqa --out out/cli --beside out/base
    python experiments/benchmarks.py --tasks nano --include-path experiments/tasks --out out/nano-bench --dtype float32

Prompts, pictures and lengths of answers are those of LMMs-Eval's own wrappers of LLaVA-OneVision and LLaVA-1.5, and so
is the checkpoint's repetition penalty; `until` is ignored, as there. Differences: answers are decoded in batches of
similar length (in float32 they are those of batch size 1; in bfloat16 two nearly equal tokens may change places), and
always greedily, where the wrapper leaves it to the checkpoint's generation_config.json unless the task says, and
LLaVA-OneVision's says to sample; special tokens written out in a question stay text. Tasks that show videos, sample,
ask in several rounds or compare likelihoods are refused; a question longer than the model's context counts as answered
with nothing.

In --out: answers.jsonl, every answer as it comes (a run that was killed goes on where it was when the same command is
given again); results.jsonl, a line for every task that is done; scores-TASK.jsonl, the task's metrics for every
question; table.md, with the figures of --beside and the paper's next to this run's. The task `nano` needs no network.
"""
import argparse
import difflib
import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
from cli import IMAGE_TOKEN, InputError, encode_chat, user_content  # noqa: E402
from sample import add_model_flags, load_model  # noqa: E402
from train import commit, markdown, tokens_and_patches  # noqa: E402

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from loguru import logger
except ImportError as missing:
    print(f"error: LMMs-Eval cannot be used ({missing}): pip install -r experiments/requirements.txt", file=sys.stderr)
    sys.exit(2)

# The name of LMMs-Eval's own wrapper: some tasks word their questions differently for some models.
WRAPPERS = {"qwen_1_5": "llava_onevision", "vicuna_v1": "llava"}
# Lists of tasks. To be filled in: the names of the paper's 18 and of the model cards' 28 were not at hand.
GROUPS = {"paper": (), "card": ()}
KEY = ("task", "split", "doc_id", "hash", "max_new_tokens")  # what an answer is kept under; hash: of the question
PAPER = """\
The paper (single runs) prints sums over the nine tasks of its Table 1 / Table 2:

| | baseline | DeepStack | SLI | CLI |
|---|---|---|---|---|
| LLaVA-OneVision-0.5B | 541.2 / 391.0 | 500.5 (printed: 490.5) / 380.9 | 534.7 / 393.7 | 542.9 / 395.6 |
| LLaVA-OneVision-7B | 650.9 / 556.2 | 611.8 / 539.3 | 645.8 / 551.1 | 660.6 / 559.4 |
| LLaVA-1.5-7B | 468.0 / 433.8 | - | - | 475.5 / 442.4 |
"""


def prompt_ids(model, context, pictures):
    """A task's question and its number of pictures -> token ids. The pictures go in front, or where the task says
    "<image>"; a question may also be a conversation in JSON (llava_interleave_bench)."""
    turns = [user_content(context, pictures)]
    if not pictures or "<image>" in context:
        try:
            turns = [turn["value"] for turn in json.loads(context)]
        except (ValueError, TypeError, KeyError):
            turns = [context]
        if pictures:
            turns = [[x for text in turn.split("<image>") for x in (text, IMAGE_TOKEN)][:-1] for turn in turns]
    turns = [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    return encode_chat(model.tokenizer, model.config.template, turns)[0]


class Answerer(lmms):
    """What LMMs-Eval takes for a model. One serves one task: LMMs-Eval clears it after use."""

    def __init__(self, model, answers, file, batch_size):
        super().__init__()
        self.cli, self.answers, self.file, self.batch_size = model, answers, file, batch_size

    def generate_until(self, requests):
        """Requests -> their answers (str), in order. Those not answered before are grouped by length, longest first."""
        model, lengths, keys = self.cli, {}, [self.key(request) for request in requests]
        self.asked = set(keys)
        waiting = {key: request for key, request in zip(keys, requests) if key not in self.answers}
        for key, request in tqdm(waiting.items(), desc="reading", unit="question", disable=not waiting):
            ids, pictures = self.read(request)
            seen = sum(tokens_and_patches(model.config, *p.size, len(pictures) > 1)[0] - 1 for p in pictures)
            lengths[key] = len(ids) + seen
        order = sorted(waiting, key=lambda key: (key[-1], -lengths[key]))  # key[-1]: max_new_tokens, one in a batch
        with tqdm(total=len(self.asked), initial=len(self.asked) - len(order), desc="answers", unit="question") as bar:
            while order:
                batch = [key for key in order[: self.batch_size] if key[-1] == order[0][-1]]
                order = order[len(batch) :]
                self.decode({key: waiting[key] for key in batch}, lengths)
                bar.update(len(batch))
        return [self.answers[key]["answer"] for key in keys]

    @staticmethod
    def key(request):
        """The request's values for KEY. Raises InputError for other than greedy decoding."""
        context, options, _, doc_id, task, split = request.args
        if options.get("do_sample") or options.get("num_beams", 1) > 1:
            raise InputError(f"{task} asks for sampling or beam search: only greedy answers are given here")
        hashed = hashlib.sha256(context.encode()).hexdigest()[:16]
        return task, split, doc_id, hashed, options.get("max_new_tokens", 1024)

    def read(self, request):
        """-> (token ids, PIL pictures)"""
        context, _, doc_to_visual, doc_id, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if request.metadata.get("task_type") == "video" or not all(isinstance(p, Image.Image) for p in pictures):
            raise InputError(f"{task} shows videos (or sounds): this model takes pictures and text only")
        return prompt_ids(self.cli, context, len(pictures)), pictures

    def decode(self, batch, lengths):
        """Answer {key: request}; every answer goes to the file."""
        model, start = self.cli, time.time()
        room = model.config.decoder.max_position_embeddings
        fits = {key: self.read(request) for key, request in batch.items() if lengths[key] <= room}
        steps = []
        if fits:
            prompts, pictures = zip(*fits.values())
            steps = list(model.generate(list(prompts), list(pictures), max_new_tokens=next(iter(fits))[-1]))
        texts = {key: model.tokenizer.decode([step[b] for step in steps]).strip() for b, key in enumerate(fits)}
        for key, request in batch.items():
            line = {"question": request.args[0], "answer": texts.get(key, ""), "tokens": lengths[key],
                    "fits": key in fits, "seconds": round((time.time() - start) / len(batch), 4)}
            self.answers[key] = line = dict(zip(KEY, key)) | line
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def loglikelihood(self, requests):
        raise InputError(f"{requests[0].task_name} compares likelihoods: only tasks that are answered in words are run")

    def generate_until_multi_round(self, requests):
        raise InputError(f"{requests[0].task_name} asks in several rounds: only tasks that ask once are run")


def read_lines(path):
    """JSON lines; the last may be incomplete, as a killed run leaves it, and is left out."""
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as e:
        raise InputError(f"{path}: damaged ({e}): delete it or choose another --out") from None


def write_lines(path, lines):
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    cli.write_text(path, text)


def open_run(out, settings):
    """-> ({key: answer}, [results]) of an earlier run in this folder. Raises InputError if it was another model's."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists() and any((out / name).exists() for name in ("answers.jsonl", "results.jsonl")):
        raise InputError(f"{out} holds answers or results that are not of this program: choose another --out")
    before = cli.read_json(out / "run.json", settings)
    if wrong := [f"{name} {before.get(name)}" for name in ("weights", "dtype") if before.get(name) != settings[name]]:
        raise InputError(f"{out} holds the answers of another model ({', '.join(wrong)}): choose another --out")
    write_lines(out / "run.json", [settings])
    answers, results = (read_lines(p) if p.exists() else [] for p in (out / "answers.jsonl", out / "results.jsonl"))
    write_lines(out / "answers.jsonl", answers)  # without half a line at its end
    return {tuple(answer[name] for name in KEY): answer for answer in answers}, results


def fingerprint(model):
    """A short hash of the configuration and the weights: 16 numbers of every tensor."""
    total = hashlib.sha256(json.dumps(model.config.to_dict()).encode())
    for name, p in model.state_dict().items():
        total.update(name.encode() + p.flatten()[:16].float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def numbers(metrics):
    """The plain scores among LMMs-Eval's entries: no standard errors, no submissions."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and "_stderr" not in name}


def run_task(task, lm, manager, args):
    """One task (or group of tasks) through LMMs-Eval -> its line of results.jsonl."""
    options = argparse.Namespace(output_path=str(args.out), process_with_media=False)  # where submissions are written
    found = simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=args.limit, cli_args=options,
                            bootstrap_iters=0)
    counts = {}  # some metrics are of some questions only
    for name, samples in found["samples"].items():
        rows = [{"target": x["target"], "answer": x["filtered_resps"], **numbers(x)} for x in samples]
        write_lines(args.out / f"scores-{name}.jsonl", rows)
        counts[name] = {metric: len({x["doc_id"] for x in samples if metric.split(",")[0] in x})
                        for metric in numbers(found["results"][name])}
    answers = [lm.answers[key] for key in lm.asked]
    return {"task": task, "metrics": {name: numbers(entry) for name, entry in found["results"].items()},
            "counts": counts, "questions": len(answers), "too_long": sum(not a["fits"] for a in answers),
            "limit": args.limit, "seconds": round(sum(a["seconds"] for a in answers), 1), "commit": commit(),
            "lmms_eval": version("lmms-eval")}


def make_table(lines, beside):
    """Lines of results.jsonl as a table, next to another run's on as many questions."""
    rows = []
    for line in lines:
        other = next((x["metrics"] for x in reversed(beside) if x["task"] == line["task"]
                      and (x["questions"], x["limit"]) == (line["questions"], line["limit"])), {})
        for name, metrics in line["metrics"].items():
            for metric, value in metrics.items():
                theirs, count = other.get(name, {}).get(metric), line["counts"].get(name, {}).get(metric, "")
                cells = [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in (value, theirs)]
                rows.append([name, metric.removesuffix(",none"), *cells, count, ""])
        note = f"{line['too_long']} too long; " * bool(line["too_long"])
        rows.append([line["task"], note + "all", "", "", line["questions"], f"{line['seconds']:.0f}"])
    return "\n".join(markdown(["task", "metric", "this run", "other run", "questions", "seconds"], rows)) + "\n"


def choose_tasks(text, manager):
    names = [name for part in text.split(",") for name in GROUPS.get(part, (part,))]
    if empty := [part for part in text.split(",") if not GROUPS.get(part, True)]:
        raise InputError(f"--tasks {empty[0]}: this list is empty so far: put its tasks' names into GROUPS, {__file__}")
    for name in names:
        if name not in manager.all_tasks:
            near = " or ".join(difflib.get_close_matches(name, manager.all_tasks, 3))
            raise InputError(f"LMMs-Eval has no task {name!r}" + (f": did you mean {near}?" if near else ""))
    return names


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(add)
    add("--tasks", required=True, help=f"names of LMMs-Eval's tasks, with commas; or a list: {', '.join(GROUPS)}")
    add("--include-path", help="folder with further tasks (yaml)")
    add("--limit", type=int, help="only the first questions of every task")
    add("--batch-size", type=int, default=8, help="questions decoded together (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--beside", type=Path, help="folder of another run, to put its figures in the table")
    args = parser.parse_args()
    if args.batch_size < 1 or args.limit is not None and args.limit < 1:
        raise InputError("--batch-size and --limit must be at least 1")
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    beside = read_lines(args.beside / "results.jsonl") if args.beside else []
    model = load_model(args)
    manager = TaskManager("WARNING", include_path=args.include_path, model_name=WRAPPERS[model.config.template])
    tasks = choose_tasks(args.tasks, manager)
    answers, results = open_run(args.out, {"model": args.model, "fusion": args.fusion, "weights": fingerprint(model),
                                           "dtype": str(model.dtype)[6:], "device": model.device.type})
    lines, failed = [], []
    with open(args.out / "answers.jsonl", "a", encoding="utf-8") as file:
        for task in tasks:
            print(f"== {task}", file=sys.stderr)
            try:
                lines.append(run_task(task, Answerer(model, answers, file, args.batch_size), manager, args))
                write_lines(args.out / "results.jsonl", results + lines)
            except Exception as e:  # of a task's code or its download, which are LMMs-Eval's; the other tasks go on
                while hasattr(e, "last_attempt"):  # it tries some things several times
                    e = e.last_attempt.exception()
                failed.append(f"{task}: {cli.first_line(e)}")
    done = {line["task"]: line for line in results + lines}  # of earlier calls too, each task's last
    table = make_table(done.values(), beside) + "\n" + PAPER
    cli.write_text(args.out / "table.md", table)
    print(table)
    if failed:
        raise InputError("; ".join(failed))


if __name__ == "__main__":
    cli.run_program(main)
