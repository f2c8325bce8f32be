"""Build assets/emoji: one concept, several artists.

Reads four npm packages (named in assets/emoji/LICENSES.md) from a node_modules folder and writes one WebP sheet per
artist, 64 pixels a cell, and emoji.json: a record per concept with its names, tags, group and each artist's cell.

    npm install emoji-datasource-google@16 emoji-datasource-twitter@16 @lobehub/fluent-emoji-3d@1.1 emojibase-data@17
    python experiments/build_emoji.py node_modules

What is chosen, and why:
* concepts that all three artists drew, without skin tone and without the man / woman doubles of a person;
* country flags by Noto and Twemoji only: the flags in the Fluent package are Noto's own drawings, copied;
* no drawing that stands for two concepts (Norway and Svalbard share a flag): a name must be decidable;
* no "small" or "medium" shapes: a picture is drawn at a random size, so their names would not be decidable either;
* three skin tones of the hands and of some persons.
"""

import argparse
import json
import re
from pathlib import Path

from PIL import Image

CELL, COLUMNS = 64, 40
ARTISTS = ("noto", "twemoji", "fluent")
TONES = {1: ("light", "浅色"), 3: ("medium", "中等"), 5: ("dark", "深色")}  # emojibase's numbers of the tones we keep
# Where several concepts share one drawing, this one keeps it.
KEEPS_SHARED = {"flag: france", "flag: spain", "flag: norway", "flag: united states", "flag: australia"}

# "What kind of thing is it?" for a small model: Unicode's 99 subgroups are too fine, its 9 groups too coarse.
KINDS = {
    ("face", "表情"): "face-affection face-concerned face-costume face-glasses face-hand face-hat face-negative "
    "face-neutral-skeptical face-sleepy face-smiling face-tongue face-unwell cat-face monkey-face",
    ("heart", "爱心"): "heart",
    ("hand", "手"): "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands hand-prop",
    ("body part", "身体部位"): "body-parts",
    ("person", "人"): "person person-gesture person-role person-fantasy person-activity person-sport person-resting",
    ("mammal", "哺乳动物"): "animal-mammal",
    ("bird", "鸟"): "animal-bird",
    ("reptile", "爬行动物"): "animal-reptile",
    ("sea animal", "海洋动物"): "animal-marine",
    ("bug", "虫子"): "animal-bug",
    ("flower", "花"): "plant-flower",
    ("plant", "植物"): "plant-other",
    ("fruit", "水果"): "food-fruit",
    ("vegetable", "蔬菜"): "food-vegetable",
    ("dish", "菜肴"): "food-prepared food-asian",
    ("sweet", "甜点"): "food-sweet",
    ("drink", "饮料"): "drink",
    ("building", "建筑"): "place-building place-religious",
    ("place", "地方"): "place-other place-geographic place-map",
    ("vehicle", "交通工具"): "transport-ground transport-air transport-water",
    ("clock", "钟表"): "time",
    ("weather", "天气"): "sky&weather",
    ("celebration", "节日"): "event",
    ("sport", "运动"): "sport",
    ("game", "游戏"): "game",
    ("clothing", "服饰"): "clothing",
    ("music", "音乐"): "music musical-instrument sound",
    ("electronics", "电器"): "phone computer light&video",
    ("paper", "文具"): "book-paper office mail writing",
    ("money", "钱"): "money",
    ("medicine or science", "医学或科学"): "medical science",
    ("tool", "工具"): "tool lock",
    ("household item", "家居用品"): "household dishware",
    ("arrow", "箭头"): "arrow",
    ("zodiac sign", "星座"): "zodiac",
    ("shape", "形状"): "geometric",
    ("text", "文字"): "alphanum keycap",
    ("sign", "标志"): "transport-sign warning religion other-symbol punctuation math gender currency av-symbol",
    ("flag", "旗帜"): "country-flag flag",
}
# Their subgroup says otherwise, but few people would: these have no kind.
KINDLESS = set("""bus stop|motorway|railway track|oil drum|fuel pump|wheel|police car light|horizontal traffic light|
vertical traffic light|stop sign|construction|anchor|ring buoy|parachute|seat|roller skate|skateboard|station|satellite|
paw prints|spider web|microbe|feather|wing|coral|spiral shell|barber pole|people with bunny ears|people wrestling|
water pistol|thermometer""".replace("\n", "").split("|"))
FILLER = {"ily", "not", "no", "up", "mark", "open", "fairytale", "tale", "ornithology"}  # tags without use here
KIND_OF = {subgroup: kind for kind, subgroups in KINDS.items() for subgroup in subgroups.split()}


