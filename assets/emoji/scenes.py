"""The emoji corpus: real drawings of the same concepts by several artists, and questions about them.

Names tell neither the artist nor the background, so a vision encoder that learns to name things has little of either
in its last level; early levels are full of the background: the bottleneck that Cross-Layer Injection is about, small
enough for a CPU (how much of what each level holds: experiments/fusion.md).

open_picture() draws a row's picture; emoji_row() makes row n of a split; part_of() and colours_of() are the split rule.
The drawings lie beside this file (experiments/build_emoji.py made them), prepare_data.py writes the shards.
"""

import functools
import hashlib
import json
import random
import threading
from pathlib import Path

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import cli
from cli import InputError

EMOJI = Path(__file__).resolve().parent
ARTISTS = ("noto", "twemoji", "fluent")
COLOURS = {  # name: (RGB, Chinese); every cell varies its shade a little
    "red": ((215, 50, 45), "红色"), "orange": ((245, 140, 30), "橙色"), "yellow": ((250, 220, 60), "黄色"),
    "green": ((60, 165, 75), "绿色"), "cyan": ((110, 215, 225), "青色"), "blue": ((45, 95, 215), "蓝色"),
    "purple": ((130, 60, 175), "紫色"), "pink": ((250, 165, 205), "粉色"), "brown": ((125, 80, 45), "棕色"),
    "gray": ((140, 140, 140), "灰色"),
}
POSITIONS = {
    2: ("top left/左上", "top right/右上", "bottom left/左下", "bottom right/右下"),
    3: ("top left/左上", "top middle/上中", "top right/右上", "middle left/左中", "center/正中", "middle right/右中",
        "bottom left/左下", "bottom middle/下中", "bottom right/右下"),
}
COUNTED = {  # "how many ... are there?": name/Chinese -> kinds
    "animals/动物": ("mammal", "bird", "reptile", "sea animal", "bug"),
    "faces/表情": ("face",),
    "people/人": ("person",),
    "foods/食物": ("fruit", "vegetable", "dish", "sweet"),
    "vehicles/交通工具": ("vehicle",),
}
# kind of question: how often in training, phrasings in English, phrasings in Chinese (none: asked in English only)
SINGLE = {
    "name": (10, ("What is this?", "What does the picture show?", "Name the thing in the picture.", "What do you see?"),
             ("这是什么？", "图里画的是什么？", "请说出图中的东西。")),
    "kind": (8, ("What kind of thing is this?", "To which kind does this belong?", "What sort of thing is it?"),
             ("这是哪一类东西？", "这属于什么类别？")),
    "tag": (7, ("Does the tag {tag} fit?", "Is {tag} a good tag for this picture?", "Would you tag this with {tag}?"),
            ("标签{tag}合适吗？", "这张图可以用{tag}作标签吗？")),
    "artist": (8, ("Who drew this?", "Which artist drew the picture?", "Whose drawing is this?"),
               ("这是谁画的？", "作者是谁？")),
    "country": (6, ("Whose flag is this?", "Which country does this flag belong to?", "Name the country of this flag."),
                ("这是哪里的旗帜？", "这面旗属于哪个国家或地区？")),
    "clock": (3, ("What time is it?", "What time does the clock show?", "Read the clock."),
              ("现在几点？", "钟上是几点？")),
    "background": (5, ("What colour is the background?", "On what colour does it stand?", "Which colour is behind it?"),
                   ("背景是什么颜色？", "它后面是什么颜色？")),
    "tone": (3, ("Is the skin tone light, medium or dark?", "Which skin tone is it?"), ()),
}
SCENE = {
    "name_at": (9, ("What is in the {where}?", "Name the thing in the {where}.", "What does the {where} show?"),
                ("{where}是什么？", "请说出{where}的东西。")),
    "artist_at": (7, ("Who drew the thing in the {where}?", "Which artist drew the {where}?"), ("{where}是谁画的？",)),
    "by_artist": (7, ("What did {artist} draw here?", "Which thing is by {artist}?", "Name the drawing by {artist}."),
                  ("{artist}画的是什么？",)),
    "odd_artist": (5, ("Which one is by another artist?", "All but one are by the same artist: which one is not?"), ()),
    "same": (5, ("Which two show the same thing?", "Where are the two drawings of the same thing?"), ()),
    "count": (6, ("How many {things} are there?", "Count the {things}.", "How many {things} do you see?"),
              ("有几个{things}？",)),
    "background_at": (5, ("What colour is the background in the {where}?", "Which colour is behind the {where}?"),
                      ("{where}的背景是什么颜色？",)),
    "on_colour": (6, ("What is on the {colour} background?", "Which thing stands on {colour}?"),
                  ("{colour}背景上是什么？",)),
}
QUESTIONS = SINGLE | SCENE
NAMELESS = ("kind", "tag", "artist", "background", "artist_at", "odd_artist", "same", "count", "background_at")
# split: (which part of the corpus it may use, kinds of question). Parts are told apart by part_of and colours_of alone.
VALIDATION = {
    # known drawings in new pictures
    "val_seen": ("train", tuple(QUESTIONS)),
    # concepts that training never shows, so only what can be told without the name
    "val_concept": ("concept", NAMELESS),
    # known concepts by an artist whom training never shows drawing them
    "val_pair": ("pair", ("name", "country", "name_at", "on_colour")),
    # scenes of known drawings in which every concept stands on a colour that it never stands on in training
    "val_scene": ("scene", tuple(SCENE)),
}
DEV = (("train", tuple(QUESTIONS)), ("dev_concept", NAMELESS), ("dev_pair", VALIDATION["val_pair"][1]))


