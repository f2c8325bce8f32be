"""Ask a model about a picture.

    python sample.py                                          the bundled nano model on bundled pictures
    python sample.py --image cat.png --prompt "What is this?" --model SRC     SRC: a folder or a hub id
    python sample.py --image a.png --image b.png --prompt "What differs?"     several pictures; none: text alone
    python sample.py --model SRC --image cat.png              without --prompt, on a terminal: a chat (Ctrl-D ends it)
    python sample.py --batch questions.jsonl --out answers.jsonl   lines {"prompt": ..., "image": path or list of paths}

Text goes to standard output as it is decoded, everything else to standard error. A batch's paths start at its file's
folder; one that was stopped goes on where it was when the same command is given again, and what failed is tried again.
An answer's line has its question's other fields too, but line, paths, model, options, answer and error are ours.
"""
import contextlib
import hashlib
import json
import os
import sys
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import cli
from cli import CLI, PRESETS, InputError, KVCache, encode_chat, load_image, prepare_image, user_content

HERE = Path(__file__).resolve().parent
NANO = str(HERE / "assets/nano")
DEMO = [("single.png", "What is this?"), ("single.png", "What colour is the background?"),
        ("scene.png", "What is in the top right?")]
# What an answer depends on beside its question, model, weights and dtype: kept with it. (Sampled, on its batch too.)
OPTIONS = ("fusion", "vision", "key_map", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty",
           "seed")


def say(text):
    print(text, file=sys.stderr, flush=True)


def generate(model, prompts, pictures, args, cache=None, number=0):
    """number: of the turn, or of the batch's first row: each draws its own noise."""
    return model.generate(prompts, pictures, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                          args.repetition_penalty, args.seed + number, cache)


def answer(model, prompt, pictures, args, start, cache=None, number=0):
    """Generate one answer, streaming it -> (text, ids, facts). Ctrl-C ends the answer and is passed on in the facts.
    start: when its question was read; number: as generate() takes it."""
    first, ids, printed, stopped = None, [], 0, False
    try:
        for (token,) in generate(model, [prompt], [pictures], args, cache, number):
            first = first or time.perf_counter()
            ids.append(token)
            text = model.tokenizer.decode(ids)
            if not args.json and not text.endswith("\ufffd"):  # a character of several tokens waits for the last
                print(text[printed:], end="", flush=True)
                printed = len(text)
    except KeyboardInterrupt:
        stopped = True
    text, end, n = model.tokenizer.decode(ids), time.perf_counter(), len(ids)
    if not args.json:
        print(text[printed:], flush=True)
    first = first or end
    facts = {"tokens": n, "visual_tokens": sum(cli.visual_tokens(p, model.config) for p in pictures),
             "seconds_to_first_token": round(first - start, 3),
             "tokens_per_second": round((n - 1) / (end - first), 2) if n > 1 else None, "stopped": stopped,
             "gates": {l: {k: round(w, 4) for k, w in zip(ks, model.gates[l][0].tolist())}
                       for l, ks in model.config.fusion.routes if l in model.gates}}
    return text.strip(), ids, facts


def report(facts, args, device):
    rate = f", then {facts['tokens_per_second']} tokens/s" if facts["tokens_per_second"] else ""
    say(f"[{facts['visual_tokens']} visual tokens, first token after {facts['seconds_to_first_token']:.2f} s{rate}, "
        f"peak memory {cli.peak_memory(device):.2f} GiB]")
    if facts["gates"] and args.gates is not None:
        say(gates_text(facts["gates"]))


def gates_text(gates):
    """W as lines of text: a row for each decoder layer, a column for each vision level."""
    levels = sorted({k for row in gates.values() for k in row})
    lines = ["W: what each decoder layer (rows) let in of each vision level (columns)",
             "      " + "".join(f"{k:>7}" for k in levels)]
    for l, row in gates.items():
        cells = [f" {' ░▒▓█'[min(4, int(row[k] * 5))]} {row[k]:.2f}" if k in row else " " * 7 for k in levels]
        lines.append(f"{l:>5} " + "".join(cells))
    return "\n".join(lines)