def code(hexcode: str) -> str:
    """One spelling for a code point sequence: the packages disagree about case and the optional FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def clean(text: str) -> str:
    text = text.lower().replace("’", "'").replace("⊛ ", "")
    return re.sub(r"[“”\"]", "", text).strip()


def read_packages(modules: Path):
    """-> base records of the image packages, labels {language: {code: record}}, files {artist: {code: path}}"""
    source = json.loads((modules / "emoji-datasource-google/emoji.json").read_text(encoding="utf-8"))
    labels = {}
    for language in ("en", "zh"):
        records = json.loads((modules / f"emojibase-data/{language}/data.json").read_text(encoding="utf-8"))
        labels[language] = {code(r["hexcode"]): r for record in records for r in [record, *record.get("skins", [])]}
    folders = {
        "noto": modules / "emoji-datasource-google/img/google/64",
        "twemoji": modules / "emoji-datasource-twitter/img/twitter/64",
        "fluent": modules / "@lobehub/fluent-emoji-3d/assets",
    }
    files = {artist: {code(p.stem): p for p in sorted(folder.iterdir())} for artist, folder in folders.items()}
    return source, labels, files


def choose(source: list, labels: dict, files: dict, n_toned: int) -> list[dict]:
    """The records of emoji.json, without the cells."""
    chosen, toned, seen_zh = [], [], set()
    for record in sorted(source, key=lambda r: r["sort_order"]):
        key, subgroup = code(record["unified"]), record["subcategory"].replace(" ", "")
        en, zh = labels["en"].get(key), labels["zh"].get(key)
        flag = subgroup == "country-flag"
        artists = [a for a in ARTISTS if key in files[a] and not (flag and a == "fluent")]
        if en is None or zh is None or len(artists) < (2 if flag else 3) or record["category"] == "Component":
            continue
        name, name_zh = clean(en["label"]), clean(zh["label"])
        double = "gender" in en or ("-200d-" in key and (subgroup == "family" or re.match(r"(wo)?m[ae]n\b", name)))
        if double or re.search(r"\b(small|medium)\b", name):
            continue
        kind, kind_zh = (None, None) if name in KINDLESS else KIND_OF.get(subgroup, (None, None))
        out = {"id": key, "name": name, "zh": None if name_zh in seen_zh else name_zh}
        seen_zh.add(name_zh)
        out |= {"group": record["category"], "subgroup": subgroup, "kind": kind, "kind_zh": kind_zh}
        if flag:
            out |= {"country": name.removeprefix("flag: "), "country_zh": re.sub("^旗[:：] *", "", name_zh)}
            out["zh"] = None
        # U+1F550..1F55B: one to twelve o'clock, 1F55C..1F567: half past
        if re.fullmatch("1f5[56][0-9a-f]", key) and (nth := int(key, 16) - 0x1F550) < 24:
            out["clock"] = f"{nth % 12 + 1}:{'00' if nth < 12 else '30'}"
        for language, field in (("en", "tags"), ("zh", "tags_zh")):
            tags = (clean(t) for t in labels[language][key].get("tags", []))
            pattern = r"[a-z][a-z' -]+" if language == "en" else r"[\u4e00-\u9fff]{1,6}"
            out[field] = sorted({t for t in tags if re.fullmatch(pattern, t)} - FILLER)
        chosen.append(out | {"artists": artists})
        if kind in ("hand", "person", "body part"):  # "1F44B" -> "1F44B-1F3FB" and so on, where all three drew it
            skins = {r["tone"]: code(r["hexcode"]) for r in en.get("skins", []) if isinstance(r.get("tone"), int)}
            if all(t in skins and all(skins[t] in files[a] for a in ARTISTS) for t in TONES):
                toned.append((out, skins))
    toned.sort(key=lambda item: item[0]["kind"] != "hand")  # hands first: there is more skin to see
    for base, skins in toned[:n_toned]:
        for tone, (tone_en, tone_zh) in TONES.items():
            chosen.append(base | {"id": skins[tone], "base": base["id"], "name": f"{base['name']}: {tone_en} skin tone",
                                  "zh": None, "tone": tone_en, "tone_zh": tone_zh, "artists": list(ARTISTS)})
    return drop_shared_drawings(chosen, files)


def drop_shared_drawings(chosen: list[dict], files: dict) -> list[dict]:
    owner = {}  # (artist, pixels) -> records drawn so
    for record in chosen:
        for artist in record["artists"]:
            owner.setdefault((artist, drawing(files[artist][record["id"]]).tobytes()), []).append(record)
    dropped = set()
    for records in owner.values():
        if len(records) > 1:
            keep = [r["id"] for r in records if r["name"] in KEEPS_SHARED][:1]
            dropped |= {r["id"] for r in records if r["id"] not in keep}
    return [r for r in chosen if r["id"] not in dropped]


def drawing(path: Path) -> Image.Image:
    """The file as one transparent 64 x 64 cell; a drawing that is not square keeps its shape."""
    image = Image.open(path).convert("RGBA")
    image = image.resize([round(s * CELL / max(image.size)) for s in image.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", type=Path, help="the node_modules folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "assets/emoji")
    parser.add_argument("--quality", type=int, default=80, help="of the lossy WebP (default: %(default)s)")
    parser.add_argument("--toned", type=int, default=50, help="concepts with skin tones (default: %(default)s)")
    args = parser.parse_args()

    source, labels, files = read_packages(args.modules)
    records = choose(source, labels, files, args.toned)
    names = [r["name"] for r in records]
    if missing := KINDLESS - set(names):
        raise SystemExit(f"in KINDLESS but not in the packages: {sorted(missing)}")
    if len(set(names)) < len(names):
        raise SystemExit(f"names are not unique: {sorted(n for n in set(names) if names.count(n) > 1)}")

    args.out.mkdir(parents=True, exist_ok=True)
    cells = {}
    for artist in ARTISTS:
        ids = [r["id"] for r in records if artist in r["artists"]]
        sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(ids) // COLUMNS) * CELL))
        for n, key in enumerate(ids):
            cells[artist, key] = n
            sheet.paste(drawing(files[artist][key]), (n % COLUMNS * CELL, n // COLUMNS * CELL))
        sheet.save(args.out / f"{artist}.webp", quality=args.quality, method=6)
    for r in records:
        r["artists"] = {a: cells[a, r["id"]] for a in r["artists"]}
    head = {"cell": CELL, "columns": COLUMNS, "sheets": {a: f"{a}.webp" for a in ARTISTS}}
    lines = ",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in records)
    text = json.dumps(head)[:-1] + ', "concepts": [\n' + lines + "\n]}\n"
    (args.out / "emoji.json").write_text(text, encoding="utf-8")
    size = sum(p.stat().st_size for p in args.out.iterdir())
    print(f"{len(records)} concepts, {len(cells)} drawings, {size / 1e6:.2f} MB in {args.out.name}/")


if __name__ == "__main__":
    main()