def unit(*key) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big") / 2**48


def part_of(seed: int, concept: dict, artist: str) -> str:
    """The split rule: the one part of the corpus in which this artist's drawing of this concept may occur.

    "concept" / "dev_concept": 10 % / 5 % of the concepts, all artists. "pair" / "dev_pair": of 30 % / 10 % of the other
    concepts, the drawing by one artist. Everything else is "train". A skin tone goes with its concept; flags are never
    held out as a concept (their question is the name of the country), clocks not at all (there are only 24).
    """
    key = concept.get("base", concept["id"])
    if "clock" in concept:
        return "train"
    u = unit(seed, "concept", key)
    if u < 0.15 and "country" not in concept:
        return "concept" if u < 0.10 else "dev_concept"
    u, artists = unit(seed, "pair", key), sorted(concept["artists"])
    if u < 0.40 and artist == artists[int(unit(seed, "artist", key) * len(artists))]:
        return "pair" if u < 0.30 else "dev_pair"
    return "train"


@functools.cache
def colours_of(seed: int, key: str, held_out: bool) -> tuple:
    """Background colours on which a concept may stand: two are kept for val_scene, eight are for everything else."""
    order = sorted(COLOURS, key=lambda colour: unit(seed, "colour", key, colour))
    return tuple(order[:2] if held_out else order[2:])


LOADING = threading.Lock()  # else the cache lets several threads decode at once


@functools.cache
def load_emoji():
    """-> emoji.json, its concepts by id, and the artists' sheets; decoded once."""
    try:
        data = json.loads((EMOJI / "emoji.json").read_text(encoding="utf-8"))
        sheets = {artist: Image.open(EMOJI / file).convert("RGBA") for artist, file in data["sheets"].items()}
    except OSError as e:
        raise InputError(f"the bundled drawings cannot be read ({e}); experiments/build_emoji.py makes them") from e
    return data, {c["id"]: c for c in data["concepts"]}, sheets