def draw_gates(pages, path):
    """A heat map PNG (the paper's Figure 1b), one panel for each (title, gates). Of a title the first line is shown, as
    far as it goes; one with other letters than ASCII, of which the font has few, is left out."""
    cell, left, top, font = 44, 70, 58, ImageFont.load_default(13)  # pixels
    pages = [(textwrap.shorten(title.strip().split("\n")[0], 60, placeholder="..."), gates) for title, gates in pages]
    pages = [(title * title.isascii(), gates) for title, gates in pages]
    columns = [sorted({k for row in gates.values() for k in row}) for _, gates in pages]
    widths = [max(left + cell * len(ks) + 30, int(font.getlength(title)) + 30)
              for ks, (title, _) in zip(columns, pages)]
    height = top + cell * max(len(gates) for _, gates in pages) + 46
    image = Image.new("RGB", (sum(widths), height), "white")
    draw = ImageDraw.Draw(image)
    x0 = 0
    for (title, gates), ks, width in zip(pages, columns, widths):
        draw.text((x0 + 15, 12), title, "black", font)
        draw.text((x0 + 15, top - 22), "layer", "black", font)
        for i, (l, row) in enumerate(gates.items()):
            y = top + i * cell
            draw.text((x0 + left - 16, y + cell / 2), str(l), "black", font, anchor="rm")
            for k, w in row.items():
                x = x0 + left + ks.index(k) * cell
                colour = (round(255 - 220 * w), round(255 - 150 * w), round(255 - 60 * w))
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), colour)
                middle = (x + cell / 2 - 1, y + cell / 2 - 1)
                draw.text(middle, f"{w:.2f}", "white" if w > 0.6 else "black", font, anchor="mm")
        for j, k in enumerate(ks):
            draw.text((x0 + left + (j + 0.5) * cell, top + len(gates) * cell + 10), str(k), "black", font, anchor="mt")
        draw.text((x0 + left, top + len(gates) * cell + 27), "vision level", "black", font)
        x0 += width
    cli.write_whole(Path(path), lambda temporary: image.save(temporary, "PNG"))
    say(f"heat map written to {path}")


def prepare(model, paths, prompt):
    """-> (ids, pictures) of one question. Raises InputError, also where it is longer than the model's context."""
    pictures = [prepare_image(path, model.config, len(paths) > 1) for path in paths]
    ids, _ = encode_chat(model.tokenizer, model.config.template, [("user", user_content(prompt, len(pictures)))])
    length = cli.stream_length(ids, pictures, model.config)
    if length > model.config.decoder.max_position_embeddings:
        raise InputError(f"a prompt of {length} tokens (pictures included) for a context of "
                         f"{model.config.decoder.max_position_embeddings}")
    return ids, pictures


def ask(model, args, questions):
    """Answer (paths of pictures, prompt) after each other, with heat maps where asked."""
    if args.gates is not None and not (model.config.fusion.routes and any(paths for paths, _ in questions)):
        raise InputError("--gates: nothing is let in (no picture, or a model without injection)")
    pages = []
    for paths, prompt in questions:
        start = time.perf_counter()
        ids, images = prepare(model, paths, prompt)
        if len(questions) > 1:
            say(f"\n{', '.join(str(Path(p).name) for p in paths)}: {prompt}")
        text, _, facts = answer(model, ids, images, args, start)
        if args.json:
            result = {"model": str(args.model), "images": [str(p) for p in paths], "prompt": prompt, "answer": text,
                      **facts, "peak_memory_gib": round(cli.peak_memory(model.device), 3)}
            print(json.dumps(result, ensure_ascii=str(sys.stdout.encoding).lower() != "utf-8"))
        else:
            report(facts, args, model.device)
        pages.append((prompt, facts["gates"]))
        if facts["stopped"]:
            raise KeyboardInterrupt
    if args.gates:
        draw_gates([page for page in pages if page[1]], args.gates)


def chat(model, args):
    """Talk until Ctrl-D. The cache holds what was said: a turn only costs its own tokens."""
    with contextlib.suppress(ImportError):  # a line can be edited, where the system has it
        import readline  # noqa: F401

    images = [prepare_image(path, model.config, len(args.image) > 1) for path in args.image]
    cache = KVCache(model.config.decoder, 1, 0, model.device, model.dtype)
    left, turns = None, 0  # tokens of the last answer that were printed but not fed; turns fed so far
    say("Ask; Ctrl-C stops an answer, Ctrl-D (on Windows Ctrl-Z and Enter) ends.")
    while True:
        try:
            text = input("> " if sys.stdout.isatty() else "")  # in a file it would be among the answers
        except EOFError:
            return say("")
        except UnicodeDecodeError as e:
            say(f"error: not text: {e}")
            continue
        if not text.strip():
            continue
        turn, start = ("user", user_content(text, len(images))), time.perf_counter()
        try:
            prompt = (left or []) + encode_chat(model.tokenizer, model.config.template, [turn], start=left is None)[0]
            fed = cache.lengths[0] + cli.stream_length(prompt, images, model.config)
            _, ids, facts = answer(model, prompt, images, args, start, cache, number=turns)
        except InputError as e:  # longer than what is left of the context: the conversation stays as it was
            say(f"error: {e}")
            continue
        if cache.lengths[0] < fed:  # stopped while the turn was read: nothing of it is in the cache
            continue
        left, images, turns = ids[cache.lengths[0] - fed :], [], turns + 1
        report(facts, args, model.device)


