"""What the measures that cli.py takes for speed and memory gain on this machine.

    python experiments/speedups.py --size nano              some minutes: to see that it runs
    python experiments/speedups.py --dtype bfloat16 --readme README.md

Starts from the plain form of all of them, as written out below, and then takes one more at a time, so that the last
line of the table is cli.py itself; in another order they would share the gain out otherwise. One sequence: a picture of
384 x 384 pixels (1,485 visual tokens, prepared beforehand) and 30 tokens of text, random weights, a fresh `cli` fusion,
greedy decoding; beside it a batch of 8 on caches of up to 1,500 random keys and values, as in speed.py. Every line is
measured in a process of its own, in several rounds, each of which begins with another line; the table has the median of
the rounds, the lowest and the highest. First token: the median of two, after one that is not counted. Decode: at about
1,500 cached tokens. Peak memory covers loading and all of this.

Writes speedups-SIZE-DEVICE-DTYPE.jsonl in out/speed, with --readme in experiments/results: the machine, then a line a
process as it ends. A run that was stopped starts anew.
"""
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cli  # noqa: E402
from cli import CLI, IMAGE_TOKEN, KVCache  # noqa: E402
from experiments import speed  # noqa: E402
from train import markdown, put_between_marks  # noqa: E402

FIGURES = {"load": "load, s", "prefill": "first token, s", "decode": "decode, tokens/s",
           "batch_8": "batch of 8, tokens/s", "peak": "peak memory, GiB"}


# ---------------------------------------------------------------------------------------------------------------------
# The plain forms: each puts back what cli.py would do without the measure


def copy_weights():
    """The file's tensors and a model's of its own side by side, as load_state_dict() without assign has them."""
    mapped = cli.load_file
    cli.load_file = lambda path: {name: tensor.clone() for name, tensor in mapped(path).items()}


def encode_every_crop():
    cli.count_crops = lambda size, grid: 1 + grid[0] * grid[1] if grid else 1


def attend_to_patches_fused():
    cli.CPU_BFLOAT16 = False


def project_every_route():
    """MLP(V_k) of eq. 4-5 for every pair of decoder layer and level anew."""
    def see(self, pictures, stream):
        final, pixels = self.config.vision.num_hidden_layers, torch.cat([p.crops for p in pictures])
        taps = self.vision(pixels.to(self.device, self.dtype), {final, *self.config.fusion.levels})

        class Anew(dict):
            def __missing__(_, k):
                return stream.pack(self.projector(taps[k]), self.image_newline)

        return stream.pack(self.projector(taps[final]), self.image_newline), taps, Anew()

    CLI.see = see


def pack_wide():
    """The adapters' part of eq. 5 packed in the decoder's width, as the MLP's is."""
    def forward(self, taps, projected, stream, l, levels):
        for adapter, k in zip(self[str(l)], levels):
            yield projected[k] + stream.pack(adapter.B(adapter.A(taps[k]) * (self.cfg.lora_alpha / self.cfg.lora_rank)))

    cli.AMP.forward = forward


def project_keys_and_values():
    """eq. 6-7 as they stand: nn.MultiheadAttention projects all keys and values for its one query."""
    def read(mha, query, x, mask, seqlens):
        mask, x = cli.by_sequence(mask, seqlens), cli.by_sequence(x, seqlens).transpose(0, 1)  # (B, M), (M, B, D)
        query = query.to(x.dtype).expand(1, x.shape[1], -1)
        return mha(query, x, x, key_padding_mask=~mask, need_weights=False)[0][0]

    cli.fold, cli.read = lambda mha, query: query, read


def fold_for_every_level():
    """A gate's two queries folded anew for every level of a route."""
    forward = cli.AGF.forward
    cli.AGF.forward = lambda self, v_hat, h, stream, _: forward(self, v_hat, h, stream, self.queries())


def keep_levels():
    """Vision levels that live until the answer is there."""
    see = CLI.see

    def see_and_keep(self, pictures, stream):
        self.kept = None  # those of the picture before
        self.kept = see(self, pictures, stream)
        return self.kept

    CLI.see = see_and_keep


def score_all_positions():
    """Logits of the whole prompt, of which one is wanted (a batch is only measured from its second token on)."""
    forward = CLI.forward

    def forward_all(self, tokens, pictures=(), seqlens=None, select=None, **kwargs):
        one = seqlens is None or len(seqlens) == 1
        logits, gates = forward(self, tokens, pictures, seqlens, select=None if one else select, **kwargs)
        return logits[-1:] if one and select == "last" else logits, gates

    CLI.forward = forward_all


def repeat_keys():
    """A decode step's keys and values copied for every query head."""
    attend = KVCache.attend

    def attend_repeated(self, layer, positions, q, k, v, seqlens):
        if max(seqlens) > 1:
            return attend(self, layer, positions, q, k, v, seqlens)
        longest = max(self.lengths) + 1
        for whole, new in ((self.k, k), (self.v, v)):
            whole[layer, torch.arange(len(q)), :, positions] = new
        keys, values = (x[layer, :, :, :longest].repeat_interleave(q.shape[1] // k.shape[1], 1)
                        for x in (self.k, self.v))
        mask = torch.arange(longest) <= positions[:, None, None, None] if len(q) > 1 else None
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask)[:, :, 0]

    KVCache.attend = attend_repeated