def open_picture(data: bytes) -> Image.Image:
    """The picture of a row: bytes of an image file, or a recipe to draw. -> PIL RGB"""
    if not data.startswith(b"{"):
        return cli.load_image(data)
    recipe = json.loads(data)
    with LOADING:
        emoji, concepts, sheets = load_emoji()
    side, n = emoji["cell"], recipe["grid"]
    picture = Image.new("RGB", (n * side, n * side))
    for i, (key, artist, size, x, y, _, colour) in enumerate(recipe["cells"]):
        left, top = i % n * side, i // n * side
        picture.paste("#" + colour, (left, top, left + side, top + side))
        row, column = divmod(concepts[key]["artists"][artist], emoji["columns"])
        drawing = sheets[artist].crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
        drawing = drawing.resize((size, size), Image.Resampling.BILINEAR)
        picture.paste(drawing, (left + x, top + y), drawing)
    return picture


def recipe_size(data: bytes) -> tuple:
    """(width, height) of the picture that a recipe makes."""
    return (json.loads(data)["grid"] * load_emoji()[0]["cell"],) * 2


def group(concepts: list, labels) -> dict:
    """Concepts by label, in a fixed order."""
    found = {}
    for concept in concepts:
        for label in labels(concept):
            found.setdefault(label, []).append(concept)
    return dict(sorted(found.items()))


def plainest(concepts: list, per_kind: int) -> list:
    """At most per_kind concepts of every kind (0: all), those with the fewest words in their names, three times as many
    flags, all clocks and skin tones: how many names there are decides how long a small model has to learn them."""
    kept = group(concepts, lambda c: ["flag of a country" if "country" in c else c["kind"] or "without a kind"])
    for label, members in kept.items():
        members.sort(key=lambda c: (len(c["name"].split()), c["id"]))
        some = [c for c in members if not c.keys() & {"clock", "tone"}]
        limit = per_kind * (3 if label == "flag of a country" else 1) or len(some)
        kept[label] = some[:limit] + [c for c in members if c.keys() & {"clock", "tone"}]
    return [c for members in kept.values() for c in members]


def emoji_pools(seed: int, per_kind: int = 0) -> dict:
    """-> {part: what may be drawn there}; a concept is reduced to the artists it has in that part."""
    parts = {}
    for concept in plainest(load_emoji()[0]["concepts"], per_kind):
        for artist in concept["artists"]:
            part = parts.setdefault(part_of(seed, concept, artist), {})
            part.setdefault(concept["id"], dict(concept, artists=[]))["artists"].append(artist)
    pools = {}
    for name, part in parts.items():
        things = [c for c in part.values() if not c.keys() & {"country", "clock", "tone"}]
        pools[name] = pool = {"things": things, "several": [c for c in things if len(c["artists"]) > 1]}
        pool |= {field: [c for c in part.values() if field in c] for field in ("country", "clock", "tone")}
        pool["kind"] = group(things, lambda c: [c["kind"]] if c["kind"] else [])
        # Not counted: cats that are faces, moons with a face, what has no kind (frogs): two answers could be defended.
        clear = [c for c in things if c["kind"] and ("face" not in c["name"].split() or c["kind"] == "face")]
        clear = [c for c in clear if c["subgroup"] not in ("cat-face", "monkey-face")]
        pool["count"] = {what: [[c for c in clear if (c["kind"] in kinds) == yes] for yes in (False, True)]
                         for what, kinds in COUNTED.items()}
        for field in ("tags", "tags_zh"):
            pool[field] = group(things, lambda c: c[field])
    for field in ("tags", "tags_zh"):  # only tags of at least 12 training concepts: rarer ones test memory
        known = {tag for tag, concepts in pools["train"][field].items() if len(concepts) >= 12}
        for pool in pools.values():
            pool[field] = {tag: concepts for tag, concepts in pool[field].items() if tag in known}
    return pools


def make_cell(rng: random.Random, seed: int, concept: dict, artist=None, avoid=None, held_out=False) -> list:
    """-> one cell of a recipe: [id, artist, size, x, y, colour name, colour]"""
    allowed = colours_of(seed, concept.get("base", concept["id"]), held_out)
    colour = rng.choice([c for c in allowed if c != avoid])
    shade = bytes(min(255, max(0, v + rng.randint(-16, 16))) for v in COLOURS[colour][0]).hex()
    size = rng.randint(44, 60)
    x, y = rng.randint(0, 64 - size), rng.randint(0, 64 - size)
    return [concept["id"], artist or rng.choice(concept["artists"]), size, x, y, colour, shade]