def read_questions(path):
    """JSONL -> [{"prompt": str, "paths": [...], ...}]. InputError names file and line, before any work."""
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would split within a string too
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {cli.first_line(e)}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}, line {number}: not JSON: {e}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise InputError(f'{path}, line {number}: expected {{"prompt": "...", "image": "path"}}')
        if row.get("images") and not row.get("image"):
            raise InputError(f'{path}, line {number}: "images": the key is "image", for several pictures too')
        images = [] if row.get("image") is None else row["image"]
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(p and isinstance(p, str) for p in images):
            raise InputError(f"{path}, line {number}: image is {images!r}, expected a path or a list of paths")
        row = {k: v for k, v in row.items() if k not in ("answer", "error")}  # ours
        questions.append({**row, "line": number, "paths": [str(Path(path).parent / p) for p in images]})
    return questions


def answer_rows(model, rows, args, number):
    """Decode the answers to some questions together: each gets its "answer", or "error", and loses its "paths"; number:
    of the first row."""
    asked = []  # (row, its ids, its pictures)
    for row in rows:
        try:
            asked.append((row, *prepare(model, row.pop("paths"), row["prompt"])))
        except InputError as e:
            row["error"] = str(e)
    if asked:
        good, prompts, pictures = zip(*asked)
        steps = list(generate(model, prompts, pictures, args, number=number))
        for b, row in enumerate(good):
            row["answer"] = model.tokenizer.decode([step[b] for step in steps]).strip()


def kept(row, line):
    """What of a question, or of its line in the answers' file, must be as it was for the line to be the question's own.
    A question that failed may have been mended since."""
    return {k: v for k, v in row.items()
            if k in ("line", "model", "options") or "error" not in line and k not in ("answer", "paths")}


def fingerprint(model):
    """Hash of the first values of every tensor: more training or another key map hardly leaves all of them alone."""
    some = [p.flatten()[:8].float().cpu() for p in model.parameters()]
    return hashlib.sha256(torch.cat(some).detach().numpy().tobytes()).hexdigest()[:16]


def batch(model, questions, args):
    """Answer what read_questions gave, args.batch_size at a time; lines are appended as they come, and those of an
    earlier run that failed are tried again first. -> number that failed"""
    options = {k: getattr(args, k) for k in OPTIONS if getattr(args, k) is not None}
    options |= {"dtype": str(model.dtype)[6:], "weights": fingerprint(model)}
    questions = [{**q, "model": args.model, "options": options} for q in questions]
    out, done = Path(args.out), []
    if out.exists():
        *whole, half = out.read_bytes().split(b"\n")  # a killed run may have left half a line
        try:
            done = [json.loads(line) for line in whole]
            if len(done) > len(questions) or any(kept(d, d) != kept(q, d) for d, q in zip(done, questions)):
                raise ValueError
            following = [kept(q, {}) for q in questions[len(done) :][:1]]
            following = cli.json_lines(following).encode(errors="backslashreplace")[:-2]  # but for "}"
            if half and not following or half[: len(following)] != following[: len(half)]:
                raise ValueError
        except (ValueError, AttributeError):
            raise InputError(f"{out} exists and does not hold answers of {args.model}, with the weights it has now, to "
                             f"{args.batch}, asked with the same options: choose another --out") from None
        say(f"{sum('answer' in d for d in done)} of {len(questions)} were answered before")
    cli.write_text(out, cli.json_lines(done))
    again, failed = [n for n, d in enumerate(done) if "error" in d], 0
    with tqdm(total=len(questions), initial=len(done) - len(again)) as bar:
        for some in (todo[i : i + args.batch_size] for todo in (again, range(len(done), len(questions)))
                     for i in range(0, len(todo), args.batch_size)):
            rows = [questions[n] for n in some]
            answer_rows(model, rows, args, some[0])
            if some[0] < len(done):
                done = [questions[n] if n in some else d for n, d in enumerate(done)]
                cli.write_text(out, cli.json_lines(done))
            else:
                with open(out, "ab") as file:
                    file.write(cli.json_lines(rows).encode(errors="backslashreplace"))  # cf. cli.write_text
            failed += sum("error" in row for row in rows)
            bar.update(len(rows))
    return failed


