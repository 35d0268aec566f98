"""What may lie in a checkpoint's directory: links, pipes, pickles, indices that point elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.hostile.draft import ODD, Draft

FILES = ("config.json", "generation_config.json", "tnlm_report.json", "model.safetensors")
INDEX = "model.safetensors.index.json"


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def outside(draft: Draft) -> None:
    """A file is a link to one outside the directory."""
    file = draft.path / draft.rng.choice([draft.weights().name, "config.json", "tnlm_report.json"])
    away = draft.path.parent / f"{draft.path.name}-{file.name}"
    shutil.move(file, away)
    file.symlink_to(draft.rng.choice([away, Path("..") / away.name]))


def inside(draft: Draft) -> None:
    """A file is a link to one in the directory, which is harmless."""
    file = draft.weights()
    file.rename(file.with_suffix(".data"))
    file.symlink_to(file.with_suffix(".data").name)


def no_file(draft: Draft) -> None:
    """A file is missing, a directory, a pipe, a device or a link to nothing or to itself."""
    names = [draft.weights().name, *FILES]
    file = draft.path / draft.rng.choice([name for name in names if (draft.path / name).exists()])
    file.unlink()
    choice = draft.rng.randrange(6)
    if choice == 1:
        file.mkdir()
    elif choice == 2:
        os.mkfifo(file)
    elif choice > 2:
        file.symlink_to([Path("/dev/zero"), Path("nothing"), Path(file.name)][choice - 3])


def pickles(draft: Draft) -> None:
    """Pickled weights that run code lie beside the others, or in their place."""
    bomb = pickle.dumps({"weight": Bomb(draft.path / "exploded")})
    (draft.path / "pytorch_model.bin").write_bytes(bomb)
    if draft.rng.random() < 0.7:
        for file in draft.path.glob("*.safetensors*"):
            file.unlink()
    if draft.rng.random() < 0.3:
        (draft.path / "model.safetensors").write_bytes(bomb)
    elif draft.rng.random() < 0.3:
        index = {"metadata": {}, "weight_map": {"weight": "pytorch_model.bin"}}
        (draft.path / INDEX).write_text(json.dumps(index))


def adapter(draft: Draft) -> None:
    """An adapter lies beside the weights, sound or not."""
    sound = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["lm_head"],
        "base_model_name_or_path": "x",
    }
    text = draft.rng.choice([json.dumps(sound), "{", "[]", json.dumps({"auto_mapping": 1})])
    (draft.path / "adapter_config.json").write_text(text)
    torch.save({"weight": torch.ones(1)}, draft.path / "adapter_model.bin")


def code(draft: Draft) -> None:
    """The checkpoint brings code, which must not run."""
    (draft.path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(draft.path / 'exploded')!r}).touch()\n"
        "class Config: pass\nclass Model: pass\n"
    )
    config = draft.config()
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["auto_map"] = draft.rng.choice([names, {"AutoConfig": "evil.Config"}, *ODD])
    if draft.rng.random() < 0.5:
        config["model_type"] = "evil"
    if draft.rng.random() < 0.5:
        config["architectures"] = ["Model"]
    if draft.rng.random() < 0.2:
        config["attn_implementation"] = "evil/kernel"
    draft.write(config)


def more_weights(draft: Draft) -> None:
    """Other weights lie beside those that count."""
    names = ("more.safetensors", "model-00007-of-00009.safetensors", "model.fp16.safetensors",
             "shard-00000-model-00000-of-00001.safetensors")  # fmt: skip
    shutil.copy(draft.weights(), draft.path / draft.rng.choice(names))


def other_index(draft: Draft) -> None:
    """An index names files elsewhere, none, or other tensors than there are."""
    file = draft.path / INDEX
    index = (
        json.loads(file.read_text())
        if file.exists()
        else {"metadata": {}, "weight_map": {"a": "b"}}
    )
    listed, rng = index["weight_map"], draft.rng
    away = draft.path.parent / f"{draft.path.name}-away.safetensors"
    shutil.copy(draft.weights(), away)
    name, other = rng.choice(list(listed)), rng.choice(list(listed))
    places = [
        str(away),
        f"../{away.name}",
        "a/b.safetensors",
        "model.bin",
        "",
        ".",
        "x\0.safetensors",
    ]
    choice = rng.randrange(6)
    if choice == 0:
        listed[name] = rng.choice([*places, *ODD])
    elif choice == 1:
        index["weight_map"] = dict.fromkeys(listed, rng.choice(places))
    elif choice == 2:
        del listed[name]
    elif choice == 3:
        listed[name], listed[other] = listed[other], listed[name]
        listed["extra"] = listed[name]
    elif choice == 4:
        index[rng.choice(["weight_map", "metadata"])] = rng.choice(ODD)
    else:
        index = rng.choice(ODD)
    file.write_text(json.dumps(index))
    for single in draft.path.glob("model.safetensors"):
        single.unlink()


def odd_text(draft: Draft) -> None:
    """A JSON file is no JSON, not UTF-8, too deep, too long, or says something twice."""
    names = [name for name in (*FILES[:3], INDEX) if (draft.path / name).exists()]
    file = draft.path / draft.rng.choice(names)
    text = file.read_text()
    depth = draft.rng.choice([70, 1000, 100_000])
    others = [
        b"", b"{", b"null", b"[]", b"3", b'"x"', text.encode("utf-16"), b"\xff\xfe\x00",
        b"\xef\xbb\xbf", b"\xef\xbb\xbf" + text.encode(),
        text[: len(text) // 2].encode(), text.encode() + b",",
        text.replace("{", '{"model_type": "llama", ', 1).encode(), b"\0" * 1000,
        ("[" * depth + "]" * depth).encode(), text.replace("{", '{"x": NaN, ', 1).encode(),
        text.replace("{", '{"x": ' + '{"x":' * depth + "1" + "}" * depth + ", ", 1).encode(),
        text.replace("{", f'{{"x": {"9" * 5000}, ', 1).encode(),
        (b"[" + b"1," * (17 * 2**20) + b"1]"),
        text.replace("{", '{"x": "' + "y" * (33 * 2**20) + '", ', 1).encode(),
    ]  # fmt: skip
    file.write_bytes(draft.rng.choice(others))


def odd_config(draft: Draft) -> None:
    """A field of the model's own config holds anything."""
    config = draft.config()
    names = [name for name in config if name not in ("quantization_config", "transformers_weights")]
    config[draft.rng.choice(names)] = draft.rng.choice(ODD)
    draft.write(config)


