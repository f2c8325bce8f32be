"""Turn pictures and conversations into shards that train.py memory-maps.

    python prepare_data.py emoji                                       questions about the bundled drawings
    python prepare_data.py llava chat.json --images DIR --tokenizer SRC    LLaVA conversations, JSON or JSONL
    python prepare_data.py onevision --samples 10000 --tokenizer SRC   lmms-lab/LLaVA-OneVision-Data from the hub

Output, in data/NAME/:
    manifest.json             what is there; written last, so a folder without one holds nothing to train on
    tokenizer.json            the tokenizer whose ids the shards hold
    SPLIT-00000.safetensors   tokens           int32[t]    the rows end to end, -200 where a picture goes
                              answer           uint8[t]    1 = of an answer, 2 = not, but supervised all the same
                                                           (--labels llava), 0 = not supervised (not shifted)
                              row_offsets      int64[n+1]  row i is tokens[row_offsets[i]:row_offsets[i+1]]
                              pictures         uint8[b]    the pictures' bytes end to end: an image file, or a recipe
                              picture_offsets  int64[m+1]  picture j: pictures[picture_offsets[j]:picture_offsets[j+1]]
                              picture_sizes    int32[m,2]  width and height: so train.py knows how long a row will be
                              row_pictures     int64[n+1]  row i has the pictures row_pictures[i]:row_pictures[i+1]
                              kind             int16[n]    the row's kind, an index into the manifest's "kinds"
    bad_rows.jsonl            rows that were left out, where they stand and why (only if there are any)
    arguments.json            what the folder was begun with: a run that goes on must have the same

A recipe is a line of JSON that open_picture() of assets/emoji/scenes.py draws: a scene takes a millisecond to draw and
200 bytes to keep, so that a hundred thousand different ones fit anywhere. An interrupted run goes on where it was:
finished shards are kept, but of a file of yours not those with bad rows, which may have been mended. A shard depends on
nothing but the arguments, what the rows point to, its split and number, so the bytes are those of a run in one go.
"""

import functools
import hashlib
import json
import random
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import cli
from assets.emoji.scenes import EMOJI, QUESTIONS, VALIDATION, emoji_pools, emoji_row, recipe_size, train_tokenizer
from cli import IMAGE_TOKEN, InputError

FORMAT = 1  # of the shards; part of the arguments that a resumed run must share
PICTURES = ["text", "picture", "pictures"]  # kinds of LLaVA rows: how many pictures they have

# ---------------------------------------------------------------------------------------------------------------------
# LLaVA conversations


def read_conversation(record: dict) -> tuple[list, list]:
    """LLaVA's format, by the original's rules. -> (turns [(role, content)], names or bytes of the pictures)

    Pictures without any <image> go in front; the original would train on the text alone, as if it had seen none.
    Raises: InputError where the record is not a conversation that can be trained on.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise InputError('no list "conversations"')
    if record.get("images") and not record.get("image"):
        raise InputError('"images": the key is "image", for several pictures too')
    pictures = record.get("image") or []
    pictures = pictures if isinstance(pictures, list) else [pictures]
    if record.get("video") is not None:
        raise InputError("video is not supported")
    turns = []
    for turn in record["conversations"]:
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(text, str) or not isinstance(role, str):
            raise InputError("a turn without from/value or role/content")
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if not turns and role != "user":
            continue  # a leading turn that is not the user's is dropped, as in the original
        if role != ("user", "assistant")[len(turns) % 2]:
            raise InputError(f"turn {len(turns) + 1} is from {role!r}: user and assistant must take turns")
        if text.count("<image>") == 1 and not text.startswith("<image>"):
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        content = [IMAGE_TOKEN if piece == "<image>" else piece for piece in re.split("(<image>)", text) if piece]
        turns.append((role, content))
    if len(turns) < 2 or len(turns) % 2:
        raise InputError("no question and answer" if len(turns) < 2 else "the last question has no answer")
    if any(role == "assistant" and IMAGE_TOKEN in content for role, content in turns):
        raise InputError("<image> in an answer")
    placed = sum(content.count(IMAGE_TOKEN) for _, content in turns)
    if placed == 0 and pictures:  # nobody said where: in front
        turns[0] = ("user", cli.user_content("".join(turns[0][1]), len(pictures)))
    elif placed != len(pictures):
        raise InputError(f"{placed} <image> in the text, {len(pictures)} pictures")
    return turns, pictures


def llava_mask(ids: list, answer: list, tokenizer) -> list:
    """The original's labels (template qwen_1_5): answers with their header, and every start, end and newline token."""
    start, end = tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")
    always = {start, end, *tokenizer.encode("\n")}
    mask = [token in always for token in ids]
    bounds = [i for i, token in enumerate(ids) if token == start] + [len(ids)]
    for a, b in zip(bounds, bounds[1:]):
        if any(answer[a:b]):
            mask[a:b] = [True] * (b - a)
    return mask