def add_model_flags(add):
    add("--model", default=NANO, help="folder or hub id (default: the bundled nano model)")
    add("--vision", help="separate vision encoder, for a bare decoder or an original LLaVA-1.5")
    add("--fusion", choices=list(PRESETS), help="add a fresh fusion to a checkpoint that has none")
    add("--key-map", help="JSON file with the names of AMP and AGF tensors we do not know (README)")
    add("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    add("--dtype", default="auto", choices=("auto", *cli.DTYPES), help="default: auto")


def load_model(args):
    """The model of add_model_flags' flags; what it is and runs on goes to standard error."""
    device, why = cli.pick_device(args.device)
    dtype, why_dtype = cli.pick_dtype(args.dtype, device)
    start = time.perf_counter()
    model = CLI.from_pretrained(args.model, vision=args.vision, fusion=args.fusion, device=device, dtype=dtype,
                                key_map=args.key_map)
    if model.tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer.json: put the one of the decoder's family beside the weights")
    parameters = sum(p.numel() for p in model.parameters())
    say(f"[{args.model}: {parameters / 1e6:.1f} M parameters, loaded in {time.perf_counter() - start:.2f} s; "
        f"device {device} ({why}), {str(dtype)[6:]} ({why_dtype})]")
    return model


def main():
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(add)
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    add("--prompt", help="the question; without it: a chat on a terminal, else standard input; without it, --image and "
        "--model: some questions about the bundled pictures")
    add("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int, default=0, help="with a temperature, sample from the k likeliest tokens; 0: all (default)")
    add("--top-p", type=float, default=1.0, help="with a temperature, sample from the likeliest tokens that hold this "
        "share (default: 1)")
    add("--repetition-penalty", type=float, help="on tokens generated so far (default: what the checkpoint ships)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--gates", nargs="?", const="", metavar="PNG", help="show W per decoder layer and vision level, or draw it")
    add("--json", action="store_true", help="a JSON object for each question on standard output")
    add("--batch", metavar="JSONL", help="answer many questions; needs --out")
    add("--out", metavar="JSONL", help="where the answers of --batch go")
    add("--batch-size", type=int, default=8, help="questions decoded together (default: %(default)s)")
    args = parser.parse_args()
    for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("batch_size", 1)):
        if not getattr(args, name) >= low:  # nan neither
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}")
    if not 0 < args.top_p <= 1 or args.repetition_penalty is not None and not 0.01 <= args.repetition_penalty <= 100:
        raise InputError("--top-p must be in (0, 1], --repetition-penalty from 0.01 to 100")
    if not 0 <= args.seed < 2**62:
        raise InputError("--seed must be at least 0 and below 2**62")
    if (args.batch, args.out) != (None, None) and not (args.batch and args.out):
        raise InputError("--batch and --out go together")
    if args.batch and (args.image or args.json or args.prompt is not None or args.gates is not None):
        raise InputError("--batch goes without --image, --prompt, --json and --gates")
    for path in args.image:  # before a large model is loaded
        load_image(path)
    if args.gates and any(os.path.abspath(path) == os.path.abspath(args.gates) for path in args.image):
        raise InputError(f"--gates {args.gates} would replace the picture")
    for path in map(Path, filter(None, (args.out, args.gates))):
        if not path.parent.is_dir() or path.exists() and not path.is_file():
            raise InputError(f"{path}: cannot be written: " + ("not a file" if path.exists() else "no such folder"))
    questions = read_questions(args.batch) if args.batch else []
    demo = args.prompt is None and args.model == NANO and not args.image
    spoken = args.prompt is None and not (args.batch or demo)  # what is asked comes through standard input
    if spoken and sys.stdin.isatty() and (args.gates or args.json):
        raise InputError("--json and --gates PNG need a --prompt; a chat shows W with plain --gates")
    if spoken and not sys.stdin.isatty():
        try:
            args.prompt = sys.stdin.read().removeprefix("\ufeff").strip()
        except UnicodeDecodeError as e:
            raise InputError(f"standard input is not text: {e}") from e
        if not args.prompt:
            raise InputError("no question: give --prompt, or write it to standard input")
    model = load_model(args)
    if args.batch:
        if failed := batch(model, questions, args):
            raise InputError(f"{failed} questions could not be answered: their lines in {args.out} say why")
    elif demo:
        args.gates = args.gates or ""
        ask(model, args, [([HERE / "assets/pictures" / name], prompt) for name, prompt in DEMO])
    elif args.prompt is not None:
        ask(model, args, [(args.image, args.prompt)])
    else:
        chat(model, args)


if __name__ == "__main__":
    cli.run_program(main)
