"""Write a random checkpoint in the layout of the published LLaVA-OneVision ones (lmms-lab, made with LLaVA-NeXT).

    python experiments/random_checkpoint.py --size 0.5b --out models/random-0.5b --tokenizer tokenizer.json

Names, shapes, dtype, the split into files and the fields of config.json are those of `llava-onevision-qwen2-0.5b-ov`
and `-7b-ov`; only the numbers are not. So loading, memory and speed can be measured without the hub; what such a
model *says* is noise. (config.json follows the 7B's; the 0.5B's own was not seen, only its sizes are known.)
--layout llava-hf gives the same numbers the names and config.json of llava-hf's conversions, which transformers reads.

    size    tensors   bytes of tensors   head               files
    0.5b        716      1,787,236,416   tied, not stored   model.safetensors
    7b          765     16,060,697,664   stored             4 shards of 4.88, 4.93, 4.99 and 1.26 GB, and an index
    tiny         84    39 MB with Qwen   tied, not stored   model.safetensors; as many embedding rows as the tokenizer

Values: normal(0, 0.02), with which activations neither vanish nor blow up; the weights of norms are 1; biases and
other vectors are normal(0, 0.02) too, not zero: a loader that dropped one would change the output. One file at a time
is in memory; the folder has a temporary name until it is complete.
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli  # noqa: E402

STD = 0.02
SHARD = 5 * 10**9  # bytes; the limit that transformers used when the published files were saved


@dataclass(frozen=True)
class Size:
    """Qwen2 (hidden to tied) and SigLIP (the rest; 384-pixel crops, patches of 14). vocab_size 0: as the tokenizer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab_size: int
    sliding_window: int
    repetition_penalty: float
    tied: bool
    vision_hidden: int = 1152
    vision_layers: int = 26
    vision_intermediate: int = 4304


SIZES = {
    "0.5b": Size(896, 24, 14, 2, 4864, 151936, 32768, 1.1, tied=True),
    "7b": Size(3584, 28, 28, 4, 18944, 152064, 131072, 1.05, tied=False),
    "tiny": Size(64, 2, 4, 2, 128, 0, 32768, 1.1, True, vision_hidden=768, vision_layers=3, vision_intermediate=304),
}