def another_number(draft: Draft) -> None:
    """A number of the model's own config is another, up to far too large."""
    config = draft.config()
    names = [name for name, value in config.items() if type(value) in (int, float)]
    name = draft.rng.choice(names)
    value = config[name]
    config[name] = draft.rng.choice([0, -value, value + 1, 2 * value, 10**6, 10**9, 10**18])
    draft.write(config)


def another_class(draft: Draft) -> None:
    """The config names another class, model or dtype."""
    config = draft.config()
    field, values = draft.rng.choice(
        [
            ("architectures", [["LlamaModel"], ["BertModel"], ["PreTrainedModel"], ["AutoModel"],
                               ["NoSuch"], ["__version__"], ["LlamaConfig"], "x", [3], {}, []]),
            ("model_type", ["llama", "gpt2", "bert", "nothing", "t5", None, 3, [], {}]),
            ("dtype", ["float16", "bfloat16", "int64", "bool", "float8_e4m3fn", "complex64", 3]),
            ("transformers_weights", ["../x.safetensors", "/etc/passwd", "x.bin", 3, [], {}]),
            ("configuration_files", [["config.4.0.0.json"], 3, "x", []]),
            ("tie_word_embeddings", [True, False, None, 3]),
            ("num_labels", [10**10, -1, "x"]), ("id2label", [10, [], {"x": 1}, {"0": []}]),
        ]
    )  # fmt: skip
    config[field] = draft.rng.choice(values)
    draft.write(config)


def odd_report(draft: Draft) -> None:
    """A field of the report holds anything, its sums too."""
    file = draft.path / "tnlm_report.json"
    report = json.loads(file.read_text())
    if draft.rng.random() < 0.5:
        report["sha256"][draft.rng.choice(["config.json", "../x", "x"])] = draft.rng.choice(ODD)
    else:
        report[draft.rng.choice(list(report))] = draft.rng.choice(ODD)
    file.write_text(json.dumps(report))


FAMILY: list[tuple[Callable[[Draft], None], int, bool]] = [
    (outside, 1, False), (inside, 1, False), (no_file, 2, False), (pickles, 1, False),
    (adapter, 1, False), (code, 1, True), (more_weights, 1, False), (other_index, 3, False),
    (odd_text, 3, True), (odd_config, 4, True), (another_number, 4, True), (another_class, 3, True),
    (odd_report, 1, False),
]  # fmt: skip