def use_onednn():
    cli.decode_kernels = lambda rows, dtype, products: contextlib.nullcontext()


def lay_out_every_time():
    """Weights as they are stored, given to what PyTorch chooses."""
    cli.decode_products = lambda model, rows: []


def multiply_all_rows():
    cli.MAX_ROWS = 10**9


def return_freed_memory():
    cli.keep_freed_memory = lambda: None


MEASURES = (  # in the order in which they are taken
    ("weights used where the file is mapped into memory, not copied", copy_weights),
    ("logits, and the last layer behind its attention, of the last position alone", score_all_positions),
    ("a square picture's only tile not encoded again", encode_every_crop),
    ("eq. 6-7 with the projections of their one query folded", project_keys_and_values),
    ("folded once a route, not for each of its levels", fold_for_every_level),
    ("MLP(V_k) once a level, however many layers take it", project_every_route),
    ("of the adapters only the r channels of A V_k packed", pack_wide),
    ("the levels freed with the last injection", keep_levels),  # wraps CLI.see: behind what replaces it
    ("attention between patches in blocks of 128 queries (CPU, bfloat16)", attend_to_patches_fused),
    ("decoding: a key/value head's queries as one block, no key copied", repeat_keys),
    ("decoding one sequence: PyTorch's own matrix-vector kernel, not oneDNN's (CPU, bfloat16)", use_onednn),
    ("decoding a batch: weights laid out for oneDNN once, not for every product (CPU, bfloat16; in float32 oneDNN, "
     "not MKL)", lay_out_every_time),  # behind use_onednn, which undoes this too
    ("the decoder's MLP 512 rows at a time (CPU)", multiply_all_rows),
    ("freed memory kept for the next layer (CPU, glibc)", return_freed_memory),
)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def measure(args, device, dtype):
    """With the first args.taken measures -> {figure: value, "first": id of the first token}."""
    for _, undo in MEASURES[args.taken:]:
        undo()
    start = speed.now(device)
    model = speed.load_ours(args, device, dtype, "cli")
    load = speed.now(device) - start
    image, prompt, runs = speed.picture(speed.SMALL)[0], [*speed.TEXT[:15], IMAGE_TOKEN, *speed.TEXT[15:]], []
    for _ in range(3):
        runs.append(speed.clocked(model, [prompt], [[image]], args.steps, device))
    peak = cli.peak_memory(device)
    return {"load": load, "prefill": median(times[0] for times, _ in runs[1:]),
            "decode": median(speed.rate(times) for times, _ in runs[1:]), "peak": peak, "first": runs[0][1][0],
            "batch_8": speed.decode_rate(model, speed.lengths_of(args.steps)["batch_8"], args.steps)}


def run(args, device, dtype):
    """All rounds -> (machine and settings, [[figures of a round] of every line])."""
    head = speed.about(args, device, dtype, "torch")
    samples = [[] for _ in range(len(MEASURES) + 1)]
    with speed.results_file("speedups", args, head) as write:
        for n in range(args.rounds):
            for i in range(len(samples)):
                taken = (i + n * len(samples) // args.rounds) % len(samples)
                samples[taken].append(speed.in_process(__file__, args, "--taken", taken))
                write({"round": n, "measures": [name for name, _ in MEASURES[:taken]], **samples[taken][-1]})
                print(f"round {n + 1} of {args.rounds}: line {i + 1} of {len(samples)} done", file=sys.stderr)
    return head, samples


def table(head, samples):
    def cell(values):
        middle, low, high = (speed.show(f(values)) for f in (median, min, max))
        return middle if low == high else f"{middle} ({low} to {high})"

    names = ["none of these", *("+ " + name for name, _ in MEASURES)]
    rows = [[name, *(cell([x[figure] for x in some]) for figure in FIGURES)] for name, some in zip(names, samples)]
    firsts = {x["first"] for some in samples for x in some}
    return [*markdown(["measure", *FIGURES.values()], rows), "", speed.described(head) +
            f" {'The same' if len(firsts) == 1 else 'Not the same'} first token in every line."]


def main():
    parser = cli.Parser(description=__doc__)
    speed.add_flags(parser, "--taken", type=int)
    args = parser.parse_args()
    device, dtype, mark = speed.settle(args, "speedups")
    if args.taken is not None:
        return print(json.dumps(measure(args, device, dtype)))
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / args.size
        speed.prepare(args)
        head, samples = run(args, device, dtype)
    lines = table(head, samples)
    print("\n".join(lines))
    if args.readme:
        put_between_marks(args.readme, {mark: lines})


if __name__ == "__main__":
    cli.run_program(main)