def llava_items(file: Path) -> list:
    """-> [(where, raw record)]; a line of JSONL is decoded when its shard is written."""
    if file.suffix.lower() == ".jsonl":
        lines = enumerate(file.read_bytes().split(b"\n"), 1)
        return [(f"{file.name}:{n}", line) for n, line in lines if line.strip()]
    return [(f"{file.name} row {n}", record) for n, record in enumerate(cli.read_json(file, kind=list), 1)]


def llava_row(raw, folder) -> dict:
    turns, names = read_conversation(json.loads(raw) if isinstance(raw, bytes) else raw)
    pictures = []
    for name in names:
        try:
            pictures.append((folder / name).read_bytes())
        except (OSError, TypeError, ValueError) as e:
            raise InputError(f"picture {name!r:.200}: {cli.first_line(e)}") from e
    return {"turns": turns, "pictures": pictures, "drawn": False, "kind": PICTURES[min(len(pictures), 2)]}


# ---------------------------------------------------------------------------------------------------------------------
# lmms-lab/LLaVA-OneVision-Data: a folder per subset, parquet files with id, image, conversations, data_source

HUB = "lmms-lab/LLaVA-OneVision-Data"
# The single-image stage's five groups: share of the samples (LLaVA-OneVision's own mixture: CLI's paper gives no
# numbers), and the subsets, by their name in lower case as far as the first bracket.
GROUPS = {
    "general": (0.361, """allava_instruct_laion4v allava_instruct_vflan4v aokvqa cambrian clevr hateful_memes iconqa
        image_textualization llava_wild lrv_normal sharegpt4o sharegpt4v scienceqa st_vqa tallyqa vision_flan visual7w
        vistext vizwiz vqarad vsr websight"""),
    "doc": (0.206, """ai2d chart2text chartqa diagram_image_to_text dvqa figureqa hitab infographic infographic_vqa
        infographic_vqa_llava_format lrv_chart robut_sqa robut_wikisql robut_wtq screen2words tqa ureader_cap ureader_ie
        ureader_kg ureader_qa visualmrc"""),
    "math": (0.201, """clevr-math geo170k geo3k geometry3k geomverse geoqa+ geos intergps mapqa mathqa multihiertt
        mavis_math_metagen mavis_math_rule_geo pmc-vqa raven super-clevr tabmwp unigeo"""),
    "ocr": (0.089, "chrome_writting hme100k iam iiit5k k12_printing rendered_text textcaps textocr"),
    "text": (0.143, "magpie_pro"),
}


def group_of(subset: str) -> str:
    base = subset.split("(")[0].lower()
    return next((group for group, (_, names) in GROUPS.items() if base in names.split()), "other")