def make_recipe(cells: list) -> bytes:
    return json.dumps({"grid": round(len(cells) ** 0.5), "cells": cells}, separators=(",", ":")).encode()


def phrase(rng: random.Random, kind: str, zh: bool, put: dict) -> str:
    return rng.choice(QUESTIONS[kind][1 + zh]).format(**put)


def ask_single(rng: random.Random, seed: int, pool: dict, kind: str, zh: bool):
    """A question about one thing. -> (cells, question, answer)"""
    put, fits = {}, False
    if kind == "kind":
        target = rng.choice(pool["kind"][rng.choice(list(pool["kind"]))])
    elif kind == "tag":  # first the tag, then a fair coin: the question alone tells nothing
        tagged = pool["tags_zh" if zh else "tags"]
        put["tag"] = tag = rng.choice(list(tagged))
        fits = rng.random() < 0.5
        target = rng.choice(tagged[tag] if fits else pool["things"])
        while not fits and (target in tagged[tag] or tag in target["zh" if zh else "name"]):
            target = rng.choice(pool["things"])
    else:
        target = rng.choice(pool[kind if kind in ("country", "clock", "tone") else "things"])
    cell = make_cell(rng, seed, target)
    answers = {"name": target["zh"] if zh else target["name"], "kind": target["kind_zh" if zh else "kind"],
               "tag": (("no", "否"), ("yes", "是"))[fits][zh], "artist": cell[1], "clock": target.get("clock"),
               "country": target.get("country_zh" if zh else "country"), "tone": target.get("tone"),
               "background": COLOURS[cell[5]][1] if zh else cell[5]}
    return [cell], phrase(rng, kind, zh, put), answers[kind]


def ask_scene(rng: random.Random, seed: int, pool: dict, others: dict, kind: str, zh: bool, held_out: bool):
    """A question about a scene: what is asked about is of `pool`, the rest of `others`. -> (cells, question, answer)"""
    grid = 2 if rng.random() < 2 / 3 else 3
    positions = [p.split("/")[zh] for p in POSITIONS[grid]]
    cells, at = [None] * grid**2, rng.randrange(grid**2)  # at: the cell that the question is about
    put, taken = {"where": positions[at]}, set()

    def draw(i, concepts, artist=None, avoid=None):  # a concept that is not in the scene yet, drawn by this artist
        while True:
            concept = rng.choice(concepts)
            if concept["id"] not in taken and (artist is None or artist in concept["artists"]):
                taken.add(concept["id"])
                cells[i] = make_cell(rng, seed, concept, artist, avoid, held_out)
                return concept

    if kind == "count":
        what = rng.choice(list(COUNTED))
        put["things"], number = what.split("/")[zh], rng.randint(0, min(4, len(pool["count"][what][True])))
        for i in range(grid**2):
            draw(i, pool["count"][what][i < number])
        rng.shuffle(cells)
        return cells, phrase(rng, kind, zh, put), str(number)

    artists = rng.sample(ARTISTS, 3)
    put["artist"] = artists[0]
    drawn_by = artists[0] if kind in ("by_artist", "odd_artist", "same") else None
    target = draw(at, pool["several"] if kind == "same" else pool["things"], drawn_by)
    if kind == "same":
        twin = rng.choice([i for i in range(grid**2) if i != at])
        by = rng.choice([a for a in target["artists"] if a != artists[0]])
        cells[twin] = make_cell(rng, seed, target, by, None, held_out)
        put["where"] = " and ".join(positions[i] for i in sorted((at, twin)))
    for i in range(grid**2):
        if cells[i] is None:
            by = {"by_artist": rng.choice(artists[1:]), "odd_artist": artists[1]}.get(kind)
            draw(i, others["things"], by, avoid=cells[at][5] if kind == "on_colour" else None)
    colour = COLOURS[cells[at][5]][1] if zh else cells[at][5]
    put["colour"], name = colour, target["zh"] if zh else target["name"]
    answers = {"name_at": name, "by_artist": name, "on_colour": name, "artist_at": cells[at][1],
               "background_at": colour, "odd_artist": put["where"], "same": put["where"]}
    return cells, phrase(rng, kind, zh, put), answers[kind]


