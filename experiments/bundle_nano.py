"""Put a trained nano model into assets/nano: bfloat16 weights, and beside them the log and settings of every stage.

    python experiments/bundle_nano.py out/nano
    python train.py --evaluate assets/nano --blind_model out/nano/blind --readme README.md
"""
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from cli import CLI, Parser, read_json, run_program, write_text  # noqa: E402


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that train.py wrote, with encode, pretrain and tune in it")
    run, out = parser.parse_args().run, HERE / "assets/nano"
    stages = {name: read_json(run / name / "train.json") for name in ("encode", "pretrain", "tune")}
    log = "".join(json.dumps({"stage": name, **json.loads(line)}) + "\n"
                  for name in stages for line in (run / name / "log.jsonl").read_text().splitlines())
    CLI.from_pretrained(run / "tune", quiet=True).save_pretrained(out, dtype=torch.bfloat16)
    (out / "eval.json").unlink(missing_ok=True)  # of the model before
    write_text(out / "train.json", json.dumps(stages, indent=1) + "\n")
    write_text(out / "log.jsonl", log)
    print(f"{out}: {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_program(main)