def share_out(total: int, weights) -> list:
    """Whole numbers in proportion to the weights, which add up to the total."""
    ends = np.rint(np.cumsum(weights) / max(1e-9, sum(weights)) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def reach(what: str, call, *args, **kwargs):
    """A call to the hub or to a file of it, with one line for whatever goes wrong: a network fails in too many ways."""
    try:
        return call(*args, **kwargs)
    except Exception as e:
        raise InputError(f"{what} cannot be read ({type(e).__name__}: {cli.first_line(e)})") from e


def onevision_items(args):
    """-> (items [(subset, file, row)] in reading order, function file -> a path on this machine)"""
    if args.source:
        if not args.source.is_dir():
            raise InputError(f"--from {args.source}: no such folder")
        names = [path.relative_to(args.source).as_posix() for path in args.source.rglob("*.parquet")]
        fetch = look = args.source.joinpath
    else:
        from huggingface_hub import HfApi, HfFileSystem, hf_hub_download

        there = f"{HUB} (--from DIR takes a copy)"
        at = reach(there, HfApi().dataset_info, HUB).sha  # one state in a run, no request for files that are here
        names = reach(there, HfApi().list_repo_files, HUB, repo_type="dataset", revision=at)
        fetch = functools.partial(hf_hub_download, HUB, repo_type="dataset", revision=at)

        def look(file):  # of a file that is only counted, nothing but the footer is fetched
            return HfFileSystem().open(f"datasets/{HUB}@{at}/{file}")

    files = {}  # subset -> its files
    for name in sorted(n for n in names if n.endswith(".parquet") and "/" in n):
        files.setdefault(name.split("/")[-2], []).append(name)
    if args.source and not files:
        raise InputError(f"--from {args.source}: expected SUBSET/*.parquet in it, as the hub has them")
    if unknown := set(args.subset or ()) - set(files):
        raise InputError(f"no subset {', '.join(sorted(unknown))}; there are: {', '.join(files) or 'none'}")
    groups = args.group or ([] if args.subset else GROUPS)
    wanted = [s for s in files if s in (args.subset or ()) or group_of(s) in groups]
    if left := [] if args.subset or args.group else sorted(set(files) - set(wanted)):
        print(f"in no group, so left out unless --subset names them: {', '.join(left)}", file=sys.stderr)
    todo = [file for subset in wanted for file in files[subset]]
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda file: open_parquet(file, look).metadata.num_rows, todo)
        count = dict(zip(todo, tqdm(rows, desc="counting rows", unit="file", total=len(todo))))
    sizes = {}  # group -> {subset: rows}
    for subset in sorted(wanted):
        sizes.setdefault(group_of(subset), {})[subset] = sum(count[file] for file in files[subset])
    items = []
    quotas = share_out(args.samples or 0, [GROUPS.get(group, (0.2,))[0] for group in sizes])
    for (group, subsets), quota in zip(sizes.items(), quotas):
        rows = sum(subsets.values())
        quota = rows if args.samples is None else min(quota, rows)
        print(f"{group}: {quota} of {rows} rows, {len(subsets)} subsets", file=sys.stderr)
        for subset, need in zip(subsets, share_out(quota, list(subsets.values()))):
            rng = random.Random(f"{args.seed}/{subset}")
            for file in rng.sample(files[subset], len(files[subset])):  # one file after the other: few are downloaded
                take = min(need, count[file])
                items += [(subset, file, row) for row in rng.sample(range(count[file]), take)]
                need -= take
    return sorted(items), fetch


