"""Make the files of this folder: word problems with right and wrong solutions, and a tokenizer.

    python examples/make.py dev_gsm8k.jsonl.gz

The problems are the first eight of the file, each with its five solutions (one by a human, four
sampled from models of OpenAI's grade-school-math repository, MIT licence). The tokenizer stands in
for a generator's: SentencePiece-like byte-fallback BPE, trained on the same solutions.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent


def main(source: str) -> None:
    """Write gsm8k.jsonl and generator/ beside this file."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:8]
    with open(HERE / "gsm8k.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            if row["prompt"] in prompts:
                kept = {
                    "id": row["id"],
                    "prompt": row["prompt"],
                    "response": row["response"],
                    "is_correct": row["meta"]["is_correct"],
                }
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        max_token_length=12,
        show_progress=False,
    )
    texts = (row["response"] for row in rows)
    # Words apart, as SentencePiece does: no token goes across a space.
    backend.train_from_iterator((f"▁{word}" for text in texts for word in text.split(" ")), trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
    )
    tokenizer.save_pretrained(HERE / "generator")


if __name__ == "__main__":
    main(sys.argv[1])
