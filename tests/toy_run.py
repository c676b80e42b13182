"A base model and rows that cost nothing, for tests of the whole path"

import json
from pathlib import Path

WORDS = "cat dog bird fish frog lion wolf bear duck goat".split()


def rows(n: int = 30) -> list[dict]:
    "Alpaca rows, all different"
    return [
        dict(instruction=f"Write {WORDS[i % 10]} {i // 10} times.", output=WORDS[i % 10].upper())
        for i in range(n)
    ]


def write_jsonl(path: Path, lines: list) -> Path:
    "Rows, or lines that are text already"
    text = "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def make_base(folder: Path) -> str:
    "A random two-layer Llama with a byte-level tokenizer and the ChatML template"
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from instruct_ft.tokenization.encode import TEMPLATES

    tokens = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [json.dumps(r) for r in rows()]
    tokens.train_from_iterator(texts, vocab_size=320, special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATES["chatml"].jinja
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast), max_position_embeddings=256, tie_word_embeddings=True, **shape
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)