def tensor_shapes(size, vocab_size):
    """Every tensor of the published file -> {name: shape}, in the order of the modules, which decides the shards."""
    D, V, Dv, P = size.hidden, vocab_size, size.vision_hidden, (384 // 14) ** 2
    kv = D // size.heads * size.kv_heads
    shapes = {"model.image_newline": (D,), "model.embed_tokens.weight": (V, D)}
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", D), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, D)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (D, D)
        shapes[layer + "mlp.gate_proj.weight"] = (size.intermediate, D)
        shapes[layer + "mlp.up_proj.weight"] = (size.intermediate, D)
        shapes[layer + "mlp.down_proj.weight"] = (D, size.intermediate)
        shapes[layer + "input_layernorm.weight"] = (D,)
        shapes[layer + "post_attention_layernorm.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)

    def weight_and_bias(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]

    vision = "model.vision_tower.vision_tower.vision_model."
    weight_and_bias(vision + "embeddings.patch_embedding", Dv, 3, 14, 14)
    shapes[vision + "embeddings.position_embedding.weight"] = (P, Dv)
    for i in range(size.vision_layers):
        layer = f"{vision}encoder.layers.{i}."
        for name in ("k", "v", "q", "out"):
            weight_and_bias(f"{layer}self_attn.{name}_proj", Dv, Dv)
        weight_and_bias(layer + "layer_norm1", Dv)
        weight_and_bias(layer + "mlp.fc1", size.vision_intermediate, Dv)
        weight_and_bias(layer + "mlp.fc2", Dv, size.vision_intermediate)
        weight_and_bias(layer + "layer_norm2", Dv)
    weight_and_bias(vision + "post_layernorm", Dv)  # in the published files, and never used
    weight_and_bias("model.mm_projector.0", D, Dv)
    weight_and_bias("model.mm_projector.2", D, D)
    if not size.tied:
        shapes["lm_head.weight"] = (V, D)
    return shapes


LLAVA_HF = [  # lmms-lab's prefix -> llava-hf's since transformers 4.52; the first that fits wins
    ("model.vision_tower.vision_tower.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
]


def llava_hf_name(name):
    old, new = next(pair for pair in LLAVA_HF if name.startswith(pair[0]))
    return new + name[len(old) :]


def random_tensor(name, shape, generator):
    if "norm" in name and name.endswith(".weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, STD, generator=generator)


def shards(shapes):
    """Cut the tensors into files of at most SHARD bytes, in order, as transformers does. -> list of {name: shape}"""
    files, used = [{}], 0
    for name, shape in shapes.items():
        n = math.prod(shape) * 2
        if files[-1] and used + n > SHARD:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += n
    return files


def model_config(size, vocab_size):
    """config.json: the Qwen2 fields, then LLaVA-NeXT's. As in the published one, SigLIP is named, not described."""
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": STD,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": size.sliding_window,
        "use_sliding_window": False,
        "tie_word_embeddings": size.tied,
        "vocab_size": vocab_size,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0",
        "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "image_split_resolution": None,
        "image_token_index": 151646,
        "mm_hidden_size": size.vision_hidden,
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_vision_tower_lr": 2e-06,
        "pos_skipping_range": 4096,
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "use_pos_skipping": False,
    }


def llava_hf_config(size, vocab_size):
    """config.json of llava-hf's conversions; here SigLIP is described. (No published one was seen: its fields are
    those that transformers' LlavaOnevisionConfig has.)"""
    lmms = model_config(size, vocab_size)
    text = ("hidden_size", "intermediate_size", "max_position_embeddings", "max_window_layers", "num_attention_heads",
            "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "sliding_window",
            "use_sliding_window", "tie_word_embeddings", "vocab_size", "bos_token_id", "eos_token_id")
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "dtype": "bfloat16",
        "image_grid_pinpoints": lmms["image_grid_pinpoints"],
        "image_token_index": min(151646, vocab_size - 2),
        "video_token_index": min(151647, vocab_size - 1),
        "tie_word_embeddings": size.tied,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {"model_type": "qwen2", **{key: lmms[key] for key in text}},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": size.vision_hidden,
            "image_size": 384,
            "intermediate_size": size.vision_intermediate,
            "num_attention_heads": size.vision_hidden // (72 if size.vision_hidden == 1152 else 64),
            "num_hidden_layers": size.vision_layers,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def generation_config(size):
    """generation_config.json as published: its repetition penalty stays on when sampling is switched off."""
    return {
        "bos_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "repetition_penalty": size.repetition_penalty,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.40.0.dev0",
    }


def write_json(path, value, sort_keys=False):
    cli.write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def tokenizer_rows(path):
    """How many ids the tokenizer can produce: the largest one plus 1."""
    try:
        return 1 + max(tokenizers.Tokenizer.from_file(str(path)).get_vocab().values())
    except Exception as e:  # the library raises bare Exception
        raise cli.InputError(f"{path}: not a tokenizer: {cli.first_line(e)}") from e


def save(path, tensors):
    cli.write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def begin(out):
    """An empty folder beside `out`, to be renamed to it once it is complete -> its path"""
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # what an interrupted run left
    partial.mkdir(parents=True)
    return partial


def write_checkpoint(size, out, tokenizer, seed=0, layout="lmms-lab"):
    """Write the folder `out`; it appears under its name only when it is complete. -> (tensors, bytes of tensors)"""
    rows = tokenizer_rows(tokenizer)
    vocab_size = size.vocab_size or -(-rows // 64) * 64
    if rows > vocab_size:
        raise cli.InputError(f"{tokenizer} has {rows} ids, the embedding of this size only {vocab_size} rows")
    shapes, config = tensor_shapes(size, vocab_size), model_config(size, vocab_size)
    if layout == "llava-hf":
        shapes = {llava_hf_name(name): shape for name, shape in shapes.items()}
        config = llava_hf_config(size, vocab_size)
    files, total = shards(shapes), sum(math.prod(s) for s in shapes.values()) * 2
    partial, bar = begin(out), tqdm(total=len(shapes), unit="tensor", desc=out.name)
    generator, weight_map = torch.Generator().manual_seed(seed), {}
    for i, part in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for tensor, shape in part.items():
            tensors[tensor] = random_tensor(tensor, shape, generator)
            bar.update()
        save(partial / name, tensors)
        weight_map.update(dict.fromkeys(part, name))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(partial / "model.safetensors.index.json", index, sort_keys=True)
    write_json(partial / "config.json", config)
    write_json(partial / "generation_config.json", generation_config(size))
    shutil.copyfile(tokenizer, partial / "tokenizer.json")
    os.rename(partial, out)
    return len(shapes), total


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True, help="whose shapes; tiny: the same names, toy size")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Qwen2's tokenizer.json, to copy (tiny: any)")
    parser.add_argument("--layout", choices=("lmms-lab", "llava-hf"), default="lmms-lab", help="whose names")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    args = parser.parse_args()
    out = args.out.resolve()
    if out.exists():
        raise cli.InputError(f"{args.out} exists: name a new folder")
    start = time.time()
    count, total = write_checkpoint(SIZES[args.size], out, args.tokenizer, args.seed, args.layout)
    print(f"{args.out}: {count} tensors, {total:,} bytes, {time.time() - start:.0f} s")


if __name__ == "__main__":
    cli.run_program(main)
