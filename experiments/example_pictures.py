"""Draw the pictures that sample.py shows by default, from the validation splits: nothing in them was trained on.

    python experiments/example_pictures.py --single 444 --scene 66

A single drawing whose (thing, artist) pair is held out (val_pair), and a scene whose things stand on colours that they
never stood on in training (val_scene); by row number. Writes assets/pictures/{single,scene}.png with what they show.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from assets.emoji.scenes import load_emoji, open_picture  # noqa: E402
from cli import Config, InputError, Parser, run_program, write_text, write_whole  # noqa: E402
from train import Rows  # noqa: E402


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="data/emoji", help="what prepare_data.py emoji wrote (default: %(default)s)")
    parser.add_argument("--single", type=int, required=True, help="row of val_pair")
    parser.add_argument("--scene", type=int, required=True, help="row of val_scene")
    args = parser.parse_args()
    rows = {"single.png": ("val_pair", args.single), "scene.png": ("val_scene", args.scene)}
    splits = {split: Rows(args.data, split, Config()) for split, _ in rows.values()}
    for split, row in rows.values():
        if not 0 <= row < len(splits[split]):
            raise InputError(f"{split} has rows 0 to {len(splits[split]) - 1}, none {row}")
    out, shows, concepts = HERE / "assets/pictures", {}, load_emoji()[1]
    out.mkdir(exist_ok=True)
    for name, (split, row) in rows.items():
        (data,) = splits[split][row][2]
        picture = open_picture(data)
        write_whole(out / name, lambda path, picture=picture: picture.save(path, "PNG"))
        shows[name] = {"split": split, "row": row, "cells": [
            {"what": concepts[key]["name"], "artist": artist, "background": colour}
            for key, artist, _, _, _, colour, _ in json.loads(data)["cells"]]}
    write_text(out / "pictures.json", json.dumps(shows, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