def open_parquet(file: str, place):
    """place: function file -> its path here, or an open file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise InputError("onevision reads parquet files: pip install pyarrow") from e
    return reach(file, lambda: ParquetFile(place(file)))


def onevision_rows(items: list, fetch):
    """Reads only the row groups that hold a wanted row. -> iterator of (where, raw record)"""
    for file in sorted({file for _, file, _ in items}):
        wanted = {row: subset for subset, name, row in items if name == file}
        table, start = open_parquet(file, fetch), 0
        for g in range(table.num_row_groups):
            rows = range(start, start := start + table.metadata.row_group(g).num_rows)
            here = [row for row in rows if row in wanted]
            if here:
                records = reach(file, table.read_row_group, g).take([row - rows.start for row in here]).to_pylist()
                for row, record in zip(here, records):
                    yield f"{file} row {row + 1}", record | {"subset": wanted[row]}


def onevision_row(record: dict) -> dict:
    image = record.get("image")
    image = image.get("bytes") or b"" if isinstance(image, dict) else image
    turns, pictures = read_conversation(record | {"image": image})
    if image == b"" or not all(isinstance(picture, bytes) for picture in pictures):
        raise InputError("a picture without bytes")
    return {"turns": turns, "pictures": pictures, "drawn": False, "kind": record["subset"]}


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def encode_row(row: dict, tokenizer, template: str, labels: str):
    """-> (token ids, marks as in the shards, sizes of the pictures); checks what train.py relies on."""
    sizes = []
    for n, picture in enumerate(row["pictures"], 1):
        try:
            sizes.append(recipe_size(picture) if row["drawn"] else cli.load_image(picture).size)
        except InputError as e:
            raise InputError(f"picture {n}: {e}") from e
    if not any(role == "assistant" and "".join(content).strip() for role, content in row["turns"]):
        raise InputError("no answer to learn from")
    ids, answer = cli.encode_chat(tokenizer, template, row["turns"])
    mask = llava_mask(ids, answer, tokenizer) if labels == "llava" else answer
    return ids, [1 if a else 2 * m for a, m in zip(answer, mask)], sizes


def write_shard(path: Path, rows, make, kinds: list, encode, bar) -> None:
    """rows: iterator of (where, raw record). The file appears under its name only when it is whole."""
    def read(item):
        where, raw = item
        try:
            row = make(raw)
            return (*encode(row), row["pictures"], row["kind"])
        except (ValueError, RecursionError) as e:  # InputError and broken JSON
            return {"where": where, "reason": str(e)}

    good, bad = [], []
    threads = ThreadPoolExecutor()  # decoding pictures takes most of the time, and runs beside Python
    try:
        for found in threads.map(read, rows):
            bar.update()
            (bad if isinstance(found, dict) else good).append(found)
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C not the whole shard first
    ids, answer, sizes, row_pictures, row_kinds = zip(*good) if good else [()] * 5
    pictures, count = [*chain(*row_pictures)], Counter(row_kinds)

    def offsets(parts):
        return np.cumsum([0, *map(len, parts)], dtype=np.int64)

    tensors = {
        "tokens": np.array([*chain(*ids)], np.int32),
        "answer": np.array([*chain(*answer)], np.uint8),
        "row_offsets": offsets(ids),
        "pictures": np.frombuffer(b"".join(pictures), np.uint8),
        "picture_offsets": offsets(pictures),
        "picture_sizes": np.array([*chain(*sizes)], np.int32).reshape(-1, 2),
        "row_pictures": offsets(row_pictures),
        "kind": np.array([kinds.index(kind) for kind in row_kinds], np.int16),
    }
    facts = {"rows": len(good), "tokens": len(tensors["tokens"]),
             "supervised_tokens": int(np.count_nonzero(tensors["answer"])),
             "pictures": len(pictures), "kinds": {k: count[k] for k in kinds if count[k]}, "bad": bad}
    cli.write_whole(path, lambda temporary: save_file(tensors, temporary, {"shard": json.dumps(facts)}))


def build(args, source: dict, tokenizer_json: str, splits: dict, kinds: list, rows_of, make) -> None:
    """splits: {name: its rows}; rows_of(split, shard, a piece of them) -> iterator of (where, raw record)."""
    folder, planned = args.out or Path("data") / source["name"], {split: len(rows) for split, rows in splits.items()}
    total = sum(planned.values())
    if total == 0:
        raise InputError(f"no rows in {source['name']}")
    if args.labels == "llava" and args.template != "qwen_1_5":
        raise InputError("--labels llava is the mask of template qwen_1_5")
    tokenizer = cli.Tokenizer(tokenizer_json)
    try:
        cli.encode_chat(tokenizer, args.template, [("user", "?"), ("assistant", "!")])
    except InputError as e:
        raise InputError(f"{e}, which template {args.template} needs (--template, --tokenizer)") from e
    encode = functools.partial(encode_row, tokenizer=tokenizer, template=args.template, labels=args.labels)
    arguments = {
        "format": FORMAT, "command": args.command, "source": source, "seed": args.seed, "template": args.template,
        "labels": args.labels, "shard_rows": args.shard_rows, "rows_planned": planned,
        "tokenizer_sha256": sha256(tokenizer_json.encode()),
    }
    prepare_folder(folder, arguments, args.overwrite)
    cli.write_text(folder / "tokenizer.json", tokenizer_json)

    manifest, bad = {"name": folder.name, **arguments, "kinds": kinds, "splits": {}}, []
    with tqdm(total=total, unit="row", desc=folder.name) as bar:
        for split, rows in splits.items():
            shards = []
            for number, first in enumerate(range(0, len(rows), args.shard_rows)):
                path, some = folder / f"{split}-{number:05d}.safetensors", rows[first : first + args.shard_rows]
                facts = shard_facts(path)
                if facts and not (facts["bad"] and args.command == "llava"):
                    bar.update(len(some))
                else:
                    write_shard(path, rows_of(split, number, some), make, kinds, encode, bar)
                    facts = shard_facts(path)
                for row in facts["bad"][: max(0, 20 - len(bad))]:
                    bar.write(f"left out: {row['where']}: {row['reason']}", file=sys.stderr)
                new = facts.pop("bad")
                bad += new
                shards.append({"file": path.name, **facts})
                if new:
                    cli.write_text(folder / "bad_rows.jsonl", cli.json_lines(bad))
                if len(bad) > args.max_bad * total:
                    raise InputError(
                        f"{len(bad)} of {total} rows are bad, more than --max-bad {args.max_bad:g} allows; the first: "
                        f"{bad[0]['where']}: {bad[0]['reason']}; all of them: {folder / 'bad_rows.jsonl'}"
                    )
            facts = {key: sum(s[key] for s in shards) for key in ("rows", "tokens", "supervised_tokens", "pictures")}
            by_kind = sum((Counter(s["kinds"]) for s in shards), Counter())
            facts["kinds"] = {kind: by_kind[kind] for kind in kinds if by_kind[kind]}
            manifest["splits"][split] = facts | {"shards": shards}
    manifest["bad_rows"] = len(bad)
    cli.write_text(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    for split, facts in manifest["splits"].items():
        print(f"{split}: {facts['rows']} rows, {facts['tokens']} tokens, {facts['supervised_tokens']} supervised")
    print(f"{folder / 'manifest.json'}: done, {len(bad)} bad rows left out")


def shard_facts(path: Path) -> dict:
    """What write_shard noted in a shard's header; empty where there is no shard, or a damaged one."""
    try:
        with safe_open(path, "np") as shard:
            return json.loads(shard.metadata()["shard"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return {}


def prepare_folder(folder: Path, arguments: dict, overwrite: bool) -> None:
    """Make the folder, or take up the work in it if it was begun with the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, left = folder / "arguments.json", set(folder.glob(".*.[0-9]*.tmp"))  # by a run that was killed as it wrote
    if set(folder.iterdir()) - left and not begun.exists():
        raise InputError(f"{folder} holds files that prepare_data.py did not make: use another --out")
    old = [folder / "manifest.json", folder / "bad_rows.jsonl", *left]  # until all is whole again
    if overwrite:
        old += folder.glob("*-?????.safetensors")
    elif cli.read_json(begun, arguments) != arguments:
        raise InputError(f"{folder} holds something made with other arguments: use another --out, or --overwrite")
    for path in old:
        path.unlink(missing_ok=True)
    cli.write_text(begun, json.dumps(arguments, indent=1, ensure_ascii=False))


def read_tokenizer(source) -> str:
    """A tokenizer.json, a folder with one, or a hub id (None: the bundled model's) -> its text."""
    path = Path(source) if source else Path(__file__).resolve().parent / "assets/nano"
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if not path.exists() and path.suffix != ".json" and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, "tokenizer.json"))
        return cli.Tokenizer(path.read_bytes().decode()).json
    except Exception as e:  # the libraries have errors of their own, down to bare Exception
        raise InputError(f"{path}: no usable tokenizer.json: {cli.first_line(e)}") from e


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hold_out(seed: int, items: list, n: int) -> dict:
    """-> {"train": items, "val": n of them taken out}, each in the old order"""
    if n and len(items) <= n:
        raise InputError(f"--val {n}: there are only {len(items)} rows")
    chosen = set(random.Random(seed).sample(range(len(items)), n))
    splits = {"train": [item for i, item in enumerate(items) if i not in chosen]}
    return splits | ({"val": [item for i, item in enumerate(items) if i in chosen]} if n else {})


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def emoji_command(args) -> None:
    if 0 < args.per_kind < 12 or args.vocabulary < 259:
        raise InputError("--per-kind N: 0 or at least 12, else nothing unseen is left to ask about; --vocabulary N: at "
                         "least 259, the bytes and three special tokens")
    pools = emoji_pools(args.seed, args.per_kind)
    unseen = [pools["concept"], pools["dev_concept"]]
    asked = [pool[tags] for pool in unseen for tags in ("tags", "tags_zh")]
    asked += [pools[part]["country"] for part in ("pair", "dev_pair")]
    beside = [others for pool in unseen for others, _ in pool["count"].values()]
    if not all(asked) or min(map(len, beside)) < 9:  # as many as a scene has at most
        raise InputError(f"--per-kind {args.per_kind} with --seed {args.seed} leaves too little to ask about that is "
                         "unseen: take more, or another seed")
    splits = {"encode": args.encode, "pretrain": args.pretrain, "train": args.train}
    splits |= dict.fromkeys([*VALIDATION, "dev"], args.val)
    splits = {split: range(n) for split, n in splits.items() if n}

    def rows_of(split, shard, numbers):
        rng = random.Random(f"{args.seed}/{split}/{shard}")
        return ((f"{split} row {n}", emoji_row(rng, args.seed, pools, split, n)) for n in numbers)

    def texts():  # what the tokenizer learns from: training questions, and every training name twenty times
        rng = random.Random(f"{args.seed}/tokenizer")
        yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 1000
        for n in range(20_000):
            for _, content in emoji_row(rng, args.seed, pools, "train", n)["turns"]:
                yield content if isinstance(content, str) else content[-1]
        fields = ("name", "zh", "country", "country_zh", "kind", "kind_zh")
        for concept in pools["train"]["things"] + pools["train"]["country"]:
            yield from [concept.get(field) or "" for field in fields] * 20

    tokenizer_json = read_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(texts(), args.vocabulary)
    files = sorted(path for path in EMOJI.iterdir() if path.suffix in (".json", ".webp"))
    source = {"name": "emoji", "sha256": {path.name: sha256(path.read_bytes()) for path in files}}
    if args.tokenizer:  # else one is trained, and tells what it was trained on
        source["per_kind"] = args.per_kind
    kinds = ["naming", *(kind + "-zh" * zh for kind in QUESTIONS for zh in (0, 1) if QUESTIONS[kind][1 + zh])]
    build(args, source, tokenizer_json, splits, kinds, rows_of, lambda row: {**row, "drawn": True})


def llava_command(args) -> None:
    splits = hold_out(args.seed, llava_items(args.file), args.val)
    source = {"name": args.file.stem, "file": args.file.name, "sha256": sha256(args.file.read_bytes()), "val": args.val}
    make = functools.partial(llava_row, folder=args.images or args.file.parent)
    build(args, source, read_tokenizer(args.tokenizer), splits, PICTURES, lambda split, shard, items: items, make)


def onevision_command(args) -> None:
    tokenizer_json = read_tokenizer(args.tokenizer)
    items, fetch = onevision_items(args)
    splits = hold_out(args.seed, items, args.val)
    source = {"name": "onevision", "from": HUB, "samples": args.samples, "groups": args.group, "subsets": args.subset,
              "rows_sha256": sha256(repr(items).encode()), "val": args.val}
    kinds = sorted({subset for subset, _, _ in items})
    build(args, source, tokenizer_json, splits, kinds, lambda split, shard, items: onevision_rows(items, fetch),
          onevision_row)


def main(argv=None) -> None:
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help, tokenizer, val, shard_rows):
        new = commands.add_parser(name, help=help)
        new.set_defaults(run=run, template="qwen_1_5", labels="answer")
        add = new.add_argument
        add("--out", type=Path, help="folder to write (default: data/emoji, data/onevision, or data/ the file's name)")
        add("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
        add("--overwrite", action="store_true", help="make everything in that folder anew")
        add("--max-bad", type=float, default=0.01, help="share of rows that may be bad (default: %(default)s)")
        add("--tokenizer", help=f"tokenizer.json, a folder with one, or a hub id (default: {tokenizer})")
        add("--val", type=int, default=val, help="rows of every validation split (default: %(default)s)")
        add("--shard-rows", type=int, default=shard_rows, help="rows per shard (default: %(default)s)")
        if name != "emoji":
            add("--template", choices=list(cli.TEMPLATES), help="of the prompt (default: qwen_1_5)")
            add("--labels", choices=("answer", "llava"),
                help="supervise answers and their end marks, or what LLaVA did (default: answer)")
        return add

    add = command("emoji", emoji_command, "questions about the bundled drawings", "one is trained", 2500, 10_000)
    add("--per-kind", type=int, default=16, help="concepts of each kind, the plainest names first; 0: all, for longer "
        "training (default: %(default)s)")
    add("--encode", type=int, default=200_000, help="rows that name one thing (default: %(default)s)")
    add("--pretrain", type=int, default=80_000, help="rows that name one thing or four (default: %(default)s)")
    add("--train", type=int, default=100_000, help="rows of all kinds (default: %(default)s)")
    add("--vocabulary", type=int, default=2048, help="of the tokenizer that is trained (default: %(default)s)")
    bundled = "the bundled nano model's"
    add = command("llava", llava_command, "LLaVA conversations, JSON or JSONL", bundled, 0, 1000)
    add("file", type=Path, help="a list of {image, conversations}, or one such record a line (.jsonl)")
    add("--images", type=Path, help="where the pictures' names start (default: the file's folder)")
    add = command("onevision", onevision_command, f"{HUB}, from the hub (needs pyarrow)", bundled, 0, 1000)
    add("--subset", action="append", help="only this subset; may be repeated, beside --group too")
    add("--group", action="append", choices=list(GROUPS), help="only this group; may be repeated")
    add("--samples", type=int, help="rows in all, shared out over the groups as far as they go (default: all)")
    add("--from", type=Path, dest="source", metavar="DIR", help="a local copy: DIR/SUBSET/*.parquet")
    args = parser.parse_args(argv)
    numbers = [value for name, value in vars(args).items() if isinstance(value, (int, float)) and name != "seed"]
    if args.shard_rows < 1 or not all(0 <= number < 2**31 for number in numbers):  # nan neither
        raise InputError("numbers of rows and --max-bad go from 0 to 2**31 - 1, and a shard has at least one row")
    args.run(args)


if __name__ == "__main__":
    cli.run_program(main)