def ask_twice(rng: random.Random, seed: int, pool: dict):
    """For pre-training: some turns about one thing, its name and its kind, at times in Chinese. -> (cells, turns)"""
    what = rng.choices(("things", "country", "clock"), (87, 10, 3))[0]
    target = rng.choice(pool[what])
    kind = "name" if what == "things" else what
    turns = [(kind, False), ("kind", False)] + ([(rng.choice([kind, "kind"]), True)] if rng.random() < 0.4 else [])
    turns = [(k, zh) for k, zh in turns if k != "kind" or target["kind"]]
    rng.shuffle(turns)
    cell, fields = make_cell(rng, seed, target), {"name": ("name", "zh"), "clock": ("clock", "clock")}
    answer = [target[fields.get(k, (k, k + "_zh"))[zh]] for k, zh in turns]
    return [cell], [(phrase(rng, k, zh, {}), a) for (k, zh), a in zip(turns, answer)]


def ask_names(rng: random.Random, seed: int, pool: dict):
    """For pre-training too: a scene, and what is in four of its cells. -> (cells, turns)"""
    grid = 2 if rng.random() < 2 / 3 else 3
    concepts, turns = rng.sample(pool["things"], grid**2), []
    for at in rng.sample(range(grid**2), 4):
        zh = rng.random() < 0.2
        where = POSITIONS[grid][at].split("/")[zh]
        turns.append((phrase(rng, "name_at", zh, {"where": where}), concepts[at]["zh" if zh else "name"]))
    return [make_cell(rng, seed, concept) for concept in concepts], turns


def emoji_row(rng: random.Random, seed: int, pools: dict, split: str, number: int) -> dict:
    """Row `number` of a split: {"turns", "pictures", "kind"}. The kind of a question in Chinese ends in -zh."""
    zh, kind = False, "naming"
    if split in ("encode", "pretrain"):  # single things only, or half of them scenes
        ask = ask_names if split == "pretrain" and rng.random() < 0.5 else ask_twice
        cells, asked = ask(rng, seed, pools["train"])
    else:
        if split == "train":
            part, kind = "train", rng.choices(list(QUESTIONS), [weight for weight, _, _ in QUESTIONS.values()])[0]
            zh = bool(QUESTIONS[kind][2]) and rng.random() < 0.2
        else:  # every kind equally often, a third of it in Chinese
            parts = DEV if split == "dev" else (VALIDATION[split],)
            part, kinds = parts[number % len(parts)]
            asks = [(k, z) for k in kinds for z in (False, False, True) if QUESTIONS[k][1 + z]]
            kind, zh = asks[number // len(parts) % len(asks)]
        pool = pools["train" if part == "scene" else part]
        if kind in SINGLE:
            cells, *asked = ask_single(rng, seed, pool, kind, zh)
        else:  # a held-out drawing is asked about among training drawings
            others = pools["train"] if part.endswith("pair") else pool
            cells, *asked = ask_scene(rng, seed, pool, others, kind, zh, part == "scene")
        asked = [asked]
    turns = []
    for i, (question, answer) in enumerate(asked):
        turns += [("user", cli.user_content(question, int(i == 0))), ("assistant", answer)]
    return {"turns": turns, "pictures": [make_recipe(cells)], "kind": kind + "-zh" * zh}


def train_tokenizer(texts, vocabulary: int) -> str:
    """A small byte-level BPE with the split rule and the special tokens of Qwen2. -> tokenizer.json"""
    tokenizer = Tokenizer(models.BPE())
    rule = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rule), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 3, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer.to_str()
