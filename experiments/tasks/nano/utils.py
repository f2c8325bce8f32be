"""What nano.yaml calls, and where questions.jsonl comes from.

    python prepare_data.py emoji                 makes data/emoji (the same rows whenever and wherever it is run)
    python experiments/tasks/nano/utils.py       writes questions.jsonl: every 23rd row of its validation splits

A question's picture is a recipe that assets/emoji/scenes.py draws; "row" is its number in the split.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent.parent))
from assets.emoji.scenes import VALIDATION, open_picture  # noqa: E402


def doc_to_visual(doc):
    return [open_picture(doc["picture"].encode())]


def process_results(doc, results):
    """Exact match, as train.py --evaluate scores it: over all questions, and by split."""
    right = float(results[0] == doc["answer"])
    return {"accuracy": right, doc["split"]: right}


def write_questions(path=HERE / "questions.jsonl", data="data/emoji", step=23, count=100):
    """23 and the number of kinds of question that a split goes through in turn have no common divisor."""
    import cli
    from train import Rows

    tokenizer, lines = cli.Tokenizer.from_folder(data), []
    for split in VALIDATION:
        rows = Rows(data, split, cli.Config())
        if len(rows) <= step * (count - 1):
            raise cli.InputError(f"{data}: {split} has {len(rows)} rows, fewer than {step * (count - 1) + 1}")
        for number in range(0, step * count, step):
            tokens, marks, (picture,) = rows[number]
            # the user's turn: the picture's place, "\n", the question; then <|im_end|> and what opens the answer
            first = tokens.tolist().index(cli.IMAGE_TOKEN) + 1
            text = tokenizer.backend.decode(tokens[first:].tolist(), skip_special_tokens=False)
            question, answer = text.removeprefix("\n").split("<|im_end|>")[0], tokens[marks == 1].tolist()
            lines.append({"split": split, "row": number, "kind": rows.kinds[number], "question": question,
                          "answer": tokenizer.decode(answer).strip(), "picture": picture.decode()})
    cli.write_text(path, cli.json_lines(lines))


if __name__ == "__main__":
    import cli

    cli.run_program(write_questions)
